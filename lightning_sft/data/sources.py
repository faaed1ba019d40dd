"""From a data file, a folder or a Hub dataset to rows.

JSON and JSONL are read as they stand, never through Arrow, which would give all rows one schema and fill
tool arguments with nulls. Every row keeps its place, so that each later error can name it.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from io import BufferedReader
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lightning_sft.assets import data_path
from lightning_sft.bases import DataFormat
from lightning_sft.conversation import Meta, Row
from lightning_sft.errors import SFTError

if TYPE_CHECKING:
    from datasets import Dataset

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_LONGEST_CSV_FIELD = 2**31 - 1


@dataclass
class Source:
    """Where rows come from and what format they are in.

    Args:
        path: A data file (.json, .jsonl, .csv, .tsv, .parquet, .txt; all but .parquet also as .gz), a folder
            of them, the id of a dataset on the Hugging Face Hub, or embedded data (tiny:train).
        format: The rows' format; auto finds the one that fits the columns.
        subset: The configuration of a Hub dataset, where it has several.
        split: The split of a Hub dataset, train by default. A local folder with a subset, split or revision
            is read as such a dataset too; without, all its files are.
        revision: The branch, tag or commit of a Hub dataset.
        limit: Read at most this many rows.
        weight: How often a row is seen in an epoch of training: 2.0 is twice, 0.5 every other epoch. Fractions
            go round: each epoch takes the next rows in a seeded order.
    """

    path: str
    format: DataFormat | Literal["auto"] = "auto"
    subset: str | None = None
    split: str | None = None
    revision: str | None = None
    limit: int | None = None
    weight: float = 1.0


Sources = str | list[str | Source]
"""A path by itself, or a list of paths and sources."""


def as_sources(given: Sources | None) -> list[Source]:
    """The sources that an option gives."""
    if given is None:
        return []
    listed = [given] if isinstance(given, str) else given
    return [Source(path=each) if isinstance(each, str) else each for each in listed]


def read_rows(source: Source) -> Iterator[tuple[Meta, Row]]:
    """The source's rows, each with its file and row number; one at a time where the file type permits.

    Args:
        source: What to read; its format isn't used here.

    Raises:
        SFTError: There is no such file or dataset, it has no rows, or a row is malformed.
    """
    if source.limit is not None and source.limit < 1:
        raise SFTError(f"limit is {source.limit}", where=source.path, fix="give 1 or more, or leave it out")
    return islice(_rows(source), source.limit)


def data_files(source: Source) -> list[Path] | None:
    """The files that hold the source's rows; None where they come through `datasets`.

    Raises:
        SFTError: There is no such file or dataset.
    """
    if not source.path.strip():
        raise SFTError("the path is empty", where="path", fix="give a data file, a folder or a Hub dataset")
    path = data_path(source.path) or Path(source.path).expanduser()
    if path.exists() and (source.subset or source.split or source.revision):
        if path.is_dir():
            return None
        raise SFTError(
            "subset, split and revision are for datasets, this is a file",
            where=source.path,
            fix="leave them out, or give the dataset's folder",
        )
    if path.is_dir():
        return _files(path)
    if path.exists():
        return [path]
    if _HUB_ID.fullmatch(source.path) and _reader(path) is None:
        return None
    raise SFTError("no such file", where=source.path, fix=_did_you_mean(path))


def _rows(source: Source) -> Iterator[tuple[Meta, Row]]:
    files = data_files(source)
    if files is None:
        return read_hub(source)
    path = data_path(source.path) or Path(source.path).expanduser()
    names = map(str, files) if path.is_dir() else [source.path]
    return (row for file, name in zip(files, names, strict=True) for row in _read_file(file, name))


def read_hub(source: Source) -> Iterator[tuple[Meta, Row]]:
    """The rows of a dataset on the Hub, or of a local dataset folder, through `datasets`; raises as `hub_dataset`."""
    dataset = hub_dataset(source)
    _refuse_empty(len(dataset), source.path)
    for number, row in enumerate(dataset, 1):
        yield Meta(source.path, number), row


def hub_dataset(source: Source) -> Dataset:
    """The dataset of a source that has no data files of its own.

    Raises:
        SFTError: It can't be loaded: no network, no such dataset, subset or split, or no access.
    """
    from datasets import load_dataset

    try:
        return load_dataset(
            source.path, name=source.subset, split=source.split or "train", revision=source.revision
        )
    except Exception as error:
        hint = _did_you_mean(Path(source.path))
        raise SFTError(
            f"the dataset can't be loaded: {type(error).__name__}: {error}",
            where=source.path,
            fix="check the id, `subset` and `split`; a gated or private dataset needs HF_TOKEN in the "
            f"environment; offline, give the path of a local file or folder. {hint}",
        ) from error


def _files(folder: Path) -> list[Path]:
    """The folder's data files, at any depth, in order, without hidden files and folders."""
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file()
        and _reader(file)
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    if not files:
        raise SFTError(
            "there is no data file in the folder",
            where=str(folder),
            fix=f"data files end in {', '.join(_READERS)}",
        )
    return files


def _read_file(path: Path, name: str) -> Iterator[tuple[Meta, Row]]:
    """The file's rows; `name` is what the user calls it."""
    reader = _reader(path)
    if reader is None:
        raise SFTError(
            f"files of type {path.suffix or 'none'!r} can't be read",
            where=name,
            fix=f"data files end in {', '.join(_READERS)}",
        )
    count = 0
    try:
        for number, row in reader(path, name):
            count += 1
            yield Meta(name, number), row
    except (OSError, EOFError, zlib.error) as error:
        raise SFTError(f"the file can't be read: {error}", where=name) from error
    _refuse_empty(count, name)


