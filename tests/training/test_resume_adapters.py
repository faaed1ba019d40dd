"""A stopped run goes on bit for bit with every kind of adapter and optimizer, and exports what it has trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from resume_run import Stopped, fit, losses, metrics, same_weights, weights, write_config
from safetensors.torch import load_file

from lightning_sft import SFTError
from lightning_sft.__main__ import main

RUN = Path("runs") / "my-1"


def adapter(name: str, **options: object) -> dict[str, object]:
    return {"adapter": {"class_path": name, "init_args": options}}


def optimizer(name: str, **options: object) -> dict[str, object]:
    return {"optimizer": {"class_path": name, "init_args": options}}


SOME = ["q_proj", "up_proj"]
CASES = {
    "nf4": adapter("QLoRA", r=4, dropout=0.3),
    "int8": adapter("QLoRA", quant_type="int8", r=4),
    "pissa": adapter("LoRA", r=4, init="pissa_fast", dropout=0.3),
    "eva": adapter("LoRA", r=4, init="eva"),
    "corda": adapter("LoRA", r=4, alpha=6, init="corda"),
    "gradual unfreezing": adapter("Freeze", unfreeze_every=4, layer_decay=0.5),
    "prompt tuning": adapter("Peft", config={"class_path": "peft.PromptTuningConfig", "init_args": {
        "num_virtual_tokens": 4}}),
    "random frozen parts": adapter("Peft", config={"class_path": "peft.ShiraConfig", "init_args": {
        "r": 2, "target_modules": SOME}}),
    "8-bit AdamW": optimizer("bitsandbytes.optim.AdamW8bit") | adapter("LoRA", r=32),
    "Muon": optimizer("torch.optim.Muon") | adapter("Full"),
    "Adafactor": optimizer("torch.optim.Adafactor"),
    "Lion": optimizer("bitsandbytes.optim.Lion") | adapter("LoRA", r=4, init="mica", dropout=0.3),
}  # fmt: skip


SLOW = ("int8", "eva", "Adafactor", "Lion")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES]
)
def test_a_stopped_run_goes_on_as_the_one_that_was_not(
    name, tmp_path, monkeypatch, model_folder, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    short = {"max_epochs": 1, "accumulate_grad_batches": 1}
    config = write_config(tmp_path, model_folder("wide"), model=CASES[name], trainer=short, rows=14)
    fit(config, "--trainer.default_root_dir", "whole")
    with pytest.raises(Stopped):
        fit(config, stop="batch_start:4")
    capsys.readouterr()
    fit(config, "--ckpt_path", "last")
    assert "after step 3 " in capsys.readouterr().out
    assert metrics(RUN) == metrics(Path("whole"))
    assert len(losses(RUN)) == 6
    assert same_weights(RUN, Path("whole"))
    checkpoint = torch.load(RUN / "checkpoints" / "last.ckpt", weights_only=True)
    assert (
        main(["export", str(RUN), "--ckpt_path", str(RUN / "checkpoints" / "last.ckpt"), "--output", "again"])
        == 0
    )
    again = load_file("again/model.safetensors" if "Freeze" in str(CASES[name]) or name == "Muon" else
                      "again/adapter_model.safetensors")  # fmt: skip
    exported = weights(RUN)
    assert again.keys() == exported.keys()
    assert all(torch.equal(exported[key], value) for key, value in again.items())
    size = sum(t.numel() for t in checkpoint["state_dict"].values())
    assert 0 < size <= sum(t.numel() for t in exported.values())


@pytest.mark.parametrize(
    "changed", [optimizer("torch.optim.SGD"), optimizer("torch.optim.AdamW", eps=1e-6)], ids=["SGD", "eps"]
)
def test_another_optimizer_is_another_run(changed, tmp_path, monkeypatch, model_folder) -> None:
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path, model_folder("llama"), model=optimizer("torch.optim.AdamW"))
    with pytest.raises(Stopped):
        fit(config, stop="batch_start:3")
    write_config(tmp_path, model_folder("llama"), model=changed)
    with pytest.raises(SFTError, match=r"model\.optimizer: torch\.optim\.adamw\.AdamW"):
        fit(config, "--trainer.default_root_dir", RUN, "--ckpt_path", "last")
