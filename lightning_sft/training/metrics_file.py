"""`metrics.csv` of a run: one file, also when the run was killed and continued."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.csv_logs import _ExperimentWriter
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter


class MetricsFile(CSVLogger):
    """Goes on in a `metrics.csv` that is there, from a checkpoint on; Lightning's own would delete it.

    Rows that the killed run had written after the checkpoint are taken out: these steps are computed again.

    Args:
        folder: The run folder.
        steps: How many optimizer steps the checkpoint is after; 0 begins anew.
    """

    def __init__(self, folder: Path, steps: int = 0) -> None:
        super().__init__(folder, name="", version="", flush_logs_every_n_steps=10)
        self.steps = steps

    @property
    @rank_zero_experiment
    def experiment(self) -> _ExperimentWriter:
        """What writes the file; made when first asked for, by the first process."""
        if self._experiment is None:
            self._experiment = _Writer(self.log_dir, self.steps)
        return self._experiment


class _Writer(ExperimentWriter):
    def __init__(self, log_dir: str, steps: int) -> None:
        self.steps = steps
        super().__init__(log_dir)

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if not path.is_file():
            return
        rows = [row for row in read_rows(path) if int(row["step"]) < self.steps]
        if rows:
            self.metrics_keys = list(rows[0])
            _replace(path, self.metrics_keys, rows)
        else:
            path.unlink()

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path = Path(self.metrics_file_path)
        _replace(path, fieldnames, read_rows(path))


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics file, without a last line that a killed run hasn't finished."""
    whole, newline, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return list(csv.DictReader((whole + newline).splitlines()))


def _replace(path: Path, names: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    """Write the file anew; whenever the process is killed, it is the one before or the new one."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)
