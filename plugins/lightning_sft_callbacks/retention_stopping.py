"""Stopping before too much is forgotten, and ending with the best trade between gain and retention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import Callback

from lightning_sft import SFTError
from lightning_sft_callbacks.before_after import BeforeAfter
from lightning_sft_callbacks.forgetting import ForgettingProbe
from lightning_sft_callbacks.probing import Probe
from lightning_sft_callbacks.retention import dominates

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_sft import SFTModule


class RetentionStopping(Callback):
    """Stops when the model forgets too much or no longer gets better, and restores the best of what it was.

    After each measurement of `ForgettingProbe` it keeps the weights in `pareto/` if no other measurement had both more
    gain and more retention. At the end the model is the one of these with the highest J = g − strictness · (1 − R) of
    those with R ≥ `min_retention`; the base itself, at step 0, is one of them.

    Args:
        min_retention: Least retention R that is accepted.
        patience: Measurements in a row below `min_retention`, or without a better J, until training stops.
        restore: End with the best weights, not the last ones.
        probe: The `name` of the `ForgettingProbe` that it goes by, where there are several.
    """

    def __init__(
        self, min_retention: float = 0.9, patience: int = 2, restore: bool = True, probe: str | None = None
    ) -> None:
        if not 0 <= min_retention <= 1 or patience < 1:
            raise SFTError(
                f"min_retention is {min_retention}, patience {patience}",
                where="RetentionStopping",
                fix="give a retention from 0 to 1, and a patience of 1 or more",
            )
        self.min_retention = min_retention
        self.patience = patience
        self.restore = restore
        self.probe = probe
        self.archive: list[dict[str, Any]] = []
        """Of each kept measurement: step, gain, retention, objective, file; none dominates another."""
        self._beaten: list[
            tuple[Path, int]
        ] = []  # files, and when the checkpoint that may name them was made
        self.seen = -1
        self.too_low = 0
        self.no_better = 0
        self.best_objective: float | None = None
        self.reason: str | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the probe, and go before all that measures, so that what they measure at the end is what is restored.

        Raises:
            SFTError: There is no probe to go by.
        """
        if stage != "fit":
            return
        self._probe(trainer)
        others: list[Callback] = [each for each in vars(trainer)["callbacks"] if each is not self]
        place = vars(trainer)["callbacks"].index(self)
        measuring = [number for number, each in enumerate(others) if isinstance(each, Probe | BeforeAfter)]
        others.insert(min(place, *measuring), self)
        vars(trainer)["callbacks"] = others  # a new list, as Lightning goes through the old one

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at step 0, or at what the checkpoint's step was still owed."""
        module = cast("SFTModule", pl_module)
        if "val" not in module.data.prepared or self._probe(trainer).task_examples == 0:
            raise SFTError(
                "the gain can't be measured without validation data",
                where="RetentionStopping",
                fix="give data.val or data.val_split, and ForgettingProbe.task_examples above 0",
            )
        if trainer.global_step == 0 or self._probe(trainer).is_due(trainer.global_step):
            self._look(trainer, module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Look at a measurement when there is a new one."""
        if self._probe(trainer).is_due(trainer.global_step):
            self._look(trainer, cast("SFTModule", pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the last measurement, and put the best weights in place."""
        module = cast("SFTModule", pl_module)
        self._look(trainer, module, may_stop=False)
        self._clean(trainer)
        best = self.best()
        if not self.restore or best is None or best["step"] == trainer.global_step:
            return
        saved = torch.load(self._existing(trainer, best), map_location="cpu", weights_only=True)
        module.restore(saved["state_dict"], best["step"])
        _validate(trainer)
        if trainer.is_global_zero:
            print(
                f"The model is that of step {best['step']}: retention {best['retention']:.3f}, gain {best['gain']:.3f}"
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep only the files of the archive: others are beaten, or of steps after which the run was killed."""
        kept = {Path(each["file"]).name for each in self.archive}
        if trainer.is_global_zero:
            for path in _folder(trainer).glob("step-*.ckpt*"):
                if path.name not in kept:
                    path.unlink()

    def best(self) -> dict[str, Any] | None:
        """The archive's highest J with enough retention; where none has enough, the highest retention."""
        enough = [each for each in self.archive if each["retention"] >= self.min_retention]
        if enough:
            return max(enough, key=lambda each: each["objective"])
        return max(self.archive, key=lambda each: each["retention"], default=None)

    def _probe(self, trainer: Trainer) -> ForgettingProbe:
        callbacks: list[Callback] = vars(trainer)["callbacks"]
        probes = [each for each in callbacks if isinstance(each, ForgettingProbe)]
        named = [each for each in probes if self.probe is None or each.name == self.probe]
        if len(named) == 1:
            return named[0]
        if not probes:
            what, fix = "there is no ForgettingProbe", "add ForgettingProbe to trainer.callbacks"
        elif not named:
            what, fix = f"no ForgettingProbe has the name {self.probe!r}", "correct RetentionStopping.probe"
        else:
            what, fix = "there are several ForgettingProbes", "name the one in RetentionStopping.probe"
        raise SFTError(
            f"{what}, whose measurements it goes by", where="trainer.callbacks: RetentionStopping", fix=fix
        )

    def _look(self, trainer: Trainer, module: SFTModule, *, may_stop: bool = True) -> None:
        record = self._probe(trainer).latest(trainer, module)
        if record["step"] <= self.seen:
            return
        self.seen = record["step"]
        point = {"gain": 0.0, "objective": -(1 - record["retention"]), **record}
        self._archive(trainer, point)
        self.too_low = self.too_low + 1 if point["retention"] < self.min_retention else 0
        if self.best_objective is None or point["objective"] > self.best_objective:
            self.best_objective, self.no_better = point["objective"], 0
        else:
            self.no_better += 1
        if not may_stop:
            return
        if self.too_low >= self.patience:
            self._stop(trainer, f"retention {point['retention']:.3f} is below {self.min_retention:g}")
        elif self.no_better >= self.patience:
            self._stop(trainer, f"the objective is not above {self.best_objective:.3f} any more")

    def _archive(self, trainer: Trainer, point: dict[str, Any]) -> None:
        place = point["gain"], point["retention"]
        if not all(map(math.isfinite, place)):
            return
        others = [(each, (each["gain"], each["retention"])) for each in self.archive]
        if any(dominates(other, place) or other == place for _, other in others):
            return
        self._clean(trainer)
        path = _folder(trainer) / f"step-{point['step']}.ckpt"
        trainer.save_checkpoint(path, weights_only=True)
        for each, other in others:
            if dominates(place, other):
                self.archive.remove(each)
                if Path(each["file"]).parent == path.parent:  # not those of a run that this one began from
                    self._beaten.append((Path(each["file"]), _last_checkpoint(trainer)))
        kept = {key: point[key] for key in ("step", "gain", "retention", "objective")}
        self.archive.append({**kept, "file": str(path)})

    def _clean(self, trainer: Trainer) -> None:
        """Remove the files of beaten measurements; those that the last checkpoint names only when there is a newer one.

        Else a run that is killed, and goes on otherwise than before, would have none of these weights.
        """
        now = _last_checkpoint(trainer)
        for path, made in list(self._beaten):
            if made != now:
                self._beaten.remove((path, made))
                if trainer.is_global_zero:
                    path.unlink(missing_ok=True)

    def _existing(self, trainer: Trainer, kept: Mapping[str, Any]) -> Path:
        """The file of a kept measurement, also where the run folder was moved."""
        named = Path(kept["file"])
        for path in (named, _folder(trainer) / named.name):
            if path.is_file():
                return path
        raise SFTError(
            f"the best weights, those of step {kept['step']}, are gone",
            where=str(named),
            fix="bring the file back and go on with --ckpt_path last, or `lightning-sft export` the last step's",
        )

    def _stop(self, trainer: Trainer, reason: str) -> None:
        trainer.should_stop = True
        self.reason = reason
        if trainer.is_global_zero:
            print(f"step {trainer.global_step}: training stops, {reason}", flush=True)

    def state_dict(self) -> dict[str, Any]:
        """The archive and the counts: JSON types only."""
        names = ("archive", "seen", "too_low", "no_better", "best_objective", "reason")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        for name, value in state_dict.items():
            setattr(self, name, value)


def _validate(trainer: Trainer) -> None:
    """Log the validation's figures of the weights as they are now; no other callback takes part.

    Else the last ones would be those of the last step, and a checkpoint could be made of it with these weights.
    """
    if not trainer.enable_validation:
        return
    callbacks, vars(trainer)["callbacks"] = vars(trainer)["callbacks"], []
    trainer.validating = True
    try:
        trainer.fit_loop.epoch_loop.val_loop.run()
    finally:
        trainer.training = True
        vars(trainer)["callbacks"] = callbacks


def _folder(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir).absolute() / "pareto"


def _last_checkpoint(trainer: Trainer) -> int:
    """When the checkpoint that a killed run goes on from was made; 0 if there is none."""
    path = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
    return path.stat().st_mtime_ns if path.exists() else 0
