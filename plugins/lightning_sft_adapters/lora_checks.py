"""LoRA's options against the model: what peft would leave out silently, or fail at in the middle of a run."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lightning_sft import SFTError
from lightning_sft_adapters import heavy

if TYPE_CHECKING:
    from lightning_sft_adapters.lora import LoRA


def check_patterns(adapter: LoRA) -> None:
    """Refuse regular expressions that are none.

    Raises:
        SFTError: One is.
    """
    given: dict[str, Iterable[str]] = {
        option: [value]
        for option in ("target_modules", "exclude_modules")
        if isinstance(value := getattr(adapter, option), str)
    }
    given |= {option: getattr(adapter, option) or () for option in ("rank_pattern", "alpha_pattern")}
    for option, patterns in given.items():
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise _refused(
                    adapter,
                    option,
                    f"{pattern!r} is no regular expression: {error}",
                    "escape its special characters",
                ) from error


def check_names(adapter: LoRA, adapted: Any, before: list[str]) -> None:
    """Refuse names and numbers in the options that nothing in the model has.

    Args:
        adapter: The options.
        adapted: The model with the adapter in it.
        before: The names of the modules of the model without it.

    Raises:
        SFTError: There is such a one.
    """
    from peft.utils.other import get_pattern_key

    layers = list(adapted.targeted_module_names)
    for option in ("target_modules", "exclude_modules"):
        if isinstance(names := getattr(adapter, option), list):
            searched = layers if option == "target_modules" else before
            _check(adapter, option, {name: _ends(searched, f".{name}") for name in names}, before)
    _check(
        adapter,
        "modules_to_save",
        {name: _ends(before, name) for name in adapter.modules_to_save or ()},
        before,
    )
    parameters = [f".{name}" for name in adapted.targeted_parameter_names]
    _check(
        adapter,
        "target_parameters",
        {name: _ends(parameters, f".{name}") for name in adapter.target_parameters or ()},
        [],
    )
    blocks = {
        str(number): any(f".{number}." in f".{name}." for name in layers) for number in adapter.layers or ()
    }
    _check(adapter, "layers", blocks, [])
    for option in ("rank_pattern", "alpha_pattern"):
        keys = getattr(adapter, option) or {}
        used = {get_pattern_key(list(keys), name) for name in layers + list(adapted.targeted_parameter_names)}
        _check(adapter, option, {key: key in used for key in keys}, layers)


def check_tokens(adapter: LoRA, model: heavy.PreTrainedModel) -> None:
    """Refuse tokens to train that the embedding has no row for.

    Raises:
        SFTError: There is one.
    """
    given = adapter.trainable_tokens
    if not given:
        return
    by_layer = given if isinstance(given, dict) else {"": given}
    for name, ids in by_layer.items():
        tables = [model.get_input_embeddings()]
        if name:
            tables = [part for path, part in model.named_modules() if f".{path}".endswith(f".{name}")]
        for table in tables:
            rows = int(table.weight.shape[0])
            if wrong := [number for number in ids if not 0 <= number < rows]:
                raise _refused(
                    adapter,
                    "trainable_tokens",
                    f"there is no token {wrong[0]}: the embedding has {rows} rows",
                    f"give ids from 0 to {rows - 1}; new tokens are model.new_tokens",
                )


def check_embeddings(adapter: LoRA, model: heavy.PreTrainedModel, *, moves_base: bool) -> None:
    """Refuse two ways to train the same embedding, and taking a weight apart that two layers share.

    Args:
        adapter: The options.
        model: The model without the adapter.
        moves_base: Whether `init` takes a part out of the base's weights.

    Raises:
        SFTError: The options ask for one of these.
    """
    from peft.tuners.tuners_utils import check_target_module_exists

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = [name for name, part in model.named_modules() if part is embedding or part is head]
    tied = head is not None and head.weight is embedding.weight
    config = adapter.config(model)
    adapted = [name for name in names if check_target_module_exists(config, name)]
    if tied and moves_base and adapted:
        raise _refused(
            adapter,
            "init",
            f"init {adapter.init} takes the weight of {adapted[0]} apart, which the input and the output embedding "
            "share",
            "use init: default, or leave it out of target_modules",
        )
    rows = config.trainable_token_indices
    if not rows:
        return
    layers = dict(model.named_modules())
    with_rows = [
        name
        for name in names
        if (name.endswith(tuple(rows)) if isinstance(rows, dict) else layers[name] is embedding)
    ]
    if tied and with_rows:
        with_rows = names
    if both := [name for name in with_rows if name in adapted]:
        raise _refused(
            adapter,
            "target_modules",
            f"{both[0]} can't get both low-rank updates and rows of its own (trainable_tokens, model.new_tokens)",
            "leave it out of target_modules",
        )
    if both := [name for name in with_rows if name.endswith(tuple(adapter.modules_to_save or ()))]:
        raise _refused(
            adapter,
            "modules_to_save",
            f"{both[0]} can't be trained both in full and by rows (trainable_tokens, model.new_tokens)",
            f"train all in full: modules_to_save: [{', '.join(with_rows)}], without trainable_tokens",
        )


def check_ranks(adapter: LoRA, adapted: Any, name: str) -> None:
    """Refuse ranks that no decomposition of a weight, or of what goes into it, has.

    Args:
        adapter: The options.
        adapted: The model with the adapter in it.
        name: The adapter's name in peft.

    Raises:
        SFTError: There is one.
    """
    for path, layer in adapted.named_modules():
        if name not in getattr(layer, "lora_A", ()):
            continue
        inputs, outputs, rank = layer.in_features, layer.out_features, layer.r[name]
        most = inputs if adapter.init == "eva" else min(inputs, outputs)
        if rank > most:
            raise _refused(
                adapter,
                "r",
                f"init {adapter.init} has at most the rank {most} in {path} ({inputs} inputs, {outputs} outputs), "
                f"not {rank}",
                f"give r {most} or less, or rank_pattern for this layer",
            )


def check_tokens_seen(adapter: LoRA, rank: int, batches: Iterable[Any]) -> None:
    """Refuse to look for directions of activations among fewer tokens than directions: peft would look for ever.

    Args:
        adapter: The options.
        rank: The largest rank.
        batches: The micro-batches of this rank; those of all ranks are seen together.

    Raises:
        SFTError: No micro-batch has as many tokens.
    """
    import torch
    from torch import distributed

    most = 0
    for batch in batches:
        tokens = batch.input_ids.numel() if batch.attention_mask is None else int(batch.attention_mask.sum())
        together = torch.tensor(tokens, device=batch.input_ids.device)
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(together)
        most = max(most, int(together))
        if most >= rank:
            return
    raise _refused(
        adapter,
        "init",
        f"eva looks for {rank} directions among the tokens of a micro-batch, and none has more than {most}",
        "give a lower r, or a larger data.batch_size",
    )


def _ends(names: Iterable[str], ending: str) -> bool:
    return any(f".{name}".endswith(ending) for name in names)


def _check(adapter: LoRA, option: str, found: dict[str, bool], known: list[str]) -> None:
    missing = [name for name, there in found.items() if not there]
    if missing:
        last = sorted({part for name in known if (part := name.rpartition(".")[2]) and not part.isdigit()})
        raise _refused(
            adapter,
            option,
            f"the model has no layer {', '.join(missing)}"
            if option in ("modules_to_save", "exclude_modules")
            else f"nothing that gets an adapter has {', '.join(missing)}",
            f"its names end in {', '.join(last[:20])}" if last else "take it out",
        )


def _refused(adapter: LoRA, option: str, what: str, fix: str) -> SFTError:
    return SFTError(what, where=f"model.adapter.{option} ({type(adapter).__name__})", fix=fix)
