"""Reading one field of a row: what the formats share, with errors that name the key."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches

from lightning_sft import Conversation, Message, PartWeight, Row, SFTError, ToolCall

TEMPLATE_OPTIONS = "chat_template_kwargs"
"""The column with a row's options of the chat template."""

_WEIGHT_KEYS = ("weight", "loss_weight", "train", "training")
_CALL_TYPES = (None, "function", "function_call", "tool_call")
_DETAIL_KEYS = ("train_detail", "training_detail")


def read_column(row: Row, key: str, option: str, within: str | None = None) -> object:
    """The value under `key` of a row, or of an object within a row.

    Args:
        row: The row or the object.
        key: The column's name.
        option: The format's option that names this column; the error points to it.
        within: Where the object stands in its row.

    Raises:
        SFTError: There is no such column; the error lists those that are there.
    """
    if key not in row:
        there = ", ".join(map(repr, row)) or "nothing"
        raise SFTError(
            f"the key {key!r} is missing",
            where=within,
            fix=f"there is {there}; name the right one with the format's option `{option}`",
        )
    return row[key]


def read_text(value: object, where: str) -> str:
    """`value`, which has to be text.

    Raises:
        SFTError: It is something else.
    """
    if not isinstance(value, str):
        raise SFTError(
            f"expected text, got {kind(value)}", where=where, fix="write the value as a JSON string"
        )
    return value


def read_filled(value: object, where: str, name: str = "response") -> str:
    """`value`, which has to be text with something in it.

    Args:
        value: The value.
        where: The place, for the error.
        name: What the value is, for the error.

    Raises:
        SFTError: It is empty, only whitespace, null or not text.
    """
    if is_blank(value):
        raise SFTError(f"the {name} is empty", where=where, fix=f"remove the row or fill in the {name}")
    return read_text(value, where)


def is_blank(value: object) -> bool:
    """Whether `value` is null or text without anything but whitespace."""
    return value is None or (isinstance(value, str) and not value.strip())


def read_list(value: object, where: str) -> list[object]:
    """`value`, which has to be a list, or the JSON text of one (as CSV files hold it).

    Raises:
        SFTError: It is neither.
    """
    if isinstance(value, str):
        value = read_json(value, where)
    if not isinstance(value, list):
        raise SFTError(f"expected a list, got {kind(value)}", where=where)
    return value


def read_object(value: object, where: str) -> Mapping[str, object]:
    """`value`, which has to be a JSON object.

    Raises:
        SFTError: It is something else.
    """
    if not isinstance(value, Mapping):
        raise SFTError(f"expected a JSON object, got {kind(value)}", where=where)
    return value


def read_json(text: str, where: str) -> object:
    """What the JSON `text` says.

    Raises:
        SFTError: It isn't JSON.
    """
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise SFTError(f"malformed JSON ({error})", where=where, fix="write valid JSON") from error


def read_chat(
    row: Row, key: str, option: str, tools: str, read_message: Callable[[object, str], Message]
) -> Conversation:
    """The conversation in a row that has a list of messages.

    Args:
        row: The row.
        key: The column that holds the list, or the JSON text of one.
        option: The format's option that names this column; an error points to it.
        tools: The column that holds the tools.
        read_message: Reads one message, given its value and its place for errors.

    Raises:
        SFTError: The list or one of its messages is malformed, or there is nothing to train on.
    """
    where = f"key {key!r}"
    values = read_list(read_column(row, key, option), where)
    messages = tuple(read_message(value, f"{where}, message {n}") for n, value in enumerate(values, 1))
    check_trained(messages, where)
    return Conversation(messages, read_row_tools(row, tools), chat_template_kwargs=read_template_options(row))


def read_template_options(row: Row) -> Mapping[str, object]:
    """The row's options of the chat template: an object, or the JSON text of one, in `chat_template_kwargs`."""
    where, value = f"key {TEMPLATE_OPTIONS!r}", row.get(TEMPLATE_OPTIONS)
    if is_blank(value):
        return {}
    options = read_object(read_json(value, where) if isinstance(value, str) else value, where)
    return {name: option for name, option in options.items() if option is not None}


def read_row_tools(row: Row, key: str) -> tuple[Mapping[str, object], ...]:
    """The row's tools: from the column `key`, or from OpenAI's older `functions`."""
    if is_blank(row.get(key)):
        key = "functions"
    return read_tools(row.get(key), f"key {key!r}")


def read_tools(value: object, where: str) -> tuple[Mapping[str, object], ...]:
    """The tools of a conversation, as given: from a list of JSON schemas or the JSON text of one.

    None and the empty text mean no tools.
    """
    if is_blank(value):
        return ()
    tools = read_list(value, where)
    return tuple(read_object(tool, f"{where}, tool {n}") for n, tool in enumerate(tools, 1))


def read_calls(value: object, where: str) -> tuple[ToolCall, ...]:
    """The tool calls in `value`: an object `{"name", "arguments"}`, OpenAI's `{"id", "function"}`, a list
    of these, or the JSON text of any of them.

    Raises:
        SFTError: It isn't a tool call.
    """
    if isinstance(value, str):
        value = read_json(value, where)
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise SFTError("there is no tool call in the list", where=where)
    return tuple(_read_call(call, where) for call in calls)


def _read_call(value: object, where: str) -> ToolCall:
    call = read_object(value, where)
    if (what := call.get("type")) not in _CALL_TYPES:
        raise SFTError(
            f"the tool call is of type {what!r}", where=where, fix='write it as {"name": …, "arguments": {…}}'
        )
    function = call if call.get("function") is None else read_object(call["function"], where)
    name, call_id = function.get("name"), call.get("id")
    if not isinstance(name, str) or not name:
        raise SFTError(
            "the tool call has no name", where=where, fix='write it as {"name": …, "arguments": {…}}'
        )
    arguments = function.get("arguments", function.get("parameters"))
    return ToolCall(
        name=name,
        arguments=_read_arguments(arguments, where),
        id=None if call_id is None else read_text(call_id, f"{where}, key 'id'"),
    )


