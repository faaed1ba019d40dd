"""Domains of a forgetting probe: general text, questions, or an evaluator's items; what they ask, and of whom."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeGuard

import numpy as np

from lightning_sft import (
    Answered,
    Converse,
    Evaluator,
    Example,
    Generate,
    Item,
    LogLikelihood,
    Meta,
    Results,
    Row,
    Scorer,
    Segments,
    SFTError,
    Source,
    read_rows,
    text_losses,
)
from lightning_sft_callbacks.overlap import Passage
from lightning_sft_callbacks.retention import Measured

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from transformers import PreTrainedTokenizerBase

    from lightning_sft import Predictions, SFTModule, TextLoss

_SAMPLE = 32  # items whose tokens are counted, for how many tokens the others have


@dataclass
class Domain:
    """Something that the base can do and is not to forget; one of `text`, `questions` and `evaluator`.

    Args:
        name: How it is called in the figures.
        text: A data file, folder or Hub dataset with a column `text`.
        questions: The same with `question`, `choices` (a list) and `answer` (the index of the right one).
        evaluator: Any evaluator; its first score counts.
        weight: How much it counts in the retention R, beside the other domains.
        limit: Only the first so many texts, questions or items, and all of these; without it a `ForgettingProbe`
            asks as many as its `cost` allows, from all over.
        prompt: How a question is asked, with `{question}` in it; the choice follows after a space.
    """

    name: str
    text: str | None = None
    questions: str | None = None
    evaluator: Evaluator | None = None
    weight: float = 1.0
    limit: int | None = None
    prompt: str = "Question: {question} Answer:"

    def __post_init__(self) -> None:
        where = f"domains: {self.name}"
        if sum(part is not None for part in (self.text, self.questions, self.evaluator)) != 1:
            raise SFTError("a domain has either text, questions or an evaluator", where=where, fix="give one")
        if not self.name:
            raise SFTError("a domain has no name", where="domains", fix="give it one, for its figures")
        if not 0 <= self.weight < math.inf:
            raise SFTError(f"weight is {self.weight}", where=where, fix="give 0 or more")
        if "{question}" not in self.prompt:
            raise SFTError("there is no {question} in the prompt", where=where, fix="put it in")
        if self.limit is not None and self.limit < 1:
            raise SFTError(f"limit is {self.limit}", where=where, fix="give 1 or more, or leave it out")
        if self.evaluator is not None and self.evaluator.needs_base:
            raise SFTError(
                f"{type(self.evaluator).__name__} needs the base's answers, which aren't asked for during training",
                where=where,
                fix="take another evaluator",
            )


@dataclass
class Loaded:
    """A domain with what it asks, ready for one model.

    Args:
        domain: What was configured.
        texts: The texts' windows: examples of at most the model's context.
        owners: The text that each window is of.
        bytes: UTF-8 bytes of each text.
        passages: The texts, or the questions with their answers, to look for in the training data.
        items: The questions, or the evaluator's items.
        answers: The index of each question's right choice.
        chances: The probability that a guess at each question is right.
    """

    domain: Domain
    texts: list[Example] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    passages: list[Passage] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)

    @property
    def size(self) -> int:
        """How many texts, questions or items."""
        return len(self.bytes) or len(self.items)

    def costs(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Tokens that one measurement computes for each text, question or item, of items about."""
        if self.texts:
            found = [0] * len(self.bytes)
            for owner, window in zip(self.owners, self.texts, strict=True):
                found[owner] += len(window)
            return found
        sample = self.items[:: max(1, len(self.items) // _SAMPLE)]
        texts = [replace(item, text="").exposed.text for item in sample]
        tokens = sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))
        per_character = tokens / max(1, sum(map(len, texts)))
        return [math.ceil(per_character * _characters(item)) + _written(item) for item in self.items]

    def part(self, places: Sequence[int]) -> Loaded:
        """Only these texts, questions or items."""
        new = {old: place for place, old in enumerate(places)}
        windows = [
            (new[owner], text) for owner, text in zip(self.owners, self.texts, strict=True) if owner in new
        ]
        return replace(
            self,
            texts=[text for _, text in windows],
            owners=[owner for owner, _ in windows],
            bytes=[self.bytes[place] for place in places] if self.bytes else [],
            passages=[self.passages[place] for place in places] if self.passages else [],
            items=[self.items[place] for place in places] if self.items else [],
            answers=[self.answers[place] for place in places] if self.answers else [],
            chances=[self.chances[place] for place in places] if self.chances else [],
        )

    @property
    def digest(self) -> str:
        """A hash of all that is asked."""
        found = hashlib.sha256(f"{self.domain.prompt} {self.bytes} {self.answers}".encode())
        for example in self.texts:
            found.update(example.input_ids.tobytes())
        for item in self.items:
            found.update(json.dumps([item.key, item.target, item.data], default=_told).encode())
        if (judge := self.domain.evaluator) is not None:
            found.update(f"{type(judge).__qualname__} {json.dumps(vars(judge), default=_told)}".encode())
        return found.hexdigest()[:16]


