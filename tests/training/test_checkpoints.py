"""Checkpoints hold what is trained and nothing else; the validation loss is that of the tokens."""

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
import transformers
from gradient_dump import load_steps
from lightning.pytorch import Trainer
from safetensors.torch import load_file
from torch.nn import functional as F

from lightning_sft import Renderer, SFTDataModule, SFTError, SFTModule, cli
from lightning_sft.data.prepare import prepare
from lightning_sft.data.sources import Source
from lightning_sft_adapters.full import Full
from lightning_sft_adapters.lora import LoRA
from lightning_sft_losses.cross_entropy import CrossEntropy

LORA = {"class_path": "LoRA", "init_args": {"r": 4, "target_modules": ["q_proj", "v_proj"]}}


def row(number: int, words: int, weight: float = 1.0) -> dict[str, object]:
    return {
        "messages": [
            {"role": "user", "content": f"question {number}"},
            {"role": "assistant", "content": "the user answers " * words, "weight": weight},
        ]
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    """Paths of training and validation rows, the latter of very different lengths and weights."""
    folder = tmp_path_factory.mktemp("data")
    val = zip((20, 1, 33, 2, 7), (1.0, 2.0, 0.5, 0.25, 1.0), strict=True)
    parts = {
        "train": [row(number, 1 + number) for number in range(6)],
        "val": [row(100 + number, words, weight) for number, (words, weight) in enumerate(val)],
    }
    for name, rows in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return {name: str(folder / f"{name}.jsonl") for name in parts}


@pytest.fixture(scope="module")
def configure(data, model_folder, tmp_path_factory):
    """A function from options to the config file of a small run, and the run's folder."""

    def write(*, adapter: object = LORA, epochs: int = 1, rate: float = 0.05, val_batch_size: int = 2):
        folder = tmp_path_factory.mktemp("run")
        dump = {"class_path": "gradient_dump.GradientDump", "init_args": {"folder": str(folder / "steps")}}
        config = {
            "model": {"base": str(model_folder("llama")), "adapter": adapter, "learning_rate": rate},
            "data": {**data, "batch_size": 2, "val_batch_size": val_batch_size},
            "trainer": {
                "accelerator": "cpu",
                "max_epochs": epochs,
                "default_root_dir": str(folder),
                "callbacks": [dump],
                "enable_progress_bar": False,
            },
        }
        path = folder.parent / f"{folder.name}.yaml"
        path.write_text(json.dumps(config))
        return path, folder

    return write


def command(*arguments: object) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "LIGHTNING_SFT_RUN_FOLDER"):
            patch.setenv(variable, "0")  # so that what the run sets is undone
        patch.delenv("LIGHTNING_SFT_RUN_FOLDER")
        cli.run(list(map(str, arguments)))


@pytest.fixture(scope="module")
def lora_run(configure) -> Path:
    """The folder of a LoRA run of one epoch, three steps."""
    config, folder = configure()
    command("fit", "--config", config)
    return folder


def checkpoint_of(folder: Path) -> dict:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def trainer() -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return Trainer(accelerator="cpu", logger=False, **quiet)


def validated(module: SFTModule, data: dict[str, str], **options) -> dict[str, float]:
    checkpoint = options.pop("ckpt_path", None)
    rows = SFTDataModule(val=data["val"], **options)
    (metrics,) = trainer().validate(
        module, datamodule=rows, ckpt_path=checkpoint, verbose=False, weights_only=True
    )
    return metrics


def logged(folder: Path, name: str) -> list[float]:
    with (folder / "metrics.csv").open() as file:
        return [float(line[name]) for line in csv.DictReader(file) if line.get(name)]


# ---------------------------------------------------------------------------------------- checkpoints


def test_a_lora_runs_checkpoint_holds_the_adapters_parameters_and_no_others(lora_run):
    saved = checkpoint_of(lora_run)["state_dict"]
    layers = [f"model.base_model.model.model.layers.{layer}.self_attn" for layer in (0, 1)]
    assert sorted(saved) == sorted(
        f"{layer}.{projection}.lora_{matrix}.default.weight"
        for layer in layers
        for projection in ("q_proj", "v_proj")
        for matrix in "AB"
    )


def test_a_full_runs_checkpoint_holds_every_parameter(configure, model_folder):
    config, folder = configure(adapter="Full", rate=1e-3)
    command("fit", "--config", config)
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    expected = {f"model.{name}" for name, _ in model.named_parameters()}
    assert set(checkpoint_of(folder)["state_dict"]) == expected


def test_what_was_exported_is_what_the_last_checkpoint_holds(lora_run):
    exported = load_file(lora_run / "model" / "adapter_model.safetensors")
    saved = checkpoint_of(lora_run)["state_dict"]
    assert len(exported) == len(saved)
    for name, tensor in saved.items():
        in_peft = name.removeprefix("model.").replace(".default.", ".")
        assert torch.equal(exported[in_peft], tensor), name


