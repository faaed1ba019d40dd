"""Losses that go wrong at one token; a run names them by their full class path."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_sft import Loss, TokenBatch


class BadAt(Loss):
    """Cross-entropy that is wrong where the target is this id.

    Args:
        token: The id.
        how: `nan` or `inf` losses, a NaN `value` with a finite gradient, a finite loss with `gradient` NaN or one
            that `overflows` at 16 bits, an allocation that fails (`cuda`, `cpu`), or a RuntimeError that is `another`.
    """

    def __init__(self, token: int, how: str = "nan") -> None:
        self.token = token
        self.how = how

    def per_token(self, batch: TokenBatch) -> Tensor:
        loss = F.cross_entropy(batch.logits, batch.targets, reduction="none")
        hit = batch.targets == self.token
        if not hit.any() or not torch.is_grad_enabled():
            return loss
        if self.how in ("nan", "inf"):
            return torch.where(hit, loss * float(self.how), loss)
        if self.how == "value":
            return loss + torch.where(hit, float("nan"), 0.0)
        if self.how == "gradient":
            return loss + torch.where(hit, _Wrong.apply(loss, float("nan")), 0)
        if self.how == "overflows":
            return loss + torch.where(hit, _Wrong.apply(loss, 1e30), 0)
        raise {
            "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
            "cpu": RuntimeError(
                "[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory"
            ),
            "another": RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        }[self.how]


class _Wrong(torch.autograd.Function):
    """Zero, with a gradient that is anything but."""

    @staticmethod
    def forward(ctx, value: Tensor, gradient: float) -> Tensor:
        ctx.gradient = gradient
        return torch.zeros_like(value)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None]:
        return torch.full_like(upstream, ctx.gradient), None
