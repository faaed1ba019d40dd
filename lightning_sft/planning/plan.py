"""The plan of a run: memory by part and device, steps, tokens, time, and what to change where it doesn't fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jsonargparse._util import import_object

from lightning_sft import without_weights
from lightning_sft.cli import set_end
from lightning_sft.planning.estimate import Estimate, Sharding, cpu_speed, estimate, resident
from lightning_sft.planning.remedies import Setup, changes
from lightning_sft.planning.work import PlannedTrainer, Work, work_of
from lightning_sft.training import advisor, optimizers, strategies
from lightning_sft.training.devices import Device, this_machine
from lightning_sft.training.heap import apart
from lightning_sft.training.memory import in_words, longest_row
from lightning_sft.training.peak_memory import Peak

_BYTES_PER_TOKEN = 9
"""Of an example in memory: an id, a weight and a reason."""


@dataclass(frozen=True, slots=True)
class Remedy:
    """What a change would need.

    Args:
        says: The options to change.
        estimates: On the devices where the run doesn't fit.
    """

    says: str
    estimates: tuple[Estimate, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run would take.

    Args:
        base: The base model.
        adapter: The adapter's class.
        peak: Parameters, and the parts of a step's memory on the first device, not sharded.
        work: Steps and tokens.
        batch: The heaviest micro-batch in words.
        padded_because: Why rows are padded, if they are.
        strategy: Ranks, and the strategy's name, if there are several.
        estimates: This machine, and the devices asked for.
        remedies: What to change where the run doesn't fit, the last of all together.
        advice: Known mistakes that the run would make.
        rates: The peak learning rate of each group of parameters, in words.
    """

    base: str
    adapter: str
    peak: Peak
    work: Work
    batch: str
    padded_because: str | None
    strategy: str
    estimates: tuple[Estimate, ...]
    remedies: tuple[Remedy, ...]
    advice: tuple[str, ...]
    rates: tuple[str, ...]

    def as_json(self) -> dict[str, object]:
        """The plan in JSON types; sizes in bytes, times in seconds."""
        work = {
            name: getattr(self.work, name) for name in ("steps", "epochs", "examples", "tokens", "targets")
        }
        return {
            "base": self.base,
            "adapter": self.adapter,
            "parameters": self.peak.parameters,
            "trained": self.peak.trained,
            **work,
            "heaviest_batch": self.batch,
            "padded_because": self.padded_because,
            "strategy": self.strategy,
            "devices": [_as_json(each) for each in self.estimates],
            "changes": [
                {"change": each.says, "devices": [_as_json(one) for one in each.estimates]}
                for each in self.remedies
            ],
            "advice": list(self.advice),
            "learning_rates": list(self.rates),
        }


