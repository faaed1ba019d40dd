"""How well a model predicts text: perplexity per token and word, and bits per byte."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from lightning_sft import (
    Answered,
    Evaluator,
    Item,
    Likelihood,
    Record,
    Results,
    RollingLogLikelihood,
    Score,
    SFTError,
    Source,
    read_rows,
)
from lightning_sft_evaluators.prompts import chosen


class Perplexity(Evaluator):
    """Token and word perplexity and bits per byte of texts of any length, in windows of the model's context.

    Args:
        path: Texts: a .txt file (a line is a text), a .jsonl, .csv or .parquet file, a folder, a Hub id, or embedded
            data (tiny:general).
        column: The column that holds the text.
        limit: Only so many texts: the first; with `seed`, some at random.
        seed: Seed of that choice.
        name: What the scores are called.
        subset: The configuration of a Hub dataset.
        split: The split of a Hub dataset.
    """

    def __init__(
        self,
        path: str,
        column: str = "text",
        limit: int | None = None,
        seed: int | None = None,
        name: str = "text",
        subset: str | None = None,
        split: str | None = None,
    ) -> None:
        if limit is not None and limit < 1:
            raise SFTError(f"limit is {limit}", where="Perplexity.limit", fix="give 1 or more")
        self.source = Source(path, subset=subset, split=split)
        self.column = column
        self.limit, self.seed = limit, seed
        self.name = name

    def requests(self) -> Sequence[Item]:
        """One item for each text."""
        texts = []
        for meta, row in read_rows(self.source):
            text = row.get(self.column)
            if not isinstance(text, str) or not text:
                raise SFTError(
                    f"no text in column {self.column!r}",
                    where=str(meta),
                    fix="name the column with `column`; remove empty rows",
                )
            texts.append(text)
        numbers = chosen(len(texts), self.limit, self.seed)
        return [Item(self.name, number, (RollingLogLikelihood(texts[number]),)) for number in numbers]

    def score(self, answered: Sequence[Answered]) -> Results:
        """`bits_per_byte`, `byte_perplexity`, `word_perplexity` and `token_perplexity` over all texts together."""
        records = tuple(_judge(each) for each in answered)
        scores = []
        for metric, of_mean in (
            ("bits_per_byte", None),
            ("byte_perplexity", "nats_per_byte"),
            ("word_perplexity", "nats_per_word"),
            ("token_perplexity", "nats_per_token"),
        ):
            value = _mean(records, of_mean or metric)
            value = value if of_mean is None else math.exp(min(value, 700.0))
            scores.append(Score(f"perplexity/{self.name}", metric, value, None, len(records), False))
        return Results(tuple(scores), records)


def _judge(answered: Answered) -> Record:
    (request,), (response,) = answered.item.requests, answered.responses
    assert isinstance(request, RollingLogLikelihood)
    assert isinstance(response, Likelihood)
    nats, size = -response.log_likelihood, len(request.text.encode())
    weights = {
        "bits_per_byte": size,
        "nats_per_byte": size,
        "nats_per_word": len(re.split(r"\s+", request.text)),
        "nats_per_token": response.tokens,
    }
    metrics = {metric: nats / max(1, weight) for metric, weight in weights.items()}
    metrics["bits_per_byte"] /= math.log(2)
    return Record.of(answered, "", metrics, {metric: float(weight) for metric, weight in weights.items()})


def _mean(records: Sequence[Record], metric: str) -> float:
    """The weighted mean."""
    total = sum(record.weights[metric] for record in records)
    return sum(record.metrics[metric] * record.weights[metric] for record in records) / total
