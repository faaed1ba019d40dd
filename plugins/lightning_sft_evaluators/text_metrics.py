"""How near a text is to a reference: through torchmetrics, and through sacrebleu over whole corpora."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

from lightning_sft import Score, SFTError

if TYPE_CHECKING:
    from sacrebleu.metrics.base import Metric

Values = Mapping[str, float]

CORPUS = ("bleu", "chrf", "ter")
"""Metrics of all texts together; each text by itself has `sentence_bleu`, …."""

LOWER_IS_BETTER = frozenset({"edit_distance", "ter"})

_HALF_OF_95 = 1.959964  # standard errors in half of a 95 % interval
_RESAMPLES = 1000


def text_values(metric: str, answer: str, reference: str) -> Values:
    """A metric of one text, by the names of its values.

    - `exact_match`: the same but for white space at the ends.
    - `accuracy`: the same but for case, punctuation, articles and white space (SQuAD's exact match).
    - `f1`: of the words that both have, after that (SQuAD's F1).
    - `rouge`: F1 of words (`rouge1`), pairs of words (`rouge2`) and the longest common subsequence (`rougeL`) (Lin,
      2004); words are what isn't letters, digits or underscores apart, in lower case, without stemming.
    - `edit_distance`: characters to insert, remove or replace.
    - `bleu`, `chrf`, `ter`: sacrebleu's for one sentence.
    """
    return _OF_ONE[metric](answer.strip(), reference.strip())


def corpus_score(metric: str, name: str, answers: Sequence[str], references: Sequence[str]) -> Score:
    """A metric of `CORPUS`, with sacrebleu's standard settings.

    The standard error is that of sacrebleu's seeded bootstrap of 1,000 resamples: half of the 95 % interval over 1.96.
    """
    made = _sacrebleu(metric, {})
    texts = [text.strip() for text in answers], [[text.strip() for text in references]]
    found = made.corpus_score(*texts, n_bootstrap=_RESAMPLES)
    told = json.loads(found.format(signature=str(made.get_signature()), width=6, is_json=True))
    error = float(told.get("confidence_var", 0.0)) / _HALF_OF_95 if len(answers) > 1 else None
    return Score(name, metric, float(found.score), error, len(answers), metric not in LOWER_IS_BETTER)


def check_metrics(metrics: Sequence[str], where: str) -> None:
    """Whether there are such metrics, and what they need is installed.

    Raises:
        SFTError: One isn't there; says which.
    """
    if unknown := set(metrics) - set(METRICS):
        raise SFTError(
            f"no metric is named {min(unknown)!r}", where=where, fix=f"the metrics: {', '.join(METRICS)}"
        )
    needing = [metric for metric in metrics if metric in CORPUS]
    if needing and find_spec("sacrebleu") is None:
        raise SFTError(
            f"{', '.join(needing)} need sacrebleu, which isn't installed",
            where=where,
            fix='pip install "lightning-sft[metrics]", or leave them out',
        )


def _exact_match(answer: str, reference: str) -> Values:
    return {"exact_match": float(answer == reference)}


def _squad(name: str, theirs: str, answer: str, reference: str) -> Values:
    from torchmetrics.functional.text import squad

    answers: dict[str, list[str] | list[int]] = {"answer_start": [0], "text": [reference]}
    found = squad({"prediction_text": answer, "id": "0"}, {"answers": answers, "id": "0"})
    return {name: float(found[theirs]) / 100}


def _rouge(answer: str, reference: str) -> Values:
    from torchmetrics.functional.text import rouge_score

    keys = ("rouge1", "rouge2", "rougeL")
    found = rouge_score(answer, reference, rouge_keys=keys, normalizer=_words)
    return {key: float(found[f"{key}_fmeasure"]) for key in keys}


def _words(text: str) -> str:
    """The words in lower case, of any script: torchmetrics' own normalizer keeps a to z and digits alone."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _edit_distance(answer: str, reference: str) -> Values:
    from torchmetrics.functional.text import edit_distance

    return {"edit_distance": float(edit_distance([answer], [reference]))}


def _sentence(metric: str, answer: str, reference: str) -> Values:
    options = {"effective_order": True} if metric == "bleu" else {}
    found = _sacrebleu(metric, options).sentence_score(answer, [reference])
    return {f"sentence_{metric}": float(found.score)}


def _sacrebleu(metric: str, options: Mapping[str, bool]) -> Metric:
    from sacrebleu.metrics import BLEU, CHRF, TER

    made: type[Metric] = {"bleu": BLEU, "chrf": CHRF, "ter": TER}[metric]
    return made(**options)


_OF_ONE: Mapping[str, Callable[[str, str], Values]] = {
    "exact_match": _exact_match,
    "accuracy": partial(_squad, "accuracy", "exact_match"),
    "f1": partial(_squad, "f1", "f1"),
    "rouge": _rouge,
    "edit_distance": _edit_distance,
    **{metric: partial(_sentence, metric) for metric in CORPUS},
}

METRICS = tuple(_OF_ONE)
"""The metrics' names."""