def make(config: Any, asked: Sequence[Device]) -> Plan:
    """The plan of a parsed configuration, for this machine and the devices asked for.

    Raises:
        SFTError: Something that the user gave is at fault.
    """
    strategies.check_options(config.trainer)
    module, data = without_weights.instantiated(config)
    here = this_machine(str(config.trainer.accelerator))
    strategy, trainer = _strategy(config.trainer.strategy), _trainer(config.trainer, here)
    setup = Setup(module, data, trainer, data.batch_size, data.batch_tokens)
    twin = setup.twin(here.kind)
    data.setup("fit")
    data.check_packing()
    before = resident()
    batch, work = setup.heaviest(twin), work_of(data, trainer)
    module.model = twin.model
    advice = tuple(
        f"{says} ({rule.source}; model.silenced_advice: [{rule.name}] silences this)"
        for rule, says in advisor.advice(
            advisor.facts_of(module, tuple(_callbacks(config.trainer.callbacks))), module.silenced_advice
        )
    )
    rates = tuple(optimizers.rates_in_words(optimizers.parameter_groups(module)))
    module.model = None
    peaks = {here.kind: apart(partial(twin.peak, batch))}
    flops, kinds = work.flops(twin.flops), {device.kind for device in asked} - {here.kind}
    peaks |= {kind: setup.peak(kind) for kind in kinds}
    held = int(data.prepared["train"].lengths.sum()) * _BYTES_PER_TOKEN
    fixed = {"data": held, "framework": max(0, before - held)}
    speed = cpu_speed(_computed_in(trainer.precision)) if here.kind == "cpu" else None
    sharding = Sharding.of(strategy, trainer.world_size)

    on = partial(estimate, sharding=sharding, fixed=fixed, flops=flops, speed=speed, here=trainer.world_size)

    estimates = tuple(on(device, peaks[device.kind]) for device in (here, *asked))
    full = [each.device for each in estimates if each.share > 1]
    return Plan(
        base=module.base,
        adapter=type(module.adapter).__name__,
        peak=peaks[here.kind],
        work=work,
        batch=in_words(batch),
        padded_because=twin.layout.padded_because,
        strategy=f"{trainer.world_size} × {strategy}" if trainer.world_size > 1 else "1 rank",
        estimates=estimates,
        remedies=tuple(_remedies(setup, longest_row(batch), full, on, sharding.weights)) if full else (),
        rates=rates,
        advice=advice,
    )


def _remedies(
    setup: Setup, longest: int, full: list[Device], on: Callable[[Device, Peak], Estimate], sharded: bool
) -> Iterator[Remedy]:
    """Each change by itself, and all of them together."""
    together, found = setup, list(changes(setup, longest, sharded=sharded))
    for change in found:
        together = change.apply(together)
    together_too = [("all of these", together)] if len(found) > 1 else []
    for says, changed in [*((each.says, each.apply(setup)) for each in found), *together_too]:
        peaks = {kind: changed.peak(kind) for kind in {device.kind for device in full}}
        yield Remedy(says, tuple(on(device, peaks[device.kind]) for device in full))


def _trainer(given: Any, here: Device) -> PlannedTrainer:
    set_end(given)
    limit, epochs, steps = given.limit_train_batches, given.max_epochs, given.max_steps
    if fast := int(given.fast_dev_run or 0):
        limit, epochs, steps = fast, 1, fast
    return PlannedTrainer(
        precision=str(given.precision or "32-true"),
        world_size=_count(given.devices, here) * int(given.num_nodes),
        accumulate_grad_batches=given.accumulate_grad_batches,
        limit_train_batches=limit,
        max_epochs=epochs,
        max_steps=steps,
    )


def _count(given: Any, here: Device) -> int:
    """How many devices `trainer.devices` means on this machine."""
    if isinstance(given, list):
        return len(given)
    text = str(given)
    if text in ("auto", "-1"):
        return torch.cuda.device_count() if here.kind == "cuda" else 1
    return len([part for part in text.split(",") if part.strip()]) if "," in text else int(text)


def _strategy(given: Any) -> str:
    """The strategy's name, or that of its class."""
    path = given if isinstance(given, str) else getattr(given, "class_path", type(given).__name__)
    name = str(path).rpartition(".")[2]
    return "ddp" if name == "auto" else name


def _callbacks(given: Any) -> Iterator[type]:
    """The classes of the trainer's callbacks, none of which is made."""
    for each in [] if given is None else given if isinstance(given, list) else [given]:
        found = import_object(each.class_path) if hasattr(each, "class_path") else type(each)
        if isinstance(found, type):
            yield found


def _computed_in(precision: str) -> torch.dtype:
    return torch.float32 if precision.startswith(("32", "64")) else torch.bfloat16


def _as_json(each: Estimate) -> dict[str, object]:
    return {
        "device": each.device.name,
        "memory": each.device.memory,
        "ranks": each.ranks,
        "parts": each.parts,
        "total": each.total,
        "fits": each.share <= 1,
        "seconds": each.seconds,
    }
