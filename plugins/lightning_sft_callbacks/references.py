"""A base's figures and predictions on disk, under a hash of the model and of what it was asked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lightning_sft import Predictions, SFTError, checksum, full_tensor, text_losses
from lightning_sft_callbacks.retention import Measured

if TYPE_CHECKING:
    from lightning_sft import SFTModule
    from lightning_sft_callbacks.domains import Loaded

_PARTS = ("tokens", "log_p", "rest", "counts")


@dataclass(frozen=True, slots=True)
class Baseline:
    """What the base did on each domain.

    Args:
        measured: By the domain's name.
        predictions: What it predicted of each window of a text domain, where that was kept.
    """

    measured: dict[str, Measured]
    predictions: dict[str, list[Predictions]]


def keeps_base(module: SFTModule) -> bool:
    """Whether the base's outputs can be had again by switching the adapter off."""
    try:
        with module.adapter.base_model(module.loaded):
            return True
    except SFTError:
        return False


def begins_as_base(module: SFTModule) -> bool:
    """Whether the model of step 0 is that with the adapter switched off; not where it goes on from a saved one."""
    (found,) = text_losses(module, [module.data.prepared["train"].examples[0]], against_base=True)
    return abs(found.kl or 0.0) <= 1e-6 * found.tokens


def key_of(module: SFTModule, domains: Sequence[Loaded], *, frozen_only: bool, keep: int) -> str:
    """A hash of the base's weights, its precision, and what it is asked.

    Args:
        module: The model.
        domains: What it is asked.
        frozen_only: Only frozen parameters are the base's.
        keep: How many tokens of each prediction are kept.
    """
    found = hashlib.sha256()
    for name, parameter in sorted(module.loaded.named_parameters()):
        if frozen_only and parameter.requires_grad:
            continue
        sums = checksum(full_tensor(parameter.detach()))
        found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {sums}".encode())
    asked = {loaded.domain.name: loaded.digest for loaded in domains}
    found.update(json.dumps([asked, keep, str(module.trainer.precision), torch.__version__]).encode())
    return found.hexdigest()[:24]


def save(path: Path, baseline: Baseline) -> None:
    """Write a baseline; the file is there only when it is whole."""
    tensors: dict[str, torch.Tensor] = {}
    for name, windows in baseline.predictions.items():
        tensors[f"{name}/tokens"] = torch.cat([each.tokens for each in windows])
        tensors[f"{name}/log_p"] = torch.cat([each.log_p for each in windows])
        tensors[f"{name}/rest"] = torch.cat([each.rest for each in windows])
        tensors[f"{name}/counts"] = torch.tensor([len(each.rest) for each in windows])
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    measured = {name: asdict(each) for name, each in baseline.measured.items()}
    save_file(tensors, partial, metadata={"measured": json.dumps(measured)})
    partial.replace(path)


def load(path: Path) -> Baseline | None:
    """A baseline that was written before; None where there is none, or a damaged one."""
    try:
        with safe_open(path, "pt") as file:
            measured = measured_of(json.loads(file.metadata()["measured"]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None
    predictions = {}
    for name in {each.rpartition("/")[0] for each in tensors}:
        tokens, log_p, rest, counts = (tensors[f"{name}/{part}"] for part in _PARTS)
        sizes = counts.tolist()
        predictions[name] = [
            Predictions(*parts)
            for parts in zip(tokens.split(sizes), log_p.split(sizes), rest.split(sizes), strict=True)
        ]
    return Baseline(measured, predictions)


def measured_of(saved: Mapping[str, Any]) -> dict[str, Measured]:
    """Figures of domains as they come from JSON."""
    found = {}
    for name, each in saved.items():
        parts: dict[str, Any] = {
            part: tuple(value) if isinstance(value, list | tuple) else value for part, value in each.items()
        }
        found[name] = Measured(**parts)
    return found
