"""Where the loss mask is made: a conversation becomes token ids with a weight and a reason for each.

The conversation is rendered once, as inference would see it, and encoded once. Which tokens are trained is
decided by character position in that text:

1. A second rendering, in which every piece of the messages' text is wrapped in sentinels, tells where each
   piece lies. It counts only if it equals the first rendering once the sentinels are taken out again.
2. A trained turn begins where the generation prompt ends (the history rendered with
   `add_generation_prompt=True`, which must be a prefix of the text) and ends after its end-of-turn token.
3. The fast tokenizer's offsets map characters to tokens.

So what is trained in a turn is what the model has to produce at inference, and nothing else. A template for
which one of these proofs fails is refused with the row's place; nothing is guessed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from lightning_sft import chat_templates
from lightning_sft.conversation import Conversation, Message, Meta, Segments
from lightning_sft.errors import SFTError
from lightning_sft.example import Example, Reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class _Span:
    start: int
    end: int
    weight: float


@dataclass(frozen=True, slots=True)
class _Layout:
    """A text with its weighted spans, before it is encoded."""

    text: str
    spans: tuple[_Span, ...]
    meta: Meta
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    suffix_weight: float = 0.0


class Renderer:
    """Renders conversations for one tokenizer and chat template.

    Args:
        tokenizer: A fast tokenizer.
        chat_template: A Jinja file, the name of a shipped template, or None for the tokenizer's own
            (`plain` for a tokenizer without one).

    Raises:
        SFTError: The tokenizer gives no offsets, or the template can't be found.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> None:
        if not tokenizer.is_fast:
            raise SFTError(
                f"{type(tokenizer).__name__} is a slow tokenizer: it can't say which characters a token covers",
                where="model.tokenizer",
                fix="save it as a fast one (a folder with tokenizer.json) and give that folder",
            )
        self.tokenizer = tokenizer
        self.chat_template = chat_templates.resolve(chat_template, tokenizer)
        self._added = np.array(sorted(tokenizer.added_tokens_decoder), dtype=np.int64)
        self._uses_tools: bool | None = None

    def render(self, conversation: Conversation | Segments) -> Example:
        """The example of one conversation.

        Raises:
            SFTError: It can't be rendered exactly, or no token of it would be trained; says where and why.
        """
        return self.render_all([conversation])[0]

    def render_all(self, conversations: Sequence[Conversation | Segments]) -> list[Example]:
        """The examples of many conversations, encoded in one batch; raises as `render` does."""
        layouts = []
        for conversation in conversations:
            try:
                layouts.append(self._layout(conversation))
            except SFTError as error:
                raise error.at(str(conversation.meta)) from None
        if not layouts:
            return []
        encoded = self.tokenizer(
            [layout.text for layout in layouts],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        pairs = zip(layouts, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [self._example(layout, ids, offsets) for layout, ids, offsets in pairs]

    def generation_prompt(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, object]] = ()
    ) -> str:
        """The text that inference gives the model before it answers."""
        return self._render([_as_dict(message) for message in messages], tools, generation_prompt=True)

    @cached_property
    def stop_token(self) -> str:
        """The token that ends an assistant turn in this template: the first added token after its content.

        Raises:
            SFTError: The template ends a turn with no token at all, so the model could never learn to stop.
        """
        nonce = "qxzstopprobezxq"
        text = self._render(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": nonce}],
            (),
            generation_prompt=False,
        )
        after = text.partition(nonce)[2]
        added = {token.content for token in self.tokenizer.added_tokens_decoder.values()}
        if self.tokenizer.eos_token:
            added.add(self.tokenizer.eos_token)
        found = [(after.index(token), -len(token), token) for token in added if token and token in after]
        if not found:
            raise SFTError(
                f"the chat template ends an assistant turn with {after!r}, in which there is no token that "
                "generation could stop on",
                where="model.chat_template",
                fix="use a template that writes an end-of-turn token which the tokenizer has, such as its EOS "
                f"({self.tokenizer.eos_token})",
            )
        return min(found)[2]

    @cached_property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The ids that generation should stop on: the template's end of turn, and EOS."""
        ids = [self.tokenizer.convert_tokens_to_ids(self.stop_token), self.tokenizer.eos_token_id]
        return tuple(dict.fromkeys(int(token) for token in ids if token is not None))

    # ------------------------------------------------------------------------------------------- text

    def _layout(self, conversation: Conversation | Segments) -> _Layout:
        if isinstance(conversation, Segments):
            return self._segments_layout(conversation)
        return self._conversation_layout(conversation)

    def _segments_layout(self, segments: Segments) -> _Layout:
        spans, position = [], 0
        for text, weight in segments.segments:
            spans.append(_Span(position, position + len(text), _checked(weight)))
            position += len(text)
        text = "".join(piece for piece, _ in segments.segments)
        bos, eos = self.tokenizer.bos_token, self.tokenizer.eos_token
        empty = self.tokenizer("", add_special_tokens=True)["input_ids"]
        adds_bos = self.tokenizer.bos_token_id in empty and not text.startswith(bos)
        ends_itself = eos is None or text.endswith(eos)
        return _Layout(
            text=text,
            spans=tuple(spans),
            meta=segments.meta,
            prefix=(self.tokenizer.bos_token_id,) if adds_bos else (),
            suffix=() if ends_itself else (self.tokenizer.eos_token_id,),
            suffix_weight=spans[-1].weight if spans else 0.0,
        )

    def _conversation_layout(self, conversation: Conversation) -> _Layout:
        messages = [_as_dict(message) for message in conversation.messages]
        text = self._render(messages, conversation.tools, generation_prompt=False)
        if conversation.tools:
            self._check_tools(messages, conversation.tools)
        located = self._locate(messages, conversation.tools, text)
        spans = []
        for index, message in enumerate(conversation.messages):
            where = f"message {index + 1} ({message.role})"
            pieces = located[index]
            if message.role == "assistant":
                start = self._turn_start(messages[:index], conversation.tools, text, where)
                if not start <= pieces[0][0]:
                    raise SFTError("the generation prompt reaches into the message's text", where=where)
                following = [p[0][0] for p in located[index + 1 :] if p]
                end = self._turn_end(text, pieces[-1][1], min(following, default=len(text)), where)
                weight = 1.0 if message.weight is None else _checked(message.weight)
                spans.append(_Span(start, end, weight))
            elif message.weight and pieces:
                spans.append(_Span(pieces[0][0], pieces[-1][1], _checked(message.weight)))
        return _Layout(text=text, spans=tuple(spans), meta=conversation.meta)

    def _turn_start(
        self, history: list[dict[str, object]], tools: Sequence[Mapping[str, object]], text: str, where: str
    ) -> int:
        prompt = self._render(history, tools, generation_prompt=True)
        if not text.startswith(prompt):
            raise SFTError(
                "the chat template renders this turn's history differently once the turn is there, so what "
                f"inference would see is not a prefix of the whole; they part at {_difference(prompt, text)}",
                where=where,
                fix="use a chat template that doesn't rewrite the history (model.chat_template)",
            )
        return len(prompt)

    def _turn_end(self, text: str, start: int, limit: int, where: str) -> int:
        found = text.find(self.stop_token, start, limit)
        if found < 0:
            raise SFTError(
                f"the chat template writes no end-of-turn token ({self.stop_token}) after this turn",
                where=where,
                fix="use a chat template that ends every assistant turn (model.chat_template)",
            )
        return found + len(self.stop_token)

    def _locate(
        self, messages: list[dict[str, object]], tools: Sequence[Mapping[str, object]], text: str
    ) -> list[list[tuple[int, int]]]:
        """For each message, where the pieces of its text lie in `text`, in order of position."""
        nonce = next(name for n in range(10**6) if (name := f"qxz{n}zxq") not in text)
        counter = iter(range(10**9))

        def wrap(value: object) -> object:
            """`value` with sentinels inside its outer whitespace, so that templates that trim still do."""
            if isinstance(value, str) and (core := value.strip()):
                at, number = value.index(core), next(counter)
                end = at + len(core)
                return f"{value[:at]}{nonce}{number}a{core}{nonce}{number}b{value[end:]}"
            if isinstance(value, Mapping):
                return {key: wrap(item) for key, item in value.items()}
            if isinstance(value, list | tuple):
                return [wrap(item) for item in value]
            return value

        wrapped, owners = [], []
        for message in messages:
            first = next(counter)
            marked_message = {key: wrap(value) if key in _TEXT else value for key, value in message.items()}
            if calls := message.get("tool_calls"):
                marked_message["tool_calls"] = [{**c, "function": wrap(c["function"])} for c in calls]
            wrapped.append(marked_message)
            owners.append(range(first + 1, next(counter)))
        marked = self._render(wrapped, tools, generation_prompt=False)
        starts: dict[int, list[int]] = {}
        ends: dict[int, list[int]] = {}
        position, plain = 0, []
        for piece in re.split(f"({nonce}[0-9]+[ab])", marked):
            if piece.startswith(nonce):
                number, kind = int(piece[len(nonce) : -1]), piece[-1]
                (starts if kind == "a" else ends).setdefault(number, []).append(position)
            else:
                plain.append(piece)
                position += len(piece)
        if "".join(plain) != text:
            raise SFTError(
                "the chat template changes the messages' text (other than trimming it), so where each message "
                "lies can't be proved",
                fix="use a chat template that keeps the text in place (model.chat_template)",
            )
        located = []
        for index, (message, numbers) in enumerate(zip(messages, owners, strict=True)):
            where = f"message {index + 1} ({message['role']})"
            trained = message["role"] == "assistant"
            if any(n not in starts or n not in ends for n in numbers):
                raise SFTError(
                    "the chat template leaves out text of this message",
                    where=where,
                    fix="use a chat template that renders this role and these fields (model.chat_template)",
                )
            if trained and not numbers:
                raise SFTError(
                    "the response is empty", where=where, fix="remove the row, or write a response"
                )
            if trained and any(len(starts[n]) > 1 for n in numbers):
                raise SFTError("the chat template repeats the text of this message", where=where)
            located.append(sorted((starts[n][0], ends[n][0]) for n in numbers))
        return located

    def _check_tools(self, messages: list[dict[str, object]], tools: Sequence[Mapping[str, object]]) -> None:
        if self._uses_tools is None:
            with_tools, without = (self._render(messages, t, generation_prompt=False) for t in (tools, ()))
            self._uses_tools = with_tools != without
        if not self._uses_tools:
            raise SFTError(
                "the row has tools, which the chat template leaves out",
                fix="use a chat template that renders tools, such as model.chat_template: plain",
            )

    def _render(
        self,
        messages: Sequence[Mapping[str, object]],
        tools: Sequence[Mapping[str, object]],
        *,
        generation_prompt: bool,
    ) -> str:
        from jinja2 import TemplateError

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    list(messages),
                    tools=list(tools) or None,
                    chat_template=self.chat_template,
                    add_generation_prompt=generation_prompt,
                    tokenize=False,
                )
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise SFTError(
                f"the chat template refuses the conversation: {error}",
                fix="change the row, or use another chat template (model.chat_template)",
            ) from error

    # ----------------------------------------------------------------------------------------- tokens

    def _example(self, layout: _Layout, ids: list[int], offsets: Iterable[tuple[int, int]]) -> Example:
        tokens = np.asarray(ids, dtype=np.int64)
        chars = np.asarray(list(offsets), dtype=np.int64).reshape(-1, 2)
        starts, ends = chars[:, 0], chars[:, 1]
        added = np.isin(tokens, self._added)
        weights = np.zeros(len(tokens), dtype=np.float32)
        reasons = np.full(len(tokens), Reason.CONTEXT, dtype=np.uint8)
        for span in layout.spans:
            # An added token's offsets may reach over whitespace that it swallows: it belongs where it
            # begins. Any other token that reaches into the span has to be produced, so it is trained.
            inside = (starts >= span.start) & (starts < span.end)
            inside |= (starts < span.start) & (ends > span.start) & ~added
            weights[inside] = span.weight
            reasons[inside] = Reason.TRAINED if span.weight > 0 else Reason.ZERO_WEIGHT
        if layout.prefix or layout.suffix:
            before, after = len(layout.prefix), len(layout.suffix)
            tokens = np.concatenate([layout.prefix, tokens, layout.suffix]).astype(np.int64)
            weights = np.pad(weights, (before, after))
            reasons = np.pad(reasons, (before, after), constant_values=int(Reason.CONTEXT))
            if after:
                weights[-after:] = layout.suffix_weight
                reasons[-after:] = Reason.TRAINED if layout.suffix_weight > 0 else Reason.ZERO_WEIGHT
        if len(tokens) and weights[0] > 0:
            weights[0], reasons[0] = 0.0, Reason.FIRST
        if not (weights > 0).any():
            raise SFTError(
                "nothing to train on: no token of this row has a weight above 0",
                where=str(layout.meta),
                fix="remove the row, or give one of its messages a weight",
            )
        return Example(tokens.astype(np.int32), weights, reasons, layout.meta)


_TEXT = ("content", "reasoning_content")


def _as_dict(message: Message) -> dict[str, object]:
    """The message in the form that chat templates take (transformers' chat format)."""
    out: dict[str, object] = {"role": message.role, "content": message.content}
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


def _checked(weight: float) -> float:
    if not math.isfinite(weight) or weight < 0:
        raise SFTError(f"weight {weight} is not a finite number of at least 0")
    return weight


def _difference(expected: str, text: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(expected, text, strict=False)) if a != b), len(text))
    return f"character {at}: {expected[at : at + 40]!r} against {text[at : at + 40]!r}"
