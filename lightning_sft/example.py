"""What rendering makes of a conversation: token ids, with a weight and a reason for each."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from lightning_sft.conversation import Meta


class Reason(IntEnum):
    """Why a token is trained or not."""

    CONTEXT = 0
    """Not trained: prompt, system and tool text, headers, whatever follows an end-of-turn token."""
    TRAINED = 1
    """Trained: what the model must produce, through the end-of-turn token."""
    ZERO_WEIGHT = 2
    """Not trained: its message or segment has weight 0."""
    FIRST = 3
    """Not trained: the first token of an example has nothing before it to be predicted from."""
    OTHER_TURN = 4
    """Not trained: `train_on: last_turn` leaves this turn out, or it has an example of its own."""
    REASONING = 5
    """Not trained: reasoning, without `train_reasoning`."""
    END_OF_TURN = 6
    """Not trained: an end-of-turn token that `train_on_eot` leaves out."""
    CUT = 7
    """Not trained: the beginning of its turn was cut off, so it is context."""


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """A rendered conversation of `T` tokens.

    Args:
        input_ids: int32 `[T]`.
        weights: float32 `[T]`: the loss weight of each token *as a target*; 0 is not trained.
        reasons: uint8 `[T]`: a `Reason` for each token.
        meta: The file and row it comes from.
        turn: The message that is trained, counted from 1, where each trained turn has an example of its own.
        notes: What is worth knowing about how it was rendered; empty as a rule.
    """

    input_ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    reasons: NDArray[np.uint8]
    meta: Meta
    turn: int | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)
