"""Multiple-choice questions from files or the Hub, each with its place, checked."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lightning_sft import Row, SFTError, Source, read_rows

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
GET_MMLU = (
    "get it from https://people.eecs.berkeley.edu/~hendrycks/data.tar (and give the folder that holds dev/ and "
    "test/), or give the Hub id cais/mmlu"
)
_FILES = {".csv", ".jsonl", ".json", ".parquet"}
_LISTS = ("choices", "options")
_SUBJECTS = ("subject", "category")


@dataclass(frozen=True, slots=True)
class Question:
    """One question.

    Args:
        subject: What it is about.
        text: The question.
        choices: Its answers.
        answer: The index of the right one.
    """

    subject: str
    text: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True, slots=True)
class QuestionFiles:
    """Reads questions.

    Args:
        path: A folder with a subfolder or files for each split, a file, or a Hub id.
        choices: How many choices each question has; None: any number up to 26.
        columns: Names of columns: what they are called here (question, choices, answer, subject) → in the data.
        keep: Only rows with these values, by column.
        revision: The branch, tag or commit of a Hub dataset.
    """

    path: str
    choices: int | None = 4
    columns: Mapping[str, str] = field(default_factory=dict)
    keep: Mapping[str, str] = field(default_factory=dict)
    revision: str | None = None

    def read(self, split: str, subjects: Collection[str] | None = None) -> dict[str, list[Question]]:
        """The split's questions by subject, in the order of their files and rows.

        Args:
            split: Which.
            subjects: Only these; all by default.

        Raises:
            SFTError: There are none, or a row isn't a question; says which.
        """
        found: dict[str, list[Question]] = {}
        where = None
        for where, row, subject in self._rows(split, subjects):
            if all(str(row.get(column)) == value for column, value in self.keep.items()):
                question = self._question(row, where, subject)
                if subjects is None or question.subject in subjects:
                    found.setdefault(question.subject, []).append(question)
        if where is None:
            raise SFTError(
                f"there are no {split} questions in it", where=self.path, fix="fill it, or give another"
            )
        return found

    def _rows(self, split: str, subjects: Collection[str] | None) -> Iterator[tuple[str, Row, str | None]]:
        """(place, row, subject by the file's name) of each row."""
        path = Path(self.path).expanduser()
        if path.is_dir():
            files = list(_files_of(path, split))
            if not files:
                raise self.missing(split, "<subject>")
            named = {file: _subject_of(file, path, split) for file in files}
            wanted = [file for file, subject in named.items() if subject in (subjects or ())]
            for file in wanted or files:
                subject = named[file]
                rows = _csv_rows(file) if file.suffix == ".csv" else _other_rows(Source(str(file)))
                yield from ((where, row, subject) for where, row in rows)
        elif path.suffix == ".csv" and path.is_file():
            yield from ((where, row, None) for where, row in _csv_rows(path))
        elif path.is_file() or not path.suffix:
            hub = not path.is_file()
            subset = "all" if self.path == "cais/mmlu" else None
            source = Source(
                self.path,
                subset=subset,
                split=split if hub else None,
                revision=self.revision if hub else None,
            )
            try:
                yield from ((where, row, None) for where, row in _other_rows(source))
            except SFTError as error:
                if not hub:
                    raise
                fix = f"{GET_MMLU}. {error.fix or ''}".rstrip()
                raise SFTError(f"no {split} questions: {error.what}", where=error.where, fix=fix) from error
        else:
            raise self.missing(split, "<subject>")

    def missing(self, split: str, subject: str) -> SFTError:
        """The error for questions that aren't there."""
        path = Path(self.path)
        expected = path if path.suffix else path / split / f"{subject}_{split}.csv"
        return SFTError(f"no {split} questions: {expected} is not there", where=self.path, fix=GET_MMLU)

    def _question(self, row: Row, where: str, subject: str | None) -> Question:
        asked = self._column(row, "question", ("question",), where)
        listed = next(
            (row[name] for name in (self.columns.get("choices"), *_LISTS) if name and name in row), None
        )
        choices = _listed(listed) if listed is not None else _numbered(row)
        if choices is None:
            raise _wrong_columns(row, where, "choices (a list), choice0, choice1, … or A, B, …")
        if self.choices is not None and len(choices) != self.choices:
            raise SFTError(
                f"the question has {len(choices)} choices, not {self.choices}",
                where=where,
                fix="mend the row, or set `choices` to the number that the questions have, null for any",
            )
        for name, given in (("question", asked), *zip(LETTERS, choices, strict=False)):
            if given is None:
                raise SFTError(f"{name} is null", where=where, fix="write a text, or remove the row")
        if not 2 <= len(choices) <= len(LETTERS):
            raise SFTError(f"the question has {len(choices)} choices", where=where, fix="it needs 2 to 26")
        names = [self.columns.get("subject"), *_SUBJECTS]
        if "subject" in self.columns or subject is None or any(name in row for name in names):
            subject = str(self._column(row, "subject", _SUBJECTS, where))
        answer = _answer(self._column(row, "answer", ("answer",), where), len(choices), where)
        return Question(subject, str(asked), tuple(map(str, choices)), answer)

    def _column(self, row: Row, name: str, known: Sequence[str], where: str) -> object:
        for column in (self.columns.get(name), *known):
            if column is not None and column in row:
                return row[column]
        raise _wrong_columns(row, where, self.columns.get(name) or " or ".join(known))


def _wrong_columns(row: Row, where: str, needed: str) -> SFTError:
    return SFTError(
        f"no column {needed}; the row has {', '.join(map(str, row))}",
        where=where,
        fix="name the data's columns with `columns`: question, choices, answer, subject",
    )


def _answer(value: object, size: int, where: str) -> int:
    text = str(value).strip()
    is_number = text.isascii() and text.isdigit()
    if isinstance(value, bool) or not (is_number or (len(text) == 1 and text.upper() in LETTERS)):
        raise SFTError(f"the answer is {value!r}", where=where, fix="give a letter, or a number from 0")
    index = int(text) if is_number else LETTERS.index(text.upper())
    if index >= size:
        last = f"{LETTERS[size - 1]} or {size - 1}"
        raise SFTError(f"the answer {value!r} is out of range", where=where, fix=f"the last choice is {last}")
    return index


def _listed(value: object) -> list[object] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    if hasattr(value, "tolist"):
        value = value.tolist()
    return list(value) if isinstance(value, list | tuple) else None


def _numbered(row: Row) -> list[object] | None:
    for names in ([f"choice{n}" for n in range(len(LETTERS))], list(LETTERS)):
        if names[0] in row:
            return [row[name] for name in names if row.get(name) is not None]
    return None


def _files_of(folder: Path, split: str) -> Iterator[Path]:
    """The split's files: those in a folder of its name, else those that have it in theirs."""
    inside, all_of_it = folder / split, folder / "all"  # a copy of cais/mmlu has each question there, too
    place = inside if inside.is_dir() else all_of_it if all_of_it.is_dir() else folder
    candidates = sorted(path for path in place.rglob("*") if path.is_file())
    named = re.compile(rf"(^|[_.-]){split}([_.-]|$)")
    for path in candidates:
        if path.suffix in _FILES and (inside.is_dir() or named.search(path.stem)):
            yield path


def _subject_of(file: Path, folder: Path, split: str) -> str | None:
    """The subject that a file's name says, or its folder's where it is one of the Hub's; None where neither does."""
    if not re.fullmatch(rf"{split}(-\d+-of-\d+)?", file.stem):
        return re.sub(rf"[_-]{split}$", "", file.stem)
    return None if file.parent == folder or file.parent.name in (split, "data") else file.parent.name


def _other_rows(source: Source) -> Iterator[tuple[str, Row]]:
    return ((str(meta), row) for meta, row in read_rows(source))


def _csv_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """The rows of a CSV: with a header, or without one as question, choices and the answer's letter."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header: list[str] | None = None
            for number, cells in enumerate(csv.reader(file), 1):
                if number == 1 and {"question", "answer"} <= {cell.strip().lower() for cell in cells}:
                    header = [cell.strip() for cell in cells]
                    header = [
                        name.lower() if name.lower() in ("question", "answer") else name for name in header
                    ]
                    continue
                where = f"{path}, row {number - (header is not None)}"
                names = header or ["question", *LETTERS[: len(cells) - 2], "answer"]
                if len(names) != len(cells):
                    raise SFTError(
                        f"the row has {len(cells)} columns, the header {len(names)}",
                        where=where,
                        fix="mend the row: cells with commas need quotes",
                    )
                if len(cells) < 4:
                    raise SFTError(
                        f"the row has {len(cells)} columns",
                        where=where,
                        fix="it needs question, choices, answer",
                    )
                yield where, dict(zip(names, cells, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SFTError(f"the file can't be read: {error}", where=str(path)) from error
