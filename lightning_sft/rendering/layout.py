"""What is trained of a text, by position: from located messages and policies to weighted spans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lightning_sft.conversation import Conversation, Message, Meta, PartWeight
from lightning_sft.errors import SFTError
from lightning_sft.example import Reason
from lightning_sft.rendering.locate import Piece, Wanted, locate
from lightning_sft.rendering.policies import RenderPolicies, checked_weight
from lightning_sft.rendering.template import Template, Tools, as_chat_message

NO_EOT = "train_on_eot: none: no end of a turn is trained, and whether each turn has one isn't checked"
AFTERWARDS = "text to train on after the last trained turn is in no example (split_turns)"

_KEEP = "use a chat template that keeps history (model.chat_template), or give the turn weight 0"
_SPLIT = f"set model.render.split_turns: true, which renders each trained turn as inference does; or {_KEEP}"


@dataclass(frozen=True, slots=True)
class Span:
    """The characters from `start` to before `end`, with what becomes of their tokens.

    Args:
        start: First character.
        end: The character behind the last one.
        weight: Loss weight of the tokens.
        reason: Why they are trained or not.
        message: The message (or segment) that they belong to, counted from 0.
    """

    start: int
    end: int
    weight: float
    reason: Reason
    message: int | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """Messages of a conversation that are rendered together, as inference would see them.

    Args:
        messages: Their numbers in the conversation, counted from 0, in ascending order.
        trained: Which of them may be trained here; the others, if they are trained at all, are so elsewhere.
        turn: The message that this is the example of, counted from 1, with `split_turns`.
        notes: What is worth knowing about it.
    """

    messages: tuple[int, ...]
    trained: frozenset[int]
    turn: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Layout:
    """A text with its spans, before it is encoded; of spans that overlap, the later one counts.

    `prefix` and `suffix` are token ids around the text; the suffix lies one character behind it. `part` is what it
    holds of a conversation, `stops` the end-of-turn tokens of trained turns, with the character at which each begins.
    """

    text: str
    spans: tuple[Span, ...]
    meta: Meta
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    part: Part | None = None
    notes: tuple[str, ...] = ()
    stops: tuple[tuple[int, str], ...] = ()


@dataclass(frozen=True, slots=True)
class _Share:
    """A message's weight, the reason for it, and those of its parts; whether anything of it is trained."""

    weight: float
    reason: Reason
    parts: tuple[PartWeight, ...] = ()

    @property
    def trained(self) -> bool:
        return self.weight > 0 or any(part.weight > 0 for part in self.parts)


def conversation_parts(policies: RenderPolicies, conversation: Conversation) -> list[Part]:
    """The whole conversation; with `split_turns`, a part for each trained turn, with the history before it.

    Raises:
        SFTError: A message has a weight that can't be; says which, without the row's place.
    """
    whole = range(len(conversation.messages))
    if not policies.split_turns:
        return [Part(tuple(whole), frozenset(whole))]
    shares = _shares(conversation.messages, policies)
    turns = [n for n in whole if _is_trained_turn(conversation.messages[n].role, shares[n])]
    if not turns:
        return [Part(tuple(whole), frozenset(whole))]
    parts, before = [], 0
    rest = any(share.trained for share in shares[turns[-1] + 1 :])
    for turn in turns:
        notes = (AFTERWARDS,) if rest and turn == turns[-1] else ()
        parts.append(Part(tuple(range(turn + 1)), frozenset(range(before, turn + 1)), turn + 1, notes))
        before = turn + 1
    return parts


def part_layout(
    template: Template, policies: RenderPolicies, conversation: Conversation, part: Part
) -> Layout:
    """The layout of a part of a conversation; weights and policies are those of the whole.

    Raises:
        SFTError: It can't be rendered exactly; says which message and why, without the row's place.
    """
    shares = _shares(conversation.messages, policies)
    own = [
        shares[n] if n in part.trained or not shares[n].trained else _Share(0.0, Reason.OTHER_TURN)
        for n in part.messages
    ]
    return _Rendered(template, policies, conversation, part, own).layout()


def _is_trained_turn(role: str, share: _Share) -> bool:
    return role == "assistant" and share.trained


def _shares(messages: Sequence[Message], policies: RenderPolicies) -> list[_Share]:
    """What the messages' own weights and the policies make of each."""
    shares = []
    defaults = {"assistant": 1.0, "tool": 0.0}
    for number, message in enumerate(messages, 1):
        place = _place(number, message)
        default = defaults.get(message.role, policies.prompt_weight)
        weight = checked_weight(default if message.weight is None else message.weight, place)
        parts = tuple(replace(p, weight=checked_weight(p.weight, place)) for p in message.part_weights)
        untrained = Reason.ZERO_WEIGHT if message.role == "assistant" else Reason.CONTEXT
        share = _Share(weight, Reason.TRAINED if weight > 0 else untrained, parts)
        if message.role == "tool" and share.trained:
            highest = max(weight, *(part.weight for part in parts)) if parts else weight
            raise SFTError(
                f"the result of a tool has weight {highest:g}, but the model never writes one",
                where=place,
                fix="give it weight 0, or none",
            )
        shares.append(share)
    if policies.train_on == "last_turn":
        turns = [n for n, message in enumerate(messages) if message.role == "assistant"]
        for turn in turns[:-1]:
            shares[turn] = _Share(0.0, Reason.OTHER_TURN)
    return shares


