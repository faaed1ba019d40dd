"""Fused CUDA kernels, used where they are installed and have been seen to compute the same.

Attention over a flattened row: FlashAttention's varlen kernel, from `flash_attn` or from torch itself; it takes
all segments in one launch. Cross-entropy: Liger-Kernel's (Hsu et al., 2024), which turns a chunk's logits into
their gradient in one pass (and asks the device for a number each time, as torch doesn't). A kernel is tried on
random numbers once per kind of input, gradients included, against plain torch on the same device; one that fails
or differs isn't used, and a warning says so.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import functional as F

Attention: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, int, float | None, int | None], Tensor]
"""(query `[T, H, D]`, key and value `[T, H_kv, D]`, cu_seqlens int32 `[B + 1]`, longest segment, scale, window)."""

CrossEntropy: TypeAlias = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""(logits `[n, V]`, which it may overwrite, targets `[n]`, weights `[n]`, label smoothing) → Σ weight · loss and its
gradient by the logits."""


def attention_for(query: Tensor, key: Tensor, value: Tensor) -> Attention | None:
    """The varlen kernel for tensors `[1, H, T, D]` that are already in the type of the computation, if any."""
    if not _half_on_cuda(query) or not takes(query, value):
        return None
    size = query.shape[-1]
    kernel = installed_attention()
    if kernel is None or not _trusted_attention(
        kernel, query.device, query.dtype, query.shape[1], key.shape[1], size
    ):
        return None
    return kernel


def cross_entropy_for(logits: Tensor) -> CrossEntropy | None:
    """The fused cross-entropy for these logits, if any."""
    if logits.device.type != "cuda":
        return None
    kernel = installed_cross_entropy()
    if kernel is None or not _trusted_cross_entropy(kernel, logits.device, logits.dtype):
        return None
    return kernel


