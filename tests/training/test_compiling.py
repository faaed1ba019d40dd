"""Compiled blocks compute what the model computes, and new lengths don't compile them again."""

from __future__ import annotations

import json
import os

import pytest
import torch
import transformers
from lightning.pytorch import Trainer
from torch._dynamo.utils import counters
from torch.nn import functional as F

from lightning_sft import SFTDataModule, SFTError, SFTModule
from lightning_sft.training.attention import Segments
from lightning_sft.training.compiling import blocks_of, compile_blocks
from lightning_sft.training.layout import find_layout
from lightning_sft.training.models import keeping_compilers


@pytest.fixture
def model(model_folder):
    """A function from a family's name to its tiny model, on segment attention."""
    torch._dynamo.reset()

    def load(name: str):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            model_folder(name), dtype=torch.float32
        ).train()
        assert find_layout(loaded, 0).padded_because is None
        return loaded

    return load


def loss_of(model, lengths: list[int]) -> torch.Tensor:
    torch.manual_seed(sum(lengths))
    ids = torch.randint(model.config.vocab_size, (1, sum(lengths)))
    offsets = tuple(sum(lengths[:n]) for n in range(len(lengths) + 1))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    hidden = model.model(input_ids=ids, position_ids=positions, segments=Segments(offsets), use_cache=False)[
        0
    ]
    return F.cross_entropy(model.lm_head(hidden)[0, :-1], ids[0, 1:])


@pytest.mark.parametrize("family", ["llama", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_gradients_are_those_of_the_model_as_it_is_and_new_lengths_compile_nothing_new(model, family):
    plain, compiled = model(family), model(family)
    names = [name for name, _ in compiled.named_parameters()]
    assert compile_blocks(compiled) == 2
    assert [name for name, _ in compiled.named_parameters()] == names
    graphs = []
    for lengths in ([5, 9, 3], [4, 30], [17], [2, 2, 2, 2, 40], [11, 12]):
        expected, ours = loss_of(plain, lengths), loss_of(compiled, lengths)
        assert float(ours) == pytest.approx(float(expected), rel=1e-5)
        parameters = list(plain.parameters()), list(compiled.parameters())
        pairs = zip(
            *(torch.autograd.grad(v, p) for v, p in zip((expected, ours), parameters, strict=True)),
            strict=True,
        )
        for a, b in pairs:
            assert float((a - b).norm()) <= 1e-4 * float(a.norm()) + 1e-7
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[1:] == graphs[:1] * 4


def test_compilers_that_peft_leaves_in_the_environment_are_taken_back(monkeypatch) -> None:
    monkeypatch.setenv("CXX", "mine")
    monkeypatch.delenv("CC", raising=False)
    with keeping_compilers():
        os.environ |= {"CC": "gcc", "CXX": "gcc"}
    assert os.environ["CXX"] == "mine"
    assert "CC" not in os.environ


def test_blocks_are_the_decoders_layers(model):
    assert [type(block).__name__ for block in blocks_of(model("llama"))] == ["LlamaDecoderLayer"] * 2


def test_a_model_that_does_not_name_its_blocks_is_refused(model):
    unnamed = model("llama")
    unnamed._no_split_modules = None
    with pytest.raises(SFTError, match="can't be compiled"):
        compile_blocks(unnamed)


@pytest.mark.slow
def test_a_run_with_compile_gives_the_losses_of_one_without(model_folder, tmp_path):
    torch._dynamo.reset()
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "\n".join(json.dumps({"instruction": f"say {n}", "output": f"{n} " * n}) for n in range(1, 9))
    )
    found = []
    for compile in (False, True):
        torch.manual_seed(0)
        module = SFTModule(base=str(model_folder("llama")), learning_rate=1e-2, compile=compile)
        trainer = Trainer(
            accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_checkpointing=False,
            enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, SFTDataModule(train=str(rows), val=str(rows), batch_size=2))
        found.append({name: float(value) for name, value in trainer.callback_metrics.items()})
    for name in ("train/loss", "val/loss"):
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-4)
