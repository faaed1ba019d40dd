"""The two ways of judging: two answers beside each other, as AlpacaEval does, and one by itself, as MT-Bench does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from jinja2 import Template

from lightning_sft import (
    Answered,
    Converse,
    Conversed,
    Generate,
    Item,
    Message,
    Record,
    Results,
    Score,
    SFTError,
)
from lightning_sft_evaluators.endpoint import Reply
from lightning_sft_evaluators.judge_data import Question, render
from lightning_sft_evaluators.references import said
from lightning_sft_evaluators.verdicts import (
    PREFERENCE,
    choice_in,
    kappa,
    length_controlled,
    preference,
    rating_in,
)

MT_BENCH_TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1,
    "humanities": 0.1,
}  # fmt: skip
"""The temperatures at which MT-Bench's 8 categories are answered (Zheng et al., 2023)."""

_CONSISTENT = {("A", "B"), ("B", "A"), ("C", "C")}


@dataclass(frozen=True, slots=True)
class Pairwise:
    """Which of two answers is better, asked in both orders.

    Args:
        template: The prompt, of `instruction`, `first` and `second`.
        name: What the scores are called.
        system: The system message of the model that is judged.
        max_new_tokens: Most tokens of its answer.
    """

    template: Template
    name: str
    system: str | None
    max_new_tokens: int

    def item(self, question: Question, baseline: str | None) -> Item:
        """What the model is asked.

        Raises:
            SFTError: It has several turns, or its human preference isn't one.
        """
        if len(question.turns) > 1:
            raise SFTError(
                f"the question has {len(question.turns)} turns",
                where=question.where,
                fix="use `style: single`",
            )
        if question.human is not None and question.human not in PREFERENCE:
            raise SFTError(
                f"`human` is {question.human!r}", where=question.where, fix=f"give {', '.join(PREFERENCE)}"
            )
        system = (Message("system", self.system),) if self.system else ()
        asked = Generate((*system, Message("user", question.turns[0])), max_new_tokens=self.max_new_tokens)
        data = {"instruction": question.turns[0], "baseline": baseline, "human": question.human}
        return Item(question.category or self.name, question.number, (asked,), data=data)

    def prompts(self, answered: Answered, baseline: str) -> list[str]:
        """The judge's prompts for one item: with the model's answer first, and second."""
        asked, answer = answered.item.data["instruction"], said(answered.text)
        pairs = ((answer, said(baseline)), (said(baseline), answer))
        return [render(self.template, instruction=asked, first=a, second=b) for a, b in pairs]

    def verdict(self, replies: Sequence[Reply]) -> str | None:
        """Both verdicts, such as `A B`; None where one can't be read."""
        found = [choice_in(reply.text or "") for reply in replies]
        return None if None in found else " ".join(map(str, found))

    def results(
        self, answered: Sequence[Answered], baselines: Sequence[str], verdicts: Sequence[str | None]
    ) -> Results:
        """`win_rate`, `length_controlled_win_rate`, `position_consistency`; `cohen_kappa` where there are labels."""
        records, wins, consistent, lengths = [], [], [], []
        pairs: list[tuple[int, int]] = []
        for each, baseline, verdict in zip(answered, baselines, verdicts, strict=True):
            if verdict is None:
                records.append(
                    Record.of(each, "unreadable", {"win_rate": 0.5}, {"win_rate": 0.0})
                )  # without weight
                continue
            first, second = verdict.split()
            won = preference(first, second)
            told = "tie" if won == 0.5 else "model" if won > 0.5 else "baseline"
            records.append(Record.of(each, f"{told} ({verdict})", {"win_rate": won}))
            wins.append(won)
            consistent.append(float((first, second) in _CONSISTENT))
            lengths.append((len(said(each.text)), len(said(baseline))))
            if (human := each.item.data["human"]) is not None:
                pairs.append((list(PREFERENCE).index(told), list(PREFERENCE).index(str(human))))
        scores = [
            Score.mean(self.name, "win_rate", wins),
            length_controlled(self.name, wins, lengths),
            Score.mean(self.name, "position_consistency", consistent),
        ]
        if pairs:
            scores.append(kappa(self.name, pairs, len(PREFERENCE), ordered=False))
        return Results((*scores, *_by_category(records, "win_rate", self.name)), tuple(records))


