"""What a judge's verdicts come to: preferences, ratings, win rates, and how far judges agree."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np

from lightning_sft import Score

_CHOICE = re.compile(r"\[\[([ABC])\]\]")
_RATING = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]")
_PENALTY = 0.01
_STEPS = 100
PREFERENCE = {"model": 1.0, "tie": 0.5, "baseline": 0.0}
"""How much of an item the model wins."""


def choice_in(text: str) -> str | None:
    """The last `[[A]]`, `[[B]]` or `[[C]]`; None where there is none."""
    found = _CHOICE.findall(text)
    return found[-1] if found else None


def rating_in(text: str) -> float | None:
    """The last `[[rating]]`, if it is 1 to 10."""
    found = _RATING.findall(text)
    return float(found[-1]) if found and 1 <= float(found[-1]) <= 10 else None


def preference(first: str, second: str) -> float:
    """How much of an item the model wins: the mean of the verdicts with its answer as A, and as B."""
    return ({"A": 1.0, "B": 0.0, "C": 0.5}[first] + {"A": 0.0, "B": 1.0, "C": 0.5}[second]) / 2


def length_controlled(name: str, preferences: Sequence[float], lengths: Sequence[tuple[int, int]]) -> Score:
    """The win rate if both answers were of equal length, in the manner of Dubois et al. (2024).

    Fitted is the logistic model P(win of item i) = σ(θ + φ · tanh(d_i / sd(d))), where d_i is the difference of the
    lengths in characters and verdicts of ½ count half; the score is σ(θ). That is the paper's model without its term
    for an item's difficulty, which needs the verdicts on other models. A penalty of 0.01/2 · (θ² + φ²) keeps the fit
    finite where one side always wins. The standard error is the delta method's with the sandwich variance.

    Args:
        name: The score's name.
        preferences: How much of each item the model wins: 0 to 1.
        lengths: Characters of the model's answer and of the baseline's.
    """
    wins = np.array(preferences, dtype=float)
    difference = np.array([model - baseline for model, baseline in lengths], dtype=float)
    spread = difference.std() or 1.0
    design = np.stack([np.ones_like(wins), np.tanh(difference / spread)], axis=1)
    fitted = np.zeros(2)
    for _ in range(_STEPS):
        chance = 1 / (1 + np.exp(-design @ fitted))
        gradient = design.T @ (wins - chance) - _PENALTY * fitted
        curvature = (design * (chance * (1 - chance))[:, None]).T @ design + _PENALTY * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        fitted += step / max(1.0, np.abs(step).max())
        if np.abs(step).max() < 1e-10:
            break
    residual = design * (wins - chance)[:, None]
    inverse = np.linalg.inv(curvature)
    variance = (inverse @ (residual.T @ residual) @ inverse)[0, 0]
    rate = 1 / (1 + math.exp(-fitted[0]))
    error = rate * (1 - rate) * math.sqrt(variance) if len(wins) > 1 else None
    return Score(name, "length_controlled_win_rate", rate, error, len(wins))


def kappa(name: str, pairs: Sequence[tuple[int, int]], kinds: int, *, ordered: bool) -> Score:
    """Cohen's kappa between judge and humans.

    Args:
        name: The score's name.
        pairs: The judge's verdict and the humans' on each item, from 0.
        kinds: How many verdicts there are.
        ordered: Verdicts are ratings: disagreements weigh by the square of their distance.
    """
    import torch
    from torchmetrics.functional.classification import multiclass_cohen_kappa

    judge, human = torch.tensor(pairs).unbind(1)
    weights: Literal["quadratic"] | None = "quadratic" if ordered else None
    value = float(multiclass_cohen_kappa(judge, human, num_classes=kinds, weights=weights))
    return Score(name, "cohen_kappa", 1.0 if math.isnan(value) else value, None, len(pairs))
