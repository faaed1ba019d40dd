"""Two models on the same items: what changed, and whether it may be chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

from lightning_sft.evaluation.results import Record

RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Difference:
    """How a metric's mean differs between two models, over the same items.

    Args:
        metric: The metric.
        items: How many items have it with both.
        before: Its mean with the first model.
        after: Its mean with the second model.
        low: Lower end of the difference's 95 % interval: paired bootstrap over items, 2,000 resamples.
        high: Its upper end.
        p: For right or wrong, all items counting alike, the exact two-sided McNemar test: the chance of a split at
            least this uneven if both models were as good. None for other metrics.
        gained: The items (task, number) that became right.
        lost: Those that became wrong.
    """

    metric: str
    items: int
    before: float
    after: float
    low: float
    high: float
    p: float | None
    gained: tuple[tuple[str, int], ...]
    lost: tuple[tuple[str, int], ...]


def differences(before: Sequence[Record], after: Sequence[Record], seed: int = 0) -> list[Difference]:
    """The difference in each metric, over the items that have it in both; NaN where an item's is no finite number."""
    old = {(each.task, each.number): each for each in before}
    pairs: dict[str, list[tuple[Record, Record]]] = {}
    for each in after:
        base = old.get((each.task, each.number))
        for metric in each.metrics if base else ():
            if base and metric in base.metrics:
                pairs.setdefault(metric, []).append((base, each))
    with np.errstate(invalid="ignore"):  # inf − inf
        return [_difference(metric, both, seed) for metric, both in pairs.items()]


def _difference(metric: str, pairs: Sequence[tuple[Record, Record]], seed: int) -> Difference:
    values = np.array([[each.metrics[metric] for each in pair] for pair in pairs])
    weights = np.array([after.weights.get(metric, 1.0) for _, after in pairs])
    low, high = _interval((values[:, 1] - values[:, 0]) * weights, weights, seed)
    gained, lost, p = [], [], None
    if np.isin(values, (0.0, 1.0)).all() and (weights == 1.0).all():
        places = [(after.task, after.number) for _, after in pairs]
        gained = [place for place, (a, b) in zip(places, values, strict=True) if a < b]
        lost = [place for place, (a, b) in zip(places, values, strict=True) if a > b]
        p = mcnemar(len(gained), len(lost))
    means = (values * weights[:, None]).sum(0) / weights.sum()
    return Difference(
        metric, len(pairs), float(means[0]), float(means[1]), low, high, p, tuple(gained), tuple(lost)
    )


def _interval(differences: np.ndarray, weights: np.ndarray, seed: int) -> tuple[float, float]:
    draw = np.random.default_rng(seed)
    n = len(weights)
    found = []
    for _ in range(RESAMPLES):
        chosen = draw.integers(n, size=n)
        found.append(differences[chosen].sum() / weights[chosen].sum())
    low, high = np.quantile(found, (0.025, 0.975))
    return float(low), float(high)


def mcnemar(gained: int, lost: int) -> float:
    """The exact two-sided test that gains and losses are equally likely: 2 · P(X ≤ min), X ~ B(gained + lost, ½)."""
    n = gained + lost
    tail = sum(comb(n, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**n)
