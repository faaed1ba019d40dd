"""Bins: nothing lost, nothing over the edge, and as full as the slow obvious way makes them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_sft.data.packing import best_fit, rectangles

CAPACITY = 64
lengths = st.lists(st.integers(1, CAPACITY), max_size=60)


def slow_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """The contents of the bins, by looking at every bin for every item."""
    loads: list[int] = []
    for length in lengths:
        fitting = [index for index, load in enumerate(loads) if load + length <= capacity]
        if fitting:
            loads[max(fitting, key=lambda index: loads[index])] += length
        else:
            loads.append(length)
    return sorted(loads)


def first_fit(lengths: list[int], capacity: int) -> int:
    loads = np.zeros(len(lengths), np.int64)
    for length in lengths:
        loads[np.argmax(loads + length <= capacity)] += length
    return int(np.count_nonzero(loads))


def loads_of(bins: list[list[int]], lengths: list[int]) -> list[int]:
    return [sum(lengths[item] for item in each) for each in bins]


@given(lengths=lengths)
def test_every_item_is_in_one_bin_and_no_bin_is_overfull(lengths):
    bins = best_fit(lengths, CAPACITY)
    assert sorted(item for each in bins for item in each) == list(range(len(lengths)))
    assert all(0 < load <= CAPACITY for load in loads_of(bins, lengths))


@given(lengths=lengths)
def test_every_item_went_into_the_fullest_bin_that_had_room(lengths):
    assert sorted(loads_of(best_fit(lengths, CAPACITY), lengths)) == slow_best_fit(lengths, CAPACITY)


@given(lengths=lengths)
def test_no_two_bins_could_have_been_one(lengths):
    loads = sorted(loads_of(best_fit(lengths, CAPACITY), lengths))
    assert len(loads) < 2 or loads[0] + loads[1] > CAPACITY


def test_an_item_that_fills_a_bin_leaves_no_room_behind():
    assert best_fit([64, 64, 1], CAPACITY) == [[0], [1], [2]]
    assert best_fit([40, 40, 24, 24], CAPACITY) == [[0, 3], [1, 2]]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("middle", "spread"), [(110, 0.75), (600, 0.9), (900, 0.4)])
def test_longest_first_needs_no_more_bins_than_first_fit_in_either_order(middle, spread, seed):
    generator = np.random.default_rng(seed)
    sizes = np.clip(generator.lognormal(np.log(middle), spread, 2000), 1, 2048).astype(int).tolist()
    descending = sorted(sizes, reverse=True)
    bins = len(best_fit(descending, 2048))
    assert bins <= first_fit(descending, 2048)
    assert bins <= first_fit(sizes, 2048)


@given(lengths=lengths)
def test_rectangles_hold_their_padding_too(lengths):
    descending = sorted(lengths, reverse=True)
    runs = rectangles(descending, CAPACITY)
    assert [item for run in runs for item in run] == list(range(len(lengths)))
    assert all(len(run) * descending[run[0]] <= CAPACITY for run in runs)
    assert all((len(run) + 1) * descending[run[0]] > CAPACITY for run in runs[:-1])
