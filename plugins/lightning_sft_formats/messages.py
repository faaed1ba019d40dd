"""Messages: OpenAI's chat format, and lists of typed parts with loss weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Literal

from lightning_sft import Conversation, DataFormat, Message, PartWeight, Row, Segments, SFTError, ToolCall
from lightning_sft_formats.fields import (
    is_blank,
    kind,
    read_calls,
    read_chat,
    read_details,
    read_list,
    read_object,
    read_role,
    read_text,
    read_weight,
)
from lightning_sft_formats.writing import (
    as_conversation,
    write_arguments,
    write_template_options,
    write_weight,
)

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
"""The roles in messages and the canonical role of each."""

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")

PARTS = {
    "reasoning": "reasoning",
    "thinking": "reasoning",
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "tool_call": "tool_call",
}
"""The types of content parts that are known and what each is; in a message they come in this order."""

ORDER = ("reasoning", "text", "tool_call")

FIELDS: Mapping[str, Literal["reasoning", "content", "tool_calls"]] = {
    "reasoning": "reasoning",
    "text": "content",
    "tool_call": "tool_calls",
}
"""The field of a message that parts of each type go to."""


class Messages(DataFormat):
    """Rows with a list of messages `{"role": "user", "content": "…"}`, as OpenAI's fine-tuning files have it.

    The content is text or a list of parts (text, reasoning, tool calls). A message may have a loss weight
    (`weight`, `loss_weight`, `train` or `training`), and so may each part, or ranges of characters (`train_detail`);
    also `tool_calls` and `reasoning_content`.

    Args:
        messages: The column that holds the list of messages.
        tools: The column that holds the tools, as a list or as the JSON text of one; may be absent or empty.
    """

    def __init__(self, messages: str = "messages", tools: str = "tools") -> None:
        self.messages = messages
        self.tools = tools

    def matches(self, columns: frozenset[str]) -> bool:
        """Whether the column with the messages is there."""
        return self.messages in columns

    def convert(self, row: Row) -> Iterable[Conversation]:
        """One conversation with the messages in their order."""
        return [read_chat(row, self.messages, "messages", self.tools, read_message)]

    def to_row(self, item: Conversation | Segments) -> dict[str, object]:
        """The messages as OpenAI's files have them, with reasoning as `reasoning_content`."""
        conversation = as_conversation(item)
        row: dict[str, object] = {self.messages: write_messages(conversation.messages)}
        if conversation.tools:
            row[self.tools] = list(conversation.tools)
        return row | write_template_options(conversation)


def read_messages(value: object, where: str) -> tuple[Message, ...]:
    """The messages in `value`: a list of objects with `role` and `content`, or the JSON text of one.

    Raises:
        SFTError: One of them is malformed, holds something that isn't text, or loses its order.
    """
    return tuple(read_message(m, f"{where}, message {n}") for n, m in enumerate(read_list(value, where), 1))


def write_messages(messages: Iterable[Message]) -> list[dict[str, object]]:
    """The messages in the form that `read_messages` reads."""
    return [_write_message(message) for message in messages]


def read_message(value: object, where: str) -> Message:
    """The message in an object with `role` and `content`.

    Raises:
        SFTError: It is malformed, holds something that isn't text, or loses the order of its parts.
    """
    fields = read_object(value, where)
    role = read_role(fields.get("role"), ROLES, f"{where}, key 'role'")
    content, reasoning, calls, parts = _read_content(fields.get("content"), f"{where}, key 'content'")
    reasoning_field = _optional_text(fields, REASONING_KEYS, where)
    if reasoning and reasoning_field:
        raise SFTError("the reasoning is given as a part and as a key", where=where, fix="keep one of them")
    reasoning = reasoning or reasoning_field
    for key in ("tool_calls", "function_call"):
        if not is_blank(fields.get(key)) and fields[key] != []:
            calls += read_calls(fields[key], f"{where}, key {key!r}")
    if role == "assistant":
        content = content or ""
    elif reasoning or calls:
        raise SFTError(f"a {role} message has reasoning or tool calls: only the assistant can", where=where)
    if content is None:
        raise SFTError(
            "the message has no content", where=where, fix='give it a "content", "" if it is empty'
        )
    weight = read_weight(fields, where)
    if details := read_details(fields, content, where):
        if parts:
            raise SFTError(
                "parts and ranges of characters have loss weights", where=where, fix="keep one of them"
            )
        parts = details
    elif isinstance(fields.get("content"), list):
        weight, parts = _one_weight(fields["content"], weight, parts, where)
    return Message(
        role=role,
        content=content,
        reasoning=reasoning,
        tool_calls=calls,
        tool_call_id=_optional_text(fields, ("tool_call_id",), where),
        name=_optional_text(fields, ("name",), where),
        weight=weight,
        part_weights=parts,
    )


