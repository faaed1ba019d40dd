"""The progress bar: Lightning's rich one, with the time left; plain lines where there is no terminal."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import RichProgressBar

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class Progress(RichProgressBar):
    """Shows loss, tokens per second and the time that the whole run still takes."""

    def __init__(self) -> None:
        super().__init__(leave=True)
        self._started = 0.0
        self._first_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        super().on_train_start(trainer, pl_module)
        self._started, self._first_step = time.monotonic(), trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance the bar, or print a line at each logged step where output is no terminal."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        plain = self._console is not None and not self._console.is_terminal
        accumulating = (batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch
        if plain and not accumulating and trainer.global_step % trainer.log_every_n_steps == 0:
            shown = {k: v for k, v in self.get_metrics(trainer, pl_module).items() if isinstance(v, int | float | str)}
            values = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())
            print(f"step {trainer.global_step}/{_total_steps(trainer) or '?'}  {values}", flush=True)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What stands beside the bar."""
        metrics: dict[str, Any] = dict(super().get_metrics(trainer, pl_module))
        metrics.pop("v_num", None)
        done, total = trainer.global_step - self._first_step, _total_steps(trainer)
        if trainer.training and done > 0 and total:
            seconds = (time.monotonic() - self._started) / done * (total - trainer.global_step)
            metrics["left"] = str(timedelta(seconds=round(max(0.0, seconds))))
        return metrics


def _total_steps(trainer: Trainer) -> int:
    total = getattr(getattr(trainer, "datamodule", None), "total_steps", None)
    return int(total()) if total is not None else 0
