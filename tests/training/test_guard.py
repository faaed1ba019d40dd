"""No bad number reaches the weights, the rows it came from are named, and memory errors say what helps."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bad_losses import BadAt
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from lightning_sft import SFTDataModule, SFTError, SFTModule, cli
from lightning_sft.training import guard
from lightning_sft.training.guard import MOST_SKIPPED, refuse_bad_weights
from lightning_sft.training.memory import is_out_of_memory
from lightning_sft_adapters.lora import LoRA

BAD = "🙂"
ROWS, SIZE = 12, 2


@pytest.fixture(scope="module")
def token(tokenizer) -> int:
    """A token that only the bad row trains."""
    plain = {id for n in range(100) for id in tokenizer(f"say {n} " * 3)["input_ids"]}
    return next(id for id in tokenizer(BAD)["input_ids"] if id not in plain)


def write(path: Path, bad: set[int]) -> str:
    """Twelve rows, of which those numbers (from 1) are bad."""
    rows = [{"instruction": f"say {n}", "output": f"{n} " * 3 + BAD * (n in bad)} for n in range(1, ROWS + 1)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture
def rows(tmp_path) -> str:
    return write(tmp_path / "rows.jsonl", {5})


class States(Callback):
    """Weights and optimizer state after each step (and before the first), and what was logged."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.rows: list[list[int]] = [[]]
        self.logged: list[dict[str, float]] = []

    def on_train_start(self, trainer, pl_module):
        self.states.append(self.state(trainer, pl_module))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.rows[-1] += [meta.row for meta in batch.metas]
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.states.append(self.state(trainer, pl_module))
            self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})
            self.rows.append([])

    @staticmethod
    def state(trainer, module) -> dict[str, Tensor]:
        found = {name: p.detach().clone() for name, p in module.named_parameters()}
        for number, state in enumerate(trainer.optimizers[0].state.values()):
            found |= {f"{number} {name}": torch.as_tensor(value).clone() for name, value in state.items()}
        return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether nothing differs; averages that weren't there yet count as zero."""
    zeros = all(not (one.get(name, other.get(name))).any() for name in one.keys() ^ other.keys())
    return zeros and all(torch.equal(one[name], other[name]) for name in one.keys() & other.keys())


class Plain(SFTModule):
    """With an optimizer that doesn't know `found_inf`."""

    def configure_optimizers(self):
        made = super().configure_optimizers()
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)
        return {
            **made,
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
        }


def fit(folder, rows: str, loss, policy: str, *, kind=SFTModule, plugins=None, **options) -> States:
    module = kind(
        base=str(folder), loss=loss, on_bad_loss=policy, preflight=False, learning_rate=1e-2, weight_decay=0.1
    )
    states = States()
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False, callbacks=[states], plugins=plugins,
        **{"max_epochs": 1, "log_every_n_steps": 1, **options},
    )  # fmt: skip
    try:
        trainer.fit(module, SFTDataModule(train=rows, batch_size=SIZE))
    except SFTError as error:
        states.error = error
    states.module, states.trainer = module, trainer
    return states


def bad_step(states: States) -> int:
    return next(number for number, rows in enumerate(states.rows) if 5 in rows)


KINDS = [SFTModule, Plain]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("how", ["nan", "inf", "value", "gradient"])
@pytest.mark.parametrize("kind", KINDS)
def test_skip_leaves_weights_and_averages_bit_for_bit_as_they_were(
    kind, how, accumulate, model_folder, rows, token
):
    run = fit(
        model_folder("llama"), rows, BadAt(token, how), "skip", kind=kind, accumulate_grad_batches=accumulate
    )
    number = bad_step(run)
    assert len(run.states) == ROWS // SIZE // accumulate + 1
    for step, (before, after) in enumerate(zip(run.states, run.states[1:], strict=False)):
        assert same(before, after) == (step == number), step
        assert all(value.isfinite().all() for value in after.values())
    assert [logged["train/skipped_steps"] for logged in run.logged][-1] == 1
    assert run.module.watch.skipped == 1
    assert math.isfinite(run.logged[number]["train/loss"]) == (how == "gradient")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["nan", "gradient"])
def test_stop_comes_before_the_step_and_names_the_rows_of_the_bad_micro_batch(
    kind, how, model_folder, rows, token
):
    run = fit(model_folder("llama"), rows, BadAt(token, how), "stop", kind=kind, accumulate_grad_batches=2)
    good = fit(model_folder("llama"), rows, BadAt(-1), "stop", kind=kind, accumulate_grad_batches=2)
    number = next(n for n, window in enumerate(good.rows) if 5 in window)
    window = good.rows[number]
    half = window[:SIZE] if 5 in window[:SIZE] else window[SIZE:]
    named = half if how == "nan" else window  # a gradient is of the whole step
    assert run.error.where == "; ".join(f"{rows}, row {row}" for row in named)
    assert f"of step {number + 1} is {'nan' if how == 'nan' else 'not finite'}" in run.error.what
    assert "on_bad_loss: skip" in run.error.fix
    assert same(States.state(run.trainer, run.module), good.states[number])
    assert not same(good.states[number], good.states[number + 1])


