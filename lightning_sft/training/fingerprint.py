"""What makes a run the one it is: kept in its checkpoints, and compared before training goes on from one.

A resumed run is to compute what the uninterrupted one would have computed. What would change that is refused, with the
difference shown; what wouldn't (logging, callbacks, workers, when to validate, where the files are) is not in here.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_sft.errors import SFTError
from lightning_sft.training import optimizers
from lightning_sft.training.shards import full_tensor

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_sft.data.plan import BatchPlan
    from lightning_sft.training.module import SFTModule

Facts = dict[str, str | int | float | bool | None]
"""Facts by the option or thing they are about."""

_SAMPLE = 64  # values of a frozen parameter that are looked at
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_AT_ONCE = 1 << 22  # words that are added up at once, in 64 bits


def done_so_far(module: SFTModule, trainer: Trainer) -> Facts:
    """What the steps that were done depend on, and where the next batch is: data, order, model and adapter."""
    from lightning_sft.data.datamodule import SFTDataModule

    facts: Facts = {}
    data = getattr(trainer, "datamodule", None)
    if isinstance(data, SFTDataModule):
        for part in ("train", "val"):
            prepared = data.prepared.get(part)
            facts[f"{part} examples"] = len(prepared.examples) if prepared else 0
            facts[f"{part} tokens and weights"] = prepared.digest if prepared else None
        facts |= {
            "data.batch_size": data.batch_size,
            "data.seed": data.seed,
            "batches of an epoch": plan_digest(data.plan(0)),
        }
    return facts | {
        "seed_everything": module.seed,
        "trainer.accumulate_grad_batches": trainer.accumulate_grad_batches,
        "trainer.limit_train_batches": trainer.limit_train_batches,
        "processes": trainer.world_size,
        "frozen weights of the base": module.frozen,
        "chat template": _short(hashlib.sha256(module.renderer.chat_template.encode())),
        **({"model.new_tokens": str(module.new_tokens)} if module.new_tokens else {}),
        **_options("model.adapter", module.adapter),
    }


def to_come(module: SFTModule, trainer: Trainer) -> Facts:
    """What the steps to come depend on besides: optimizer, schedule, length, loss, precision."""
    return {
        "model.learning_rate": module.learning_rate,
        "model.weight_decay": module.weight_decay,
        "model.betas": str(tuple(module.betas)),
        "model.optimizer": optimizers.facts(module.optimizer),
        "model.schedule": module.schedule,
        "model.warmup": module.warmup,
        "model.final_learning_rate": module.final_learning_rate,
        "steps of the run": module.total_steps(),
        "trainer.precision": str(trainer.precision),
        "trainer.gradient_clip_val": trainer.gradient_clip_val,
        "trainer.gradient_clip_algorithm": getattr(trainer.gradient_clip_algorithm, "value", None),
        **_options("model.loss", module.loss),
    }


def differences(old: Facts, new: Facts) -> list[str]:
    """The facts that differ, as `key: old -> new`; of a plug-in that is another, not its options besides."""
    keys = [
        key for key in dict.fromkeys([*old, *new]) if key not in old or key not in new or old[key] != new[key]
    ]
    return [
        f"{key}: {old.get(key, 'not there')} -> {new.get(key, 'not there')}"
        for key in keys
        if key.rpartition(".")[0] not in keys
    ]


def refuse(different: list[str], *, fix: str) -> None:
    """Say what has changed.

    Raises:
        SFTError: Anything has.
    """
    if different:
        lines = "".join(f"\n    {line}" for line in different)
        raise SFTError(
            f"this run is not the one that the checkpoint is of; it would not go on as that one:{lines}",
            where="--ckpt_path",
            fix=fix,
        )


def plan_digest(plan: BatchPlan) -> str:
    """Of every micro-batch of every rank: whatever option of the plan changes one of them changes this."""
    digest = hashlib.sha256()
    for rank in range(plan.world_size):
        for micro in plan.rank(rank):
            digest.update(repr(micro).encode())
    return _short(digest)


def frozen_digest(module: nn.Module) -> str | None:
    """Of a sample of each parameter that isn't trained: those aren't in the checkpoint. None if all are trained."""
    frozen = {name: each for name, each in module.named_parameters() if not each.requires_grad}
    return _digest(frozen) if frozen else None


def weights_digest(module: nn.Module) -> str:
    """Of all bits of each parameter: one changed value shows.

    A sharded model has the digest of the whole one; all ranks have to take part.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        sums = checksum(full_tensor(parameter.detach()))
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {sums}".encode())
    return _short(digest)


def checksum(tensor: Tensor) -> list[int]:
    """Two sums over all bits, modulo 2^64, one of them weighted by place; the same on every device."""
    words = tensor.contiguous().flatten().view(_WORDS[tensor.element_size()])
    sums = [0, 0]
    for start in range(0, len(words), _AT_ONCE):
        part = words[start : start + _AT_ONCE].long()
        places = torch.arange(start + 1, start + 1 + len(part), device=part.device)
        sums[0] += int(part.sum())
        sums[1] += int((part * places).sum())
    return [each % 2**64 for each in sums]


def _digest(parameters: Mapping[str, nn.Parameter]) -> str:
    digest = hashlib.sha256()
    for name, parameter in sorted(parameters.items()):
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, len(flat) // _SAMPLE)].cpu().double().numpy()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(sample.tobytes())
    return _short(digest)


def _options(key: str, plugin: object) -> Facts:
    """The plug-in's class, and its options where it keeps them under their names."""
    facts: Facts = {key: f"{type(plugin).__module__}.{type(plugin).__qualname__}"}
    made_by = [kind for kind in type(plugin).__mro__ if "__init__" in vars(kind) and kind is not object]
    for name in {name: None for kind in made_by for name in inspect.signature(kind).parameters}:
        value = getattr(plugin, name, None)
        if is_dataclass(value) and not isinstance(value, type):
            value = {field.name: getattr(value, field.name) for field in fields(value)}
        if isinstance(value, str | int | float | bool | None):
            facts[f"{key}.{name}"] = value
        elif isinstance(value, list | tuple | dict):
            facts[f"{key}.{name}"] = str(value)
    return facts


def _short(digest: Any) -> str:
    return str(digest.hexdigest())[:16]
