"""ShareGPT: a list of turns with `from` and `value`, with tool calls and observations."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_sft import Conversation, DataFormat, Message, Row, SFTError
from lightning_sft_formats.fields import (
    check_trained,
    is_blank,
    read_calls,
    read_column,
    read_list,
    read_object,
    read_role,
    read_text,
    read_tools,
    read_weight,
)

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
    CALL: "assistant",
    "system": "system",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}
"""The speakers' names in ShareGPT files and the role of each."""


class ShareGPT(DataFormat):
    """Rows with a list of turns `{"from": "human", "value": "…"}`.

    Args:
        conversations: The column that holds the list of turns.
        tools: The column that holds the tools, as a list or as the JSON text of one; may be absent or empty.
        role_key: The key of a turn that names the speaker.
        content_key: The key of a turn that holds its text.
        system: The column that holds the system prompt; may be absent or empty.
    """

    def __init__(
        self,
        conversations: str = "conversations",
        tools: str = "tools",
        role_key: str = "from",
        content_key: str = "value",
        system: str = "system",
    ) -> None:
        self.conversations = conversations
        self.tools = tools
        self.role_key = role_key
        self.content_key = content_key
        self.system = system

    def matches(self, columns: frozenset[str]) -> bool:
        """Whether the column with the turns is there."""
        return self.conversations in columns

    def convert(self, row: Row) -> Iterable[Conversation]:
        """One conversation with the turns in their order; a function call is an assistant turn."""
        where = f"key {self.conversations!r}"
        turns = read_list(read_column(row, self.conversations, "conversations"), where)
        messages = [self._message(turn, f"{where}, message {n}") for n, turn in enumerate(turns, 1)]
        check_trained(messages, where)
        tools = read_tools(row.get(self.tools), f"key {self.tools!r}")
        return [Conversation((*self._system(row, messages), *messages), tools)]

    def _message(self, turn: object, where: str) -> Message:
        fields = read_object(turn, where)
        name = read_column(fields, self.role_key, "role_key", where)
        role = read_role(name, ROLES, f"{where}, key {self.role_key!r}")
        value = read_column(fields, self.content_key, "content_key", where)
        weight = read_weight(fields, where)
        where = f"{where}, key {self.content_key!r}"
        if name == CALL:
            return Message(role, tool_calls=read_calls(value, where), weight=weight)
        return Message(role, "" if value is None else read_text(value, where), weight=weight)

    def _system(self, row: Row, messages: list[Message]) -> list[Message]:
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
