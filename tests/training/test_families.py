"""Each family gets rows on which it computes what it computes on every row alone, whatever its attention is."""

from __future__ import annotations

import copy

import pytest
import torch
import zoo

from lightning_sft.training.layout import find_layout, hidden_states


def by_row(model, rows) -> torch.Tensor:
    """Logits at the positions that predict a trained token: one row at a time, in transformers' own way."""
    logits = []
    for row in rows:
        ids = torch.from_numpy(row.input_ids).long()[None]
        trained = torch.from_numpy(row.weights[1:] > 0)
        logits.append(model(input_ids=ids, use_cache=False).logits[0, :-1][trained])
    return torch.cat(logits).float()


@pytest.mark.parametrize("name", [*zoo.FLATTENED, *zoo.PADDED])
@torch.no_grad()
def test_what_a_family_computes_on_its_rows_is_what_it_computes_on_each_row_alone(name):
    model, rows = zoo.model(name).eval(), zoo.examples()
    expected = by_row(copy.deepcopy(model), rows)
    layout = find_layout(model, 0)
    batch = layout.collate(rows, 1.0)
    ours = layout.head(hidden_states(model, batch, own_logits=layout.own_logits))
    assert torch.allclose(ours, expected, atol=2e-5 * float(expected.abs().max()), rtol=0)
    assert (layout.padded_because is None) == (name in zoo.FLATTENED), layout.padded_because
    assert layout.own_logits == (name == "recurrent_gemma"), "only its soft cap has a name of its own"
    if name in zoo.PADDED:
        assert zoo.PADDED[name] in layout.padded_because


@pytest.mark.parametrize("name", ["qwen2_moe_window", "phimoe", "mixtral", "olmo3", "gemma2"])
@torch.no_grad()
def test_a_window_that_is_longer_than_the_trials_rows_is_kept_all_the_same(name):
    """The trial sees no window of 200 at work; rows of 500 tokens do."""
    model, rows = (
        zoo.model(name, sliding_window=200, max_position_embeddings=512).eval(),
        zoo.examples((500, 30)),
    )
    expected = by_row(copy.deepcopy(model), rows)
    layout = find_layout(model, 0)
    ours = layout.head(hidden_states(model, layout.collate(rows, 1.0), own_logits=layout.own_logits))
    assert torch.allclose(ours, expected, atol=5e-5 * float(expected.abs().max()), rtol=0)
    wider = by_row(zoo.model(name, sliding_window=400, max_position_embeddings=512).eval(), rows)
    assert (wider - expected).abs().max() > 1e-2, "no teeth: the window makes no difference"