def _told(value: object) -> object:
    """What JSON has no type for, the same in each process: without addresses, and sets in an order."""
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def check(domain: Domain) -> None:
    """Refuse data that isn't there: sooner than `load`, which needs a model, and all else to be ready.

    Raises:
        SFTError: There is no such file or data set, or nothing in it.
    """
    path = domain.text if domain.text is not None else domain.questions
    if path is not None:
        try:
            next(read_rows(Source(path, limit=1)))
        except SFTError as error:
            raise error.at(f"domains: {domain.name}") from error


def load(domain: Domain, module: SFTModule) -> Loaded:
    """Read and render a domain.

    Raises:
        SFTError: Its data can't be read, or lacks a column; says which row.
    """
    if domain.evaluator is not None:
        return Loaded(domain, items=items_of(domain.evaluator, f"domains: {domain.name}")[: domain.limit])
    path = domain.text if domain.text is not None else domain.questions
    assert path is not None
    try:
        rows = list(read_rows(Source(path, limit=domain.limit)))
        if domain.text is not None:
            return _load_text(domain, [(meta, _text(row, str(meta))) for meta, row in rows], module)
        return _load_questions(domain, [(str(meta), row) for meta, row in rows])
    except SFTError as error:
        raise error.at(f"domains: {domain.name}") from error


def items_of(evaluator: Evaluator, where: str) -> list[Item]:
    """What the evaluator asks.

    Raises:
        SFTError: Nothing.
    """
    items = list(evaluator.requests())
    if not items:
        raise SFTError(
            f"{type(evaluator).__name__} asks nothing", where=where, fix="check its data, or take it out"
        )
    return items


def _text(row: Row, where: str) -> str:
    text = row.get("text")
    if not isinstance(text, str) or not text.strip():
        raise SFTError(
            "the row has no text", where=f"{where}, key 'text'", fix="give rows with a column `text`"
        )
    return text


def _load_text(domain: Domain, texts: list[tuple[Meta, str]], module: SFTModule) -> Loaded:
    # The empty last segment leaves the EOS token, which would follow, out of the sum.
    examples = module.renderer.render_all([Segments(((text, 1.0), ("", 0.0)), meta) for meta, text in texts])
    loaded = Loaded(domain, bytes=[len(text.encode()) for _, text in texts])
    loaded.passages = [Passage(domain.name, str(meta), text) for meta, text in texts]
    size = module.context_length or max(map(len, examples))
    for owner, example in enumerate(examples):
        for start in range(0, len(example), size):
            part = slice(start, start + size)
            if (example.weights[part][1:] > 0).any():
                loaded.texts.append(
                    Example(
                        example.input_ids[part], example.weights[part], example.reasons[part], example.meta
                    )
                )
                loaded.owners.append(owner)
    if silent := set(range(len(texts))) - set(loaded.owners):
        raise SFTError(
            "the text has one token, so there is nothing to predict",
            where=f"{texts[min(silent)][0]}, key 'text'",
            fix="take the row out",
        )
    return loaded


def _load_questions(domain: Domain, rows: list[tuple[str, Row]]) -> Loaded:
    loaded = Loaded(domain)
    for number, (where, row) in enumerate(rows):
        question, choices, answer = row.get("question"), row.get("choices"), row.get("answer")
        if not isinstance(question, str) or not _are_choices(choices):
            raise SFTError(
                "the row is no question with choices",
                where=where,
                fix="give `question`, `choices` (two or more different texts) and `answer` (an index)",
            )
        if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
            raise SFTError(
                f"answer is {answer!r}, and there are {len(choices)} choices",
                where=f"{where}, key 'answer'",
                fix="give the index of the right choice, from 0",
            )
        context = domain.prompt.replace("{question}", question)
        asked = tuple(LogLikelihood(context, f" {choice}") for choice in choices)
        loaded.items.append(Item(domain.name, number, asked, target=str(choices[answer])))
        loaded.answers.append(answer)
        loaded.passages.append(Passage(domain.name, where, f"{question} {choices[answer]}"))
        loaded.chances.append(1 / len(choices))
    return loaded


