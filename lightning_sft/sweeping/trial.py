"""One trial of a sweep, in a process of its own: a normal `fit` that tells the sweep its values.

    python -m lightning_sft.sweeping.trial METRIC DESCRIPTOR fit --config ...

Each value goes to the sweep as a line of JSON, through the pipe with this descriptor; the answer is one byte on
standard input. Where that ends, the sweep has ended, and so does the trial, with all its processes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger

from lightning_sft.__main__ import status_of
from lightning_sft.ranks import is_first_process

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

GO_ON, STOP = b"g", b"s"
"""The sweep's answers to a value."""


class Sweep:
    """The sweep that has started this process.

    Args:
        descriptor: Of the pipe to it.
    """

    def __init__(self, descriptor: int) -> None:
        self._to = os.fdopen(descriptor, "w", buffering=1)
        self._answers: SimpleQueue[bytes] = SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while answer := os.read(0, 1):
            self._answers.put(answer)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    def tell(self, **line: object) -> None:
        """Say something that needs no answer."""
        self._to.write(json.dumps(line) + "\n")

    def wants_to_stop(self, value: float, at: int) -> bool:
        """Tell a value; whether the trial is to stop."""
        self.tell(value=value, at=at)
        return self._answers.get() == STOP


class Reporter(Callback):
    """Tells the sweep each value of a metric as it is logged, and ends the run when the sweep says so.

    Values are told with the thousandths of epochs that are done, so that trials with batches of different sizes can
    be compared.

    Args:
        metric: Its name, as in `metrics.csv`.
        sweep: Whom to tell; None in all processes of the run but the first.
    """

    def __init__(self, metric: str, sweep: Sweep | None) -> None:
        self.metric = metric
        self.sweep = sweep
        self.names: set[str] = set()
        self.stops = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen to all that is logged, by Lightning or by a callback."""
        trainer.loggers = [*trainer.loggers, _Listener(partial(self.heard, trainer))]

    def heard(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        """Pass the value on, if it is among these."""
        self.names |= metrics.keys()
        if self.metric in metrics and self.sweep is not None:
            steps = -(-trainer.num_training_batches // trainer.accumulate_grad_batches)
            at = round(1000 * trainer.global_step / max(1, steps))
            self.stops |= self.sweep.wants_to_stop(float(metrics[self.metric]), at)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop after a validation."""
        if not trainer.sanity_checking:
            self._stop(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop after what another callback has measured."""
        self._stop(trainer)

    def _stop(self, trainer: Trainer) -> None:
        if trainer.strategy.reduce_boolean_decision(self.stops, all=False):
            trainer.should_stop = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tell what could have been asked for, and whether the run was cut short."""
        if self.sweep is not None:
            total = vars(trainer)["datamodule"].total_steps()
            cut = self.stops and not 0 < total <= trainer.global_step
            self.sweep.tell(names=sorted(self.names), cut=cut)


class _Listener(Logger):
    def __init__(self, hear: partial[None]) -> None:
        super().__init__()
        self._hear = hear

    @property
    def name(self) -> str:
        return "sweep"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Hyperparameters are the sweep's own."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._hear(metrics)


def main(argv: Sequence[str]) -> int:
    """Run the trial; the exit status is that of `fit`."""
    from lightning_sft import cli

    metric, descriptor, *fit = argv
    sweep = Sweep(int(descriptor)) if is_first_process() else None
    return status_of(lambda: cli.run(fit, [Reporter(metric, sweep)]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
