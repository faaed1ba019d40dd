"""How choices are judged by their log-likelihoods, with lm-evaluation-harness's definitions."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Literal

Metric = Literal["acc", "acc_norm", "acc_bytes", "mc2"]


def judged(
    metrics: Sequence[Metric], values: Sequence[float], choices: Sequence[str], right: Collection[int]
) -> dict[str, float]:
    """Each metric's value for one question; of equally good choices the first counts.

    Args:
        metrics: Which.
        values: The choices' log-likelihoods, in nats.
        choices: The choices' texts, without what stands before them.
        right: The indices of the right ones.
    """
    found: dict[str, float] = {}
    for metric in metrics:
        if metric == "mc2":
            found[metric] = right_mass(values, right)
            continue
        sizes = {
            "acc": [1] * len(choices),
            "acc_norm": [len(choice) for choice in choices],
            "acc_bytes": [len(choice.encode()) for choice in choices],
        }[metric]
        scores = [value / size for value, size in zip(values, sizes, strict=True)]
        found[metric] = float(scores.index(max(scores)) in right)
    return found


def right_mass(values: Sequence[float], right: Collection[int]) -> float:
    """The probability of the right choices where those of all add up to 1 (TruthfulQA's MC2)."""
    highest = max(values)  # subtracted, so that long texts' probabilities don't all become 0
    chances = [math.exp(value - highest) for value in values]
    return sum(chances[index] for index in sorted({*right})) / sum(chances)
