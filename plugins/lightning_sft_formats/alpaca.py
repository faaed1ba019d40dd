"""Alpaca: instruction, optional input, output."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_sft import Conversation, DataFormat, Message, Row, Segments, SFTError
from lightning_sft_formats.fields import is_blank, read_column, read_filled, read_list, read_text, read_turns
from lightning_sft_formats.writing import as_conversation, plain_text


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
        prompt = [(self.instruction, instruction), (self.input, row.get(self.input))]
        turns = read_turns(prompt, self.output, output)
        return [Conversation((*self._system(row), *self._history(row), *turns))]

    def to_row(self, item: Conversation | Segments) -> dict[str, object]:
        """The last user turn as the instruction, without an input, and the turns before it as the history."""
        messages = list(as_conversation(item, messages_only=True).messages)
        texts = [plain_text(message, f"message {n}") for n, message in enumerate(messages, 1)]
        row: dict[str, object] = {}
        if messages and messages[0].role == "system":
            row[self.system] = texts.pop(0)
            messages.pop(0)
        if not messages or [m.role for m in messages] != ["user", "assistant"] * (len(messages) // 2):
            raise SFTError(
                f"the roles are {', '.join(m.role for m in messages)}; Alpaca rows have user and assistant in "
                "turn, after at most one system message"
            )
        pairs = [[user, answer] for user, answer in zip(texts[::2], texts[1::2], strict=True)]
        row |= {self.instruction: pairs[-1][0], self.input: "", self.output: pairs[-1][1]}
        if pairs[:-1]:
            row[self.history] = pairs[:-1]
        return row

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
