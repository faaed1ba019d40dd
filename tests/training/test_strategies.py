"""Combinations that cannot work are refused at once, with the reason and the nearest one that does."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, StrategyRegistry

from lightning_sft import SFTError
from lightning_sft.__main__ import main
from lightning_sft.training import strategies
from lightning_sft.training.fsdp2 import FSDP2Strategy
from lightning_sft_adapters.full import Full
from lightning_sft_adapters.lora import LoRA


class Quantizing(LoRA):
    """LoRA on a quantized base."""

    def quantization(self) -> object:
        return object()


def trainer(strategy: object, devices: int = 2, **options: object) -> Trainer:
    return Trainer(accelerator="cpu", devices=devices, strategy=strategy, logger=False, **options)


@pytest.mark.parametrize(
    "strategy", ["auto", "ddp", "ddp_find_unused_parameters_true", "fsdp2", "fsdp2_offload"]
)
@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("adapter", [Full(), LoRA()], ids=["Full", "LoRA"])
def test_what_works_is_let_through(strategy, precision, adapter):
    made = trainer(strategy, devices=1 if strategy == "auto" else 2, precision=precision)
    strategies.check(made, adapter, None, precision)


@pytest.mark.parametrize(
    "name", ["ddp", "auto", "ddp_find_unused_parameters_false", "fsdp2", "FSDP2Strategy", "my.OwnStrategy"]
)
def test_a_name_that_is_not_known_to_fail_is_let_through(name):
    strategies.check_name(name)


REFUSED = [name for name in StrategyRegistry.available_strategies() if name.startswith(("fsdp", "deepspeed"))]
REFUSED = [name for name in REFUSED if not name.startswith("fsdp2")]
REFUSED += [
    "ddp_spawn",
    "ddp_fork",
    "ddp_notebook",
    "xla",
    "single_tpu",
    "lightning.pytorch.strategies.FSDPStrategy",
    "DeepSpeedStrategy",
]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_by_its_name(name, capsys, model_folder):
    """Before any data or model is looked at: there is none."""
    assert (
        main(["fit", "--model.base", "nowhere", "--data.train", "nowhere", "--trainer.strategy", name]) == 2
    )
    message = capsys.readouterr().err
    assert name.rpartition(".")[2] in message
    nearest = {"ddp": "ddp", "xla": "ddp", "single_tpu": "auto"}.get(
        name.partition("_")[0] if "ddp" in name else name
    )
    assert f"use {nearest or 'fsdp2'}" in message


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("fdsp2", "did you mean fsdp2?"),
        ("dp", "did you mean ddp?"),
        ("none", "use auto, ddp, fsdp2"),
        ("DDPStrategy", "did you mean ddp?"),
        ("FSDP2Strategy", "did you mean fsdp2?"),
    ],
)
def test_a_strategy_that_does_not_exist_is_told_with_those_that_do(name, says, capsys):
    arguments = ["--model.base", "nowhere", "--data.train", "nowhere", "--trainer.strategy", name]
    assert main(["fit", *arguments]) == 2
    message = capsys.readouterr().err
    assert f"no strategy is named '{name}'" in message
    assert says in message


@pytest.mark.parametrize(
    ("strategy", "says"),
    [
        (DDPStrategy(start_method="spawn"), "use ddp"),
        (ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2), "use fsdp2"),
    ],
)
def test_a_strategy_that_was_made_by_hand_is_refused_too(strategy, says):
    with pytest.raises(SFTError) as caught:
        strategies.check(trainer(strategy), LoRA())
    assert says in str(caught.value)


def test_a_quantized_base_is_not_sharded():
    strategies.check(trainer("ddp"), Quantizing())
    with pytest.raises(SFTError, match="quantized base") as caught:
        strategies.check(trainer(FSDP2Strategy()), Quantizing())
    assert "use ddp" in str(caught.value)


@pytest.mark.parametrize(
    ("adapter", "optimizer", "reason"),
    [
        (LoRA(init="eva"), None, "look at the training rows"),
        (LoRA(), partial(torch.optim.Muon, lr=0.1), "Muon may look at a matrix"),
        (LoRA(), lambda groups: torch.optim.SGD(groups), "the optimizer may look at a matrix"),
    ],
)
def test_what_needs_whole_matrices_is_not_sharded(adapter, optimizer, reason):
    strategies.check(trainer("ddp"), adapter, optimizer)
    strategies.check(trainer("fsdp2"), LoRA(), partial(torch.optim.SGD, momentum=0.9))
    with pytest.raises(SFTError, match=reason) as caught:
        strategies.check(trainer("fsdp2"), adapter, optimizer)
    assert "use ddp" in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--trainer.precision", "16-mixed"], "use bf16-mixed"),
        (["--trainer.precision", "16"], "use bf16-mixed"),
        (["--trainer.precision", "transformer-engine"], "use bf16-mixed, or bf16-true"),
        (["--trainer.precision", "64-true", "--model.adapter", "QLoRA"], "use 32-true, or an adapter"),
        (
            ["--trainer.plugins", "BitsandbytesPrecision", "--trainer.plugins.mode", "nf4"],
            "use model.adapter: QLoRA",
        ),
    ],
)
def test_a_precision_that_lightning_would_change_is_refused(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["fit", "--model.base", "nowhere", "--data.train", "nowhere", "--trainer.accelerator", "cpu"]
    assert main([*command, *arguments]) == 2
    assert says in capsys.readouterr().err
    assert not any(path.is_dir() for path in tmp_path.glob("runs/*"))


def test_a_gpu_without_bfloat16_is_refused(monkeypatch):
    made = trainer("ddp", precision="bf16-mixed")
    monkeypatch.setattr(DDPStrategy, "root_device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    with pytest.raises(SFTError, match="Tesla T4 has no bfloat16"):
        strategies.check(made, LoRA())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    strategies.check(made, LoRA())


def test_loss_scaling_is_not_for_shards(monkeypatch):
    made = trainer("fsdp2")
    monkeypatch.setattr(made._accelerator_connector.precision_plugin, "precision", "16-mixed")
    with pytest.raises(SFTError, match="scale the loss") as caught:
        strategies.check(made, LoRA())
    assert "bf16-mixed" in str(caught.value)
