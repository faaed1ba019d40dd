"""Sweeps through the command, with real trials: killed, failing, stopped early, and over two processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import yaml

from lightning_sft import run_folder

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent


def config(folder: Path, *, callbacks: tuple[str, ...] = (), **trainer: object) -> None:
    """`my.yaml` in the folder: 8 rows in batches of 4, two epochs."""
    probe = {"every_n_steps": 2, "domains": [{"name": "a", "text": "tiny:general", "limit": 4}]}
    content = {
        "model": {"base": "tiny", "adapter": "LoRA", "preflight": False},
        "data": {
            "train": [{"path": "tiny:train", "format": "Alpaca", "limit": 8}], "batch_size": 4,
            "val": [{"path": "tiny:held_out", "format": "Alpaca", "limit": 4}],
        },
        "checkpoints": {"every_n_steps": 1},
        "trainer": {
            "accelerator": "cpu", "max_epochs": 2, **trainer,
            "callbacks": [
                *({"class_path": f"sweep_callbacks.{name}"} for name in callbacks),
                {"class_path": "ForgettingProbe", "init_args": probe},
            ],
        },
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "my.yaml").write_text(json.dumps(content))


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """`lightning-sft sweep --config my.yaml` in the folder."""
    command = [sys.executable, "-m", "lightning_sft", "sweep", "--config", "my.yaml", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip


def finish(folder: Path, *arguments: str, status: int = 0) -> str:
    process = start(folder, *arguments)
    out, _ = process.communicate()
    assert process.returncode == status, out
    return out


def trials(folder: Path) -> list[dict]:
    return json.loads((folder / "sweeps/my/results.json").read_text())["trials"]


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 300
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.02)


SEARCH = ("--search", "model.learning_rate=log_uniform(1e-4,1e-1)", "--search", "model.adapter.r=choice(4,8)")


ARGUMENTS = (*SEARCH, "--trials", "3", "--metric", "forgetting/retention", "--mode", "max")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A sweep that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    config(folder, callbacks=("Slow",))
    finish(folder, *ARGUMENTS)
    return folder


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_a_sweep_that_ends_inside_a_trial_goes_on_inside_it(ending, whole, tmp_path):
    ended = tmp_path / "ended"
    config(ended, callbacks=("Slow",))
    process = start(ended, *ARGUMENTS)
    trial = ended / "sweeps/my/trials/001"
    wait_for(trial / "checkpoints/last.ckpt", process)
    process.send_signal(ending)
    process.wait()
    assert process.returncode == (-9 if ending == signal.SIGKILL else 130)
    if ending == signal.SIGINT:
        assert "same command goes on" in process.communicate()[0]
    until = time.monotonic() + 20
    while not run_folder.lock(trial):  # its process ends with the sweep
        assert time.monotonic() < until
        time.sleep(0.05)
    run_folder.unlock(trial)
    assert not (trial / "model").exists()
    out = finish(ended, *ARGUMENTS)
    assert "Continuing sweeps/my after 1 trials" in out
    assert "Continuing sweeps/my/trials/001 after step" in (trial.parent / "001.log").read_text()
    assert trials(ended) == trials(whole)
    assert {each["state"] for each in trials(ended)} == {"complete"}
    weights = [folder / "sweeps/my/trials/001/model/adapter_model.safetensors" for folder in (ended, whole)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    again = finish(ended, *ARGUMENTS)  # there is nothing left to do
    assert "trial 2 (3 of 3)" not in again
    assert trials(ended) == trials(whole)


def test_trials_that_fail_do_not_end_the_sweep_and_the_best_can_be_fitted(tmp_path):
    config(tmp_path, callbacks=("Mine",))
    rates = ("--search", "model.learning_rate=choice(0.001,0.002,0.003,0.004)", "--sampler", "grid")
    out = finish(tmp_path, *rates)
    found = trials(tmp_path)
    assert [each["state"] for each in found] == ["complete", "failed", "failed", "complete"]
    assert "killed (SIGKILL): the machine may have run out of memory" in found[1]["error"]
    assert "the rate is cursed" in found[2]["error"]
    assert "best.yaml" in out
    best = min((each for each in found if each["value"] is not None), key=lambda each: each["value"])
    run = [sys.executable, "-m", "lightning_sft", "fit", "--config", "sweeps/my/best.yaml"]
    subprocess.run(
        run, cwd=tmp_path, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(HERE)}
    )
    again = yaml.safe_load((tmp_path / "runs/best-1/config.yaml").read_text())
    assert again["model"]["learning_rate"] == best["parameters"]["model.learning_rate"]
    models = [
        tmp_path / folder / "model/adapter_model.safetensors" for folder in ("runs/best-1", best["folder"])
    ]
    assert models[0].read_bytes() == models[1].read_bytes()
    assert "holds another sweep" in finish(tmp_path, *SEARCH, status=2)


def test_a_wrong_metric_is_told_after_one_trial(tmp_path):
    config(tmp_path)
    out = finish(tmp_path, *SEARCH, "--metric", "retention", status=2)
    assert "has logged no retention" in out
    assert "forgetting/retention" in out
    assert len(trials(tmp_path)) == 1


def test_trials_over_two_processes_are_those_of_one(tmp_path):
    values = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        config(folder, **({"devices": 2, "strategy": "ddp"} if ranks == 2 else {}))
        size = f"--data.batch_size={4 // ranks}"
        finish(folder, *SEARCH, "--trials", "2", "--metric", "forgetting/retention", "--mode=max", size)
        values.append([each["value"] for each in trials(folder)])
    assert values[1] == pytest.approx(values[0], abs=1e-5)
