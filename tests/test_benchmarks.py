"""The speed benchmark runs, on the sides that need no peer, and counts what it says it counts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
def test_the_sides_train_the_same_tokens_and_the_report_has_their_ratios(tmp_path):
    out = tmp_path / "report.json"
    sides = ["lightning_sft", "engine", "flattened", "padded"]
    options = ["--tiny", "--steps", "3", "--warmup", "1", "--rounds", "1", "--batch-size", "4"]
    subprocess.run(
        [sys.executable, str(BENCHMARKS / "train_speed.py"), *options, "--sides", ",".join(sides), "--out", str(out)],
        check=True, capture_output=True,
    )  # fmt: skip
    report = json.loads(out.read_text())
    assert list(report["sides"]) == sides
    assert list(report["lightning_sft relative to"]) == sides[1:]
    tokens = {
        side: values["tokens_per_cpu_second"] * values["milliseconds_per_step"]
        for side, values in report["sides"].items()
    }
    assert tokens == pytest.approx(dict.fromkeys(sides, tokens["lightning_sft"]), rel=1e-6)


def test_made_up_rows_are_always_the_same(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import workload

    assert workload.made_up(5) == workload.made_up(5)
    assert workload.made_up(5) != workload.made_up(5, seed=1)


@pytest.mark.slow
def test_the_matrix_for_gpus_trains_what_goes_and_tells_why_the_rest_does_not(tmp_path):
    """On a CPU, with a tiny model: what a GPU would add is the measured memory."""
    out = tmp_path / "matrix.json"
    options = [
        "--models",
        "tiny",
        "--adapters",
        "QLoRA",
        "--precisions",
        "bf16-true,64-mixed",
        "--steps",
        "2",
    ]
    options += ["--strategies", "auto", "--device", "cpu", "--out", str(out)]
    command = [sys.executable, str(BENCHMARKS / "gpu_matrix.py"), *options]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    trained, refused = json.loads(out.read_text())
    assert trained["planned"] > 100
    assert trained["loss"] > 0
    assert "refused" in refused
    assert f"refused: {refused['refused']}" in shown
