"""An adapter and its base as one model, or a model in another type: proved to compute the same before it is written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_sft.errors import SFTError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TEXTS, _TOKENS = 8, 64
"""How many texts the two are compared on, and how many tokens of each."""


@dataclass(frozen=True, slots=True)
class Parity:
    """How far a merged model is from the model with its adapter.

    Args:
        divergence: KL(adapter ‖ merged) of the next token's distribution, the mean over positions, in nats.
        largest: The largest difference of two logits, relative to the largest logit.
        positions: How many there were.
    """

    divergence: float
    largest: float
    positions: int

    def __str__(self) -> str:
        return (
            f"KL {self.divergence:.2g} nats per token, largest difference of two logits {self.largest:.2g} of the "
            f"largest, at {self.positions} positions of held-out text"
        )


def merge(
    adapter: Path,
    output: Path,
    *,
    dtype: str | None,
    tolerance: float,
    max_shard_size: str = "5GB",
    trust_remote_code: bool = False,
) -> Parity:
    """Merge in float32, store as `dtype`, and compare.

    A base that was quantised in training is quantised again, and what is left of its weights is what the adapter
    is added to: that is what it was trained on.

    Raises:
        SFTError: The adapter can't be merged, or the result is further from it than `tolerance`.
    """
    import torch

    from lightning_sft.training.models import (
        base_of,
        load_config,
        load_tokenizer,
        load_trained,
        quantization_of,
    )

    name, revision = base_of(adapter)
    own = any(adapter.glob("tokenizer*"))  # an adapter from elsewhere may come without one
    tokenizer = load_tokenizer(
        str(adapter) if own else name,
        revision=None if own else revision,
        trust_remote_code=trust_remote_code,
        key="source",
    )
    base = load_config(
        name, revision=revision, trust_remote_code=trust_remote_code, key=f"the base of {adapter}"
    )
    stored = getattr(torch, dtype) if dtype else base.dtype or torch.float32
    rows = _rows(tokenizer)
    trained = load_trained(adapter, dtype=torch.float32, trust_remote_code=trust_remote_code)
    if not hasattr(trained.base_model, "merge_and_unload"):
        raise SFTError(
            f"a {trained.active_peft_config.peft_type.value} adapter has nothing that could be added to weights",
            where=str(adapter),
            fix="use the adapter with its base",
        )
    expected = _logits(trained, rows)
    if quantization_of(adapter) is not None:
        del trained
        trained = load_trained(
            adapter, dtype=torch.float32, whole_base=True, trust_remote_code=trust_remote_code
        )
    try:
        model = trained.merge_and_unload()
    except (ValueError, NotImplementedError) as error:
        raise SFTError(
            f"the adapter can't be merged: {error}", where=str(adapter), fix="use it with its base"
        ) from error
    return _save(
        model, tokenizer, rows, expected, adapter, output,
        stored=stored, tolerance=tolerance, max_shard_size=max_shard_size,
    )  # fmt: skip


def convert(
    folder: Path,
    output: Path,
    *,
    dtype: str | None,
    tolerance: float,
    max_shard_size: str = "5GB",
    trust_remote_code: bool = False,
) -> Parity:
    """Store a whole model as `dtype`, and compare.

    Raises:
        SFTError: The model can't be loaded, or the result is further from it than `tolerance`.
    """
    import torch

    from lightning_sft.training.models import load_tokenizer, load_trained

    tokenizer = load_tokenizer(str(folder), trust_remote_code=trust_remote_code, key="source")
    rows = _rows(tokenizer)
    model = load_trained(folder, trust_remote_code=trust_remote_code)
    stored = getattr(torch, dtype) if dtype else model.dtype
    return _save(
        model, tokenizer, rows, _logits(model, rows), folder, output,
        stored=stored, tolerance=tolerance, max_shard_size=max_shard_size,
    )  # fmt: skip


def _save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Tensor],
    expected: list[Tensor],
    source: Path,
    output: Path,
    *,
    stored: torch.dtype,
    tolerance: float,
    max_shard_size: str,
) -> Parity:
    """Write the model as `stored`, if it gives the logits that are expected of it.

    Raises:
        SFTError: It doesn't.
    """
    from transformers import GenerationConfig

    for parameter in model.parameters():  # not `to`, which would round RoPE's frequencies: they aren't stored
        parameter.data = parameter.data.to(stored)
    model.config.dtype = stored
    parity = compare(expected, _logits(model, rows))
    if not parity.divergence <= tolerance:
        raise SFTError(
            f"what would be written is not what was trained: {parity}; at most {tolerance:g} is allowed",
            where=str(source),
            fix="use --dtype float32, or allow more with --tolerance",
        )
    if (source / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(source))
    model.save_pretrained(output, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(output)
    return parity


def compare(expected: list[Tensor], found: list[Tensor]) -> Parity:
    """Logits `[T, V]` of the same rows."""
    import torch

    divergences, apart, scale = [], 0.0, 0.0
    for ours, theirs in zip(expected, found, strict=True):
        p, q = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
        divergences.append((p.exp() * (p - q)).sum(-1))
        apart = max(apart, float((ours - theirs).abs().max()))
        scale = max(scale, float(ours.abs().max()))
    per_token = torch.cat(divergences)
    return Parity(max(0.0, float(per_token.mean())), apart / scale, len(per_token))


def _rows(tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    """Token ids `[1, T]` of the first held-out texts."""
    from lightning_sft.assets import data_path

    path = data_path("tiny:general")
    assert path is not None
    with path.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line, _ in zip(lines, range(_TEXTS), strict=False)]
    return [
        tokenizer(text, return_tensors="pt", truncation=True, max_length=_TOKENS)["input_ids"]
        for text in texts
    ]


def _logits(model: PreTrainedModel, rows: list[Tensor]) -> list[Tensor]:
    import torch

    with torch.no_grad():
        return [model(input_ids=row, use_cache=False).logits[0].float() for row in rows]
