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

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
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
    """A text with its weighted spans, before it is encoded; `suffix` tokens lie one character behind it."""

    text: str
    spans: tuple[_Span, ...]
    meta: Meta
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()


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
                f"{type(tokenizer).__name__} is a slow tokenizer: it doesn't tell where a token lies",
                where="model.tokenizer",
                fix="save it as a fast one (a folder with tokenizer.json) and give that folder",
            )
        self.tokenizer = tokenizer
        self.chat_template = chat_templates.resolve(chat_template, tokenizer)
        added = list(tokenizer.added_tokens_decoder)
        self._added = np.zeros(max(len(tokenizer), *added, 0) + 1, dtype=bool)
        self._added[added] = True

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
                layouts[-1].text.encode()
            except SFTError as error:
                raise error.at(str(conversation.meta)) from None
            except UnicodeEncodeError as error:
                raise SFTError(
                    f"the text holds half a character: {error}", where=str(conversation.meta)
                ) from None
        if not layouts:
            return []
        encoded = self._encoder(
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
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": nonce}]
        after = self._render(probe, (), generation_prompt=False).partition(nonce)[2]
        added = {token.content for token in self.tokenizer.added_tokens_decoder.values()}
        found = [(after.index(name), -len(name), name) for name in added if name.strip() and name in after]
        if not found:
            raise SFTError(
                f"the chat template ends a turn with {after!r}: no token that generation could stop on",
                where="model.chat_template",
                fix=f"use a template that writes an end-of-turn token, such as {self.tokenizer.eos_token}",
            )
        return min(found)[2]

    @cached_property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The ids that generation should stop on: the template's end of turn, where it has one, and EOS."""
        try:
            names = [self.stop_token, self.tokenizer.eos_token]
        except SFTError:  # without a template for chat there is no end of turn either
            names = [self.tokenizer.eos_token]
        return tuple(dict.fromkeys(int(self.tokenizer.convert_tokens_to_ids(name)) for name in names))

    def _layout(self, conversation: Conversation | Segments) -> _Layout:
        if isinstance(conversation, Segments):
            return self._segments_layout(conversation)
        return self._conversation_layout(conversation)

    def _segments_layout(self, segments: Segments) -> _Layout:
        text, weight, spans = "", 0.0, []
        for number, (piece, given) in enumerate(segments.segments, 1):
            weight = _checked(given, f"segment {number}")
            spans.append(_Span(len(text), len(text) + len(piece), weight))
            text += piece
        spans.append(_Span(len(text), len(text) + 1, weight))  # the EOS token, as trained as the last segment
        bos, eos = self.tokenizer.bos_token, self.tokenizer.eos_token
        adds_bos = self._adds_bos and not text.startswith(bos)
        adds_eos = eos is not None and not text.endswith(eos)
        return _Layout(
            text=text,
            spans=tuple(spans),
            meta=segments.meta,
            prefix=(self.tokenizer.bos_token_id,) if adds_bos else (),
            suffix=(self.tokenizer.eos_token_id,) if adds_eos else (),
        )

    def _conversation_layout(self, conversation: Conversation) -> _Layout:
        places = [f"message {n} ({message.role})" for n, message in enumerate(conversation.messages, 1)]
        given = [m.role == "assistant" if m.weight is None else m.weight for m in conversation.messages]
        weights = [_checked(weight, place) for weight, place in zip(given, places, strict=True)]
        messages = [_as_dict(message) for message in conversation.messages]
        text = self._render(messages, conversation.tools, generation_prompt=False)
        located = self._locate(messages, conversation.tools, text, weights, places)
        spans = []
        for index, (pieces, weight) in enumerate(zip(located, weights, strict=True)):
            if not pieces:
                continue
            start, end = pieces[0][0], pieces[-1][1]
            if messages[index]["role"] == "assistant" and weight > 0:
                turn = self._turn_start(messages[:index], conversation.tools, text, places[index])
                if turn > start:
                    raise SFTError("the generation prompt reaches into this message", where=places[index])
                limit = min((p[0][0] for p in located[index + 1 :] if p), default=len(text))
                start, end = turn, self._turn_end(text, end, limit, places[index])
            if messages[index]["role"] == "assistant" or weight > 0:
                spans.append(_Span(start, end, weight))
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
                fix="use a chat template that keeps history (model.chat_template), or give the turn weight 0",
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
        self,
        messages: Sequence[Mapping[str, object]],
        tools: Sequence[Mapping[str, object]],
        text: str,
        weights: Sequence[float],
        places: Sequence[str],
    ) -> list[list[tuple[int, int]]]:
        """For each message, where the pieces of its text lie in `text`, in order of position."""
        nonce = next(name for n in range(10**6) if (name := f"qxz{n}zxq") not in text)
        count = 0

        def wrap(value: object) -> object:
            """`value` with sentinels inside its outer whitespace, so that templates that trim still do."""
            nonlocal count
            if isinstance(value, str) and (core := value.strip()):
                at, number = value.index(core), count
                end = at + len(core)
                count += 1
                return f"{value[:at]}{nonce}{number}a{core}{nonce}{number}b{value[end:]}"
            if isinstance(value, Mapping):
                return {wrap(k) if self.stop_token in k else k: wrap(item) for k, item in value.items()}
            if isinstance(value, list | tuple):
                return [wrap(item) for item in value]
            return value

        wrapped_tools = [_with_name(tool, wrap) for tool in tools]
        tool_numbers, wrapped, owned = range(count), [], []
        for message, weight in zip(messages, weights, strict=True):
            first, marked_message = count, dict(message)
            # An untrained turn's reasoning may be left out, as many templates do with earlier turns.
            for key in ("content", "reasoning_content") if weight > 0 else ("content",):
                if key in message:
                    marked_message[key] = wrap(message[key])
            if isinstance(calls := message.get("tool_calls"), list):
                marked_message["tool_calls"] = [{**c, "function": wrap(c["function"])} for c in calls]
            wrapped.append(marked_message)
            owned.append(range(first, count))
        marked = self._render(wrapped, wrapped_tools, generation_prompt=False)
        found: dict[str, list[int]] = {}
        position, plain = 0, []
        for piece in re.split(f"({nonce}[0-9]+[ab])", marked):
            if piece.startswith(nonce):
                found.setdefault(piece[len(nonce) :], []).append(position)
            else:
                plain.append(piece)
                position += len(piece)
        if "".join(plain) != text:
            raise SFTError(
                "the chat template changes the messages' text (more than by trimming it)",
                fix="use a chat template that keeps the text in place (model.chat_template)",
            )
        if any(f"{n}a" not in found for n in tool_numbers):
            raise SFTError(
                "the row has tools, which the chat template leaves out",
                fix="use a chat template that renders tools, such as model.chat_template: plain",
            )
        located = []
        for message, numbers, weight, where in zip(messages, owned, weights, places, strict=True):
            if any(f"{n}{side}" not in found for n in numbers for side in "ab"):
                raise SFTError(
                    "the chat template leaves out text of this message",
                    where=where,
                    fix="use a chat template that renders this role and these fields (model.chat_template)"
                    + (", or give this turn weight 0" if "reasoning_content" in message else ""),
                )
            if weight > 0 and message["role"] == "assistant" and not numbers:
                raise SFTError("the response is empty", where=where, fix="remove the row, or fill it in")
            if weight > 0 and any(len(found[f"{n}a"]) > 1 for n in numbers):
                raise SFTError("the chat template repeats the text of this message", where=where)
            located.append(sorted((found[f"{n}a"][0], found[f"{n}b"][0]) for n in numbers))
        return located

    def _render(
        self,
        messages: Sequence[Mapping[str, object]],
        tools: Sequence[Mapping[str, object]],
        *,
        generation_prompt: bool,
    ) -> str:
        try:
            (text,) = self.tokenizer.apply_chat_template(
                [list(messages)],  # a batch of one, because a history may be empty
                tools=list(tools) or None,
                chat_template=self.chat_template,
                add_generation_prompt=generation_prompt,
                tokenize=False,
            )
            return str(text)
        except Exception as error:  # a template is a program: it can fail in any way
            raise SFTError(
                f"the chat template refuses the conversation: {error}",
                fix="change the row, or use another chat template (model.chat_template)",
            ) from error

    @cached_property
    def _adds_bos(self) -> bool:
        return self.tokenizer.bos_token_id in self.tokenizer("a")["input_ids"][:1]

    @cached_property
    def _encoder(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with offsets that hold all of a token's characters.

        Some byte-level tokenizers (Llama 3's) leave a token's spaces out of its offsets, so that it can't be
        told on which side of a boundary they are.
        """
        probe = self.tokenizer("a  b", add_special_tokens=False, return_offsets_mapping=True)
        if all(before[1] >= after[0] for before, after in pairwise(probe["offset_mapping"])):
            return self.tokenizer
        from tokenizers.processors import Sequence as Processors

        whole = copy.deepcopy(self.tokenizer)
        whole.backend_tokenizer.post_processor = Processors([])
        return whole

    def _example(self, layout: _Layout, ids: list[int], offsets: Sequence[tuple[int, int]]) -> Example:
        if layout.prefix or layout.suffix:
            behind = len(layout.text)
            ids = [*layout.prefix, *ids, *layout.suffix]
            offsets = [*((-1, -1) for _ in layout.prefix), *offsets]
            offsets += [(behind, behind + 1) for _ in layout.suffix]
        tokens = np.array(ids, dtype=np.int32)
        chars = np.fromiter(chain.from_iterable(offsets), dtype=np.int64, count=2 * len(ids))
        starts, ends = chars[::2], chars[1::2]
        weights = np.zeros(len(tokens), dtype=np.float32)
        reasons = np.full(len(tokens), Reason.CONTEXT, dtype=np.uint8)
        for span in layout.spans:
            inside = (starts >= span.start) & (starts < span.end)
            for i in np.flatnonzero((starts < span.start) & (ends > span.start)):
                # A token that reaches into the span has to be produced, so it is trained; except an added
                # token of the header that has merely swallowed the whitespace after it.
                inside[i] = not (self._added[ids[i]] and layout.text[span.start : ends[i]].isspace())
            weights[inside] = span.weight
            reasons[inside] = Reason.TRAINED if span.weight > 0 else Reason.ZERO_WEIGHT
        if len(tokens) and weights[0] > 0:
            weights[0], reasons[0] = 0.0, Reason.FIRST
        if not (weights > 0).any():
            raise SFTError(
                "nothing to train on: no token of this row has a weight above 0",
                where=str(layout.meta),
                fix="remove the row, or give one of its messages a weight",
            )
        return Example(tokens, weights, reasons, layout.meta)


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


def _with_name(tool: Mapping[str, object], wrap: Callable[[object], object]) -> dict[str, object]:
    """The tool with `wrap` applied to its name."""
    if isinstance(function := tool.get("function"), Mapping):
        return {**tool, "function": _with_name(function, wrap)}
    return {**tool, "name": wrap(tool["name"])} if "name" in tool else dict(tool)


def _checked(weight: float, where: str) -> float:
    if not 0 <= weight <= float(np.finfo(np.float32).max):
        raise SFTError(f"weight {weight} is not a finite number of at least 0", where=where)
    return float(np.float32(weight))


def _difference(expected: str, text: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(expected, text, strict=False)) if a != b), len(text))
    return f"character {at}: {expected[at : at + 40]!r} against {text[at : at + 40]!r}"
