"""Any metric of Hugging Face's `evaluate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_sft import Answered, Evaluator, Item, ItemText, Record, Results, Score, SFTError
from lightning_sft_evaluators.references import ReferenceData, said

if TYPE_CHECKING:
    from evaluate import EvaluationModule

_WHERE = "HFEvaluate.metric"


class HFEvaluate(Evaluator):
    """A metric of `evaluate`, by its id on the Hub or as a local script, on generated answers and their references.

    Such a metric is a program that is run, so `trust_remote_code: true` has to say that it may be.

    Args:
        path: A data file, a folder, a Hub id, or embedded data (tiny:held_out); the reference is the last
            assistant turn.
        metric: The metric's id (rouge), or the path of its script or of the script's folder.
        trust_remote_code: Run the metric's code.
        config: The metric's configuration, where it has several.
        compute: What its `compute` is given besides predictions and references.
        higher_is_better: Which way is up.
        name: What the scores are called; by default the metric's.
        **data: The rows' format, which of them, and how they are answered.
    """

    def __init__(
        self,
        path: str,
        metric: str,
        trust_remote_code: bool = False,
        config: str | None = None,
        compute: dict[str, Any] | None = None,
        higher_is_better: bool = True,
        name: str | None = None,
        **data: Any,
    ) -> None:
        self.data = ReferenceData(path, **data)
        self.data.check("HFEvaluate")
        self.metric = metric
        self.trust_remote_code = trust_remote_code
        self.config = config
        self.compute = compute or {}
        self.higher_is_better = higher_is_better
        self.name = name or Path(metric).stem

    def requests(self) -> Sequence[Item]:
        """One item for each row; the metric is loaded, so that nothing is asked in vain."""
        self._load()
        return self.data.items(self.name)

    def texts(self) -> Sequence[ItemText]:
        """As the base class's, without the metric, whose program isn't run for it."""
        return [item.exposed for item in self.data.items(self.name)]

    def score(self, answered: Sequence[Answered]) -> Results:
        """Each number that the metric gives; of lists with a value for each row the mean, too.

        Numbers over all rows have no standard error.
        """
        answers = [said(each.text) for each in answered]
        references = [each.item.target.strip() for each in answered]
        found = self._computed(answers, references)
        scores, columns = [], dict[str, list[float]]()
        for key, value in found.items():
            values = _numbers(value)
            if isinstance(value, Sequence | set) and len(values) == len(answered):
                columns[key] = values
                scores.append(Score.mean(self.name, key, values))
            elif len(values) == 1:
                scores.append(Score(self.name, key, values[0], None, len(answered)))
        if not scores:
            raise SFTError(f"{self.metric} gives no number, but {', '.join(map(str, found))}", where=_WHERE)
        records = tuple(
            Record.of(each, answer, {key: values[number] for key, values in columns.items()})
            for number, (each, answer) in enumerate(zip(answered, answers, strict=True))
        )
        return Results(tuple(self._directed(score) for score in scores), records)

    def _directed(self, score: Score) -> Score:
        return Score(score.name, score.metric, score.value, score.stderr, score.items, self.higher_is_better)

    def _computed(self, answers: Sequence[str], references: Sequence[str]) -> Mapping[str, object]:
        try:
            found = self._load().compute(predictions=answers, references=references, **self.compute)
        except SFTError:
            raise
        except Exception as error:  # a stranger's program: it can fail in any way
            raise SFTError(
                f"the metric {self.metric} failed: {type(error).__name__}: {error}",
                where=_WHERE,
                fix="it may take other inputs than texts, or other options in `compute`",
            ) from error
        return found if isinstance(found, Mapping) else {"value": found}

    def _load(self) -> EvaluationModule:
        if not self.trust_remote_code:
            raise SFTError(
                f"the metric {self.metric} is a program, which would be run",
                where=_WHERE,
                fix="if you trust it, set `trust_remote_code: true`; ReferenceMetrics needs no such program",
            )
        if find_spec("evaluate") is None:
            raise SFTError(
                "the package evaluate isn't installed",
                where=_WHERE,
                fix='pip install "lightning-sft[metrics]"',
            )
        from evaluate import load

        try:
            return load(self.metric, self.config)
        except ImportError as error:
            raise SFTError(
                f"the metric {self.metric} needs a package that isn't installed: {error}",
                where=_WHERE,
                fix="install it",
            ) from error
        except (OSError, ValueError) as error:  # no network, no such metric
            raise SFTError(
                f"the metric {self.metric} can't be loaded: {str(error).splitlines()[0]}",
                where=_WHERE,
                fix="metrics come from the Hub once, by their id; offline, give the path of the metric's script",
            ) from error


def _numbers(value: object) -> list[float]:
    """The value as numbers: one, or those of a list; none where it is anything else."""
    values = list(value) if isinstance(value, Sequence | set) and not isinstance(value, str) else [value]
    values = [each.item() if hasattr(each, "item") else each for each in values]
    if not all(isinstance(each, int | float) for each in values):
        return []
    return [float(each) for each in values if isinstance(each, int | float)]
