"""Checkpoints to go on from: when they are made, and how they are written.

Lightning calls every hook of a batch before it has logged the batch and validated after it. So the checkpoint is made
when the next batch begins, or the next epoch, and holds the state between the two: nothing of the batch before is
missing, and nothing of the next has happened. It goes on where an optimizer step has ended, so that no accumulation
window is cut.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_sft.errors import SFTError
from lightning_sft.run_folder import CHECKPOINTS, LAST

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

_PARTIAL = ".partial"
_SHARE = 20  # a checkpoint is followed by at least 20 times as long without one


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there when it is whole and on disk.

    Whenever the process is killed, the file of that name is the one before or the new one. (Lightning's own
    goes through a file in the system's temporary folder, which is a copy where that is another disk, and holds
    the whole checkpoint in memory a second time.)
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write the checkpoint; paths that are no local files are left to Lightning."""
        if storage_options is not None or not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + _PARTIAL)
        with partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
        with suppress(OSError):  # not every system lets a folder be opened
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


class LastCheckpoint(Callback):
    """Keeps `checkpoints/last.ckpt`, from which `--ckpt_path last` goes on.

    It is made at intervals, after every epoch, at the end, and on SIGTERM; intervals grow where writing would
    take more than a twentieth of the time. A user's own `ModelCheckpoint` stands beside it.

    Args:
        every_minutes: Make one after so many minutes of training; 0 leaves these out.
        every_n_steps: Make one after every so many optimizer steps.
    """

    def __init__(self, every_minutes: float = 10.0, every_n_steps: int | None = None) -> None:
        if not 0 <= every_minutes < float("inf"):
            raise SFTError(
                f"every_minutes is {every_minutes}",
                where="checkpoints.every_minutes",
                fix="give a number of 0 or more",
            )
        if every_n_steps is not None and every_n_steps < 1:
            raise SFTError(
                f"every_n_steps is {every_n_steps}",
                where="checkpoints.every_n_steps",
                fix="give at least 1, or leave it out",
            )
        self.every_minutes = every_minutes
        self.every_n_steps = every_n_steps
        self._saved_step = 0  # no need of one before the first step
        self._saved_at = time.monotonic()
        self._took = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock, and remove what a killed run left half-written."""
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()
        if trainer.is_global_zero:
            for partial in (Path(trainer.default_root_dir) / CHECKPOINTS).glob(f"*{_PARTIAL}"):
                partial.unlink()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make one of the state after the epoch before."""
        self._save(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Make one if it is time, of the state before this batch."""
        if batch_idx and batch_idx % trainer.accumulate_grad_batches == 0 and self._is_time(trainer):
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make one of the end, before the model is exported."""
        self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Make one when the system asks the run to end (SIGTERM), which Lightning heeds between two batches.

        Only in a run of one process: the others may not have been asked.
        """
        if isinstance(exception, SIGTERMException) and trainer.world_size == 1:
            self._save(trainer)

    def _is_time(self, trainer: Trainer) -> bool:
        if self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0:
            return True
        if not self.every_minutes:
            return False
        pause = max(60 * self.every_minutes, _SHARE * self._took)
        due = time.monotonic() - self._saved_at >= pause
        return bool(trainer.strategy.broadcast(due)) if trainer.world_size > 1 else due

    def _save(self, trainer: Trainer) -> None:
        if trainer.global_step == self._saved_step:
            return
        begun = time.monotonic()
        for logger in trainer.loggers:
            logger.save()
        with _between(trainer):
            trainer.save_checkpoint(Path(trainer.default_root_dir) / CHECKPOINTS / LAST, weights_only=False)
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()
        self._took = self._saved_at - begun


@contextmanager
def _between(trainer: Trainer) -> Iterator[None]:
    """Within this context Lightning's counters say that the next batch or epoch hasn't begun.

    Micro-batches of a window that is not whole count as not done: their gradients are in no checkpoint. And a
    run that was stopped inside an epoch (max_steps, max_time) counts it as done; here it isn't.
    """
    loop = trainer.fit_loop
    epochs, batches = loop.epoch_progress, loop.epoch_loop.batch_progress
    before = epochs.state_dict(), batches.state_dict()
    now_epochs, now_batches = epochs.state_dict(), batches.state_dict()
    done = batches.current.completed
    inside = 0 < done < trainer.num_training_batches
    begun = done % trainer.accumulate_grad_batches if inside else 0
    for count in (now_batches["current"], now_batches["total"]):
        count.update(dict.fromkeys(count, count["completed"] - begun))
    now_batches["is_last_batch"] = now_batches["is_last_batch"] and not inside
    for count in (now_epochs["current"], now_epochs["total"]):
        if count["ready"] > count["started"]:  # on_train_epoch_start
            count["ready"] = count["started"]
        elif inside and count["processed"] == count["ready"]:  # on_train_end
            count["processed"] = count["completed"] = count["ready"] - 1
    epochs.load_state_dict(now_epochs)
    batches.load_state_dict(now_batches)
    try:
        yield
    finally:
        epochs.load_state_dict(before[0])
        batches.load_state_dict(before[1])
