"""Learning-rate schedules: a factor of the peak rate for every optimizer step."""

from __future__ import annotations

import math
from typing import Literal

from lightning_sft.errors import SFTError

Schedule = Literal["cosine", "linear", "constant"]


def warmup_steps(warmup: float, total_steps: int) -> int:
    """Steps of warmup: below 1 a fraction of all steps, from 1 on a whole number of steps.

    Raises:
        SFTError: It is negative, or above 1 and not whole.
    """
    if not 0 <= warmup < math.inf or (warmup > 1 and warmup != int(warmup)):
        raise SFTError(
            f"warmup is {warmup}",
            where="model.warmup",
            fix="give a fraction of all steps (0.03) or a whole number of steps (100)",
        )
    # 0.07 · 100 is 7.000000000000001, which is 7 steps
    return int(warmup) if warmup >= 1 else math.ceil(round(warmup * total_steps, 6))


def factor(step: int, *, schedule: Schedule, total_steps: int, warmup: int, final: float) -> float:
    """The share of the peak learning rate at a step.

    Rises linearly over the first `warmup` steps, the last of which has the peak rate; then falls along half
    a cosine (Loshchilov & Hutter, 2017) or a line to `final`, which the step after the last would have.

    Args:
        step: The optimizer step, from 0.
        schedule: The shape after warmup.
        total_steps: All optimizer steps of the run.
        warmup: Steps of warmup.
        final: Where `cosine` and `linear` end.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress
    return final + (1 - final) * shape
