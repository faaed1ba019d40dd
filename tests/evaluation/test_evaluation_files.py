"""What an evaluation leaves in its folder: valid JSON, and all that earlier ones left."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from lightning_sft import Item, Likelihood, LogLikelihood, Record, Results, Score, SFTError
from lightning_sft.evaluation import files
from lightning_sft.evaluation.evaluation import Found, _refuse_bad_weights, _refuse_nan
from lightning_sft.evaluation.files import as_json, write_evaluation
from lightning_sft.evaluation.paired import differences
from lightning_sft.evaluation.requests import Answered
from lightning_sft.evaluation.results import undefined
from lightning_sft.evaluation.table import show


def told(value, seconds=1.0, name="MMLU"):
    return {"versions": {}, "evaluators": {name: {"seconds": seconds, "scores": [value]}}}


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.json*") if path.is_file()
    }


def test_another_evaluation_moves_the_earlier_one_to_a_place_of_its_own(tmp_path):
    assert write_evaluation(tmp_path, told(1), {"model/MMLU.jsonl": "1\n", "base/MMLU.jsonl": "0\n"}) is None
    journal = tmp_path / "evaluation/model/MMLU/responses-0.jsonl"
    journal.parent.mkdir()
    journal.write_text("answers\n")
    first = content(tmp_path)
    kept = write_evaluation(tmp_path, told(2, name="BBH"), {"model/BBH.jsonl": "2\n"})
    assert kept == tmp_path / "evaluation/earlier/1"
    assert journal.read_text() == "answers\n"
    assert content(kept) == {
        "results.json": first["results.json"],
        "model/MMLU.jsonl": "1\n",
        "base/MMLU.jsonl": "0\n",
    }
    assert not (tmp_path / "evaluation/model/MMLU.jsonl").exists()
    assert json.loads((tmp_path / "results.json").read_text()) == told(2, name="BBH")
    again = write_evaluation(tmp_path, told(3), {"model/MMLU.jsonl": "3\n"})
    assert again == tmp_path / "evaluation/earlier/2"
    assert content(again)["model/BBH.jsonl"] == "2\n"
    assert content(kept)["model/MMLU.jsonl"] == "1\n"


def test_the_same_evaluation_again_is_no_other(tmp_path):
    records = {"model/MMLU.jsonl": "1\n"}
    write_evaluation(tmp_path, told(math.nan), records)
    assert write_evaluation(tmp_path, told(math.nan, seconds=9.0), records) is None
    assert json.loads((tmp_path / "results.json").read_text())["evaluators"]["MMLU"]["seconds"] == 9.0
    assert write_evaluation(tmp_path, told(math.nan), {"model/MMLU.jsonl": "2\n"}) is not None


@pytest.mark.parametrize("other", ["[1]", "not JSON", '{"evaluators": [1]}'])
def test_a_stranger_s_results_are_kept_too(tmp_path, other):
    (tmp_path / "results.json").write_text(other)
    kept = write_evaluation(tmp_path, told(1), {})
    assert (kept / "results.json").read_text() == other


@pytest.mark.parametrize("at", range(5))
def test_a_kill_loses_nothing(tmp_path, monkeypatch, at):
    records = {"model/A.jsonl": "1\n", "base/A.jsonl": "2\n"}
    write_evaluation(tmp_path, told(1), records)
    before = content(tmp_path)
    count = iter(range(99))

    def killed(original):
        def call(*args, **kwargs):
            if next(count) == at:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "copy2", killed(files.shutil.copy2))
        patch.setattr(files.Path, "rename", killed(files.Path.rename))
        patch.setattr(files.Path, "unlink", killed(files.Path.unlink))
        with pytest.raises(KeyboardInterrupt):
            write_evaluation(tmp_path, told(2), {})
    write_evaluation(tmp_path, told(2), {})
    assert set(before.values()) <= set(content(tmp_path).values())
    assert not (tmp_path / "evaluation/earlier/.partial").exists()


def test_json_has_no_word_for_what_is_no_number():
    text = as_json(
        {"a": [math.nan, -math.inf, np.float32(0.5), np.int64(3), np.bool_(True)], "b": (True, None)}
    )
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": [None, None, 0.5, 3, True],
        "b": [True, None],
    }


def record(number, value):
    item = Item("sums", number, (LogLikelihood("a", "b"),))
    return Record.of(Answered(item, (Likelihood(-1.0, 1, True),)), "", {"m": value})


def test_a_metric_that_is_no_number_is_told(tmp_path, capsys):
    scores = (Score("sums", "m", math.nan, None, 3), Score("sums", "n", 0.5, None, 3))
    results = Results(scores, (record(0, 1.0), record(1, math.nan), record(2, math.inf)))
    notes = undefined(results)
    assert notes == [
        "no finite number, so null in results.json: sums m (nan)",
        "m is no finite number for 2 items (the first: sums 1)",
    ]
    base = Results(scores[1:], (record(0, 0.0), record(1, 0.0), record(2, math.inf)))
    assert undefined(Results(scores[1:], (record(0, 1.0),))) == []
    (change,) = differences(base.records, results.records)
    assert change.p is None
    assert not any(map(math.isfinite, (change.after, change.low, change.high)))
    show([Found("Sums", {}, Results(scores, results.records, tuple(notes)))], tmp_path)
    out = capsys.readouterr().out
    assert "no number" in out
    assert "Sums: m is no finite number for 2 items" in out


def test_weights_and_log_likelihoods_that_are_nan_are_refused():
    model = torch.nn.Linear(2, 2)
    _refuse_bad_weights(model, "base")
    model.bias.data[1] = math.inf
    with pytest.raises(SFTError, match="the base: bias has values that are NaN or infinite"):
        _refuse_bad_weights(model, "base")
    item = Item("sums", 7, (LogLikelihood("a", "b"), LogLikelihood("a", "c")))
    fine = Answered(item, (Likelihood(-math.inf, 1, True), Likelihood(-1.0, 1, True)))
    _refuse_nan([fine], "Sums")
    with pytest.raises(SFTError, match=r"Sums: .*NaN for 1 of 2 items \(the first: sums 7\)"):
        _refuse_nan(
            [fine, Answered(item, (Likelihood(math.nan, 1, True), Likelihood(-1.0, 1, True)))], "Sums"
        )
