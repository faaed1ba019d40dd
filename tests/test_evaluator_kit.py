"""Each law of the evaluators' conformance kit catches what breaks it, and says what."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import count

import pytest
import torch

from lightning_sft import (
    Answered,
    Evaluator,
    Generate,
    Item,
    ItemText,
    LogLikelihood,
    Record,
    Results,
    Score,
    SFTError,
    scores_by_task,
)
from lightning_sft.testing import EvaluatorTests, MissingSample, evaluators

calls = count()


class Good(Evaluator):
    """Which word comes next."""

    def requests(self) -> Sequence[Item]:
        words = (" a", " the", " no")
        return [
            Item("next", n, tuple(LogLikelihood(text, word) for word in words), " a", {"n": n}, text=text)
            for n, text in enumerate(["Tom has", "Here is", "I see"])
        ]

    def score(self, answered: Sequence[Answered]) -> Results:
        records = [
            Record.of(each, str(each.likeliest), {"acc": float(not each.likeliest)}) for each in answered
        ]
        return Results(tuple(scores_by_task(records, "acc", "next")), tuple(records))


ITEMS = Good().requests()


def variant(**methods: object) -> Evaluator:
    return type("Variant", (Good,), {"__doc__": "A variant.", **methods})()


def with_items(*items: Item) -> dict[str, object]:
    return {"requests": lambda self: list(items)}


def changed(change: object) -> dict[str, object]:
    """A score that is made of the good one's."""
    return {"score": lambda self, answered: change(Good.score(self, answered))}


def test_a_good_evaluator_passes() -> None:
    tests = type("Tests", (EvaluatorTests,), {"plugin": Good})()
    tests.make = Good
    for name in dir(EvaluatorTests):
        if name.startswith("test_its_") and "options" not in name and "config" not in name:
            getattr(tests, name)()
    tests.test_it_judges_each_item()
    tests.test_it_leaves_everything_as_it_was()
    assert [item.number for item in tests.tried(Good())] == [0, 1, 2]
    tests.items_tried = 2
    assert [item.number for item in tests.tried(Good())] == [0, 1]


@pytest.mark.parametrize(
    ("methods", "problem"),
    [
        (with_items(), "asks nothing"),
        (with_items(replace(ITEMS[0], requests=())), "has an item without requests: next 0"),
        (with_items(ITEMS[0], ITEMS[1], ITEMS[0]), r"has 2 items of task and number \('next', 0\)"),
        (with_items(replace(ITEMS[0], data={"x": {1}})), "the data of an item of Variant is no JSON"),
        (
            {"requests": lambda self: [Item("t", next(calls), (Generate("x"),))]},
            "something else the second time",
        ),
        (
            {"requests": lambda self: [Item("t", 0, (Generate(str(id(self))),))]},
            "something else the second time",
        ),
    ],
)
def test_requests_that_are_not_pure_or_not_whole_are_caught(methods: dict[str, object], problem: str) -> None:
    one, other = variant(**methods), variant(**methods)
    with pytest.raises(AssertionError, match=problem):
        evaluators.check_requests(one, other)


