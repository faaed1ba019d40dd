"""Retention and its parts, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_sft_callbacks.retention import (
    Measured,
    change,
    dominates,
    intervals,
    objective,
    retained,
    retention,
)

TEXT_0 = Measured(losses=(10.0, 20.0), sizes=(5, 10), bytes=(20, 40), kl=(0.0, 0.0))
TEXT_1 = Measured(losses=(12.0, 21.0), sizes=(5, 10), bytes=(20, 40), kl=(1.0, 0.5))
ASKED_0 = Measured(losses=(0.1, 0.2, 2.0, 3.0), sizes=(1,) * 4, right=(True, True, False, False), chance=0.25)
ASKED_1 = Measured(losses=(0.1, 1.2, 2.0, 0.3), sizes=(1,) * 4, right=(True, False, False, True), chance=0.25)


def test_what_changed_in_a_text():
    found = change(TEXT_0, TEXT_1)
    assert found == pytest.approx(
        {
            "ce": 33 / 15, "delta_ce": 3 / 15, "delta_bpb": 3 / (60 * math.log(2)), "kl": 1.5 / 15,
            "retention": math.exp(-0.2),
        }
    )  # fmt: skip


def test_what_changed_in_questions():
    found = change(ASKED_0, ASKED_1)
    assert (found.pop("lost"), found.pop("gained")) == ([1], [3])
    assert found == pytest.approx(
        {
            "ce": 3.6 / 4, "delta_ce": -1.7 / 4, "accuracy": 0.5, "delta_accuracy": 0.0, "above_chance": 0.25 / 0.75,
            "f10": 0.25, "b01": 0.25, "retention": 1.0,
        }
    )  # fmt: skip


def test_an_evaluators_score_keeps_what_is_left_of_it():
    assert retained(Measured(score=0.5), Measured(score=0.4)) == pytest.approx(0.8)
    assert retained(Measured(score=0.5), Measured(score=0.6)) == 1.0
    assert retained(Measured(score=0.0), Measured(score=0.0)) == 1.0
    perplexity = [Measured(score=score, higher_is_better=False) for score in (8.0, 10.0)]
    assert retained(*perplexity) == pytest.approx(0.8)
    assert retained(*perplexity[::-1]) == 1.0


def test_nothing_is_kept_of_a_model_whose_figures_are_no_numbers():
    spoilt = Measured(losses=(12.0, math.nan), sizes=(5, 10), bytes=(20, 40))
    assert retained(TEXT_0, spoilt) == change(TEXT_0, spoilt)["retention"] == 0.0
    assert intervals({"d": TEXT_0}, {"d": spoilt}, {"d": 1.0})[1] == (0.0, 0.0)
    for higher in (True, False):
        scores = [Measured(score=score, higher_is_better=higher) for score in (2.0, math.nan)]
        assert retained(*scores) == 0.0


def test_retention_is_the_weighted_geometric_mean():
    assert retention({"a": 0.5, "b": 0.8}, {"a": 1, "b": 3}) == pytest.approx(0.5**0.25 * 0.8**0.75)
    assert retention({"a": 0.5, "b": 0.5}, {"a": 1, "b": 1}) == pytest.approx(0.5)
    assert retention({"a": 0.0, "b": 1.0}, {"a": 1, "b": 1}) == 0.0
    assert retention({"a": 0.0, "b": 0.9}, {"a": 0, "b": 1}) == pytest.approx(0.9)


def test_nothing_changed_is_exactly_one():
    both = {"text": TEXT_0, "asked": ASKED_0}
    assert retention({n: retained(m, m) for n, m in both.items()}, {"text": 0.3, "asked": 0.7}) == 1.0
    deltas, of_r = intervals(both, both, {"text": 0.3, "asked": 0.7})
    assert deltas == {"text": (0.0, 0.0), "asked": (0.0, 0.0)}
    assert of_r == (1.0, 1.0)


def test_intervals_are_those_of_drawing_items_again():
    numbers = np.random.default_rng(1)
    sizes = tuple(numbers.integers(5, 50, 40).tolist())
    before = Measured(losses=tuple(2.0 * s for s in sizes), sizes=sizes, bytes=sizes)
    now = Measured(
        losses=tuple(2.0 * s + s * numbers.normal(0.3, 0.4) for s in sizes), sizes=sizes, bytes=sizes
    )
    deltas, of_r = intervals({"d": before}, {"d": now}, {"d": 1.0})
    drawn = []
    for _ in range(4000):
        chosen = numbers.integers(0, 40, 40)
        drawn.append(sum(now.losses[i] - before.losses[i] for i in chosen) / sum(sizes[i] for i in chosen))
    low, high = np.percentile(drawn, [2.5, 97.5])
    assert deltas["d"] == pytest.approx((low, high), abs=0.02)
    assert of_r == pytest.approx((math.exp(-max(0, high)), math.exp(-max(0, low))), abs=0.02)
    alike = Measured(losses=tuple(2.1 * s for s in sizes), sizes=sizes, bytes=sizes)  # whichever are drawn
    assert intervals({"d": before}, {"d": alike}, {"d": 1.0})[0]["d"] == pytest.approx((0.1, 0.1))


def test_the_objective_charges_what_was_lost():
    assert objective(0.5, 0.9, 2.0) == pytest.approx(0.3)


def test_as_good_in_one_and_better_in_the_other_dominates():
    assert dominates((0.5, 0.9), (0.5, 0.8))
    assert dominates((0.5, 0.9), (0.4, 0.9))
    assert not dominates((0.5, 0.9), (0.6, 0.8))


points = st.tuples(st.floats(-1, 1), st.floats(0, 1))


@given(points, points, points)
def test_domination_is_a_strict_order(a, b, c):
    assert not dominates(a, a)
    assert not (dominates(a, b) and dominates(b, a))
    if dominates(a, b) and dominates(b, c):
        assert dominates(a, c)
