"""Retention: how much of what the base knew is still there, and with which certainty.

For each domain d, with CE the cross-entropy in nats of the base (0) and of the model now (θ): ΔCE_d = CE_θ,d − CE_0,d,
r_d = exp(−max(0, ΔCE_d)), and R = Π r_d^(w_d / Σ w): the geometric mean, so that R doesn't fall with the number of
domains. Text: CE per token, and ΔBPB_d = ΔNLL_d / (bytes_d · ln 2). Questions: CE = −log p(right choice | the choices).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Measured:
    """One domain, as one model does on it; the items are texts or questions.

    Args:
        losses: Σ nats of each item.
        sizes: Tokens of each text; 1 for each question.
        bytes: UTF-8 bytes of each text; empty for questions.
        right: Whether each question was answered right; empty for texts.
        chance: The expected accuracy of guessing; 0 for texts.
        kl: Σ KL(base ‖ model) of each text, in nats; empty where it wasn't measured.
        score: An evaluator's headline instead of all that; above 0.
        higher_is_better: Which way is up, of the score.
    """

    losses: tuple[float, ...] = ()
    sizes: tuple[int, ...] = ()
    bytes: tuple[int, ...] = ()
    right: tuple[bool, ...] = ()
    chance: float = 0.0
    kl: tuple[float, ...] = ()
    score: float | None = None
    higher_is_better: bool = True


def cross_entropy(measured: Measured) -> float:
    """Nats per token, or per question."""
    return sum(measured.losses) / sum(measured.sizes)


def change(before: Measured, now: Measured) -> dict[str, float | list[int]]:
    """What changed in a domain, by name; the keys depend on what the domain is. `lost` and `gained` are questions."""
    found: dict[str, float | list[int]] = {}
    if now.losses:
        found["ce"] = cross_entropy(now)
        found["delta_ce"] = cross_entropy(now) - cross_entropy(before)
    if now.bytes:
        found["delta_bpb"] = (sum(now.losses) - sum(before.losses)) / (sum(now.bytes) * math.log(2))
    if now.kl:
        found["kl"] = sum(now.kl) / sum(now.sizes)
    if now.right:
        n, accuracy = len(now.right), _share(now.right)
        found["accuracy"] = accuracy
        found["delta_accuracy"] = accuracy - _share(before.right)
        found["above_chance"] = (accuracy - now.chance) / (1 - now.chance)
        flips = list(enumerate(zip(before.right, now.right, strict=True)))
        lost = [item for item, (was, still) in flips if was and not still]
        gained = [item for item, (was, still) in flips if still and not was]
        found |= {"f10": len(lost) / n, "b01": len(gained) / n, "lost": lost, "gained": gained}
    if now.score is not None:
        found["score"] = now.score
        found["delta_score"] = now.score - (before.score or 0.0)
    found["retention"] = retained(before, now)
    return found


def retained(before: Measured, now: Measured) -> float:
    """r_d: 1 where nothing got worse, 0 of a model whose figures are no numbers.

    Of an evaluator's score it is the share that is left: of accuracy s / s₀, of perplexity, which is better lower,
    s₀ / s.
    """
    if math.isnan(now.score if now.score is not None else sum(now.losses)):
        return 0.0  # max(0, nan) is 0
    if now.score is not None:
        better, other = before.score or 0.0, now.score
        if now.higher_is_better:
            better, other = other, better
        return min(1.0, max(0.0, better) / other) if other > 0 else 1.0
    return math.exp(-max(0.0, cross_entropy(now) - cross_entropy(before)))


def retention(domains: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """R: the geometric mean of the domains' r_d, weighted."""
    total = sum(weights[name] for name in domains)
    if any(value <= 0 and weights[name] for name, value in domains.items()):
        return 0.0
    return math.exp(
        sum(weights[name] * math.log(value) for name, value in domains.items() if value > 0) / total
    )


def intervals(
    before: Mapping[str, Measured], now: Mapping[str, Measured], weights: Mapping[str, float], seed: int = 0
) -> tuple[dict[str, tuple[float, float]], tuple[float, float]]:
    """95 % intervals of each domain's ΔCE and of R: a paired percentile bootstrap over texts and questions.

    Items are drawn with replacement within each domain, the same ones for base and model (Efron and Tibshirani, 1993).
    An evaluator's score is taken as it is.
    """
    generator = np.random.default_rng(seed)
    log_r, deltas = np.zeros(_RESAMPLES), {}
    total = sum(weights[name] for name in now)
    for name, measured in now.items():
        if measured.score is not None:
            value = retained(before[name], measured)
            log_r += weights[name] * (math.log(value) if value > 0 else -math.inf) / total
            continue
        n = len(measured.losses)
        difference = np.asarray(measured.losses) - np.asarray(before[name].losses)
        sizes = np.asarray(measured.sizes, float)
        drawn = generator.multinomial(n, np.full(n, 1 / n), size=_RESAMPLES)
        delta = drawn @ difference / (drawn @ sizes)
        deltas[name] = _middle(delta)
        log_r -= weights[name] * np.maximum(0.0, delta) / total
    return deltas, _middle(np.nan_to_num(np.exp(log_r), nan=0.0))


def objective(gain: float, kept: float, strictness: float) -> float:
    """J = g − λ(1 − R)."""
    return gain - strictness * (1 - kept)


def dominates(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether (gain, retention) `one` is at least as good in both and better in one."""
    return one != other and all(a >= b for a, b in zip(one, other, strict=True))


def _middle(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _share(verdicts: Sequence[bool]) -> float:
    return sum(verdicts) / len(verdicts)
