"""SIGKILL of a run that stops by its retention: measurements, Pareto archive and model are those of an unkilled run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from resume_run import KILL, write_config

TRAINING = Path(__file__).parents[1] / "training"
TEXTS = [
    "hello there, how are you?",
    "the assistant answers",
    "the user asks and asks and asks the user: " * 9,
]
QUESTION = {"question": "who asks?", "choices": ["the user", "the assistant", "hello"], "answer": 0}


def left(run: Path) -> dict[str, object]:
    """All that may not depend on kills, without clocks."""
    measured = json.loads((run / "forgetting.json").read_text())
    for clock in ("seconds", "share_of_time"):
        del measured[clock]
    saved = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["callbacks"]["RetentionStopping"]
    pareto = {
        path.name: {
            name: tensor.tolist()
            for name, tensor in torch.load(path, weights_only=True)["state_dict"].items()
        }
        for path in sorted((run / "pareto").iterdir())
    }
    model = {name: tensor.tolist() for name, tensor in load_file(run / "model/model.safetensors").items()}
    archive = [{**each, "file": Path(each["file"]).name} for each in saved.pop("archive")]
    return {"measured": measured, "stopping": saved, "archive": archive, "pareto": pareto, "model": model}


@pytest.mark.slow
def test_whenever_it_is_killed_it_ends_as_if_it_had_not_been(tmp_path, model_folder) -> None:
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "asked.jsonl").write_text(json.dumps(QUESTION))
    domains = [
        {"name": "text", "text": str(tmp_path / "texts.jsonl")},
        {"name": "facts", "questions": str(tmp_path / "asked.jsonl")},
    ]
    callbacks = [
        {"class_path": "RetentionStopping", "init_args": {"min_retention": 0.9, "patience": 2}},
        {"class_path": "ForgettingProbe", "init_args": {"domains": domains, "every_n_steps": 2}},
        {"class_path": "resume_run.Kill"},
    ]
    config = write_config(
        tmp_path, model_folder("llama"), model={"adapter": "Full", "learning_rate": 0.01, "preflight": False},
        trainer={"callbacks": callbacks, "gradient_clip_val": 1.0, "max_epochs": 4},
    )  # fmt: skip
    path = os.pathsep.join([str(TRAINING), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}

    def fit(run: str, kill: str = "") -> int:
        command = [sys.executable, "-m", "lightning_sft", "fit", "--config", str(config)]
        command += ["--trainer.default_root_dir", run, "--ckpt_path", "auto"]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env={**environment, KILL: kill},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode in (0, -signal.SIGKILL), done.stdout + done.stderr
        return done.returncode

    assert fit("whole") == 0
    whole = left(tmp_path / "whole")
    steps = [record["step"] for record in whole["measured"]["history"]]
    last, kept = max(steps), [each["step"] for each in whole["archive"]]
    assert steps[-1] < steps[-2] == last, "the last record is of the weights that were restored"
    assert last < 20, "it didn't stop by itself"
    assert len(kept) > 1, "nothing was archived on the way"
    assert not torch.equal(
        torch.load(tmp_path / "whole/checkpoints/last.ckpt", weights_only=True)["state_dict"][
            "model.model.norm.weight"
        ],
        load_file(tmp_path / "whole/model/model.safetensors")["model.norm.weight"],
    ), "nothing was restored"
    for place in (
        "archiving:0", f"measuring:{kept[1]}", f"archiving:{kept[1]}", f"measured:{kept[1]}", f"measuring:{last}",
        f"measured:{last}", f"restoring:{last}",
    ):  # fmt: skip
        assert fit("killed", place) == -signal.SIGKILL, f"not killed at {place}"
    assert fit("killed") == 0
    assert left(tmp_path / "killed") == whole
