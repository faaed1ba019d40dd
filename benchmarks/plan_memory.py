"""How far the memory that `lightning-sft plan` tells is from what training takes: peak resident memory on CPU.

Every case is trained for a few steps in a process of its own and planned in another. `python
benchmarks/plan_memory.py --sizes 5m,30m,100m` prints both, with and without what the process has before training.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import workload

SIZES = {
    "5m": {"vocab_size": 4096, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 8,
           "num_attention_heads": 6, "num_key_value_heads": 2},
    "30m": {"vocab_size": 16000, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 10,
            "num_attention_heads": 6, "num_key_value_heads": 6},
    "100m": {"vocab_size": 32000, "hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 12,
             "num_attention_heads": 10, "num_key_value_heads": 10},
}  # fmt: skip


def main() -> None:
    """Measure and plan every case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="5m,30m,100m")
    parser.add_argument("--adapters", default="Full,LoRA,QLoRA")
    parser.add_argument("--precisions", default="32-true,bf16-mixed")
    parser.add_argument("--checkpointing", default="false,true")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--one", choices=["train", "plan"], help=argparse.SUPPRESS)
    given, options = parser.parse_known_args()
    if given.one:
        print("FIGURES " + json.dumps(train(options) if given.one == "train" else plan(options)))
        return
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for size in given.sizes.split(","):
            base = Path(folder) / size
            rows = workload.made_up(64)
            workload.make_model(base / "model", rows, None, SIZES[size])
            (base / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            cases = product(
                *(getattr(given, key).split(",") for key in ("adapters", "precisions", "checkpointing"))
            )
            for adapter, precision, again in cases:
                options = [
                    f"--model.base={base / 'model'}", f"--data.train={base / 'rows.jsonl'}",
                    f"--model.adapter={adapter}", f"--model.gradient_checkpointing={again}",
                    "--data.overlong=truncate_right", "--data.max_lost_fraction=1",
                    f"--data.batch_size={given.batch_size}", f"--trainer.precision={precision}",
                    f"--trainer.max_steps={given.steps}", "--trainer.accelerator=cpu",
                    f"--trainer.default_root_dir={base}/{adapter}-{precision}-{again}",
                ]  # fmt: skip
                case = {"size": size, "adapter": adapter, "precision": precision, "checkpointing": again}
                found.append(case | _run("train", options) | _run("plan", options))
                _tell(found[-1])
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


def train(options: list[str]) -> dict[str, float]:
    """Fit; the peak of the resident memory, and what it was before the model was loaded."""
    from lightning_sft.cli import run
    from lightning_sft.training.module import SFTModule

    start = []
    load = SFTModule.configure_model

    def watched(module: SFTModule) -> None:
        if module.model is None:
            start.append(_resident("VmRSS"))
            Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
        load(module)

    SFTModule.configure_model = watched
    run(["fit", *options, "--trainer.logger=false", "--trainer.enable_progress_bar=false"])
    return {"before": start[0], "measured": _resident("VmHWM")}


def plan(options: list[str]) -> dict[str, float]:
    """What the plan tells of the same options."""
    from lightning_sft.planning.command import made

    (estimate, *_) = made(options).estimates
    return {"planned": estimate.total / 2**20, "framework": estimate.parts["framework"] / 2**20}


def _run(what: str, options: list[str]) -> dict[str, float]:
    from lightning_sft.allocator import environment as as_commands_have_it

    environment = {"OMP_NUM_THREADS": "1", **as_commands_have_it(os.environ)}
    done = subprocess.run(
        [sys.executable, __file__, "--one", what, *options], capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("FIGURES "))
    figures: dict[str, float] = json.loads(line.removeprefix("FIGURES "))
    return figures


def _resident(field: str) -> float:
    """Resident memory in MiB, now (`VmRSS`) or at most (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def _tell(case: dict[str, float]) -> None:
    above, planned = case["measured"] - case["before"], case["planned"] - case["framework"]
    print(
        f"{case['size']:>5} {case['adapter']:<5} {case['precision']:<10} checkpointing {case['checkpointing']:<5}  "
        f"measured {case['measured']:7.0f} MiB, planned {case['planned']:7.0f} "
        f"({case['planned'] / case['measured'] - 1:+.1%}); training alone {above:7.0f}, planned {planned:7.0f} "
        f"({planned / above - 1:+.1%})",
        flush=True,
    )


if __name__ == "__main__":
    main()
