"""Domains of a forgetting probe: general text, questions, or an evaluator's items; what they ask, and of whom."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from lightning_sft import (
    Answered,
    Evaluator,
    Example,
    Item,
    LogLikelihood,
    Meta,
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
    from lightning_sft import Predictions, SFTModule, TextLoss


@dataclass
class Domain:
    """Something that the base can do and is not to forget; one of `text`, `questions` and `evaluator`.

    Args:
        name: How it is called in the figures.
        text: A data file, folder or Hub dataset with a column `text`.
        questions: The same with `question`, `choices` (a list) and `answer` (the index of the right one).
        evaluator: Any evaluator; its first score counts.
        weight: How much it counts in the retention R, beside the other domains.
        limit: Only the first so many texts or questions.
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
        if not self.weight >= 0:
            raise SFTError(f"weight is {self.weight}", where=where, fix="give 0 or more")
        if "{question}" not in self.prompt:
            raise SFTError("there is no {question} in the prompt", where=where, fix="put it in")


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
        chance: The expected accuracy of guessing.
    """

    domain: Domain
    texts: list[Example] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    passages: list[Passage] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)
    chance: float = 0.0

    @property
    def tokens(self) -> int:
        """About how many tokens one measurement computes; characters / 3 of what isn't tokenised yet."""
        characters = sum(
            len(str(getattr(request, "context", getattr(request, "prompt", "")))) + 16
            for item in self.items
            for request in item.requests
        )
        return sum(map(len, self.texts)) + characters // 3

    @property
    def digest(self) -> str:
        """A hash of all that is asked."""
        found = hashlib.sha256(self.domain.prompt.encode())
        for example in self.texts:
            found.update(example.input_ids.tobytes())
        for item in self.items:
            found.update(item.key.encode())
        found.update(str(self.answers).encode())
        return found.hexdigest()[:16]


def load(domain: Domain, module: SFTModule) -> Loaded:
    """Read and render a domain.

    Raises:
        SFTError: Its data can't be read, or lacks a column; says which row.
    """
    if domain.evaluator is not None:
        return Loaded(domain, items=list(domain.evaluator.requests()))
    path = domain.text if domain.text is not None else domain.questions
    assert path is not None
    try:
        rows = list(read_rows(Source(path, limit=domain.limit)))
        if domain.text is not None:
            return _load_text(domain, [(meta, _text(row, str(meta))) for meta, row in rows], module)
        return _load_questions(domain, [(str(meta), row) for meta, row in rows])
    except SFTError as error:
        raise error.at(f"domains: {domain.name}") from error


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
    return loaded


def _load_questions(domain: Domain, rows: list[tuple[str, Row]]) -> Loaded:
    loaded = Loaded(domain)
    chances = []
    for number, (where, row) in enumerate(rows):
        question, choices, answer = row.get("question"), row.get("choices"), row.get("answer")
        if not isinstance(question, str) or not isinstance(choices, list) or len(choices) < 2:
            raise SFTError(
                "the row is no question with choices",
                where=where,
                fix="give `question`, `choices` (a list of two or more) and `answer` (an index)",
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
        chances.append(1 / len(choices))
    loaded.chance = sum(chances) / len(chances)
    return loaded


def measure(
    loaded: Loaded,
    module: SFTModule,
    *,
    against_base: bool = False,
    reference: Sequence[Predictions] | None = None,
    keep: int = 0,
) -> tuple[Measured, list[Predictions]]:
    """How the model does on a domain now, and what it predicts of its texts (`keep` tokens of each position).

    Args:
        loaded: The domain.
        module: Whose model is asked.
        against_base: Measure the divergence from the base with the adapter switched off.
        reference: Measure it from what the base predicted.
        keep: How many of the likeliest tokens to keep.
    """
    if loaded.texts:
        losses = text_losses(module, loaded.texts, against_base=against_base, reference=reference, keep=keep)
        return _of_texts(loaded, losses), [
            each.predictions for each in losses if each.predictions is not None
        ]
    scorer = Scorer.of(module)
    responses = iter(scorer.run([request for item in loaded.items for request in item.requests]))
    answered = [Answered(item, tuple(next(responses) for _ in item.requests)) for item in loaded.items]
    if loaded.domain.evaluator is not None:
        return Measured(score=loaded.domain.evaluator.score(answered).scores[0].value), []
    losses_of_questions = []
    for each, answer in zip(answered, loaded.answers, strict=True):
        scores = np.asarray(each.log_likelihoods, float)
        losses_of_questions.append(float(np.logaddexp.reduce(scores) - scores[answer]))
    return (
        Measured(
            losses=tuple(losses_of_questions),
            sizes=(1,) * len(answered),
            right=tuple(a.likeliest == b for a, b in zip(answered, loaded.answers, strict=True)),
            chance=loaded.chance,
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