def _write_message(message: Message) -> dict[str, object]:
    fields: dict[str, object] = {"role": message.role, "content": message.content}
    if message.part_weights:
        fields["content"] = list(_write_parts(message))
    elif message.tool_calls and not message.content:
        fields["content"] = None
    if message.reasoning is not None and not message.part_weights:
        fields["reasoning_content"] = message.reasoning
    if message.tool_calls and not message.part_weights:
        fields["tool_calls"] = [_write_call(call) for call in message.tool_calls]
    for key, value in (("tool_call_id", message.tool_call_id), ("name", message.name)):
        if value is not None:
            fields[key] = value
    if message.weight is not None:
        fields["weight"] = write_weight(message.weight)
    return fields


def _write_parts(message: Message) -> Iterator[dict[str, object]]:
    """The message as parts, cut where a weight begins or ends."""
    for what, field in FIELDS.items():
        whole: str | tuple[ToolCall, ...] = getattr(message, field) or ""
        weights = {
            (part.start, part.end): part.weight for part in message.part_weights if part.field == field
        }
        edges = sorted({0, len(whole), *(edge for place in weights for edge in place)})
        for start, end in pairwise(edges):
            piece = whole[start:end]
            value = piece if isinstance(piece, str) else [_write_call(call) for call in piece]
            part: dict[str, object] = {"type": what, "value": value}
            if (start, end) in weights:
                part["weight"] = write_weight(weights[start, end])
            yield part


def _write_call(call: ToolCall) -> dict[str, object]:
    function = {"name": call.name, "arguments": write_arguments(call.arguments)}
    identity = {} if call.id is None else {"id": call.id}
    return {**identity, "type": "function", "function": function}


def _one_weight(
    content: object, weight: float | None, parts: tuple[PartWeight, ...], where: str
) -> tuple[float | None, tuple[PartWeight, ...]]:
    """The message's weight and those of its parts; a weight that all parts have is the message's."""
    listed = read_list(content, where)
    given = [read_weight(read_object(part, where), f"{where}, part {n}") for n, part in enumerate(listed, 1)]
    weights = {weight if each is None else each for each in given}
    return (weights.pop(), ()) if len(weights) == 1 else (weight, parts)


def _read_content(
    value: object, where: str
) -> tuple[str | None, str | None, tuple[ToolCall, ...], tuple[PartWeight, ...]]:
    """Text (None if there is no content at all), reasoning and tool calls, and the weights of parts that have one."""
    if value is None or isinstance(value, str):
        return value, None, (), ()
    if not isinstance(value, list):
        raise SFTError(f"expected text or a list of parts, got {kind(value)}", where=where)
    texts = {"reasoning": "", "text": ""}
    calls: tuple[ToolCall, ...] = ()
    weights: list[PartWeight] = []
    reached = 0
    for number, part in enumerate(value, 1):
        place = f"{where}, part {number}"
        fields = read_object(part, place)
        what = _part_type(fields, place)
        if ORDER.index(what) < reached:
            raise SFTError(
                f"the {what} part comes after another type's, an order that chat templates can't keep",
                where=place,
                fix=f"order the parts as {', '.join(ORDER)}, or split the message",
            )
        reached = ORDER.index(what)
        start = len(calls) if what == "tool_call" else len(texts[what])
        if what == "tool_call":
            calls += read_calls(fields.get("value", fields.get("tool_call")), place)
        else:
            texts[what] += _part_text(fields, place)
        end = len(calls) if what == "tool_call" else len(texts[what])
        weight = read_weight(fields, place)
        if weight is not None and start < end:
            weights.append(PartWeight(FIELDS[what], start, end, weight))
    return texts["text"], texts["reasoning"] or None, calls, tuple(weights)


def _part_type(part: Mapping[str, object], where: str) -> str:
    name = part.get("type")
    if not isinstance(name, str) or name not in PARTS:
        raise SFTError(
            f"the part is of type {name!r}, which is not text",
            where=where,
            fix=f"the types are {', '.join(PARTS)}; rows with images or sound can't be trained on",
        )
    return PARTS[name]


def _part_text(part: Mapping[str, object], where: str) -> str:
    for key in ("value", "text", str(part["type"])):
        if part.get(key) is not None:
            return read_text(part[key], f"{where}, key {key!r}")
    raise SFTError("the part has no text", where=where, fix='write it as {"type": "text", "text": "…"}')


def _optional_text(fields: Mapping[str, object], keys: tuple[str, ...], where: str) -> str | None:
    """The first of these keys that has a text in it."""
    for key in keys:
        if not is_blank(fields.get(key)):
            return read_text(fields[key], f"{where}, key {key!r}")
    return None
