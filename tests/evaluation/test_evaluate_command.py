"""`lightning-sft evaluate`: a checkpoint, a run or a folder, beside its base; resumed; on two processes."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import yaml
from stub_endpoint import StubEndpoint

from lightning_sft.__main__ import main
from lightning_sft.evaluation.scorer import Scorer

ROWS = [{"instruction": f"say {n}", "output": f"hello {n}"} for n in range(8)]


def write_inputs(folder, model):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "texts.jsonl").write_text(
        "".join(json.dumps({"text": f"how are you {n}?"}) + "\n" for n in range(7))
    )
    questions = [
        {
            "question": f"who asks {n}?",
            "choices": ["the user", "hello", "how", "are"],
            "answer": n % 4,
            "subject": "x",
        }
        for n in range(9)
    ]
    (folder / "test.jsonl").write_text("".join(json.dumps(each) + "\n" for each in questions))
    mmlu = {"path": "test.jsonl", "shots": 0}
    config = {
        "model": {
            "base": str(model),
            "adapter": {"class_path": "LoRA"},
            "learning_rate": 0.02,
            "preflight": False,
        },
        "data": {"train": "rows.jsonl", "batch_size": 4},
        "trainer": {"max_steps": 4, "accelerator": "cpu", "enable_progress_bar": False, "devices": 1},
        "evaluators": [
            {"class_path": "MMLU", "init_args": mmlu},
            {"class_path": "MMLU", "init_args": {**mmlu, "style": "generative", "max_new_tokens": 3}},
            {"class_path": "Perplexity", "init_args": {"path": "texts.jsonl"}},
        ],
    }
    (folder / "my.yaml").write_text(yaml.safe_dump(config))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model_folder):
    """A folder with the inputs and a finished run, `runs/my-1`."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_inputs(folder, model_folder("llama"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["fit", "--config", "my.yaml"]) == 0
    return folder


@pytest.fixture
def here(trained, monkeypatch):
    monkeypatch.chdir(trained)
    return trained


def results(folder):
    return json.loads((folder / "results.json").read_text())


def scores(told, name):
    return {(s["name"], s["metric"]): s["value"] for s in told["evaluators"][name]["scores"]}


