"""The run folder: one per run, with everything that says what the run was and what came of it.

```
runs/<config name>-<n>/
  config.yaml     the whole configuration, as `--config` takes it
  ledger.json     what became of every row and token
  metrics.csv     what was logged
  checkpoints/    last.ckpt and the best; only what is trained
  model/          at the end: the adapter or model, with tokenizer, chat template and generation config
```
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_only

from lightning_sft.errors import SFTError
from lightning_sft.training.models import ADAPTER_CONFIG, MODEL_CONFIG

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

CONFIG, LEDGER, METRICS = "config.yaml", "ledger.json", "metrics.csv"
CHECKPOINTS, MODEL = "checkpoints", "model"

_SHARED = "LIGHTNING_SFT_RUN_FOLDER"  # how the first process tells those that Lightning starts for DDP


def claim(requested: str | None, name: str, *, resuming: bool) -> Path:
    """The folder of this run: the requested one, or the next free `runs/<name>-<n>`, created here.

    Args:
        requested: `trainer.default_root_dir`.
        name: The config's name.
        resuming: A checkpoint is given, so the folder may hold the run that it continues.

    Raises:
        SFTError: The requested folder already holds a run, and this one doesn't continue it.
    """
    if int(os.environ.get("LOCAL_RANK", 0)) > 0:
        return Path(os.environ.get(_SHARED) or requested or Path("runs") / name)
    if requested is not None:
        folder = Path(requested)
        if (folder / CONFIG).exists() and not resuming:
            raise SFTError(
                f"the folder already holds a run ({CONFIG})",
                where=f"trainer.default_root_dir: {requested}",
                fix="choose another folder, leave it out, or continue that run with --ckpt_path",
            )
        folder.mkdir(parents=True, exist_ok=True)
    else:
        folder = _next_free(name)
    os.environ[_SHARED] = str(folder)
    return folder


def release(folder: Path) -> None:
    """Remove the folder again if the run wrote nothing into it."""
    with suppress(OSError):
        folder.rmdir()


def _next_free(name: str) -> Path:
    runs = Path("runs")
    runs.mkdir(exist_ok=True)
    number = 1
    while True:
        try:
            (runs / f"{name}-{number}").mkdir()
        except FileExistsError:
            number += 1
        else:
            return runs / f"{name}-{number}"


def model_folder(source: str) -> Path:
    """Where the model is: in a run folder its `model/`, else the folder itself.

    Raises:
        SFTError: `source` is no folder, or neither a finished run nor a model.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise SFTError("no such folder", where=source, fix="give a run folder (runs/...) or a model folder")
    if (folder / CONFIG).is_file():
        if (folder / MODEL).is_dir():
            return folder / MODEL
        raise SFTError(
            "the run has no model yet: it isn't finished, or was stopped",
            where=source,
            fix=f"make one of its last checkpoint: lightning-sft export {source}",
        )
    if not any((folder / name).is_file() for name in (ADAPTER_CONFIG, MODEL_CONFIG)):
        raise SFTError(
            f"neither a run ({CONFIG}) nor a model ({MODEL_CONFIG} or {ADAPTER_CONFIG})",
            where=source,
            fix="give a run folder (runs/...) or a model folder",
        )
    return folder


class RunFolder(Callback):
    """Writes the run's configuration, ledger and model to `trainer.default_root_dir`.

    Args:
        config: The configuration as YAML.
    """

    def __init__(self, config: str) -> None:
        self.config = config

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Agree on the folder over all ranks, then write what is known before training."""
        if stage != "fit":
            return
        trainer._default_root_dir = trainer.strategy.broadcast(trainer.default_root_dir)
        self._write_inputs(trainer)

    @rank_zero_only
    def _write_inputs(self, trainer: Trainer) -> None:
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(self.config, encoding="utf-8")
        ledger = json.dumps(trainer.datamodule.ledger, indent=2, ensure_ascii=False)  # type: ignore[attr-defined]
        (folder / LEDGER).write_text(ledger + "\n", encoding="utf-8")
        _keep_earlier_metrics(folder)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Export what was trained."""
        if trainer.is_global_zero:
            pl_module.export(Path(trainer.default_root_dir) / MODEL)


def _keep_earlier_metrics(folder: Path) -> None:
    """Lightning's CSV logger starts its file anew: move that of the run that is continued aside."""
    metrics = folder / METRICS
    if metrics.exists():
        number = 1
        while (aside := folder / f"metrics-{number}.csv").exists():
            number += 1
        metrics.rename(aside)
