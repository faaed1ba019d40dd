"""Memory that a step has freed is there for the next one, without being zeroed again."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, torch
from lightning_sft.training.host_memory import keep_freed_memory
told = keep_freed_memory() if sys.argv[1] == "keep" else True
def step():
    a = torch.ones(64 << 18)
    b = a + 1
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(int(told), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_freed_blocks_are_kept():
    faults = {}
    for mode in ("keep", "leave"):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, mode], capture_output=True, text=True, check=True
        )
        told, faults[mode] = map(int, done.stdout.split())
        assert told
    assert faults["keep"] < faults["leave"] / 10