def _refuse_empty(count: int, name: str) -> None:
    if not count:
        raise SFTError("there are no rows in it", where=name, fix="remove it from the data or fill it")


def _reader(path: Path) -> Callable[[Path, str], Iterator[tuple[int, Row]]] | None:
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    return None if name.endswith(".parquet.gz") else _READERS.get(suffix)


def _open(path: Path) -> gzip.GzipFile | BufferedReader:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


def _lines(path: Path, name: str) -> Iterator[tuple[int, str]]:
    """The file's lines with their line ends, numbered from 1, without a byte order mark."""
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise SFTError(
                    f"byte {error.start + 1} of line {number} is not UTF-8",
                    where=name,
                    fix="save the file in UTF-8",
                ) from error


def _parse(text: str, where: str, fix: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = "" if error.lineno == 1 else f"line {error.lineno}, "
        raise SFTError(
            f"malformed JSON at {line}column {error.colno}: {error.msg.removesuffix(' at')}",
            where=where,
            fix=fix,
        ) from error
    except (ValueError, RecursionError) as error:
        raise SFTError(f"the JSON can't be read: {error}", where=where) from error


def _as_row(value: object, where: str) -> Row:
    if not isinstance(value, dict):
        raise SFTError(
            f"the row is a {type(value).__name__}, not an object",
            where=where,
            fix='write each row as {"column": value, …}',
        )
    return value


def _refuse_half_characters(value: object, where: str) -> None:
    """JSON can escape half of a surrogate pair (U+D83D), which no tokenizer takes."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise SFTError(
            f"the text holds {error.object[error.start]!a}, which is half a character",
            where=where,
            fix="remove it; it is what is left of an emoji that was cut in two",
        ) from error


def _read_jsonl(path: Path, name: str) -> Iterator[tuple[int, Row]]:
    for number, line in _lines(path, name):
        if line.strip():
            where = f"{name}, row {number}"
            row = _parse(line, where, "write one object per line; name a file that is one JSON list .json")
            if _ESCAPED_SURROGATE.search(line):
                _refuse_half_characters(row, where)
            yield number, _as_row(row, where)


def _read_json(path: Path, name: str) -> Iterator[tuple[int, Row]]:
    if _is_jsonl(path, name):
        yield from _read_jsonl(path, name)
        return
    text = "".join(line for _, line in _lines(path, name))
    if not text.strip():
        return
    rows = _parse(text, name, "write a list of objects")
    if not isinstance(rows, list):
        keys = f" with the keys {', '.join(map(repr, rows))}" if isinstance(rows, dict) else ""
        raise SFTError(
            f"the file holds one {type(rows).__name__}{keys}, not a list of rows",
            where=name,
            fix="write a list of objects, or one object per line in a .jsonl file",
        )
    escaped = _ESCAPED_SURROGATE.search(text)
    for number, row in enumerate(rows, 1):
        where = f"{name}, row {number}"
        if escaped:
            _refuse_half_characters(row, where)
        yield number, _as_row(row, where)


def _is_jsonl(path: Path, name: str) -> bool:
    """Whether the first line is an object of its own and another line follows."""
    filled = (line for _, line in _lines(path, name) if line.strip())
    first = next(filled, "")
    if not first.lstrip().startswith("{"):
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return next(filled, None) is not None


def _read_table(path: Path, name: str) -> Iterator[tuple[int, Row]]:
    csv.field_size_limit(_LONGEST_CSV_FIELD)
    delimiter = "\t" if ".tsv" in path.suffixes[-2:] else ","
    records = csv.reader((line for _, line in _lines(path, name)), delimiter=delimiter, strict=True)
    header: list[str] = []
    number = 0
    try:
        for record in filter(None, records):
            if not header:
                header = record
                _check_header(header, name)
                continue
            number += 1
            if len(record) != len(header):
                raise SFTError(
                    f"the row has {len(record)} fields, the header {len(header)}",
                    where=f"{name}, row {number}",
                    fix="quote fields that hold the delimiter or a line break",
                )
            yield number, dict(zip(header, record, strict=True))
    except csv.Error as error:
        raise SFTError(
            f"malformed at line {records.line_num}: {error}", where=name, fix="check the quotes around it"
        ) from error


def _check_header(header: list[str], name: str) -> None:
    twice = sorted({column for column in header if header.count(column) > 1})
    if twice:
        raise SFTError(f"the header names {twice[0]!r} more than once", where=name, fix="rename one of them")


def _read_parquet(path: Path, name: str) -> Iterator[tuple[int, Row]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except pyarrow.ArrowException as error:
        raise SFTError(f"the Parquet file can't be read: {error}", where=name) from error


def _read_text(path: Path, name: str) -> Iterator[tuple[int, Row]]:
    for number, line in _lines(path, name):
        if line.strip():
            yield number, {"text": line.rstrip("\r\n")}


_READERS: Mapping[str, Callable[[Path, str], Iterator[tuple[int, Row]]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".parquet": _read_parquet,
    ".txt": _read_text,
}


def _did_you_mean(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f"there is no folder {str(parent)!r} either"
    close = get_close_matches(path.name, [sibling.name for sibling in parent.iterdir()], n=3)
    if close:
        return f"did you mean {' or '.join(repr(str(parent / name)) for name in close)}?"
    return f"relative paths start at {str(Path.cwd())!r}"
