"""Benchmarks whose answers are written, declared in YAML."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_sft import (
    Answered,
    Evaluator,
    Generate,
    Item,
    Record,
    Results,
    Row,
    RowExpression,
    RowTemplate,
    SFTError,
)
from lightning_sft_evaluators.declared import Asked, Declared, Shot, at
from lightning_sft_evaluators.finds import find


@dataclass(frozen=True)
class Extraction:
    """How an answer is found in what the model wrote.

    Args:
        pattern: The regular expression; of several groups the first that isn't empty counts. Where nothing is found the
            answer is `[invalid]`.
        place: Which of several finds: 0 the first, -1 the last.
    """

    pattern: str
    place: int = 0


class GenerationTask(Evaluator):
    """Any benchmark with written answers, declared by its data and a Jinja prompt: the answer is compared exactly.

    As in lm-evaluation-harness: what is ignored goes from the answer and from the right one, first the patterns of
    `ignore` in their order, then case, punctuation and digits.

    Args:
        path: A .jsonl, .json, .csv or .parquet file, a folder, the id of a dataset on the Hugging Face Hub, or
            embedded data (tiny:held_out).
        prompt: The Jinja template of the question, over the row's columns: `Question: {{ question }}`.
        answer: The column, or Jinja expression, that gives the right answer, or a list of right answers.
        shot_answer: The template of what an example answers; by default its (first) right answer.
        extract: How the answer is found, by name: each has a score of its own, `exact_match_<name>`. Without any the
            whole text is the answer, and the score is `exact_match`.
        strip: Leave out white space around a text that is the answer as a whole, and around the right ones then.
        ignore: Regular expressions of what doesn't count.
        ignore_case: Case doesn't count.
        ignore_punctuation: ASCII punctuation doesn't count.
        ignore_numbers: The digits 0 to 9 don't count.
        stop: Texts that end an answer.
        max_new_tokens: Most tokens of an answer.
        temperature: 0 takes the likeliest token each time; else they are drawn, seeded by the prompt.
        **declared: The data, the examples and the limits.
    """

    def __init__(
        self,
        path: str,
        prompt: str,
        answer: str = "answer",
        shot_answer: str | None = None,
        extract: dict[str, Extraction] | None = None,
        strip: bool = True,
        ignore: list[str] | None = None,
        ignore_case: bool = False,
        ignore_punctuation: bool = False,
        ignore_numbers: bool = False,
        stop: list[str] | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        **declared: Any,
    ) -> None:
        if max_new_tokens < 1 or temperature < 0:
            raise SFTError(
                f"max_new_tokens is {max_new_tokens}, temperature {temperature}",
                where="GenerationTask",
                fix="give 1 token or more, and a temperature of 0 or more",
            )
        with at("GenerationTask"):
            self.declared = Declared(path=path, **declared)
            self.prompt = RowTemplate(prompt, "prompt")
            self.answer = RowExpression(answer, "answer")
            self.shot_answer = None if shot_answer is None else RowTemplate(shot_answer, "shot_answer")
            self.extract = {
                name: (_compiled(each.pattern, f"extract.{name}"), each.place)
                for name, each in (extract or {}).items()
            }
            self.ignore = [_compiled(pattern, "ignore") for pattern in ignore or ()]
        self.strip = strip
        self.ignore_case = ignore_case
        ignored = string.punctuation * ignore_punctuation + string.digits * ignore_numbers
        self.ignored = str.maketrans("", "", ignored)
        self.stop = tuple(stop or ())
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature

    def requests(self) -> Sequence[Item]:
        """One item for each row, in the order of the data."""
        given = (self.prompt, self.answer, self.shot_answer)
        columns = {name for each in given if each is not None for name in each.columns}
        return self.declared.items(columns, self._shot, self._item)

    def score(self, answered: Sequence[Answered]) -> Results:
        """Exact match over all rows, for each way of extraction; with `task` over each part, too."""
        return self.declared.results([self._judge(each) for each in answered])

    def _item(self, asked: Asked) -> Item:
        question, targets = self.prompt.render(asked.row), self._targets(asked.row)
        prompt = self.declared.prompt(asked, question)
        return Item(
            self.declared.task_of(asked.row),
            asked.number,
            (Generate(prompt, self.stop, self.max_new_tokens, self.temperature),),
            targets[0],
            {"targets": targets},
            text=self.declared.text_of(asked.row, question),
        )

    def _shot(self, row: Row) -> Shot:
        answer = self._targets(row)[0] if self.shot_answer is None else self.shot_answer.render(row)
        return self.prompt.render(row), answer

    def _targets(self, row: Row) -> list[str]:
        value = self.answer.value(row)
        values = value if isinstance(value, list | tuple) else [value]
        wrong = [each for each in values if not isinstance(each, str | int | float)]
        if wrong or not values:
            raise SFTError(
                f"the answer is {value!r:.80}", where="answer", fix="give a text, a number, or a list of such"
            )
        return [str(each) for each in values]

    def _judge(self, answered: Answered) -> Record:
        text, targets = answered.text, answered.item.data["targets"]
        assert isinstance(targets, list)
        if self.strip and not self.extract:
            targets = [target.strip() for target in targets]
        right = {self._plain(target) for target in targets}
        if self.extract:
            ways = self.extract.items()
            found = {f"exact_match_{name}": find(pattern, text, place) for name, (pattern, place) in ways}
        else:
            found = {"exact_match": text.strip() if self.strip else text}
        metrics = {metric: float(self._plain(answer) in right) for metric, answer in found.items()}
        return Record.of(answered, next(iter(found.values())), metrics)

    def _plain(self, text: str) -> str:
        """The text without what is ignored."""
        for pattern in self.ignore:
            text = pattern.sub("", text)
        return (text.lower() if self.ignore_case else text).translate(self.ignored)


def _compiled(pattern: str, where: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise SFTError(
            f"{pattern!r} is no regular expression: {error}",
            where=where,
            fix="in YAML, put it in single quotes",
        ) from error
