"""The run folder: one per run, with everything that says what the run was and what came of it.

```
runs/<config name>-<n>/
  config.yaml     the whole configuration, as `--config` takes it
  ledger.json     what became of every row and token
  filtered.jsonl  with filters: the conversations that they dropped, and why
  metrics.csv     what was logged
  checkpoints/    last.ckpt, and the best by validation loss; only what is trained
  goldens.json    examples with the trained model's loss, for `lightning-sft verify`
  model/          at the end: the adapter or model, with tokenizer, chat template and generation config
```
"""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_only

from lightning_sft import goldens, model_card
from lightning_sft.errors import SFTError
from lightning_sft.ranks import is_first_process
from lightning_sft.training.models import ADAPTER_CONFIG, MODEL_CONFIG

CONFIG, LEDGER, METRICS, FILTERED = "config.yaml", "ledger.json", "metrics.csv", "filtered.jsonl"
CHECKPOINTS, LAST, MODEL = "checkpoints", "last.ckpt", "model"
ENDING = ".ending"  # is there while callbacks may still put other weights in place of the last step's
RUNS = Path("runs")

_LOCK = ".lock"

_SHARED = "LIGHTNING_SFT_RUN_FOLDER"  # how the first process tells those that Lightning starts for DDP


def claim(requested: str | None, name: str, *, resuming: bool) -> Path:
    """The folder of this run, for this process alone: the requested one, or the next free `runs/<name>-<n>`.

    Args:
        requested: `trainer.default_root_dir`.
        name: The config's name.
        resuming: The folder may hold the run that is continued, or one that never came to a checkpoint.

    Raises:
        SFTError: The requested folder already holds a run, and this one doesn't continue it; a process is
            training in it; or no folder can be made there.
    """
    if not is_first_process():
        return Path(os.environ.get(_SHARED) or requested or RUNS / name)
    folder = None if requested is None else Path(requested)
    if folder is not None and (folder / CONFIG).exists() and not resuming:
        raise SFTError(
            f"the folder already holds a run ({CONFIG})",
            where=f"trainer.default_root_dir: {requested}",
            fix="choose another folder, leave it out, or continue that run with --ckpt_path last",
        )
    try:
        if folder is None:
            folder = _next_free(name)
        else:
            folder.mkdir(parents=True, exist_ok=True)
        locked = lock(folder)
    except OSError as error:
        where = f"trainer.default_root_dir: {requested}" if requested is not None else str(Path.cwd())
        raise SFTError(
            f"the run folder can't be made: {error.strerror}", where=where, fix="choose another folder"
        ) from error
    if not locked:
        raise SFTError(
            "another process is training in this folder",
            where=f"trainer.default_root_dir: {folder}",
            fix="wait for it, or choose another folder",
        )
    os.environ[_SHARED] = str(folder)
    return folder


def release(folder: Path) -> None:
    """Let other processes have the folder, and remove it if the run wrote nothing."""
    if is_first_process():
        unlock(folder)
        with suppress(OSError):
            folder.rmdir()


def told() -> Path | None:
    """The folder that the first process has told this one, which it has started."""
    folder = os.environ.get(_SHARED)
    return Path(folder) if folder is not None and not is_first_process() else None


_locks: dict[Path, IO[str]] = {}


def lock(folder: Path) -> bool:
    """Take the folder for this process; the system frees it when the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    file = (folder / _LOCK).open("w")
    try:
        # lockf, not flock: the workers of a killed run would hold on to a lock that they inherit
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return False
    _locks[folder] = file
    return True


def unlock(folder: Path) -> None:
    """Let other processes have the folder."""
    if (file := _locks.pop(folder, None)) is not None:
        (folder / _LOCK).unlink(missing_ok=True)
        file.close()


def _next_free(name: str) -> Path:
    RUNS.mkdir(exist_ok=True)
    number = 1
    while True:
        try:
            (RUNS / f"{name}-{number}").mkdir()
        except FileExistsError:
            number += 1
        else:
            return RUNS / f"{name}-{number}"


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


def checkpoint(run: Path, name: str, option: str) -> Path:
    """A checkpoint of a run, by its path or its name: `last` is `checkpoints/last.ckpt`.

    Raises:
        SFTError: There is none; `option` is where it was given.
    """
    kept = run / CHECKPOINTS
    for path in (Path(name), kept / name, kept / f"{name}.ckpt"):
        if path.is_file():
            return path
    there = ", ".join(sorted(path.name for path in kept.glob("*.ckpt")))
    raise SFTError(
        "no such checkpoint",
        where=f"{option}: {name}",
        fix=f"{kept} has {there}"
        if there
        else f"there is none in {kept}: the run may have been stopped before",
    )


class RunFolder(Callback):
    """Writes the run's configuration, ledger and model to `trainer.default_root_dir`.

    Args:
        config: The configuration as YAML.
    """

    def __init__(self, config: str) -> None:
        self.config = config
        self.started = False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Agree on the folder over all ranks."""
        trainer._default_root_dir = trainer.strategy.broadcast(trainer.default_root_dir)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Log each step of a run with only a few."""
        steps: int = trainer.datamodule.total_steps()
        if 0 < steps < trainer.log_every_n_steps:
            trainer.log_every_n_steps = 1

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Write what is known before training; not sooner, so that a refused run leaves nothing behind."""
        self.started = True
        self._write_inputs(trainer)

    @rank_zero_only
    def _write_inputs(self, trainer: Any) -> None:
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(self.config, encoding="utf-8")
        ledger = json.dumps(trainer.datamodule.ledger, indent=2, ensure_ascii=False)
        (folder / LEDGER).write_text(ledger + "\n", encoding="utf-8")
        if trainer.datamodule.filters:
            trainer.datamodule.prepared["train"].examples.filtered.tofile(folder / FILTERED)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Export what was trained; `model/` is there only when it is whole."""
        folder = Path(trainer.default_root_dir)
        if trainer.is_global_zero:
            (folder / ENDING).touch()
        export(pl_module, folder)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Export again what a callback has put in place of the last step's weights.

        The card is written again in any case, as callbacks have measured since.
        """
        folder = Path(trainer.default_root_dir)
        for logger in trainer.loggers:
            logger.save()
        if pl_module.restored is not None:
            export(pl_module, folder)
        elif trainer.is_global_zero and (folder / MODEL).is_dir():  # there is none after a run of no step
            model_card.write(folder / MODEL, folder)
        if trainer.is_global_zero:
            (folder / ENDING).unlink(missing_ok=True)


def export(module: Any, folder: Path) -> None:
    """Write `model/` of the run, from rank 0; it is there only when it is whole. All ranks call this."""
    partial = folder / f"{MODEL}.partial"
    if module.global_rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
    module.export(partial)
    if module.global_rank == 0:
        model_card.write(partial, folder)
        shutil.rmtree(folder / MODEL, ignore_errors=True)
        partial.rename(folder / MODEL)
    goldens.write(module, folder)
