"""Preflight finds what would go wrong, and a run doesn't notice that it took place."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from gradient_dump import GradientDump, load_steps
from lightning.pytorch import Trainer
from torch import nn

from lightning_sft import Adapter, SFTDataModule, SFTError, SFTModule
from lightning_sft.data.plan import BatchPlan
from lightning_sft.training import preflight as preflights
from lightning_sft.training.preflight import preflight
from lightning_sft_adapters.full import Full
from lightning_sft_adapters.lora import LoRA

QUIET = {
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False,
    "enable_model_summary": False, "log_every_n_steps": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text(
        "\n".join(
            json.dumps({"instruction": f"say {n}", "output": f"{n} " * (1 + n * n % 17)}) for n in range(20)
        )
    )
    return str(path)


@pytest.fixture(scope="module")
def dropping(model_folder, tmp_path_factory, tokenizer) -> str:
    """A GPT-2 with dropout."""
    import transformers
    from conftest import tiny_config

    folder = tmp_path_factory.mktemp("dropout") / "gpt2"
    config = tiny_config("gpt2", len(tokenizer))
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.3
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


class Tried(SFTModule):
    """Keeps preflight's report, and the state of everything before and after it."""

    def on_fit_start(self) -> None:
        self.before = self.everything()
        wanted, self.preflight = self.preflight, False
        super().on_fit_start()
        self.report = preflight(self) if wanted else None
        self.after = self.everything()

    def everything(self) -> dict[str, object]:
        found: dict[str, object] = {f"tensor {n}": t.clone() for n, t in self.state_dict().items()}
        found |= {f"buffer {n}": t.clone() for n, t in self.named_buffers()}
        found |= {f"metric {n}": (m.metric_state, m.update_count) for n, m in _metrics(self)}
        found |= {f"gradient {n}": p.grad for n, p in self.named_parameters()}
        found |= {f"training {n}": m.training for n, m in self.named_modules()}
        found |= {f"trained {n}": p.requires_grad for n, p in self.named_parameters()}
        found["random"] = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
        found["own"] = (
            {name: value for name, value in vars(self.throughput).items() if name != "clock"},
            self._step_loss,
            self.watch.skipped,
            list(self.watch._window),
            self.watch.batch,
        )
        found["averages"] = len(self.trainer.optimizers[0].state)
        return found


def _metrics(module):
    return [
        (f"{stage}/{name}", metric)
        for stage, metrics in module.metrics.items()
        for name, metric in metrics.items()
    ]


