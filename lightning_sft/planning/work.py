"""What a run has to do: its steps, tokens and FLOPs, from the very batches that `fit` would train on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
from lightning.pytorch import Trainer

from lightning_sft.data.datamodule import SFTDataModule
from lightning_sft.training.module import SFTModule
from lightning_sft.training.throughput import Flops


@dataclass
class PlannedTrainer:
    """What module and data ask of their trainer, where there is none.

    Args:
        precision: As `trainer.precision`.
        world_size: Ranks.
        accumulate_grad_batches: Micro-batches of an optimizer step.
        limit_train_batches: A fraction of an epoch's micro-batches (float) or a number of them (int).
        max_epochs: The last epoch; None or -1 for no end.
        max_steps: The last optimizer step; -1 for no end.
    """

    precision: str
    world_size: int
    accumulate_grad_batches: int
    limit_train_batches: float | int | None
    max_epochs: int | None
    max_steps: int
    global_rank: int = 0
    current_epoch: int = 0
    reload_dataloaders_every_n_epochs: int = 0
    lightning_module: SFTModule | None = None
    datamodule: SFTDataModule | None = None

    def attach(self, module: SFTModule, data: SFTDataModule | None) -> None:
        """Be the trainer of both."""
        self.lightning_module, self.datamodule = module, data
        module._trainer = cast(Trainer, self)
        if data is not None:
            data.trainer = cast(Trainer, self)


@dataclass(frozen=True, slots=True)
class Work:
    """What a run trains on, over all ranks.

    Args:
        steps: Optimizer steps; 0 where nothing sets an end: then the rest is of one epoch.
        epochs: Passes over the data that this makes.
        examples: Examples of the training data.
        tokens: Tokens, repeated ones counted again.
        targets: Those of them that are trained.
        pairs: Σ length² over the examples: what attention depends on.
    """

    steps: int
    epochs: float
    examples: int
    tokens: int
    targets: int
    pairs: float

    def flops(self, flops: Flops | None) -> float | None:
        """FLOPs of the run; None where those of a token aren't known."""
        return None if flops is None else flops.total(self.tokens, self.targets, self.pairs)


def work_of(data: SFTDataModule, trainer: PlannedTrainer) -> Work:
    """The work of a run, step by step as its plan has it."""
    prepared = data.prepared["train"]
    lengths = np.asarray(prepared.lengths, dtype=np.int64)
    targets = np.asarray([int((e.weights[1:] > 0).sum()) for e in prepared.examples], dtype=np.int64)
    steps, left, epoch = data.total_steps(), data.total_steps(), 0
    sums = np.zeros(3)
    while True:
        plan = data.plan(epoch)
        taken = min(plan.steps, left) if steps else plan.steps
        for rank in range(trainer.world_size):
            for number, micro in enumerate(plan.rank(rank)):
                if number >= taken * trainer.accumulate_grad_batches:
                    break
                if not micro.filler:
                    rows = np.asarray(micro.rows)
                    own = lengths[rows]
                    sums += (own.sum(), targets[rows].sum(), float((own.astype(np.float64) ** 2).sum()))
        left, epoch = left - taken, epoch + 1
        if left <= 0:
            break
    epochs = epoch - 1 + taken / plan.steps
    tokens, trained, pairs = sums.tolist()
    return Work(steps, epochs, len(lengths), int(tokens), int(trained), pairs)