@pytest.mark.parametrize("policy", ["skip", "stop"])
@pytest.mark.parametrize("kind", KINDS)
def test_where_answers_stay_on_the_device_the_bad_step_is_left_out_and_told_later(
    policy, kind, model_folder, rows, token, monkeypatch
):
    monkeypatch.setattr(guard, "_known_at_once", lambda answer: False)
    run = fit(
        model_folder("llama"), rows, BadAt(token), policy, kind=kind, log_every_n_steps=ROWS, max_epochs=1
    )
    number = bad_step(run) if policy == "skip" or kind is SFTModule else len(run.states) - 1
    if policy == "skip":
        assert run.module.watch.skipped == 1
        assert [same(*pair) for pair in zip(run.states, run.states[1:], strict=False)].index(True) == number
    else:
        assert f"step {number + 1} is nan" in run.error.what
        assert f"{rows}, row 5" in run.error.where
        steps = ROWS // SIZE if kind is SFTModule else number
        assert len(run.states) == steps + 1, "fused: told at the end of the epoch; else: at once"


def test_too_many_bad_steps_in_a_row_stop_a_run_that_skips(model_folder, tmp_path, token):
    rows = write(tmp_path / "rows.jsonl", set(range(1, ROWS + 1)))
    run = fit(model_folder("llama"), rows, BadAt(token), "skip", max_epochs=5)
    assert f"as in {MOST_SKIPPED} steps before it" in run.error.what
    assert run.trainer.global_step == MOST_SKIPPED
    assert same(run.states[0], run.states[-1])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_that_overflow_under_loss_scaling_are_for_the_scaler(kind, model_folder, rows, token):
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**14))
    run = fit(model_folder("llama"), rows, BadAt(token, "overflows"), "stop", kind=kind, plugins=[precision])
    assert not hasattr(run, "error")
    assert precision.scaler.get_scale() < 2.0**14, "no teeth: nothing has overflowed"
    assert all(p.isfinite().all() for p in run.module.parameters())


@pytest.mark.parametrize("how", ["nan", "value"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_loss_under_loss_scaling_is_skipped_or_stops_the_run(kind, how, model_folder, rows, token):
    def scaled():
        return [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1.0))]

    run = fit(model_folder("llama"), rows, BadAt(token, how), "skip", kind=kind, plugins=scaled())
    number = bad_step(run)
    assert run.module.watch.skipped == 1
    assert [same(*pair) for pair in zip(run.states, run.states[1:], strict=False)].index(True) == number
    run = fit(model_folder("llama"), rows, BadAt(token, how), "stop", kind=kind, plugins=scaled())
    assert "is nan" in run.error.what


# ------------------------------------------------------------------------------------------ what is written


def test_a_stopped_run_has_no_model_and_its_last_checkpoint_is_that_of_the_last_good_epoch(
    model_folder, tmp_path, token, monkeypatch
):
    """Validation and its checkpoint come every three steps; the bad row is in the second half."""
    base, run = str(model_folder("llama")), tmp_path / "run"
    data = SFTDataModule(train=write(tmp_path / "rows.jsonl", set()), batch_size=SIZE)
    module = SFTModule(base=base, preflight=False)
    quiet = {"enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}
    Trainer(accelerator="cpu", logger=False, max_steps=1, **quiet).fit(module, data)
    order = [
        data.prepared["train"].examples[r].meta.row for micro in data.plan(0).rank(0) for r in micro.rows
    ]
    config = {
        "model": {
            "base": base,
            "loss": {"class_path": "bad_losses.BadAt", "init_args": {"token": token}},
            "preflight": False,
        },
        "data": {"train": write(tmp_path / "rows.jsonl", {order[-1]}), "batch_size": SIZE},
        "trainer": {
            "accelerator": "cpu", "max_epochs": 1, "default_root_dir": str(run), "enable_progress_bar": False,
            "callbacks": [
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                 "init_args": {"dirpath": str(run / "checkpoints"), "save_last": True, "every_n_train_steps": 3}}
            ],
        },
    }  # fmt: skip
    path = tmp_path / "bad.yaml"
    path.write_text(json.dumps(config))
    for variable in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "LIGHTNING_SFT_RUN_FOLDER"):
        monkeypatch.setenv(variable, "0")
    monkeypatch.delenv("LIGHTNING_SFT_RUN_FOLDER")
    with pytest.raises(SFTError, match="the loss of step 6 is nan") as caught:
        cli.run(["fit", "--config", str(path)])
    assert f"row {order[-1]}" in caught.value.where
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 3
    assert all(tensor.isfinite().all() for tensor in saved["state_dict"].values())
    assert not list(run.glob("model*"))


