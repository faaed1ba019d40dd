"""TRL and LitGPT as sides of a benchmark, in several of their configurations."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from clock import Clock
from workload import Workload

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

    class Timed(SFTTrainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            mask = inputs.get("attention_mask")
            clock.step(int(mask.sum()) if mask is not None else inputs["input_ids"].numel())
            return super().training_step(model, inputs, *args, **kwargs)

        if own_loss:  # the model's own, from whole logits, without TRL's extra metrics
            compute_loss = transformers.Trainer.compute_loss

    rows: list[dict[str, Any]] = work.rows()
    if raw:
        given = [json.loads(line) for line in Path(work.raw).read_text(encoding="utf-8").splitlines()]
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
