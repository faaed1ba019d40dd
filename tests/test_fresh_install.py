"""A stranger's first minutes: the wheel in a fresh environment, far from the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lightning_sft import __version__

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path) -> str:
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=clean, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT, cwd=folder)
    (built,) = folder.glob("lightning_sft-*.whl")
    return built


@pytest.fixture(scope="module")
def fresh(wheel, tmp_path_factory) -> Path:
    """The bin folder of a new virtual environment with the wheel in it."""
    folder = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel, cwd=folder)
    return python.parent


def test_the_wheel_holds_each_file_once_and_what_is_no_code_too(wheel):
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    assert len(names) == len(set(names))
    assert {name.split("/")[0] for name in names} == {
        "lightning_sft",
        *(path.name for path in (ROOT / "plugins").iterdir() if path.is_dir()),
    }
    everything = (ROOT / "lightning_sft").rglob("*")
    shipped = [path for path in everything if path.is_file() and "__pycache__" not in path.parts]
    assert {str(path.relative_to(ROOT)) for path in shipped} <= set(names)


def test_the_command_answers(fresh, tmp_path):
    assert run(fresh / "lightning-sft", "--version", cwd=tmp_path).strip() == f"lightning-sft {__version__}"
    listed = json.loads(run(fresh / "lightning-sft", "plugins", "--json", cwd=tmp_path))
    assert {"LoRA", "Full", "Alpaca", "CrossEntropy"} <= {plugin["name"] for plugin in listed}
    assert {plugin["state"] for plugin in listed} == {"ok"}


def test_it_fine_tunes_and_answers(fresh, tmp_path, model_folder):
    rows = [{"instruction": f"say {n}", "input": "", "output": f"{n} {n}"} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = ["--model.base", model_folder("llama"), "--model.adapter", "LoRA"]
    trainer = ["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"]
    run(fresh / "lightning-sft", "fit", *model, "--data.train", "rows.jsonl", *trainer, cwd=tmp_path)
    run(
        fresh / "lightning-sft",
        "generate",
        "runs/run-1",
        "--prompt",
        "say 3",
        "--max_new_tokens",
        "5",
        cwd=tmp_path,
    )
