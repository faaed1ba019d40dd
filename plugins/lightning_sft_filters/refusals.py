"""Answers that refuse, or speak of being a model."""

from __future__ import annotations

import re
from pathlib import Path

from lightning_sft import Conversation, Filter, Segments, SFTError, Verdict, turns
from lightning_sft_filters.parts import at_least, normal

OURS = Path(__file__).with_name("refusals.txt")


class Refusals(Filter):
    """Drops conversations in which the assistant says "As an AI language model" or the like.

    Phrases are found as whole words, whatever their case, whitespace and apostrophes. The detail names the one found.

    Args:
        phrases: A text file with other phrases, one in a line; lines that begin with # are comments. By default
            English ones of assistants that refuse or tell what they are.
        within: Look only at the first so many characters of each answer, where refusals mostly stand.
    """

    def __init__(self, phrases: str | None = None, within: int | None = None) -> None:
        at_least(self, "within", within, 1)
        self.phrases = read_phrases(OURS if phrases is None else Path(phrases).expanduser())
        self.within = within
        either = "|".join(map(re.escape, sorted(self.phrases, key=len, reverse=True)))
        self.pattern = re.compile(rf"(?<!\w)(?:{either})(?!\w)")

    def judge(self, conversation: Conversation | Segments) -> Verdict:
        """Drops it for the first phrase in any of the assistant's messages."""
        for role, text in turns(conversation):
            if role == "assistant" and (found := self.pattern.search(_plain(text[: self.within]))):
                return Verdict("the assistant refuses, or speaks of being a model", detail=found.group())
        return Verdict()


def read_phrases(path: Path) -> list[str]:
    """The phrases in a file, as they are compared.

    Raises:
        SFTError: It can't be read, or there are none in it.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SFTError(
            f"the file can't be read: {error}",
            where=f"data.filters (Refusals): {path}",
            fix="give a text file in UTF-8 with one phrase in a line",
        ) from error
    found = [phrase for line in lines if not line.startswith("#") and (phrase := _plain(line))]
    if not found:
        raise SFTError("there is no phrase in it", where=f"data.filters (Refusals): {path}", fix="write some")
    return found


def _plain(text: str) -> str:
    return normal(text).replace("\u2019", "'")
