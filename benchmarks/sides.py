"""The sides of a benchmark; each is run in a process of its own: `python sides.py SIDE workload.json`.

Every side trains the rows of a `Workload` and prints one line of JSON: real tokens (without padding) and CPU
seconds of the steps after warm-up, the CPU seconds from the start of the process to its first step, and the
peak of its resident memory.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from workload import Workload, load, plugin


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


# ------------------------------------------------------------------------------------------ lightning-sft


def lightning_sft(work: Workload, clock: Clock, **model: Any) -> None:
    """The command itself, from the raw rows, with everything that a run has by default."""
    import lightning.pytorch

    from lightning_sft import cli

    class Timer(lightning.pytorch.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            clock.step(batch.num_tokens)

        def on_train_end(self, trainer: Any, module: Any) -> None:
            clock.end()

    globals()["Timer"] = Timer
    sys.modules.setdefault("sides", sys.modules[__name__])
    Timer.__module__, Timer.__qualname__ = "sides", "Timer"
    with tempfile.TemporaryDirectory() as folder:
        config = {
            "seed_everything": 0,
            "model": {
                "base": work.base,
                "learning_rate": 1e-5,
                "adapter": {"class_path": "LoRA", "init_args": {"r": 16, "alpha": 32}}
                if work.lora
                else "Full",
                **model,
            },
            "data": {
                "train": [{"path": work.raw, "format": work.format}],
                "batch_size": work.batch_size,
                "max_lost_fraction": 1.0,
            },
            "trainer": {
                "accelerator": "cpu",
                "precision": work.precision,
                "max_steps": work.total,
                "gradient_clip_val": 1.0,
                "default_root_dir": f"{folder}/run",
                "enable_checkpointing": False,
                "callbacks": ["sides.Timer"],
            },
        }
        path = Path(folder) / "config.yaml"
        path.write_text(json.dumps(config))
        cli.run(["fit", "--config", str(path)])


def lightning_sft_compiled(work: Workload, clock: Clock) -> None:
    """The same with `model.compile`."""
    lightning_sft(work, clock, compile=True)


def engine(work: Workload, clock: Clock) -> None:
    """lightning-sft's own model, batches, loss and optimizer in a plain loop: what is left without Lightning."""
    import torch
    from lightning.pytorch import Trainer

    from lightning_sft import SFTDataModule, SFTModule
    from lightning_sft.data.sources import Source

    adapter = plugin("adapters", "LoRA", r=16, alpha=32) if work.lora else None
    module = SFTModule(base=work.base, adapter=adapter, learning_rate=1e-5)
    data = SFTDataModule(
        train=[Source(path=work.raw, format=plugin("formats", work.format))],
        batch_size=work.batch_size,
        seed=0,
    )
    trainer = Trainer(
        accelerator="cpu", max_steps=work.total, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.strategy.connect(module)
    trainer._data_connector.attach_data(module, datamodule=data)
    module.configure_model()
    data.setup("fit")
    made: Any = module.configure_optimizers()
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for batch, _ in zip(data.train_dataloader(), range(work.total), strict=False):
        clock.step(batch.num_tokens)
        with _autocast(work.precision):
            loss = module.weighted_loss(batch, module.loss) / batch.num_items
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    clock.end()


# ---------------------------------------------------------------------------------------------- bare loops


def _autocast(precision: str) -> Any:
    import torch

    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")


def _bare(
    work: Workload, clock: Clock, loss_of: Callable[[Any, list[dict[str, list[int]]]], Any], **options: Any
) -> None:
    import torch
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(work.base, dtype=torch.float32, **options)
    model.train()
    if work.lora:
        import peft

        model = peft.get_peft_model(
            model, peft.LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
        )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=True)
    for rows in _steps(work):
        clock.step(sum(len(row["input_ids"]) for row in rows))
        with _autocast(work.precision):
            loss = loss_of(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    clock.end()


def _steps(work: Workload) -> Iterator[list[dict[str, list[int]]]]:
    rows = work.rows()
    for start in range(0, len(rows), work.batch_size):
        yield rows[start : start + work.batch_size]


def padded(work: Workload, clock: Clock) -> None:
    """A bare loop as it is usually written: padded rows, the model's own logits, cross-entropy."""
    import torch
    from torch.nn import functional as F

    def loss_of(model: Any, rows: list[dict[str, list[int]]]) -> Any:
        longest = max(len(row["input_ids"]) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for index, row in enumerate(rows):
            end = len(row["input_ids"])
            ids[index, :end], labels[index, :end] = (
                torch.tensor(row["input_ids"]),
                torch.tensor(row["labels"]),
            )
            mask[index, :end] = 1
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())

    _bare(work, clock, loss_of)


def flattened(work: Workload, clock: Clock) -> None:
    """A bare loop by hand, without any of lightning-sft: flattened rows, SDPA by segments, a chunked loss."""
    import torch
    import transformers
    from torch.nn import functional as F

    bounds: list[int] = []

    def by_segments(
        module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float | None = None, **_: Any
    ) -> tuple[Any, None]:
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        parts = [
            F.scaled_dot_product_attention(
                query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], is_causal=True, scale=scaling
            )
            for a, b in pairwise(bounds)
        ]
        return torch.cat(parts, 2).transpose(1, 2), None

    class Chunked(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: Any, weight: Any, targets: Any) -> Any:
            trained = weight.requires_grad
            cast = weight.to(torch.bfloat16) if work.precision == "bf16-mixed" else weight
            grad, total = torch.empty_like(hidden), hidden.new_zeros((), dtype=torch.float32)
            weight_grad = torch.zeros_like(weight) if trained else None
            for start in range(0, len(hidden), 512):
                x, y = hidden[start : start + 512].to(cast.dtype), targets[start : start + 512]
                logits = (x @ cast.T).float()
                log = torch.logsumexp(logits, -1, keepdim=True)
                total += (log[:, 0] - logits.gather(1, y[:, None])[:, 0]).sum()
                p = logits.sub_(log).exp_()
                p[torch.arange(len(y)), y] -= 1
                p = p.to(cast.dtype)
                grad[start : start + 512] = p @ cast
                if weight_grad is not None:
                    weight_grad += p.T @ x
            ctx.save_for_backward(grad, *([] if weight_grad is None else [weight_grad]))
            return total

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Any) -> Any:
            (scale,) = grad_outputs
            grad, *weight_grad = ctx.saved_tensors
            return grad * scale, weight_grad[0] * scale if weight_grad else None, None

    transformers.AttentionInterface.register("bare_segments", by_segments)

    def loss_of(model: Any, rows: list[dict[str, list[int]]]) -> Any:
        bounds[:] = [0]
        for row in rows:
            bounds.append(bounds[-1] + len(row["input_ids"]))
        ids = torch.tensor([token for row in rows for token in row["input_ids"]])[None]
        positions = torch.cat([torch.arange(len(row["input_ids"])) for row in rows])[None]
        labels = torch.tensor([label for row in rows for label in (*row["labels"][1:], -100)])
        at = (labels >= 0).nonzero()[:, 0]
        inner = model.get_base_model() if work.lora else model
        hidden = inner.model(input_ids=ids, position_ids=positions, use_cache=False)[0][0, at]
        with torch.autocast("cpu", enabled=False):
            return Chunked.apply(hidden, inner.lm_head.weight, labels[at]) / len(at)

    _bare(work, clock, loss_of, attn_implementation="bare_segments")