@pytest.mark.parametrize(
    ("texts", "problem"),
    [
        (lambda self: [ItemText("a", "x")], "gives 1 texts for 3 items"),
        (lambda self: [ItemText("a", "x")] * 3, "gives two items the same id"),
        (lambda self: [ItemText(c, "x" * (c != "c")) for c in "abc"], "has no text for c"),
        (lambda self: [ItemText(c, str(next(calls))) for c in "abc"], "something else the second time"),
    ],
)
def test_items_that_are_not_exposed_are_caught(texts: object, problem: str) -> None:
    with pytest.raises(AssertionError, match=problem):
        evaluators.check_texts(variant(texts=texts))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda r: replace(r, records=r.records[::-1]), "not one for each item in their order"),
        (lambda r: replace(r, records=r.records[:1]), "not one for each item in their order"),
        (lambda r: replace(r, scores=()), "gives no score"),
        (lambda r: replace(r, scores=(Score("n", "acc", float("nan"), None, 1),)), "scores n acc nan"),
        (lambda r: replace(r, scores=(Score("n", "acc", 1.0, None, 0),)), "over no item"),
        (
            lambda r: replace(r, scores=(Score("n", "acc", float(next(calls)), None, 1),)),
            "same answers changes",
        ),
        (lambda r: replace(r, records=(replace(r.records[0], metrics={}), *r.records[1:])), "has no metric"),
        (
            lambda r: replace(r, records=tuple(replace(e, metrics={"acc": float("inf")}) for e in r.records)),
            r"has the metrics \{'acc': inf\}",
        ),
    ],
)
def test_a_bad_score_is_caught(change: object, problem: str) -> None:
    answered = evaluators._scorer().answer(ITEMS)
    with pytest.raises(AssertionError, match=problem):
        evaluators.check_score(variant(**changed(change)), answered)


def test_a_part_of_the_items_has_to_do() -> None:
    def score(self, answered):
        results = Good.score(self, answered)
        return results if len(answered) == 3 else replace(results, records=())

    with pytest.raises(AssertionError, match="not one for each item"):
        evaluators.check_score(variant(score=score), evaluators._scorer().answer(ITEMS))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda r: replace(r, records=tuple(replace(e, answer=str(next(calls))) for e in r.records)),
            "for the answer to next 0 when asked one by one",
        ),
        (
            lambda r: replace(r, scores=(Score("n", "acc", float(next(calls)), None, 1),)),
            "when asked one by one",
        ),
    ],
)
def test_a_score_that_depends_on_how_it_is_asked_is_caught(change: object, problem: str) -> None:
    with pytest.raises(AssertionError, match=problem):
        evaluators.check_invariance(variant(**changed(change)), ITEMS)


def changes_weights(results: Results) -> Results:
    with torch.no_grad():
        next(evaluators._model().parameters()).add_(0.0).flatten()[0] += 1
    return results


def leaves_gradients(results: Results) -> Results:
    parameter = next(evaluators._model().parameters())
    parameter.grad = torch.zeros_like(parameter)
    return results


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (changes_weights, "changes the model's model.embed_tokens.weight"),
        (lambda r: (evaluators._model().eval(), r)[1], "changes the model's mode"),
        (leaves_gradients, "leaves gradients in the model"),
        (lambda r: (random.random(), r)[1], "draws from a global generator"),
        (lambda r: (torch.rand(1), r)[1], "draws from a global generator"),
    ],
)
def test_an_evaluator_that_changes_what_is_not_its_own_is_caught(change: object, problem: str) -> None:
    with pytest.raises(AssertionError, match=problem):
        evaluators.check_untouched(variant(**changed(change)), ITEMS)
    evaluators._model.cache_clear()


def test_data_that_is_missing_is_asked_for() -> None:
    def requests(self):
        raise SFTError("no such file", where="x.jsonl")

    tests = type("Tests", (EvaluatorTests,), {"plugin": type("Lost", (Good,), {"requests": requests})})()
    tests.make = tests.plugin
    with pytest.raises(MissingSample, match=r"Lost asks nothing: x.jsonl: no such file; set `options`"):
        tests.test_its_requests_are_pure()


def test_what_an_item_says_is_all_that_it_asks_unless_it_is_said() -> None:
    bare = replace(ITEMS[0], text="")
    assert bare.exposed == ItemText("next/0", "Tom has\n a\n the\n no", " a")
    assert replace(ITEMS[0], answer="an a").exposed == ItemText("next/0", "Tom has", "an a")


def test_every_test_says_what_it_is_about() -> None:
    assert all(
        getattr(EvaluatorTests, name).__doc__ for name in dir(EvaluatorTests) if name.startswith("test_")
    )
