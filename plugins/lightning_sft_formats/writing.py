"""Writing rows: what the formats share, with errors that say what a format has no place for."""

from __future__ import annotations

import json
from collections.abc import Mapping

from lightning_sft import Conversation, Message, Segments, SFTError
from lightning_sft_formats.fields import TEMPLATE_OPTIONS


def as_conversation(item: Conversation | Segments, *, messages_only: bool = False) -> Conversation:
    """The item, which has to be a conversation.

    Args:
        item: What is to be written.
        messages_only: The format has no place for tools and options of the chat template.

    Raises:
        SFTError: It is text without roles, or has what there is no place for.
    """
    if not isinstance(item, Conversation):
        raise SFTError("text segments have no roles, so no messages can be made of them")
    if item.tools and messages_only:
        raise SFTError("there is no place for the conversation's tools")
    if item.chat_template_kwargs and messages_only:
        raise SFTError(f"there is no place for the conversation's {TEMPLATE_OPTIONS}")
    return item


def write_template_options(conversation: Conversation) -> dict[str, object]:
    """The column with the conversation's options of the chat template, if it has any."""
    options = conversation.chat_template_kwargs
    return {TEMPLATE_OPTIONS: dict(options)} if options else {}


def as_segments(item: Conversation | Segments) -> Segments:
    """The item, which has to be text.

    Raises:
        SFTError: It is a conversation: its text depends on the model's chat template.
    """
    if not isinstance(item, Segments):
        raise SFTError("a conversation becomes text only through a model's chat template")
    return item


def plain_text(message: Message, where: str) -> str:
    """The text of a message that is nothing but role and text.

    Raises:
        SFTError: The message has more than that; says what.
    """
    refuse(message, where, "reasoning", "tool_calls", "tool_call_id", "name", "weight", "part_weights")
    return message.content


def refuse(message: Message, where: str, *fields: str) -> None:
    """Return if the message has none of these fields of `Message`.

    Raises:
        SFTError: It has one.
    """
    for field in fields:
        value = getattr(message, field)
        if value is not None and value != ():
            raise SFTError(f"there is no place for the {message.role} message's {field}", where=where)


def write_weight(weight: float) -> float | int:
    """A loss weight as people write it: 1 and not 1.0."""
    return int(weight) if weight.is_integer() else weight


def write_arguments(arguments: Mapping[str, object] | str) -> str:
    """A tool call's arguments as JSON text, as OpenAI's files have them."""
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
