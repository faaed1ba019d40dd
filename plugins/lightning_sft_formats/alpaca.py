"""Alpaca: instruction, optional input, output."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_sft import Conversation, DataFormat, Message, Row, SFTError
from lightning_sft_formats.fields import is_blank, read_column, read_filled, read_list, read_text


class Alpaca(DataFormat):
    """Rows with an instruction, an optional input and the output to learn.

    The user's turn is the instruction, then a blank line and the input if there is one. Earlier turns may
    stand in a column of `[user, assistant]` pairs.

    Args:
        instruction: The column that holds the instruction.
        input: The column that holds the input to the instruction; may be absent or empty.
        output: The column that holds the response to learn.
        system: The column that holds the system prompt; may be absent or empty.
        history: The column that holds earlier turns as a list of `[user, assistant]` pairs; may be absent.
    """

    def __init__(
        self,
        instruction: str = "instruction",
        input: str = "input",
        output: str = "output",
        system: str = "system",
        history: str = "history",
    ) -> None:
        self.instruction = instruction
        self.input = input
        self.output = output
        self.system = system
        self.history = history

    def matches(self, columns: frozenset[str]) -> bool:
        """Whether the instruction and the output column are there."""
        return {self.instruction, self.output} <= columns

    def convert(self, row: Row) -> Iterable[Conversation]:
        """One conversation: the system prompt, the history, the instruction and the response."""
        instruction = read_column(row, self.instruction, "instruction")
        output = read_column(row, self.output, "output")
        messages = [*self._system(row), *self._history(row)]
        messages.append(Message("user", self._prompt(instruction, row.get(self.input))))
        messages.append(Message("assistant", read_filled(output, f"key {self.output!r}")))
        return [Conversation(tuple(messages))]

    def _prompt(self, instruction: object, extra: object) -> str:
        parts = []
        for key, value in ((self.instruction, instruction), (self.input, extra)):
            if not is_blank(value):
                parts.append(read_text(value, f"key {key!r}"))
        if not parts:
            raise SFTError(
                "the instruction is empty",
                where=f"key {self.instruction!r}",
                fix="remove the row or fill in the instruction",
            )
        return "\n\n".join(parts)

    def _system(self, row: Row) -> list[Message]:
        system = row.get(self.system)
        return [] if is_blank(system) else [Message("system", read_text(system, f"key {self.system!r}"))]

    def _history(self, row: Row) -> list[Message]:
        history = row.get(self.history)
        if is_blank(history):
            return []
        messages = []
        for number, turn in enumerate(read_list(history, f"key {self.history!r}"), 1):
            where = f"key {self.history!r}, turn {number}"
            if not isinstance(turn, list) or len(turn) != 2:
                raise SFTError("a turn must be a pair [user, assistant]", where=where)
            messages.append(Message("user", read_text(turn[0], where)))
            messages.append(Message("assistant", read_filled(turn[1], where)))
        return messages
