"""Going on from a checkpoint, bit for bit as if training had never stopped.

The order of the batches is a function of the plan, dropout one of the batch's number, and the rest is in the
checkpoint. So nothing but the place has to be found again; and a run that isn't the checkpoint's is refused.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import LightningModule
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from lightning_sft.errors import SFTError
from lightning_sft.training import fingerprint
from lightning_sft.training.seeding import seed_batch

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_sft.training.module import SFTModule

_RUN, _INITIAL = "lightning_sft", "lightning_sft_adapter"  # the keys of ours in a checkpoint


class Resumable(LightningModule):
    """What a module needs so that `fit` from its checkpoint is exact; its batches come from `SFTDataModule`."""

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False  # checkpoints hold only what is trained
        self.exact_resume = True
        """Whether `fit` from a checkpoint must be the run that made it. If not, it may differ in the steps to
        come (rate, schedule, length, loss), but not in what has been done (data, order, base, adapter)."""
        self.frozen: str | None = None
        """The digest of the frozen weights as they were loaded, whole; see `fingerprint.frozen_digest`."""
        self._resumed_run: dict[str, Any] | None = None
        self._facts: dict[str, fingerprint.Facts] = {}

    @property
    def seed(self) -> int:
        """The seed of dropout: the one given to `seed_everything`."""
        return int(os.environ.get("PL_GLOBAL_SEED", 0))

    def begin_batch(self) -> None:
        """Seed what a training batch draws. The data module calls this before any hook of the batch."""
        loop = self.trainer.fit_loop.epoch_loop
        seed_batch(
            self.seed,
            rank=self.trainer.global_rank,
            epoch=self.trainer.current_epoch,
            batch=loop.batch_idx + 1,
        )
        # What loggers call the step; after a checkpoint from behind a validation, Lightning's is one too high.
        loop._batches_that_stepped = self.trainer.global_step

    def on_train_start(self) -> None:
        """Take the place that the checkpoint says."""
        if self.trainer.ckpt_path is not None:
            _settle(self.trainer)
        if self._resumed_run is not None:
            if self._resumed_run["stopped"] and self.exact_resume:
                self.trainer.should_stop = True
            self._resumed_run = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only what is trained: the frozen base is where it came from. Add what makes the run this one."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        if initial := cast("SFTModule", self).adapter.initial_state():
            checkpoint[_INITIAL] = initial
        if self.trainer.state.fn == TrainerFn.FITTING:
            checkpoint[_RUN] = {**self._run_facts(), "stopped": bool(self.trainer.should_stop)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another run, or of other parameters; else let the data begin where it ends.

        Raises:
            SFTError: With what has changed, or with the first few names that are missing or too many.
        """
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self._check_run(checkpoint)
        trained = {name: tuple(p.shape) for name, p in self.named_parameters() if p.requires_grad}
        saved = {name: tuple(tensor.shape) for name, tensor in checkpoint["state_dict"].items()}
        if different := sorted({name for name, _ in trained.items() ^ saved.items()}):
            raise SFTError(
                f"the checkpoint holds other parameters than this run trains ({len(different)} differ in name "
                f"or shape, the first: {', '.join(different[:3])})",
                where="--ckpt_path",
                fix="use the model and adapter options of the run that wrote it (its config.yaml)",
            )
        if initial := checkpoint.get(_INITIAL):
            module = cast("SFTModule", self)
            module.adapter.load_initial_state(module.loaded, initial)

    def on_fit_start(self) -> None:
        """Forget the facts of an earlier run."""
        self._facts = {}

    def _run_facts(self) -> dict[str, fingerprint.Facts]:
        """What makes this run the one it is: found out once, for the plan is long."""
        if not self._facts:
            module = cast("SFTModule", self)
            self._facts = {
                "done": fingerprint.done_so_far(module, self.trainer),
                "to_come": fingerprint.to_come(module, self.trainer),
            }
        return self._facts

    def _check_run(self, checkpoint: dict[str, Any]) -> None:
        from lightning_sft.data.datamodule import SFTDataModule

        module, trainer = cast("SFTModule", self), self.trainer
        run = self._resumed_run = checkpoint.get(_RUN)
        if run is not None:
            done = fingerprint.differences(run["done"], fingerprint.done_so_far(module, trainer))
            to_come = fingerprint.differences(run["to_come"], fingerprint.to_come(module, trainer))
            fix = (
                "use the configuration and data of that run (its config.yaml), or start a new run; its weights alone "
                "go on as another run's model.base: `lightning-sft export RUN`, with --merge for adapters"
            )
            if self.exact_resume:
                fingerprint.refuse(done + to_come, fix=f"{fix}; docs/fine-tuning.md says what may change")
            fingerprint.refuse(done, fix=fix)
            for line in to_come:
                rank_zero_info(f"From the checkpoint on, {line}")
        epoch, batch = position(checkpoint)
        if batch % trainer.accumulate_grad_batches:
            raise SFTError(
                f"the checkpoint is from inside an optimizer step (batch {batch}, {trainer.accumulate_grad_batches} "
                "of them a step), whose gradients it doesn't hold",
                where="--ckpt_path",
                fix="use last.ckpt, or one that was made after a step",
            )
        if isinstance(data := getattr(trainer, "datamodule", None), SFTDataModule):
            data.start = (epoch, batch)


