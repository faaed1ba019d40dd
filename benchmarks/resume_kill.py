"""Kills a run at random moments until it is done, and compares it with one that was never killed.

    python benchmarks/resume_kill.py --kills 30
    python benchmarks/resume_kill.py --kills 30 --adapter Full --processes 2

Both are `lightning-sft fit` on the embedded tiny base and its instructions, mid-epoch, with accumulation, loader
workers and, for LoRA, dropout. A kill is SIGKILL to all its processes, at a random moment from the first new step on:
in a step, a validation, the writing of a checkpoint. Then the same command goes on with `--ckpt_path last`. Prints what
differs as JSON, and exits with 1 if anything does, or if a run began anew where there was a checkpoint.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONTINUED = re.compile(r"Continuing \S+ after step (\d+) ")
STEP = re.compile(r"^step (\d+)/", re.MULTILINE)
HOURS = 6 * 3600


def main() -> int:
    """Run the benchmark as the command line says; 0 if nothing differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=30, help="how many")
    parser.add_argument("--adapter", default="LoRA", help="LoRA (with dropout) or Full")
    parser.add_argument("--processes", type=int, default=1, help="ranks, as DDP on the CPU")
    parser.add_argument("--workers", type=int, default=2, help="loader processes of each rank")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches of an optimizer step")
    parser.add_argument("--epochs", type=int, default=None, help="by default enough for the kills")
    parser.add_argument("--rows", type=int, default=96, help="training rows; 8 are a micro-batch")
    parser.add_argument("--every", type=int, default=2, help="optimizer steps between checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--set", nargs="*", default=[], help="more options of fit, as key=value")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = Benchmark(Path(folder), given).run()
    print(json.dumps(report, indent=2))
    return 0 if report["exact"] else 1


