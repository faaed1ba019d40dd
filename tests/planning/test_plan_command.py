"""`lightning-sft plan`: exact counts, memory by device, and changes that are planned too."""

from __future__ import annotations

import json
import re

import pytest

from lightning_sft.__main__ import main
from lightning_sft.planning.estimate import Sharding
from lightning_sft.training import devices
from lightning_sft.training.peak_memory import Peak


@pytest.fixture
def config(tmp_path, model_folder):
    rows = [{"instruction": f"say {n}", "output": f"{n} " * (n % 9 + 1)} for n in range(23)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    path = tmp_path / "my.yaml"
    path.write_text(
        f"model: {{base: {model_folder('llama')}}}\ndata: {{train: {data}, batch_size: 4}}\n"
        "trainer: {max_epochs: 2, accelerator: cpu, "
        "callbacks: [{class_path: lightning.pytorch.callbacks.ModelSummary}]}\n"
    )
    return path


def plan(capfd, *argv):
    assert main(["plan", *map(str, argv), "--json"]) == 0, capfd.readouterr().err
    return json.loads(capfd.readouterr().out)


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--trainer.accumulate_grad_batches=2", "--trainer.limit_train_batches=0.5"),
        ("--data.batch_tokens=64",),
        ("--trainer.max_steps=7", "--data.packing=true"),
        ("--model.adapter=LoRA", "--data.val_split=0.2"),
    ],
)
def test_steps_and_tokens_are_those_of_the_run(options, capfd, config, monkeypatch):
    from lightning_sft import SFTModule

    seen, step, started = [], SFTModule.training_step, []

    def counted(self, batch, batch_idx):
        seen.append((batch.num_tokens, len(batch.targets)))
        started.append(self)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(SFTModule, "training_step", counted)
    told = plan(capfd, "--config", config, *options)
    assert seen == []
    root = config.parent / "run"
    assert main(["fit", "--config", str(config), *options, f"--trainer.default_root_dir={root}"]) == 0
    assert told["tokens"] == sum(tokens for tokens, _ in seen)
    assert told["targets"] == sum(targets for _, targets in seen)
    module = started[0]
    assert told["steps"] == module.trainer.global_step
    assert told["parameters"] == sum(p.numel() for p in module.loaded.parameters())
    assert told["trained"] == sum(p.numel() for p in module.loaded.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("optimizer", "bytes_per_value"),
    [("bitsandbytes.optim.AdamW8bit", 2.0), ("bitsandbytes.optim.Lion", 4.0), ("torch.optim.Adafactor", 0.1)],
)
def test_other_optimizers_are_planned_by_what_they_keep(optimizer, bytes_per_value, capfd, config):
    told = plan(capfd, "--config", config, f"--model.optimizer={optimizer}")
    state = told["devices"][0]["parts"]["optimizer"]
    assert state == pytest.approx(bytes_per_value * told["trained"], abs=0.2 * told["trained"])


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_where_an_adapter_begins_takes_no_other_room(init, capfd, config):
    options = ["--model.adapter=LoRA", "--model.adapter.r=4"]
    plain, found = (
        plan(capfd, "--config", config, *options, *more) for more in ([], [f"--model.adapter.init={init}"])
    )
    assert found["trained"] == plain["trained"] > 0
    for part in ("weights", "gradients", "optimizer", "activations"):
        assert found["devices"][0]["parts"][part] == plain["devices"][0]["parts"][part], part


def test_the_rate_of_each_group_is_told(capfd, config):
    options = ["--model.adapter=Full", "--model.adapter.layer_decay=0.5", "--model.learning_rate=1e-3"]
    options.append("--model.adapter.unfreeze_every=3")
    rates = plan(capfd, "--config", config, *options)["learning_rates"]
    found = [re.fullmatch(r"(.+?) +(\S+)  [\d,]+ parameters.*", line) for line in rates]
    assert [(each[1], float(each[2])) for each in found] == [
        ("embeddings", 2.5e-4), ("block 0", 5e-4), ("block 1", 1e-3), ("head and final norm", 1e-3)
    ]  # fmt: skip
    assert [line.rpartition("from step ")[2] for line in rates][:3] == ["10", "7", "4"]
    assert main(["plan", "--config", str(config), *options]) == 0
    shown = capfd.readouterr().out
    assert all(" ".join(line.split()) in " ".join(shown.split()) for line in rates)
    assert main(["plan", "--config", str(config)]) == 0
    assert "rates" not in capfd.readouterr().out


def test_devices_are_planned_side_by_side_and_changes_where_it_does_not_fit(capfd, config):
    told = plan(capfd, "--config", config, "--gpu", "h100-80gb,rtx-4090", "--device-memory", "1MiB")
    names = [each["device"] for each in told["devices"]]
    assert names == ["this machine", "h100-80gb", "rtx-4090-24gb", "1MiB"]
    assert [each["fits"] for each in told["devices"]] == [True, True, True, False]
    assert all(each["total"] == sum(each["parts"].values()) for each in told["devices"])
    assert told["devices"][1]["seconds"] < told["devices"][2]["seconds"]
    said = [each["change"] for each in told["changes"]]
    for option in (
        *(
            "gradient_checkpointing",
            "batch_size: 1",
            "AdamW8bit",
            "bf16-true",
            "adapter: LoRA",
            "all of these",
        ),
    ):
        assert any(option in change for change in said), option
    needs = {change["change"]: change["devices"][0]["total"] for change in told["changes"]}
    assert needs["all of these"] == min(needs.values()) < told["devices"][3]["total"]


def test_the_terminal_tells_it_in_80_columns(capfd, config, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["plan", "--config", str(config), "--gpu", "a100-40gb", "--device-memory", "1MiB"]) == 0
    text = capfd.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    for said in ("parameters", "optimizer", "a100-40gb", "too much", "fits", "What to change", "advice: "):
        assert said in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--gpu", "h10-80gb"), "did you mean h100-80gb?"),
        (("--device-memory", "much"), "'much' is no size"),
        (("--model.base", "no/such/model"), "model.base"),
        (("--trainer.strategy", "deepspeed_stage_2", "--trainer.devices", "2"), "deepspeed_stage_2"),
        (("--trainer.strategy", "dpp"), "did you mean ddp?"),
        (("--trainer.precision", "transformer-engine"), "use bf16-mixed"),
    ],
)
def test_mistakes_are_told(options, message, capfd, config):
    assert main(["plan", "--config", str(config), *options]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert message in err
    assert "Traceback" not in err


def test_sharding_by_hand():
    peak = Peak({"weights": 80, "gradients": 80, "optimizer": 160, "activations": 7}, 20, 20, 30)
    assert Sharding.of("ddp", 1).parts(peak) == peak.parts
    assert Sharding.of("ddp", 4).parts(peak) == peak.parts | {"gradients": 160}
    sharded = {"weights": 20 + 30, "gradients": 20, "optimizer": 40, "activations": 7}
    assert Sharding.of("fsdp2", 4).parts(peak) == Sharding.of("FSDP2Strategy", 4).parts(peak) == sharded


def test_sizes_and_names():
    assert devices.of_size("24GiB").memory == 24 << 30
    assert devices.of_size("80 GB").memory == 80 * 10**9
    assert devices.named("RTX 4090") is devices.named("rtx-4090-24gb")
    assert len({gpu.name for gpu in devices.GPUS}) == len(devices.GPUS)
