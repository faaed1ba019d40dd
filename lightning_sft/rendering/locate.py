"""Where the pieces of the messages' text lie in the rendering: proved by a second one with sentinels."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from lightning_sft.conversation import PartWeight
from lightning_sft.errors import SFTError
from lightning_sft.rendering.template import ChatMessage, Template, Tools

Part = Literal["content", "reasoning", "call"]

_THOUGHT = re.compile(r"(\s*<think>)(.*?)(</think>)(.*)", re.DOTALL)
"""A content that begins with reasoning in tags, as many data sets have it."""

_DIGITS = 7
"""Digits of a sentinel after its nonce: the number of the piece, and 1 where it begins or 2 where it ends."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A text of a message: the characters from `start` to before `end` of the rendering, and its own weight."""

    start: int
    end: int
    part: Part
    weight: float | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What has to be found of a message.

    Args:
        place: The message, for errors.
        trained: Whether it is trained, so that its pieces may occur only once.
        own: Whether the model wrote it: what an untrained turn of its own leaves out, it leaves out at inference.
        reasoning: Whether its reasoning is trained; if not, the template may leave it out.
        weights: The weights of its parts, each of which is a piece of its own.
    """

    place: str
    trained: bool
    own: bool
    reasoning: bool
    weights: tuple[PartWeight, ...] = ()


def locate(
    template: Template, messages: Sequence[ChatMessage], tools: Tools, text: str, wanted: Sequence[Wanted]
) -> list[list[Piece]]:
    """For each message, where the pieces of its text lie in `text`, in order of position.

    Args:
        template: The template that made `text`.
        messages: The messages that `text` was made of.
        tools: Likewise.
        text: The rendering.
        wanted: What has to be found of each message.

    Raises:
        SFTError: The template changes, leaves out or repeats text that has to be found.
    """
    try:
        return _Search(template, messages, tools, text, wanted).found
    except SFTError:
        apart = [
            _thought_apart(m) if w.trained and not w.weights else m
            for m, w in zip(messages, wanted, strict=True)
        ]
        if apart == list(messages) or template.render(apart, tools) != text:
            raise
        return _Search(template, apart, tools, text, wanted).found


class _Search:
    """One rendering with sentinels, taken apart again."""

    def __init__(
        self,
        template: Template,
        messages: Sequence[ChatMessage],
        tools: Tools,
        text: str,
        wanted: Sequence[Wanted],
    ) -> None:
        # Its one 9 is its first character, so it can't overlap itself or be completed by a text before it.
        self._nonce = next(nonce for n in range(10**9) if (nonce := f"9{_without_nines(n):0>11}") not in text)
        self._stops = template.known_stops
        self._parts: list[tuple[Part, float | None]] = []
        wrapped_tools = [_with_name(tool, lambda value: self._wrap(value, "content")) for tool in tools]
        tool_numbers = range(len(self._parts))
        wrapped, owned = [], []
        for message, want in zip(messages, wanted, strict=True):
            first = len(self._parts)
            wrapped.append(self._wrapped_message(message, want))
            owned.append(range(first, len(self._parts)))
        self._positions = self._taken_apart(template.render(wrapped, wrapped_tools), text)
        if any((n, 1) not in self._positions for n in tool_numbers):
            raise SFTError(
                "the row has tools, which the chat template leaves out",
                fix="use a chat template that renders tools, such as model.chat_template: plain",
            )
        self.found = [
            self._pieces(message, want, numbers)
            for message, want, numbers in zip(messages, wanted, owned, strict=True)
        ]

    def _wrapped_message(self, message: ChatMessage, want: Wanted) -> ChatMessage:
        wrapped = dict(message)
        content = str(message["content"])
        thought = None if want.reasoning else _THOUGHT.fullmatch(content)
        if thought and want.own and want.trained:
            cuts: list[tuple[int, int, Part]] = [
                (*thought.span(2), "reasoning"),
                (*thought.span(4), "content"),
            ]
        else:
            cuts = [(0, len(content), "content")]
        wrapped["content"] = self._wrap_text(content, cuts, _of("content", want.weights))
        # An untrained turn's reasoning may be left out, as many templates do with earlier turns.
        if want.trained and "reasoning_content" in message:
            reasoning = str(message["reasoning_content"])
            cuts = [(0, len(reasoning), "reasoning")]
            wrapped["reasoning_content"] = self._wrap_text(reasoning, cuts, _of("reasoning", want.weights))
        if isinstance(calls := message.get("tool_calls"), list):
            ranges = _of("tool_calls", want.weights)
            weights = [_at(n, ranges) for n in range(len(calls))]
            wrapped["tool_calls"] = [
                {**call, "function": self._wrap(call["function"], "call", weight)}
                for call, weight in zip(calls, weights, strict=True)
            ]
        return wrapped

    def _wrap_text(
        self, text: str, cuts: Sequence[tuple[int, int, Part]], weights: Sequence[PartWeight]
    ) -> str:
        """The text with each cut, and within it each part with a weight and what lies between, in sentinels.

        Outer whitespace of a cut stays outside.
        """
        edges = sorted({edge for each in weights for edge in (each.start, each.end)})
        out, done = "", 0
        for start, end, part in cuts:
            end -= len(text[start:end]) - len(text[start:end].rstrip())
            start += len(text[start:end]) - len(text[start:end].lstrip())
            inner = [start, *(edge for edge in edges if start < edge < end), end]
            out += text[done:start]
            for a, b in pairwise(inner):
                out += self._marked(text[a:b], part, _at(a, weights)) if a < b else ""
            done = end
        return out + text[done:]

    def _marked(self, text: str, part: Part, weight: float | None) -> str:
        number = len(self._parts)
        self._parts.append((part, weight))
        opening, closing = (f"{self._nonce}{number:0{_DIGITS - 1}}{side}" for side in (1, 2))
        return f"{opening}{text}{closing}"

    def _wrap(self, value: object, part: Part, weight: float | None = None) -> object:
        """`value` with sentinels inside its outer whitespace, so that templates that trim still do."""
        if isinstance(value, str) and (core := value.strip()):
            at = value.index(core)
            return f"{value[:at]}{self._marked(core, part, weight)}{value[at + len(core) :]}"
        if isinstance(value, Mapping):
            return {
                self._wrap(key, part, weight)
                if any(stop in key for stop in self._stops)
                else key: self._wrap(item, part, weight)
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self._wrap(item, part, weight) for item in value]
        return value

    def _taken_apart(self, marked: str, text: str) -> dict[tuple[int, int], list[int]]:
        """Where each sentinel, (number, side), stands in `text`."""
        positions: dict[tuple[int, int], list[int]] = {}
        position, plain = 0, []
        for n, part in enumerate(re.split(f"{self._nonce}([0-9]{{{_DIGITS}}})", marked)):
            if n % 2:
                positions.setdefault((int(part[:-1]), int(part[-1])), []).append(position)
            else:
                plain.append(part)
                position += len(part)
        if "".join(plain) != text:
            raise SFTError(
                "the chat template changes the messages' text (more than by trimming or replacing parts of it)",
                fix="use a chat template that keeps the text in place (model.chat_template)",
            )
        return positions

    def _pieces(self, message: ChatMessage, want: Wanted, numbers: Iterable[int]) -> list[Piece]:
        pieces = []
        for number in numbers:
            starts, ends = (self._positions.get((number, side), []) for side in (1, 2))
            part, weight = self._parts[number]
            if len(starts) != len(ends) or not starts:
                if (want.own and not want.trained) or (part == "reasoning" and not want.reasoning):
                    continue
                text = "the reasoning" if part == "reasoning" else "text"
                raise SFTError(
                    f"the chat template leaves out {text} of this message",
                    where=want.place,
                    fix="use a chat template that renders this role and these fields (model.chat_template)"
                    + (
                        ", or set model.render.train_reasoning: false, or give this turn weight 0"
                        if "reasoning_content" in message
                        else ""
                    ),
                )
            if want.trained and len(starts) > 1:
                raise SFTError("the chat template repeats the text of this message", where=want.place)
            pieces.append(Piece(starts[0], ends[0], part, weight))
        if want.trained and want.own and not pieces:
            raise SFTError("the response is empty", where=want.place, fix="remove the row, or fill it in")
        return sorted(pieces, key=lambda piece: (piece.start, piece.end))


def _of(field: str, weights: Sequence[PartWeight]) -> list[PartWeight]:
    return [each for each in weights if each.field == field]


def _at(place: int, weights: Sequence[PartWeight]) -> float | None:
    """The weight of the part that a character or a call is in; None outside."""
    return next((each.weight for each in weights if each.start <= place < each.end), None)


def _thought_apart(message: ChatMessage) -> ChatMessage:
    """The message with the reasoning out of its content: how a template that takes it apart should render it."""
    thought = _THOUGHT.fullmatch(str(message["content"]))
    if thought is None or "reasoning_content" in message:
        return message
    return {**message, "reasoning_content": thought[2].strip("\n"), "content": thought[4].lstrip("\n")}


def _without_nines(number: int) -> str:
    """The number in base 9: a digit string without a 9."""
    digits = ""
    while number:
        number, digit = divmod(number, 9)
        digits = f"{digit}{digits}"
    return digits


def _with_name(tool: Mapping[str, object], wrap: Callable[[object], object]) -> dict[str, object]:
    """The tool with `wrap` applied to its name."""
    if isinstance(function := tool.get("function"), Mapping):
        return {**tool, "function": _with_name(function, wrap)}
    return {**tool, "name": wrap(tool["name"])} if "name" in tool else dict(tool)
