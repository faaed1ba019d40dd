"""Segments: text in pieces, each with a flag that says whether it is trained."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_sft import Conversation, DataFormat, Row, SFTError
from lightning_sft import Segments as TextSegments
from lightning_sft_formats.fields import read_column, read_list, read_object, read_text, read_weight
from lightning_sft_formats.writing import as_segments, write_weight

FLAGS = ("label", "weight", "loss_weight", "train", "training")
"""The keys of a segment that may hold its flag."""


class Segments(DataFormat):
    """Rows with a list of segments `{"text": "…", "label": true}`, trained where the flag says so.

    The texts are joined as they stand, without a chat template and without a space between them. The flag is true
    or false or a loss weight, under `label`, `weight`, `loss_weight`, `train` or `training`; a segment may also
    be a pair `["…", true]`.

    Args:
        segments: The column that holds the list.
    """

    def __init__(self, segments: str = "segments") -> None:
        self.segments = segments

    def matches(self, columns: frozenset[str]) -> bool:
        """Whether the column with the segments is there."""
        return self.segments in columns

    def convert(self, row: Row) -> Iterable[TextSegments]:
        """One text in its pieces, with the weight of each."""
        where = f"key {self.segments!r}"
        values = read_list(read_column(row, self.segments, "segments"), where)
        pieces = tuple(_read(value, f"{where}, segment {n}") for n, value in enumerate(values, 1))
        if not any(weight > 0 and text for text, weight in pieces):
            raise SFTError(
                "there is nothing to train on: no text with a flag that is true or a weight above 0",
                where=where,
                fix="remove the row or flag the text to learn",
            )
        return [TextSegments(pieces)]

    def to_row(self, item: Conversation | TextSegments) -> dict[str, object]:
        """The pieces, with a `label` where the weights are 0 or 1 and a `weight` where one isn't."""
        return {self.segments: [_write(text, weight) for text, weight in as_segments(item).segments]}


def _read(value: object, where: str) -> tuple[str, float]:
    if isinstance(value, list):
        if len(value) != 2:
            raise SFTError("a segment must be an object or a pair [text, flag]", where=where)
        value = {"text": value[0], "label": value[1]}
    fields = read_object(value, where)
    text = read_text(fields.get("text"), f"{where}, key 'text'")
    weight = read_weight(fields, where, FLAGS)
    if weight is None:
        raise SFTError(
            "the segment has no flag that says whether it is trained",
            where=where,
            fix='write it as {"text": "…", "label": true}',
        )
    return text, weight


def _write(text: str, weight: float) -> dict[str, object]:
    flag = {"label": weight == 1} if weight in (0, 1) else {"weight": write_weight(weight)}
    return {"text": text, **flag}
