"""Loading: what is handled, and what the messages for the Hub's refusals say."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from lightning.pytorch import Trainer

from lightning_sft import SFTError, SFTModule
from lightning_sft.training.models import context_length, load_model, load_tokenizer


def refusal(kind: type[Exception]) -> OSError:
    """What transformers raises when the Hub refuses: an OSError with the Hub's error as its cause."""
    hub_error = kind("refused", response=SimpleNamespace(headers={}, status_code=403, request=None, text=""))
    error = OSError("You are trying to access a gated repo, or something else.")
    error.__cause__ = hub_error
    return error


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("GatedRepoError", "gated"),
        ("RepositoryNotFoundError", "no such repository on the Hub, or it is private"),
    ],
)
def test_a_refused_repository_is_told_apart_and_names_hf_token(kind, says, monkeypatch):
    import huggingface_hub.errors

    def refuse(*args, **kwargs):
        raise refusal(getattr(huggingface_hub.errors, kind))

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)
    with pytest.raises(SFTError) as caught:
        load_tokenizer("someone/something")
    assert says in caught.value.what
    assert "HF_TOKEN" in str(caught.value.fix)
    assert "someone/something" in str(caught.value.where)


def test_an_unreachable_hub_names_the_ways_out():
    with pytest.raises(SFTError) as caught:
        load_tokenizer("nobody/nothing-at-all")
    assert "HF_TOKEN" in str(caught.value.fix)
    assert "local model folder" in str(caught.value.fix)


def test_revision_and_trust_are_passed_on(monkeypatch, tokenizer):
    seen = {}

    def load(name, **options):
        seen.update(options)
        return tokenizer

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", load)
    module = SFTModule(base="some/model", revision="abc123")
    assert module.tokenizer is tokenizer
    assert seen == {"revision": "abc123", "trust_remote_code": False}


def test_a_missing_pad_token_becomes_eos(model_folder, tmp_path, tokenizer):
    folder = shutil.copytree(model_folder("llama"), tmp_path / "model")
    bare = transformers.AutoTokenizer.from_pretrained(folder)
    bare.pad_token = None
    bare.save_pretrained(folder)
    loaded = load_tokenizer(str(folder))
    assert loaded.pad_token == loaded.eos_token == "<|endoftext|>"


def test_the_tokenizer_can_be_another_one(model_folder, tmp_path):
    other = shutil.copytree(model_folder("llama"), tmp_path / "other")
    changed = transformers.AutoTokenizer.from_pretrained(other)
    changed.chat_template = "changed"
    changed.save_pretrained(other)
    module = SFTModule(base=str(model_folder("llama")), tokenizer=str(other))
    assert module.tokenizer.chat_template == "changed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_are_loaded_as_asked_and_in_training_mode(dtype, model_folder):
    model = load_model(str(model_folder("llama")), dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model.training


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("32-true", torch.float32),
        ("bf16-mixed", torch.float32),
        ("bf16-true", torch.bfloat16),
        ("64-true", torch.float64),
    ],
)
def test_the_trainers_precision_decides_the_type_of_the_weights(precision, dtype, model_folder):
    module = SFTModule(base=str(model_folder("llama")))
    module._trainer = Trainer(
        accelerator="cpu", precision=precision, logger=False, enable_checkpointing=False
    )
    module.configure_model()
    assert {parameter.dtype for parameter in module.model.parameters()} == {dtype}


def test_context_is_the_models_and_the_tokenizers_only_where_the_model_does_not_say(tokenizer):
    from conftest import CONTEXT, tiny_config

    config = tiny_config("llama", len(tokenizer))
    config.max_position_embeddings = 4 * CONTEXT
    assert context_length(config, tokenizer) == 4 * CONTEXT
    assert context_length(tiny_config("gpt2", len(tokenizer)), tokenizer) == CONTEXT
    assert context_length(tiny_config("mamba", len(tokenizer)), tokenizer) == tokenizer.model_max_length


def test_a_remote_model_class_is_not_run_unasked(model_folder, tmp_path):
    import json

    folder = shutil.copytree(model_folder("llama"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "evil"
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('remote code was run')")
    with pytest.raises(SFTError):
        SFTModule(base=str(folder)).configure_model()
