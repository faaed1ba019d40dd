"""The one canonical form that every data format produces.

A row becomes `Conversation`s (chat turns, rendered through the chat template) or `Segments` (text as it
stands, each piece with a weight). Plain frozen dataclasses: no tensor and no framework type in here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

ROLES = ("system", "developer", "user", "assistant", "tool")
"""The roles a `Message` may have, in the names chat templates use."""

Row = Mapping[str, object]
"""One row of a data file: column name → JSON value."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a tool by the assistant.

    Args:
        name: The function's name.
        arguments: Its arguments: a JSON object, or the text as given where that isn't one.
        id: The call's id, where the data has one.
    """

    name: str
    arguments: Mapping[str, object] | str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class PartWeight:
    """The loss weight of a part of a message.

    Args:
        field: Which of the message's fields the part is in.
        start: Where it begins: a character of the text, or a call by its number, counted from 0.
        end: Behind its end.
        weight: Its loss weight.
    """

    field: Literal["content", "reasoning", "tool_calls"]
    start: int
    end: int
    weight: float


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Args:
        role: One of `ROLES`.
        content: The text of the turn; may be empty when there are `tool_calls`.
        reasoning: What the assistant thought before it answered (`reasoning_content` in chat templates).
        tool_calls: The tools the assistant calls in this turn.
        tool_call_id: For role `tool`: the id of the call that this answers.
        name: The speaker's or the tool's name, where the data has one.
        weight: Loss weight of this turn's tokens; None is the default policy (assistant 1, others 0).
        part_weights: Parts with a weight of their own, in order of their places, without overlap.
    """

    role: str
    content: str = ""
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    weight: float | None = None
    part_weights: tuple[PartWeight, ...] = ()


@dataclass(frozen=True, slots=True)
class Meta:
    """Where a conversation comes from.

    Args:
        source: The file or the Hub dataset it was read from.
        row: Its row there, counted from 1 (the line number in a JSONL file).
        task: The task's name, where the data has one.
        language: The language's code, where the data has one.
    """

    source: str = ""
    row: int = 0
    task: str | None = None
    language: str | None = None

    @property
    def place(self) -> tuple[str, int]:
        """Source and row."""
        return self.source, self.row

    def __str__(self) -> str:
        return f"{self.source}, row {self.row}"


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order.

    Args:
        messages: The messages.
        tools: The tools that the assistant may call (JSON schemas, as given).
        meta: Where it comes from.
        chat_template_kwargs: Options of the chat template for this conversation, such as `enable_thinking`.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, object], ...] = ()
    meta: Meta = field(default_factory=Meta)
    chat_template_kwargs: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Segments:
    """Text that is trained on as it stands, without a chat template: `(text, weight)` pieces in order."""

    segments: tuple[tuple[str, float], ...]
    meta: Meta = field(default_factory=Meta)


def turns(item: Conversation | Segments) -> Iterator[tuple[str, str]]:
    """Who says what: the role of each message, and its whole text with its reasoning and tool calls.

    Of segments, what is trained counts as the assistant's and all else as the user's.
    """
    if isinstance(item, Segments):
        yield from (("assistant" if weight > 0 else "user", text) for text, weight in item.segments)
        return
    for message in item.messages:
        calls = [
            f"{call.name} "
            + (
                call.arguments
                if isinstance(call.arguments, str)
                else json.dumps(call.arguments, ensure_ascii=False)
            )
            for call in message.tool_calls
        ]
        yield message.role, "\n".join(filter(None, [message.reasoning, message.content, *calls]))
