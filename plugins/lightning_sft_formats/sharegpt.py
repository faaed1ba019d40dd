"""ShareGPT: a list of turns with `from` and `value`, with tool calls and observations."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace

from lightning_sft import Conversation, DataFormat, Message, Row, Segments, SFTError
from lightning_sft_formats.fields import (
    is_blank,
    read_calls,
    read_chat,
    read_column,
    read_details,
    read_object,
    read_role,
    read_text,
    read_weight,
)
from lightning_sft_formats.writing import as_conversation, refuse, write_template_options, write_weight

CALL = "function_call"

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    CALL: CALL,
    "system": "system",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}
"""The speakers' names in ShareGPT files and the role of each; a function call is an assistant's turn."""

SPEAKERS = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}
"""The name under which a turn of each role is written."""


class ShareGPT(DataFormat):
    """Rows with a list of turns `{"from": "human", "value": "…"}`.

    The speakers are human, gpt, system, function_call and observation, and a few other usual names. A turn may
    have a loss weight (`weight`, `loss_weight`, `train` or `training`), or some for ranges of its characters
    (`train_detail` or `training_detail`).

    Args:
        conversations: The column that holds the list of turns.
        tools: The column that holds the tools, as a list or as the JSON text of one; may be absent or empty.
        role_key: The key of a turn that names the speaker.
        content_key: The key of a turn that holds its text.
        system: The column that holds the system prompt; may be absent or empty.
        roles: More names of speakers, each with what it stands for: user, assistant, system, tool or
            function_call.
    """

    def __init__(
        self,
        conversations: str = "conversations",
        tools: str = "tools",
        role_key: str = "from",
        content_key: str = "value",
        system: str = "system",
        roles: dict[str, str] | None = None,
    ) -> None:
        self.conversations = conversations
        self.tools = tools
        self.role_key = role_key
        self.content_key = content_key
        self.system = system
        self.roles: Mapping[str, str] = ROLES | (roles or {})
        for name, role in self.roles.items():
            if role not in ROLES.values():
                raise SFTError(
                    f"the role of {name!r} is {role!r}",
                    where="roles",
                    fix=f"give one of {', '.join(dict.fromkeys(ROLES.values()))}",
                )

    def matches(self, columns: frozenset[str]) -> bool:
        """Whether the column with the turns is there."""
        return self.conversations in columns

    def fits(self, row: Row) -> bool:
        """Whether the column with the turns is there and they aren't just texts, as `Lima` has them."""
        turns = row.get(self.conversations)
        return super().fits(row) and not (isinstance(turns, list) and turns and isinstance(turns[0], str))

    def convert(self, row: Row) -> Iterable[Conversation]:
        """One conversation with the turns in their order; a function call is an assistant turn."""
        chat = read_chat(row, self.conversations, "conversations", self.tools, self._message)
        return [replace(chat, messages=(*self._system(row, chat.messages), *chat.messages))]

    def to_row(self, item: Conversation | Segments) -> dict[str, object]:
        """The turns, and the tools as JSON text."""
        conversation = as_conversation(item)
        turns = [self._turn(m, f"message {n}") for n, m in enumerate(conversation.messages, 1)]
        row: dict[str, object] = {self.conversations: turns}
        if conversation.tools:
            row[self.tools] = json.dumps(conversation.tools, ensure_ascii=False)
        return row | write_template_options(conversation)

    def _message(self, turn: object, where: str) -> Message:
        fields = read_object(turn, where)
        name = read_column(fields, self.role_key, "role_key", where)
        role = read_role(name, self.roles, f"{where}, key {self.role_key!r}")
        value = read_column(fields, self.content_key, "content_key", where)
        weight = read_weight(fields, where)
        where = f"{where}, key {self.content_key!r}"
        if role == CALL:
            return Message("assistant", tool_calls=read_calls(value, where), weight=weight)
        text = "" if value is None else read_text(value, where)
        return Message(role, text, weight=weight, part_weights=read_details(fields, text, where))

    def _turn(self, message: Message, where: str) -> dict[str, object]:
        refuse(message, where, "reasoning", "tool_call_id", "name", "part_weights")
        speaker, value = SPEAKERS.get(message.role), message.content
        if speaker is None:
            raise SFTError(f"there is no speaker for the role {message.role}", where=where)
        if message.tool_calls:
            if value:
                raise SFTError("a turn is an answer or a function call, not both", where=where)
            identified = [{} if c.id is None else {"id": c.id} for c in message.tool_calls]
            calls = [
                {"name": call.name, "arguments": call.arguments, **identity}
                for call, identity in zip(message.tool_calls, identified, strict=True)
            ]
            speaker = CALL
            value = json.dumps(calls[0] if len(calls) == 1 else calls, ensure_ascii=False)
        turn: dict[str, object] = {self.role_key: speaker, self.content_key: value}
        if message.weight is not None:
            turn["weight"] = write_weight(message.weight)
        return turn

    def _system(self, row: Row, messages: tuple[Message, ...]) -> list[Message]:
        system = row.get(self.system)
        if is_blank(system):
            return []
        if messages[0].role == "system":
            raise SFTError(
                "the row has a system prompt and the conversation begins with another",
                where=f"key {self.system!r}",
                fix="keep one of them",
            )
        return [Message("system", read_text(system, f"key {self.system!r}"))]
