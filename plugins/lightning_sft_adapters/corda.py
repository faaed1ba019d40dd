"""CorDA's start of LoRA: the part of each weight that matters most on the training rows becomes the adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lightning_sft import SFTError

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor, nn
    from transformers import PreTrainedModel

_OURS = "default"  # the name that peft gives the adapter in training
TOKENS_PER_WIDTH = 128
"""Tokens to look at for each input of the widest layer: peft's advice for the number of samples."""


def begin(
    model: PreTrainedModel, config: PeftConfig, batches: Iterable[Any], forward: Callable[[Any], None]
) -> None:
    """Take A and B from W·C, where C is the covariance of a layer's inputs; the base stays as it is.

    C is the mean over the rows of all ranks (Yang et al., 2024; as peft's `preprocess_corda` has it), of as many as it
    takes to see 128 tokens for each input of the widest layer. It is held for all layers at once: `inputs²` floats.

    Raises:
        SFTError: A layer's inputs aren't numbers, or it has none.
    """
    from peft.tuners.lora.corda import collect_eigens_for_layer

    layers = _layers(model)
    found = _covariances(layers, batches, forward)
    for name, layer in layers.items():
        base, rank = layer.get_base_layer(), layer.r[_OURS]
        before = base.weight.data.clone()
        base.covariance_matrix = found.pop(name)
        base.eigens = collect_eigens_for_layer(base, config)
        base.eigens.S_WC = base.eigens.S_WC[:rank].to(before.device)
        base.eigens.U_WC = base.eigens.U_WC[:, :rank].to(before.device)
        base.eigens.V_WC = base.eigens.V_WC[:, :rank].to(before.device)
        del base.covariance_matrix
        layer.corda_init(_OURS, "corda")
        base.weight.data = before


def take_out(model: PreTrainedModel) -> None:
    """Take out of the base what the adapters hold, so that both together are the base."""
    for layer in _layers(model).values():
        weight = layer.get_base_layer().weight
        weight.data = (weight.data.float() - layer.get_delta_weight(_OURS).float()).to(weight.dtype)


def _layers(model: PreTrainedModel) -> dict[str, Any]:
    from peft.tuners.lora.layer import Linear

    return {name: part for name, part in model.named_modules() if isinstance(part, Linear)}


def _covariances(
    layers: dict[str, Any], batches: Iterable[Any], forward: Callable[[Any], None]
) -> dict[str, Tensor]:
    """Of each layer the mean over rows of XᵀX, with X the row's inputs over the largest of them."""
    import torch
    from torch import distributed

    sums = {
        name: torch.zeros(layer.in_features, layer.in_features, device=layer.get_base_layer().weight.device)
        for name, layer in layers.items()
    }
    counts = {name: total.new_zeros(()) for name, total in sums.items()}
    now: list[Any] = []

    def hook(name: str) -> Callable[..., None]:
        def see(layer: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
            for row in _rows(given[0].detach().float(), now[-1]):
                scaled = row / row.max().abs()
                sums[name] += scaled.T @ scaled
                counts[name] += 1

        return see

    hooks = [layer.get_base_layer().register_forward_hook(hook(name)) for name, layer in layers.items()]
    together = distributed.is_available() and distributed.is_initialized()
    ranks = distributed.get_world_size() if together else 1
    left = TOKENS_PER_WIDTH * max(layer.in_features for layer in layers.values()) / ranks
    try:
        for batch in batches:
            now.append(batch)
            forward(batch)
            left -= batch.num_tokens
            if left <= 0:
                break
    finally:
        for each in hooks:
            each.remove()
    for name, total in sums.items():
        if together:
            distributed.all_reduce(total)
            distributed.all_reduce(counts[name])
        total /= counts[name]
        if not total.isfinite().all():
            raise SFTError(
                f"{name} computes nothing on the training rows, or nothing finite",
                where="model.adapter.init",
                fix="leave it out (exclude_modules), or use another init",
            )
    return sums


def _rows(states: Tensor, batch: Any) -> Iterable[Tensor]:
    """The inputs of each row, without padding: `[tokens, inputs]`."""
    if batch.segments is not None:
        flat = states.flatten(0, -2)
        return [flat[start:end] for start, end in pairwise(batch.segments)]
    return [row[mask.bool()] for row, mask in zip(states, batch.attention_mask, strict=True)]
