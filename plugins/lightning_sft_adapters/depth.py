"""Where in the model a parameter is, and the rates that follow from it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lightning_sft import RateGroup, SFTError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def depths(model: PreTrainedModel) -> tuple[dict[str, int], int]:
    """Of each parameter its block, from 0 at the input, and how many blocks there are.

    Embeddings have depth −1; what comes after the blocks (final norm, head) has their number.

    Raises:
        SFTError: The model's blocks can't be found.
    """
    from torch import nn

    count: int = model.config.get_text_config().num_hidden_layers
    split = set(model._no_split_modules or ())
    stacks = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and (not split or type(module[0]).__name__ in split)
    ]
    if not stacks:
        raise SFTError(
            f"the {count} blocks of {type(model).__name__} can't be found",
            where="model.adapter",
            fix="choose parameters by their names (Freeze: layers 0, and train)",
        )
    block = re.compile(rf"{re.escape(stacks[0])}\.(\d+)\.")
    embeddings = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    found = {}
    for name, _ in model.named_parameters():
        if match := block.match(name):
            found[name] = int(match[1])
        else:
            below = "embed" in name or name.rpartition(".")[0] in embeddings
            found[name] = -1 if below else count
    return found, count


def rate_groups(
    model: PreTrainedModel, layer_decay: float | None, unfreeze_every: int | None
) -> dict[str, RateGroup]:
    """The group of each trained parameter: one for each depth, if rates or starts differ by it; else none.

    Args:
        model: The model, with what is trained marked.
        layer_decay: Factor of the rate from one block to the one below; 1 from the top block up.
        unfreeze_every: Steps from one depth to the next: training begins with the topmost one.
    """
    if layer_decay is None and unfreeze_every is None:
        return {}
    where, count = depths(model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    levels = sorted({where[name] for name in trained}, reverse=True)

    def group(depth: int) -> RateGroup:
        name = "embeddings" if depth < 0 else "head and final norm" if depth == count else f"block {depth}"
        below_top = max(0, count - 1 - depth)
        return RateGroup(
            name=name,
            scale=1.0 if layer_decay is None else layer_decay**below_top,
            start=levels.index(depth) * (unfreeze_every or 0),
        )

    return {name: group(where[name]) for name in trained}


def check_rates(layer_decay: float | None, unfreeze_every: int | None) -> None:
    """Refuse numbers that mean nothing.

    Raises:
        SFTError: One does.
    """
    if layer_decay is not None and not 0 < layer_decay <= 1:
        raise SFTError(
            f"layer_decay is {layer_decay}",
            where="model.adapter.layer_decay",
            fix="give a factor of more than 0 and at most 1, such as 0.9",
        )
    if unfreeze_every is not None and unfreeze_every < 1:
        raise SFTError(
            f"unfreeze_every is {unfreeze_every}",
            where="model.adapter.unfreeze_every",
            fix="give at least 1 step, or leave it out",
        )
