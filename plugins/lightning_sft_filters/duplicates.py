"""Conversations that were there before."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import blake2b

from lightning_sft import Conversation, Segments, SetFilter, Verdict
from lightning_sft_filters.parts import Part, normal, said


class Duplicates(SetFilter):
    """Keeps the first of those that have the same text, over all sources.

    Keeps 16 bytes of each text, and where it is from, in memory: about 0.25 GB for a million rows. Conversations
    without any text in the part are kept.

    Args:
        part: What has to be the same: what is asked (`prompt`), what is answered (`response`), or the whole
            `conversation`, with its tools.
        normalize: Texts also count as the same if they differ in case, in whitespace, or in Unicode's forms of a
            character alone.
    """

    def __init__(self, part: Part = "conversation", normalize: bool = True) -> None:
        self.part: Part = part
        self.normalize = normalize

    def look(self, conversation: Conversation | Segments) -> tuple[bytes | None, str, int]:
        """A hash of the text (128 bits; None if there is none), and the place of the conversation."""
        texts = said(conversation, self.part)
        meta = conversation.meta
        if not texts:
            return None, meta.source, meta.row
        tools = [] if isinstance(conversation, Segments) or self.part == "response" else conversation.tools
        known = [
            type(conversation).__name__,
            [(role, normal(text) if self.normalize else text) for role, text in texts],
            [*tools],
        ]
        return (
            blake2b(json.dumps(known, sort_keys=True).encode(), digest_size=16).digest(),
            meta.source,
            meta.row,
        )

    def begin(self) -> Callable[[tuple[bytes | None, str, int]], Verdict]:
        """A judge that remembers what it has seen."""
        first: dict[bytes, tuple[str, int]] = {}

        def judge(seen: tuple[bytes | None, str, int]) -> Verdict:
            key, source, row = seen
            if key is None:
                return Verdict()
            if key in first:
                place = "{}, row {}".format(*first[key])
                return Verdict(f"the same {self.part} as an earlier one", detail=place)
            first[key] = source, row
            return Verdict()

        return judge
