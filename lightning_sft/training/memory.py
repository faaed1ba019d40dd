"""Memory: activations recomputed instead of kept, and what to say when there isn't enough of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_sft.errors import SFTError
from lightning_sft.training import optimizers
from lightning_sft.training.head import CHUNK
from lightning_sft.training.layout import causal_lm
from lightning_sft.training.shards import local

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

    machine, needed = psutil.virtual_memory(), sum(estimate(module, batch).values())
    if needed > machine.total:
        raise _too_little(module, batch, f"{_gib(machine.total)} GiB of memory are too little")
    loaded = sum(local(p).numel() * p.element_size() for p in module.loaded.parameters())
    if needed - loaded > machine.available:
        rank_zero_warn(
            f"{in_words(batch)} needs about {_gib(needed - loaded)} GiB, {_gib(machine.available)} GiB are available: "
            f"the system may kill the run. {_what_helps(module)}"
        )


def _too_little(module: SFTModule, batch: Batch | None, problem: str) -> SFTError:
    parts = ", ".join(f"{_gib(size)} GiB for {part}" for part, size in estimate(module, batch).items())
    return SFTError(
        f"{problem} at {in_words(batch) if batch is not None else 'the optimizer step'}; about {parts}",
        where=str(module.device),
        fix=_what_helps(module),
    )


def estimate(module: SFTModule, batch: Batch | None) -> dict[str, float]:
    """Bytes that training needs, by what they are for: a rule of thumb, to see what weighs most.

    Per token a layer keeps about 8 H + 4 I values, with H the hidden and I the feed-forward size: inputs of the
    norms, queries, keys, values, attention, and of a gated feed-forward network. For I = 8/3 H at 16 bits that is
    37 H bytes, and Korthikanti et al. (2022) count 34 H without the attention matrix. Recomputing keeps H
    values a layer and the whole of one layer. AdamW keeps two averages of each parameter that is trained.
    """
    parameters = [(local(p).numel(), p.element_size(), p.requires_grad) for p in module.loaded.parameters()]
    state = optimizers.state_bytes(module)
    config = module.base_config.get_text_config()
    hidden = getattr(config, "hidden_size", 0)
    layers = getattr(config, "num_hidden_layers", 0)
    wide = getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", None)
    wide = (4 * hidden if wide is None else wide) * (getattr(config, "num_experts_per_tok", None) or 1)
    per_layer = 8 * hidden + 4 * wide
    kept = layers * hidden + per_layer if module.gradient_checkpointing else layers * per_layer
    trainer = module._trainer
    mixed = trainer is not None and str(trainer.precision).endswith("-mixed")
    size = 2 if mixed else next(module.loaded.parameters()).element_size()
    tokens = batch.input_ids.numel() if batch is not None else 0
    rows = min(CHUNK, len(batch.targets)) if batch is not None else 0
    return {
        "the weights": sum(n * each for n, each, _ in parameters),
        "gradients and the optimizer": sum(n * (each + state) for n, each, trains in parameters if trains),
        "activations": tokens * kept * size,
        "logits": 3 * 4 * rows * module.vocabulary,
    }


def in_words(batch: Batch) -> str:
    """The shape of a batch, for people: rows, tokens with padding, the longest row, and the targets."""
    rows = "1 row" if len(batch.metas) == 1 else f"{len(batch.metas):,} rows"
    if batch.segments is None:
        longest = batch.input_ids.shape[1]
    else:
        longest = max(end - start for start, end in pairwise(batch.segments))
    return (
        f"a batch of {rows} with {batch.input_ids.numel():,} tokens (the longest {longest:,}), "
        f"{len(batch.targets):,} of them trained"
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g}"


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
