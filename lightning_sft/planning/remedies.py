"""What to change where a run doesn't fit, in the order of what it costs, with what each change would need."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lightning_sft import plugins
from lightning_sft.errors import SFTError
from lightning_sft.planning.work import PlannedTrainer
from lightning_sft.training.heap import apart
from lightning_sft.training.peak_memory import Peak, Twin
from lightning_sft.training.preflight import heaviest_of

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lightning_sft.data.batch import Batch
    from lightning_sft.data.datamodule import SFTDataModule
    from lightning_sft.training.module import SFTModule


@dataclass(frozen=True, slots=True)
class Setup:
    """What the memory of a step depends on.

    Args:
        module: Model, adapter, loss and optimizer.
        data: The prepared data.
        trainer: Precision, ranks and accumulation.
        batch_size: As `data.batch_size`.
        batch_tokens: As `data.batch_tokens`.
        max_length: Longer examples are cut to so many tokens; None leaves them.
    """

    module: SFTModule
    data: SFTDataModule
    trainer: PlannedTrainer
    batch_size: int
    batch_tokens: int | None
    max_length: int | None = None

    def twin(self, kind: str) -> Twin:
        """The model of this setup without numbers; module and data get its layout."""
        self.trainer.attach(self.module, self.data)
        made = Twin(self.module, kind)
        self.module.__dict__["layout"] = made.layout
        return made

    def heaviest(self, twin: Twin) -> Batch:
        """The heaviest micro-batch of the run."""
        self.data.batch_size, self.data.batch_tokens = self.batch_size, self.batch_tokens
        examples = self.data.prepared["train"].examples
        rows = heaviest_of(self.module, self.data, range(self.trainer.world_size)).rows
        chosen = [examples[row] for row in rows]
        if (most := self.max_length) is not None:
            chosen = [
                replace(
                    each,
                    input_ids=each.input_ids[:most],
                    weights=each.weights[:most],
                    reasons=each.reasons[:most],
                )
                for each in chosen
            ]
        return twin.layout.collate(chosen, 1.0)

    def peak(self, kind: str) -> Peak:
        """What a step needs on a device of this kind."""
        twin = self.twin(kind)
        return apart(partial(twin.peak, self.heaviest(twin)))


@dataclass(frozen=True, slots=True)
class Change:
    """One thing to change.

    Args:
        says: The options, and what they cost.
        apply: The setup with the change.
    """

    says: str
    apply: Callable[[Setup], Setup]


def changes(setup: Setup, longest: int, *, sharded: bool) -> Iterator[Change]:
    """What would need less memory: first what leaves the results as they are.

    Args:
        setup: The setup as it is.
        longest: Tokens of the longest example in the heaviest micro-batch.
        sharded: Whether the weights are, which rules some changes out.
    """
    if not setup.module.gradient_checkpointing:
        says = "model.gradient_checkpointing: true (same results, about a third slower)"
        yield Change(says, lambda now: _with_module(now, gradient_checkpointing=True))
    accumulate = setup.trainer.accumulate_grad_batches
    if setup.batch_tokens is not None:
        if setup.batch_tokens > longest:
            says = f"data.batch_tokens: {longest} and more accumulation (steps of about the same size)"
            yield Change(says, lambda now: replace(now, batch_tokens=longest))
    elif setup.batch_size > 1:
        more = accumulate * setup.batch_size
        says = f"data.batch_size: 1, trainer.accumulate_grad_batches: {more} (same steps, slower)"
        yield Change(says, _one_by_one)
    if setup.module.optimizer is None and not sharded and find_spec("bitsandbytes") is not None:
        yield Change(
            "model.optimizer: bitsandbytes.optim.AdamW8bit (its averages in 8 bits)",
            partial(_with_module, optimizer=_adamw_8bit),
        )
    if setup.trainer.precision.startswith("32") or setup.trainer.precision.endswith("-mixed"):
        rounded = "rounds small updates away" if trains_base(setup) else "the base in bfloat16"
        says = f"trainer.precision: bf16-true ({rounded})"
        yield Change(says, lambda now: replace(now, trainer=replace(now.trainer, precision="bf16-true")))
    for plugin in plugins.discover("adapters"):
        try:
            adapter = plugin.load()
            if not getattr(adapter, "saves_memory", False) or isinstance(setup.module.adapter, adapter):
                continue
            made = adapter()
        except (SFTError, TypeError):  # a broken plug-in, or one that has no defaults, isn't suggested
            continue
        yield Change(
            f"model.adapter: {plugin.name}",
            partial(_with_module, adapter=made),
        )
    if longest >= 64:
        half = longest // 2
        says = f"data.max_length: {half} (longer examples are dropped or cut)"
        yield Change(says, lambda now: replace(now, max_length=half))


def trains_base(setup: Setup) -> bool:
    """Whether the adapter trains the base's own weights: then it has no way back to the base's outputs."""
    from lightning_sft.bases import Adapter

    return type(setup.module.adapter).base_model is Adapter.base_model


def _adamw_8bit(groups: Iterable[Any]) -> Optimizer:
    from bitsandbytes.optim import AdamW8bit

    made: Optimizer = AdamW8bit(groups)
    return made


def _one_by_one(setup: Setup) -> Setup:
    trainer = replace(
        setup.trainer, accumulate_grad_batches=setup.trainer.accumulate_grad_batches * setup.batch_size
    )
    return replace(setup, batch_size=1, trainer=trainer)


def _with_module(setup: Setup, **changed: object) -> Setup:
    module = copy.copy(setup.module)
    for name, value in changed.items():
        setattr(module, name, value)
    return replace(setup, module=module)
