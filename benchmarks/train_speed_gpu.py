"""Training speed on one CUDA GPU: lightning-sft's engine against TRL, Llama-like models of 1B and 8B in bfloat16.

    python benchmarks/train_speed_gpu.py --model 1b --length 2048
    python benchmarks/train_speed_gpu.py --model 8b --length 8192 --lora

Weights are random, rows are made up: pieces of many lengths, as many as fit into `--length` tokens, `--rows` times a
step. Every side is a process of its own, and the sides take turns. Time is the GPU's, between CUDA events around the
steps that count; MFU follows PaLM's appendix B (see `Flops`), with the same FLOPs for every side. TRL packs, and gets
FlashAttention and Liger's layer kernels where they can be imported. Prints a table and, as the last line, JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any


def _llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


SHAPES = {
    "1b": _llama(2048, 8192, 16, 32, 8),
    "8b": _llama(4096, 14336, 32, 32, 8),
    "tiny": _llama(64, 128, 2, 4, 2),
}
"""Llama 3's shapes; `tiny` is for trying the script."""
VOCABULARY = 128_256


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SHAPES, default="1b")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a packed row")
    parser.add_argument("--rows", type=int, default=4, help="packed rows a step")
    parser.add_argument("--lora", action="store_true", help="LoRA, r 16, on every linear layer")
    parser.add_argument("--compile", action="store_true", help="model.compile")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing on both sides")
    parser.add_argument("--steps", type=int, default=10, help="steps that count")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--rounds", type=int, default=3, help="how often each side is run")
    parser.add_argument("--sides", default="lightning_sft,trl", help="which, with commas between")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def pieces(options: argparse.Namespace, step: int) -> list[list[int]]:
    """The rows of a step: token ids, of log-normal lengths, that fill `rows` packs of `length` tokens."""
    rng = random.Random(step)
    made = []
    for _ in range(options.rows):
        room = options.length
        while room:
            size = min(room, max(16, int(rng.lognormvariate(5.5, 0.8))))
            made.append([rng.randrange(VOCABULARY) for _ in range(size)])
            room -= size
    return made


class Timer:
    """Time and memory of the steps after warm-up, by CUDA events; by the clock where there is no CUDA."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.step, self.marks, self.flops, self.tokens = options, 0, [], 0.0, 0

    def begin(self, lengths: list[int], flops: float) -> None:
        """A step begins."""
        if self.step == self.options.warmup:
            self._mark()
        if self.step >= self.options.warmup:
            self.tokens += sum(lengths)
            self.flops += flops
        self.step += 1

    def end(self) -> None:
        """Training is over; print the figures."""
        import torch

        from lightning_sft.training.devices import peak_flops

        self._mark()
        device = torch.device(self.options.device)
        if device.type == "cuda":
            torch.cuda.synchronize()
            seconds = self.marks[0].elapsed_time(self.marks[1]) / 1000
            memory = torch.cuda.max_memory_allocated() / 2**30
        else:
            seconds, memory = self.marks[1] - self.marks[0], None
        peak = peak_flops(device)
        figures = {
            "tokens_per_second": self.tokens / seconds,
            "mfu": self.flops / seconds / peak if peak else None,
            "peak_gib": memory,
        }
        print("FIGURES " + json.dumps(figures), flush=True)

    def _mark(self) -> None:
        import time

        import torch

        if self.options.device == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())


def make_model(options: argparse.Namespace, attention: str) -> Any:
    """The model with random weights, in bfloat16, with LoRA if asked for."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        **SHAPES[options.model], vocab_size=VOCABULARY, max_position_embeddings=max(8192, options.length),
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(options.device):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=attention
        )
    if options.lora:
        import peft

        settings = peft.LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
        model = peft.get_peft_model(model, settings)
    return model.train()


def flops_of(model: Any, lengths: list[int]) -> float:
    """What a step needs when every position is trained."""
    from lightning_sft.training.throughput import Flops

    flops = Flops.of(model)
    return sum((flops.body + flops.head) * n + flops.attention * n * n for n in lengths)