def _are_choices(choices: object) -> TypeGuard[list[str | int | float]]:
    """Whether these are two or more texts, no two alike."""
    return (
        isinstance(choices, list)
        and all(isinstance(choice, str | int | float) and str(choice).strip() for choice in choices)
        and len(set(map(str, choices))) == len(choices) > 1
    )


def _characters(item: Item) -> int:
    """Of all that is asked; what the requests have in common is computed once."""
    return len(replace(item, text="").exposed.text)


def _written(item: Item) -> int:
    """Most tokens that the model writes."""
    return sum(
        each.max_new_tokens * (len(each.turns) if isinstance(each, Converse) else 1)
        for each in item.requests
        if isinstance(each, Generate | Converse)
    )


def scored(evaluator: Evaluator, answered: Sequence[Answered], trainer: Trainer) -> Results:
    """What an evaluator makes of answers that all ranks have; rank 0 judges, as a judge may be slow, or paid for.

    Raises:
        SFTError: It makes no score of them.
    """
    results = evaluator.score(answered) if trainer.is_global_zero else Results((), ())
    found: Results = trainer.strategy.broadcast(results)
    if not found.scores:
        raise SFTError(
            f"{type(evaluator).__name__} has given no score of {len(answered)} items",
            where="trainer.callbacks",
            fix="check the evaluator's data and limits with lightning-sft evaluate, or take it out",
        )
    return found


def measure(
    loaded: Loaded,
    module: SFTModule,
    scorer: Scorer,
    *,
    against_base: bool = False,
    reference: Sequence[Predictions] | None = None,
    keep: int = 0,
) -> tuple[Measured, list[Predictions]]:
    """How the model does on a domain now, and what it predicts of its texts (`keep` tokens of each position).

    Args:
        loaded: The domain.
        module: Whose model is asked.
        scorer: What asks it.
        against_base: Measure the divergence from the base with the adapter switched off.
        reference: Measure it from what the base predicted.
        keep: How many of the likeliest tokens to keep.
    """
    if loaded.texts:
        losses = text_losses(module, loaded.texts, against_base=against_base, reference=reference, keep=keep)
        return _of_texts(loaded, losses), [
            each.predictions for each in losses if each.predictions is not None
        ]
    responses = iter(scorer.run([request for item in loaded.items for request in item.requests]))
    answered = [Answered(item, tuple(next(responses) for _ in item.requests)) for item in loaded.items]
    if loaded.domain.evaluator is not None:
        first = scored(loaded.domain.evaluator, answered, module.trainer).scores[0]
        return Measured(score=first.value, higher_is_better=first.higher_is_better), []
    losses_of_questions = []
    for each, answer in zip(answered, loaded.answers, strict=True):
        scores = np.asarray(each.log_likelihoods, float)
        losses_of_questions.append(float(np.logaddexp.reduce(scores) - scores[answer]))
    return (
        Measured(
            losses=tuple(losses_of_questions),
            sizes=(1,) * len(answered),
            right=tuple(a.likeliest == b for a, b in zip(answered, loaded.answers, strict=True)),
            chance=sum(loaded.chances) / len(loaded.chances),
        ),
        [],
    )


def _of_texts(loaded: Loaded, windows: Sequence[TextLoss]) -> Measured:
    texts = len(loaded.bytes)
    nll, tokens, kl = [0.0] * texts, [0] * texts, [0.0] * texts
    for owner, window in zip(loaded.owners, windows, strict=True):
        nll[owner] += window.nll
        tokens[owner] += window.tokens
        kl[owner] += window.kl or 0.0
    scored = [i for i in range(texts) if tokens[i]]
    return Measured(
        losses=tuple(nll[i] for i in scored),
        sizes=tuple(tokens[i] for i in scored),
        bytes=tuple(loaded.bytes[i] for i in scored),
        kl=tuple(kl[i] for i in scored) if windows[0].kl is not None else (),
    )
