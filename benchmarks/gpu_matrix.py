"""Every strategy and precision on one CUDA GPU through the command, with peak memory beside what `plan` tells.

    python benchmarks/gpu_matrix.py --models 1b --out matrix.json
    python benchmarks/gpu_matrix.py --models 8b --adapters QLoRA --precisions bf16-true --checkpointing true

Llama-shaped models with random weights and made-up rows; each case is trained for a few steps in a process of its own
and planned in another. A combination that is refused is shown with the reason. Peak memory is what torch has reserved
and CUDA's own (the driver's figure), so it compares with the plan's sum. Prints a table in Markdown.
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
from typing import Any

import workload

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 4096},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128_256},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128_256},
}  # fmt: skip
"""Llama 3's; `tiny` is for trying the script."""


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The command line; what it doesn't know are options of `fit`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="1b", help=", ".join(SHAPES))
    parser.add_argument("--adapters", default="Full,LoRA,QLoRA")
    parser.add_argument("--precisions", default="32-true,bf16-mixed,bf16-true,16-mixed")
    parser.add_argument("--strategies", default="auto,ddp,fsdp2")
    parser.add_argument("--checkpointing", default="true")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--one", choices=["train", "plan"], help=argparse.SUPPRESS)
    return parser.parse_known_args(arguments)


def make_model(folder: Path, shape: dict[str, int], device: str) -> None:
    """A model of this shape with random bfloat16 weights, and a tokenizer, made on the device and saved in shards."""
    import torch
    import transformers

    rows = workload.made_up(64)
    workload.make_model(folder, rows, None, SHAPES["tiny"])  # for its tokenizer
    (folder / "model.safetensors").unlink()
    config = transformers.LlamaConfig(**shape, max_position_embeddings=8192, tie_word_embeddings=False)
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def train(options: list[str], device: str) -> dict[str, Any]:
    """Fit; seconds of training, the last loss, and the most memory in MiB."""
    import time

    import torch
    from lightning.pytorch import Callback

    from lightning_sft.cli import run

    class Watch(Callback):
        begun = seconds = loss = 0.0

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.begun = time.perf_counter()

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self.seconds = time.perf_counter() - self.begun
            self.loss = float(trainer.callback_metrics["train/loss"])

    watch, memory = Watch(), None
    run(["fit", *options, "--trainer.logger=false", "--trainer.enable_progress_bar=false"], [watch])
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        now = total - free - torch.cuda.memory_reserved()  # CUDA's context, kernels and workspaces
        memory = (torch.cuda.max_memory_reserved() + now) / 2**20
    return {"measured": memory, "seconds": watch.seconds, "loss": watch.loss}


def plan(options: list[str]) -> dict[str, float]:
    """What the plan tells of the same options on this machine."""
    from lightning_sft.planning.command import made

    here, *_ = made(options).estimates
    return {"planned": here.total / 2**20}


def main() -> None:
    """Try every case."""
    given, options = parse()
    if given.one:
        print(
            "FIGURES " + json.dumps(train(options, given.device) if given.one == "train" else plan(options))
        )
        return
    import torch

    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here; benchmarks/plan_memory.py measures on a CPU")
    device = torch.cuda.get_device_name() if given.device == "cuda" else "CPU"
    print(f"{device}, torch {torch.__version__}, batches of {given.batch_size}, {given.steps} steps\n")
    print(
        "| model | adapter | precision | strategy | checkpointing | measured MiB | planned | | seconds | loss |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        for name in given.models.split(","):
            base = Path(folder) / name
            make_model(base, SHAPES[name], given.device)
            rows = Path(folder) / f"{name}.jsonl"
            rows.write_text("".join(json.dumps(row) + "\n" for row in workload.made_up(64)))
            keys = ("adapters", "precisions", "strategies", "checkpointing")
            for adapter, precision, strategy, again in product(
                *(getattr(given, key).split(",") for key in keys)
            ):
                case = {"model": name, "adapter": adapter, "precision": precision, "strategy": strategy}
                shared = [
                    f"--model.base={base}", f"--data.train={rows}", f"--model.adapter={adapter}",
                    f"--model.gradient_checkpointing={again}", f"--data.batch_size={given.batch_size}",
                    f"--trainer.precision={precision}", f"--trainer.strategy={strategy}", "--trainer.devices=1",
                    f"--trainer.max_steps={given.steps}", "--trainer.log_every_n_steps=1",
                    "--trainer.accelerator=" + ("gpu" if given.device == "cuda" else "cpu"),
                    f"--trainer.default_root_dir={folder}/run-{len(cases)}", *options,
                ]  # fmt: skip
                case |= {"checkpointing": again} | _run("train", shared, given.device)
                if "refused" not in case:
                    case |= _run("plan", shared, given.device)
                cases.append(case)
                print(_line(case), flush=True)
    if given.out is not None:
        given.out.write_text(json.dumps(cases, indent=1) + "\n")


def _run(what: str, options: list[str], device: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, "--one", what, "--device", device, *options],
        capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("FIGURES ")]
    if lines:
        figures: dict[str, Any] = json.loads(lines[-1].removeprefix("FIGURES "))
        return figures
    return {"refused": (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]}


def _line(case: dict[str, Any]) -> str:
    names = " | ".join(case[key] for key in ("model", "adapter", "precision", "strategy", "checkpointing"))
    if "refused" in case:
        return f"| {names} | refused: {case['refused']} | | | | |"
    measured, planned = case["measured"], case.get("planned")
    off = f"{planned / measured - 1:+.0%}" if measured and planned else ""
    shown = [f"{each:,.0f}" if each else "" for each in (measured, planned)]
    return f"| {names} | {shown[0]} | {shown[1]} | {off} | {case['seconds']:.1f} | {case['loss']:.3f} |"


if __name__ == "__main__":
    main()
