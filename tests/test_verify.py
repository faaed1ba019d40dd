"""`verify` passes what a run exported, and notices whatever was changed in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_sft import SFTError, cli
from lightning_sft.export import export
from lightning_sft.verify import verify


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model_folder) -> dict[str, Path]:
    """A run folder of each adapter."""
    folder = tmp_path_factory.mktemp("verify")
    rows = [{"instruction": f"say {n}", "output": "how are you? " * (1 + n % 3)} for n in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {}
    for adapter in ("LoRA", "Full"):
        with pytest.MonkeyPatch.context() as patch:
            for variable in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "LIGHTNING_SFT_RUN_FOLDER"):
                patch.setenv(variable, "0")
            patch.delenv("LIGHTNING_SFT_RUN_FOLDER")
            options = {
                "model.base": model_folder("llama"), "model.adapter": adapter, "model.learning_rate": 0.01,
                "data.train": folder / "rows.jsonl", "data.val_split": 4, "data.batch_size": 4,
                "trainer.accelerator": "cpu", "trainer.max_steps": 2, "trainer.default_root_dir": folder / adapter,
                "trainer.enable_progress_bar": False,
            }  # fmt: skip
            cli.run(["fit", *(f"--{key}={value}" for key, value in options.items())])
        found[adapter] = folder / adapter
    return found


@pytest.fixture
def copy(runs, tmp_path):
    """A function that copies a run."""

    def copied(adapter: str) -> Path:
        return Path(shutil.copytree(runs[adapter], tmp_path / adapter))

    return copied


@pytest.mark.parametrize("adapter", ["LoRA", "Full"])
def test_what_a_run_exported_passes(adapter, runs, capsys):
    verify(str(runs[adapter]))
    said = capsys.readouterr().out
    assert [line[:6].strip() for line in said.splitlines()] == ["ok"] * 3
    assert "loss on 4 val examples" in said


def test_a_merged_model_passes_too_and_another_type_within_its_precision(copy, tmp_path, capsys):
    run = copy("LoRA")
    export(str(run), merge=True)
    verify(str(run / "merged"))
    export(str(run), str(tmp_path / "half"), merge=True, dtype="bfloat16")
    verify(str(tmp_path / "half"), str(run / "goldens.json"))
    with pytest.raises(SFTError, match="loss on 4 val examples"):
        verify(str(tmp_path / "half"), str(run / "goldens.json"), tolerance=1e-7)


def _weights(model: Path) -> None:
    path = next(model.glob("*.safetensors"))
    tensors = load_file(path)
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name] = tensors[name] + 0.05 * torch.randn(tensors[name].shape)
    save_file(tensors, path, metadata={"format": "pt"})


def _template(model: Path) -> None:
    path = model / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_end|>", " <|im_end|>"))


def _tokenizer(model: Path) -> None:
    path = model / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = content["model"]["merges"][3:]
    path.write_text(json.dumps(content))


def _stops(model: Path) -> None:
    path = model / "generation_config.json"
    content = json.loads(path.read_text())
    content["eos_token_id"] = 5
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("adapter", ["LoRA", "Full"])
@pytest.mark.parametrize(
    ("change", "failed"),
    [(_weights, "loss on"), (_template, "tokens"), (_tokenizer, "tokens"), (_stops, "stop tokens")],
)
def test_a_changed_model_fails(change, failed, adapter, copy, capsys):
    run = copy(adapter)
    change(run / "model")
    with pytest.raises(SFTError, match=failed):
        verify(str(run))
    assert "FAILED" in capsys.readouterr().out


def test_without_goldens_it_says_where_they_are(copy, tmp_path):
    run = copy("Full")
    shutil.copytree(run / "model", tmp_path / "elsewhere" / "model")
    with pytest.raises(SFTError, match=r"no goldens.json") as caught:
        verify(str(tmp_path / "elsewhere" / "model"))
    assert "--goldens_file" in (caught.value.fix or "")
    (run / "goldens.json").write_text("{")
    with pytest.raises(SFTError, match="can't be read"):
        verify(str(run))
