"""Generated answers beside reference answers, on data of any format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from lightning_sft import (
    Answered,
    Evaluator,
    Item,
    Record,
    Results,
    Score,
    SFTError,
    is_valid_format,
    scores_by_task,
)
from lightning_sft_evaluators.labels import label_f1, label_values, labels_of, outside_note, plain
from lightning_sft_evaluators.references import ReferenceData, said
from lightning_sft_evaluators.text_metrics import (
    CORPUS,
    LOWER_IS_BETTER,
    check_metrics,
    corpus_score,
    text_values,
)

_DEFAULT = ("exact_match", "accuracy", "f1", "rouge", "edit_distance")
_ANSWERS = {*LOWER_IS_BETTER, *(f"sentence_{metric}" for metric in LOWER_IS_BETTER), "outside_labels"}


class ReferenceMetrics(Evaluator):
    """What the model answers to rows of any format, compared with their last assistant turn.

    Args:
        path: A data file, a folder, a Hub id, or embedded data (tiny:held_out).
        metrics: Of exact_match, accuracy, f1, rouge, edit_distance (torchmetrics), bleu, chrf and ter (sacrebleu);
            by default those of torchmetrics, with `labels` none.
        labels: The answers are labels: these, or those that the references are (`data`). Adds label_accuracy,
            label_f1 (macro, and of each label) and the share of answers outside the labels.
        valid_as: Whether answers are valid as json, xml or markdown, too: valid_json, ….
        name: What the scores are called.
        **data: The rows' format, which of them, and how they are answered.
    """

    def __init__(
        self,
        path: str,
        metrics: list[str] | None = None,
        labels: list[str] | Literal["data"] | None = None,
        valid_as: Literal["json", "xml", "markdown"] | None = None,
        name: str = "references",
        **data: Any,
    ) -> None:
        self.data = ReferenceData(path, **data)
        self.data.check("ReferenceMetrics")
        if metrics is None:
            metrics = list(_DEFAULT if labels is None else ())
        check_metrics(metrics, "ReferenceMetrics.metrics")
        if not (metrics or labels or valid_as):
            raise SFTError("there is no metric", where="ReferenceMetrics.metrics", fix="name at least one")
        self.metrics = metrics
        self.labels = labels
        self.valid_as = valid_as
        self.name = name

    def requests(self) -> Sequence[Item]:
        """One item for each row."""
        items = self.data.items(self.name)
        if self.labels is None:
            return items
        given = None if self.labels == "data" else list(self.labels)
        labels = labels_of(items, given, "ReferenceMetrics.labels")
        return [replace(item, data={**item.data, "labels": labels}) for item in items]

    def score(self, answered: Sequence[Answered]) -> Results:
        """Each metric over all rows and, where the data names tasks, over each task's."""
        labels = _labels(answered[0].item) if answered else {}
        records = tuple(self._judge(each) for each in answered)
        scores: list[Score] = []
        for metric in records[0].metrics if records else ():
            found = scores_by_task(records, metric, self.name)
            found = found if len(found) > 2 else found[:1]
            scores += [replace(each, higher_is_better=metric not in _ANSWERS) for each in found]
        texts = [said(each.text) for each in answered]
        corpora = [metric for metric in self.metrics if metric in CORPUS]
        targets = [each.target for each in records]
        headline = [corpus_score(metric, self.name, texts, targets) for metric in corpora]
        if labels:
            scores += label_f1(records, labels, self.name)
        notes = outside_note(records) if labels else []
        return Results((*headline, *scores), records, tuple(notes))

    def _judge(self, answered: Answered) -> Record:
        answer, target = said(answered.text), answered.item.target
        values: dict[str, float] = {}
        text = answer
        if labels := _labels(answered.item):
            answer, values = label_values(text, target, labels)
        for metric in self.metrics:
            values.update(text_values(metric, text, target))
        if self.valid_as is not None:
            values[f"valid_{self.valid_as}"] = float(is_valid_format(text, self.valid_as))
        return Record.of(answered, answer, values)


def _labels(item: Item) -> dict[str, str]:
    """The item's labels by their plain form; none where answers aren't labels."""
    labels = item.data.get("labels", ())
    assert isinstance(labels, Sequence)
    return {plain(label): label for label in labels}
