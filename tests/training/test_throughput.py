"""Tokens per second and FLOPs are the batches' own; a logged loss is exactly that step's."""

from __future__ import annotations

import csv
import json

import pytest
import torch
import transformers
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger

from lightning_sft import SFTDataModule, SFTModule
from lightning_sft.data.batch import Batch
from lightning_sft.training import devices
from lightning_sft.training.throughput import Flops, Throughput

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_checkpointing": False}


def batch(lengths: list[int], targets: int, padded: bool = False) -> Batch:
    total = sum(lengths)
    shape = (len(lengths), max(lengths)) if padded else (1, total)
    offsets = tuple(sum(lengths[:n]) for n in range(len(lengths) + 1))
    return Batch(
        input_ids=torch.zeros(shape, dtype=torch.long), position_ids=torch.zeros(shape, dtype=torch.long),
        attention_mask=None, segments=None if padded else offsets, positions=torch.zeros(targets),
        targets=torch.zeros(targets), weights=torch.ones(targets), num_items=1.0, num_tokens=total, metas=(),
    )  # fmt: skip


class Hand:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_tokens_per_second_leave_out_pauses_and_start_anew_when_taken():
    clock = Hand()
    counter = Throughput(clock)
    counter.add(batch([3, 5], 2))
    clock.now = 1.0
    counter.pause()
    clock.now = 10.0
    counter.resume()
    clock.now = 12.0
    counter.add(batch([4], 2))
    assert counter.take(2) == {"tokens_per_second": 2 * 12 / 3}
    clock.now = 13.0
    counter.add(batch([4], 2))
    assert counter.take(1) == {"tokens_per_second": 4.0}


def llama(tied: bool) -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


LAYER = 8 * 8 + 8 * 4 * 2 + 8 * 8 + 3 * 8 * 12 + 2 * 8  # q, k, v, o, the feed-forward part, two norms
BODY, HEAD = 2 * LAYER + 8, 100 * 8


@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_of_palms_appendix(tied):
    flops = Flops.of(llama(tied))
    assert flops(batch([3, 5], 4)) == 6 * BODY * 8 + 6 * HEAD * 4 + 12 * 2 * 2 * 4 * (3 * 3 + 5 * 5)
    assert flops(batch([4, 4], 4, padded=True)) == 6 * BODY * 8 + 6 * HEAD * 4 + 12 * 2 * 2 * 4 * (4 * 4 * 2)


def test_frozen_parameters_have_no_gradient_of_their_own():
    model = llama(tied=False)
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    assert Flops.of(model)(batch([5], 3)) == 4 * BODY * 5 + 6 * HEAD * 3 + 12 * 2 * 2 * 4 * 25


def test_mfu_is_the_share_of_the_peak():
    clock = Hand()
    counter = Throughput(clock)
    model = llama(tied=True)
    counter.meter(model, peak=1e6)
    counter.add(batch([3, 5], 4))
    clock.now = 2.0
    assert counter.take(4)["mfu"] == pytest.approx(Flops.of(model)(batch([3, 5], 4)) / 2e6)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L4", 121e12), ("NVIDIA L40S", 362e12), ("Tesla T4", None),
    ],
)  # fmt: skip
def test_the_peak_of_a_device_goes_by_its_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert devices.peak_flops(torch.device("cuda")) == peak


def test_where_the_peak_or_the_active_parameters_are_unknown_there_is_no_mfu():
    assert devices.peak_flops(torch.device("cpu")) is None
    counter = Throughput()
    counter.meter(llama(tied=True), peak=None)
    assert counter.flops is None
    experts = transformers.MixtralConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    counter.meter(transformers.MixtralForCausalLM(experts), peak=1e12)
    assert counter.flops is None


class EveryLoss(Callback):
    """Computes the loss of every step again, before it is taken, and counts what is logged."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.window = 0.0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        with torch.no_grad():
            self.window += float(pl_module.weighted_loss(batch, pl_module.loss)) / batch.num_items
        if (
            batch_idx + 1
        ) % trainer.accumulate_grad_batches == 0 or trainer.fit_loop.epoch_loop._is_training_done:
            self.losses.append(self.window)
            self.window = 0.0


@pytest.fixture
def rows(tmp_path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "\n".join(json.dumps({"instruction": f"say {n}", "output": f"{n} " * (n + 1)}) for n in range(24))
    )
    return str(path)


@pytest.mark.parametrize(("every", "logged"), [(1, list(range(12))), (5, [4, 9]), (100, [])])
def test_a_logged_loss_is_exactly_that_steps_and_other_steps_log_nothing(
    tmp_path, model_folder, rows, every, logged
):
    module = SFTModule(base=str(model_folder("llama")), learning_rate=1e-2)
    witness = EveryLoss()
    trainer = Trainer(
        max_epochs=1, accumulate_grad_batches=2, log_every_n_steps=every, callbacks=[witness],
        logger=CSVLogger(tmp_path, name="", version=""), enable_model_summary=False, **QUIET,
    )  # fmt: skip
    trainer.fit(module, SFTDataModule(train=rows, batch_size=1))
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(witness.losses[-1], rel=1e-5)
    path = tmp_path / "metrics.csv"
    found = list(csv.DictReader(path.open())) if path.exists() else []
    assert [int(row["step"]) for row in found] == logged
    for row in found:
        assert float(row["train/loss"]) == pytest.approx(witness.losses[int(row["step"])], rel=1e-5)
        assert float(row["train/tokens_per_second"]) > 0


def test_mixed_bfloat16_is_clipped_with_the_fused_optimizer(model_folder, rows):
    module = SFTModule(base=str(model_folder("llama")))
    trainer = Trainer(
        max_steps=2,
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        logger=False,
        enable_model_summary=False,
        **QUIET,
    )
    trainer.fit(module, SFTDataModule(train=rows, batch_size=4))
    assert trainer.optimizers[0].param_groups[0]["fused"]
