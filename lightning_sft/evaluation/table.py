"""The results of an evaluation in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_sft.evaluation.results import Results, Score

if TYPE_CHECKING:
    from lightning_sft.evaluation.evaluation import Found

_MOST = 12


def show(found: Sequence[Found], folder: Path) -> None:
    """Print a table of the scores, with the base's beside them, and where everything is."""
    from rich.console import Console
    from rich.table import Table

    compared = any(each.base is not None for each in found)
    columns = ["base", "model", "change", "95 %", "p", "gained / lost"] if compared else ["value"]
    table = Table("", "metric", *columns, "items", title="Evaluation")
    for each in found:
        for score in _shown(each.results):
            row = _compared(each, score) if compared else [_value(score)]
            table.add_row(score.name, score.metric, *row, str(score.items))
    console = Console()
    console.print(table)
    for each in found:
        for note in each.results.notes:
            console.print(f"{each.name}: {note}", markup=False)
    left_out = sum(len(each.results.scores) - len(_shown(each.results)) for each in found)
    if left_out:
        console.print(f"{left_out} scores of single tasks are in the file.")
    console.print(f"\nThe results are in {folder}: results.json, evaluation/", markup=False)


def _shown(results: Results) -> list[Score]:
    """The headline and the groups; the tasks too where there are few."""
    if len(results.scores) <= _MOST:
        return list(results.scores)
    tasks = {record.task for record in results.records}
    return [score for score in results.scores if score.name.partition("/")[2] not in tasks]


def _compared(found: Found, score: Score) -> list[str]:
    before = {(each.name, each.metric): each for each in (found.base.scores if found.base else ())}
    old = before.get((score.name, score.metric))
    if old is None:
        return ["", _value(score), "", "", "", ""]
    row = [_value(old), _value(score), f"{score.value - old.value:+.4g}"]
    change = next((each for each in found.changes if each.metric == score.metric), None)
    if change is None or score.items != change.items:
        return [*row, "", "", ""]
    interval = f"{change.low:+.4g} … {change.high:+.4g}"
    if change.p is None:
        return [*row, interval, "", ""]
    return [*row, interval, f"{change.p:.3g}", f"{len(change.gained)} / {len(change.lost)}"]


def _value(score: Score) -> str:
    spread = f" ± {score.stderr:.4f}" if score.stderr is not None else ""
    return f"{score.value:.4f}{spread}"