class Benchmark:
    """One comparison.

    Args:
        folder: Where the runs go.
        given: The command line.
    """

    def __init__(self, folder: Path, given: argparse.Namespace) -> None:
        self.folder, self.given = folder, given
        self.random = random.Random(given.seed)
        self.run_folder = folder / "runs" / "kill-1"
        per_epoch = -(-given.rows // (8 * given.accumulate * given.processes))
        epochs = given.epochs or max(
            2, -(-(given.kills + 2) * (given.every + 2) // per_epoch)
        )  # about 2 steps a kill
        adapter: object = given.adapter
        if adapter == "LoRA":
            adapter = {"class_path": "LoRA", "init_args": {"r": 4, "dropout": 0.1}}
        config = {
            "model": {"base": "tiny", "adapter": adapter, "learning_rate": 1e-3},
            "data": {
                "train": [{"path": "tiny:train", "format": "Alpaca", "limit": given.rows}],
                "val": [{"path": "tiny:held_out", "format": "Alpaca", "limit": 16}],
                "batch_size": 8,
                "num_workers": given.workers,
            },
            "checkpoints": {"every_n_steps": given.every},
            "trainer": {
                "accelerator": "cpu",
                "devices": given.processes,
                "strategy": "ddp" if given.processes > 1 else "auto",
                "max_epochs": epochs,
                "accumulate_grad_batches": given.accumulate,
                "log_every_n_steps": 1,
            },
        }
        (folder / "kill.yaml").write_text(json.dumps(config))
        self.options = [f"--{option}" for option in given.set]
        self.processes: list[_Run] = []
        self.resumed: list[int] = []
        self.anew = 0
        self.moments: list[int] = []

    def run(self) -> dict[str, object]:
        """Both runs, and what differs."""
        try:
            return self._compare()
        finally:
            for process in self.processes:
                process.kill()

    def _compare(self) -> dict[str, object]:
        began = time.monotonic()
        self._fit("--trainer.default_root_dir", "whole").check()
        alone = time.monotonic() - began
        kills = 0
        while kills < self.given.kills and not (self.run_folder / "model").exists():
            process = self._continue()
            if process.kill_after_a_step(self.random):
                kills += 1
                self.moments.append(process.last_step)
            else:
                process.check()
        if not (self.run_folder / "model").exists():
            self._continue().check()
        before, after = _losses(self.folder / "whole"), _losses(self.run_folder)
        differing = [step for step in before if before[step] != after.get(step)]
        weights = _same_files(self.folder / "whole" / "model", self.run_folder / "model")
        return {
            "adapter": self.given.adapter,
            "processes": self.given.processes,
            "kills": kills,
            "steps": len(before),
            "killed after step": self.moments,
            "resumed after step": self.resumed,
            "fresh starts in spite of a checkpoint": self.anew,
            "differing losses": len(differing),
            "first that differs": min(differing, default=None),
            "final weights identical": weights,
            "seconds": {"uninterrupted": round(alone), "all": round(time.monotonic() - began)},
            "exact": not differing and len(after) == len(before) and weights and not self.anew,
        }

    def _continue(self) -> _Run:
        last = self.run_folder / "checkpoints" / "last.ckpt"
        there = last.is_file()
        if not there and self.run_folder.exists():
            shutil.rmtree(self.run_folder)  # killed before its first checkpoint
        process = self._fit(*(["--ckpt_path", "last"] if there else []))
        if there:
            process.read_until(CONTINUED)
            found = CONTINUED.search(process.printed)
            if found is None or int(found.group(1)) == 0:
                self.anew += 1
            else:
                self.resumed.append(int(found.group(1)))
        return process

    def _fit(self, *arguments: str) -> _Run:
        self.processes.append(_Run([*self.options, *arguments], self.folder))
        return self.processes[-1]


class _Run:
    """A process that trains, and the others that it starts."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        number = len(list(folder.glob("output-*")))
        self.output = folder / f"output-{number}"
        with self.output.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lightning_sft", "fit", "--config", "kill.yaml", *arguments],
                cwd=folder,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,
            )

    @property
    def printed(self) -> str:
        return self.output.read_text(errors="replace")

    @property
    def last_step(self) -> int:
        return max(map(int, STEP.findall(self.printed)), default=0)

    def read_until(self, pattern: re.Pattern[str]) -> bool:
        """Wait until it prints this; False if it ends first."""
        while pattern.search(self.printed) is None:
            if self.process.poll() is not None:
                return pattern.search(self.printed) is not None
            time.sleep(0.01)
        return True

    def kill_after_a_step(self, moments: random.Random) -> bool:
        """Kill it within a few steps of its first; False if it ends before."""
        self.read_until(STEP)
        began, first = time.monotonic(), self.last_step
        # some steps' time from now on, of which the first tells how long they take
        steps = moments.uniform(0, 4)
        while self.process.poll() is None and self.last_step == first and time.monotonic() - began < 1:
            time.sleep(0.002)
        each = time.monotonic() - began
        left = (steps - 1) * each
        if left > 0:
            time.sleep(min(left, 10))
        if self.process.poll() is not None:
            return False
        self.kill()
        return True

    def kill(self) -> None:
        """Kill it and the processes that it has started, if it still runs."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def check(self) -> None:
        """Wait for its end, which must be a good one."""
        if self.process.wait(HOURS) != 0:
            raise RuntimeError(f"the run failed:\n{self.printed[-4000:]}")


def _losses(run: Path) -> dict[int, str]:
    with (run / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    losses = {int(row["step"]): row["train/loss"] for row in rows}
    if len(losses) != len(rows):
        raise RuntimeError(f"a step is in {run}/metrics.csv twice")
    return losses


def _same_files(a: Path, b: Path) -> bool:
    names = {path.name for path in a.glob("*.safetensors")}
    same = names == {path.name for path in b.glob("*.safetensors")}
    return bool(names) and same and all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


if __name__ == "__main__":
    sys.exit(main())
