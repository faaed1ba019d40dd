"""The learning rate, step by step, by hand-computed numbers."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from lightning_sft import SFTError
from lightning_sft.training.schedule import factor, warmup_steps


def course(schedule: str, total: int, warmup: int, final: float) -> list[float]:
    """The factors of all steps, and of the one after the last."""
    return [
        factor(step, schedule=schedule, total_steps=total, warmup=warmup, final=final)
        for step in range(total + 1)
    ]


@pytest.mark.parametrize(
    ("schedule", "warmup", "final", "expected"),
    [
        ("linear", 0, 0.0, [1, 0.75, 0.5, 0.25, 0]),
        ("linear", 0, 0.2, [1, 0.8, 0.6, 0.4, 0.2]),
        ("linear", 2, 0.0, [0.5, 1, 1, 0.5, 0]),
        ("cosine", 0, 0.0, [1, 0.8535533906, 0.5, 0.1464466094, 0]),
        ("cosine", 0, 0.2, [1, 0.8828427125, 0.6, 0.3171572875, 0.2]),
        ("cosine", 2, 0.0, [0.5, 1, 1, 0.5, 0]),
        ("constant", 0, 0.3, [1, 1, 1, 1, 1]),
        ("constant", 4, 0.3, [0.25, 0.5, 0.75, 1, 1]),
        ("cosine", 4, 0.0, [0.25, 0.5, 0.75, 1, 1]),
    ],
)
def test_four_steps_by_hand(schedule, warmup, final, expected):
    assert course(schedule, 4, warmup, final) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_after_the_last_step_the_rate_stays_at_its_end(schedule):
    beyond = [factor(step, schedule=schedule, total_steps=10, warmup=2, final=0.1) for step in (10, 11, 1000)]
    assert beyond == pytest.approx([0.1, 0.1, 0.1])


def test_the_first_step_trains_and_the_last_step_of_warmup_has_the_peak_rate():
    factors = course("cosine", 100, 10, 0.0)
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == 1.0
    assert max(factors) == 1.0
    assert all(later < earlier for earlier, later in pairwise(factors[10:]))


def test_a_constant_rate_needs_no_end():
    assert [
        factor(step, schedule="constant", total_steps=0, warmup=2, final=0.0) for step in (0, 1, 2, 10**6)
    ] == [0.5, 1, 1, 1]


@pytest.mark.parametrize(
    ("warmup", "steps"),
    [
        (0.03, 3),
        (0.025, 3),
        (0.001, 1),
        (0.0, 0),
        (1.0, 1),
        (7.0, 7),
        (0.07, 7),
        (0.29, 29),
        (0, 0),
        (1, 1),
        (7, 7),
        (500, 500),
    ],
)
def test_warmup_is_a_fraction_of_a_hundred_steps_rounded_up_or_from_one_on_a_number_of_steps(warmup, steps):
    assert warmup_steps(warmup, 100) == steps


@pytest.mark.parametrize("warmup", [-1, -0.1, 1.5, 100.5, math.nan, math.inf])
def test_a_warmup_that_is_neither_is_refused_by_name(warmup):
    with pytest.raises(SFTError, match=f"warmup is {warmup}") as caught:
        warmup_steps(warmup, 100)
    assert caught.value.where == "model.warmup"
    assert "whole number of steps" in caught.value.fix
