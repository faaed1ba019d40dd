"""`lightning-sft data …`: what is done with data files and needs no model."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import ItemsView, Iterator, Sequence, ValuesView
from contextlib import suppress
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from lightning_sft import plugins
from lightning_sft.bases import DataFormat
from lightning_sft.conversation import Conversation, Meta, Row, Segments
from lightning_sft.data.conversion import convert_rows, format_of
from lightning_sft.data.sources import Source, read_rows
from lightning_sft.errors import SFTError

_WITHIN = r"\.|\[\]"  # in a path: what is before is an object or a list

_FORMAT_OPTIONS = ("--to", "--to.help", "--format", "--format.help")

COMMANDS = {
    "convert": "write the rows of a file, folder or Hub dataset in another format",
    "canaries": "write made-up secrets to train on, for MemorizationProbe to look for",
}
"""The commands of `data`, with the line on each in the overview."""


@dataclass
class Report:
    """Where every row of a conversion went.

    Args:
        read: Rows read.
        gathered: What the format made of them before it converted them: fewer where it puts rows together.
        empty: Gathered rows of which the format made no conversation, on purpose.
        conversations: Conversations made of the others.
        written: Rows written: one for each conversation.
        refused: Rows or conversations left out, by reason, with how often and the first place.
        columns: The keys of the rows and of the objects in them, by their path, with how often they are there.
        seen: Those of which the format read the value anywhere.
        unwritten: What is known about a conversation but has no place in the output, with how often.
    """

    read: int = 0
    gathered: int = 0
    empty: int = 0
    conversations: int = 0
    written: int = 0
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    columns: Counter[str] = field(default_factory=Counter)
    seen: set[str] = field(default_factory=set)
    unwritten: Counter[str] = field(default_factory=Counter)

    def refuse(self, error: SFTError, meta: Meta) -> None:
        """Count what is left out because of an error, which names its place."""
        count, first = self.refused.get(error.what, (0, error.where or str(meta)))
        self.refused[error.what] = count + 1, first

    def lines(self) -> Iterator[str]:
        """The report as text."""
        counts = [("rows read", self.read)]
        if self.gathered != self.read:
            counts.append(("gathered into", self.gathered))
        counts += [("conversations", self.conversations), ("rows written", self.written)]
        if self.empty:
            counts.append(("rows without conversation", self.empty))
        yield from (f"{name:<26}{count:>9,}" for name, count in counts)
        for reason, (count, first) in self.refused.items():
            yield f"{'left out':<26}{count:>9,}  {reason} (first: {first})"
        unread = [name for name in self.columns if name not in self.seen]
        unseen = {
            f"{'key' if re.search(_WITHIN, name) else 'column'} {name!r}": self.columns[name]
            for name in unread
            if not any(name.startswith((f"{other}.", f"{other}[]")) for other in unread)
        }
        for name, count in [*unseen.items(), *self.unwritten.items()]:
            yield f"{'not kept':<26}{count:>9,}  {name}"


def convert(
    input: str,
    output: str,
    to: DataFormat | None = None,
    format: DataFormat | Literal["auto"] = "auto",
    subset: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    limit: int | None = None,
    skip: bool = False,
    overwrite: bool = False,
) -> None:
    """Write rows in another format, one JSON object per line.

    Every row is read back as it is written and has to give the same conversation. What isn't kept is told: rows
    without a conversation, columns and keys within them that the format doesn't look at.

    Args:
        input: A data file, a folder of them, a Hub dataset, or embedded data (tiny:train).
        output: The .jsonl file to write.
        to: The format to write: messages, sharegpt, alpaca, prompt_completion, segments or raw_text, or that of
            another plug-in that can be written. `--to.help NAME` lists its options.
        format: The rows' format; auto finds the one that fits the columns.
        subset: The configuration of a Hub dataset, where it has several.
        split: The split of a Hub dataset, train by default.
        revision: The branch, tag or commit of a Hub dataset.
        limit: Read at most this many rows.
        skip: Leave out rows that can't be read or written, and report them; otherwise the first one is an error.
        overwrite: Replace the output if it is there.

    Raises:
        SFTError: A row can't be read, or not be written in the other format; says which and why. No output is
            left then.
    """
    path = Path(output).expanduser()
    if path.suffix != ".jsonl":
        raise SFTError("the output is no .jsonl file", where=output, fix="give it a name that ends in .jsonl")
    if path.is_dir() or (path.exists() and not overwrite):
        raise SFTError("the output is there already", where=output, fix="choose another, or add --overwrite")
    if to is None:
        raise SFTError("--to must be given", fix=f"name the format to write: {_writable()}")
    if type(to).to_row is DataFormat.to_row:
        raise SFTError(
            f"the {plugins.describe(to)} can be read, not written", where="--to", fix=f"choose {_writable()}"
        )
    source = Source(input, format, subset=subset, split=split, revision=revision, limit=limit)
    report = Report()
    read, rows = format_of(source, _watched(read_rows(source), report))
    report.seen.clear()  # of what was looked at to find the format
    partial = path.with_name(f"{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            for row in _converted(rows, read, to, report, skip=skip):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        if not report.written:
            reasons = "; ".join(report.refused) or f"{type(read).__name__} makes no conversation of any row"
            raise SFTError(f"there is nothing to write: {reasons}", where=input)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    print(f"{input} ({type(read).__name__}) → {output} ({type(to).__name__})")
    print("\n".join(report.lines()))


def command(argv: Sequence[str]) -> None:
    """Run the command of `data` that the command line names.

    Raises:
        SFTError: There is none of that name, or the command line doesn't fit it.
    """
    name = argv[0] if argv else "--help"
    if name in ("--help", "-h"):
        lines = "\n".join(f"  {each:<10}{line}" for each, line in COMMANDS.items())
        print(f"usage: lightning-sft data <command> [options]\n\n{lines}")
        return
    if name not in COMMANDS:
        close = get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise SFTError(f"no command of data is named {name!r}", fix=f"{hint}commands: {', '.join(COMMANDS)}")
    from lightning_sft import command_line

    if name == "canaries":
        from lightning_sft.data.canaries import canaries

        command_line.call(canaries, argv[1:], "data canaries")
        return
    arguments = _as_classes(argv[1:])
    plugins.load_named(plugins.named_in(arguments))
    command_line.call(convert, arguments, "data convert")


def _converted(
    rows: Iterator[tuple[Meta, Row]], read: DataFormat, to: DataFormat, report: Report, *, skip: bool
) -> Iterator[dict[str, object]]:
    described = plugins.describe(read)
    for meta, row in rows:
        report.gathered += 1
        try:
            items = list(convert_rows([(meta, row)], read, described))
        except SFTError as error:
            if not skip:
                raise
            report.refuse(error, meta)
            continue
        report.empty += not items
        report.conversations += len(items)
        for item in items:
            try:
                written = _row(item, to)
            except SFTError as error:
                if not skip:
                    fix = error.fix or "choose another format with --to, or leave such rows out with --skip"
                    raise SFTError(error.what, where=error.where, fix=fix).at(str(meta)) from error
                report.refuse(error.at(str(meta)), meta)
                continue
            report.written += 1
            report.unwritten.update(name for name in ("task", "language") if getattr(item.meta, name))
            yield written


def _row(item: Conversation | Segments, to: DataFormat) -> dict[str, object]:
    """The row that the format writes for the item, proved by reading it back."""
    row = to.to_row(item)
    name = type(to).__name__
    try:
        back = list(to.convert(json.loads(json.dumps(row, ensure_ascii=False))))
    except SFTError as error:
        raise SFTError(f"the format {name} doesn't take this conversation: {error.what}") from error
    if [replace(each, meta=Meta()) for each in back] != [replace(item, meta=Meta())]:
        raise SFTError(f"the format {name} would not read back the same conversation")
    return row


class _Watched(dict[str, object]):
    """An object of a row that notes which of its keys' values are read, at any depth: `messages[].role`."""

    def __init__(self, fields: Row, report: Report, path: str = "") -> None:
        super().__init__(
            {key: _watched_value(value, report, f"{path}{key}") for key, value in fields.items()}
        )
        self._report, self._path = report, path
        report.columns.update(f"{path}{key}" for key in fields)

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()  # without this method `dict(row)` and `**row` go around __getitem__

    def __getitem__(self, key: str) -> object:
        self._report.seen.add(f"{self._path}{key}")
        return super().__getitem__(key)

    def get(self, key: str, default: object = None) -> object:
        self._report.seen.add(f"{self._path}{key}")
        return super().get(key, default)

    def items(self) -> ItemsView[str, object]:  # type: ignore[override]
        self._report.seen.update(f"{self._path}{key}" for key in self)
        return super().items()

    def values(self) -> ValuesView[object]:  # type: ignore[override]
        self._report.seen.update(f"{self._path}{key}" for key in self)
        return super().values()

    def __repr__(self) -> str:
        self._report.seen.update(f"{self._path}{key}" for key in self)
        return super().__repr__()


