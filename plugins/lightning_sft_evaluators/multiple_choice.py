"""Multiple-choice benchmarks that are declared in YAML."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_sft import (
    Answered,
    Evaluator,
    Item,
    LogLikelihood,
    Record,
    Results,
    Row,
    RowExpression,
    RowTemplate,
    SFTError,
)
from lightning_sft_evaluators.choice_rows import AnswerAs, checked, index_of, labelled, parsed
from lightning_sft_evaluators.choice_scores import Metric, judged
from lightning_sft_evaluators.declared import Asked, Declared, Shot, at


class MultipleChoice(Evaluator):
    """Any multiple-choice benchmark, declared by its data and a Jinja prompt: the likeliest choice is the answer.

    As in lm-evaluation-harness: of `choices` each is scored after the prompt and the delimiter; with `continuation`
    the choices stand in the prompt instead, and the same text is scored after each.

    Args:
        path: A .jsonl, .json, .csv or .parquet file, a folder, the id of a dataset on the Hugging Face Hub, or
            embedded data (tiny:facts).
        prompt: The Jinja template of the question, over the row's columns: `Question: {{ question }}`.
        choices: The column, or Jinja expression, that gives the list of the choices; or a list with a template for
            each.
        answer: The column, or expression, that gives the right choice: its index from 0, its letter or its text; or
            a list of such, where several are right.
        labels: The column, or expression, that gives 1 or 0, right or wrong, for each choice; instead of `answer`.
        continuation: The template of what is scored, where the choices stand in the prompt: there the choice is
            `{{ choice }}`.
        metrics: `acc`: the likeliest choice is right; `acc_norm`: by log-likelihood per character; `acc_bytes`: per
            byte; `mc2`: the probability of the right choices, all choices' together being 1 (TruthfulQA).
        answer_as: How to read an answer; `auto` refuses rows where a number or letter is also another choice's text.
        n_choices: How many choices each row has; by default any number.
        **declared: The data, the examples and the limits.
    """

    def __init__(
        self,
        path: str,
        prompt: str,
        choices: str | list[str] = "choices",
        answer: str | None = None,
        labels: str | None = None,
        continuation: str | None = None,
        metrics: list[Metric] | None = None,
        answer_as: AnswerAs = "auto",
        n_choices: int | None = None,
        **declared: Any,
    ) -> None:
        if (answer is None) == (labels is None):
            raise SFTError(
                "which choice is right?" if answer is None else "both answer and labels are given",
                where="MultipleChoice.answer",
                fix="give one of `answer` and `labels`",
            )
        by_length = {"acc_norm", "acc_bytes"} & {*(metrics or ())}
        if continuation is not None and by_length:
            raise SFTError(
                f"{min(by_length)} compares what is scored by its length, which is the same for all choices",
                where="MultipleChoice.metrics",
                fix="with `continuation` use acc or mc2",
            )
        default: list[Metric] = ["acc"] if continuation is not None else ["acc", "acc_norm"]
        self.metrics = metrics or default
        with at("MultipleChoice"):
            self.declared = Declared(path=path, **declared)
            self.prompt = RowTemplate(prompt, "prompt")
            self.choices = (
                RowExpression(choices, "choices")
                if isinstance(choices, str)
                else [RowTemplate(text, f"choices[{number}]") for number, text in enumerate(choices)]
            )
            self.answer = None if answer is None else RowExpression(answer, "answer")
            self.labels = None if labels is None else RowExpression(labels, "labels")
            self.continuation = None if continuation is None else RowTemplate(continuation, "continuation")
        self.answer_as = answer_as
        self.n_choices = n_choices

    def requests(self) -> Sequence[Item]:
        """One item for each row, in the order of the data."""
        listed = self.choices if isinstance(self.choices, list) else [self.choices]
        given = (self.prompt, *listed, self.answer, self.labels, self.continuation)
        columns = {name for each in given if each is not None for name in each.columns}
        if self.continuation is not None:
            columns -= {"choice"}
        return self.declared.items(columns, self._shot, self._item)

    def score(self, answered: Sequence[Answered]) -> Results:
        """The metrics over all rows; with `task` over each part, too."""
        return self.declared.results([self._judge(each) for each in answered])

    def _item(self, asked: Asked) -> Item:
        row = asked.row
        choices, right = self._read(row)
        requests = []
        for choice in choices:
            if self.continuation is None:
                text, question = choice, self.prompt.render(row)
            else:
                with_choice = {**row, "choice": choice}
                text, question = self.continuation.render(with_choice), self.prompt.render(with_choice)
            prompt = self.declared.prompt(asked, question)
            requests.append(LogLikelihood(prompt, f"{self.declared.delimiter}{text}"))
        return Item(
            self.declared.task_of(row),
            asked.number,
            tuple(requests),
            choices[right[0]],
            {"choices": choices, "right": right},
            text=self.declared.text_of(row, self._shot(row)[0]),
        )

    def _shot(self, row: Row) -> Shot:
        """A question with its right answer; of several the first."""
        choices, right = self._read(row)
        choice = choices[right[0]]
        if self.continuation is None:
            return self.prompt.render(row), choice
        with_choice = {**row, "choice": choice}
        return self.prompt.render(with_choice), self.continuation.render(with_choice)

    def _judge(self, answered: Answered) -> Record:
        choices, right = answered.item.data["choices"], answered.item.data["right"]
        assert isinstance(choices, list)
        assert isinstance(right, list)
        metrics = judged(self.metrics, answered.log_likelihoods, choices, right)
        return Record.of(answered, choices[answered.likeliest], metrics)

    def _read(self, row: Row) -> tuple[list[str], list[int]]:
        """The choices, and the indices of the right ones."""
        choices = self._choices(row)
        if self.labels is not None:
            return choices, labelled(self.labels.value(row), len(choices))
        assert self.answer is not None
        value = parsed(self.answer.value(row))
        values = value if isinstance(value, list | tuple) else [value]
        if not values:
            raise SFTError("no choice is right", where="answer", fix="give at least one, or remove the row")
        return choices, [index_of(each, choices, self.answer_as) for each in values]

    def _choices(self, row: Row) -> list[str]:
        if isinstance(self.choices, list):
            choices: object = [each.render(row) for each in self.choices]
        else:
            choices = parsed(self.choices.value(row))
        return checked(choices, self.n_choices)
