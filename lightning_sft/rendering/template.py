"""A tokenizer's chat template: messages to text, and the tokens that end a turn."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from lightning_sft.conversation import Message
from lightning_sft.errors import SFTError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ChatMessage = dict[str, object]
"""A message in the form that chat templates take (transformers' chat format)."""

Tools = Sequence[Mapping[str, object]]

_PROBE = "900000000000000"  # digits: templates that change the case of a text leave them alone


class Template:
    """Renders messages as transformers does.

    Args:
        tokenizer: Whose special tokens the template may use.
        text: The template in Jinja.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
        self.tokenizer = tokenizer
        self.text = text

    def render(
        self, messages: Sequence[ChatMessage], tools: Tools, *, generation_prompt: bool = False
    ) -> str:
        """The text of the messages; with the generation prompt, what inference gives the model.

        Raises:
            SFTError: The template refuses them, or fails.
        """
        try:
            (text,) = self.tokenizer.apply_chat_template(
                [list(messages)],  # a batch of one, because a history may be empty
                tools=list(tools) or None,
                chat_template=self.text,
                add_generation_prompt=generation_prompt,
                tokenize=False,
            )
            return str(text)
        except Exception as error:  # a template is a program: it can fail in any way
            raise SFTError(
                f"the chat template refuses the conversation: {error}",
                fix="change the row, or use another chat template (model.chat_template)",
            ) from error

    def tagged(self, messages: Sequence[Message], tools: Tools) -> list[tuple[int, int]]:
        """The characters inside the template's `{% generation %}` tags, as (start, end)."""
        from transformers.utils.chat_template_utils import render_jinja_template

        _, indices = render_jinja_template(
            conversations=[[as_chat_message(message) for message in messages]],
            tools=list(tools) or None,
            chat_template=self.text,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        return [(int(start), int(end)) for start, end in indices[0]]

    @cached_property
    def stop_token(self) -> str:
        """The token that ends an assistant's answer: the first added token after its content.

        Raises:
            SFTError: The template ends a turn with no token at all, so the model could never learn to stop.
        """
        probe: list[ChatMessage] = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": _PROBE},
        ]
        after = self.render(probe, ()).partition(_PROBE)[2]
        if not (found := self._added_tokens(after)):
            raise SFTError(
                f"the chat template ends a turn with {after!r}: no token that generation could stop on",
                where="model.chat_template",
                fix=f"use a template that writes an end-of-turn token, such as {self.tokenizer.eos_token}",
            )
        return found[0]

    @cached_property
    def stop_tokens(self) -> tuple[str, ...]:
        """`stop_token`, and what ends a turn with a tool call where that is another one (gpt-oss's `<|call|>`).

        Raises:
            SFTError: As `stop_token`.
        """
        call = {"type": "function", "id": "123456789", "function": {"name": "f", "arguments": {"x": _PROBE}}}
        probe: list[ChatMessage] = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        try:
            _, call_rendered, after = self.render(probe, ()).rpartition(_PROBE)
        except SFTError:  # no place for tools
            call_rendered, after = "", ""
        found = self._added_tokens(after) if call_rendered else []
        if not found or self.stop_token in found:
            return (self.stop_token,)
        return self.stop_token, found[-1]

    @cached_property
    def known_stops(self) -> tuple[str, ...]:
        """`stop_tokens`; none where the template has none."""
        try:
            return self.stop_tokens
        except SFTError:
            return ()

    @cached_property
    def tokenizer_adds_bos(self) -> bool:
        """Whether the tokenizer puts BOS before a text by itself."""
        return self.tokenizer.bos_token_id in self.tokenizer("a")["input_ids"][:1]

    def _added_tokens(self, text: str) -> list[str]:
        """The added tokens in `text` from left to right; of those that begin at one place, the longest."""
        added = {token.content for token in self.tokenizer.added_tokens_decoder.values()}
        names = sorted((name for name in added if name.strip()), key=len, reverse=True)
        return re.findall("|".join(map(re.escape, names)), text) if names else []


def as_chat_message(message: Message) -> ChatMessage:
    """The message as chat templates take it."""
    out: ChatMessage = {"role": message.role, "content": message.content}
    if message.reasoning is not None:
        out["reasoning_content"] = message.reasoning
    if message.tool_calls:
        out["tool_calls"] = [
            {
                "type": "function",
                **({"id": call.id} if call.id is not None else {}),
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        out["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        out["name"] = message.name
    return out
