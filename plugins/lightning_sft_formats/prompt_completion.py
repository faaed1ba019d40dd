"""Prompt and completion: as text without a chat template, or as messages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from lightning_sft import Conversation, DataFormat, Message, Row, Segments, SFTError
from lightning_sft_formats.fields import (
    check_trained,
    kind,
    read_column,
    read_filled,
    read_row_tools,
    read_template_options,
    read_text,
)
from lightning_sft_formats.messages import read_messages, write_messages
from lightning_sft_formats.writing import as_conversation, as_segments, plain_text, write_template_options


class PromptCompletion(DataFormat):
    """Rows with a prompt, which is not trained, and a completion, which is.

    Two texts are joined as they stand, without a chat template and without a space between them. Two lists
    of messages are one conversation, in which the prompt's assistant turns
    are not trained unless they have a loss weight of their own.

    Args:
        prompt: The column that holds the prompt.
        completion: The column that holds the completion.
        chat: Make a user turn of a prompt that is text and an assistant turn of its completion.
        tools: The column that holds the tools when the prompt is a list of messages; may be absent or empty.
    """

    def __init__(
        self, prompt: str = "prompt", completion: str = "completion", chat: bool = False, tools: str = "tools"
    ) -> None:
        self.prompt = prompt
        self.completion = completion
        self.chat = chat
        self.tools = tools

    def matches(self, columns: frozenset[str]) -> bool:
        """Whether the prompt's and the completion's column are there."""
        return {self.prompt, self.completion} <= columns

    def convert(self, row: Row) -> Iterable[Conversation | Segments]:
        """Two segments of weight 0 and 1, or one conversation."""
        prompt = read_column(row, self.prompt, "prompt")
        completion = read_column(row, self.completion, "completion")
        if isinstance(prompt, list) and isinstance(completion, list):
            return [self._conversation(row, prompt, completion)]
        if isinstance(prompt, list) or isinstance(completion, list):
            raise SFTError(
                f"the prompt is {kind(prompt)}, but the completion is {kind(completion)}",
                where=f"keys {self.prompt!r} and {self.completion!r}",
                fix="make both of them text or both of them lists of messages",
            )
        text = read_text(prompt, f"key {self.prompt!r}")
        answer = read_filled(completion, f"key {self.completion!r}", "completion")
        if self.chat:
            return [Conversation((Message("user", text), Message("assistant", answer)))]
        return [Segments(((text, 0.0), (answer, 1.0)))]

    def to_row(self, item: Conversation | Segments) -> dict[str, object]:
        """The two texts; of a conversation the last message as the completion and the others as the prompt."""
        if isinstance(item, Conversation) and not self.chat:
            return self._messages_row(item)
        if self.chat:
            messages = as_conversation(item, messages_only=True).messages
            kinds = [message.role for message in messages]
            texts = [plain_text(message, f"message {n}") for n, message in enumerate(messages, 1)]
            expected = ["user", "assistant"]
        else:
            segments = as_segments(item).segments
            kinds, texts = [f"weight {weight:g}" for _, weight in segments], [text for text, _ in segments]
            expected = ["weight 0", "weight 1"]
        if kinds != expected:
            raise SFTError(f"there are {', '.join(kinds)}, where a prompt and a completion are needed")
        return {self.prompt: texts[0], self.completion: texts[1]}

    def _messages_row(self, item: Conversation) -> dict[str, object]:
        context, completion = item.messages[:-1], item.messages[-1:]
        for number, message in enumerate(context, 1):
            if message.role == "assistant" and message.weight is None:
                raise SFTError(
                    "more than one assistant turn is trained, only the last can be the completion",
                    where=f"message {number}",
                )
        untrained = [
            replace(m, weight=None) if m.role == "assistant" and m.weight == 0 else m for m in context
        ]
        row: dict[str, object] = {self.prompt: write_messages(untrained)}
        row[self.completion] = write_messages(completion)
        if item.tools:
            row[self.tools] = list(item.tools)
        return row | write_template_options(item)

    def _conversation(self, row: Row, prompt: list[object], completion: list[object]) -> Conversation:
        where = f"key {self.completion!r}"
        context = read_messages(prompt, f"key {self.prompt!r}")
        trained = read_messages(completion, where)
        check_trained(trained, where)
        untrained = (
            replace(m, weight=0.0) if m.role == "assistant" and m.weight is None else m for m in context
        )
        return Conversation(
            (*untrained, *trained),
            read_row_tools(row, self.tools),
            chat_template_kwargs=read_template_options(row),
        )
