"""From rows to conversations: which format they are in, and what it makes of them."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain

from lightning_sft import plugins
from lightning_sft.bases import DataFormat
from lightning_sft.conversation import Conversation, Meta, Row, Segments
from lightning_sft.data.sources import Source, read_rows
from lightning_sft.errors import SFTError


def read_conversations(source: Source) -> Iterator[Conversation | Segments]:
    """The source's conversations, in any format, each with the place it comes from in its `meta`.

    Raises:
        SFTError: As `read_rows` and `format_of`, or a row can't be converted; says which.
    """
    format, rows = format_of(source, read_rows(source))
    yield from convert_rows(rows, format, plugins.describe(format))


def format_of(
    source: Source, rows: Iterator[tuple[Meta, Row]]
) -> tuple[DataFormat, Iterator[tuple[Meta, Row]]]:
    """The source's format, found from its first row if it is `auto`, and the rows as the format gathers them.

    Args:
        source: Where the rows are from.
        rows: Its rows: at least one.

    Raises:
        SFTError: The format is `auto`, and none of the installed ones fits or several do. The rows raise it if
            the format can't gather them.
    """
    if source.format == "auto":
        first = next(rows)  # read_rows refuses a source without rows
        format = detect_format(first[1], _candidates(), source.path)
        rows = chain([first], rows)
    else:
        format = source.format
    if type(format).gather is DataFormat.gather:
        return format, rows
    return format, _gathered(format, rows, source.path)


def detect_format(row: Row, formats: Mapping[str, DataFormat], where: str) -> DataFormat:
    """The one format that a row is in.

    Args:
        row: The first row of a source.
        formats: The formats to choose from, by name.
        where: The source, for the error.

    Raises:
        SFTError: None of the formats fits, or several do.
    """
    matching = [name for name, format in formats.items() if _fits(format, row, name)]
    if len(matching) == 1:
        return formats[matching[0]]
    listed = ", ".join(map(repr, sorted(row)))
    if matching:
        raise SFTError(
            f"the format is ambiguous: the columns {listed} fit {' and '.join(sorted(matching))}",
            where=where,
            fix=f"choose one, such as `format: {min(matching)}`",
        )
    raise SFTError(
        f"no format fits the columns {listed}",
        where=where,
        fix=f"set `format:` to one of {', '.join(sorted(formats))}, with options that name the columns; "
        "`lightning-sft plugins` lists all",
    )


def convert_rows(
    rows: Iterable[tuple[Meta, Row]], format: DataFormat, describe: str
) -> Iterator[Conversation | Segments]:
    """The conversations of the rows, each with the place it comes from in its `meta`.

    Args:
        rows: The rows with their places.
        format: What converts them.
        describe: The format's name and the distribution it is from, for errors that are its own fault.

    Raises:
        SFTError: A row can't be converted, or the format itself fails.
    """
    for meta, row in rows:
        try:
            items = list(format.convert(row))
        except SFTError as error:
            raise error.at(str(meta)) from error
        except Exception as error:
            raise SFTError(f"{describe} failed: {type(error).__name__}: {error}", where=str(meta)) from error
        for item in items:
            if not isinstance(item, Conversation | Segments):
                raise SFTError(
                    f"{describe} gave a {type(item).__name__} instead of a Conversation or Segments",
                    where=str(meta),
                )
            yield replace(item, meta=replace(item.meta, source=meta.source, row=meta.row))


def _fits(format: DataFormat, row: Row, name: str) -> bool:
    try:
        return format.fits(row)
    except Exception as error:
        raise SFTError(
            f"the format {name} failed to look at the columns: {type(error).__name__}: {error}",
            fix="name the format of your rows with `format:`",
        ) from error


def _candidates() -> dict[str, DataFormat]:
    """Every installed format that works with its default options; others must be named."""
    candidates: dict[str, DataFormat] = {}
    for plugin in plugins.discover("formats"):
        try:
            cls = plugin.load()
            if not _needs_options(cls):
                candidates[plugin.name if plugin.name not in candidates else plugin.class_path] = cls()
        except Exception as error:  # a stranger's plug-in, which nobody asked for: it must not break this run
            warnings.warn(f"format: auto leaves out the {plugin}: {error}", stacklevel=2)
    return candidates


def _needs_options(cls: type) -> bool:
    parameters = inspect.signature(cls).parameters.values()
    return any(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


def _gathered(format: DataFormat, rows: Iterator[tuple[Meta, Row]], where: str) -> Iterator[tuple[Meta, Row]]:
    """What the format gathers of the rows, with its own failures put down to it."""
    try:
        yield from format.gather(rows)
    except SFTError:
        raise
    except Exception as error:
        raise SFTError(
            f"{plugins.describe(format)} failed: {type(error).__name__}: {error}", where=where
        ) from error
