"""What it takes from the shell to a first step: `lightning-sft fit` and `trl sft`, each with a run of one step.

    python benchmarks/start_up.py --data alpaca.json --rounds 3

The embedded model and the rows given, prepared anew each time; so nearly all of it is imports, options, data and, for
lightning-sft, preflight. Seconds are CPU seconds of the command and of every process that it starts, with one thread,
to its end: the step and the written model are a small part, and the same for both.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import workload


def main() -> None:
    """Let the commands take turns; print each, and the ratios as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", help="a JSON or JSONL file of Alpaca rows; made up if left out")
    parser.add_argument("--rounds", type=int, default=3, help="how often each command is run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        commands = make(folder, workload.read(options.data))
        found: dict[str, list[dict[str, float]]] = {side: [] for side in commands}
        for number in range(options.rounds):
            for side in commands if number % 2 == 0 else reversed(commands):
                found[side].append(run(commands[side], folder))
                print(f"round {number + 1}  {side:14} {found[side][-1]}", flush=True)
    ours, trl = found.values()
    report = {
        "medians": {
            side: {key: round(median(run[key] for run in runs), 1) for key in runs[0]}
            for side, runs in found.items()
        },
        "lightning-sft relative to trl": {
            key: round(median(a[key] / b[key] for a, b in zip(ours, trl, strict=True)), 2) for key in ours[0]
        },
    }
    print(json.dumps(report))


def make(folder: Path, rows: list[dict[str, str]]) -> dict[str, list[str]]:
    """Write the rows for both; returns the commands."""
    from lightning_sft import assets

    (folder / "rows").mkdir()
    with (folder / "rows" / "train.jsonl").open("w") as file:
        for row in rows:
            asked = "\n".join(filter(None, (row["instruction"], row.get("input"))))
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]
            file.write(json.dumps({"messages": turns}) + "\n")
    scripts = Path(sys.executable).parent
    return {
        "lightning-sft": [
            str(scripts / "lightning-sft"), "fit", "--model.base", "tiny", "--data.train", f"{folder}/rows/train.jsonl",
            "--data.batch_size", "8", "--data.max_lost_fraction", "1", "--trainer.max_steps", "1",
            "--trainer.accelerator", "cpu", "--trainer.default_root_dir", f"{folder}/out",
        ],
        "trl": [
            str(scripts / "trl"), "sft", "--model_name_or_path", assets.model_path("tiny"),
            "--dataset_name", f"{folder}/rows", "--output_dir", f"{folder}/out", "--max_steps", "1",
            "--per_device_train_batch_size", "8", "--report_to", "none", "--use_cpu", "--bf16", "false",
            "--gradient_checkpointing", "false",
        ],
    }  # fmt: skip


def run(command: list[str], folder: Path) -> dict[str, float]:
    """CPU seconds of the command with its children, and seconds on the clock."""
    env = {
        **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        "RAYON_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_DATASETS_CACHE": str(folder / "cache"),
        "XDG_CACHE_HOME": str(folder / "cache"),
    }  # fmt: skip
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    for left in ("out", "cache"):
        shutil.rmtree(folder / left, ignore_errors=True)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"CPU seconds": cpu, "seconds": wall}


if __name__ == "__main__":
    main()
