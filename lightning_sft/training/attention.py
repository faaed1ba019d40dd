"""Attention within the segments of a flattened row, registered with transformers' `AttentionInterface`.

Every segment is its own causal SDPA call, or all go to one varlen kernel where there is one (`kernels`), so there
is no padding and no dense (ΣL)² mask. The function honours
what models ask of it by keyword (sliding window, soft cap, attention sinks) and refuses what it doesn't know:
a model that asks for something else must not be trained on flattened rows.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sft.training import kernels

NAME = "lightning_sft_segments"

_WITHOUT_MEANING = frozenset(
    {"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits",
     "return_dict", "logits_to_keep", "is_causal", "position_embeddings", "num_items_in_batch", "layer_idx"}
)  # fmt: skip


PLANNED = "lightning_sft_planned"


class UnsupportedAttention(Exception):
    """The model asks its attention for something that segment attention doesn't do."""


class CallCounter:
    """Counts the calls of segment attention: a model that ignores the registered function makes none."""

    calls = 0
    windows: ClassVar[set[int | None]] = set()
    """The sliding windows that models have told."""


class Segments:
    """Where the segments of a flattened row begin and end.

    Not a tuple, so that `torch.compile` doesn't look inside and compile anew for every batch.

    Args:
        offsets: From 0 to the row's length.
        cu_seqlens: The same as int32 `[B + 1]` on the model's device, if a batch has brought it there.
    """

    __slots__ = ("cu_seqlens", "offsets")

    def __init__(self, offsets: tuple[int, ...], cu_seqlens: Tensor | None = None) -> None:
        self.offsets = offsets
        self.cu_seqlens = cu_seqlens

    @property
    def lengths(self) -> list[int]:
        """Tokens of each segment."""
        return [end - start for start, end in pairwise(self.offsets)]

    def on(self, device: torch.device) -> Tensor:
        """`cu_seqlens`, on this device."""
        if self.cu_seqlens is None or self.cu_seqlens.device != device:
            self.cu_seqlens = torch.tensor(self.offsets, dtype=torch.int32, device=device)
        return self.cu_seqlens


def register() -> None:
    """Make `NAME` known to transformers; without a mask function, models pass no mask."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, segment_attention)


def register_planned() -> None:
    """Make `PLANNED` known to transformers: segment attention with the memory that it has on a GPU."""
    from transformers import AttentionInterface

    AttentionInterface.register(PLANNED, planned_attention)


def planned_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **asked: Any
) -> tuple[Tensor, None]:
    """Segment attention whose results mean nothing, to count what a varlen kernel keeps; see `segment_attention`."""
    half = _as_computed(query), _as_computed(key), _as_computed(value)
    plain = asked.get("softcap") is None and asked.get("s_aux") is None and not asked.get("dropout")
    if plain and half[0].itemsize == 2 and kernels.takes(half[0], half[2]):
        return kernels.Planned.apply(*(tensor[0].transpose(0, 1) for tensor in half))[None], None
    return segment_attention(module, query, key, value, attention_mask, **asked)


@torch.compiler.disable
def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    segments: Segments | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Causal attention of each segment to itself.

    Args:
        module: The attention layer.
        query: `[1, H, T, D]`.
        key: `[1, H_kv, T, D]`; `H_kv` divides `H`.
        value: `[1, H_kv, T, D_v]`.
        attention_mask: Must be None: a mask says that this isn't a flattened row.
        scaling: Factor of the scores; `D ** -0.5` if None.
        dropout: Probability of dropping an attention weight.
        segments: The segments of the row, which end at T.
        sliding_window: A position sees itself and the `sliding_window - 1` positions before it.
        softcap: Scores become `softcap · tanh(score / softcap)` (Gemma 2).
        s_aux: `[H]`: a learned score per head that takes part in the softmax only (gpt-oss).
        **kwargs: Whatever else the model hands to its attention.

    Returns:
        The attended values, `[1, T, H, D_v]`, and None for the attention weights.

    Raises:
        UnsupportedAttention: The model asks for anything else.
    """
    CallCounter.calls += 1
    CallCounter.windows.add(sliding_window)
    unknown = [name for name, asked in kwargs.items() if name not in _WITHOUT_MEANING and asked is not None]
    if attention_mask is not None:
        unknown.append("attention_mask")
    if not getattr(module, "is_causal", True) or kwargs.get("is_causal") is False:
        unknown.append("is_causal=False")
    if segments is None:
        unknown.append("no segments")
    if unknown or segments is None:
        raise UnsupportedAttention(f"{type(module).__name__}: {', '.join(unknown)}")
    if softcap is None and s_aux is None and not dropout:
        half = _as_computed(query), _as_computed(key), _as_computed(value)
        if kernel := kernels.attention_for(*half):
            q, k, v = (tensor[0].transpose(0, 1) for tensor in half)
            return kernel(q, k, v, segments.on(q.device), max(segments.lengths), scaling, sliding_window)[
                None
            ], None
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    plain = softcap is None and s_aux is None
    outputs = []
    # Not one slice after the other: the gradient of each would be a whole row of zeros.
    pieces = zip(*(tensor.split(segments.lengths, dim=2) for tensor in (query, key, value)), strict=True)
    for length, (q, k, v) in zip(segments.lengths, pieces, strict=True):
        window = sliding_window if sliding_window is not None and length > sliding_window else None
        if plain:
            mask = None if window is None else _visible(length, window, q.device)
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
            )
        else:
            out = _explicit(q, k, v, window, scaling, dropout, softcap, s_aux)
        outputs.append(out.transpose(1, 2))
    return torch.cat(outputs, dim=1), None


def _as_computed(tensor: Tensor) -> Tensor:
    """In autocast's type, where it is on: SDPA is cast by torch, other kernels aren't."""
    kind = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tensor


@lru_cache(maxsize=64)
def _visible(length: int, window: int | None, device: torch.device) -> Tensor:
    """Bool `[length, length]`: which position sees which."""
    with torch.inference_mode(False):  # validation may ask first, and training needs it too
        visible = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        return visible if window is None else visible.triu(1 - window)


def _explicit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | None,
    scaling: float | None,
    dropout: float,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """What SDPA can't do, written out; the softmax is taken in at least float32, as in transformers."""
    length = query.shape[2]
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~_visible(length, window, query.device), torch.finfo(scores.dtype).min)
    if s_aux is not None:
        sink = s_aux.reshape(1, -1, 1, 1).expand(query.shape[0], -1, length, 1).to(scores.dtype)
        scores = torch.cat([scores, sink], dim=-1)
    exact = torch.promote_types(scores.dtype, torch.float32)
    weights = F.softmax(scores, dim=-1, dtype=exact)[..., :length].to(value.dtype)
    return F.dropout(weights, p=dropout) @ value
