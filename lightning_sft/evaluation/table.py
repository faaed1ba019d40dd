"""The results of an evaluation in the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import isclose, isnan
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_sft.evaluation.results import Results, Score

if TYPE_CHECKING:
    from lightning_sft.evaluation.evaluation import Found
    from lightning_sft.evaluation.paired import Difference

_MOST = 12
_WIDTH = 120


def show(found: Sequence[Found], folder: Path, earlier: Path | None = None) -> None:
    """Print a table of the scores, with the base's beside them, and where everything is.

    Args:
        found: What was found.
        folder: Where it was written.
        earlier: Where the results are that were in the folder before.
    """
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, _WIDTH)  # of a file or pipe nothing is known
    compared = any(each.base is not None for each in found)
    columns = ["base", "model", "change", "95 %", "p", "gained\n/ lost"] if compared else ["value"]
    table = Table(title="Evaluation", box=SIMPLE, padding=(0, 0, 0, 1), pad_edge=False, show_edge=False)
    table.add_column("score", overflow="fold")
    for column in [*columns, "items"]:
        table.add_column(column, justify="right", no_wrap=True)
    several = Counter(name for each in found for name in {score.name for score in each.results.scores})
    for each in found:
        for score in _shown(each.results):
            name = score.name if several[score.name] == 1 else f"{each.name}: {score.name}"
            row = _compared(each, score) if compared else [_value(score)]
            table.add_row(Text(f"{name} {score.metric}"), *row, str(score.items))
        table.add_section()
    console.print(table)
    for each in found:
        for note in each.results.notes:
            console.print(f"{each.name}: {note}", markup=False)
    left_out = sum(len(each.results.scores) - len(_shown(each.results)) for each in found)
    if left_out:
        console.print(f"{left_out} scores of single tasks are in the file.")
    console.print(f"\nThe results are in {folder}: results.json, evaluation/", markup=False, soft_wrap=True)
    if earlier is not None:
        console.print(f"Those that were there are in {earlier}", markup=False, soft_wrap=True)


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
    row = [_number(old.value), _number(score.value), _number(score.value - old.value, "+")]
    change = _change_of(found, score, old)
    if change is None:
        return [*row, "", "", ""]
    interval = f"{_number(change.low, '+')} … {_number(change.high, '+')}"
    if change.p is None:
        return [*row, interval, "", ""]
    return [*row, interval, f"{change.p:.3g}", f"{len(change.gained)} / {len(change.lost)}"]


def _change_of(found: Found, score: Score, old: Score) -> Difference | None:
    """The change over all items, if the score is theirs: a group's has none, nor what is no mean of the items."""
    headline = next(each for each in found.results.scores if each.metric == score.metric)
    change = next((each for each in found.changes if each.metric == score.metric), None)
    if change is None or score is not headline:
        return None
    same = isclose(change.before, old.value, rel_tol=1e-6) and isclose(
        change.after, score.value, rel_tol=1e-6
    )
    return change if same else None


def _value(score: Score) -> str:
    spread = f" ± {_number(score.stderr)}" if score.stderr is not None else ""
    return f"{_number(score.value)}{spread}"


def _number(value: float, sign: str = "") -> str:
    if isnan(value):
        return "no number"
    digits = ".4f" if abs(value) < 10 else ".2f" if abs(value) < 1e6 else ".3e"
    return f"{value:{sign}{digits}}"
