"""How much a forgetting probe asks, and how often, so that it takes no more than its share of the training.

All is counted in forward passes of a token, of what one process computes: a training step takes three for each of its
tokens (two where the base is frozen), a measurement one, and one more for the divergence from a base that is switched
on again. It is a function of the run alone, so the same run always asks the same at the same steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_sft import SFTModule

TEXTS, QUESTIONS = 8, 16
"""Fewest of a domain that are asked, where there are so many."""
EXAMPLES = 128
"""Most validation examples that are asked where nothing else is said."""
AIM = 0.8
"""The part of the allowed share that is planned: the rest is for what isn't counted, such as start-up and intervals."""
_MEASUREMENTS = 5  # at the start, after each quarter, and at the end


@dataclass(frozen=True, slots=True)
class Part:
    """What may be asked of one domain, or of the validation data.

    Args:
        costs: Forward passes for each text, question or example.
        fewest: At least so many are asked.
        most: No more are.
    """

    costs: Sequence[int]
    fewest: int
    most: int

    def count(self, share: float) -> int:
        """How many are asked where `share` of all may be."""
        return min(self.most, max(self.fewest, math.floor(share * self.most)))

    def cost(self, share: float) -> int:
        """Forward passes for these."""
        return sum(self.costs[place] for place in spread(len(self.costs), self.count(share)))


@dataclass(frozen=True, slots=True)
class Plan:
    """What a probe asks.

    Args:
        every_n_steps: Optimizer steps between two measurements; 0: only at the start and the end.
        counts: How many of each part.
        share: The part of the training's computation that it takes, as planned.
    """

    every_n_steps: int
    counts: list[int]
    share: float


def plan(
    parts: Sequence[Part], *, steps: int, training: float, cost: float, every_n_steps: int | None
) -> Plan:
    """Ask all, as often as `cost` allows; but less each time rather than less often than at each quarter of the run.

    Args:
        parts: What may be asked.
        steps: Optimizer steps of the run; 0 if nothing sets its end.
        training: Forward passes of its training.
        cost: The share of them that the probe may take.
        every_n_steps: How often it measures, where that is set.
    """
    allowed = cost * training if steps else math.inf
    wanted = _MEASUREMENTS if every_n_steps is None else _measurements(steps, every_n_steps)
    share = _largest(lambda share: wanted * _cost(parts, share) <= allowed)
    each = _cost(parts, share)
    if every_n_steps is None:
        fitting = math.floor(allowed / each) if steps else 2
        every_n_steps = math.ceil(steps / (fitting - 1)) if fitting > 2 else 0
    taken = _measurements(steps, every_n_steps) * each
    return Plan(every_n_steps, [part.count(share) for part in parts], taken / training if training else 0.0)


def forward_passes(module: SFTModule, *, frozen: bool) -> tuple[int, float]:
    """The run's optimizer steps, and the forward passes of a token that one process computes in them.

    Args:
        module: The module in training.
        frozen: Whether gradients of most weights aren't computed.
    """
    data = module.data
    steps = data.total_steps()
    if not steps:
        return 0, 0.0
    epoch, lengths = data.plan(0), data.prepared["train"].lengths
    rows = [row for micro in epoch.rank(0) for row in micro.rows]  # of rank 0, so that all plan alike
    return steps, int(lengths[rows].sum()) / epoch.steps * steps * (2 if frozen else 3)


def spread(count: int, most: int) -> list[int]:
    """`most` places of `count`, from all over; all of them where there are no more."""
    return [place * count // most for place in range(most)] if most < count else list(range(count))


def told(
    asked: Mapping[str, int], sizes: Mapping[str, int], every_n_steps: int, share: float, cost: float
) -> str:
    """A line about what is asked of how much, and what it takes."""
    parts = [
        f"{asked[name]:,} of {size:,} {name if name != 'task' else 'validation examples'}"
        for name, size in sizes.items()
        if asked[name]
    ]
    when = f"every {every_n_steps:,} steps" if every_n_steps else "at the start and the end"
    line = f"ForgettingProbe asks {', '.join(parts)}, {when}: "
    line += f"{share:.1%} of the training's computation" if share else "nothing sets the run's end"
    if share > cost:
        line += f", more than cost ({cost:.0%}), as the run is short, or what is set asks for more"
    return line


def _measurements(steps: int, every_n_steps: int) -> int:
    return 2 + ((steps - 1) // every_n_steps if every_n_steps else 0)


def _cost(parts: Sequence[Part], share: float) -> int:
    return max(1, sum(part.cost(share) for part in parts))


def _largest(fits: Callable[[float], bool]) -> float:
    """The largest share of which `fits` holds, to a thousandth; 0 if it holds of none."""
    if fits(1.0):
        return 1.0
    low, high = 0.0, 1.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
