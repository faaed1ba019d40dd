"""The rows of a benchmark that is declared in YAML, with the examples before each question."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from lightning_sft import (
    Item,
    Message,
    Record,
    Results,
    Row,
    RowTemplate,
    SFTError,
    Source,
    read_rows,
    scores_by_task,
)
from lightning_sft_evaluators.prompts import FewShot, chosen

Prompt = str | tuple[Message, ...]
Shot = tuple[str, str]
"""A question with its answer."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A row that is asked.

    Args:
        number: Its place in the data, from 0.
        where: Its file and row, for errors.
        row: Its columns.
        shots: Its examples.
    """

    number: int
    where: str
    row: Row
    shots: Sequence[Shot]


class Declared:
    """The data of a benchmark, and how its prompts are put.

    Args:
        path: A .jsonl, .json, .csv or .parquet file, a folder, the id of a dataset on the Hugging Face Hub, or
            embedded data (tiny:facts).
        name: What the scores are called; by default the last part of the path.
        subset: The configuration of a Hub dataset. Files have none: then it doesn't count, and neither do `split` and
            `revision`.
        split: The split of a Hub dataset; train by default.
        revision: The branch, tag or commit of a Hub dataset.
        how_to_get: What an error says where the data isn't there.
        description: What comes first; in a chat the system message.
        task: The Jinja template of the part that a row belongs to; then each part has a score of its own.
        compared: The Jinja template of what training data is compared with, to find items that it holds; by default
            the prompt.
        delimiter: Between a question and its answer. In a chat there is none.
        shots: Examples with answers before each question. A row is never its own example.
        shots_path: The examples' file, folder or Hub id; by default `path`.
        shots_split: The examples' split; by default `split`.
        shots_seed: Draws the examples of each question at random; by default they are the first ones.
        shots_separator: After each example.
        limit: Only so many rows: the first; with `seed`, some at random.
        seed: Seed of that choice.
        chat: Ask through the model's chat template.
        turns: In a chat, each example is a turn of its own; else all is one turn.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        subset: str | None = None,
        split: str | None = None,
        revision: str | None = None,
        how_to_get: str | None = None,
        description: str = "",
        task: str | None = None,
        compared: str | None = None,
        delimiter: str = " ",
        shots: int = 0,
        shots_path: str | None = None,
        shots_split: str | None = None,
        shots_seed: int | None = None,
        shots_separator: str = "\n\n",
        limit: int | None = None,
        seed: int | None = None,
        chat: bool = False,
        turns: bool = True,
    ) -> None:
        for option, value, least in (("shots", shots, 0), ("limit", limit, 1)):
            if value is not None and value < least:
                raise SFTError(f"{option} is {value}", where=option, fix=f"give {least} or more")
        self.name = name or Path(re.split(r"[/\\:]", path.rstrip("/"))[-1]).stem
        if "/" in self.name or not self.name:
            raise SFTError(f"the name is {self.name!r}", where="name", fix="give one without a slash")
        self.path, self.subset, self.split, self.revision = path, subset, split, revision
        self.how_to_get = how_to_get
        self.description = description
        self.task = None if task is None else RowTemplate(task, "task")
        self.compared = None if compared is None else RowTemplate(compared, "compared")
        self.delimiter = "" if chat else delimiter
        self.shots, self.shots_seed = shots, shots_seed
        self.shots_path, self.shots_split = shots_path or path, shots_split or split
        self.between = delimiter, shots_separator
        self.limit, self.seed = limit, seed
        self.chat, self.turns = chat, turns

    def items(
        self, columns: Collection[str], shot: Callable[[Row], Shot], item: Callable[[Asked], Item]
    ) -> list[Item]:
        """One item for each row that is asked, in the order of the data.

        Args:
            columns: What is read of a row, for errors.
            shot: Makes an example of a row.
            item: Makes an item of a row and its examples.

        Raises:
            SFTError: The data isn't there, has too few rows for the examples, or a row can't be made one.
        """
        items = []
        for asked in self._asked(columns, shot):
            with at(asked.where):
                items.append(item(asked))
        return items

    def results(self, records: Sequence[Record]) -> Results:
        """Each metric over all rows; with `task` over each part, too."""
        metrics = records[0].metrics if records else ()
        scores = [s for metric in metrics for s in scores_by_task(records, metric, self.name)]
        if self.task is None:
            scores = [score for score in scores if score.name == self.name]
        return Results(tuple(scores), tuple(records))

    def _asked(self, columns: Collection[str], shot: Callable[[Row], Shot]) -> Iterator[Asked]:
        rows = self._read(self.path, self.split, columns)
        pool: list[tuple[str, Row]] = []
        if self.shots:
            same = (self.shots_path, self.shots_split) == (self.path, self.split)
            pool = rows if same else self._read(self.shots_path, self.shots_split, columns)
        examples = _Examples(pool, self.shots, self.shots_seed, self.shots_path)
        made: dict[int, Shot] = {}
        for number in chosen(len(rows), self.limit, self.seed):
            where, row = rows[number]
            indices = examples.of(number, row) if self.shots else ()
            for index in indices:
                if index not in made:
                    with at(pool[index][0]):
                        made[index] = shot(pool[index][1])
            yield Asked(number, where, row, [made[index] for index in indices])

    def prompt(self, asked: Asked, question: str) -> Prompt:
        """The prompt that ends in this question."""
        delimiter, separator = self.between
        return FewShot(self.description, asked.shots, delimiter, self.chat, self.turns, separator).prompt(
            question
        )

    def task_of(self, row: Row) -> str:
        """The part that a row belongs to."""
        return self.name if self.task is None else self.task.render(row)

    def text_of(self, row: Row, question: str) -> str:
        """What training data is compared with."""
        return question if self.compared is None else self.compared.render(row)

    def _read(self, path: str, split: str | None, columns: Collection[str]) -> list[tuple[str, Row]]:
        local = Path(path).expanduser()
        is_file = local.is_file() or bool(local.suffix) or path.startswith("tiny:")
        if is_file and path == self.path and split != self.split:
            raise SFTError(
                f"a file has no split {split!r}", where=path, fix="name the examples' file in `shots_path`"
            )
        source = Source(path)
        if not is_file:
            source = Source(path, subset=self.subset, split=split, revision=self.revision)
        try:
            return [(str(meta), row) for meta, row in read_rows(source)]
        except SFTError as error:
            if local.exists():
                raise
            get = f"{self.how_to_get}; " if self.how_to_get else ""
            raise SFTError(
                f"{self.name} has no data: {error.what}",
                where=error.where,
                fix=f"{get}give as `path` a file (.jsonl, .json, .csv, .parquet) with the columns "
                f"{', '.join(sorted(columns))}. {error.fix or ''}".rstrip(),
            ) from error


