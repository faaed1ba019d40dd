"""SIGKILL: a run that is killed and continued is the run that was never killed, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from resume_run import losses, metrics, same_weights, write_config

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "resume_kill.py"
MINUTES = 20 * 60


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--adapter", "LoRA", "--workers", "2"],
        ["--adapter", "Full", "--workers", "0"],
        ["--adapter", "LoRA", "--workers", "0", "--processes", "2"],
    ],
    ids=["LoRA with dropout and workers", "Full", "two processes"],
)
def test_killed_runs_go_on_exactly(options, tmp_path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--kills", "3", "--every", "1", "--epochs", "4", *options],
        cwd=tmp_path, capture_output=True, text=True, timeout=MINUTES, check=False,
    )  # fmt: skip
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    assert report["exact"], report
    assert done.returncode == 0
    assert report["kills"] == 3
    assert report["resumed after step"]
    assert all(0 < step < report["steps"] for step in report["resumed after step"])


@pytest.mark.slow
def test_a_kill_during_the_writing_leaves_the_last_good_checkpoint(tmp_path, model_folder) -> None:
    config = write_config(tmp_path, model_folder("llama"))
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    for variable in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "LIGHTNING_SFT_RUN_FOLDER"):
        environment.pop(variable, None)
    # Preflight would write a checkpoint of its own.
    command = [
        sys.executable,
        "-m",
        "lightning_sft",
        "fit",
        "--config",
        str(config),
        "--model.preflight",
        "false",
    ]
    run = tmp_path / "runs" / "my-1"
    with subprocess.Popen(
        command, cwd=tmp_path, env={**environment, "LIGHTNING_SFT_TEST_SLOW_WRITING": "4"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        partial, until = run / "checkpoints" / "last.ckpt.partial", time.monotonic() + MINUTES
        while not (tmp_path / "half-written").exists():
            assert process.poll() is None, process.stdout and process.stdout.read()
            assert time.monotonic() < until
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert partial.stat().st_size > 0
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3
    for arguments in (["--ckpt_path", "last"], ["--trainer.default_root_dir", "whole"]):
        done = subprocess.run(
            [*command, *arguments], cwd=tmp_path, env=environment,
            capture_output=True, text=True, timeout=MINUTES, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert ("after step 3 " in done.stdout) == ("last" in arguments)
    assert not partial.exists()
    assert metrics(run) == metrics(tmp_path / "whole")
    assert list(losses(run)) == list(range(10))
    assert same_weights(run, tmp_path / "whole")
