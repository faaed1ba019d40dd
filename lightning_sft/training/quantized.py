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
        if _in_4_bits(config):
            compute = getattr(config, "bnb_4bit_compute_dtype", None)
            forward = partial(_four_bits, layer.weight, shape, loaded, compute, layer.bias)
        else:
            forward = partial(_EightBits.apply, layer.weight, shape, layer.bias)
        layer.__dict__["forward"] = forward
        made.append(layer.weight)
    _as_on_quantised(inner, {id(weight) for weight in made}, config)
    return made


def _as_on_quantised(model: nn.Module, packed: set[int], config: Any) -> None:
    """Let peft's LoRA layers compute as they do on quantised ones: with a copy and casts of what these give."""
    try:
        from peft.tuners.lora import Linear, bnb
    except ImportError:
        return
    theirs = getattr(bnb, "Linear4bit" if _in_4_bits(config) else "Linear8bitLt", None)  # with bitsandbytes
    for layer in model.modules():
        base = getattr(layer, "base_layer", None)
        if theirs is not None and type(layer) is Linear and id(getattr(base, "weight", None)) in packed:
            layer.__dict__["forward"] = partial(theirs.forward, layer)


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


def _four_bits(
    packed: Tensor,
    shape: torch.Size,
    loaded: torch.dtype,
    compute: torch.dtype | None,
    bias: Tensor | None,
    x: Tensor,
) -> Tensor:
    """As bitsandbytes' Linear4bit computes, in the type that it is told to."""
    result: Tensor = _FourBits.apply(packed, shape, loaded, bias, x if compute is None else x.to(compute))
    return result.to(x.dtype)


class _FourBits(torch.autograd.Function):
    """x Wᵀ + b, with W made anew, in x's type; and for the backward pass, in the type it was loaded in first."""

    @staticmethod
    def forward(
        ctx: Any, packed: Tensor, shape: torch.Size, loaded: torch.dtype, bias: Tensor | None, x: Tensor
    ) -> Tensor:
        ctx.shape, ctx.loaded = shape, loaded
        ctx.save_for_backward(packed)
        return nn.functional.linear(x, torch.empty(shape, dtype=x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        weight = torch.empty(ctx.shape, dtype=ctx.loaded).to(grad.dtype)
        return None, None, None, None, grad @ weight


class _EightBits(torch.autograd.Function):
    """x Wᵀ + b, with W made anew in x's type, and x kept."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, shape: torch.Size, bias: Tensor | None, x: Tensor) -> Tensor:
        ctx.shape = shape
        ctx.save_for_backward(packed, x)
        return nn.functional.linear(x, torch.empty(shape, dtype=x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        _, x = ctx.saved_tensors
        return None, None, None, grad.to(x.dtype) @ torch.empty(ctx.shape, dtype=x.dtype)
