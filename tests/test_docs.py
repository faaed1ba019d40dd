"""Every command that README and guides show is run, in the order they show it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from inspect import signature
from pathlib import Path

import pytest
from stranger import install

from lightning_sft.__main__ import main

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md", "docs/fine-tuning.md", "docs/data.md", "docs/evaluation.md", "docs/forgetting.md", "docs/plan.md",
    "docs/plugins.md", "docs/distributed.md", "docs/filters.md", "docs/sweeps.md",
]  # fmt: skip


def commands(page: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def starts_processes(line: str) -> bool:
    return "--trainer.devices 2" in line or line.startswith("lightning-sft sweep")


@pytest.fixture
def here(tmp_path, monkeypatch, model_folder):
    """A folder with what the pages take for granted."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    shutil.copytree(model_folder("llama"), tmp_path / "my-model")
    rows = [{"instruction": f"say {n}", "input": "", "output": f"{n} {n}"} for n in range(40)]
    (tmp_path / "my-data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_the_commands_of_the_page_run(page, here, capfd):
    for line in commands(page):
        program, *arguments = shlex.split(line)
        assert program == "lightning-sft", f"{line}: only lightning-sft commands can be shown as bash"
        if starts_processes(line):
            continue
        assert main(arguments) == 0, f"{line}\n{capfd.readouterr().err}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "line", [line for page in PAGES for line in commands(page) if starts_processes(line)]
)
def test_a_command_that_starts_processes_runs(line, here):
    command = [sys.executable, "-m", "lightning_sft", *shlex.split(line)[1:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_links_between_pages_lead_somewhere():
    for page in [
        *PAGES,
        "docs/quickstart.md",
        "docs/speed.md",
        "docs/python.md",
        "docs/decisions.md",
        "CHANGELOG.md",
    ]:
        text = (ROOT / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!http)([^)#]+)", text):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}"


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def guide(tmp_path, monkeypatch):
    """The project of the author's guide, installed: a folder with every code block under the name in its first line."""
    for block in [
        block for language in ("python", "toml", "yaml") for block in blocks("docs/plugins.md", language)
    ]:
        name = re.match(r"# (\S+)\n", block)
        assert name, f"the block says no file name:\n{block}"
        path = tmp_path / name.group(1)
        path.parent.mkdir(exist_ok=True)
        path.write_text(block)
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]
    install(
        tmp_path, project["name"], project["entry-points"], {}, project["version"], project["dependencies"][0]
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] in ("my_plugins", "guide_tests")]:
        del sys.modules[name]


def test_the_guides_plugins_are_found_and_pass_their_tests(guide, tmp_path_factory, capsys):
    assert main(["plugins", "QuestionAnswer"]) == 0
    assert "--language LANGUAGE" in capsys.readouterr().out
    spec = spec_from_file_location("guide_tests", guide / "tests" / "test_plugins.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    ran = 0
    for tests in (
        module.TestQuestionAnswer,
        module.TestCutOff,
        module.TestPerTask,
        module.TestStopWhenLearned,
    ):
        for name in [name for name in dir(tests) if name.startswith("test_")]:
            method = getattr(tests(), name)
            method(*[tmp_path_factory.mktemp("law") for _ in signature(method).parameters])
            ran += 1
    assert ran == 34


def test_the_guides_evaluator_passes_its_tests_and_asks_the_model(guide, tmp_path_factory, capsys):
    rows = [("dry", "wet", "short"), ("wide", "narrow", "full"), ("long", "short", "wet")]
    columns = ("word", "opposite", "other")
    lines = [json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows]
    (guide / "tests/opposites.jsonl").write_text("".join(lines))
    spec = spec_from_file_location("guide_tests", guide / "tests" / "test_evaluator.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    names = [name for name in dir(module.TestOpposites) if name.startswith("test_")]
    for name in names:
        getattr(module.TestOpposites(), name)()
    assert len(names) == 10
    assert main(["evaluate", "--config", "scores.yaml"]) == 0
    found = json.loads((guide / "runs/evaluation-tiny/results.json").read_text())["evaluators"]["Opposites"]
    assert [(s["name"], s["value"], s["items"]) for s in found["scores"]] == [
        ("opposites", 1.0, 3), ("opposites/opposites", 1.0, 3),
    ]  # fmt: skip
    (guide / "tests/opposites.jsonl").write_text(lines[0] + '{"word": "wide"}\n')
    assert main(["evaluate", "--config", "scores.yaml"]) == 2
    assert "opposites.jsonl, row 2, key 'opposite': there is no word" in capsys.readouterr().err


def test_the_guides_run_leaves_out_other_languages_and_stops_when_it_has_learned(guide, capsys):
    rows = [{"question": f"{n}?", "answer": f"{n}.", "language": "de" if n == 3 else "en"} for n in range(6)]
    rows[4]["answer"] = "4 and"
    (guide / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["fit", "--config", "run.yaml"]) == 0
    ledger = json.loads((guide / "runs/run-1/ledger.json").read_text())["train"]
    assert (ledger["sources"][0]["rows"], ledger["examples"]) == (6, 4)
    assert ledger["sources"][0]["filtered"] == {"CutOff": {"the last answer is cut off": 1}}
    assert len((guide / "runs/run-1/metrics.csv").read_text().splitlines()) == 1 + 3


def test_the_loss_of_the_plugin_guide_is_what_it_says(guide):
    import torch

    from lightning_sft import TokenBatch

    focal = import_module("my_plugins.renamed").Sharper(gamma=1.5)
    logits, targets = torch.randn(5, 7), torch.arange(5)
    p = logits.softmax(-1)[torch.arange(5), targets]
    found = focal.per_token(TokenBatch(logits, targets, torch.ones(5)))
    assert torch.allclose(found, -((1 - p) ** 1.5) * p.log(), atol=1e-6)


def test_the_option_that_the_guide_renames_keeps_its_old_name(guide, capsys):
    loss = import_module("my_plugins.renamed").Sharper
    argv = [
        "--model.base=tiny",
        "--data.train=x.jsonl",
        "--model.loss=my_plugins.renamed.Sharper",
        "--model.loss.focus=3",
    ]
    with pytest.warns(FutureWarning, match="the option focus is now called gamma"), pytest.raises(SystemExit):
        main(["fit", *argv, "--print_config"])
    assert "gamma: 3.0" in capsys.readouterr().out
    assert loss.renamed_options == {"focus": "gamma"}


def test_the_python_guide_works_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "guide"}
    for block in blocks("docs/python.md", "python"):
        exec(block, names)
    out = capsys.readouterr().out
    assert "32 rows, 32 examples" in out
    assert re.search(r"^<\|im_end\|> +trained$", out, re.MULTILINE)
    assert names["model"].peft_config["default"].r == 8


def test_the_evaluator_of_the_evaluation_guide_works():
    from lightning_sft import Answered, Generated

    text = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    names: dict[str, object] = {}
    exec(code.group(1), names)
    sums = names["Sums"](largest=2)
    results = sums.score([Answered(item, (Generated(" 1", 2),)) for item in sums.requests()])
    assert [(score.name, score.value) for score in results.scores] == [
        ("sums", 0.5), ("sums/0 + …", 0.5), ("sums/1 + …", 0.5),
    ]  # fmt: skip