def equal(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def run(folder: object, rows: str, *, callbacks=(), kind=Tried, size: int = 3, seed: int = 1, **options):
    trainer_options = {
        name: options.pop(name) for name in ("accumulate_grad_batches", "max_epochs") if name in options
    }
    torch.manual_seed(0)
    module = kind(base=str(folder), **options)
    trainer = Trainer(**{"max_epochs": 1, **QUIET, **trainer_options}, callbacks=list(callbacks))
    trainer.fit(module, SFTDataModule(train=rows, val=rows, batch_size=size, seed=seed))
    return module, trainer


# ---------------------------------------------------------------------------------------- nothing is moved

ADAPTERS = {"full": Full, "lora": lambda: LoRA(r=2, dropout=0.3), "dora": lambda: LoRA(r=2, dora=True)}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_run_is_the_same_bit_for_bit_with_and_without_it(adapter, checkpointing, dropping, rows, tmp_path):
    steps = {}
    for preflight_too in (True, False):
        folder = tmp_path / str(preflight_too)
        module, _ = run(
            dropping, rows, adapter=ADAPTERS[adapter](), preflight=preflight_too, accumulate_grad_batches=2,
            callbacks=[GradientDump(str(folder))], learning_rate=1e-2, gradient_checkpointing=checkpointing,
        )  # fmt: skip
        steps[preflight_too] = load_steps(folder)
        assert (module.report is not None) == preflight_too
        for name, value in module.before.items():
            assert equal(value, module.after[name]), name
    assert len(steps[True]) == 4
    assert equal(steps[True], steps[False])


# ------------------------------------------------------------------------------------- what it looks at


@pytest.mark.parametrize("family", ["llama", "bloom"], ids=["flattened", "padded"])
def test_the_heaviest_micro_batch_of_all_epochs_is_tried(family, model_folder, rows):
    _, trainer = run(model_folder(family), rows)
    examples = trainer.datamodule.prepared["train"].examples

    def heaviest(seed: int, epochs: range) -> tuple[int, int]:
        sizes = []
        for epoch in epochs:
            for micro in BatchPlan([1.0] * len(examples), batch_size=3, seed=seed, epoch=epoch).rank(0):
                lengths = [len(examples[row]) for row in micro.rows]
                longest = max(lengths)
                sizes.append((len(lengths) * longest if family == "bloom" else sum(lengths), longest))
        return max(sizes)

    seed = next(seed for seed in range(100) if heaviest(seed, range(1)) < heaviest(seed, range(1, 3)))
    module, _ = run(model_folder(family), rows, max_epochs=3, seed=seed)
    tokens, longest = heaviest(seed, range(3))
    assert f"{tokens} tokens (the longest {longest})" in module.report.heaviest


@pytest.mark.parametrize("says_no", [True, False])
def test_where_memory_errors_can_be_caught_the_whole_of_it_is_tried(says_no, model_folder, rows, monkeypatch):
    seen = []

    class Counting(Tried):
        def weighted_loss(self, batch, loss):
            seen.append(batch.input_ids.numel())
            return super().weighted_loss(batch, loss)

    monkeypatch.setattr(preflights, "_says_no", lambda device: says_no)
    _, trainer = run(model_folder("llama"), rows, kind=Counting)
    examples = trainer.datamodule.prepared["train"].examples
    plan = trainer.datamodule.plan(0)
    heaviest = max(sum(len(examples[row]) for row in micro.rows) for micro in plan.rank(0))
    assert (seen[0] == heaviest) == says_no


@pytest.mark.parametrize("total", [1, 1 << 50])
def test_what_the_machine_cannot_hold_is_refused_or_warned_of(total, model_folder, rows, monkeypatch):
    import psutil

    memory = type("Memory", (), {"total": total, "available": 1})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    if total == 1:
        with pytest.raises(SFTError, match="of memory are too little at a batch of 3 rows"):
            run(model_folder("llama"), rows)
        return
    with pytest.warns(UserWarning, match="the system may kill the run"):
        run(model_folder("llama"), rows)


def test_of_a_healthy_model_it_reports_the_loss_and_no_trouble(model_folder, rows, capsys):
    for adapter in (Full(), LoRA(r=2), LoRA(r=2, dora=True), LoRA(r=2, modules_to_save=["lm_head"])):
        module, _ = run(model_folder("llama"), rows, adapter=adapter)
        assert module.report.unreached == module.report.still == (), adapter
        assert module.report.checkpoint
        assert 1 < module.report.loss < 50


class Widened(Adapter):
    """Trains what it adds to the model: `added` makes it of the model."""

    def __init__(self, added) -> None:
        self.added = added

    def prepare(self, model):
        model.requires_grad_(False)
        self.added(model)
        return model

    def export(self, model, folder: Path) -> None:
        model.save_pretrained(folder)


def _unused(model) -> None:
    model.lm_head.requires_grad_(True)
    model.added = nn.Linear(2, 2)


def _experts(model) -> None:
    model.lm_head.requires_grad_(True)
    model.experts = nn.ModuleList([nn.Linear(2, 2)])


def _detached(model) -> None:
    model.lm_head.requires_grad_(True)
    model.model.norm.register_forward_hook(lambda module, args, output: output.detach())
    model.model.layers[0].mlp.requires_grad_(True)


class _Gated(nn.Module):
    """Adds `factor · tanh(w)` to its input: at w = 0 with a factor of 0 nothing reaches either, at first."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(32))
        self.register_buffer("factor", torch.tensor(factor), persistent=False)

    def forward(self, x):
        return x + self.factor * self.w


def _dead(model) -> None:
    model.lm_head.requires_grad_(True)
    model.gate = _Gated(0.0)
    model.model.norm.register_forward_hook(lambda module, args, output: model.gate(output))


def _all_dead(model) -> None:
    model.gate = _Gated(0.0)
    model.model.norm.register_forward_hook(lambda module, args, output: model.gate(output))


@pytest.mark.parametrize("added", [_unused, _detached])
def test_a_chosen_parameter_that_the_loss_does_not_depend_on_is_refused(added, model_folder, rows):
    with pytest.raises(SFTError, match="no gradient reaches") as caught:
        run(model_folder("llama"), rows, adapter=Widened(added))
    assert ("model.added" if added is _unused else "layers.0.mlp") in caught.value.what
    assert "model.preflight" in caught.value.fix
    module, _ = run(model_folder("llama"), rows, adapter=Widened(added), preflight=False)
    assert module.report is None


def test_where_everything_is_trained_a_part_that_text_does_not_use_is_only_told(model_folder, rows):
    class WithVision(Full):
        def prepare(self, model):
            model.vision = nn.Linear(2, 2)
            return super().prepare(model)

    with pytest.warns(UserWarning, match=r"no gradient reaches 2 parameter tensors: model\.vision"):
        module, _ = run(model_folder("llama"), rows, adapter=WithVision())
    assert module.report.unreached == ("model.vision.weight", "model.vision.bias")


def test_an_expert_may_be_without_a_token(model_folder, rows):
    with pytest.warns(UserWarning, match="no gradient reaches"):
        run(model_folder("llama"), rows, adapter=Widened(_experts))


def test_a_gradient_of_zero_is_told_where_no_zero_factor_explains_it(model_folder, rows):
    with pytest.warns(UserWarning, match=r"zero throughout for 1 parameter tensors: model\.gate\.w"):
        module, _ = run(model_folder("llama"), rows, adapter=Widened(_dead))
    assert module.report.still == ("model.gate.w",)
    assert not module.before["tensor model.gate.w"].any()


@pytest.mark.parametrize("added", [_all_dead, None])
def test_a_run_that_would_train_nothing_is_refused(added, model_folder, rows):
    def cut(model):
        model.model.layers[0].mlp.requires_grad_(True)
        model.model.norm.register_forward_hook(lambda module, args, output: output.detach())

    with pytest.raises(SFTError, match="no gradient reaches any of"):
        run(model_folder("llama"), rows, adapter=Widened(added or cut))


class Spoilt(Full):
    """Trains a model that computes NaN."""

    def prepare(self, model):
        model.model.norm.weight.data.fill_(math.nan)
        return super().prepare(model)


def test_a_base_that_computes_nan_is_refused(model_folder, rows):
    with pytest.raises(SFTError) as caught:
        run(model_folder("llama"), rows, adapter=Spoilt())
    assert caught.value.what == "the loss of the tried rows is nan before any training"
    assert f"{rows}, row" in caught.value.where


def test_where_bad_steps_are_skipped_a_bad_batch_is_only_told(model_folder, rows):
    """The weights hold NaN as well, which the checkpoint then refuses."""
    with (
        pytest.warns(UserWarning, match="is nan before any training"),
        pytest.raises(SFTError, match="NaN or infinite"),
    ):
        run(model_folder("llama"), rows, adapter=Spoilt(), on_bad_loss="skip")


# ------------------------------------------------------------------------------------------ checkpoints


class Forgetful(Tried):
    """Leaves one of the trained tensors out of its checkpoints."""

    def on_save_checkpoint(self, checkpoint) -> None:
        super().on_save_checkpoint(checkpoint)
        del checkpoint["state_dict"]["model.model.norm.weight"]


class Rounding(Tried):
    """Writes its checkpoints in bfloat16."""

    def on_save_checkpoint(self, checkpoint) -> None:
        super().on_save_checkpoint(checkpoint)
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: tensor.bfloat16() for name, tensor in state.items()}


@pytest.mark.parametrize("kind", [Forgetful, Rounding])
def test_a_checkpoint_that_does_not_bring_back_what_was_saved_is_found(kind, model_folder, rows, monkeypatch):
    with pytest.raises(SFTError, match="does not bring back what was saved") as caught:
        run(model_folder("llama"), rows, kind=kind)
    assert "parameters differ" in caught.value.what
    monkeypatch.setattr(preflights, "LARGEST_CHECKPOINT", 0)
    module, _ = run(model_folder("llama"), rows, kind=kind)
    assert not module.report.checkpoint


def test_a_folder_that_takes_no_checkpoint_is_found(model_folder, rows, tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Trainer, "save_checkpoint", fails)
    with pytest.raises(SFTError, match="can't be written: No space left on device"):
        run(model_folder("llama"), rows)


def test_it_leaves_no_file_behind(model_folder, rows, tmp_path):
    module = Tried(base=str(model_folder("llama")))
    trainer = Trainer(max_steps=1, default_root_dir=tmp_path, **QUIET)
    trainer.fit(module, SFTDataModule(train=rows, batch_size=3))
    assert module.report.checkpoint
    assert not list(tmp_path.iterdir())


def test_without_planned_data_only_the_layout_is_tried(model_folder, rows):
    _, trainer = run(model_folder("llama"), rows)
    loader = trainer.train_dataloader
    other = Tried(base=str(model_folder("llama")))
    trainer = Trainer(max_steps=1, **QUIET)
    trainer.fit(other, train_dataloaders=loader)
    assert other.report is None
    assert "layout" in other.__dict__