def records(folder, name, part="model"):
    lines = (folder / f"evaluation/{part}/{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_run_with_its_base_beside_it(here, capsys):
    assert main(["evaluate", "--config", "my.yaml", "--source", "runs/my-1", "--baseline", "true"]) == 0
    run = here / "runs/my-1"
    told = results(run)
    assert list(told["evaluators"]) == ["MMLU", "MMLU-2", "Perplexity"]
    assert told["evaluators"]["MMLU-2"]["config"]["init_args"]["style"] == "generative"
    assert told["versions"]["lightning-sft"]
    before, after = records(run, "MMLU", "base"), records(run, "MMLU")
    (change,) = told["evaluators"]["MMLU"]["changes"]
    assert change["before"] == sum(r["metrics"]["acc"] for r in before) / 9
    pairs = [
        (a["metrics"]["acc"], b["metrics"]["acc"], a["number"]) for a, b in zip(after, before, strict=True)
    ]
    gained = [["x", number] for a, b, number in pairs if a > b]
    assert change["gained"] == gained
    assert [r["scores"] for r in before] != [r["scores"] for r in after]
    assert len(records(run, "Perplexity")) == 7
    out = capsys.readouterr().out
    (line,) = (" ".join(line.split()) for line in out.splitlines() if line.startswith("MMLU: mmlu acc"))
    low, high = change["low"], change["high"]
    for figure in (
        f"{change['before']:.4f} {change['after']:.4f}",
        f"{low:+.4f} … {high:+.4f}",
        f"{len(gained)} / {len(change['lost'])}",
    ):
        assert figure in line
    assert "MMLU-2: mmlu acc" in out
    assert "perplexity/text bits_per_byte" in out
    assert "runs/my-1" in out


def test_the_exported_folder_the_checkpoint_and_the_run_are_the_same_model(here):
    ways = {
        "source": ["--source", "runs/my-1/model"],
        "checkpoint": ["--ckpt_path", "runs/my-1/checkpoints/last.ckpt"],
        "last": ["--ckpt_path", "last", "--trainer.default_root_dir", "runs/my-1"],
    }
    found = {}
    for name, arguments in ways.items():
        assert main(["evaluate", "--config", "my.yaml", "--output", name, *arguments]) == 0
        found[name] = [record["scores"] for record in records(here / name, "MMLU")]
    for other in found.values():
        assert [s for each in other for s in each] == pytest.approx(
            [s for each in found["source"] for s in each]
        )


def test_the_base_itself_is_what_the_baseline_says(here):
    assert main(["evaluate", "--config", "my.yaml", "--output", "alone"]) == 0
    assert (
        main(
            [
                "evaluate",
                "--config",
                "my.yaml",
                "--output",
                "pair",
                "--source",
                "runs/my-1",
                "--baseline",
                "true",
            ]
        )
        == 0
    )
    alone = [record["scores"] for record in records(here / "alone", "MMLU")]
    base = [record["scores"] for record in records(here / "pair", "MMLU", "base")]
    assert [s for each in base for s in each] == pytest.approx([s for each in alone for s in each])


def test_a_stopped_evaluation_asks_only_what_is_left(here, monkeypatch, capsys):
    arguments = ["evaluate", "--config", "my.yaml", "--source", "runs/my-1", "--output"]
    assert main([*arguments, "whole"]) == 0
    asked = []
    original = Scorer.stream_items

    def stopping(self, items):
        for number, each in enumerate(original(self, items)):
            if len(asked) == 0 and number == 4:
                raise KeyboardInterrupt
            yield each

    monkeypatch.setattr(Scorer, "stream_items", stopping)
    assert main([*arguments, "stopped"]) == 130
    asked.append("again")
    journal = here / "stopped/evaluation/model/MMLU/responses-0.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 4
    journal.write_text("".join(lines[:-1]) + lines[-1][:11])  # as if killed in the middle of a line

    counted = []
    monkeypatch.setattr(
        Scorer, "stream_items", lambda self, items: counted.append(len(items)) or original(self, items)
    )
    assert main([*arguments, "stopped"]) == 0
    assert "3 of 9 items were answered before" in capsys.readouterr().out
    assert counted[0] == 6
    for name in ("MMLU", "MMLU-2", "Perplexity"):
        assert scores(results(here / "stopped"), name) == pytest.approx(scores(results(here / "whole"), name))


def test_responses_of_another_model_are_not_taken(here, monkeypatch):
    assert main(["evaluate", "--config", "my.yaml", "--output", "one"]) == 0
    before = [record["scores"] for record in records(here / "one", "MMLU")]
    assert main(["evaluate", "--config", "my.yaml", "--output", "one", "--source", "runs/my-1"]) == 0
    assert [record["scores"] for record in records(here / "one", "MMLU")] != before


def test_responses_in_another_precision_are_not_taken(here, capsys):
    found = []
    for precision in ("32-true", "bf16-mixed", "bf16-mixed"):
        assert (
            main(["evaluate", "--config", "my.yaml", "--output", "two", "--trainer.precision", precision])
            == 0
        )
        found.append([record["scores"] for record in records(here / "two", "MMLU")])
    assert found[0] != found[1] == found[2]
    assert capsys.readouterr().out.count("MMLU (model): 9 of 9 items were answered before") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--evaluators", "[]"], "there is no evaluator"),
        (["--baseline", "true"], "the base would be compared with itself"),
        (["--source", "runs/nothing"], "no such folder"),
        (["--source", "runs/my-1", "--ckpt_path", "runs/my-1/checkpoints/last.ckpt"], "both given"),
        (["--evaluators", "[{class_path: MMLU, init_args: {path: gone.csv}}]"], "gone.csv is not there"),
        (["--evaluators", "[{class_path: MMLU, init_args: {path: gone}}]"], "hendrycks/data.tar"),
        (["--source", "runs/my-1", "--output", "my.yaml/results"], "my.yaml/results is no folder"),
        (["--evaluators", "[{class_path: MMLO}]"], "did you mean MMLU"),
    ],
)
def test_mistakes_are_told(here, capsys, arguments, message):
    assert main(["evaluate", "--config", "my.yaml", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_judge_compares_the_tuned_model_with_the_base(here, capsys, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    rows = [{"instruction": f"say {n}"} for n in range(3)]
    (here / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with StubEndpoint(lambda prompt: "[[A]]").serving() as stub:
        endpoint = {"base_url": stub.url, "model": "m", "api_key_env": None, "cache": None}
        judge = {"questions": "asked.jsonl", "endpoint": endpoint, "max_new_tokens": 6}
        given = ["--evaluators", json.dumps([{"class_path": "Judge", "init_args": judge}])]
        command = ["evaluate", "--config", "my.yaml", "--output", "judged", *given]
        assert main([*command, "--source", "runs/my-1"]) == 0
        assert main(command) == 2
        assert "the base would be compared with itself" in capsys.readouterr().err
    found = scores(results(here / "judged"), "Judge")
    assert (found["judge", "win_rate"], found["judge", "position_consistency"]) == (0.5, 0.0)
    base, tuned = (
        (here / f"judged/evaluation/{part}/Judge/responses-0.jsonl").read_text().splitlines()[1:]
        for part in ("base", "model")
    )
    assert len(base) == len(tuned) == 3
    assert base != tuned
    asked = [body["messages"][0]["content"] for body in stub.bodies]
    answers = [json.loads(lines[0])[1][0][0].strip() for lines in (tuned, base)]
    for first, second in (answers, answers[::-1]):
        assert any(f"<answer_a>\n{first}" in each and f"<answer_b>\n{second}" in each for each in asked)


def holds(printed, written):
    """Whether a configuration has what was written, and at most defaults beside it."""
    if not isinstance(written, dict):
        return printed == written
    return all(key in printed and holds(printed[key], value) for key, value in written.items())


EVALUATORS = sorted((Path(__file__).parents[2] / "configs" / "evaluators").glob("*.yaml"))


def key_lines(node):
    """The line of each key whose value begins beside it."""
    for each in node.value if isinstance(node, yaml.CollectionNode) else ():
        key, value = each if isinstance(each, tuple) else (each, each)
        if key is not value and key.start_mark.line == value.start_mark.line:
            yield key.start_mark.line
        yield from key_lines(value)


@pytest.mark.parametrize("path", EVALUATORS, ids=[path.name for path in EVALUATORS])
def test_a_shipped_evaluator_parses_beside_a_run_and_explains_each_key(here, capsys, path):
    with pytest.raises(SystemExit) as end:
        main(["evaluate", "--config", "my.yaml", "--config", str(path), "--print_config"])
    assert end.value.code in (0, None)
    (evaluator,) = yaml.safe_load(capsys.readouterr().out)["evaluators"]
    (written,) = yaml.safe_load(path.read_text())["evaluators"]
    assert evaluator["class_path"].endswith(f".{written['class_path']}")
    assert holds(evaluator["init_args"], written["init_args"])
    lines = path.read_text().splitlines()
    keys = {lines[number] for number in key_lines(yaml.compose(path.read_text()))}
    assert len(keys) > 3
    assert [line for line in keys if "  #" not in line] == []


@pytest.mark.parametrize("command", ["preview", "plan"])
def test_a_run_s_evaluators_are_no_business_of_commands_without_weights(here, capsys, command):
    assert main([command, "--config", "my.yaml"]) == 0, capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_find_what_one_finds(here):
    base = [sys.executable, "-m", "lightning_sft", "evaluate", "--config", "my.yaml", "--source", "runs/my-1"]
    two = ["--trainer.devices", "2", "--trainer.strategy"]
    for extra in (["single"], ["double", *two, "ddp"], ["sharded", *two, "fsdp2"]):
        extra = ["--output", *extra]
        subprocess.run([*base, "--baseline", "true", *extra], check=True, capture_output=True, timeout=300)
    assert results(here / "double")["model"]["processes"] == 2
    for folder, part in product(("double", "sharded"), ("model", "base")):
        for name in ("MMLU", "MMLU-2", "Perplexity"):
            one, other = records(here / "single", name, part), records(here / folder, name, part)
            assert [r["generated"] for r in one] == [r["generated"] for r in other]
            assert [r["answer"] for r in one] == [r["answer"] for r in other]
            for a, b in zip(one, other, strict=True):
                assert a["scores"] == pytest.approx(b["scores"], rel=1e-5)
