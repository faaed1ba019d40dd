"""Small runs that are stopped and continued: their files, the callback that stops them, and what they leave."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file

from lightning_sft import cli
from lightning_sft.training import checkpoints
from lightning_sft.training.metrics_file import read_rows

STOP = "LIGHTNING_SFT_TEST_STOP"  # <hook>:<how many calls of it>
KILL = "LIGHTNING_SFT_TEST_KILL"  # <place>:<step>
SLOW = "LIGHTNING_SFT_TEST_SLOW_WRITING"  # which checkpoint takes for ever


def fit(config: Path, *arguments: object, stop: str | None = None) -> None:
    """Run `fit` here; the environment that a run sets is undone."""
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "LIGHTNING_SFT_RUN_FOLDER", STOP):
            patch.setenv(variable, "0")
        patch.delenv("LIGHTNING_SFT_RUN_FOLDER")
        patch.setenv(STOP, stop or "")
        cli.run(["fit", "--config", str(config), *map(str, arguments)])


class Stopped(RuntimeError):
    """Ends a run as a crash would."""


class Stop(Callback):
    """Is in every run's configuration; raises at the call that the environment names."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}
        if SLOW in os.environ:
            checkpoints.torch = _SlowTorch(int(os.environ[SLOW]))

    def _call(self, hook: str) -> None:
        self.calls[hook] = self.calls.get(hook, 0) + 1
        if os.environ.get(STOP) == f"{hook}:{self.calls[hook]}":
            raise Stopped(hook)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self._call("batch_start")
        if os.environ.get(STOP) == f"step:{trainer.global_step}":
            raise Stopped

    def on_before_optimizer_step(self, *args):
        self._call("optimizer_step")

    def on_train_batch_end(self, *args):
        self._call("batch_end")

    def on_validation_end(self, trainer, *args):
        if not trainer.sanity_checking:
            self._call("validation_end")

    def on_train_epoch_end(self, *args):
        self._call("epoch_end")

    def on_train_epoch_start(self, *args):
        self._call("epoch_start")

    def on_train_end(self, *args):
        self._call("train_end")


class _SlowTorch:
    """Stands in for torch where checkpoints are written: the n-th is written half, and then never on."""

    def __init__(self, which: int) -> None:
        self.left = which

    def save(self, checkpoint: object, file: BinaryIO) -> None:
        self.left -= 1
        if self.left:
            torch.save(checkpoint, file)
            return
        whole = io.BytesIO()
        torch.save(checkpoint, whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        Path("half-written").touch()
        time.sleep(1e6)


class Kill(Callback):
    """Is killed (SIGKILL) at the place and step that the environment names; stands behind the probes."""

    def __init__(self) -> None:
        self.place, _, step = os.environ.get(KILL, "").partition(":")
        self.step = int(step or -1)

    def setup(self, trainer, module, stage):
        from lightning_sft_callbacks import domains

        measure, save, restore = domains.measure, torch.save, module.restore

        def measuring(*args, **kwargs):
            found = measure(*args, **kwargs)  # one of two domains
            self._die("measuring", trainer)
            return found

        def archiving(checkpoint, file):
            if "pareto" in str(file.name) and self._is_here("archiving", trainer):
                file.write(b"half of it")
                file.flush()
                self._die("archiving", trainer)
            save(checkpoint, file)

        def restoring(weights, step):
            if self._is_here("restoring", trainer):
                restore(dict(list(weights.items())[: len(weights) // 2]), step)
                self._die("restoring", trainer)
            restore(weights, step)

        domains.measure, checkpoints.torch = measuring, SimpleNamespace(save=archiving)
        module.restore = restoring

    def on_train_batch_end(self, trainer, *args):
        self._die("measured", trainer)

    def _is_here(self, place, trainer):
        return self.place == place and trainer.global_step == self.step

    def _die(self, place, trainer):
        if self._is_here(place, trainer):
            os.kill(os.getpid(), signal.SIGKILL)


class Noise(Callback):
    """Draws from every generator where a plug-in might, so that a run shows whether draws are repeated."""

    def on_train_batch_start(self, trainer, module, *args):
        values = [torch.rand(()).item(), random.random()]
        module.log_dict({"noise/torch": values[0], "noise/python": values[1]}, batch_size=1)


def write_config(folder: Path, base: Path, *, rows: int = 22, **sections: Any) -> Path:
    """`my.yaml` and `rows.jsonl`: LoRA with dropout, 2 × 2 rows a step, two epochs, a checkpoint at every step."""
    numbers = random.Random(0)
    texts = [" ".join(["hello", "there", "how", "are"] * numbers.randint(1, 4)) for _ in range(rows)]
    data = [{"instruction": f"say {n}", "output": text} for n, text in enumerate(texts)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    adapter = {"class_path": "LoRA", "init_args": {"r": 4, "dropout": 0.3}}
    config: dict[str, Any] = {
        "model": {"base": str(base), "adapter": adapter, "learning_rate": 0.01},
        "data": {"train": str(folder / "rows.jsonl"), "val_split": 2, "batch_size": 2},
        "checkpoints": {"every_n_steps": 1},
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 2,
            "accumulate_grad_batches": 2,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "callbacks": [{"class_path": "resume_run.Stop"}, {"class_path": "resume_run.Noise"}],
        },
    }
    for section, options in sections.items():
        config[section] |= options
    path = folder / "my.yaml"
    path.write_text(json.dumps(config))
    return path


def metrics(run: Path) -> list[dict[str, str]]:
    """The rows of `metrics.csv`, as text, without the speed."""
    rows = read_rows(run / "metrics.csv")
    return [{key: value for key, value in row.items() if not key.endswith("per_second")} for row in rows]


def losses(run: Path) -> dict[int, str]:
    """The training loss by step, as it stands in the file."""
    found: dict[int, str] = {}
    for row in metrics(run):
        if row["train/loss"]:
            assert int(row["step"]) not in found, "a step is there twice"
            found[int(row["step"])] = row["train/loss"]
    return found


def weights(run: Path) -> dict[str, torch.Tensor]:
    """What the run exported."""
    return {
        name: t
        for file in sorted((run / "model").glob("*.safetensors"))
        for name, t in load_file(file).items()
    }


def same_weights(a: Path, b: Path) -> bool:
    """Whether two runs exported the same bits."""
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
