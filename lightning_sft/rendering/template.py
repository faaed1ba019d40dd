"""A tokenizer's chat template: messages to text, and the tokens that end a turn."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from lightning_sft.conversation import Message
from lightning_sft.errors import SFTError

if TYPE_CHECKING:
    from jinja2 import Template as JinjaTemplate
    from transformers import PreTrainedTokenizerBase

ChatMessage = dict[str, object]
"""A message in the form that chat templates take (transformers' chat format)."""

Tools = Sequence[Mapping[str, object]]

_MARKER = re.compile(r"<[|｜][^<>|｜\s]+[|｜]>|<(?:start|end)_of_[a-z_]+>")
"""What is meant to be one token, by its looks."""

_PROBE = "900000000000000"  # digits: templates that change the case of a text leave them alone


class Template:
    """Renders messages as transformers does.

    Args:
        tokenizer: Whose special tokens the template may use.
        text: The template in Jinja.
        options: What it is given besides the messages, such as `enable_thinking`.
        name: Where it is from, for errors.

    Raises:
        SFTError: It is no Jinja, or doesn't take these options.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text: str,
        options: Mapping[str, object] | None = None,
        name: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.text = text
        self.options = dict(options or {})
        self._variants: dict[str, Template] = {}
        _check_syntax(text, name or "the tokenizer's own")
        for option in self.options:
            self._check_option(option)

    def with_options(self, options: Mapping[str, object]) -> Template:
        """The template with the options of one conversation, which count before its own.

        Raises:
            SFTError: They are no options of a template.
        """
        if not options:
            return self
        key = json.dumps(options, sort_keys=True)
        if key not in self._variants:
            variant = self._variants[key] = Template(self.tokenizer, self.text, self.options)
            for option in options:
                variant._check_option(option, unused=True)
            variant.options |= options
        return self._variants[key]

    def uses(self, option: str) -> bool:
        """Whether the template's text has the option's name in it."""
        return re.search(rf"\b{re.escape(option)}\b", self.text) is not None

    def _check_option(self, option: str, *, unused: bool = False) -> None:
        where = f"chat_template_kwargs: {option}"
        own = {*inspect.signature(self.tokenizer.apply_chat_template).parameters, "messages"}
        if not option.isidentifier() or option in own | {*self.tokenizer.special_tokens_map}:
            raise SFTError("this is no option of a chat template", where=where, fix="leave it out")
        if not unused and not self.uses(option):
            close = get_close_matches(option, set(re.findall(r"[a-z_]\w+", self.text)), n=1)
            raise SFTError(
                "the chat template doesn't use this option",
                where=where,
                fix=f"did you mean {close[0]}?" if close else "leave it out",
            )

    @property
    def text_with_options(self) -> str:
        """The template with its options as defaults, so that inference uses them without being told."""
        lines = [
            f"{{% set {name} = {name} if {name} is defined else {value!r} %}}\n"  # Jinja takes Python's literals
            for name, value in self.options.items()
        ]
        return "".join([*lines, self.text])

    def render(
        self, messages: Sequence[ChatMessage], tools: Tools, *, generation_prompt: bool = False
    ) -> str:
        """The text of the messages; with the generation prompt, what inference gives the model.

        Raises:
            SFTError: The template refuses them, or fails.
        """
        try:
            if self._given is not None and not tools and all(map(_is_plain, messages)):
                program, names = _program(self.text)
                asked = {"messages": list(messages), "add_generation_prompt": generation_prompt}
                environment = program.environment
                given = {**names, **self._given, **asked}
                context = environment.context_class(environment, given, program.name, program.blocks)
                return "".join(program.root_render_func(context))
            (text,) = self.tokenizer.apply_chat_template(
                [list(messages)],  # a batch of one, because a history may be empty
                tools=list(tools) or None,
                chat_template=self.text,
                add_generation_prompt=generation_prompt,
                tokenize=False,
                **self.options,
            )
            return str(text)
        except Exception as error:  # a template is a program: it can fail in any way
            raise SFTError(
                f"the chat template refuses the conversation: {error}",
                fix="change the row, or use another chat template (model.chat_template)",
            ) from error

    @cached_property
    def _given(self) -> dict[str, object] | None:
        """What the template's program knows besides the messages; None for a tokenizer with a rendering of its own."""
        from transformers import PreTrainedTokenizerBase

        if type(self.tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
            return None
        return {**self.tokenizer.special_tokens_map, "tools": None, "documents": None, **self.options}

    def tagged(self, messages: Sequence[Message], tools: Tools) -> list[tuple[int, int]]:
        """The characters inside the template's `{% generation %}` tags, as (start, end)."""
        from transformers.utils.chat_template_utils import render_jinja_template

        _, indices = render_jinja_template(
            conversations=[[as_chat_message(message) for message in messages]],
            tools=list(tools) or None,
            chat_template=self.text,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
            **self.options,
        )
        return [(int(start), int(end)) for start, end in indices[0]]

    @cached_property
    def stop_token(self) -> str:
        """The token that ends an assistant's answer: the first added token after its content.

        Raises:
            SFTError: The template ends a turn with no token at all, so the model could never learn to stop.
        """
        after = self.render(_TURN, ()).partition(_PROBE)[2]
        if not (found := self._added_tokens(after)):
            add = f", or make it one: {_new_tokens(self._markers)}" if _MARKER.search(after) else ""
            raise SFTError(
                f"the chat template ends a turn with {after!r}: no token that generation could stop on",
                where="model.chat_template",
                fix=f"use a template that writes an end-of-turn token, such as {self.tokenizer.eos_token}{add}",
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
    def bos(self) -> str | None:
        """The tokenizer's BOS token."""
        return self.tokenizer.bos_token or None

    @cached_property
    def tokenizer_adds_bos(self) -> bool:
        """Whether the tokenizer puts BOS before a text by itself."""
        return self.tokenizer.bos_token_id in self.tokenizer("a")["input_ids"][:1]

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What is worth knowing of every conversation rendered with it."""
        split = [name for name in self._markers if len(self.tokenizer.tokenize(name)) > 1]
        if not split:
            return ()
        return (
            f"the chat template writes {', '.join(split)}, of which this tokenizer makes several tokens; as one "
            f"token each: {_new_tokens(split)}",
        )

    @cached_property
    def _markers(self) -> list[str]:
        """What looks like a token in a short conversation."""
        try:
            texts = [self.render(_TURN, (), generation_prompt=prompt) for prompt in (False, True)]
        except SFTError:
            return []
        return list(dict.fromkeys(_MARKER.findall("".join(texts))))

    def _added_tokens(self, text: str) -> list[str]:
        """The added tokens in `text` from left to right; of those that begin at one place, the longest."""
        added = {token.content for token in self.tokenizer.added_tokens_decoder.values()}
        names = sorted((name for name in added if name.strip()), key=len, reverse=True)
        return re.findall("|".join(map(re.escape, names)), text) if names else []


_TURN: list[ChatMessage] = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": _PROBE},
]


@lru_cache
def _program(text: str) -> tuple[JinjaTemplate, dict[str, object]]:
    """What transformers compiles a template to, and what it lets it use.

    Run as it is, it takes a fifth of the time of transformers' own call, which first copies whatever it is given.
    """
    from transformers.utils.chat_template_utils import _compile_jinja_template

    program = _compile_jinja_template(text)
    return program, dict(program.globals)


def _is_plain(message: ChatMessage) -> bool:
    """Whether there is nothing in the message but texts, of which transformers would change none."""
    return "reasoning_content" not in message and all(type(value) is str for value in message.values())


def _new_tokens(names: Sequence[str]) -> str:
    return f"model.new_tokens: {json.dumps(list(names), ensure_ascii=False)}"


def _check_syntax(text: str, name: str) -> None:
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        render_jinja_template(conversations=[], chat_template=text)
    except TemplateSyntaxError as error:
        raise SFTError(
            f"the chat template is no Jinja: {error.message}",
            where=f"model.chat_template: {name}, line {error.lineno}",
            fix="correct it there",
        ) from error


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
