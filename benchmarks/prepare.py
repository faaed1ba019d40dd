"""Preparing data side by side: lightning-sft and TRL, from rows to token ids with a loss mask, in one process each.

    python benchmarks/prepare.py --data alpaca.json --tokenizer phi-3-mini --rounds 3
    python benchmarks/prepare.py --data alpaca.json --tokenizer phi-3-mini --growth 10000,100000,1000000

Every side is a process of its own with one thread and empty caches, and the sides take turns. The rows are those of
an Alpaca file, repeated with a number in each instruction so that no two are the same. Seconds are CPU seconds, from
opening the file to the finished result; libraries, tokenizer and model are loaded before. TRL's are those of
`load_dataset`, of a `map` that makes messages of the rows, and of what its trainer does then
(`SFTTrainer._prepare_dataset`, which is also counted alone: `trainer_seconds`): `trl` has prompts and completions of
messages, of which its default trains the completions, and `trl_assistant_only` whole conversations, of which it trains
the assistant's turns. Ratios are the medians of the ratios within each round. `--growth` shows lightning-sft
alone with more and more rows: the peak of its memory, and how long a second start takes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import workload

MAX_LENGTH = 1024  # TRL's default
SIDES = ("lightning_sft", "trl", "trl_assistant_only")


def main() -> None:
    """Let the sides take turns, or show the growth; print a table and, as the last line, JSON."""
    options = parse()
    if options.run:
        run(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        report = growth(options, Path(folder)) if options.growth else compare(options, Path(folder))
    print(json.dumps(report))
    if options.out:
        Path(options.out).write_text(json.dumps(report, indent=1) + "\n")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="a JSON or JSONL file of Alpaca rows")
    parser.add_argument("--tokenizer", required=True, help="a tokenizer's folder, with a chat template")
    parser.add_argument("--rows", type=int, default=10_000, help="rows that are made of them")
    parser.add_argument("--rounds", type=int, default=3, help="how often every side is run")
    parser.add_argument("--sides", default=",".join(SIDES), help="which, with commas between")
    parser.add_argument("--growth", help="numbers of rows, with commas between")
    parser.add_argument("--workers", type=int, default=0, help="preparation workers of --growth")
    parser.add_argument("--out", help="also write the JSON here")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--cache", help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The sides, and the ratios of the first to the others."""
    file = write_rows(options.data, folder / "rows.jsonl", options.rows)
    sides = [side for side in options.sides.split(",") if not side.startswith("trl") or find_spec("trl")]
    figures: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for number in range(options.rounds):
        for side in sides if number % 2 == 0 else reversed(sides):
            with tempfile.TemporaryDirectory(dir=folder) as cache:
                figures[side].append(start(side, file, options.tokenizer, Path(cache)))
            print(f"round {number + 1}  {side:20} {rate(figures[side][-1]):8.0f} rows/CPU-s", flush=True)
    ours, *others = sides
    report: dict[str, Any] = {"options": vars(options), "sides": {}, f"{ours} relative to": {}}
    for side, runs in figures.items():
        report["sides"][side] = {
            "rows_per_cpu_second": median(map(rate, runs)),
            **{key: median(run[key] for run in runs) for key in ("peak_mb", "above_start_mb")},
            **{key: runs[0][key] for key in ("rows", "tokens", "trained")},
        }
        print(f"{side:20} " + "  ".join(f"{k} {v:,.0f}" for k, v in report["sides"][side].items()))
    for side in others:
        pairs = list(zip(figures[ours], figures[side], strict=True))
        report[f"{ours} relative to"][side] = ratios = {
            "speed": median(rate(a) / rate(b) for a, b in pairs),
            "speed against the trainer alone": median(
                rate(a) / (b["rows"] / b["trainer_seconds"]) for a, b in pairs
            ),
            **{key: median(a[key] / b[key] for a, b in pairs) for key in ("peak_mb", "above_start_mb")},
        }
        print(f"relative to {side}: " + "  ".join(f"{key} {value:.2f}" for key, value in ratios.items()))
    return report


