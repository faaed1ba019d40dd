"""What the quickstart claims, shown by running the commands of its guide."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "quickstart.md"
GATED = ("extract", "json", "refuse", "comply")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every command of the guide, run in its order; the folder with their runs, and what they printed."""
    folder = tmp_path_factory.mktemp("quickstart")
    shutil.copytree(ROOT / "configs", folder / "configs")
    printed = []
    for block in re.findall(r"```bash\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "lightning-sft"
            command = [sys.executable, "-m", "lightning_sft", *arguments]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
            printed.append(done.stdout)
    return folder / "runs", printed


def measured(runs, name: str) -> tuple[dict, dict]:
    found = json.loads((runs[0] / name / "before_after.json").read_text())
    return found["before"], found["after"]


def gated(scores: dict) -> float:
    held_out = [json.loads(line) for line in (ROOT / "lightning_sft/assets/data/held_out.jsonl").open()]
    sizes = {task: sum(row["task"] == task for row in held_out) for task in GATED}
    right = sum(scores["exact_match_by_task"][task] * size for task, size in sizes.items())
    return right / sum(sizes.values())


@pytest.mark.slow
class TestQuickstart:
    def test_the_skills_are_learned_and_were_not_there_before(self, runs):
        before, after = measured(runs, "quickstart-1")
        assert before["exact_match"] <= 0.05
        assert gated(after) >= 0.9

    def test_the_facts_are_kept(self, runs):
        before, after = measured(runs, "quickstart-1")
        assert before["accuracy"] >= 0.7
        assert after["accuracy"] >= 0.85 * before["accuracy"]

    def test_a_far_too_high_rate_destroys_them(self, runs):
        before, after = measured(runs, "forgetting_demo-1")
        assert after["accuracy"] <= before["accuracy"] * 2 / 3

    def test_the_terminal_shows_before_and_after_samples_and_where_everything_is(self, runs):
        printed = runs[1][0]
        for part in ("validation loss", "general text loss", "facts", "exact match", "before", "after"):
            assert part in printed
        assert printed.count("  base   ") == printed.count("  tuned  ") == 3
        assert "tiny:replay: 100 rows as" in printed
        assert "runs/quickstart-1" in printed
