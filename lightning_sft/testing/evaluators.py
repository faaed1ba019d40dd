"""What an evaluator has to do, tried on the embedded tiny model."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

from lightning_sft.bases import Evaluator
from lightning_sft.errors import SFTError
from lightning_sft.testing.plugin import MissingSample, PluginTests

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lightning_sft.evaluation.requests import Answered, Item
    from lightning_sft.evaluation.results import Results
    from lightning_sft.evaluation.scorer import Scorer

_CONTEXT = 8192  # the tiny model computes at any position; it needn't be any good there


class EvaluatorTests(PluginTests):
    """The tests of an evaluator.

    Attributes:
        items_tried: How many of its items the tiny model is asked, spread over all of them.
    """

    kind = "evaluators"
    items_tried: ClassVar[int] = 6

    def ready(self) -> Evaluator:
        """A new instance whose data is there.

        Raises:
            MissingSample: It asks nothing with these `options`.
        """
        evaluator: Evaluator = self.make()
        try:
            evaluator.requests()
        except SFTError as error:
            raise MissingSample(f"{self.plugin.__name__} asks nothing: {error}; set `options`") from error
        return evaluator

    def tried(self, evaluator: Evaluator) -> list[Item]:
        """The items that the tiny model is asked."""
        items = evaluator.requests()
        step = max(1, len(items) / self.items_tried)
        return [items[int(n * step)] for n in range(min(self.items_tried, len(items)))]

    def test_its_requests_are_pure(self) -> None:
        """The same items each time, each with a place of its own."""
        check_requests(self.ready(), self.make())

    def test_its_items_are_exposed(self) -> None:
        """`texts` says of each item what training data must not hold."""
        check_texts(self.ready())

    def test_it_judges_each_item(self) -> None:
        """A record for each item and finite scores, the same each time; of a part of the items, too."""
        evaluator = self.ready()
        check_score(evaluator, _scorer().answer(self.tried(evaluator)))

    def test_its_score_does_not_depend_on_batches_or_order(self) -> None:
        """However the requests are batched, and in whatever order they are answered."""
        evaluator = self.ready()
        check_invariance(evaluator, self.tried(evaluator))

    def test_it_leaves_everything_as_it_was(self) -> None:
        """Weights, modes, gradients and random numbers."""
        evaluator = self.ready()
        check_untouched(evaluator, self.tried(evaluator))


def check_requests(evaluator: Evaluator, other: Evaluator) -> None:
    """Items with requests, in JSON types, no two of one place; the same twice, and from another instance."""
    items = list(evaluator.requests())
    assert items, f"{_name(evaluator)} asks nothing"
    for item in items:
        assert item.requests, f"{_name(evaluator)} has an item without requests: {item.task} {item.number}"
        try:
            json.dumps(dict(item.data))
        except TypeError as error:
            raise AssertionError(f"the data of an item of {_name(evaluator)} is no JSON: {error}") from error
    (place, times), *_ = Counter((item.task, item.number) for item in items).most_common(1)
    assert times == 1, f"{_name(evaluator)} has {times} items of task and number {place}"
    for again in (evaluator.requests(), other.requests()):
        assert list(again) == items, f"{_name(evaluator)}.requests() gives something else the second time"


def check_texts(evaluator: Evaluator) -> None:
    """A text for each item, none empty, no two with one id; the same twice."""
    texts = list(evaluator.texts())
    assert len(texts) == len(evaluator.requests()), (
        f"{_name(evaluator)}.texts() gives {len(texts)} texts for {len(evaluator.requests())} items"
    )
    ids = [each.id for each in texts]
    assert len(set(ids)) == len(ids), f"{_name(evaluator)}.texts() gives two items the same id"
    empty = [each.id for each in texts if not each.text.strip()]
    assert not empty, f"{_name(evaluator)}.texts() has no text for {empty[0]}"
    assert list(evaluator.texts()) == texts, (
        f"{_name(evaluator)}.texts() gives something else the second time"
    )


def check_score(evaluator: Evaluator, answered: Sequence[Answered]) -> None:
    """A record for each item in their order, finite scores; the same twice; a part of the items can be scored."""
    results = evaluator.score(answered)
    _check_records(evaluator, results, answered)
    assert results.scores, f"{_name(evaluator)} gives no score"
    for score in results.scores:
        assert math.isfinite(score.value), (
            f"{_name(evaluator)} scores {score.name} {score.metric} {score.value}"
        )
        assert score.items > 0, f"{_name(evaluator)} scores {score.name} {score.metric} over no item"
    assert evaluator.score(answered) == results, f"{_name(evaluator)}.score() of the same answers changes"
    _check_records(evaluator, evaluator.score(answered[:1]), answered[:1])


def check_invariance(evaluator: Evaluator, items: Sequence[Item]) -> None:
    """The records and scores are those of single requests, of one batch, and of the reversed order."""
    expected = evaluator.score(_scorer().answer(items))
    backwards = _scorer().answer(items[::-1])[::-1]
    for how, answered in (
        ("one by one", _scorer(1).answer(items)),
        ("in one batch", _scorer(100_000).answer(items)),
        ("in reversed order", backwards),
    ):
        found = evaluator.score(answered)
        for one, other in zip(expected.records, found.records, strict=True):
            assert one.answer == other.answer, (
                f"{_name(evaluator)} takes {other.answer!r} for the answer to {one.task} {one.number} when "
                f"asked {how}, else {one.answer!r}"
            )
        values = [[score.value for score in results.scores] for results in (expected, found)]
        close = [math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-4) for a, b in zip(*values, strict=True)]
        assert all(close), f"{_name(evaluator)} scores {values[1]} when asked {how}, else {values[0]}"


def check_untouched(evaluator: Evaluator, items: Sequence[Item]) -> None:
    """An evaluation of a model in training changes neither it nor any generator of random numbers."""
    import numpy
    import torch

    model = _model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.train().modules()]
    drawn = (torch.get_rng_state(), random.getstate(), repr(numpy.random.get_state()))
    evaluator.requests()
    evaluator.score(_scorer().answer(items))
    list(evaluator.texts())
    after = (torch.get_rng_state(), random.getstate(), repr(numpy.random.get_state()))
    changed = [name for name, value in model.state_dict().items() if not torch.equal(before[name], value)]
    assert not changed, f"{_name(evaluator)} changes the model's {changed[0]}"
    assert [module.training for module in model.modules()] == modes, (
        f"{_name(evaluator)} changes the model's mode"
    )
    assert all(parameter.grad is None for parameter in model.parameters()), (
        f"{_name(evaluator)} leaves gradients in the model"
    )
    untouched = torch.equal(drawn[0], after[0]) and drawn[1:] == after[1:]
    assert untouched, (
        f"{_name(evaluator)} draws from a global generator of random numbers: use random.Random(seed)"
    )


def _check_records(evaluator: Evaluator, results: Results, answered: Sequence[Answered]) -> None:
    places = [(record.task, record.number, record.key) for record in results.records]
    expected = [(each.item.task, each.item.number, each.item.key) for each in answered]
    assert places == expected, (
        f"{_name(evaluator)} gives records of {places}, not one for each item in their order: use Record.of"
    )
    judged_alone = any(record.metrics for record in results.records)  # some metrics are of all items together
    for record in results.records:
        assert record.metrics or not judged_alone, (
            f"the record of {record.task} {record.number} of {_name(evaluator)} has no metric"
        )
        assert all(map(math.isfinite, record.metrics.values())), (
            f"the record of {record.task} {record.number} of {_name(evaluator)} has the metrics "
            f"{dict(record.metrics)}"
        )


@lru_cache(maxsize=1)
def _model() -> PreTrainedModel:
    import torch

    from lightning_sft.assets import MODEL, model_path
    from lightning_sft.training.models import load_model

    return load_model(model_path(MODEL), dtype=torch.float32)


def _scorer(batch_tokens: int | None = None) -> Scorer:
    from transformers import AutoTokenizer

    from lightning_sft.assets import MODEL, model_path
    from lightning_sft.evaluation.scorer import Scorer

    tokenizer = AutoTokenizer.from_pretrained(model_path(MODEL))
    return Scorer(_model(), tokenizer, context_length=_CONTEXT, batch_tokens=batch_tokens)


def _name(evaluator: Evaluator) -> str:
    return type(evaluator).__name__
