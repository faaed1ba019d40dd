"""The sides of a benchmark; each is run in a process of its own: `python sides.py SIDE workload.json`.

Every side trains the rows of a `Workload` and prints one line of JSON: real tokens (without padding) and CPU
seconds of the steps after warm-up, the CPU seconds from the start of the process to its first step, and the
peak of its resident memory.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from clock import Clock
from peers import (
    litgpt,
    litgpt_one_row,
    trl,
    trl_full_logits,
    trl_no_checkpointing,
    trl_packing,
    trl_packing_full_logits,
    trl_raw,
)
from workload import Workload, load, plugin

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