def lightning_sft(options: argparse.Namespace) -> None:
    """The engine's layout, attention, loss and optimizer settings in a loop."""
    import numpy as np
    import torch

    from lightning_sft.conversation import Meta
    from lightning_sft.data.batch import flatten
    from lightning_sft.example import Example
    from lightning_sft.training.compiling import compile_blocks
    from lightning_sft.training.head import NLL, weighted_loss
    from lightning_sft.training.layout import causal_lm, find_layout, hidden_states

    model = make_model(options, "sdpa")
    layout = find_layout(model, 0)
    if layout.padded_because:
        raise SystemExit(f"rows would be padded: {layout.padded_because}")
    if options.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if options.compile:
        compile_blocks(causal_lm(model))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    timer = Timer(options)
    for step in range(options.warmup + options.steps):
        rows = pieces(options, step)
        examples = [
            Example(
                input_ids=np.asarray(ids, np.int32), weights=np.ones(len(ids), np.float32),
                reasons=np.ones(len(ids), np.uint8), meta=Meta("made up", 0),
            )
            for ids in rows
        ]  # fmt: skip
        batch = flatten(examples, float(sum(map(len, rows)))).to(torch.device(options.device))
        timer.begin([len(ids) for ids in rows], flops_of(model, [len(ids) for ids in rows]))
        hidden = hidden_states(model, batch, own_logits=layout.own_logits)
        loss = weighted_loss(hidden, batch.targets, batch.weights, layout.head, NLL) / batch.num_items
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    timer.end()


def trl(options: argparse.Namespace) -> None:
    """SFTTrainer on the same packs, padding-free, with what it can import."""
    import transformers
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model = make_model(options, "flash_attention_2" if find_spec("flash_attn") else "sdpa")
    timer = Timer(options)
    total = options.warmup + options.steps
    steps = [pieces(options, step) for step in range(total)]

    class End(transformers.TrainerCallback):
        def on_train_end(self, *_: Any, **__: Any) -> None:
            timer.end()

    class Timed(SFTTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            lengths = [len(ids) for ids in steps[timer.step]]
            timer.begin(lengths, flops_of(model, lengths))
            return super().training_step(*args, **kwargs)

        def get_train_dataloader(self) -> Any:
            return [self.data_collator([{"input_ids": ids} for ids in rows]) for rows in steps]

    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder, per_device_train_batch_size=len(steps[0]), max_steps=total, bf16=True,
            gradient_checkpointing=options.checkpointing, padding_free=True, max_length=None, report_to=[],
            save_strategy="no", learning_rate=1e-5, disable_tqdm=True, torch_compile=options.compile,
            use_liger_kernel=find_spec("liger_kernel") is not None, use_cpu=options.device == "cpu",
        )  # fmt: skip
        rows = Dataset.from_list([{"input_ids": ids} for ids in steps[0]])
        trainer = Timed(
            model=model, args=settings, train_dataset=rows, processing_class=_tokenizer(), callbacks=[End()]
        )
        trainer.train()


def _tokenizer() -> Any:
    """Any: the rows are ids already."""
    from lightning_sft import assets
    from lightning_sft.training.models import load_tokenizer

    return load_tokenizer(assets.model_path("tiny"))


def main() -> None:
    """Run one side, or let the sides take turns."""
    options = parse()
    if options.side:
        {"lightning_sft": lightning_sft, "trl": trl}[options.side](options)
        return
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device here; benchmarks/train_speed.py measures on a CPU")
    sides = [side for side in options.sides.split(",") if side != "trl" or find_spec("trl")]
    figures: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for number in range(options.rounds):
        for side in sides if number % 2 == 0 else reversed(sides):
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            lines = [line for line in done.stdout.splitlines() if line.startswith("FIGURES ")]
            if not lines:
                print(f"{side} failed, and is left out:\n{done.stderr[-3000:]}", file=sys.stderr)
                continue
            figures[side].append(json.loads(lines[-1].removeprefix("FIGURES ")))
    report = {
        "options": vars(options),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "installed": {name: find_spec(name) is not None for name in ("flash_attn", "liger_kernel")},
        "sides": {
            side: {key: median(run[key] for run in runs) for key in runs[0]}
            for side, runs in figures.items()
            if runs
        },
    }
    for side, values in report["sides"].items():
        speed, mfu, peak = (values[key] for key in ("tokens_per_second", "mfu", "peak_gib"))
        print(f"{side:16} {speed:10,.0f} tok/s  MFU {mfu or 0:.3f}  {peak or 0:.1f} GiB")
    print(json.dumps(report))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
