"""Dolly: instruction, optional context, response."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_sft import Conversation, DataFormat, Meta, Row
from lightning_sft_formats.fields import read_column, read_name, read_turns


class Dolly(DataFormat):
    """Rows with an instruction, a context that may be empty, a response and a category.

    The user's turn is the instruction, then a blank line and the context if there is one.

    Args:
        instruction: The column that holds the instruction.
        context: The column that holds the text that the instruction is about; may be absent or empty.
        response: The column that holds the response to learn.
        category: The column that holds the task's name; may be absent.
    """

    def __init__(
        self,
        instruction: str = "instruction",
        context: str = "context",
        response: str = "response",
        category: str = "category",
    ) -> None:
        self.instruction = instruction
        self.context = context
        self.response = response
        self.category = category

    def matches(self, columns: frozenset[str]) -> bool:
        """Whether the instruction, the context and the response column are there."""
        return {self.instruction, self.context, self.response} <= columns

    def convert(self, row: Row) -> Iterable[Conversation]:
        """One conversation: the instruction with its context, and the response."""
        instruction = read_column(row, self.instruction, "instruction")
        response = read_column(row, self.response, "response")
        prompt = [(self.instruction, instruction), (self.context, row.get(self.context))]
        turns = read_turns(prompt, self.response, response)
        return [Conversation(turns, meta=Meta(task=read_name(row, self.category)))]
