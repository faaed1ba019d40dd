"""Raw text: every token is trained, without a chat template."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_sft import Conversation, DataFormat, Row, Segments, SFTError
from lightning_sft_formats.fields import read_column, read_filled
from lightning_sft_formats.writing import as_segments

CHAT_COLUMNS = frozenset({"messages", "conversations", "instruction", "prompt", "segments", "role"})
"""Columns that make a `text` beside them a part or a rendering of a chat, as in the original Alpaca files."""


class RawText(DataFormat):
    """Rows with a text that is trained on as it stands.

    Args:
        text: The column that holds the text.
    """

    def __init__(self, text: str = "text") -> None:
        self.text = text

    def matches(self, columns: frozenset[str]) -> bool:
        """Whether the text's column is there, and no column of a chat is."""
        return self.text in columns and not columns & CHAT_COLUMNS

    def convert(self, row: Row) -> Iterable[Segments]:
        """One segment of weight 1: the text, unchanged."""
        text = read_filled(read_column(row, self.text, "text"), f"key {self.text!r}", "text")
        return [Segments(((text, 1.0),))]

    def to_row(self, item: Conversation | Segments) -> dict[str, object]:
        """The text of an item of one segment of weight 1."""
        segments = as_segments(item).segments
        if [weight for _, weight in segments] != [1.0]:
            raise SFTError("only one text of loss weight 1 is raw text; the format Segments holds the others")
        return {self.text: segments[0][0]}
