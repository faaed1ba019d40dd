"""Training speed side by side: lightning-sft, bare PyTorch loops, TRL and LitGPT, on one CPU thread.

    python benchmarks/train_speed.py --data alpaca.json --format Alpaca --rounds 3

Every side is a process of its own, and the sides take turns, round after round. Tokens are real ones, without
padding; seconds are CPU seconds of one thread (`time.process_time`), so that a busy neighbour falsifies little.
Ratios are the medians of the ratios within each round. `--tiny` takes the embedded model and its instructions, and
so measures what Lightning costs when a step takes almost no time. Peers that aren't installed are left out
(`pip install 'lightning-sft[bench]'`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import workload
from workload import Workload

HERE = Path(__file__).parent
BODY = {
    "hidden_size": 384,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
}
"""17.7 million parameters without embeddings."""
SIDES = (
    "lightning_sft", "flattened", "padded", "trl", "trl_no_checkpointing", "trl_full_logits", "trl_packing",
    "trl_packing_full_logits", "litgpt",
)  # fmt: skip


def main() -> None:
    """Make the workload, let the sides take turns, print the table and, as the last line, JSON."""
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        work = prepare(options, Path(folder))
        file = work.save()
        sides = [side for side in options.sides.split(",") if _installed(side)]
        figures: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for number in range(options.rounds):
            for side in sides if number % 2 == 0 else reversed(sides):
                figures[side].append(run(side, file))
                print(f"round {number + 1}  {side:24} {speed(figures[side][-1]):8.0f} tok/CPU-s", flush=True)
    report = summarise(figures, options)
    print(table(report))
    print(json.dumps(report))
    if options.out:
        Path(options.out).write_text(json.dumps(report, indent=1) + "\n")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="a JSON or JSONL file of rows; made up if left out")
    parser.add_argument("--format", default="Alpaca", help="its format, by the plug-in's name")
    parser.add_argument("--tokenizer", help="a tokenizer's folder; made of the rows if left out")
    parser.add_argument("--vocabulary", type=int, default=32_000, help="ids of the model")
    parser.add_argument("--batch-size", type=int, default=12, help="rows a step")
    parser.add_argument("--steps", type=int, default=5, help="steps that count")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--rounds", type=int, default=3, help="how often every side is run")
    parser.add_argument("--precision", default="bf16-mixed", help="bf16-mixed or 32-true")
    parser.add_argument("--lora", action="store_true", help="LoRA on every side that has it")
    parser.add_argument("--tiny", action="store_true", help="the embedded model and its instructions")
    parser.add_argument("--sides", default=",".join(SIDES), help="which, with commas between")
    parser.add_argument("--out", help="also write the JSON here")
    return parser.parse_args()


def prepare(options: argparse.Namespace, folder: Path) -> Workload:
    """The workload that the options ask for."""
    from lightning_sft import assets

    base = assets.model_path("tiny") if options.tiny else str(folder / "model")
    work = Workload(
        folder=str(folder), base=base, format=options.format, batch_size=options.batch_size,
        warmup=options.warmup, steps=options.steps, precision=options.precision, lora=options.lora,
    )  # fmt: skip
    rows = workload.read(assets.data_path("tiny:train") if options.tiny else options.data)
    if not options.tiny:
        shape = {**BODY, "vocab_size": options.vocabulary}
        workload.make_model(folder / "model", rows, options.tokenizer, shape)
    workload.render(work, rows)
    return work


def _installed(side: str) -> bool:
    return all(find_spec(peer) is not None for peer in ("trl", "litgpt") if side.startswith(peer))


def run(side: str, file: Path) -> dict[str, float]:
    """The figures of one side."""
    env = {
        **os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH")))),
        "RAYON_NUM_THREADS": "1", "LITGPT_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(HERE / "sides.py"), side, str(file)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FIGURES ")]
    if not lines:
        raise SystemExit(f"{side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    figures: dict[str, float] = json.loads(lines[-1].removeprefix("FIGURES "))
    return figures


def speed(figures: dict[str, float]) -> float:
    """Real tokens per CPU second."""
    return figures["tokens"] / figures["seconds"]


def summarise(figures: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> dict[str, Any]:
    """Medians of every side, and of the ratios of the first side to each of the others."""
    ours, *others = figures
    sides = {
        side: {
            "tokens_per_cpu_second": median(map(speed, runs)),
            "milliseconds_per_step": 1000 * median(run["seconds"] / run["steps"] for run in runs),
            **{key: median(run[key] for run in runs) for key in ("startup", "peak_mb", "above_start_mb")},
        }
        for side, runs in figures.items()
    }
    ratios = {
        other: {
            "speed": median(speed(a) / speed(b) for a, b in zip(figures[ours], figures[other], strict=True)),
            **{
                key: median(a[key] / b[key] for a, b in zip(figures[ours], figures[other], strict=True))
                for key in ("startup", "peak_mb", "above_start_mb")
            },
        }
        for other in others
    }
    import torch

    machine = {"cpu": _cpu(), "torch": torch.__version__, "threads": 1}
    return {"options": vars(options), "machine": machine, "sides": sides, f"{ours} relative to": ratios}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    about = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    extras = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in about.get("flags", "")]
    return f"{about.get('model name', '?')}, family {about.get('cpu family')} model {about.get('model')} {extras}"


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    (ratios,) = (value for key, value in report.items() if key.endswith("relative to"))
    lines = [
        "",
        f"{'side':24} {'tok/CPU-s':>9} {'ms/step':>8} {'startup s':>9} {'peak MB':>8} {'ours: speed':>12} {'peak':>5}",
    ]
    for side, values in report["sides"].items():
        ratio = ratios.get(side)
        behind = f"{ratio['speed']:11.2f}× {ratio['peak_mb']:4.2f}×" if ratio else ""
        lines.append(
            f"{side:24} {values['tokens_per_cpu_second']:9.0f} {values['milliseconds_per_step']:8.0f} "
            f"{values['startup']:9.1f} {values['peak_mb']:8.0f} {behind}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
