"""New tokens: special tokens that the base has no trained row for, from the tokenizer to the embeddings' rows.

A row that is new starts as the mean of the others (Hewitt, 2021), without a draw, so it is the same on every rank and
in every run. An adapter that freezes the embeddings trains these rows beside them; peft keeps such rows as a parameter
of their own, and the head computes with it here (`rows_beside`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_sft.errors import SFTError
from lightning_sft.training.models import ADAPTER_CONFIG

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_KEY = "model.new_tokens"


@dataclass(frozen=True, slots=True)
class NewTokens:
    """What the new tokens ask of the embeddings.

    Args:
        size: Rows that the embeddings need.
        fresh: Ids of the rows that have no value yet.
        trained: Ids of the rows that are to be trained: these, and those that were named.
    """

    size: int
    fresh: tuple[int, ...] = ()
    trained: tuple[int, ...] = ()


def add_tokens(tokenizer: PreTrainedTokenizerBase, names: Sequence[str], vocabulary: int) -> NewTokens:
    """Make each name a special token that the tokenizer lacks; what the tokens ask of the embeddings.

    Where these have to grow, the rows of all ids of the tokenizer's are there afterwards.

    Args:
        tokenizer: The tokenizer, which is changed.
        names: The tokens. Those that the tokenizer has stay as they are.
        vocabulary: Rows of the base's embeddings.

    Raises:
        SFTError: A name is blank, there twice, or an ordinary token that the base knows.
    """
    from transformers import AddedToken

    special = {token.content for token in tokenizer.added_tokens_decoder.values()}
    have = tokenizer.get_vocab()
    for n, name in enumerate(names):
        if not name.strip() or name in names[:n]:
            what = f"{name!r} is there twice" if name.strip() else f"{name!r} is blank"
            raise SFTError(what, where=_KEY, fix="give each new token once, such as '<tool>'")
        if name not in special and have.get(name, vocabulary) < vocabulary:
            raise SFTError(
                f"{name!r} is an ordinary token, which the base knows from its texts",
                where=_KEY,
                fix=f"choose a text that doesn't occur otherwise, such as '<{name.strip('<|>')}>'",
            )
    lacking = [name for name in names if name not in have]
    tokens = [AddedToken(name, special=True, normalized=False) for name in lacking]
    tokenizer.add_tokens(tokens, special_tokens=True)
    size = max(vocabulary, len(tokenizer), max(tokenizer.added_tokens_decoder, default=0) + 1)
    beyond = range(vocabulary, size)
    ids = {name: int(tokenizer.convert_tokens_to_ids(name)) for name in names}
    fresh, trained = {ids[name] for name in lacking}, set(ids.values())
    return NewTokens(size, tuple(sorted(fresh.union(beyond))), tuple(sorted(trained.union(beyond))))


def grow(model: PreTrainedModel, new: NewTokens) -> None:
    """Give the embeddings their rows; a fresh one is the mean of those that aren't."""
    _resize(model, new.size)
    if not new.fresh:
        return
    for part in (model.get_input_embeddings(), model.get_output_embeddings()):
        for values in (getattr(part, "weight", None), getattr(part, "bias", None)):
            if isinstance(values, Tensor) and len(values) == new.size:
                rows = torch.tensor(new.fresh, device=values.device)
                rest = torch.ones(new.size, dtype=torch.bool, device=values.device).index_fill_(
                    0, rows, False
                )
                mean = values.data[rest].to(torch.promote_types(values.dtype, torch.float32)).mean(0)
                values.data[rows] = mean.to(values.dtype)


def grow_for_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Give a base the rows that a peft adapter was trained with, so that it can be loaded; it brings their values."""
    from safetensors import safe_open

    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [f".{name}." for name, part in model.named_modules() if part in embeddings]
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    given = config.get("trainable_token_indices") or []
    lists = given.values() if isinstance(given, dict) else [given]
    sizes = [max(ids, default=-1) + 1 for ids in lists]
    if (weights := folder / "adapter_model.safetensors").is_file():
        with safe_open(weights, "pt") as file:
            sizes += [
                file.get_slice(key).get_shape()[0]
                for key in file.keys()  # noqa: SIM118, it isn't a dictionary
                if key.endswith(".weight") and any(name in key for name in names) and "lora_" not in key
            ]
    _resize(model, max(sizes))


def _resize(model: PreTrainedModel, size: int) -> None:
    if size > len(model.get_input_embeddings().weight):
        with isolate_rng():
            model.resize_token_embeddings(size, mean_resizing=False)


def check_trained(model: PreTrainedModel, new: NewTokens, adapter: str) -> None:
    """Return if the adapter trains the rows of the new tokens, in the input and the output embedding.

    Raises:
        SFTError: It doesn't.
    """
    if not new.trained:
        return
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    ids = torch.tensor(new.trained, device=embedding.weight.device)
    with torch.enable_grad():
        parts = {"input": embedding(ids)}
        if head is not None:
            parts["output"] = head(parts["input"].detach().to(head.weight.dtype))
    for name, values in parts.items():
        if not values.requires_grad:
            raise SFTError(
                f"the {adapter} doesn't train the rows of new tokens in the {name} embedding",
                where=_KEY,
                fix="use an adapter that does, such as LoRA or Full",
            )


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Rows that stand in for those of a frozen output embedding.

    Args:
        ids: int64 `[k]`: which rows.
        values: `[k, H]`: the parameter that is trained.
    """

    ids: Tensor
    values: Tensor


def rows_beside(linear: nn.Module) -> tuple[nn.Module, Rows | None]:
    """The output embedding and the rows beside it; itself where there are none, or in a way not known here."""
    beside = getattr(linear, "token_adapter", None)
    base = getattr(beside, "base_layer", None)
    if beside is None or type(base) is not nn.Linear or base.bias is not None:
        return linear, None
    active = [name for name in beside.active_adapters if name in beside.trainable_tokens_delta]
    if beside.disable_adapters or beside.merged or not active:
        return (linear if beside.merged else base), None
    if len(active) > 1:
        return linear, None
    values = beside.trainable_tokens_delta[active[0]]
    return base, Rows(torch.tensor(beside.token_indices[active[0]], device=values.device), values)
