"""Differences between two models on the same items, against hand computation."""

from __future__ import annotations

from math import comb

import pytest

from lightning_sft import Record, Score
from lightning_sft.evaluation.paired import differences, mcnemar


def records(values, metric="acc", weights=None):
    given = weights or [1.0] * len(values)
    return [
        Record("t", n, "", "", "", {metric: value}, weights={metric: weight})
        for n, (value, weight) in enumerate(zip(values, given, strict=True))
    ]


def test_gained_and_lost_items_and_the_exact_test():
    before = records([1, 0, 0, 0, 1, 1, 0, 0, 0, 0])
    after = records([0, 1, 1, 1, 1, 1, 1, 1, 1, 0])
    (found,) = differences(before, after)
    assert found.gained == tuple(("t", n) for n in (1, 2, 3, 6, 7, 8))
    assert found.lost == (("t", 0),)
    assert (found.before, found.after, found.items) == (0.3, 0.8, 10)
    assert found.p == pytest.approx(2 * (comb(7, 0) + comb(7, 1)) / 2**7)
    assert found.low < 0.5 < found.high


def test_nothing_changed():
    (found,) = differences(records([1, 0, 1]), records([1, 0, 1]))
    assert (found.low, found.high, found.p, found.gained, found.lost) == (0.0, 0.0, 1.0, (), ())


def test_weighted_means_and_no_test_for_what_is_not_right_or_wrong():
    (found,) = differences(records([2.0, 4.0], "bpb", [1, 3]), records([1.0, 3.0], "bpb", [1, 3]))
    assert (found.before, found.after, found.p) == (3.5, 2.5, None)
    assert found.low == found.high == pytest.approx(-1.0)
    (rates,) = differences(records([0, 1], "inst", [2, 1]), records([1, 1], "inst", [2, 1]))
    assert (rates.before, rates.after, rates.p, rates.gained) == (pytest.approx(1 / 3), 1.0, None, ())


def test_only_items_of_both_are_compared():
    (found,) = differences(records([1, 1, 1]), records([1, 0]))
    assert found.items == 2


def test_a_metric_of_some_tasks_is_compared_over_their_items():
    def both(right, squad):
        return [*records([right, 1]), Record("u", 0, "", "", "", {"f1": squad})]

    acc, f1 = differences(both(0, 0.25), both(1, 0.5))
    assert (acc.metric, acc.items, acc.gained) == ("acc", 2, (("t", 0),))
    assert (f1.metric, f1.items, f1.before, f1.after) == ("f1", 1, 0.25, 0.5)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    import numpy as np

    draw, hits = np.random.default_rng(0), 0
    for seed in range(60):
        before, after = draw.random(80) < 0.4, draw.random(80) < 0.6
        (found,) = differences(records(before.astype(float)), records(after.astype(float)), seed)
        hits += found.low <= 0.2 <= found.high
    assert 52 <= hits <= 60


@pytest.mark.parametrize(
    ("gained", "lost", "p"), [(0, 0, 1.0), (5, 5, 1.0), (10, 0, 2 / 2**10), (3, 1, 0.625)]
)
def test_mcnemar(gained, lost, p):
    assert mcnemar(gained, lost) == pytest.approx(p)


def test_pooled_standard_error():
    parts = [Score.mean("a", "acc", [0, 1, 1]), Score.mean("b", "acc", [1, 0, 0, 0, 1])]
    found = Score.pooled("all", parts)
    expected = ((3 - 1) * parts[0].stderr ** 2 * 3 + (5 - 1) * parts[1].stderr ** 2 * 5) / (8 - 2) / 8
    assert found.stderr == pytest.approx(expected**0.5)
    assert (found.value, found.items) == (0.5, 8)
    assert Score.mean("one", "acc", [1.0]).stderr is None
