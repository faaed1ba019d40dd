"""The main job on real input: a real pre-trained Llama, real instruction rows and real tool calls."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from lightning_sft.__main__ import main

RUNS = {
    "lora-alpaca": ("LoRA", "alpaca_en_demo.json", 2e-3),
    "full-alpaca": ("Full", "alpaca_en_demo.json", 5e-4),
    "lora-tools": ("LoRA", "glaive_toolcall_en_demo.json", 2e-3),
    "full-tools": ("Full", "glaive_toolcall_en_demo.json", 5e-4),
}
ROWS = 200


@pytest.fixture(scope="module", params=RUNS)
def run(request, shared, tmp_path_factory) -> Path:
    """A finished run: one epoch over the file's first rows, cut to the model's context."""
    adapter, file, rate = RUNS[request.param]
    folder = tmp_path_factory.mktemp("runs") / request.param
    code = main(
        [
            "fit",
            f"--model.base={shared}/real/models/stories260k",
            f"--model.adapter={adapter}",
            f"--model.learning_rate={rate}",
            f"--data.train=[{{path: {shared}/real/sft/{file}, limit: {ROWS}}}]",
            "--data.val_split=0.1",
            "--data.overlong=truncate_right",
            "--data.max_lost_fraction=1.0",
            "--data.batch_size=8",
            "--trainer.max_epochs=1",
            "--trainer.gradient_clip_val=1.0",
            "--trainer.val_check_interval=0.5",
            "--trainer.accelerator=cpu",
            f"--trainer.default_root_dir={folder}",
        ]
    )
    assert code == 0
    return folder


def test_validation_loss_falls(run):
    with (run / "metrics.csv").open() as file:
        losses = [float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    assert losses[1] < base_loss(run) - 0.1


def base_loss(run: Path) -> float:
    """The loss of the untouched base on the run's validation rows."""
    from lightning.pytorch import Trainer

    from lightning_sft import SFTDataModule, SFTModule, Source

    config = load_config(run)
    module = SFTModule(base=config["model"]["base"])
    options = ("train", "val_split", "overlong", "max_lost_fraction", "batch_size")
    options = {name: config["data"][name] for name in options}
    data = SFTDataModule(**options | {"train": [Source(options["train"][0]["path"], limit=ROWS)]})
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    return trainer.validate(module, data, verbose=False)[0]["val/loss"]


def load_config(run: Path) -> dict:
    import yaml

    return yaml.safe_load((run / "config.yaml").read_text())


def test_ledger_adds_up_to_the_files_rows_and_tokens(run, shared):
    from lightning_sft import Renderer
    from lightning_sft.data.prepare import prepare
    from lightning_sft.data.sources import Source
    from lightning_sft.training.models import load_tokenizer

    ledger = json.loads((run / "ledger.json").read_text())
    (source,) = ledger["train"]["sources"]
    path = load_config(run)["data"]["train"][0]["path"]
    rows = json.loads(Path(path).read_text())[:ROWS]
    assert source["rows"] == source["conversations"] == len(rows)
    lost = [*source["truncated"].values(), *source["dropped"].values()]
    assert source["tokens"] == source["trained_tokens"] + source["context_tokens"] + sum(
        x["tokens"] for x in lost
    )
    renderer = Renderer(load_tokenizer(f"{shared}/real/models/stories260k"))
    whole = prepare([Source(path, limit=ROWS)], renderer, max_length=None, overlong="drop")
    assert source["tokens"] == sum(len(example) for example in whole.examples)
    assert ledger["train"]["examples"] + ledger["val"]["examples"] == source["examples"]
    kept = ledger["train"]["tokens"] + ledger["val"]["tokens"]
    assert kept == source["trained_tokens"] + source["context_tokens"]


def test_checkpoints_hold_only_what_is_trained(run):
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    names = checkpoint["state_dict"]
    if (run / "model" / "adapter_config.json").exists():
        assert names
        assert all("lora_" in name for name in names)
    else:
        assert "model.model.layers.0.mlp.down_proj.weight" in names


def test_the_exported_model_generates_with_plain_transformers(run, monkeypatch, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.chdir(tmp_path)
    folder = run / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    assert answer.shape[1] > inputs["input_ids"].shape[1]


def test_generate_prints_an_answer(run, capsys):
    assert main(["generate", str(run), "--prompt", "Say hello.", "--max_new_tokens", "10"]) == 0
    assert capsys.readouterr().out.strip()


def test_export_merge_agrees_with_the_unmerged_adapter(run, capsys):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    if not (run / "model" / "adapter_config.json").exists():
        assert main(["export", str(run), "--merge"]) == 2
        assert "nothing to merge" in capsys.readouterr().err
        return
    assert main(["export", str(run), "--merge"]) == 0
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        unmerged = AutoPeftModelForCausalLM.from_pretrained(run / "model")(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(run / "merged")(ids).logits
        base = AutoModelForCausalLM.from_pretrained(load_config(run)["model"]["base"])(ids).logits
    torch.testing.assert_close(merged, unmerged, rtol=1e-4, atol=1e-4)
    assert (merged - base).abs().max() > 0.1
