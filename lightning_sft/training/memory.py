"""Memory: activations recomputed instead of kept, and what to say when there isn't enough of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.rank_zero import rank_zero_debug
from torch import nn

from lightning_sft.errors import SFTError
from lightning_sft.training.head import CHUNK
from lightning_sft.training.layout import causal_lm
from lightning_sft.training.shards import local

if TYPE_CHECKING:
    from lightning_sft.data.batch import Batch
    from lightning_sft.training.module import SFTModule
    from lightning_sft.training.peak_memory import Peak

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
    kinds = {config.peft_type.value for config in getattr(model, "peft_config", {}).values()}
    if kinds & {"PREFIX_TUNING", "CARTRIDGE"}:
        raise SFTError(
            "a layer whose activations are recomputed forgets the keys and values that this adapter trains",
            where="model.gradient_checkpointing",
            fix="leave it out, or use another adapter",
        )
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
        raise _too_little(module, module.watch.batch, "out of memory") from error


def refuse_too_much(module: SFTModule, batch: Batch) -> None:
    """Refuse what the machine's memory can't hold by the estimate, and warn of what is not available now.

    Raises:
        SFTError: The estimate is above the whole of the memory.
    """
    import psutil

    machine = psutil.virtual_memory()
    if _at_most(module, batch) <= machine.available or (peak := estimate(module, batch)) is None:
        return
    if peak.total > machine.total:
        raise _too_little(module, batch, f"{in_gib(machine.total)} of memory are too little")
    loaded = sum(local(p).numel() * p.element_size() for p in module.loaded.parameters())
    if peak.total - loaded > machine.available:
        rank_zero_warn(
            f"{in_words(batch)} needs about {in_gib(peak.total - loaded)}, {in_gib(machine.available)} are available: "
            f"the system may kill the run. {_what_helps(module)}"
        )


def estimate(module: SFTModule, batch: Batch) -> Peak | None:
    """What a step with this batch needs, as `plan` tells it; None where that can't be told."""
    from lightning_sft.training.peak_memory import Twin

    try:
        return Twin(module, module.device.type).peak(batch)
    except Exception as error:  # what it is asked for mustn't fail because of it
        rank_zero_debug(f"no estimate of the memory: {type(error).__name__}: {error}")
        return None


def _at_most(module: SFTModule, batch: Batch) -> float:
    """Bytes that no step comes near, at once: only where they aren't there is it worth to estimate.

    Korthikanti et al. (2022) count 34 H bytes a token and layer at 16 bits; here it is four times as many at 32 bits,
    with H the wider of the hidden and a quarter of the feed-forward size, for every expert that a token takes.
    """
    config = module.base_config.get_text_config()
    wide = getattr(config, "intermediate_size", None) or 0
    wide = max(getattr(config, "hidden_size", 0), wide / 4) * (
        getattr(config, "num_experts_per_tok", None) or 1
    )
    kept = 4 * 68 * wide * getattr(config, "num_hidden_layers", 0) * batch.input_ids.numel()
    return kept + 8 * sum(p.numel() * 4 for p in module.loaded.parameters()) + 16 * CHUNK * module.vocabulary


def _too_little(module: SFTModule, batch: Batch | None, problem: str) -> SFTError:
    peak = None if batch is None else estimate(module, batch)
    parts = "" if peak is None else ", ".join(f"{in_gib(n)} for {part}" for part, n in peak.parts.items())
    return SFTError(
        f"{problem} at {in_words(batch) if batch is not None else 'the optimizer step'}"
        + (f"; it needs about {parts}" if parts else ""),
        where=str(module.device),
        fix=_what_helps(module),
    )


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
