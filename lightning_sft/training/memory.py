"""Memory: activations recomputed instead of kept, and what to say when there isn't enough of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import nn

from lightning_sft.errors import SFTError
from lightning_sft.training.layout import causal_lm

if TYPE_CHECKING:
    from lightning_sft.data.batch import Batch
    from lightning_sft.training.module import SFTModule

_SIGNS = ("out of memory", "can't allocate memory", "alloc_failed")
"""What CUDA and MPS, the CPU's allocator, and cuBLAS say."""


def checkpoint_layers(model: nn.Module) -> None:
    """Keep only each layer's input for the backward pass, and compute the rest again (Chen et al., 2016).

    Without re-entrant autograd, so that adapters inside frozen layers get their gradients although no input of a
    layer needs one; dropout draws the same numbers again.

    Raises:
        SFTError: The model can't.
    """
    inner = causal_lm(model)
    enable = getattr(inner, "activation_checkpointing_enable", None) or inner.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise SFTError(
            f"{type(inner).__name__} can't recompute its activations: {error}",
            where="model.gradient_checkpointing",
            fix="leave it out",
        ) from error
    inner.disable_input_require_grads()  # only re-entrant autograd needs a gradient at the embeddings


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on whatever device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


@contextmanager
def explained(module: SFTModule) -> Iterator[None]:
    """A failed allocation in here becomes an error that says how large the batch was, and what would help.

    Raises:
        SFTError: There was too little memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        batch = module.watch.batch
        raise SFTError(
            f"out of memory at {in_words(batch) if batch is not None else 'the optimizer step'}"
            + _weights_most(module, batch),
            where=str(module.device),
            fix=_what_helps(module),
        ) from error


def _weights_most(module: SFTModule, batch: Batch | None) -> str:
    """What a step with this batch needs, by part, as `plan` would tell it; nothing where that can't be told."""
    from lightning_sft.training.peak_memory import Twin

    if batch is None:
        return ""
    try:
        peak = Twin(module, module.device.type).peak(batch)
    except Exception:  # the error at hand matters, not one on the way of explaining it
        return ""
    parts = ", ".join(f"{in_gib(size)} for {part}" for part, size in peak.parts.items())
    return f"; a step with it needs about {in_gib(peak.total)}: {parts}"


def in_gib(size: float) -> str:
    """A size for people."""
    return f"{size / 2**30:.3g} GiB"


def longest_row(batch: Batch) -> int:
    """Tokens of the longest row, padding included where there is some."""
    if batch.segments is None:
        return int(batch.input_ids.shape[1])
    return max(end - start for start, end in pairwise(batch.segments))


def in_words(batch: Batch) -> str:
    """The shape of a batch, for people: rows, tokens with padding, the longest row, and the targets."""
    rows = "1 row" if len(batch.metas) == 1 else f"{len(batch.metas):,} rows"
    return (
        f"a batch of {rows} with {batch.input_ids.numel():,} tokens (the longest {longest_row(batch):,}), "
        f"{len(batch.targets):,} of them trained"
    )


def _what_helps(module: SFTModule) -> str:
    trainer = module._trainer
    data = getattr(trainer, "datamodule", None)
    budget = " or data.batch_tokens" if hasattr(data, "batch_tokens") else ""
    helps = [f"lower data.batch_size{budget} (trainer.accumulate_grad_batches keeps the step's size)"]
    helps.append("lower data.max_length")
    if not module.gradient_checkpointing:
        helps.append("set model.gradient_checkpointing: true")
    if all(p.requires_grad for p in module.loaded.parameters()):
        helps.append("train with model.adapter: LoRA")
    if trainer is not None and str(trainer.precision).startswith("32"):
        helps.append("set trainer.precision: bf16-mixed, or bf16-true for bfloat16 weights as well")
    return "; or ".join(helps)
