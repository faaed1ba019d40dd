"""The parts of a conversation that filters look at."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Literal

from lightning_sft import Conversation, Segments, SFTError, turns

Part = Literal["prompt", "response", "conversation"]
"""What the assistant says (`response`), what all others say (`prompt`), or everything."""


def said(item: Conversation | Segments, part: Part) -> list[tuple[str, str]]:
    """Role and text of each message of a part, in order; messages without any text are left out."""
    wanted = {"prompt": (False,), "response": (True,), "conversation": (True, False)}[part]
    return [(role, text) for role, text in turns(item) if text and (role == "assistant") in wanted]


def text_of(item: Conversation | Segments, part: Part) -> str:
    """The text of a part: its messages, a line or more each; segments as they stand, one behind the other."""
    return ("" if isinstance(item, Segments) else "\n").join(text for _, text in said(item, part))


def normal(text: str) -> str:
    """The text as it is compared: in Unicode's form NFKC, without case, whitespace as single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


class _WithoutSigns(dict[int, int | None]):
    """What `str.translate` makes of each character: nothing of punctuation and symbols."""

    def __missing__(self, code: int) -> int | None:
        self[code] = None if unicodedata.category(chr(code))[0] in "PS" else code
        return self[code]


_WITHOUT_SIGNS = _WithoutSigns()


def words_of(text: str) -> list[str]:
    """The words of a text as GPT-3's authors compare them: lower case, without punctuation, cut at whitespace."""
    return text.casefold().translate(_WITHOUT_SIGNS).split()


def at_least(filter: object, option: str, value: float | None, least: float) -> None:
    """Refuse an option that is too small.

    Raises:
        SFTError: It is below `least`.
    """
    if value is not None and value < least:
        raise SFTError(
            f"{option} is {value}",
            where=f"data.filters ({type(filter).__name__})",
            fix=f"give {least} or more",
        )


def excerpt(texts: Sequence[str], most: int = 80) -> str:
    """Texts in one line, shortened."""
    text = " ".join(" ".join(texts).split())
    return text if len(text) <= most else text[: most - 1] + "…"
