from __future__ import annotations

import pytest

from lightning_sft.training.progress import _that_fit

SHOWN = {"left": "0:00:11", "loss": "0.718", "tok/s": "9,357", "retention": "0.940"}


@pytest.mark.parametrize("width", [0, 12, 13, 25, 26, 38, 39, 55, 56, 200])
def test_what_stands_beside_the_bar_fits_the_line(width):
    shown = _that_fit(SHOWN, width)
    texts = [f"{name}: {value}" for name, value in SHOWN.items()]
    assert list(shown.items()) == list(SHOWN.items())[: len(shown)]
    assert len(" ".join(texts[: len(shown)])) <= width
    if len(shown) < len(SHOWN):
        assert len(" ".join(texts[: len(shown) + 1])) > width
