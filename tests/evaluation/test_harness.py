"""Tasks of lm-evaluation-harness through ours: the figures that the harness finds with its own model."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from lightning_sft import (
    Answered,
    Item,
    Likelihood,
    LogLikelihood,
    RollingLogLikelihood,
    Scorer,
    SFTError,
    SFTModule,
)
from lightning_sft_evaluators.harness import LMEvalHarness, _answer

ROOT = Path(__file__).parents[2]
needs_harness = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-evaluation-harness isn't installed (lightning-sft[harness])"
)

CHOICE = """
task: our_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
fewshot_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: [hello, the user, how]
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
WRITTEN = """
task: our_writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{['hello', 'the user', 'how'][answer]}}}}"
generation_kwargs: {{until: ["u"], max_gen_toks: 6, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
ROLLING = """
task: our_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: bits_per_byte}}, {{metric: word_perplexity}}]
"""
GROUP = """
group: ours
task: [our_choice, our_writing]
aggregate_metric_list:
  - {{metric: acc, weight_by_size: true}}
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "docs.jsonl"
    rows = [{"question": f"who asks {n}?", "answer": n % 3} for n in range(7)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, text in (("choice", CHOICE), ("written", WRITTEN), ("rolling", ROLLING), ("group", GROUP)):
        (folder / f"{name}.yaml").write_text(text.format(data=data))
    return str(folder)


@pytest.fixture
def scorer(model_folder):
    module = SFTModule(base=str(model_folder("llama")))
    module.configure_model()
    return Scorer.of(module)


def found(evaluator, scorer):
    return evaluator.score(scorer.answer(evaluator.requests()))


@needs_harness
@pytest.mark.parametrize("shots", [0, 2])
def test_its_figures_are_those_of_the_harness_with_its_own_model(tasks, scorer, model_folder, shots):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    names = ["our_choice", "our_writing"] if shots else ["our_choice", "our_writing", "our_rolling"]
    evaluator = LMEvalHarness(names, shots=shots, include_path=tasks, builtin=False, bootstrap_iters=100)
    results = found(evaluator, scorer)
    theirs = simple_evaluate(
        HFLM(str(model_folder("llama")), device="cpu", dtype="float32", batch_size=1),
        tasks=names,
        num_fewshot=shots,
        task_manager=TaskManager(include_path=tasks, include_defaults=False),
        bootstrap_iters=100,
    )
    assert [each.text for each in evaluator.texts()][6:8] == [
        "who asks 6?",
        "who asks 0?",
    ]  # without examples
    assert len(results.scores) == (4 if not shots else 2)
    for score in results.scores:
        task = score.name.removeprefix("harness/")
        (key,) = (key for key in theirs["results"][task] if key.startswith(f"{score.metric},"))
        assert score.value == pytest.approx(theirs["results"][task][key], rel=1e-4)
        error = theirs["results"][task][key.replace(",", "_stderr,")]
        assert score.stderr == (None if error == "N/A" else pytest.approx(error))
        assert score.items == 7
    for task in names:
        ours = [each for each in results.records if each.task == task]
        rows = sorted(theirs["samples"][task], key=lambda row: row["doc_id"])
        assert [each.number for each in ours] == [row["doc_id"] for row in rows]
        if task != "our_rolling":
            metric = "acc" if task == "our_choice" else "exact_match"
            assert [each.metrics[metric] for each in ours] == [row[metric] for row in rows]
        if task == "our_choice":
            options = ["hello", "the user", "how"]
            right = [each.answer == options[int(each.target)] for each in ours]
            assert right == [row["acc"] == 1 for row in rows]
        elif task == "our_writing":
            assert [each.answer for each in ours] == [row["filtered_resps"][0] for row in rows]


@needs_harness
def test_groups_limits_and_parts(tasks, scorer):
    evaluator = LMEvalHarness(["ours"], limit=4, include_path=tasks, builtin=False, bootstrap_iters=0)
    random.seed(3)
    before = random.getstate()
    items = evaluator.requests()
    assert random.getstate() == before
    assert [(item.task, item.number) for item in items] == [
        (task, number) for task in ("our_choice", "our_writing") for number in range(4)
    ]
    assert items == evaluator.requests()
    answered = scorer.answer(items)
    scores = {(each.name, each.metric): each for each in evaluator.score(answered).scores}
    assert random.getstate() == before
    assert scores["harness/ours", "acc"].items == 8
    assert scores["harness/our_choice", "acc"].items == 4
    part = evaluator.score(answered[1:3])
    assert [each.number for each in part.records] == [1, 2]
    assert [each.items for each in part.scores] == [2]
    assert isinstance(part.records[0].target, str)


@needs_harness
def test_a_chat_is_asked_as_messages(tasks):
    evaluator = LMEvalHarness(
        ["our_choice", "our_writing"], shots=1, chat=True, system="Be.", include_path=tasks, builtin=False
    )
    items = evaluator.requests()
    choice, written = items[0].requests[0], items[7].requests[0]
    assert [message.role for message in choice.context] == ["system", "user", "assistant", "user"]
    assert choice.continuation == "hello"
    assert written.prompt[-1].content == "who asks 0?"
    assert (written.stop, written.max_new_tokens, written.temperature) == (("u",), 6, 0.0)


@needs_harness
@pytest.mark.parametrize(
    ("options", "tokens", "heat"),
    [
        ({"max_new_tokens": 3}, 3, 0.0),
        ({"max_tokens": 4, "max_new_tokens": 5}, 5, 0.0),
        ({"max_gen_toks": None, "max_completion_tokens": 6}, 6, 0.0),
        ({}, 256, 0.0),
        ({"do_sample": False, "temperature": 0.7}, 256, 0.0),
        ({"do_sample": None, "temperature": 0.7}, 256, 0.7),
        ({"do_sample": True}, 256, 1.0),
        ({"do_sample": True, "temperature": 0.2}, 256, 0.2),
    ],
)
def test_options_of_generation_have_the_harness_s_other_names(options, tokens, heat):
    from lm_eval.api.instance import Instance

    from lightning_sft_evaluators.harness_lm import request_of

    asked = request_of(Instance("generate_until", {}, ("how?", {"until": "u", **options}), 0))
    assert (asked.stop, asked.max_new_tokens, asked.temperature) == (("u",), tokens, heat)


@needs_harness
def test_what_cannot_be_asked_is_refused(tasks):
    with pytest.raises(SFTError, match="no_such_task_at_all"):
        LMEvalHarness(["no_such_task_at_all"], include_path=tasks, builtin=False).requests()
    path = Path(tasks) / "written.yaml"
    path.write_text(
        path.read_text().replace("do_sample: false", "do_sample: true, temperature: 0.5") + "repeats: 3\n"
    )
    with pytest.raises(SFTError, match="our_writing asks for 3 draws of each answer"):
        LMEvalHarness(["our_writing"], include_path=tasks, builtin=False).requests()


def test_without_the_harness_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("lightning_sft_evaluators.harness.find_spec", lambda name: None)
    with pytest.raises(SFTError, match="isn't installed") as error:
        LMEvalHarness(["arc_easy"]).requests()
    assert "lightning-sft[harness]" in str(error.value)
    with pytest.raises(SFTError, match="tasks are"):
        LMEvalHarness([])


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("lm_eval") is not None, reason="lm-evaluation-harness is installed: they ran already"
)
def test_the_tests_above_pass_where_the_harness_is_installed_beside(tmp_path):
    """It brings many packages, so it isn't part of the development environment."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    (packages,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    (packages / "beside.pth").write_text(
        "\n".join(path for path in sys.path if path.endswith("site-packages"))
    )
    python = tmp_path / "venv/bin/python"
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "-q",
        "-c",
        ROOT / "constraints.txt",
    ]
    subprocess.run([*install, "lm_eval"], check=True, timeout=600)
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'plugins'}"}
    kit = f"{ROOT / 'tests/test_conformance.py'}::TestLMEvalHarness"
    command = [python, "-m", "pytest", "-q", "-m", "not slow", Path(__file__), kit]
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout.splitlines()[-1]


def answered(*asked):
    item = Item("task", 0, tuple(request for request, _ in asked))
    return Answered(item, tuple(response for _, response in asked))


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        (
            [
                (LogLikelihood("who?", " Ada"), Likelihood(-3.0, 1, False)),
                (LogLikelihood("who?", " Bo"), Likelihood(-2.0, 1, True)),
            ],
            "Bo",
        ),
        (  # where the answer without the question is asked, too
            [
                (LogLikelihood("who?", " Ada"), Likelihood(-2.0, 1, False)),
                (LogLikelihood("who?", " Bo"), Likelihood(-3.0, 1, False)),
                (LogLikelihood("", " Ada"), Likelihood(-5.0, 1, False)),
                (LogLikelihood("", " Bo"), Likelihood(-1.0, 1, False)),
            ],
            "Ada",
        ),
        (  # where the choices are in the context
            [
                (LogLikelihood("Ada ran", " home"), Likelihood(-3.0, 1, False)),
                (LogLikelihood("Bo ran", " home"), Likelihood(-2.0, 1, False)),
            ],
            "1",
        ),
        ([(LogLikelihood("the last", " word"), Likelihood(-3.0, 1, True))], "word"),
        ([(LogLikelihood("the last", " word"), Likelihood(-3.0, 1, False))], ""),
        ([(RollingLogLikelihood("a text"), Likelihood(-3.0, 1, False))], ""),
    ],
)  # fmt: skip
def test_the_answer_is_the_likeliest_choice(asked, answer):
    assert _answer(answered(*asked), {"filtered_resps": [(-3.0, False)]}) == answer
