"""Prompts with reference answers, from data of any format: the last assistant turn is the reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import dropwhile
from typing import Literal

from lightning_sft import (
    Conversation,
    DataFormat,
    Generate,
    Item,
    Meta,
    Segments,
    SFTError,
    Source,
    read_conversations,
)
from lightning_sft_evaluators.prompts import chosen

_FIX = "give data with answers, or remove the row"


@dataclass(frozen=True, slots=True)
class ReferenceData:
    """Rows to answer, and how.

    Args:
        path: A data file, a folder, a Hub id, or embedded data (tiny:held_out).
        format: The rows' format; auto finds the one that fits the columns.
        subset: The configuration of a Hub dataset.
        split: The split of a Hub dataset.
        limit: Only so many rows: the first; with `seed`, some at random.
        seed: Seed of that choice.
        stop: Texts that end an answer.
        max_new_tokens: Most tokens of an answer.
        temperature: 0 takes the likeliest token each time; else tokens are drawn, each time alike.
    """

    path: str
    format: DataFormat | Literal["auto"] = "auto"
    subset: str | None = None
    split: str | None = None
    limit: int | None = None
    seed: int | None = None
    stop: list[str] | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0

    def check(self, where: str) -> None:
        """Whether the numbers make sense.

        Raises:
            SFTError: One doesn't; says which.
        """
        for name, value, least in (("limit", self.limit, 1), ("max_new_tokens", self.max_new_tokens, 1)):
            if value is not None and value < least:
                raise SFTError(f"{name} is {value}", where=f"{where}.{name}", fix=f"give {least} or more")
        if self.temperature < 0:
            raise SFTError(
                f"temperature is {self.temperature}", where=f"{where}.temperature", fix="give 0 or more"
            )

    def items(self, name: str) -> list[Item]:
        """An item for each row: what comes before the last answer is asked, the answer is the target.

        Args:
            name: The task of rows that have none.

        Raises:
            SFTError: A row can't be read or has no answer; says which.
        """
        read = list(self._read())
        items = []
        for number in chosen(len(read), self.limit, self.seed):
            prompt, reference, meta = read[number]
            asked = Generate(prompt, tuple(self.stop or ()), self.max_new_tokens, self.temperature)
            items.append(Item(meta.task or name, number, (asked,), reference, {"row": str(meta)}))
        return items

    def _read(self) -> Iterator[tuple[str | Conversation, str, Meta]]:
        source = Source(self.path, self.format, subset=self.subset, split=self.split)
        for each in read_conversations(source):
            if isinstance(each, Segments):
                yield (*_last_segments(each), each.meta)
            else:
                yield (*_last_turn(each), each.meta)


def _last_turn(conversation: Conversation) -> tuple[Conversation, str]:
    """What is asked: all before the last assistant turn, with the row's tools and options; and that turn's text."""
    messages = conversation.messages
    last = max((n for n, each in enumerate(messages) if each.role == "assistant"), default=0)
    if not last:
        raise SFTError("there is no assistant turn after a prompt", where=str(conversation.meta), fix=_FIX)
    if not messages[last].content.strip():
        raise SFTError("the last assistant turn has no text", where=str(conversation.meta), fix=_FIX)
    asked = replace(conversation, messages=messages[:last], meta=Meta())
    return asked, messages[last].content


def _last_segments(each: Segments) -> tuple[str, str]:
    """What is asked: the text before the last trained segments; and their text."""
    backwards = list(dropwhile(lambda segment: not segment[1], reversed(each.segments)))
    size = next((n for n, (_, weight) in enumerate(backwards) if not weight), len(backwards))
    prompt = "".join(text for text, _ in reversed(backwards[size:]))
    reference = "".join(text for text, _ in reversed(backwards[:size]))
    if not prompt or not reference.strip():
        raise SFTError("the row is text without a prompt", where=str(each.meta), fix=_FIX)
    return prompt, reference


def said(text: str) -> str:
    """What a model said: what it wrote, without the thought before `</think>` and white space at the ends."""
    return text.rpartition("</think>")[2].strip()