@dataclass
class _Examples:
    """Chooses each question's examples from a pool of rows."""

    pool: Sequence[tuple[str, Row]]
    count: int
    seed: int | None
    where: str

    @cached_property
    def contents(self) -> list[str]:
        return [_content(row) for _, row in self.pool]

    @cached_property
    def copies(self) -> Counter[str]:
        return Counter(self.contents)

    def of(self, number: int, row: Row) -> list[int]:
        """The indices of a row's examples: the first ones, or some at random, but never the row itself."""
        own = _content(row)
        size = min(len(self.pool), self.count + self.copies[own])
        order: Sequence[int] = range(size)
        if self.seed is not None:
            order = random.Random(f"{self.seed}:{number}").sample(range(len(self.pool)), size)
        found = [index for index in order if self.contents[index] != own][: self.count]
        if len(found) < self.count:
            raise SFTError(
                f"there are only {len(found)} other rows for examples; shots is {self.count}",
                where=self.where,
                fix="lower `shots`, or give more rows",
            )
        return found


@contextmanager
def at(where: str) -> Iterator[None]:
    """Within this context an SFTError is placed at a row."""
    try:
        yield
    except SFTError as error:
        raise error.at(where) from error


def _content(row: Row) -> str:
    return json.dumps(row, sort_keys=True, default=str)