def test_weights_that_are_not_numbers_are_not_written(model_folder, tmp_path):
    module = SFTModule(base=str(model_folder("llama")), adapter=LoRA(r=2))
    module.configure_model()
    frozen = next(p for p in module.model.parameters() if not p.requires_grad)
    frozen.data[0, 0] = float("nan")  # the base's own; not what is written
    refuse_bad_weights(module)
    name, trained = next((n, p) for n, p in module.named_parameters() if p.requires_grad)
    trained.data[0, 0] = float("inf")
    with pytest.raises(SFTError, match="NaN or infinite") as caught:
        module.export(tmp_path / "model")
    assert name in caught.value.what
    assert not (tmp_path / "model").exists()
    with pytest.raises(SFTError, match="NaN or infinite"):
        module.on_save_checkpoint({"state_dict": module.state_dict()})


# -------------------------------------------------------------------------------------------- two processes


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_ranks_agree_on_a_bad_row_that_only_one_of_them_has(policy, model_folder, tmp_path, token):
    rows = write(tmp_path / "rows.jsonl", {5})
    config = {
        "model": {
            "base": str(model_folder("llama")), "on_bad_loss": policy, "preflight": policy == "skip",
            "loss": {"class_path": "bad_losses.BadAt", "init_args": {"token": token}},
        },
        "data": {"train": rows, "batch_size": 1},
        "trainer": {
            "accelerator": "cpu", "max_epochs": 1, "default_root_dir": str(tmp_path / "run"), "strategy": "ddp",
            "devices": 2, "enable_progress_bar": False, "log_every_n_steps": 1,
        },
    }  # fmt: skip
    (tmp_path / "bad.yaml").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-m", "lightning_sft", "fit", "--config", str(tmp_path / "bad.yaml")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    output = done.stdout + done.stderr
    if policy == "stop":
        assert done.returncode == 2
        assert output.count("is nan") == 1, "one of the ranks says it"
        assert "Traceback" not in output
        assert "row 5" in output
        assert not (tmp_path / "run" / "model").exists()
    else:
        assert done.returncode == 0, output
        with (tmp_path / "run" / "metrics.csv").open() as file:
            counted = [float(line["train/skipped_steps"]) for line in csv.DictReader(file)]
        assert counted[-1] == 1
        assert len(counted) == ROWS // 2
        assert (tmp_path / "run" / "model").exists()


# ---------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("preflight", [True, False], ids=["in preflight", "in training"])
@pytest.mark.parametrize("how", ["cuda", "cpu"])
def test_too_little_memory_is_told_with_the_batch_and_what_helps(
    how, preflight, model_folder, tmp_path, token
):
    rows = write(tmp_path / "rows.jsonl", set(range(1, ROWS + 1)))
    module = SFTModule(base=str(model_folder("llama")), loss=BadAt(token, how), preflight=preflight)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, max_epochs=1)
    tried = "1 row" if preflight else "4 rows"
    with pytest.raises(SFTError, match=f"out of memory at a batch of {tried}") as caught:
        trainer.fit(module, SFTDataModule(train=rows, batch_size=4))
    batch = module.watch.batch
    longest = max(b - a for a, b in zip(batch.segments, batch.segments[1:], strict=False))
    assert f"{batch.num_tokens} tokens (the longest {longest})" in caught.value.what
    assert f"{len(batch.targets)} of them trained" in caught.value.what
    assert "GiB for weights" in caught.value.what
    for option in ("batch_size", "max_length", "gradient_checkpointing", "LoRA", "precision"):
        assert option in caught.value.fix
    assert caught.value.where == "cpu"


def test_what_is_done_already_is_not_suggested(model_folder, tmp_path, token):
    rows = write(tmp_path / "rows.jsonl", set(range(1, ROWS + 1)))
    module = SFTModule(
        base=str(model_folder("llama")),
        loss=BadAt(token, "cpu"),
        adapter=LoRA(r=2),
        gradient_checkpointing=True,
    )
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, max_epochs=1, precision="bf16-true"
    )
    with pytest.raises(SFTError, match="out of memory") as caught:
        trainer.fit(module, SFTDataModule(train=rows, batch_size=4))
    for option in ("gradient_checkpointing", "LoRA", "precision"):
        assert option not in caught.value.fix


@pytest.mark.parametrize("where", ["backward", "step"])
def test_memory_that_fails_after_the_forward_pass_is_told_too(where, model_folder, rows, monkeypatch):
    def fails(self, closure=None, **kwargs):
        if closure is not None:
            closure()
        raise torch.OutOfMemoryError("CUDA out of memory.")

    if where == "backward":
        monkeypatch.setattr(Tensor, "backward", fails)
    else:
        monkeypatch.setattr(torch.optim.AdamW, "step", fails)
    module = SFTModule(base=str(model_folder("llama")))
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, max_epochs=1)
    with pytest.raises(SFTError, match="out of memory at a batch of 2 rows"):
        trainer.fit(module, SFTDataModule(train=rows, batch_size=2))


def test_another_runtime_error_is_left_as_it_is(model_folder, rows, token):
    module = SFTModule(base=str(model_folder("llama")), loss=BadAt(token, "another"), preflight=False)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, max_epochs=1)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        trainer.fit(module, SFTDataModule(train=rows, batch_size=2))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."), True),
        (RuntimeError("shapes"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_too_little_memory(error, expected):
    assert is_out_of_memory(error) is expected


def test_a_real_allocation_that_fails_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
