"""Runs of a few steps with any adapter, and the plain models that they are compared with."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from lightning.pytorch import Trainer

from lightning_sft import Adapter, SFTDataModule, SFTModule

QUIET = {
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False,
    "enable_model_summary": False, "log_every_n_steps": 1,
}  # fmt: skip
IDS = torch.randint(3, 290, (2, 40), generator=torch.Generator().manual_seed(0))


def write_rows(folder: Path) -> Path:
    """Eight rows, all with the token of `hello`."""
    path = folder / "rows.jsonl"
    rows = [{"instruction": f"say {n}", "output": f"hello {n}, how are you?"} for n in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(base: Path, rows: Path, adapter: Adapter, *, steps: int = 2, batch_size: int = 4, **options):
    """The module and the trainer of two steps."""
    torch.manual_seed(0)
    module = SFTModule(
        str(base), adapter, **{"learning_rate": 1e-2, "warmup": 0, "schedule": "constant", **options}
    )
    trainer = Trainer(**QUIET, max_steps=steps)
    trainer.fit(module, SFTDataModule(train=str(rows), batch_size=batch_size))
    module.eval()
    return module, trainer


def plain(folder: Path, **options):
    """The base as transformers loads it, computing as in training where it is quantised."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def logits(model, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Logits of these rows, those of virtual tokens left out."""
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return out[:, -ids.shape[1] :]


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor of any type."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
