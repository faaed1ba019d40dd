"""What a forgetting probe asks, and how often: never more than its share, unless the fewest are more."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_sft import checksum
from lightning_sft_callbacks.planned import Part, plan, spread, told

TEXTS, QUESTIONS, EXAMPLES = Part([300] * 60, 8, 60), Part([20] * 200, 16, 200), Part([40] * 400, 16, 128)
ALL = 60 * 300 + 200 * 20 + 128 * 40


def made(training: float, steps: int = 1000, every: int | None = None, cost: float = 0.05):
    return plan([TEXTS, QUESTIONS, EXAMPLES], steps=steps, training=training, cost=cost, every_n_steps=every)


def test_a_long_run_is_asked_everything_as_often_as_it_may():
    found = made(training=101 * ALL / 0.05)
    assert found.counts == [60, 200, 128]
    assert found.every_n_steps == 10  # at 0, 10, ..., 1000: 101 times
    assert math.isclose(found.share, 0.05)


def test_a_shorter_run_is_asked_less_each_time():
    found = made(training=2.5 * ALL / 0.05)
    assert found.every_n_steps == 250
    assert all(0.45 < part / most <= 0.5 for part, most in zip(found.counts, (60, 200, 128), strict=True))
    assert 0.045 < found.share <= 0.05


def test_a_very_short_run_is_asked_the_fewest_and_told_so():
    found = made(training=ALL / 0.05 / 10)
    assert found.counts == [8, 16, 16]
    assert found.every_n_steps == 0
    assert found.share == 2 * (8 * 300 + 16 * 20 + 16 * 40) / (ALL / 0.05 / 10)
    line = told({"general": 8, "task": 16}, {"general": 60, "task": 400}, 0, found.share, 0.05)
    assert line.startswith(
        "ForgettingProbe asks 8 of 60 general, 16 of 400 validation examples, at the start and the end"
    )
    assert "more than cost (5%)" in line


def test_what_is_set_is_kept():
    assert made(training=1e12, every=0).every_n_steps == 0
    often = made(training=5 * ALL / 0.05, every=50)  # 21 times
    assert often.every_n_steps == 50
    assert often.share <= 0.05
    assert often.counts[0] < 60 * 5 / 20
    endless = made(training=0.0, steps=0)
    assert (endless.every_n_steps, endless.counts, endless.share) == (0, [60, 200, 128], 0.0)


parts = st.lists(st.lists(st.integers(1, 500), min_size=1, max_size=80), min_size=1, max_size=3)


@given(
    parts,
    st.integers(1, 5000),
    st.floats(1, 1e8),
    st.sampled_from([0.01, 0.05, 1.0]),
    st.sampled_from([None, 0, 7]),
)
def test_the_share_is_what_the_chosen_ones_cost_and_more_than_it_may_be_only_at_the_fewest(
    costs, steps, training, cost, every
):
    given_parts = [Part(each, min(8, len(each)), len(each)) for each in costs]
    found = plan(given_parts, steps=steps, training=training, cost=cost, every_n_steps=every)
    n = found.every_n_steps
    times = len({0, steps, *(range(0, steps + 1, n) if n else ())})
    once = sum(
        sum(each[place] for place in spread(len(each), count))
        for each, count in zip(costs, found.counts, strict=True)
    )
    assert math.isclose(found.share, times * once / training)
    fewest = [min(8, len(each)) for each in costs]
    assert all(
        least <= count <= len(each) for least, count, each in zip(fewest, found.counts, costs, strict=True)
    )
    if found.share > cost * (1 + 1e-9):
        assert found.counts == fewest
        assert every or times == 2 or steps == 1


def test_every_bit_of_a_weight_counts():
    weight = torch.randn(300, 70)
    before = checksum(weight)
    assert checksum(weight.clone()) == before
    for place in ((0, 0), (299, 69), (123, 45)):
        other = weight.clone()
        other[place] = torch.nextafter(other[place], torch.tensor(9.0))
        assert checksum(other) != before
    swapped = weight[torch.randperm(300, generator=torch.Generator().manual_seed(0))]
    assert checksum(swapped) != before
    for dtype in (torch.bfloat16, torch.float64, torch.uint8):
        assert len(checksum(weight.to(dtype))) == 2
