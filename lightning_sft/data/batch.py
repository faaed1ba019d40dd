"""What the model gets: the examples of a micro-batch as tensors, flattened or padded.

Padding-free (`flatten`): one row of all examples, one after the other; attention is kept within each of
them by `segments`. A model that can't take such rows exactly gets one padded row per example (`pad`). The
targets are the same in both: flat positions whose *next* token is trained, made here, on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lightning_sft.conversation import Meta
from lightning_sft.example import Example


class Batch:
    """One micro-batch: `T` tokens, of which `n` are targets.

    Not a dataclass on purpose: Lightning's precision plug-ins walk through those and would round `weights`.

    Args:
        input_ids: int64 `[1, T]` flattened, `[B, L]` padded.
        position_ids: int64 like `input_ids`, starting at 0 in every example.
        attention_mask: int64 `[B, L]` padded; None when flattened.
        segments: Where the examples begin and end in the flattened row: `B + 1` offsets; None when padded.
        cu_seqlens: int32 `[B + 1]`: the same for a varlen attention kernel, made here so that it moves along.
        positions: int64 `[n]`: flat positions in `input_ids` that predict a trained token.
        targets: int64 `[n]`: the token to predict at each of them.
        weights: float32 `[n]`: its loss weight.
        num_items: N of the optimizer step.
        num_tokens: Tokens without padding.
        metas: Where the examples come from.
    """

    __slots__ = (
        "attention_mask",
        "cu_seqlens",
        "input_ids",
        "metas",
        "num_items",
        "num_tokens",
        "position_ids",
        "positions",
        "segments",
        "targets",
        "weights",
    )

    def __init__(
        self,
        *,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        segments: tuple[int, ...] | None,
        positions: Tensor,
        targets: Tensor,
        weights: Tensor,
        num_items: float,
        num_tokens: int,
        metas: tuple[Meta, ...],
        cu_seqlens: Tensor | None = None,
    ) -> None:
        self.input_ids = input_ids
        self.position_ids = position_ids
        self.attention_mask = attention_mask
        self.segments = segments
        self.positions = positions
        self.targets = targets
        self.weights = weights
        self.num_items = num_items
        self.num_tokens = num_tokens
        self.metas = metas
        if cu_seqlens is None and segments is not None:
            cu_seqlens = torch.tensor(segments, dtype=torch.int32)
        self.cu_seqlens = cu_seqlens

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with every tensor changed so."""
        fields: dict[str, Any] = {}
        for name in self.__slots__:
            value = getattr(self, name)
            fields[name] = change(value) if isinstance(value, Tensor) else value
        return Batch(**fields)

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """The batch on another device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, for faster copies to a GPU."""
        return self.map(lambda tensor: tensor.pin_memory())


Collate: TypeAlias = Callable[[Sequence[Example], float], Batch]
"""`flatten` or `pad`, with the padding id filled in: (examples, num_items) → Batch."""


def flatten(examples: Sequence[Example], num_items: float) -> Batch:
    """The examples one after the other in a single row, without padding."""
    lengths = [len(example) for example in examples]
    segments = (0, *np.cumsum(lengths).tolist())
    ids = np.concatenate([example.input_ids for example in examples])
    return _batch(
        examples,
        num_items,
        input_ids=torch.from_numpy(ids).long()[None],
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        attention_mask=None,
        segments=segments,
        starts=segments[:-1],
    )


def pad(examples: Sequence[Example], num_items: float, *, pad_id: int) -> Batch:
    """One row per example, padded at the right to the longest."""
    longest = max(len(example) for example in examples)
    ids = torch.full((len(examples), longest), pad_id)
    mask = torch.zeros_like(ids)
    for row, example in enumerate(examples):
        ids[row, : len(example)] = torch.from_numpy(example.input_ids).long()
        mask[row, : len(example)] = 1
    return _batch(
        examples,
        num_items,
        input_ids=ids,
        position_ids=torch.arange(longest).expand_as(ids).contiguous(),
        attention_mask=mask,
        segments=None,
        starts=range(0, len(examples) * longest, longest),
    )


def _batch(
    examples: Sequence[Example],
    num_items: float,
    *,
    input_ids: Tensor,
    position_ids: Tensor,
    attention_mask: Tensor | None,
    segments: tuple[int, ...] | None,
    starts: Sequence[int],
) -> Batch:
    positions, targets, weights = [], [], []
    for start, example in zip(starts, examples, strict=True):
        trained = np.flatnonzero(example.weights[1:] > 0)
        positions.append(trained + start)
        targets.append(example.input_ids[1:][trained])
        weights.append(example.weights[1:][trained])
    if not sum(len(part) for part in positions):
        # A filler: one target of weight 0 keeps every parameter in the graph, as DDP wants.
        positions, targets, weights = (
            [np.zeros(1, np.int64)],
            [np.zeros(1, np.int64)],
            [np.zeros(1, np.float32)],
        )
    return Batch(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=attention_mask,
        segments=segments,
        positions=torch.from_numpy(np.concatenate(positions)).long(),
        targets=torch.from_numpy(np.concatenate(targets)).long(),
        weights=torch.from_numpy(np.concatenate(weights)),
        num_items=num_items,
        num_tokens=sum(len(example) for example in examples),
        metas=tuple(example.meta for example in examples),
    )
