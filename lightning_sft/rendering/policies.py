"""What is trained, where that is a choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from lightning_sft.errors import SFTError

TrainOn = Literal["all_turns", "last_turn"]
TrainOnEOT = Literal["turn", "last", "none"]

_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)  # no slots: jsonargparse reads defaults with vars()
class RenderPolicies:
    """Which parts of a conversation are trained; the results of tools never are.

    Args:
        train_on: Train every assistant turn, or the last one of each conversation alone.
        train_on_eot: Train the end-of-turn token of every trained turn, of each example's last one, or of none; with
            none a chat template needs no end-of-turn token, and the model doesn't learn to stop.
        train_reasoning: Train the text of the reasoning; without, only the tags around it are.
        prompt_weight: Loss weight of the text of system and user messages that have no weight of their own.
        split_turns: Make one example of each trained turn, with the history as inference would render it: for
            templates that render a turn differently once others follow.
    """

    train_on: TrainOn = "all_turns"
    train_on_eot: TrainOnEOT = "turn"
    train_reasoning: bool = True
    prompt_weight: float = 0.0
    split_turns: bool = False

    def __post_init__(self) -> None:
        """Refuse what means nothing.

        Raises:
            SFTError: A policy has a value that doesn't exist.
        """
        for name, known in (("train_on", get_args(TrainOn)), ("train_on_eot", get_args(TrainOnEOT))):
            if getattr(self, name) not in known:
                raise SFTError(
                    f"{name} is {getattr(self, name)!r}",
                    where=f"model.render.{name}",
                    fix=f"give one of {', '.join(known)}",
                )
        checked_weight(self.prompt_weight, "model.render.prompt_weight")


def checked_weight(weight: float, where: str) -> float:
    """The weight as a float32 can hold it.

    Raises:
        SFTError: It is negative, no number, or too large.
    """
    if not 0 <= weight <= _LARGEST:
        raise SFTError(f"weight {weight} is not a finite number of at least 0", where=where)
    return float(np.float32(weight))