def test_validation_of_a_checkpoint_has_the_loss_that_the_run_ended_with(lora_run, data, model_folder):
    last = lora_run / "checkpoints" / "last.ckpt"
    base = str(model_folder("llama"))
    adapted = validated(SFTModule(base, LoRA(**LORA["init_args"])), data, ckpt_path=str(last))
    assert adapted["val/loss"] == pytest.approx(logged(lora_run, "val/loss")[-1], rel=1e-5)
    assert abs(adapted["val/loss"] - validated(SFTModule(base), data)["val/loss"]) > 0.1


def test_fit_from_a_checkpoint_goes_on_with_its_parameters_and_its_step(lora_run, configure):
    checkpoint = checkpoint_of(lora_run)
    assert checkpoint["global_step"] == 3
    config, folder = configure(epochs=2)
    command("fit", "--config", config, "--ckpt_path", lora_run / "checkpoints" / "last.ckpt")
    steps = [ranks[0] for ranks in load_steps(folder / "steps")]
    assert [step["number"] for step in steps] == [3, 4, 5]
    first = steps[0]["parameters"]
    assert first.keys() == checkpoint["state_dict"].keys()
    assert all(torch.equal(first[name], tensor) for name, tensor in checkpoint["state_dict"].items())
    assert any(tensor.abs().max() > 0 for name, tensor in first.items() if "lora_B" in name), (
        "nothing was learned"
    )


@pytest.mark.parametrize(
    "adapter",
    [
        Full(),
        LoRA(r=4, target_modules=["q_proj"]),
        LoRA(r=4, target_modules=["q_proj", "v_proj", "o_proj"]),
        LoRA(r=8, target_modules=["q_proj", "v_proj"]),
    ],
    ids=["Full", "fewer layers", "more layers", "another rank"],
)
def test_a_checkpoint_of_other_parameters_is_refused(adapter, lora_run, data, model_folder):
    last = str(lora_run / "checkpoints" / "last.ckpt")
    with pytest.raises(SFTError, match="checkpoint holds other parameters") as caught:
        validated(SFTModule(str(model_folder("llama")), adapter), data, ckpt_path=last)
    assert caught.value.where == "--ckpt_path"
    assert "self_attn" in caught.value.what or "embed_tokens" in caught.value.what


# ------------------------------------------------------------------------------------ validation loss


@pytest.fixture(scope="module")
def loss_by_hand(data, model_folder, tokenizer):
    """A function from a family to Σ weight · nll / Σ weight of the validation rows, by transformers alone."""
    examples = prepare([Source(data["val"])], Renderer(tokenizer), max_length=None, overlong="drop").examples

    def compute(family: str) -> float:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            model_folder(family), attn_implementation="eager"
        )
        total = count = 0.0
        for example in examples:
            ids, weights = torch.from_numpy(example.input_ids).long(), torch.from_numpy(example.weights)
            with torch.no_grad():
                logits = model(input_ids=ids[None], use_cache=False).logits[0]
            nll = F.cross_entropy(logits[:-1], ids[1:], reduction="none")
            total += float((nll * weights[1:]).sum())
            count += float(weights.sum())
        return total / count

    return compute


@pytest.mark.parametrize("family", ["llama", "bloom"], ids=["flattened", "padded"])
@pytest.mark.parametrize("val_batch_size", [1, 2, 5])
def test_the_validation_loss_is_that_of_the_tokens_whatever_the_batch(
    val_batch_size, family, data, model_folder, loss_by_hand
):
    module = SFTModule(str(model_folder(family)))
    metrics = validated(module, data, val_batch_size=val_batch_size)
    assert (module.layout.padded_because is None) == (family == "llama")
    assert metrics["val/loss"] == pytest.approx(loss_by_hand(family), rel=1e-5)
    assert metrics["val/perplexity"] == pytest.approx(math.exp(loss_by_hand(family)), rel=1e-4)


def test_validation_takes_batch_size_where_it_has_none_of_its_own(data):
    assert SFTDataModule(val=data["val"], batch_size=3).val_batch_size == 3
    assert SFTDataModule(val=data["val"], batch_size=3, val_batch_size=5).val_batch_size == 5


def test_label_smoothing_is_for_training_and_changes_no_validation_loss(data, model_folder, loss_by_hand):
    module = SFTModule(str(model_folder("llama")), loss=CrossEntropy(label_smoothing=0.3))
    assert validated(module, data)["val/loss"] == pytest.approx(loss_by_hand("llama"), rel=1e-5)


def test_validating_twice_gives_the_same_loss_twice(data, model_folder):
    module = SFTModule(str(model_folder("llama")))
    assert validated(module, data) == validated(module, data)


@pytest.mark.slow
def test_the_validation_loss_of_two_ranks_is_that_of_the_tokens_too(configure, loss_by_hand):
    config, folder = configure(adapter="Full", rate=0.0)  # five rows: 2 + 2, then one and a filler
    arguments = ["--config", str(config), "--trainer.strategy", "ddp", "--trainer.devices", "2"]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "lightning_sft", "fit", *arguments],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=folder.parent, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert logged(folder, "val/loss") == [pytest.approx(loss_by_hand("llama"), rel=1e-5)]
    assert logged(folder, "val/perplexity") == [pytest.approx(math.exp(loss_by_hand("llama")), rel=1e-4)]