def _half_on_cuda(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda" and tensor.dtype in (torch.float16, torch.bfloat16)


def takes(query: Tensor, value: Tensor) -> bool:
    """Whether the varlen kernels have heads of this size."""
    size = query.shape[-1]
    return size == value.shape[-1] and size % 8 == 0 and size <= 256


class Planned(torch.autograd.Function):
    """What a varlen kernel keeps and gives, without its numbers: `[T, H, D]`, and a float32 for each row and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Zeros like the query."""
        out = torch.zeros_like(query, memory_format=torch.contiguous_format)
        ctx.save_for_backward(query, key, value, out, out.new_empty(out.shape[:2], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        """Zeros like the inputs."""
        return tuple(torch.zeros_like(tensor) for tensor in ctx.saved_tensors[:3])


@lru_cache(maxsize=1)
def installed_attention() -> Attention | None:
    """FlashAttention's varlen kernel: `flash_attn`'s if it is installed, else torch's own where it has one."""
    if flash := _imported("flash_attn", "flash_attn_varlen_func"):

        def from_flash_attn(
            q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float | None, window: int | None
        ) -> Tensor:
            sees = (-1, -1) if window is None else (window - 1, 0)
            out: Tensor = flash(
                q, k, v, cu, cu, longest, longest, softmax_scale=scale, causal=True, window_size=sees
            )
            return out

        return from_flash_attn
    if varlen := _imported("torch.nn.attention.varlen", "varlen_attn"):

        def from_torch(
            q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float | None, window: int | None
        ) -> Tensor:
            sees = (-1, 0) if window is None else (window - 1, 0)
            grouped = q.shape[1] != k.shape[1]
            out: Tensor = varlen(
                q, k, v, cu, cu, longest, longest, scale=scale, window_size=sees, enable_gqa=grouped
            )
            return out

        return from_torch
    return None


@lru_cache(maxsize=1)
def installed_cross_entropy() -> CrossEntropy | None:
    """Liger-Kernel's cross-entropy, if it is installed."""
    liger = _imported("liger_kernel.transformers.functional", "liger_cross_entropy")
    if liger is None:
        return None

    def from_liger(
        logits: Tensor, targets: Tensor, weights: Tensor, smoothing: float
    ) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            logits = logits.detach().requires_grad_()
            loss: Tensor = liger(logits, targets, reduction="none", label_smoothing=smoothing)
            (grad,) = torch.autograd.grad(loss, logits, weights.to(loss.dtype))
        return (loss.detach() * weights).sum(), grad

    return from_liger


def _imported(module: str, name: str) -> Any:
    try:
        return getattr(import_module(module), name, None)
    except Exception:  # an installation that doesn't fit this torch or driver fails in many ways
        return None


def _agrees(what: str, trial: Callable[[], tuple[list[Tensor], list[Tensor]]]) -> bool:
    """Whether a kernel's results and gradients are plain torch's, up to the rounding of their type."""
    try:
        with torch.enable_grad(), torch.autocast("cuda", enabled=False):
            ours, plain = trial()
        for a, b in zip(ours, plain, strict=True):
            a, b = a.detach(), b.detach().double()
            apart = float((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30))
            if not apart <= 8 * torch.finfo(a.dtype).eps:  # NaN isn't close either
                raise ArithmeticError(f"it differs from plain torch by {apart:.1e}, relative")
    except Exception as error:
        rank_zero_warn(f"The installed {what} kernel isn't used: {type(error).__name__}: {error}")
        return False
    return True


@lru_cache(maxsize=32)
def _trusted_attention(
    kernel: Attention, device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, size: int
) -> bool:
    def trial() -> tuple[list[Tensor], list[Tensor]]:
        generator = torch.Generator(device).manual_seed(0)
        offsets, ours, plain = (0, 1, 100, 137, 300), [], []
        cu = torch.tensor(offsets, dtype=torch.int32, device=device)
        for window in (None, 40):
            q, k, v, up = (
                torch.randn(offsets[-1], n, size, generator=generator, device=device).to(dtype)
                for n in (heads, kv_heads, kv_heads, heads)
            )
            for tensor in (q, k, v):
                tensor.requires_grad_()
            out = kernel(q, k, v, cu, 163, None, window)
            ours += [out, *torch.autograd.grad(out, (q, k, v), up)]
            a, b, c = (tensor.detach().float().requires_grad_() for tensor in (q, k, v))
            reference = _reference(a, b, c, offsets, window)
            plain += [reference, *torch.autograd.grad(reference, (a, b, c), up.float())]
        return ours, plain

    return _agrees("attention", trial)


def _reference(q: Tensor, k: Tensor, v: Tensor, offsets: tuple[int, ...], window: int | None) -> Tensor:
    out = []
    for start, end in pairwise(offsets):
        mask = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).tril()
        if window is not None:
            mask = mask.triu(1 - window)
        query, key, value = (
            tensor[start:end].repeat_interleave(q.shape[1] // tensor.shape[1], dim=1).transpose(0, 1)
            for tensor in (q, k, v)
        )
        out.append(F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(0, 1))
    return torch.cat(out)


@lru_cache(maxsize=32)
def _trusted_cross_entropy(kernel: CrossEntropy, device: torch.device, dtype: torch.dtype) -> bool:
    def trial() -> tuple[list[Tensor], list[Tensor]]:
        generator = torch.Generator(device).manual_seed(0)
        ours: list[Tensor] = []
        plain: list[Tensor] = []
        for smoothing in (0.0, 0.1):
            logits = (
                (3 * torch.randn(33, 1000, generator=generator, device=device)).to(dtype).requires_grad_()
            )
            targets = torch.randint(1000, (33,), generator=generator, device=device)
            weights = torch.rand(33, generator=generator, device=device)
            loss = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
            total = (loss * weights).sum()
            plain += [total.detach(), *torch.autograd.grad(total, logits)]
            ours += kernel(logits.detach().clone(), targets, weights, smoothing)
        return ours, plain

    return _agrees("cross-entropy", trial)