def growth(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The memory of lightning-sft by number of rows, cold and at a second start."""
    report: dict[str, Any] = {"options": vars(options), "rows": {}}
    for rows in map(int, options.growth.split(",")):
        file = write_rows(options.data, folder / "rows.jsonl", rows)
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            cold, warm = (
                start("lightning_sft", file, options.tokenizer, Path(cache), options.workers)
                for _ in range(2)
            )
        report["rows"][rows] = {"cold": cold, "second start": warm}
        print(
            f"{rows:>9,} rows  cold: peak {cold['peak_mb']:.0f} MB, {cold['above_start_mb']:.0f} above start, "
            f"{cold['seconds']:.1f} CPU-s, {cold['wall']:.1f} s;  second start: peak {warm['peak_mb']:.0f} MB, "
            f"{warm['seconds']:.2f} CPU-s, {warm['wall']:.2f} s",
            flush=True,
        )
    return report


def write_rows(data: str, path: Path, count: int) -> Path:
    """So many rows, made of those in `data`, in a JSONL file."""
    rows = workload.read(data)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            row = rows[number % len(rows)]
            file.write(json.dumps({**row, "instruction": f"{row['instruction']} ({number})"}) + "\n")
    return path


def rate(figures: dict[str, float]) -> float:
    """Rows per CPU second."""
    return figures["rows"] / figures["seconds"]


def start(side: str, file: Path, tokenizer: str, cache: Path, workers: int = 0) -> dict[str, float]:
    """The figures of one side, run in a process of its own."""
    env = {
        **os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
        "HF_DATASETS_CACHE": str(cache / "datasets"), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    command = [
        sys.executable, __file__, "--run", side, "--data", str(file), "--tokenizer", tokenizer,
        "--cache", str(cache), "--workers", str(workers),
    ]  # fmt: skip
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FIGURES ")]
    if not lines:
        raise SystemExit(f"{side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    figures: dict[str, float] = json.loads(lines[-1].removeprefix("FIGURES "))
    return figures


def run(options: argparse.Namespace) -> None:
    """Be a side, and print its figures."""
    sides: dict[str, Callable[[argparse.Namespace], dict[str, float]]] = {
        "lightning_sft": lightning_sft,
        "trl": lambda options: trl(options, prompts=True),
        "trl_assistant_only": lambda options: trl(options, prompts=False),
    }
    print("FIGURES " + json.dumps(sides[options.run](options)), flush=True)


class Clock:
    """CPU seconds, seconds and memory from its making on."""

    def __init__(self) -> None:
        self.started, self.wall, self.memory = time.process_time(), time.perf_counter(), _peak()

    def figures(self, rows: int) -> dict[str, float]:
        """What has passed since."""
        return {
            "rows": rows,
            "seconds": time.process_time() - self.started,
            "wall": time.perf_counter() - self.wall,
            "peak_mb": _peak(),
            "above_start_mb": _peak() - self.memory,
        }


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def lightning_sft(options: argparse.Namespace) -> dict[str, float]:
    """From the file to the stored examples."""
    from lightning_sft import Renderer
    from lightning_sft.data.prepare import prepare
    from lightning_sft.data.sources import Source
    from lightning_sft.training.models import load_tokenizer

    renderer = Renderer(load_tokenizer(options.tokenizer))
    source = Source(options.data, workload.plugin("formats", "Alpaca"))
    clock = Clock()
    prepared = prepare(
        [source], renderer, max_length=MAX_LENGTH, overlong="truncate_right",
        cache_folder=Path(options.cache), workers=options.workers,
    )  # fmt: skip
    figures = clock.figures(len(prepared.examples))
    return figures | {"tokens": int(prepared.lengths.sum()), "trained": prepared.trained_tokens}


def trl(options: argparse.Namespace, *, prompts: bool) -> dict[str, float]:
    """What `SFTTrainer` does to its dataset, with its defaults."""
    import transformers
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    figures: dict[str, float] = {}

    class Timed(SFTTrainer):
        def _prepare_dataset(self, *args: Any, **kwargs: Any) -> Any:
            clock = Clock()
            dataset = super()._prepare_dataset(*args, **kwargs)
            figures.update(clock.figures(len(dataset)))
            return dataset

    def messages(row: dict[str, str]) -> dict[str, Any]:
        asked = {"role": "user", "content": "\n".join(filter(None, (row["instruction"], row["input"])))}
        answer = {"role": "assistant", "content": row["output"]}
        return {"prompt": [asked], "completion": [answer]} if prompts else {"messages": [asked, answer]}

    tokenizer = transformers.AutoTokenizer.from_pretrained(options.tokenizer)
    shape = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 1)
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, **shape)
    settings = SFTConfig(
        output_dir=f"{options.cache}/out", use_cpu=True, bf16=False, report_to=[], disable_tqdm=True,
        max_length=MAX_LENGTH, assistant_only_loss=not prompts,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    clock = Clock()
    dataset = load_dataset("json", data_files=options.data, split="train")
    dataset = dataset.map(messages, remove_columns=dataset.column_names)
    loading = clock.figures(len(dataset))
    trainer = Timed(model=model, args=settings, train_dataset=dataset, processing_class=tokenizer)
    counts = [
        (len(row["labels"]), sum(label != -100 for label in row["labels"])) for row in trainer.train_dataset
    ]
    figures["trainer_seconds"] = figures["seconds"]
    figures["seconds"] += loading["seconds"]
    figures["above_start_mb"] = figures["peak_mb"] - clock.memory
    return figures | {"tokens": sum(each[0] for each in counts), "trained": sum(each[1] for each in counts)}


if __name__ == "__main__":
    main()