def _read_arguments(value: object, where: str) -> Mapping[str, object] | str:
    if value is None:
        return {}
    if not isinstance(value, str):
        return read_object(value, f"{where}, key 'arguments'")
    try:
        parsed = json.loads(value)
    except (json.JSONDecodeError, RecursionError):
        return value
    return parsed if isinstance(parsed, dict) else value


def read_turns(
    prompt: Sequence[tuple[str, object]], answer: str, response: object
) -> tuple[Message, Message]:
    """A user turn of the texts of some columns, those that are blank left out, and the assistant's answer.

    Args:
        prompt: Column name and value of each, in order; they are joined by blank lines.
        answer: The column that holds the response.
        response: Its value.

    Raises:
        SFTError: All of the prompt is blank, the response is, or one of them isn't text.
    """
    texts = [read_text(value, f"key {key!r}") for key, value in prompt if not is_blank(value)]
    if not texts:
        raise SFTError(
            "the instruction is empty",
            where=f"key {prompt[0][0]!r}",
            fix="remove the row or fill in the instruction",
        )
    text = read_filled(response, f"key {answer!r}")
    return Message("user", "\n\n".join(texts)), Message("assistant", text)


def read_name(row: Row, key: str) -> str | None:
    """The name in a column that may be absent: of a task or a language, as text or a number; None if blank.

    Raises:
        SFTError: It is something else.
    """
    value = row.get(key)
    if is_blank(value):
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return read_text(value, f"key {key!r}")


def read_role(value: object, roles: Mapping[str, str], where: str) -> str:
    """The canonical role for a format's own name of it.

    Args:
        value: The name in the data.
        roles: The format's names and the canonical role of each.
        where: The place, for the error.

    Raises:
        SFTError: The name isn't known.
    """
    if isinstance(value, str) and value in roles:
        return roles[value]
    close = get_close_matches(value.lower(), roles, n=1) if isinstance(value, str) else []
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise SFTError(f"unknown role {value!r}", where=where, fix=f"{hint}the roles are {', '.join(roles)}")


def read_weight(
    message: Mapping[str, object], where: str, keys: Sequence[str] = _WEIGHT_KEYS
) -> float | None:
    """A message's loss weight: from `weight`, `loss_weight`, `train` or `training`; None if it has none.

    Args:
        message: The message, or a part or segment of a text.
        where: Its place, for the error.
        keys: The keys that may hold the weight.

    Raises:
        SFTError: It isn't a number of 0 or more, or two keys contradict each other.
    """
    given = {key: message[key] for key in keys if message.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise SFTError(
                f"expected a number of 0 or more, or true or false, got {value!r}",
                where=f"{where}, key {key!r}",
            )
    weights = {float(value) for value in given.values() if isinstance(value, int | float)}
    if len(weights) > 1:
        raise SFTError(
            f"the loss weight is given more than once: {given}", where=where, fix="keep one of them"
        )
    return weights.pop() if weights else None


def read_details(message: Mapping[str, object], content: str, where: str) -> tuple[PartWeight, ...]:
    """The weights of ranges of the content's characters, from `train_detail` or `training_detail`.

    Each range is an object with `begin_offset`, `end_offset` (its last character, counted from 0) and `train`.
    Characters outside of all ranges aren't trained, as in Axolotl.

    Raises:
        SFTError: A range is malformed, outside of the content, or overlaps the one before.
    """
    key = next((key for key in _DETAIL_KEYS if message.get(key) not in (None, [])), None)
    if key is None:
        return ()
    parts: list[PartWeight] = []
    done = 0
    for number, value in enumerate(read_list(message[key], f"{where}, key {key!r}"), 1):
        place = f"{where}, key {key!r}, range {number}"
        fields = read_object(value, place)
        start, last = fields.get("begin_offset"), fields.get("end_offset")
        weight = read_weight(fields, place)
        if (
            not isinstance(start, int)
            or not isinstance(last, int)
            or not done <= start <= last < len(content)
        ):
            raise SFTError(
                f"characters {start!r} to {last!r} are no range of the content's {len(content)} after {done}",
                where=place,
                fix="order the ranges, without overlap; end_offset is the last character, counted from 0",
            )
        if weight is None:
            raise SFTError("the range doesn't say whether it is trained", where=place, fix='give it "train"')
        if done < start:
            parts.append(PartWeight("content", done, start, 0.0))
        parts.append(PartWeight("content", start, last + 1, weight))
        done = last + 1
    if done < len(content):
        parts.append(PartWeight("content", done, len(content), 0.0))
    return tuple(parts)


def check_trained(messages: Sequence[Message], where: str) -> None:
    """Return if the conversation has something to train on and no assistant turn is empty.

    Raises:
        SFTError: It hasn't, or one is.
    """
    for number, message in enumerate(messages, 1):
        if message.role == "assistant" and not message.tool_calls:
            read_filled(message.content, f"{where}, message {number}")
    if not any(
        (m.role == "assistant" if m.weight is None else m.weight > 0)
        or any(p.weight > 0 for p in m.part_weights)
        for m in messages
    ):
        raise SFTError(
            "there is nothing to train on: no assistant message with a loss weight above 0",
            where=where,
            fix="remove the row or add the assistant's response",
        )


def kind(value: object) -> str:
    """How an error calls a JSON value of this kind."""
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return "a JSON object"
    names = {bool: "true or false", list: "a list", str: "text"}
    return names.get(type(value), f"a value of type {type(value).__name__}")
