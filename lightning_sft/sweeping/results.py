"""What came of a sweep: its table, in the terminal and as files, and the best configuration."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

RESULTS, TABLE, BEST = "results.json", "results.csv", "best.yaml"

State = Literal["complete", "pruned", "failed", "unfinished"]


@dataclass(frozen=True, slots=True)
class Trial:
    """One trial, as its row in the table has it.

    Args:
        number: From 0.
        state: What became of it.
        value: The last value of the metric, if there was one.
        parameters: The searched options, by their keys.
        folder: The run folder.
        error: Why it failed.
    """

    number: int
    state: State
    value: float | None
    parameters: dict[str, Any]
    folder: Path
    error: str | None = None


def best_of(trials: Sequence[Trial], mode: str) -> Trial | None:
    """The complete trial with the best value; the first of equal ones."""
    sign = 1 if mode == "min" else -1
    complete = [trial for trial in trials if trial.state == "complete" and trial.value is not None]
    return min(complete, key=lambda trial: sign * (trial.value or 0.0), default=None)


def write(folder: Path, trials: Sequence[Trial], metric: str, mode: str) -> None:
    """Write `results.json`, `results.csv` and, once a trial is complete, `best.yaml`."""
    best = best_of(trials, mode)
    keys = sorted({key for trial in trials for key in trial.parameters})
    content = {
        "metric": metric,
        "mode": mode,
        "best": None if best is None else best.number,
        "trials": [
            {
                "number": trial.number,
                "state": trial.state,
                "value": trial.value,
                "parameters": trial.parameters,
                "folder": str(trial.folder),
                "error": trial.error,
            }
            for trial in trials
        ],
    }
    write_whole(folder / RESULTS, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    partial = folder / f"{TABLE}.partial"
    with partial.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["number", "state", metric, *keys, "folder", "error"])
        for trial in trials:
            values = [_exact(trial.parameters[key]) if key in trial.parameters else "" for key in keys]
            table.writerow([trial.number, trial.state, trial.value, *values, trial.folder, trial.error])
    partial.replace(folder / TABLE)
    if best is not None:
        config = config_of(best.folder).read_text(encoding="utf-8")
        write_whole(folder / BEST, f"# trial {best.number} of {folder}: {metric} {best.value!r}\n{config}")


def show(folder: Path, trials: Sequence[Trial], metric: str, mode: str) -> None:
    """Print the table, the best trials first, and where everything is."""
    from rich.console import Console
    from rich.table import Table

    keys = sorted({key for trial in trials for key in trial.parameters})
    table = Table("trial", metric, *shortened(keys).values(), "state", "run", title="Sweep")
    sign = 1 if mode == "min" else -1
    states: dict[State, int] = {"complete": 0, "pruned": 1, "unfinished": 2, "failed": 3}
    for trial in sorted(trials, key=lambda t: (states[t.state], sign * (t.value or 0.0), t.number)):
        value = "" if trial.value is None else f"{trial.value:.6g}"
        parameters = [plain(trial.parameters.get(key, "")) for key in keys]
        state = trial.state if trial.error is None else f"{trial.state}: {trial.error.splitlines()[0]}"
        table.add_row(str(trial.number), value, *parameters, state, str(trial.folder.relative_to(folder)))
    console = Console()
    console.print(table, markup=False)
    best = best_of(trials, mode)
    if best is not None:
        said = f"\nThe best is trial {best.number}; train it again with lightning-sft fit --config {folder / BEST}"
        console.print(said, markup=False, soft_wrap=True)
    console.print(f"The sweep is in {folder}: {TABLE}, {RESULTS}, trials/", markup=False, soft_wrap=True)


def config_of(folder: Path) -> Path:
    """The configuration of a trial's run, beside its folder."""
    return folder.with_name(f"{folder.name}.yaml")


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write it there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_whole(config_of(folder), yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))


def shortened(keys: Sequence[str]) -> dict[str, str]:
    """The shortest ends of dotted keys that tell them apart."""
    short = {}
    for key in keys:
        parts = key.split(".")
        for size in range(1, len(parts) + 1):
            end = ".".join(parts[-size:])
            if size == len(parts) or not any(
                f".{other}".endswith(f".{end}") for other in keys if other != key
            ):
                short[key] = end
                break
    return short


def plain(value: object) -> str:
    """A parameter's value in a line: numbers with six digits, texts as they are, the rest as JSON."""
    return f"{value:.6g}" if isinstance(value, float) else _exact(value)


def _exact(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there wholly or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
