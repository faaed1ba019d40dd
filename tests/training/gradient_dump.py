"""A callback that writes down what every optimizer step saw; a run names it by its full class path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor


class GradientDump(Callback):
    """Saves one file per rank and optimizer step, with primitives and tensors only.

    Args:
        folder: Where to.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.rows: list[int] = []
        self.fillers = 0
        self.step: dict[str, Any] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch.weights.any():
            self.rows += [meta.row for meta in batch.metas]
        else:
            self.fillers += 1

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.step = {
            "number": trainer.global_step,
            "rows": self.rows,
            "fillers": self.fillers,
            "gradients": _gradients(pl_module),
            "parameters": {n: p.detach().clone() for n, p in pl_module.named_parameters() if p.requires_grad},
        }
        self.rows, self.fillers = [], 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.step:
            self.step["loss"] = float(trainer.callback_metrics["train/loss"])
            self.step["stepped_with"] = _gradients(pl_module)
            self.folder.mkdir(exist_ok=True)
            torch.save(self.step, self.folder / f"{self.step['number']:03d}-rank{trainer.global_rank}.pt")
            self.step = {}


def _gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def load_steps(folder: Path) -> list[list[dict[str, Any]]]:
    """What was saved: for every optimizer step, what each rank saw."""
    files = sorted(folder.glob("*.pt"))
    numbers = sorted({file.name.partition("-")[0] for file in files})
    return [
        [torch.load(file, weights_only=True) for file in files if file.name.startswith(f"{number}-")]
        for number in numbers
    ]
