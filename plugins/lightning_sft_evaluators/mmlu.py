"""MMLU: Measuring Massive Multitask Language Understanding (Hendrycks et al., 2021)."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Literal

from lightning_sft import (
    Answered,
    Evaluator,
    Generate,
    Item,
    LogLikelihood,
    Record,
    Results,
    SFTError,
    scores_by_task,
)
from lightning_sft_evaluators.prompts import FewShot, chosen, shares
from lightning_sft_evaluators.questions import LETTERS, Question, QuestionFiles
from lightning_sft_evaluators.subjects import CATEGORY

_DESCRIPTIONS = {
    "letters": "The following are multiple choice questions (with answers) about {subject}.\n\n",
    "continuation": "The following are questions (with answers) about {subject}.\n\n",
    "generative": "The following are multiple choice questions (with answers) about {subject}.\n\n",
}


class MMLU(Evaluator):
    """Multiple-choice questions of 57 subjects; and, by its options, MMLU-Pro, MMLU-Redux and files of that kind.

    Args:
        path: A folder with dev/ and test/ (`<subject>_test.csv`, with or without a header, or .jsonl, .parquet), a
            file with a column `subject`, or a Hub id (cais/mmlu).
        shots: Questions with answers before each one: the first of the subject's in `dev`.
        style: `letters`: the likeliest of the letters; `continuation`: of the choices themselves;
            `generative`: the letter that is written.
        dev: Where the shots come from, if not from `path`.
        split: The split that is asked.
        dev_split: The split of the shots.
        subjects: Only these; all by default.
        limit: Only so many questions of each subject: the first; with `seed`, some at random.
        total: Only so many in all, in proportion to the subjects' sizes.
        seed: Seed of that choice.
        chat: Ask through the model's chat template, the description as the system message.
        turns: In a chat, each shot is a turn of its own; else all is one turn.
        description: What comes first, with `{subject}`; by default the harness's.
        choices: How many choices each question has; null: any number up to 26 (MMLU-Pro).
        columns: The data's names for question, choices, answer and subject, where they differ.
        keep: Only rows with these values, by column (MMLU-Redux: `error_type: ok`).
        revision: The branch, tag or commit of a Hub dataset.
        max_new_tokens: Most tokens of an answer in the style `generative`.
    """

    def __init__(
        self,
        path: str,
        shots: int = 5,
        style: Literal["letters", "continuation", "generative"] = "letters",
        dev: str | None = None,
        split: str = "test",
        dev_split: str = "dev",
        subjects: list[str] | None = None,
        limit: int | None = None,
        total: int | None = None,
        seed: int | None = None,
        chat: bool = False,
        turns: bool = True,
        description: str | None = None,
        choices: int | None = 4,
        columns: dict[str, str] | None = None,
        keep: dict[str, str] | None = None,
        revision: str | None = None,
        max_new_tokens: int = 256,
    ) -> None:
        for name, value, least in (("shots", shots, 0), ("limit", limit, 1), ("total", total, 1)):
            if value is not None and value < least:
                raise SFTError(f"{name} is {value}", where=f"MMLU.{name}", fix=f"give {least} or more")
        self.files = QuestionFiles(path, choices, columns or {}, keep or {}, revision)
        self.dev_files = QuestionFiles(dev or path, choices, columns or {}, {}, revision)
        self.shots = shots
        self.style = style
        self.split, self.dev_split = split, dev_split
        self.subjects = subjects
        self.limit, self.total, self.seed = limit, total, seed
        self.chat, self.turns = chat, turns
        self.description = _DESCRIPTIONS[style] if description is None else description
        self.max_new_tokens = max_new_tokens

    def requests(self) -> Sequence[Item]:
        """One item for each question, subject after subject."""
        tests = self._chosen_subjects(self.files.read(self.split, self.subjects))
        dev = self.dev_files.read(self.dev_split, tests) if self.shots else {}
        limits: list[int | None] = [self.limit] * len(tests)
        if self.total is not None:
            sizes = [min(len(questions), self.limit or len(questions)) for questions in tests.values()]
            limits = list(shares(sizes, self.total))
        items = []
        for (subject, questions), limit in zip(tests.items(), limits, strict=True):
            writer = self._writer(subject, dev.get(subject, []))
            for number in chosen(len(questions), limit, self.seed):
                items.append(self._item(writer, questions[number], number))
        return items

    def score(self, answered: Sequence[Answered]) -> Results:
        """`acc`, over all questions, each category and each subject; `acc_norm` too for the style `continuation`."""
        records = tuple(self._judge(each) for each in answered)
        metrics = list(records[0].metrics) if records else []
        scores = [
            score
            for metric in metrics
            for score in scores_by_task(records, metric, "mmlu", lambda subject: _groups(subject))
        ]
        return Results(tuple(scores), records)

    def _chosen_subjects(self, tests: dict[str, list[Question]]) -> dict[str, list[Question]]:
        wanted = self.subjects
        if wanted is None and tests and tests.keys() < CATEGORY.keys():
            wanted = sorted(CATEGORY)
        if wanted is None:
            wanted = sorted(tests)
        for subject in wanted:
            if subject not in tests:
                error = self.files.missing(self.split, subject)
                fix = f"{error.fix}; or list the subjects that you want in `subjects`"
                raise SFTError(error.what, where=error.where, fix=fix)
        return {subject: tests[subject] for subject in wanted}

    def _writer(self, subject: str, dev: list[Question]) -> FewShot:
        if len(dev) < self.shots:
            error = self.dev_files.missing(self.dev_split, subject)
            what = error.what if not dev else f"only {len(dev)} {self.dev_split} questions of {subject}"
            raise SFTError(f"{what}; shots is {self.shots}", where=error.where, fix=error.fix)
        shots = [(self._asked(each), self._right(each)) for each in dev[: self.shots]]
        description = self.description.replace("{subject}", subject.replace("_", " "))
        return FewShot(description, shots, " ", self.chat, self.turns)

    def _asked(self, question: Question) -> str:
        if self.style == "continuation":
            return f"Question: {question.text.strip()}\nAnswer:"
        lines = [f"{letter}. {each}" for letter, each in zip(LETTERS, question.choices, strict=False)]
        return "\n".join([question.text.strip(), *lines, "Answer:"])

    def _right(self, question: Question) -> str:
        return question.choices[question.answer] if self.style == "continuation" else LETTERS[question.answer]

    def _item(self, writer: FewShot, question: Question, number: int) -> Item:
        prompt = writer.prompt(self._asked(question))
        requests: tuple[Generate | LogLikelihood, ...]
        if self.style == "generative":
            requests = (Generate(prompt, ("</s>", "\n"), self.max_new_tokens),)
        else:
            gap = "" if self.chat else " "
            texts = question.choices if self.style == "continuation" else LETTERS[: len(question.choices)]
            requests = tuple(LogLikelihood(prompt, f"{gap}{text}") for text in texts)
        return Item(
            question.subject,
            number,
            requests,
            LETTERS[question.answer],
            text=question.text,
            answer=question.choices[question.answer],
        )

    def _judge(self, answered: Answered) -> Record:
        target = answered.item.target
        if self.style == "generative":
            answer = re.match(r"(.*?)(?=\n|$)", answered.text).group(0).strip()  # type: ignore[union-attr]
            return Record.of(answered, answer, {"acc": float(_bare(answer) == _bare(target))})
        answer = LETTERS[answered.likeliest]
        metrics = {"acc": float(answer == target)}
        if self.style == "continuation":
            asked = answered.item.requests
            sizes = [
                len(each.continuation) - (not self.chat) for each in asked if isinstance(each, LogLikelihood)
            ]
            per_character = [s / max(1, n) for s, n in zip(answered.log_likelihoods, sizes, strict=True)]
            normalised = LETTERS[per_character.index(max(per_character))]
            metrics["acc_norm"] = float(normalised == target)
        return Record.of(answered, answer, metrics)


def _groups(subject: str) -> Sequence[str]:
    return (CATEGORY[subject],) if subject in CATEGORY else ()


def _bare(text: str) -> str:
    """Without case and punctuation."""
    return text.lower().translate(str.maketrans("", "", string.punctuation))
