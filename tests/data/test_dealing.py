"""Ranks share a micro-batch: nothing lost, equally many units, about equally much work."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_sft.data.dealing import deal

costs = st.lists(st.integers(1, 500), max_size=30)
before = st.lists(st.integers(0, 500), min_size=1, max_size=5)


@given(costs=costs, before=before)
def test_every_unit_goes_to_one_rank_and_ranks_get_equally_many(costs, before):
    shares = deal(costs, list(before))
    assert len(shares) == len(before)
    assert sorted(unit for share in shares for unit in share) == list(range(len(costs)))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert all(share == sorted(share) for share in shares)


@given(costs=costs, before=before)
def test_the_work_dealt_out_is_added_to_the_loads(costs, before):
    loads = list(before)
    shares = deal(costs, loads)
    assert loads == [old + sum(costs[u] for u in share) for old, share in zip(before, shares, strict=True)]


def test_a_rank_that_has_less_to_do_so_far_gets_the_longer_ones():
    assert deal([5, 9, 1, 7], [100, 0]) == [[0, 2], [1, 3]]
    assert deal([5], [100, 0]) == [[], [0]]


@given(costs=st.lists(st.integers(1, 500), min_size=8, max_size=8))
def test_the_halves_of_eight_are_near_the_best_there_are(costs):
    loads = [0, 0]
    deal(costs, loads)
    best = min(abs(sum(costs) - 2 * sum(half)) for half in combinations(costs, 4))
    # no exchange of two units brings them closer, so what is left is at most what separates two units
    assert abs(loads[0] - loads[1]) <= best + max(costs) - min(costs)


@pytest.mark.parametrize(("middle", "spread", "worst"), [(110, 0.75, 0.01), (600, 0.9, 0.005)])
def test_ranks_are_within_a_percent_on_real_lengths(middle, spread, worst):
    generator = np.random.default_rng(0)
    excess = []
    for _ in range(200):
        loads = [0, 0]
        deal(np.clip(generator.lognormal(np.log(middle), spread, 16), 8, 2048).astype(int).tolist(), loads)
        excess.append(2 * max(loads) / sum(loads) - 1)
    assert np.mean(excess) < worst
