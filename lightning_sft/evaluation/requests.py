"""What a model is asked in an evaluation, and what it answers; plain data, without a tokenizer or a model.

A prompt is text as the model gets it, or messages, which the Scorer renders with the model's chat template up to
where the assistant begins. Several choices of one question are several `LogLikelihood`s with the same context: the
Scorer computes it once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields

from lightning_sft.conversation import Conversation, Message

Prompt = str | tuple[Message, ...] | Conversation
"""Text, or the messages of a conversation before the answer; a `Conversation` where there are tools or options, too."""


@dataclass(frozen=True, slots=True)
class LogLikelihood:
    """How likely the continuation is after the context.

    Args:
        context: What comes before; an empty one is the BOS token (EOS without one).
        continuation: What is scored: all its tokens. White space at the end of the context is scored with it.
    """

    context: Prompt
    continuation: str


@dataclass(frozen=True, slots=True)
class RollingLogLikelihood:
    """How likely a whole text is, of any length.

    Its tokens are scored in windows of the model's context that don't overlap; the last window is filled up with
    the tokens before it as context.

    Args:
        text: What is scored.
    """

    text: str


@dataclass(frozen=True, slots=True)
class Generate:
    """What the model writes after the prompt.

    Args:
        prompt: What comes before; of a longer one the last `context − max_new_tokens` tokens are kept.
        stop: Texts that end the answer; they aren't part of it. An end-of-turn or EOS token always ends it.
        max_new_tokens: Most tokens of the answer.
        temperature: 0 takes the likeliest token each time; else tokens are drawn, seeded by the request itself.
    """

    prompt: Prompt
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 256
    temperature: float = 0.0


@dataclass(frozen=True, slots=True)
class Converse:
    """What the model answers to one message of a user after the other, with all that was said before.

    Args:
        turns: The user's messages: at least one.
        system: The system message before them.
        max_new_tokens: Most tokens of each answer.
        temperature: As for `Generate`.
    """

    turns: tuple[str, ...]
    system: str | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0

    def next(self, answers: Sequence[str]) -> Generate:
        """What is asked after these answers to the first turns."""
        said = [Message("system", self.system)] if self.system is not None else []
        for turn, answer in zip(self.turns, answers, strict=False):
            said += [Message("user", turn), Message("assistant", answer)]
        asked = (*said, Message("user", self.turns[len(answers)]))
        return Generate(asked, max_new_tokens=self.max_new_tokens, temperature=self.temperature)


Request = LogLikelihood | RollingLogLikelihood | Generate | Converse


@dataclass(frozen=True, slots=True)
class Likelihood:
    """The answer to `LogLikelihood` and `RollingLogLikelihood`.

    Args:
        log_likelihood: Σ log p(token), in nats, over the scored tokens.
        tokens: How many those are.
        greedy: Each of them is the likeliest one at its place.
    """

    log_likelihood: float
    tokens: int
    greedy: bool


@dataclass(frozen=True, slots=True)
class Generated:
    """The answer to `Generate`.

    Args:
        text: What was written, up to the first stop text, without special tokens.
        tokens: How many tokens were written, with the one that ended it.
    """

    text: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Conversed:
    """The answer to `Converse`.

    Args:
        answers: What was answered to each turn.
    """

    answers: tuple[Generated, ...]


Response = Likelihood | Generated | Conversed


@dataclass(frozen=True, slots=True)
class ItemText:
    """What an item says, for tests that training data doesn't hold it.

    Args:
        id: Which item: its task and its number there; no two items of an evaluator have the same.
        text: The question, or the text that is scored.
        answer: The right answer in words; empty where there is none.
    """

    id: str
    text: str
    answer: str = ""


@dataclass(frozen=True, slots=True)
class Item:
    """One item of an evaluation: a question, a text, a task to do.

    Args:
        task: The part of the evaluation that it belongs to, as its scores are given: a subject, a file.
        number: Its place in the task's data, from 0.
        requests: What the model is asked for it.
        target: The right answer.
        data: What judging needs beside it, in JSON types.
        text: The question without examples and instructions, as training data could hold it; without it all that
            is asked counts as such.
        answer: The right answer in words, where `target` isn't.
    """

    task: str
    number: int
    requests: tuple[Request, ...]
    target: str = ""
    data: Mapping[str, object] = field(default_factory=dict)
    text: str = ""
    answer: str = ""

    @property
    def exposed(self) -> ItemText:
        """The item's text and answer, with an id."""
        text = self.text or "\n".join(
            dict.fromkeys(each for asked in self.requests for each in _texts_of(asked))
        )
        return ItemText(f"{self.task}/{self.number}", text, self.answer or self.target)

    @property
    def key(self) -> str:
        """A hash of all requests: 16 hexadecimal digits, the same in every process and version."""
        told = [
            [type(each).__name__, *(getattr(each, option.name) for option in fields(each))]
            for each in self.requests
        ]
        return hashlib.sha256(json.dumps(told, default=asdict).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Answered:
    """An item with the model's responses, one for each of its requests.

    Args:
        item: What was asked.
        responses: In the order of `item.requests`.
    """

    item: Item
    responses: tuple[Response, ...]

    @property
    def log_likelihoods(self) -> list[float]:
        """Those of the responses that have one, in order: the scores of the choices."""
        return [each.log_likelihood for each in self.responses if isinstance(each, Likelihood)]

    @property
    def likeliest(self) -> int:
        """The index of the likeliest choice, the lowest one on ties."""
        found = self.log_likelihoods
        return found.index(max(found))

    @property
    def text(self) -> str:
        """The first text that was generated.

        Raises:
            ValueError: None was asked for.
        """
        for response in self.responses:
            if isinstance(response, Generated):
                return response.text
        raise ValueError(f"nothing was generated for {self.item.task} {self.item.number}")


def _texts_of(request: Request) -> tuple[str, ...]:
    """All texts of a request."""
    if isinstance(request, RollingLogLikelihood):
        return (request.text,)
    if isinstance(request, Converse):
        return request.turns
    prompt = request.context if isinstance(request, LogLikelihood) else request.prompt
    messages = prompt.messages if isinstance(prompt, Conversation) else prompt
    texts = (messages,) if isinstance(messages, str) else tuple(message.content for message in messages)
    return (*texts, request.continuation) if isinstance(request, LogLikelihood) else texts
