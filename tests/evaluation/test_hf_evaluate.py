"""Metrics of `evaluate`, from a local script; nothing is fetched."""

from __future__ import annotations

import json

import pytest

from lightning_sft import Answered, Generated, SFTError
from lightning_sft_evaluators.hf_evaluate import HFEvaluate

SCRIPT = """
import datasets
import evaluate


class Near(evaluate.Metric):
    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references, bonus=0):
        if bonus == 13:
            raise RuntimeError("unlucky")
        same = [float(p == r) for p, r in zip(predictions, references)]
        if bonus == 14:
            return {"text": "none"}
        return {"share": sum(same) / len(same) + bonus, "each": same, "lengths": [1], "told": "a text"}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "near.py").write_text(SCRIPT)
    rows = [{"instruction": f"say {n}", "output": f"{n}"} for n in range(4)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def make(here, **options) -> HFEvaluate:
    given = {"metric": str(here / "near.py"), "trust_remote_code": True}
    return HFEvaluate(str(here / "a.jsonl"), **{**given, **options})


def score(evaluator, texts):
    items = evaluator.requests()
    pairs = zip(items, texts, strict=True)
    return evaluator.score([Answered(item, (Generated(text, 1),)) for item, text in pairs])


def test_every_number_of_a_metric_is_a_score(here):
    results = score(make(here, compute={"bonus": 1}), ["0", " 1\n", "x", "<think>2?</think> 3"])
    found = {(each.name, each.metric): each for each in results.scores}
    assert set(found) == {("near", "share"), ("near", "each"), ("near", "lengths")}
    assert (found["near", "share"].value, found["near", "share"].stderr) == (1.75, None)
    assert found["near", "each"].value == 0.75
    assert found["near", "each"].stderr == pytest.approx(0.25)
    assert [each.metrics["each"] for each in results.records] == [1, 1, 0, 1]
    down = score(make(here, higher_is_better=False, name="mine"), ["0"] * 4)
    assert {(each.name, each.higher_is_better) for each in down.scores} == {("mine", False)}


def test_code_is_run_only_if_the_user_says_so(here):
    (here / "near.py").write_text("raise SystemExit('it was run')")
    with pytest.raises(SFTError, match=r"near\.py is a program") as error:
        make(here, trust_remote_code=False).requests()
    assert make(here).texts()[3].text == "say 3"
    assert "trust_remote_code: true" in str(error.value)


def test_offline_a_metric_of_the_hub_is_refused_in_a_sentence(here):
    with pytest.raises(SFTError, match="the metric no_such_metric_at_all can't be loaded") as error:
        make(here, metric="no_such_metric_at_all").requests()
    assert "offline, give the path of the metric's script" in str(error.value)


def test_a_metric_that_needs_a_package_names_it(here):
    (here / "near.py").write_text(
        SCRIPT.replace("import evaluate\n", "import evaluate\nimport not_installed_at_all\n")
    )
    with pytest.raises(SFTError, match="not_installed_at_all"):
        make(here).requests()


def test_a_metric_that_fails_is_named(here):
    with pytest.raises(SFTError, match=r"near\.py failed: RuntimeError: unlucky"):
        score(make(here, compute={"bonus": 13}), ["0"] * 4)
    with pytest.raises(SFTError, match="gives no number, but text"):
        score(make(here, compute={"bonus": 14}), ["0"] * 4)


def test_without_the_package_the_extra_is_named(here, monkeypatch):
    monkeypatch.setattr("lightning_sft_evaluators.hf_evaluate.find_spec", lambda name: None)
    with pytest.raises(SFTError, match=r"lightning-sft\[metrics\]"):
        make(here).requests()