def _place(number: int, message: Message) -> str:
    return f"message {number} ({message.role})"


class _Rendered:
    """One rendering of a conversation, and what is trained of it."""

    def __init__(
        self,
        template: Template,
        policies: RenderPolicies,
        conversation: Conversation,
        part: Part,
        shares: Sequence[_Share],
    ) -> None:
        self.template = template
        self.policies = policies
        self.meta = conversation.meta
        self.part = part
        self.shares = shares
        self.roles = [conversation.messages[n].role for n in part.messages]
        self.places = [_place(n + 1, conversation.messages[n]) for n in part.messages]
        self.messages = [as_chat_message(conversation.messages[n]) for n in part.messages]
        self.tools: Tools = conversation.tools
        self.text = template.render(self.messages, self.tools)
        self.turns = [n for n, role in enumerate(self.roles) if _is_trained_turn(role, shares[n])]
        self.stops: list[tuple[int, str]] = []
        self.notes = [*template.notes, *self._unused_options(conversation.chat_template_kwargs)]

    def layout(self) -> Layout:
        """The text with its spans."""
        located = self._located()
        self._check_bos(located)
        spans: list[Span] = []
        for number, (pieces, share) in enumerate(zip(located, self.shares, strict=True)):
            if not pieces:
                continue
            start, end = pieces[0].start, pieces[-1].end
            message = self.part.messages[number]
            if number in self.turns:
                limit = min((p[0].start for p in located[number + 1 :] if p), default=len(self.text))
                spans += self._turn(number, pieces, limit)
            elif share.parts:
                spans += [self._part_span(number, piece, piece.start, piece.end) for piece in pieces]
            elif self.roles[number] == "assistant" or share.weight > 0:
                spans.append(Span(start, end, share.weight, share.reason, message))
            else:
                spans += [Span(piece.start, piece.end, 0.0, share.reason, message) for piece in pieces]
        if self.policies.train_on_eot == "none":
            self.notes.append(NO_EOT)
        return Layout(
            text=self.text,
            spans=tuple(spans),
            meta=self.meta,
            part=self.part,
            notes=(*self.notes, *self.part.notes),
            stops=tuple(self.stops),
        )

    def _unused_options(self, given: Mapping[str, object]) -> list[str]:
        options = [name for name in given if not self.template.uses(name)]
        return (
            [f"the chat template doesn't use the row's chat_template_kwargs {', '.join(options)}"]
            if options
            else []
        )

    def _located(self) -> list[list[Piece]]:
        wanted = [
            Wanted(
                place=place,
                trained=share.trained,
                own=role == "assistant",
                reasoning=self.policies.train_reasoning or role != "assistant",
                weights=share.parts if share.trained else (),
            )
            for place, share, role in zip(self.places, self.shares, self.roles, strict=True)
        ]
        try:
            return locate(self.template, self.messages, self.tools, self.text, wanted)
        except SFTError as error:
            raise self._explained(error, wanted) from None

    def _explained(self, error: SFTError, wanted: Sequence[Wanted]) -> SFTError:
        """The error, with `split_turns` as the remedy if nothing is wrong with the turn as the last one."""
        turn = next((turn for turn in self.turns if self.places[turn] == error.where), len(self.messages))
        if (end := turn + 1) >= len(self.messages):
            return error
        text = self.template.render(self.messages[:end], self.tools)
        try:
            locate(self.template, self.messages[:end], self.tools, text, wanted[:end])
        except SFTError:
            return error
        what = f"the chat template rewrites history: once others follow, {error.what}"
        return SFTError(what, where=error.where, fix=_SPLIT)

    def _turn(self, number: int, pieces: Sequence[Piece], limit: int) -> list[Span]:
        """The spans of a trained turn: what the model produces, without what the policies leave out."""
        message = self.part.messages[number]
        start = self._start(number, pieces[0].start)
        stop, end = self._stop(number, pieces[-1].end, limit)
        self._check_history_is_kept(number, end)
        if self.shares[number].parts:
            # What the template writes between parts goes with the later one, the end of the turn with the last.
            starts = [start, *(piece.end for piece in pieces[:-1])]
            ends = [*(piece.end for piece in pieces[:-1]), end]
            between = zip(pieces, starts, ends, strict=True)
            spans = [self._part_span(number, piece, *place) for piece, *place in between]
        else:
            spans = [Span(start, end, self.shares[number].weight, Reason.TRAINED, message)]
        if not self.policies.train_reasoning:
            spans += [
                Span(piece.start, piece.end, 0.0, Reason.REASONING, message)
                for piece in pieces
                if piece.part == "reasoning"
            ]
        trained_eot = {"turn": True, "last": number == self.turns[-1], "none": False}
        if not trained_eot[self.policies.train_on_eot]:
            spans.append(Span(stop, end, 0.0, Reason.END_OF_TURN, message))
        return spans

    def _part_span(self, number: int, piece: Piece, start: int, end: int) -> Span:
        """The span of a part: with its own weight, or else the message's."""
        share = self.shares[number]
        weight = share.weight if piece.weight is None else piece.weight
        reason = Reason.TRAINED if weight > 0 else Reason.ZERO_WEIGHT
        return Span(start, end, weight, reason, self.part.messages[number])

    def _start(self, number: int, first_piece: int) -> int:
        """Where the generation prompt ends, which inference gives the model.

        Some generation prompts open what the rendered turn leaves out, such as a `<think>` where there is no
        reasoning. Such a turn is trained from where they part, provided that the history is the same.
        """
        history, place = self.messages[:number], self.places[number]
        prompt = self.template.render(history, self.tools, generation_prompt=True)
        if self.text.startswith(prompt):
            if len(prompt) > first_piece:
                raise SFTError("the generation prompt reaches into this message", where=place)
            return len(prompt)
        parted = common_length(prompt, self.text)
        if parted >= common_length(prompt, self.template.render(history, self.tools)):
            start = min(parted, first_piece)
            self.notes.append(
                f"the generation prompt ends with {prompt[start:]!r}, which the rendered turn leaves out: "
                "trained from where they part"
            )
            return start
        raise SFTError(
            "the chat template renders this turn's history differently once the turn is there, so what inference "
            f"would see is not a prefix of the whole; they part at {_parting(prompt, self.text)}",
            where=place,
            fix=_KEEP if number + 1 == len(self.messages) and number == self.turns[0] else _SPLIT,
        )

    def _stop(self, number: int, after: int, limit: int) -> tuple[int, int]:
        """Where the end-of-turn token of a turn begins and ends."""
        none = self.policies.train_on_eot == "none"
        stops = self.template.known_stops if none else self.template.stop_tokens
        found = [(at, -len(stop)) for stop in stops if (at := self.text.find(stop, after, limit)) >= 0]
        if found:
            at, length = min(found)
            if not none:
                self.stops.append((at, self.text[at : at - length]))
            return at, at - length
        through = self.template.render(self.messages[: number + 1], self.tools)
        if not none:
            ends_as_last = any(stop in through[after:] for stop in stops)
            raise SFTError(
                f"the chat template writes no end-of-turn token ({' or '.join(stops)}) after this turn"
                + (" once others follow" if ends_as_last else ""),
                where=self.places[number],
                fix=_SPLIT
                if ends_as_last
                else "use a chat template that ends every assistant turn (model.chat_template)",
            )
        end = max(after, min(common_length(through.rstrip(), self.text), limit))
        return end, end

    def _check_history_is_kept(self, number: int, end: int) -> None:
        """Refuse a turn that is rendered differently once others follow, as the model would never write it."""
        if number + 1 == len(self.messages):
            return
        through = self.template.render(self.messages[: number + 1], self.tools)
        if not through.startswith(self.text[:end]):
            raise SFTError(
                "the chat template rewrites history: it renders this turn differently once others follow; they "
                f"part at {_parting(through, self.text)}",
                where=self.places[number],
                fix=_SPLIT,
            )

    def _check_bos(self, located: Sequence[Sequence[Piece]]) -> None:
        """Refuse a second BOS at the start; note a missing one, and those further on."""
        bos = self.template.bos
        if bos is None:
            return
        first_piece = min((pieces[0].start for pieces in located if pieces), default=len(self.text))
        if self.text.startswith(bos + bos) and len(bos) < first_piece:
            raise SFTError(
                f"the chat template begins with two BOS tokens ({bos})",
                where="model.chat_template",
                fix="use a chat template that writes one",
            )
        if self.template.tokenizer_adds_bos and not self.text.startswith(bos):
            self.notes.append(f"the chat template writes no BOS token ({bos}), which other texts get")
        if self.text.find(bos, len(bos)) < 0:
            return
        if bos not in (self.template.tokenizer.eos_token, *self.template.known_stops):
            self.notes.append(
                f"there are BOS tokens ({bos}) after the start: the template's, or in the messages"
            )


def common_length(one: str, other: str) -> int:
    """How many characters the texts have in common at their start."""
    return next(
        (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )


def _parting(expected: str, text: str) -> str:
    at = common_length(expected, text)
    return f"character {at}: {expected[at : at + 40]!r} against {text[at : at + 40]!r}"
