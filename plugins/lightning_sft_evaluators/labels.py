"""Answers that are labels: which one each is, accuracy, and F1."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from lightning_sft import Item, Record, Score, SFTError

_MOST = 100  # labels read from data
_LISTED = 10
_RESAMPLES = 500
_AT_THE_ENDS = string.punctuation + string.whitespace


def labels_of(items: Iterable[Item], given: Sequence[str] | None, where: str) -> list[str]:
    """The labels: those given, or those that the references are.

    Raises:
        SFTError: Two are alike, a reference is none of those given, or the data's are no labels.
    """
    if given is not None:
        labels = {plain(label): label for label in given}
        if len(labels) < len(given) or len(given) < 2 or "" in labels:
            raise SFTError(
                "labels that are alike, empty or fewer than two" if given else "there are no labels",
                where=where,
                fix="give two or more that differ in more than case and punctuation at the ends",
            )
        for item in items:
            if plain(item.target) not in labels:
                raise SFTError(
                    f"the reference {item.target[:60]!r} is none of the labels",
                    where=str(item.data["row"]),
                    fix=f"add it to {where}, or mend the row",
                )
        return list(labels.values())
    labels = {}
    for item in items:
        labels.setdefault(plain(item.target), item.target.strip())
    if not 2 <= len(labels) <= _MOST:
        raise SFTError(
            f"the references are {len(labels)} different texts",
            where=where,
            fix=f"labels from data are 2 to {_MOST}; list them, or leave `labels` out",
        )
    return list(labels.values())


def plain(text: str) -> str:
    """A label without what doesn't count: case, and white space and punctuation at the ends."""
    return text.strip(_AT_THE_ENDS).casefold()


def label_values(answer: str, target: str, labels: Mapping[str, str]) -> tuple[str, dict[str, float]]:
    """The label that the answer is (its own text, where it is none), and whether it is right, or none."""
    found = labels.get(plain(answer))
    right = found is not None and plain(answer) == plain(target)
    return found or answer, {"label_accuracy": float(right), "outside_labels": float(found is None)}


def label_f1(records: Sequence[Record], labels: Mapping[str, str], name: str) -> list[Score]:
    """Macro F1, with the standard error of a seeded bootstrap of 500 resamples, and each label's F1.

    Labels that are neither a reference nor an answer don't count; an answer outside the labels is wrong for the label
    that it should have been.
    """
    numbers = {label: number for number, label in enumerate(labels)}
    pairs = np.array(
        [[numbers.get(plain(each.answer), len(labels)), numbers[plain(each.target)]] for each in records]
    )
    draw = np.random.default_rng(0)
    macros = [
        float(np.nanmean(_f1(pairs[draw.integers(len(pairs), size=len(pairs))], len(labels))))
        for _ in range(_RESAMPLES)
    ]
    each_f1 = _f1(pairs, len(labels))
    error = float(np.std(macros, ddof=1)) if len(records) > 1 else None
    scores = [Score(name, "label_f1", float(np.nanmean(each_f1)), error, len(records))]
    for label, value in zip(labels.values(), each_f1, strict=True):
        if not np.isnan(value):
            size = int((pairs[:, 1] == numbers[plain(label)]).sum())
            scores.append(Score(f"{name}/{label}", "label_f1", float(value), None, size))
    return scores


def _f1(pairs: np.ndarray, labels: int) -> np.ndarray:
    """F1 of each label, float `[labels]`, from (answer, reference) `[n, 2]`; NaN where it is in neither."""
    import torch
    from torchmetrics.functional.classification import multiclass_f1_score

    answers, references = torch.from_numpy(pairs).unbind(1)
    found = multiclass_f1_score(
        answers, references, num_classes=labels + 1, average="none", validate_args=False
    ).numpy()[:labels]
    found = found.astype(float)
    found[~np.isin(np.arange(labels), pairs)] = np.nan
    return found


def outside_note(records: Sequence[Record]) -> list[str]:
    """How many answers are none of the labels, with the most frequent ones; nothing where all are."""
    outside = Counter(each.answer for each in records if each.metrics["outside_labels"])
    if not outside:
        return []
    listed = ", ".join(f"{text[:40]!r} ({count})" for text, count in outside.most_common(_LISTED))
    more = f", and {len(outside) - _LISTED} others" if len(outside) > _LISTED else ""
    return [f"{outside.total()} of {len(records)} answers are none of the labels: {listed}{more}"]