@dataclass(frozen=True, slots=True)
class Single:
    """A rating from 1 to 10 for the answer to each turn.

    Args:
        template: The prompt, of `turns` (with `user` and `assistant`) and `reference`.
        name: What the scores are called.
        system: The system message of the model that is judged.
        max_new_tokens: Most tokens of each of its answers.
        temperatures: At what temperature it answers, by category; 0 for others.
    """

    template: Template
    name: str
    system: str | None
    max_new_tokens: int
    temperatures: Mapping[str, float]

    def item(self, question: Question, baseline: str | None) -> Item:
        """What the model is asked.

        Raises:
            SFTError: The human ratings aren't one for each turn.
        """
        human = question.human
        if human is not None and not (
            isinstance(human, list)
            and len(human) == len(question.turns)
            and all(isinstance(each, int | float) and 1 <= each <= 10 for each in human)
        ):
            raise SFTError(
                f"`human` is {human!r}", where=question.where, fix="give a rating from 1 to 10 for each turn"
            )
        heat = self.temperatures.get(question.category, 0.0)
        asked = Converse(question.turns, self.system, self.max_new_tokens, heat)
        data = {"turns": list(question.turns), "references": list(question.references), "human": human}
        return Item(question.category or self.name, question.number, (asked,), data=data)

    def prompts(self, answered: Answered, baseline: str) -> list[str]:
        """The judge's prompts for one item: one for each turn, with the turns before it."""
        (response,) = answered.responses
        assert isinstance(response, Conversed)
        turns, references = answered.item.data["turns"], answered.item.data["references"]
        assert isinstance(turns, list)
        assert isinstance(references, list)
        spoken = [
            {"user": turn, "assistant": said(answer.text)}
            for turn, answer in zip(turns, response.answers, strict=True)
        ]
        references = [*references, *[""] * len(turns)]
        return [
            render(self.template, turns=spoken[: n + 1], reference=references[n]) for n in range(len(turns))
        ]

    def verdict(self, replies: Sequence[Reply]) -> str | None:
        """The ratings, such as `7 5`; None where one can't be read."""
        found = [rating_in(reply.text or "") for reply in replies]
        return None if None in found else " ".join(f"{rating:g}" for rating in found if rating is not None)

    def results(
        self, answered: Sequence[Answered], baselines: Sequence[str], verdicts: Sequence[str | None]
    ) -> Results:
        """`rating` over all items and each category's, of each turn, and `cohen_kappa` where there are labels."""
        records = []
        turns: dict[int, list[float]] = {}
        pairs: list[tuple[int, int]] = []
        for each, verdict in zip(answered, verdicts, strict=True):
            if verdict is None:
                records.append(
                    Record.of(each, "unreadable", {"rating": 5.5}, {"rating": 0.0})
                )  # without weight
                continue
            ratings = [float(rating) for rating in verdict.split()]
            records.append(Record.of(each, verdict, {"rating": fmean(ratings)}))
            for number, rating in enumerate(ratings, 1):
                turns.setdefault(number, []).append(rating)
            if isinstance(human := each.item.data["human"], list):
                pairs += [(round(a) - 1, round(b) - 1) for a, b in zip(ratings, human, strict=True)]
        judged = [each.metrics["rating"] for each in records if not each.weights]
        scores = [Score.mean(self.name, "rating", judged)]
        if len(turns) > 1:
            scores += [Score.mean(self.name, f"rating_turn_{n}", values) for n, values in turns.items()]
        if pairs:
            scores.append(kappa(self.name, pairs, 10, ordered=True))
        return Results((*scores, *_by_category(records, "rating", self.name)), tuple(records))


def _by_category(records: Sequence[Record], metric: str, name: str) -> list[Score]:
    """The mean over each category's judged items, where the data has categories."""
    values: dict[str, list[float]] = {}
    for each in records:
        if each.task != name and not each.weights:
            values.setdefault(each.task, []).append(each.metrics[metric])
    return [Score.mean(f"{name}/{task}", metric, found) for task, found in values.items()]
