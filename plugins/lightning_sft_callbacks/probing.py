"""What all probes share: when they measure, what survives a kill, and where their figures go."""

from __future__ import annotations

import json
import re
import time
from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import Callback
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_sft import Scorer, SFTError

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_sft import SFTModule


class Probe(Callback):
    """Measures the model at step 0, every so many optimizer steps, and at the end, without changing the run.

    A subclass says what: `measure` gives a record in JSON types. All records are in `history`, in checkpoints, and in
    the run folder as `<file>.json`. Every rank measures the same, so that all of them know.

    Args:
        every_n_steps: Optimizer steps between two measurements; 0 measures only at the start and the end.
        name: Tells several probes of one class apart, in their figures and files.
    """

    file = "probe"
    prefix = "probe"

    def __init__(self, every_n_steps: int, name: str | None = None) -> None:
        if every_n_steps < 0:
            raise SFTError(
                f"every_n_steps is {every_n_steps}",
                where=type(self).__name__,
                fix="give 0 (only at the start and the end) or more",
            )
        if name is not None and not re.fullmatch(r"[\w.-]+", name):
            raise SFTError(
                f"name is {name!r}",
                where=type(self).__name__,
                fix="give letters, digits, '-', '_' and '.' only",
            )
        self.every_n_steps = every_n_steps
        self.name = name
        if name is not None:
            self.file, self.prefix = f"{self.file}-{name}", f"{self.prefix}-{name}"
        self.history: list[dict[str, Any]] = []
        self.seconds = 0.0
        """Time spent on measuring, of this process."""
        self.in_progress_bar: dict[str, float] = {}
        """What the progress bar shows of the last record."""
        self.elapsed = 0.0
        """Time of the training up to the last measurement, of this process and those that were killed before."""
        self._counted_at: float | None = None
        self._scorer: Scorer | None = None

    @property
    def state_key(self) -> str:
        """What its state is called in checkpoints."""
        return type(self).__qualname__ + (f"-{self.name}" if self.name is not None else "")

    @abstractmethod
    def measure(self, trainer: Trainer, module: SFTModule) -> dict[str, Any]:
        """A record of the model as it is now, in JSON types."""

    def numbers(self, record: dict[str, Any]) -> dict[str, float]:
        """What of the record is logged, by name; the prefix is added."""
        return {
            name: value for name, value in record.items() if isinstance(value, int | float) and name != "step"
        }

    def told(self, record: dict[str, Any]) -> str | None:
        """A line for the terminal about the record; None says nothing."""
        return None

    def scorer(self, module: SFTModule) -> Scorer:
        """Asks the module's model; the same one each time, as a new one first tries what the model can do."""
        if self._scorer is None or self._scorer.model is not module.loaded:
            self._scorer = Scorer.of(module)
        return self._scorer

    @property
    def share_of_time(self) -> float:
        """The part of the training's time that measuring has taken, up to the last measurement."""
        return self.seconds / self.elapsed if self.elapsed else 0.0

    # ------------------------------------------------------------------------------------------- when

    def is_due(self, step: int) -> bool:
        """Whether a measurement belongs to this step."""
        return step == 0 or (bool(self.every_n_steps) and step % self.every_n_steps == 0)

    def latest(self, trainer: Trainer, module: SFTModule) -> dict[str, Any]:
        """The record of the model as it is now, measured if it wasn't yet.

        Where the run ends with the weights of an earlier step, the record of that step becomes the last one.
        """
        step = trainer.global_step if module.restored is None else module.restored
        if self.history and self.history[-1]["step"] == step:
            return self.history[-1]
        known = [record for record in self.history if record["step"] == step]
        if known:
            self.history.append(known[-1])
        else:
            began = time.monotonic()
            module.throughput.pause()
            with isolate_rng():  # whatever is measured may draw numbers
                self.history.append({"step": step, **self.measure(trainer, module)})
            module.throughput.resume()
            self.seconds += time.monotonic() - began
            self.count_time()
        self._write(trainer, module)
        return self.history[-1]

    def begin(self, trainer: Trainer, module: SFTModule) -> None:
        """Measure the base; after a kill, what was due at the checkpoint's step and wasn't saved with it."""
        if trainer.global_step and not self.history:
            raise SFTError(
                f"the checkpoint holds nothing of {type(self).__name__}: what the base was is not known",
                where="trainer.callbacks",
                fix=f"take {type(self).__name__} out, or start a new run",
            )
        if self.is_due(trainer.global_step):
            self.latest(trainer, module)

    def count_time(self) -> None:
        """Add the time since the last call to what has passed; the first call starts the clock."""
        now = time.monotonic()
        self.elapsed += now - self._counted_at if self._counted_at is not None else 0.0
        self._counted_at = now

    def finish(self, trainer: Trainer, module: SFTModule) -> None:
        """Measure what came out."""
        self.latest(trainer, module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin."""
        self.count_time()
        self.begin(trainer, cast("SFTModule", pl_module))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Measure after a step that is due."""
        if trainer.global_step and self.is_due(trainer.global_step):
            self.latest(trainer, cast("SFTModule", pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish."""
        self.finish(trainer, cast("SFTModule", pl_module))

    # ------------------------------------------------------------------------------------------ where

    def _write(self, trainer: Trainer, module: SFTModule) -> None:
        record = self.history[-1]
        numbers = {f"{self.prefix}/{name}": float(value) for name, value in self.numbers(record).items()}
        for logger in trainer.loggers:
            # The step that a logger counts is that of the last batch, from 0; restored weights come after it.
            place = trainer.global_step - (1 if module.restored is None else 0)
            logger.log_metrics(numbers, step=max(0, place))
        if not trainer.is_global_zero:
            return
        if line := self.told(record):
            print(line if self.name is None else f"{self.name}: {line}", flush=True)
        path = Path(trainer.default_root_dir) / f"{self.file}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        report = json.loads(json.dumps(self.report()), parse_constant=lambda name: None)  # JSON has no NaN
        partial.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        partial.replace(path)

    def report(self) -> dict[str, Any]:
        """What the JSON file holds."""
        return {"history": self.history}

    def state_dict(self) -> dict[str, Any]:
        """What survives a kill: JSON types only."""
        return {"history": self.history, "seconds": self.seconds, "elapsed": self.elapsed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.history = list(state_dict["history"])
        self.seconds = state_dict["seconds"]
        self.elapsed = state_dict["elapsed"]