def _watched(rows: Iterator[tuple[Meta, Row]], report: Report) -> Iterator[tuple[Meta, Row]]:
    for meta, row in rows:
        report.read += 1
        yield meta, _Watched(row, report)


def _watched_value(value: object, report: Report, path: str) -> object:
    """The value with every object in it watched."""
    if isinstance(value, dict):
        return _Watched(value, report, f"{path}.")
    if isinstance(value, list):
        return [_watched_value(each, report, f"{path}[]") for each in value]
    return value


def _as_classes(argv: Sequence[str]) -> list[str]:
    """The command line with formats named as their classes are: `prompt_completion` is `PromptCompletion`."""
    names = {_squashed(plugin.name): plugin.name for plugin in plugins.discover("formats")}
    arguments = []
    for before, argument in zip(["", *argv], argv, strict=False):
        flag, equals, value = argument.partition("=")
        if equals and flag in _FORMAT_OPTIONS:
            argument = f"{flag}={names.get(_squashed(value), value)}"
        elif before in _FORMAT_OPTIONS:
            argument = names.get(_squashed(argument), argument)
        arguments.append(argument)
    return arguments


def _squashed(name: str) -> str:
    return name.replace("_", "").replace("-", "").casefold()


def _writable() -> str:
    """The names of the installed formats that can be written."""
    names = []
    for plugin in plugins.discover("formats"):
        with suppress(SFTError):  # a broken plug-in can't be written either
            if getattr(plugin.load(), "to_row", None) is not DataFormat.to_row:
                names.append(plugin.name)
    return ", ".join(names)
