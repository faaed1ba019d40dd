"""Flan: inputs and targets, as they stand or from several templates per task."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_sft import Conversation, DataFormat, Message, Meta, Row, RowTemplate, SFTError
from lightning_sft_formats.fields import read_column, read_filled, read_name

ANY_TASK = "*"
"""The key of the templates for tasks that have none of their own."""


@dataclass(frozen=True)
class FlanTemplate:
    """One way to put a task.

    Args:
        inputs: The Jinja template of the user's turn, over the row's columns.
        targets: The Jinja template of the response to learn.
    """

    inputs: str
    targets: str


class Flan(DataFormat):
    """Rows with inputs and targets, or with a task's columns and several templates for each task.

    Args:
        inputs: The column that holds the input, for rows whose task has no templates.
        targets: The column that holds the response to learn.
        task: The column that holds the task's name; may be absent.
        templates: The templates of each task, by its name; `*` for all other tasks. A template names columns as
            `{{ premise }}`.
        use: How many of its task's templates a row is put in: one, drawn by the row's content, or all.
        seed: Another seed draws other templates.
    """

    def __init__(
        self,
        inputs: str = "inputs",
        targets: str = "targets",
        task: str = "task_name",
        templates: dict[str, list[FlanTemplate]] | None = None,
        use: Literal["one", "all"] = "one",
        seed: int = 0,
    ) -> None:
        self.inputs = inputs
        self.targets = targets
        self.task = task
        self.templates = templates or {}
        self.use = use
        self.seed = seed
        for name, of_task in self.templates.items():
            if not of_task:
                raise SFTError("there is no template", where=f"templates, task {name!r}")
            for number, template in enumerate(of_task):
                _parts(template, _where(name, number))

    def matches(self, columns: frozenset[str]) -> bool:
        """Whether the inputs and the targets are there."""
        return {self.inputs, self.targets} <= columns

    def convert(self, row: Row) -> Iterable[Conversation]:
        """One conversation; with `use: all` one for each template of the row's task."""
        task = read_name(row, self.task)
        name = task if task is not None and task in self.templates else ANY_TASK
        if name not in self.templates:
            inputs = read_column(row, self.inputs, "inputs")
            targets = read_column(row, self.targets, "targets")
            return [_conversation(inputs, f"key {self.inputs!r}", targets, f"key {self.targets!r}", task)]
        templates = self.templates[name]
        numbers = range(len(templates)) if self.use == "all" else [self._draw(row, templates)]
        return [_from_template(row, templates[number], _where(name, number), task) for number in numbers]

    def _draw(self, row: Row, templates: Sequence[FlanTemplate]) -> int:
        """The number of a template, evenly spread over rows and always the same for the same contents."""
        named = {name for each in templates for part in _parts(each, "templates") for name in part.columns}
        content = json.dumps([self.seed, *(row.get(name) for name in sorted(named))], default=str)
        return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big") % len(templates)


def _from_template(row: Row, template: FlanTemplate, where: str, task: str | None) -> Conversation:
    inputs, targets = _parts(template, where)
    return _conversation(inputs.render(row), inputs.where, targets.render(row), targets.where, task)


def _parts(template: FlanTemplate, where: str) -> tuple[RowTemplate, RowTemplate]:
    return RowTemplate(template.inputs, f"{where}, inputs"), RowTemplate(
        template.targets, f"{where}, targets"
    )


def _conversation(
    inputs: object, inputs_where: str, targets: object, targets_where: str, task: str | None
) -> Conversation:
    messages = (
        Message("user", read_filled(inputs, inputs_where, "input")),
        Message("assistant", read_filled(targets, targets_where)),
    )
    return Conversation(messages, meta=Meta(task=task))


def _where(name: str, number: int) -> str:
    return f"templates, task {name!r}, template {number + 1}"
