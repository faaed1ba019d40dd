"""Freezing a part of the model, and rates and starts that go by depth."""

from __future__ import annotations

import pytest
import transformers

from lightning_sft import RateGroup, SFTError
from lightning_sft_adapters.freeze import Freeze
from lightning_sft_adapters.full import Full


@pytest.fixture
def load(model_folder):
    return lambda name="llama": transformers.AutoModelForCausalLM.from_pretrained(model_folder(name))


def trained(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def having(model, *texts: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if any(text in name for text in texts)}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"layers": 1}, ["layers.1."]),
        ({}, ["layers.0.", "layers.1."]),
        ({"layers": 0, "norms": True}, ["norm"]),
        ({"layers": 1, "norms": True, "head": True}, ["layers.1.", "norm", "lm_head"]),
        ({"layers": 0, "embeddings": True}, ["embed_tokens"]),
        ({"layers": 0, "train": [r"0\.mlp", "q_proj"]}, ["0.mlp", "q_proj"]),
    ],
)
def test_what_is_chosen_is_trained_and_nothing_else(options, expected, load) -> None:
    model = Freeze(**options).prepare(load())
    assert trained(model) == having(model, *expected)


def test_frozen_by_name_wins(load) -> None:
    model = Freeze(layers=1, norms=True, freeze=["mlp", "^model.norm"]).prepare(load())
    assert trained(model) == having(model, "layers.1.", "norm") - having(model, "mlp", "model.norm")


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "falcon", "bloom", "mamba", "gemma3"])
def test_the_last_block_is_found_in_every_family(family, load) -> None:
    model = Freeze(layers=1).prepare(load(family))
    assert trained(model) == having(model, "layers.1.", "h.1.")


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("llama", {"layers": 0}, "every parameter would be frozen"),
        ("llama", {"freeze": ["."]}, "every parameter would be frozen"),
        ("llama", {"layers": 3}, "layers is 3, and the model has 2 blocks"),
        ("llama", {"layers": -1}, "layers is -1"),
        ("llama", {"train": ["qproj"]}, "no parameter's name has 'qproj'"),
        ("llama", {"train": ["("]}, "no regular expression"),
        ("gpt2", {"head": True}, "are one matrix"),
        ("llama", {"layer_decay": 1.5}, "layer_decay is 1.5"),
        ("llama", {"unfreeze_every": 0}, "unfreeze_every is 0"),
    ],
)
def test_what_can_not_be_is_refused(family, options, message, load) -> None:
    with pytest.raises(SFTError, match=message):
        Freeze(**options).prepare(load(family))


def test_rates_and_starts_by_depth(load) -> None:
    adapter = Full(layer_decay=0.5, unfreeze_every=10)
    model = adapter.prepare(load())
    expected = {
        "lm_head.": RateGroup("head and final norm", 1.0, 0),
        "model.norm.": RateGroup("head and final norm", 1.0, 0),
        "model.layers.1.": RateGroup("block 1", 1.0, 10),
        "model.layers.0.": RateGroup("block 0", 0.5, 20),
        "model.embed_tokens.": RateGroup("embeddings", 0.25, 30),
    }
    for name in trained(model):
        assert adapter.rate_group(name) == next(g for start, g in expected.items() if name.startswith(start))


def test_of_a_part_the_topmost_trained_one_begins(load) -> None:
    adapter = Freeze(layers=2, unfreeze_every=3)
    model = adapter.prepare(load())
    starts = {name: adapter.rate_group(name).start for name in trained(model)}
    assert starts == {name: 0 if "layers.1." in name else 3 for name in having(model, "layers.")}


def test_without_them_there_is_one_group(load) -> None:
    for adapter in (Full(), Freeze()):
        model = adapter.prepare(load())
        assert {adapter.rate_group(name) for name in trained(model)} == {RateGroup()}
