"""How often a source's rows are seen: exactly as its weight says, over epochs."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_sft import SFTDataModule, SFTError
from lightning_sft.data.mixture import draw, rows_per_epoch
from lightning_sft.data.sources import Source

sources = st.lists(st.integers(0, 2), min_size=1, max_size=30)
weights = st.lists(st.sampled_from([0.1, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0]), min_size=3, max_size=3)


@given(sources=sources, weights=weights, seed=st.integers(0, 2), epochs=st.integers(1, 7))
def test_over_epochs_every_row_of_a_source_is_seen_about_as_often_as_any_other(
    sources, weights, seed, epochs
):
    seen = Counter(
        int(row) for epoch in range(epochs) for row in draw(sources, weights, seed=seed, epoch=epoch)
    )
    for source, weight in enumerate(weights):
        rows = [row for row, its in enumerate(sources) if its == source]
        counts = [seen.pop(row, 0) for row in rows]
        assert sum(counts) == epochs * rows_per_epoch(len(rows), weight)
        if counts:
            assert max(counts) - min(counts) <= 1
    assert not seen


@given(sources=sources, weights=weights, seed=st.integers(0, 2), epoch=st.integers(0, 9))
def test_an_epoch_repeats_no_row_before_it_has_had_all_of_its_source(sources, weights, seed, epoch):
    counts = Counter(draw(sources, weights, seed=seed, epoch=epoch).tolist())
    for source in range(3):
        own = [counts[row] for row, its in enumerate(sources) if its == source]
        assert not own or max(own) - min(own) <= 1


@given(sources=sources, epoch=st.integers(0, 3))
def test_at_weight_one_an_epoch_is_every_row_once(sources, epoch):
    assert sorted(draw(sources, [1.0] * 3, seed=0, epoch=epoch)) == list(range(len(sources)))


def test_two_halves_make_a_whole_and_the_seed_says_which():
    halves = [set(draw([0] * 40, [0.5], seed=1, epoch=epoch)) for epoch in (0, 1, 2)]
    assert halves[0] | halves[1] == set(range(40))
    assert not halves[0] & halves[1]
    assert halves[2] == halves[0]
    assert halves[0] != set(range(20))
    assert set(draw([0] * 40, [0.5], seed=2, epoch=0)) != halves[0]


def test_sources_of_one_size_do_not_draw_the_same_rows():
    rows = draw([0] * 40 + [1] * 40, [0.5, 0.5], seed=0, epoch=0)
    assert set(rows[:20]) != {row - 40 for row in rows[20:]}


@pytest.mark.parametrize(
    ("rows", "weight", "count"), [(10, 0.25, 2), (10, 1.5, 15), (3, 0.01, 1), (0, 2.0, 0), (7, 2.0, 14)]
)
def test_rows_per_epoch_are_the_nearest_whole_number_and_at_least_one(rows, weight, count):
    assert rows_per_epoch(rows, weight) == count


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_a_weight_that_means_nothing_is_refused_by_source(weight):
    with pytest.raises(SFTError, match="weight is") as caught:
        SFTDataModule(train=[Source("a.jsonl", weight=weight)])
    assert caught.value.where == "data.train: a.jsonl"


def test_validation_data_has_no_weight():
    with pytest.raises(SFTError, match="evaluated once"):
        SFTDataModule(train="a.jsonl", val=[Source("b.jsonl", weight=0.5)])
