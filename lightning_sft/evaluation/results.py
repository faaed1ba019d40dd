"""What an evaluation found: a record for each item, and scores with standard errors.

The formulas are those of lm-evaluation-harness 0.4: a mean's standard error is sd(ddof=1)/√n, a group's the pooled
one, √(Σ (n−1)·se²·n / (N−k) / N) over its k tasks with n items each, N in all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from lightning_sft.evaluation.requests import Answered, Conversed, Generated


@dataclass(frozen=True, slots=True)
class Record:
    """What came of one item.

    Args:
        task: As the item's.
        number: As the item's.
        key: The hash of the item's requests.
        target: The right answer.
        answer: What the model answered, as it was judged.
        metrics: Each metric's value for this item; right or wrong is 1.0 or 0.0.
        scores: The log-likelihoods of the choices, where there are any.
        generated: What the model wrote, where it did.
        weights: How much the item counts in a metric's mean, where that isn't 1.
    """

    task: str
    number: int
    key: str
    target: str
    answer: str
    metrics: Mapping[str, float]
    scores: tuple[float, ...] = ()
    generated: str | None = None
    weights: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        answered: Answered,
        answer: str,
        metrics: Mapping[str, float],
        weights: Mapping[str, float] | None = None,
    ) -> Self:
        """The record of an answered item, with all that its responses tell."""
        item = answered.item
        texts = [
            answer.text
            for each in answered.responses
            for answer in (each.answers if isinstance(each, Conversed) else [each])
            if isinstance(answer, Generated)
        ]
        return cls(
            task=item.task,
            number=item.number,
            key=item.key,
            target=item.target,
            answer=answer,
            metrics=dict(metrics),
            scores=tuple(answered.log_likelihoods),
            generated=texts[0] if texts else None,
            weights=dict(weights or {}),
        )


@dataclass(frozen=True, slots=True)
class Score:
    """One number of an evaluation.

    Args:
        name: Of what: the whole evaluation, one of its groups or tasks.
        metric: The metric's name.
        value: Its value.
        stderr: Its standard error; None where none is defined.
        items: Over how many items.
        higher_is_better: Which way is up.
    """

    name: str
    metric: str
    value: float
    stderr: float | None
    items: int
    higher_is_better: bool = True

    @classmethod
    def mean(cls, name: str, metric: str, values: Sequence[float]) -> Self:
        """The mean with its standard error, sd(ddof=1)/√n; None for a single item."""
        n = len(values)
        middle = sum(values) / n
        if n < 2:
            return cls(name, metric, middle, None, n)
        variance = sum((value - middle) ** 2 for value in values) / (n - 1)
        return cls(name, metric, middle, math.sqrt(variance / n), n)

    @classmethod
    def pooled(cls, name: str, parts: Sequence[Score]) -> Self:
        """The mean over all items of several tasks' means, with the pooled standard error.

        A task of one item has no variance of its own and adds none.
        """
        total = sum(part.items for part in parts)
        value = sum(part.value * part.items for part in parts) / total
        free = total - len(parts)
        if free < 1:
            return cls(name, parts[0].metric, value, None, total)
        spread = sum((part.items - 1) * (part.stderr or 0.0) ** 2 * part.items for part in parts)
        return cls(name, parts[0].metric, value, math.sqrt(spread / free / total), total)


@dataclass(frozen=True, slots=True)
class Results:
    """All that an evaluator has to say.

    Args:
        scores: The headline first, then groups and tasks.
        records: One for each item, in the items' order.
        notes: What a reader of the scores has to know: what was left out or couldn't be judged.
    """

    scores: tuple[Score, ...]
    records: tuple[Record, ...]
    notes: tuple[str, ...] = ()


def undefined(results: Results) -> list[str]:
    """What there is to say of scores and items' metrics that are NaN or infinite."""
    notes = []
    scores = [
        f"{score.name} {score.metric} ({score.value})"
        for score in results.scores
        if not math.isfinite(score.value)
    ]
    if scores:
        notes.append(f"no finite number, so null in results.json: {', '.join(scores)}")
    items: dict[str, list[Record]] = {}
    for record in results.records:
        for metric, value in record.metrics.items():
            if not math.isfinite(value):
                items.setdefault(metric, []).append(record)
    for metric, records in items.items():
        first = f"{records[0].task} {records[0].number}"
        notes.append(f"{metric} is no finite number for {len(records)} items (the first: {first})")
    return notes


def scores_by_task(
    records: Iterable[Record], metric: str, name: str, groups: Callable[[str], Sequence[str]] = lambda _: ()
) -> list[Score]:
    """Means of a metric: over all items, over each group's, over each task's.

    Args:
        records: The items' records.
        metric: Which of their metrics.
        name: The whole evaluation's name; groups and tasks are `name/group`, `name/task`.
        groups: The groups that a task belongs to.
    """
    values: dict[str, list[float]] = {}
    for each in records:
        values.setdefault(each.task, []).append(each.metrics[metric])
    tasks = {task: Score.mean(f"{name}/{task}", metric, found) for task, found in values.items()}
    members: dict[str, list[Score]] = {}
    for task, score in tasks.items():
        for group in groups(task):
            members.setdefault(group, []).append(score)
    if not tasks:
        return []
    of_groups = [Score.pooled(f"{name}/{group}", parts) for group, parts in members.items()]
    return [Score.pooled(name, list(tasks.values())), *of_groups, *tasks.values()]
