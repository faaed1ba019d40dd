"""The ledger in the terminal: a line for each source, and under the table what happened to its rows and why."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_sft.data.ledger import SourceLedger

_NAME = 12  # least width of a source's name
_FILTERED, _RENDERED, _SPLIT = "fil-\ntered", "ren-\ndered", "split"  # left out where they tell nothing


def ledger_table(parts: Mapping[str, Sequence[SourceLedger]], width: int) -> str:
    """What became of the rows and tokens of every source, and of all together.

    Args:
        parts: The accounts of `train`, `val` and `test`.
        width: Columns of the terminal. Where the numbers don't fit, those from 10,000 are shortened (12.3k).
    """
    ledgers = [(part, ledger) for part, accounts in parts.items() for ledger in accounts]
    rows = [_counts(ledger) for _, ledger in ledgers]
    rows.append({name: sum(row[name] for row in rows) for name in _counts(SourceLedger("", ""))})
    left_out = {name for name in (_FILTERED, _SPLIT) if not rows[-1][name]}
    if all(ledger.rendered == ledger.conversations - ledger.filtered_conversations for _, ledger in ledgers):
        left_out.add(_RENDERED)
    columns = [name for name in rows[-1] if name not in left_out]
    for write, gap in ((_exact, 2), (_exact, 1), (short, 2), (short, 1)):
        cells = [[write(row[name]) for name in columns] for row in rows]
        needed = sum(gap + _widest(column) for column in zip(columns, *cells, strict=True))
        if needed + _NAME <= width:
            break
    room = max(_NAME, width - needed)
    several = len(ledgers) > 1
    table = Table(  # the box's own divider is one more space
        box=SIMPLE, padding=(0, 0, 0, gap - 1), pad_edge=False, show_edge=False, show_footer=several
    )
    table.add_column("source", footer="all", no_wrap=True)
    for name, total in zip(columns, cells[-1], strict=True):
        table.add_column(name, footer=total, justify="right", no_wrap=True)
    for (part, ledger), row in zip(ledgers, cells[:-1], strict=True):
        table.add_row(Text(_shortened(part, ledger.source, room)), *row)
    console = Console(file=io.StringIO(), width=needed + room, highlight=False)
    with console.capture() as printed:
        console.print(table)
    return "\n".join(line.rstrip() for line in printed.get().splitlines())


def ledger_lines(ledger: SourceLedger) -> Iterator[str]:
    """What happened to the rows of a source, and why."""
    if ledger.rows_without_conversation:
        yield f"left out {ledger.rows_without_conversation:,} rows: the format makes nothing of them"
    for filter, reasons in ledger.filtered.items():
        for reason, number in reasons.items():
            yield f"filtered {number:,} conversations ({filter}): {reason}"
    for note, number in ledger.notes.items():
        yield f"{number:,} examples: {note}"
    split = ledger.split
    if split.examples:
        yield (
            f"split {split.examples:,} examples into {split.pieces:,}, which repeat {split.repeated_tokens:,} tokens "
            "of context"
        )
    for verb, account in (("cut", ledger.truncated), ("dropped", ledger.dropped)):
        for reason, loss in account.items():
            yield (
                f"{verb} {loss.examples:,} examples ({loss.tokens:,} tokens lost, {loss.trained_tokens:,} of them "
                f"to train): {reason}"
            )


def short(number: int) -> str:
    """The number in at most five characters: 9,999 and 12.3k."""
    if number < 10_000:
        return f"{number:,}"
    for unit, size in (("k", 1e3), ("M", 1e6), ("B", 1e9)):
        if number < 999.5 * size:
            return f"{number / size:.3g}{unit}"
    return f"{number / 1e12:.3g}T"


def _counts(ledger: SourceLedger) -> dict[str, int]:
    """The columns of a source."""
    return {
        "rows\nread": ledger.rows,
        "con-\nverted": ledger.conversations,
        _FILTERED: ledger.filtered_conversations,
        _RENDERED: ledger.rendered,
        "trun-\ncated": ledger.truncated_examples,
        _SPLIT: ledger.split.examples,
        "dropped": sum(loss.examples for loss in ledger.dropped.values()),
        "kept": ledger.examples,
        "tokens\ntrained": ledger.trained_tokens,
        "tokens\ncontext": ledger.context_tokens,
        "tokens\nlost": sum(loss.tokens for loss in ledger.lost),
    }


def _exact(number: int) -> str:
    return f"{number:,}"


def _widest(cells: Sequence[str]) -> int:
    return max(len(line) for cell in cells for line in cell.split("\n"))


def _shortened(part: str, source: str, width: int) -> str:
    """The part and the end of the source's name."""
    room = width - len(part) - 1
    return f"{part} {source if len(source) <= room else '…' + source[1 - room :]}"
