"""Linear layers that need the memory of quantised ones: to count it, not to compute with."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sft.errors import SFTError
from lightning_sft.training.layout import causal_lm

_BLOCK = 64
"""Weights that share a scale in bitsandbytes' 4 bits; with double quantisation 256 scales share another."""


def pretend_quantized(model: nn.Module, config: Any) -> list[nn.Parameter]:
    """Give the base's frozen linear layers the bytes that they have when they are quantised; these are returned.

    As transformers does it, every linear layer but the output embedding is quantised.

    Args:
        model: A model of fake tensors, with its adapter.
        config: transformers' quantisation config.

    Raises:
        SFTError: The config is of a kind that isn't known.
    """
    inner = causal_lm(model)
    kept = {id(inner.get_output_embeddings())}
    skipped = tuple(getattr(config, "llm_int8_skip_modules", None) or ())
    made = []
    for name, layer in inner.named_modules():
        if type(layer) is not nn.Linear or id(layer) in kept or layer.weight.requires_grad:
            continue
        if any(part in name.split(".") for part in (*skipped, "modules_to_save")):
            continue
        shape, loaded = layer.weight.shape, layer.weight.dtype
        packed = torch.empty(_bytes(shape, config), dtype=torch.uint8)
        layer.weight = nn.Parameter(packed, requires_grad=False)
        compute = getattr(config, "bnb_4bit_compute_dtype", None) if _in_4_bits(config) else None
        layer.__dict__["forward"] = partial(
            _Dequantized.apply, layer.weight, shape, loaded, compute, layer.bias
        )
        made.append(layer.weight)
    return made


def _in_4_bits(config: Any) -> bool:
    return bool(getattr(config, "load_in_4bit", False))


def _bytes(shape: torch.Size, config: Any) -> int:
    n = shape.numel()
    if _in_4_bits(config):
        scales = n // _BLOCK
        double = getattr(config, "bnb_4bit_use_double_quant", False)
        return n // 2 + (scales + 4 * (scales // 256 + 1) if double else 4 * scales)
    if getattr(config, "load_in_8bit", False):
        return n + 4 * shape[0]
    raise SFTError(
        f"the memory of a base quantised by {type(config).__name__} isn't known",
        where="model.adapter",
        fix="plan knows bitsandbytes' 4 and 8 bits",
    )


class _Dequantized(torch.autograd.Function):
    """x Wᵀ + b, with W made anew in forward and backward, first in the type it was loaded in."""

    @staticmethod
    def forward(
        ctx: Any,
        packed: Tensor,
        shape: torch.Size,
        loaded: torch.dtype,
        compute: torch.dtype | None,
        bias: Tensor | None,
        x: Tensor,
    ) -> Tensor:
        mixed = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        ctx.compute = mixed or compute or x.dtype
        ctx.shape, ctx.loaded, ctx.dtype = shape, loaded, x.dtype
        ctx.save_for_backward(packed)
        weight = torch.empty(shape, dtype=loaded).to(ctx.compute)
        return nn.functional.linear(x.to(ctx.compute), weight, bias).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        weight = torch.empty(ctx.shape, dtype=ctx.loaded).to(ctx.compute)
        return None, None, None, None, None, (grad.to(ctx.compute) @ weight).to(ctx.dtype)