class EndingFitLoop(_FitLoop):
    """Lightning's, but a run that was killed after its last step still comes to its end.

    Lightning skips a run without steps left, and so the hooks in which callbacks measure, restore and export.
    """

    @property
    def skip(self) -> bool:
        """Whether to return at once; not where this run's own checkpoint is continued."""
        module = cast("SFTModule", self.trainer.lightning_module)
        continued = self.trainer.ckpt_path is not None and module.exact_resume
        return bool(super().skip) and not (continued and self.trainer.limit_train_batches != 0)


def end_also_when_killed(trainer: Trainer) -> None:
    """Let a run that goes on from its last step call its callbacks."""
    old = trainer.fit_loop
    trainer.fit_loop = EndingFitLoop(trainer, old.min_epochs, old.max_epochs)
    trainer.fit_loop.epoch_loop = old.epoch_loop


def position(checkpoint: dict[str, Any]) -> tuple[int, int]:
    """Where a checkpoint goes on: the epoch, and the micro-batch within it, both from 0."""
    loops = checkpoint["loops"]["fit_loop"]
    epochs, batches = loops["epoch_progress"]["current"], loops["epoch_loop.batch_progress"]
    if epochs["processed"] == epochs["started"]:
        return int(epochs["processed"]), 0
    if batches["is_last_batch"]:
        return int(epochs["processed"]) + 1, 0
    return int(epochs["processed"]), int(batches["current"]["processed"])


def has_ended(checkpoint: dict[str, Any]) -> bool:
    """Whether a checkpoint is of the end of its run: all its steps, or an early stop."""
    run = checkpoint.get(_RUN)
    if run is None:
        return True
    return bool(run["stopped"]) or 0 < run["to_come"]["steps of the run"] <= checkpoint["global_step"]


def _settle(trainer: Trainer) -> None:
    """Let Lightning begin the next epoch when the checkpoint is from between two epochs.

    With max_steps, Lightning takes itself to be inside the epoch that is over, and counts it twice. This comes after
    the loops were restored, and before they run.
    """
    loop = trainer.fit_loop
    state = loop.epoch_progress.state_dict()
    if state["current"]["processed"] != state["current"]["started"]:
        return
    for count in state.values():
        count.update(dict.fromkeys(count, count["processed"]))
    loop.epoch_progress.load_state_dict(state)
    for part in (loop, loop.epoch_loop, loop.epoch_loop.val_loop):
        part._restarting = False
        part.reset_restart_stage()
