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
        shape = layer.weight.shape
        packed = torch.empty(_bytes(shape, config), dtype=torch.uint8)
        layer.weight = nn.Parameter(packed, requires_grad=False)
        layer.__dict__["forward"] = partial(_Dequantized.apply, layer.weight, shape, layer.bias)
        made.append(layer.weight)
    return made


def _bytes(shape: torch.Size, config: Any) -> int:
    n = shape.numel()
    if getattr(config, "load_in_4bit", False):
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
    """x Wᵀ + b, with W made anew in forward and backward: only the packed weight is kept."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, shape: torch.Size, bias: Tensor | None, x: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = shape, x.dtype
        ctx.save_for_backward(packed)
        half = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        return nn.functional.linear(x.to(half), torch.empty(shape, dtype=half), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        return None, None, None, (grad @ torch.empty(ctx.shape, dtype=grad.dtype)).to(ctx.dtype)
