"""What `plan` tells of memory, against the peak of the resident memory of the run itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "plan_memory.py"
CASES = [  # with checkpointing in the last column
    ("5m", "LoRA", "32-true", "8", "true"),
    ("30m", "QLoRA", "bf16-mixed", "8", "true"),
    ("100m", "Full", "bf16-mixed", "4", "true"),
]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
@pytest.mark.parametrize(("size", "adapter", "precision", "batch", "again"), CASES, ids=lambda value: value)
def test_planned_memory_is_near_the_measured_peak(size, adapter, precision, batch, again, tmp_path):
    out = tmp_path / "found.json"
    options = ["--sizes", size, "--adapters", adapter, "--precisions", precision, "--batch-size", batch]
    command = [sys.executable, str(BENCHMARK), *options, "--checkpointing", again, "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True, timeout=60 * 60)
    (found,) = json.loads(out.read_text())
    assert found["planned"] == pytest.approx(found["measured"], rel=0.15)
