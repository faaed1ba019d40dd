"""An adapter and its base as one model, or a model in another type: proved to compute the same before it is written."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_sft.errors import SFTError

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
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


def write(
    source: Path,
    output: Path,
    *,
    dtype: str | None,
    tolerance: float,
    max_shard_size: str = "5GB",
    trust_remote_code: bool = False,
) -> Parity:
    """Write an adapter and its base as one model, merged in float32, or a whole model; stored as `dtype`, and compared.

    A base that was quantised in training is quantised again, and what is left of its weights is what the adapter
    is added to: that is what it was trained on.

    Raises:
        SFTError: The model can't be loaded or merged, or the result is further from it than `tolerance`.
    """
    import torch

    from lightning_sft.training.models import (
        base_of,
        is_adapter,
        load_config,
        load_tokenizer,
        load_trained,
        quantization_of,
    )

    name, revision = str(source), None
    if is_adapter(source) and not any(source.glob("tokenizer*")):  # one from elsewhere may come without
        name, revision = base_of(source)
    tokenizer = load_tokenizer(name, revision=revision, trust_remote_code=trust_remote_code, key="source")
    texts = rows(tokenizer)
    if not is_adapter(source):
        model = load_trained(source, trust_remote_code=trust_remote_code)
        stored, expected = model.dtype, logits(model, texts)
    else:
        name, revision = base_of(source)
        base = load_config(
            name, revision=revision, trust_remote_code=trust_remote_code, key=f"the base of {source}"
        )
        stored = base.dtype or torch.float32
        trained = load_trained(source, dtype=torch.float32, trust_remote_code=trust_remote_code)
        if not hasattr(trained.base_model, "merge_and_unload"):
            raise SFTError(
                f"a {trained.active_peft_config.peft_type.value} adapter has nothing that could be added to weights",
                where=str(source),
                fix="use the adapter with its base",
            )
        expected = logits(trained, texts)
        if quantization_of(source) is not None:
            del trained
            trained = load_trained(
                source, dtype=torch.float32, whole_base=True, trust_remote_code=trust_remote_code
            )
        try:
            model = merged(trained)
        except (ValueError, NotImplementedError) as error:
            raise SFTError(
                f"the adapter can't be merged: {error}", where=str(source), fix="use it with its base"
            ) from error
        del trained
    save(
        model, tokenizer, source, output,
        stored=getattr(torch, dtype) if dtype else stored, max_shard_size=max_shard_size,
    )  # fmt: skip
    del model
    return prove(
        output, texts, expected, tolerance=tolerance, source=source, trust_remote_code=trust_remote_code
    )


def merged(adapted: PeftModel) -> PreTrainedModel:
    """The base with its adapter added to its weights; the adapted model isn't to be used any more.

    An adapter of the embedding isn't one of the head that is tied to it. So the two get weights of their own first,
    and are tied again if these are equal in the end.
    """
    import torch

    base = adapted.get_base_model()
    tied = _take_apart(adapted)
    if tied:
        base.config.tie_word_embeddings = False
    model: PreTrainedModel = adapted.merge_and_unload()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if tied and torch.equal(embedding.weight, head.weight):
        head.weight = embedding.weight
        model.config.tie_word_embeddings = True
    return model


def _take_apart(model: PeftModel) -> bool:
    """Give each layer parameters of its own; whether some were shared."""
    from torch.nn import Parameter

    seen: set[int] = set()
    shared = False
    for layer in model.modules():
        for name, parameter in list(layer.named_parameters(recurse=False)):
            if id(parameter) in seen:
                setattr(layer, name, Parameter(parameter.detach().clone(), requires_grad=False))
                shared = True
            seen.add(id(parameter))
    return shared


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: Path,
    output: Path,
    *,
    stored: torch.dtype,
    max_shard_size: str = "5GB",
) -> None:
    """Write a whole model with its weights as `stored`, its tokenizer, and the generation configuration of `source`."""
    from transformers import GenerationConfig

    from lightning_sft import goldens

    for parameter in model.parameters():  # not `to`, which would round RoPE's frequencies: they aren't stored
        parameter.data = parameter.data.to(stored)
    model.config.dtype = stored
    if (source / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(source))
    model.save_pretrained(output, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(output)
    if (source / goldens.INTERPOLATION).is_file():
        shutil.copyfile(source / goldens.INTERPOLATION, output / goldens.INTERPOLATION)


def prove(
    folder: Path,
    texts: list[Tensor],
    expected: list[Tensor],
    *,
    tolerance: float = 0.01,
    source: Path,
    trust_remote_code: bool = False,
) -> Parity:
    """Load what was written, and compare its logits with those that are expected.

    Raises:
        SFTError: It can't be loaded, or is further away than `tolerance`.
    """
    from lightning_sft.training.models import load_trained

    parity = compare(expected, logits(load_trained(folder, trust_remote_code=trust_remote_code), texts))
    if not parity.divergence <= tolerance:
        raise SFTError(
            f"what would be written is not what was trained: {parity}; at most {tolerance:g} is allowed",
            where=str(source),
            fix="use --dtype float32, or allow more with --tolerance",
        )
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


def rows(tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
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


def logits(model: PreTrainedModel, rows: list[Tensor]) -> list[Tensor]:
    """Logits `[T, V]` of each row, in float32."""
    import torch

    with torch.no_grad():
        return [model(input_ids=row, use_cache=False).logits[0].float() for row in rows]
