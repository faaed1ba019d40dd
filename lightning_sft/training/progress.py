"""What a run shows: what it starts from, the progress bar, and plain lines where there is no terminal."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

from lightning_sft.data.ledger_table import ledger_lines, ledger_table

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_sft.data.datamodule import SFTDataModule
    from lightning_sft.data.plan import BatchPlan
    from lightning_sft.training.module import SFTModule

_SHORT = {"train/loss": "loss", "train/tokens_per_second": "tok/s"}
_SECONDS_BETWEEN_DRAWINGS = 0.1
_BAR = 14  # characters


class Progress(RichProgressBar):
    """Shows loss, tokens per second and the time that the whole run still takes."""

    def __init__(self) -> None:
        super().__init__(leave=True)
        self._plain = not Console().is_terminal
        if self._plain:
            self.disable()
        self._started = 0.0
        self._first_step = 0
        self._total_steps = 0
        self._shown: dict[str, str] = {}
        self._drawn = 0.0

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """Epoch, bar, batches, time; the numbers come behind them."""
        return [TextColumn("{task.description}"), BarColumn(_BAR), MofNCompleteColumn(), TimeElapsedColumn()]

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Show what the run starts from, and start the clock."""
        if trainer.is_global_zero and hasattr(trainer.datamodule, "ledger"):  # type: ignore[attr-defined]
            print(summary(trainer, pl_module), flush=True)
        super().on_train_start(trainer, pl_module)
        self._started, self._first_step = time.monotonic(), trainer.global_step
        self._total_steps = _total_steps(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance the bar, or print a line at each logged step where output is no terminal."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        accumulating = (batch_idx + 1) % trainer.accumulate_grad_batches and not trainer.is_last_batch
        if self._plain and _was_logged(trainer) and not accumulating and trainer.is_global_zero:
            values = "  ".join(
                f"{name} {value}" for name, value in self.get_metrics(trainer, pl_module).items()
            )
            print(f"step {trainer.global_step}/{self._total_steps or '?'}  {values}", flush=True)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What stands beside the bar; between logged steps there is nothing new, and a device isn't asked.

        What has no room on the terminal's line is only in the logs.
        """
        if trainer.training and self._shown and not _was_logged(trainer):
            return self._shown
        metrics: dict[str, str] = {}
        done, total = trainer.global_step - self._first_step, self._total_steps
        if trainer.training and done > 0 and total:
            seconds = (time.monotonic() - self._started) / done * (total - trainer.global_step)
            metrics["left"] = str(timedelta(seconds=round(max(0.0, seconds))))
        values = super().get_metrics(trainer, pl_module)
        values |= {
            name: float(trainer.callback_metrics[name]) for name in _SHORT if name in trainer.callback_metrics
        }
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            values |= getattr(callback, "in_progress_bar", {})
        for name, value in values.items():
            if name != "v_num":
                metrics[_SHORT.get(name, name)] = (
                    f"{value:,.0f}" if name.endswith("second") else f"{value:.3f}"
                )
        if not self._plain:
            taken = f"Epoch 10/10  {'-' * _BAR} {trainer.num_training_batches}/{trainer.num_training_batches} 0:00:00 "
            metrics = _that_fit(metrics, Console().width - len(taken))
        self._shown = metrics
        return metrics

    def refresh(self, hard: bool = False) -> None:
        """Draw, but not so often that it slows down the training of a small model."""
        if hard or time.monotonic() - self._drawn >= _SECONDS_BETWEEN_DRAWINGS:
            super().refresh(hard)
            self._drawn = time.monotonic()


def _that_fit(metrics: dict[str, str], width: int) -> dict[str, str]:
    """The first of them, as many as `name: value name: value` has room for in so many characters."""
    fitting = {}
    for name, value in metrics.items():
        width -= len(f"{name}: {value} ")
        if width < -1:  # the last needs no space behind it
            break
        fitting[name] = value
    return fitting


def _was_logged(trainer: Trainer) -> bool:
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and trainer.global_step % every == 0


def summary(trainer: Trainer, module: SFTModule) -> str:
    """Model, data and batches of a run, in a few lines: what became of every row, how many steps follow."""
    data: SFTDataModule = trainer.datamodule  # type: ignore[attr-defined]
    parameters = [(p.numel(), p.requires_grad) for p in module.parameters()]
    size, trained = sum(n for n, _ in parameters), sum(n for n, trains in parameters if trains)
    rows = "flattened rows, no padding" if module.layout.padded_because is None else "padded rows"
    plan = data.plan(0)
    lines = [
        f"model    {module.base}: {size:,} parameters, {trained:,} trained ({trained / size:.1%}), "
        f"{type(module.adapter).__name__}",
    ]
    for part, prepared in data.prepared.items():
        tokens = int(prepared.lengths.sum())
        lines.append(
            f"{part:8} {len(prepared.examples):,} examples, {tokens:,} tokens, "
            f"{prepared.trained_tokens:,} of them trained{', from the cache' if prepared.from_cache else ''}"
        )
    accounts = {part: prepared.ledgers for part, prepared in data.prepared.items()}
    lines.append(ledger_table(accounts, Console().width))
    for part, ledgers in accounts.items():
        for index, ledger in enumerate(ledgers):
            lines.append(f"{part:8} {ledger.source}: {ledger.rows:,} rows as {ledger.format}")
            if ledger.weight != 1 and part == "train":
                seen = data.examples_per_epoch[index]
                lines.append(f"         weight {ledger.weight:g}: {seen:,} of its examples in each epoch")
            lines += [f"         {line}" for line in ledger_lines(ledger)]
    lines.append(f"batches  {_batches(data, plan, trainer)}, {rows}; {_steps(data, plan)}")
    return "\n".join(lines)


def _batches(data: SFTDataModule, plan: BatchPlan, trainer: Trainer) -> str:
    if data.batch_tokens is not None:
        unit = f"up to {data.batch_tokens:,} tokens ({plan.fill:.1%} filled)"
    elif data.packing:
        unit = f"{data.batch_size} packs of {data.pack_length:,} tokens ({plan.fill:.1%} filled)"
    else:
        unit = f"{data.batch_size} examples"
    ranks = "1 rank" if trainer.world_size == 1 else f"{trainer.world_size} ranks"
    return f"{unit} × {trainer.accumulate_grad_batches} accumulated × {ranks}"


def _steps(data: SFTDataModule, plan: BatchPlan) -> str:
    each = "in the first epoch" if data.steps_vary else "an epoch"
    total = data.total_steps()
    return f"{plan.steps:,} steps {each}" + (f", {total:,} in all" if total else "")


def _total_steps(trainer: Trainer) -> int:
    total = getattr(getattr(trainer, "datamodule", None), "total_steps", None)
    return int(total()) if total is not None else 0
