"""`torch.compile` of the decoder's blocks, each by itself, for rows of any length.

All blocks of a kind share one compilation (with the whole model, every layer would be compiled anew), and
shapes are symbolic, so batches of other lengths don't compile again. Attention stays as it is: how long the
segments are must not be compiled in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from lightning_sft.errors import SFTError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder blocks, as the model itself names them (`_no_split_modules`)."""
    names = set(model._no_split_modules or ())
    # A sharded block has a class of its own, below the model's.
    return [part for part in model.modules() if names & {cls.__name__ for cls in type(part).__mro__}]


def compile_blocks(model: PreTrainedModel) -> int:
    """Compile every block in place; its parameters keep their names. Returns how many there are.

    Raises:
        SFTError: The model doesn't say what its blocks are.
    """
    blocks = blocks_of(model)
    if not blocks:
        raise SFTError(
            f"{type(model).__name__} doesn't say which of its modules are blocks, so they can't be compiled",
            where="model.compile",
            fix="leave it out",
        )
    for block in blocks:
        block.compile(dynamic=True)
    return len(blocks)
