"""`verify` passes what a run exported, and notices whatever was changed in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lightning_sft import SFTError
from lightning_sft.export import export
from lightning_sft.verify import verify


@pytest.fixture
def copy(tuned_runs, tmp_path):
    """A function that copies a run."""

    def copied(adapter: str) -> Path:
        return Path(shutil.copytree(tuned_runs[adapter], tmp_path / adapter))

    return copied


@pytest.mark.parametrize("adapter", ["LoRA", "Full"])
def test_what_a_run_exported_passes(adapter, tuned_runs, capsys):
    verify(str(tuned_runs[adapter]))
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


def test_a_merged_model_is_as_near_as_its_quantised_base_was_exact(copy):
    run = copy("LoRA")
    golden = json.loads((run / "goldens.json").read_text())
    assert golden["quantized"] is False
    golden["loss"] *= 1.01
    for quantized in (True, False):
        (run / "goldens.json").write_text(json.dumps({**golden, "quantized": quantized}))
        if quantized:
            verify(str(run))
    with pytest.raises(SFTError, match="loss on"):
        verify(str(run))


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
