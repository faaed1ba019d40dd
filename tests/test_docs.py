"""Every command that README and guides show is run, in the order they show it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_sft.__main__ import main

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md", "docs/fine-tuning.md", "docs/data.md", "docs/evaluation.md", "docs/forgetting.md", "docs/plan.md",
    "docs/plugins.md", "docs/distributed.md",
]  # fmt: skip


def commands(page: str) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def starts_processes(line: str) -> bool:
    return "--trainer.devices 2" in line


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
    for page in [*PAGES, "docs/quickstart.md", "docs/speed.md", "docs/decisions.md", "CHANGELOG.md"]:
        text = (ROOT / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!http)([^)#]+)", text):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}"


def test_the_format_of_the_plugin_guide_works():
    code = re.search(
        r"```python\n(.*?)```", (ROOT / "docs/plugins.md").read_text(encoding="utf-8"), re.DOTALL
    )
    assert code is not None
    names: dict[str, object] = {}
    exec(code.group(1), names)
    format = names["QuestionAnswer"](language="en")
    (conversation,) = format.convert({"question": "a?", "answer": "b", "language": "en"})
    assert [m.content for m in conversation.messages] == ["a?", "b"]
    assert not list(format.convert({"question": "a?", "answer": "b", "language": "de"}))


def test_the_loss_of_the_plugin_guide_is_what_it_says():
    import torch

    from lightning_sft import TokenBatch

    text = (ROOT / "docs/plugins.md").read_text(encoding="utf-8")
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "Loss" in block)
    names: dict[str, object] = {}
    exec(code, names)
    logits, targets = torch.randn(5, 7), torch.arange(5)
    p = logits.softmax(-1)[torch.arange(5), targets]
    found = names["Focal"](gamma=1.5).per_token(TokenBatch(logits, targets, torch.ones(5)))
    assert torch.allclose(found, -((1 - p) ** 1.5) * p.log(), atol=1e-6)


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