# ------------------------------------------------------------------------------------------------------ TRL


def _trl(
    work: Workload,
    clock: Clock,
    *,
    raw: bool = False,
    own_loss: bool = False,
    per_step: int | None = None,
    **options: Any,
) -> None:
    import torch
    import transformers
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    class Timer(transformers.TrainerCallback):
        def on_train_end(self, *_: Any, **__: Any) -> None:
            clock.end()

    class Timed(SFTTrainer):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            mask = inputs.get("attention_mask")
            clock.step(int(mask.sum()) if mask is not None else inputs["input_ids"].numel())
            return super().training_step(model, inputs, *args, **kwargs)

        if own_loss:  # the model's own, from whole logits, without TRL's extra metrics
            compute_loss = transformers.Trainer.compute_loss

    rows: list[dict[str, Any]] = work.rows()
    if raw:
        given = [json.loads(line) for line in Path(work.raw).read_text().splitlines()]
        rows = [{"prompt": _prompt(row), "completion": row["output"]} for row in given]
    peft_config = None
    if work.lora:
        import peft

        peft_config = peft.LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder, use_cpu=not torch.cuda.is_available(), report_to=[], save_strategy="no",
            per_device_train_batch_size=per_step or work.batch_size, max_steps=work.total,
            learning_rate=1e-5, disable_tqdm=True, bf16=work.precision == "bf16-mixed",
            train_sampling_strategy="sequential", **options,
        )  # fmt: skip
        trainer = Timed(
            model=work.base, args=settings, train_dataset=Dataset.from_list(rows), peft_config=peft_config,
            processing_class=transformers.AutoTokenizer.from_pretrained(work.base), callbacks=[Timer()],
        )  # fmt: skip
        trainer.train()


def _prompt(row: dict[str, str]) -> str:
    asked = "\n".join(filter(None, (row["instruction"], row.get("input"))))
    return f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"


def trl(work: Workload, clock: Clock) -> None:
    """SFTTrainer with its defaults: padded rows, gradient checkpointing, its fused head."""
    _trl(work, clock)


def trl_raw(work: Workload, clock: Clock) -> None:
    """The defaults again, from raw rows: for the time to the first step."""
    _trl(work, clock, raw=True)


def trl_no_checkpointing(work: Workload, clock: Clock) -> None:
    """Its defaults without gradient checkpointing."""
    _trl(work, clock, gradient_checkpointing=False)


