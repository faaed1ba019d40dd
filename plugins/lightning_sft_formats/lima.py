"""LIMA: a list of texts, the user's and the assistant's in turn."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_sft import Conversation, DataFormat, Message, Row
from lightning_sft_formats.fields import check_trained, read_column, read_list, read_text


class Lima(DataFormat):
    """Rows with a list of texts: the user's, the assistant's answer, and so on in turn.

    Args:
        conversations: The column that holds the list.
    """

    def __init__(self, conversations: str = "conversations") -> None:
        self.conversations = conversations

    def matches(self, columns: frozenset[str]) -> bool:
        """Whether the column with the texts is there."""
        return self.conversations in columns

    def fits(self, row: Row) -> bool:
        """Whether the column with the texts is there and they are just texts, not `ShareGPT`'s objects."""
        texts = row.get(self.conversations)
        return isinstance(texts, list) and bool(texts) and isinstance(texts[0], str)

    def convert(self, row: Row) -> Iterable[Conversation]:
        """One conversation, which the user begins."""
        where = f"key {self.conversations!r}"
        texts = read_list(read_column(row, self.conversations, "conversations"), where)
        messages = tuple(
            Message(("user", "assistant")[number % 2], read_text(text, f"{where}, message {number + 1}"))
            for number, text in enumerate(texts)
        )
        check_trained(messages, where)
        return [Conversation(messages)]
