"""Fully sharded training computes what one process computes, and writes what one process writes.

Here with one process, so that everything is sharded, if into one part; with two in test_distributed.py.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from zoo import model as zoo_model

from lightning_sft import Generate, Scorer, SFTDataModule, SFTError, SFTModule
from lightning_sft.conversation import Segments
from lightning_sft.training.fsdp2 import FSDP2Strategy, is_sharded, whole_parameters
from lightning_sft_adapters.full import Full
from lightning_sft_adapters.lora import LoRA

ASKED = [Generate("hello", max_new_tokens=5), Generate("how are you", max_new_tokens=5)]


@pytest.fixture(autouse=True)
def no_processes_are_left(monkeypatch):
    before = dict(os.environ)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    texts = [{"instruction": f"say {n}", "output": f"{n} " * (1 + n * n % 11)} for n in range(14)]
    path.write_text("\n".join(map(json.dumps, texts)))
    return str(path)


@pytest.fixture(scope="module")
def experts(tmp_path_factory, tokenizer) -> str:
    """A Mixtral."""
    folder = tmp_path_factory.mktemp("experts")
    zoo_model("mixtral", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


class Watching(Callback):
    """Keeps the losses of the steps, and asks the model before and after them."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.scores: list[float] = []
        self.answers: list[list[str]] = []
        self.sharded = False

    def on_train_batch_end(self, trainer, pl_module, *args):
        if "train/loss" in trainer.callback_metrics:
            self.losses.append(float(trainer.callback_metrics["train/loss"]))

    def on_train_start(self, trainer, pl_module):
        self.sharded = all(isinstance(p, DTensor) for p in pl_module.loaded.parameters())
        self._ask(pl_module)

    def on_train_end(self, trainer, pl_module):
        self._ask(pl_module)

    def _ask(self, module: SFTModule) -> None:
        scorer = Scorer.of(module)
        texts = module.renderer.render_all([Segments(((f"hello {'there ' * n}", 1.0),)) for n in range(1, 4)])
        self.scores += scorer.negative_log_likelihoods(texts)
        self.answers.append([str(each) for each in scorer.run(ASKED)])


@dataclass
class Fitted:
    watching: Watching
    metrics: dict[str, float]
    checkpoint: dict[str, Any]
    exported: dict[str, torch.Tensor]


def fit(folder: Path, rows: str, base: str, adapter: Any, strategy: Any, **options: Any) -> Fitted:
    model = {key: options.pop(key) for key in ("gradient_checkpointing", "router_aux_loss") if key in options}
    torch.manual_seed(0)
    module = SFTModule(base=base, adapter=adapter, learning_rate=0.01, **model)
    watching = Watching()
    trainer = Trainer(
        accelerator="cpu", devices=1, strategy=strategy, max_epochs=1, logger=False, log_every_n_steps=1,
        enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False, callbacks=[watching],
        default_root_dir=folder, **{"gradient_clip_val": 0.5, **options},
    )  # fmt: skip
    trainer.fit(module, SFTDataModule(train=rows, val_split=2, batch_size=2))
    trainer.save_checkpoint(folder / "own.ckpt", weights_only=False)
    module.export(folder / "model")
    exported = {}
    for file in (folder / "model").glob("*.safetensors"):
        exported |= load_file(file)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if "second" not in name}
    return Fitted(watching, metrics, torch.load(folder / "own.ckpt", weights_only=True), exported)


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """The same structure, with numbers up to rounding."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where} {key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for number, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where} {number}")
    elif isinstance(a, torch.Tensor):
        assert not isinstance(a, DTensor), where
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=lambda text: f"{where}: {text}")
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=1e-4), where


CASES = {
    "all parameters": ("llama", Full, {}),
    "tied embeddings, soft caps, accumulation": ("gemma2", Full, {"accumulate_grad_batches": 4}),
    "adapters, recomputed": ("llama", lambda: LoRA(r=4), {"gradient_checkpointing": True}),
    "adapters, and an output embedding beside them": (
        "llama", lambda: LoRA(r=4, modules_to_save=["lm_head"]), {"gradient_clip_algorithm": "value"},
    ),
    "padded rows": ("falcon", lambda: LoRA(r=4), {}),
    "experts, and a loss of their router": ("experts", Full, {"router_aux_loss": 0.1}),
}  # fmt: skip


@pytest.mark.parametrize("offload", [False, True], ids=["", "offloaded"])
@pytest.mark.parametrize("case", CASES)
def test_a_sharded_run_is_the_run_of_one_process(case, offload, rows, experts, model_folder, tmp_path):
    family, adapter, options = CASES[case]
    if offload and family not in ("gemma2", "llama"):
        pytest.skip("one of a kind is enough")
    base = experts if family == "experts" else str(model_folder(family))
    plain = fit(tmp_path / "plain", rows, base, adapter(), "auto", **options)
    sharded = fit(tmp_path / "sharded", rows, base, adapter(), FSDP2Strategy(cpu_offload=offload), **options)
    assert sharded.watching.sharded
    assert sharded.watching.losses == pytest.approx(plain.watching.losses, rel=1e-5)
    assert sharded.watching.scores == pytest.approx(plain.watching.scores, rel=1e-5)
    assert sharded.watching.answers == plain.watching.answers
    assert sharded.metrics == pytest.approx(plain.metrics, rel=1e-5)
    assert ("train/router_aux_loss" in sharded.metrics) == (family == "experts")
    assert_same(sharded.checkpoint["state_dict"], plain.checkpoint["state_dict"])
    assert_same(sharded.checkpoint["optimizer_states"], plain.checkpoint["optimizer_states"])
    assert_same(sharded.exported, plain.exported)


def test_parameters_are_whole_only_while_they_are_written(rows, model_folder, tmp_path):
    module = SFTModule(base=str(model_folder("gemma2")), preflight=False)
    trainer = Trainer(
        accelerator="cpu", devices=1, strategy="fsdp2", max_steps=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, SFTDataModule(train=rows, batch_size=2))
    assert is_sharded(module.loaded)
    before = dict(module.loaded.named_parameters())
    with whole_parameters(module.loaded):
        inside = dict(module.loaded.named_parameters())
        assert inside.keys() == before.keys()
        assert not any(isinstance(p, DTensor) for p in inside.values())
        tied = module.loaded.get_output_embeddings().weight
        assert tied is module.loaded.get_input_embeddings().weight
    assert all(p is before[name] for name, p in module.loaded.named_parameters())


class NoBlocks(Full):
    """A model that doesn't say what its blocks are."""

    def prepare(self, model):
        model._no_split_modules = None
        return super().prepare(model)


class TwoTypes(Full):
    """A model of which one part is trained in another type."""

    def prepare(self, model):
        model.lm_head.double()
        return super().prepare(model)


class Outside(Full):
    """A trained parameter beside the model."""

    def prepare(self, model):
        from torch import nn

        class Wrapper(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner, self.prompt = model, nn.Parameter(torch.zeros(3))

            def get_base_model(self):
                return self.inner

        return Wrapper()


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [(NoBlocks, "which of its modules are blocks"), (TwoTypes, "several types"), (Outside, "prompt")],
)
def test_a_model_that_cannot_be_sharded_is_refused_with_the_reason(adapter, reason, rows, model_folder):
    module = SFTModule(base=str(model_folder("llama")), adapter=adapter())
    trainer = Trainer(accelerator="cpu", devices=1, strategy="fsdp2", max_steps=1, logger=False)
    with pytest.raises(SFTError, match=reason) as caught:
        trainer.fit(module, SFTDataModule(train=rows, batch_size=2))
    assert "ddp" in str(caught.value)