def trl_full_logits(work: Workload, clock: Clock) -> None:
    """The model's own loss from whole logits, no gradient checkpointing."""
    _trl(work, clock, own_loss=True, gradient_checkpointing=False)


def _packs(work: Workload) -> int:
    rows = work.rows()
    mean = sum(len(row["input_ids"]) for row in rows) / len(rows)
    return max(1, round(mean * work.batch_size / 1024))


def trl_packing(work: Workload, clock: Clock) -> None:
    """Its packing, as many tokens a step as the others have, no gradient checkpointing."""
    _trl(work, clock, packing=True, gradient_checkpointing=False, per_step=_packs(work))


def trl_packing_full_logits(work: Workload, clock: Clock) -> None:
    """Its packing and the model's own loss, no gradient checkpointing."""
    _trl(work, clock, own_loss=True, packing=True, gradient_checkpointing=False, per_step=_packs(work))


# --------------------------------------------------------------------------------------------------- LitGPT


def litgpt(work: Workload, clock: Clock, micro: int | None = None) -> None:
    """`litgpt.finetune.full` on a model of the same shape, through a data module with the same rows."""
    import shutil

    import torch
    import transformers
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.config import Config
    from litgpt.data.base import DataModule, get_sft_collate_fn
    from litgpt.finetune.full import setup
    from litgpt.model import GPT
    from litgpt.utils import save_config
    from torch.utils.data import DataLoader

    size = micro or work.batch_size
    taken = 0

    class Rows(DataModule):
        prompt_style = None

        def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: Any = None) -> None:
            kind = torch.long
            self.items = [
                {
                    "input_ids": torch.tensor(row["input_ids"], dtype=kind),
                    "labels": torch.tensor(row["labels"], dtype=kind),
                    "token_counts": {
                        "raw": len(row["input_ids"]),
                        "raw_plus_prompt_template": len(row["input_ids"]),
                    },
                }
                for row in work.rows()
            ]

        def train_dataloader(self) -> Any:
            collate = get_sft_collate_fn(max_seq_length=-1, ignore_index=-100)

            def counted(items: Any) -> Any:
                nonlocal taken
                if taken % (work.batch_size // size) == 0:
                    step = self.items[taken * size : taken * size + work.batch_size]
                    clock.step(sum(len(item["input_ids"]) for item in step))
                taken += 1
                return collate(items)

            return DataLoader(self.items, batch_size=size, collate_fn=counted)

        def val_dataloader(self) -> Any:
            collate = get_sft_collate_fn(max_seq_length=-1, ignore_index=-100)
            return DataLoader(self.items[:2], batch_size=1, collate_fn=collate)

    hf = transformers.AutoConfig.from_pretrained(work.base)
    config = Config(
        name="llama", hf_config={}, block_size=hf.max_position_embeddings, vocab_size=hf.vocab_size,
        padded_vocab_size=hf.vocab_size, n_layer=hf.num_hidden_layers, n_head=hf.num_attention_heads,
        n_query_groups=hf.num_key_value_heads, n_embd=hf.hidden_size, intermediate_size=hf.intermediate_size,
        rotary_percentage=1.0, parallel_residual=False, bias=False, norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        checkpoint.mkdir()
        save_config(config, checkpoint)
        torch.save(GPT(config).state_dict(), checkpoint / "lit_model.pth")
        for file in Path(work.base).glob("tokenizer*"):
            shutil.copy(file, checkpoint)
        shutil.copy(Path(work.base) / "generation_config.json", checkpoint)
        from litgpt.finetune import full

        def stop(*_: Any, **__: Any) -> None:
            clock.end()
            sys.stdout.flush()
            os._exit(0)  # before it writes its final checkpoint

        full.create_finetuning_performance_report = stop
        setup(
            checkpoint_dir=checkpoint, out_dir=Path(folder) / "out", precision=work.precision, devices=1, data=Rows(),
            train=TrainArgs(
                save_interval=None, log_interval=10, global_batch_size=work.batch_size, micro_batch_size=size,
                lr_warmup_steps=1, epochs=100, max_steps=work.total,
            ),
            eval=EvalArgs(interval=10**9, max_new_tokens=1, max_iters=1, final_validation=False),
        )  # fmt: skip


def litgpt_one_row(work: Workload, clock: Clock) -> None:
    """The same with LitGPT's default micro-batch of one row, accumulated."""
    litgpt(work, clock, micro=1)


SIDES: dict[str, Callable[[Workload, Clock], None]] = {
    side.__name__: side
    for side in (
        lightning_sft, lightning_sft_compiled, engine, flattened, padded, trl, trl_raw, trl_no_checkpointing,
        trl_full_logits, trl_packing, trl_packing_full_logits, litgpt, litgpt_one_row,
    )
}  # fmt: skip


if __name__ == "__main__":
    workload = load(sys.argv[2])
    SIDES[sys.argv[1]](workload, Clock(workload))
