"""Conversations that are too short or too long."""

from __future__ import annotations

from typing import Literal

from lightning_sft import Conversation, Filter, Segments, SFTError, Verdict
from lightning_sft_filters.parts import Part, at_least, said, text_of


class Length(Filter):
    """Keeps conversations with so many words, characters or turns.

    Args:
        least: The fewest; None is no limit.
        most: The most; None is no limit.
        unit: What is counted: `words` (what whitespace parts), `characters`, or `turns` (messages other than system
            messages, or segments).
        part: Where: in what the assistant says (`response`), in what all others say (`prompt`), or in the whole
            `conversation`.
    """

    def __init__(
        self,
        least: int | None = 1,
        most: int | None = None,
        unit: Literal["words", "characters", "turns"] = "words",
        part: Part = "response",
    ) -> None:
        at_least(self, "least", least, 0)
        at_least(self, "most", most, least or 0)
        if least is None and most is None:
            raise SFTError("neither least nor most is given", where="data.filters (Length)", fix="give one")
        self.least, self.most = least, most
        self.unit = unit
        self.part: Part = part

    def judge(self, conversation: Conversation | Segments) -> Verdict:
        """Drops what is out of the limits, with the count as the score."""
        count = self._count(conversation)
        where = f"{self.unit} in the {self.part}"
        if self.least is not None and count < self.least:
            return Verdict(f"fewer than {self.least:,} {where}", count)
        if self.most is not None and count > self.most:
            return Verdict(f"more than {self.most:,} {where}", count)
        return Verdict(score=count)

    def _count(self, conversation: Conversation | Segments) -> int:
        if self.unit == "turns":
            return sum(role not in ("system", "developer") for role, _ in said(conversation, self.part))
        text = text_of(conversation, self.part)
        return len(text) if self.unit == "characters" else len(text.split())
