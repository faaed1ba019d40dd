"""What every side of a benchmark measures itself with."""

from __future__ import annotations

import json
import os
import resource
import time
from itertools import pairwise

from workload import Workload


class Clock:
    """Marks where steps begin, and counts their tokens."""

    def __init__(self, work: Workload) -> None:
        self.work = work
        self.marks: list[float] = []
        self.tokens: list[int] = []
        self.resident = 0.0

    def step(self, tokens: int) -> None:
        """A step with so many real tokens begins."""
        if not self.marks:
            self.resident = _resident()
        self.marks.append(_now())
        self.tokens.append(tokens)

    def end(self) -> None:
        """The last step is over; print the figures."""
        self.marks.append(_now())
        first = self.work.warmup
        seconds = [b - a for a, b in pairwise(self.marks)][first:]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        figures: dict[str, float] = {
            "tokens": sum(self.tokens[first:]),
            "seconds": sum(seconds),
            "steps": len(seconds),
            "startup": self.marks[0],
            "peak_mb": peak,
            "above_start_mb": peak - self.resident,
        }
        print("FIGURES " + json.dumps(figures), flush=True)


def _now() -> float:
    return time.process_time()


def _resident() -> float:
    """Resident memory in MB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
