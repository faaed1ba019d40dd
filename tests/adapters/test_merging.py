"""A merged model is the model with its adapter, also over a quantised base, and it is proved before it is written."""

from __future__ import annotations

import json
import warnings
from functools import partial

import peft
import pytest
import torch
from adapter_run import IDS, apart, logits, plain, train, write_rows

from lightning_sft import SFTError, merging
from lightning_sft.__main__ import main
from lightning_sft.export import export
from lightning_sft.training import models
from lightning_sft.training.models import load_trained
from lightning_sft_adapters import qlora
from lightning_sft_adapters.any_peft import Peft
from lightning_sft_adapters.lora import LoRA
from lightning_sft_adapters.qlora import QLoRA

ADAPTERS = {
    "nf4": (partial(QLoRA, r=2), 0.1),  # which computes in bfloat16
    "nf4 in float32": (partial(QLoRA, compute_dtype="float32", r=2), 1e-5),
    "int8": (partial(QLoRA, "int8", r=2), 0.1),  # whose activations are rounded as well
    "dora": (partial(LoRA, r=2, dora=True), 1e-5),
    "ia3": (lambda: Peft(peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])), 1e-5),
    "prompt": (lambda: Peft(peft.PromptTuningConfig(num_virtual_tokens=4)), 0.0),
}


@pytest.fixture(scope="module")
def exported(model_folder, tmp_path_factory):
    """A function from an adapter's name to what a run with it exported; made once."""
    rows, made = write_rows(tmp_path_factory.mktemp("data")), {}

    def run(name: str):
        if name not in made:
            module, _ = train(model_folder("wide"), rows, ADAPTERS[name][0]())
            made[name] = tmp_path_factory.mktemp("exported") / "model"
            module.export(made[name])
        return made[name]

    return run


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name != "prompt"])
def test_the_merged_model_has_the_adapters_logits(name, exported, tmp_path, capsys, model_folder) -> None:
    folder = exported(name)
    assert main(["export", str(folder), "--merge", "--output", str(tmp_path / "merged")]) == 0
    assert "nats per token" in capsys.readouterr().out
    merged, ours = logits(plain(tmp_path / "merged")), logits(load_trained(folder, dtype=torch.float32))
    assert apart(merged, ours) < ADAPTERS[name][1]
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    if name.startswith("nf4"):  # the base as it is stored is much further away
        whole = peft.PeftModel.from_pretrained(plain(model_folder("wide")), folder).eval()
        assert apart(logits(whole), ours) > 0.1


def test_a_quantised_base_with_transposed_layers_is_merged(model_folder, tmp_path) -> None:
    """GPT-2's `Conv1D`, which are `Linear` when they have been quantised."""
    module, _ = train(
        model_folder("gpt2"),
        write_rows(tmp_path),
        QLoRA(compute_dtype="float32", r=2, modules_to_save=["wte"]),
    )
    module.export(tmp_path / "model")
    export(str(tmp_path / "model"), str(tmp_path / "merged"), merge=True)
    ours = logits(load_trained(tmp_path / "model", dtype=torch.float32))
    assert apart(logits(plain(tmp_path / "merged")), ours) < 1e-5


TIED = {  # whether embedding and head are still tied when it is merged
    "the embedding": ({"target_modules": ["{attention}", "{embedding}"]}, False),
    "the head": ({"target_modules": ["{attention}", "lm_head"]}, False),
    "DoRA of both": ({"target_modules": ["{embedding}", "lm_head"], "use_dora": True}, False),
    "neither": ({"target_modules": ["{attention}"]}, True),
    "rows of both": ({"trainable_token_indices": {"{embedding}": [3, 4, 5], "lm_head": [3, 4, 5]}}, True),
    "other rows": ({"trainable_token_indices": {"{embedding}": [3, 4, 5], "lm_head": [3]}}, False),
    "head in full": ({"target_modules": ["{attention}"], "modules_to_save": ["lm_head"]}, False),
}


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
@pytest.mark.parametrize("name", TIED)
def test_an_adapter_of_one_of_two_tied_embeddings_is_merged_into_that_one(
    name, family, model_folder, tmp_path
) -> None:
    options, tied = TIED[name]
    attention, embedding = {"gpt2": ("c_attn", "wte"), "gemma3": ("q_proj", "embed_tokens")}[family]
    written = json.dumps(options).replace("{attention}", attention).replace("{embedding}", embedding)
    config = peft.LoraConfig(**{"target_modules": [attention], "r": 2, **json.loads(written)})
    adapted = peft.get_peft_model(plain(model_folder(family)), config)
    torch.manual_seed(0)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    ids = IDS % 7  # the rows that are trained, too
    expected = logits(adapted, ids)
    assert apart(logits(plain(model_folder(family)), ids), expected) > 1e-3
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*tie_word_embeddings.*")  # peft's, which no one has to act on
        model = merging.merged(adapted)
    model.save_pretrained(tmp_path)
    found = plain(tmp_path)
    assert apart(logits(found, ids), expected) < 1e-5
    assert found.config.tie_word_embeddings is tied
    assert (found.lm_head.weight is found.get_input_embeddings().weight) is tied


def test_the_figure_is_that_of_the_logits() -> None:
    a, b = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).unbind()
    parity = merging.compare([a[:2], a[2:]], [b[:2], b[2:]])
    p, q = a.double().softmax(-1), b.double().softmax(-1)
    assert parity.divergence == pytest.approx(float((p * (p / q).log()).sum() / 5))
    assert parity.largest == pytest.approx(float((a - b).abs().max() / a.abs().max()))
    assert parity.positions == 5


def test_a_merge_that_is_not_the_adapter_is_refused_and_nothing_is_written(
    exported, tmp_path, monkeypatch
) -> None:
    """As one into the base as it is stored, not into what was left of it."""
    monkeypatch.setattr(
        models, "load_trained", lambda folder, whole_base=False, **options: (
            load_trained(folder, **options) if not whole_base else unquantised(folder)
        ),
    )  # fmt: skip
    with pytest.raises(SFTError, match="what would be written is not what was trained: KL"):
        export(str(exported("nf4")), str(tmp_path / "merged"), merge=True)
    assert not list(tmp_path.iterdir())


def unquantised(folder):
    base, _ = models.base_of(folder)
    return peft.PeftModel.from_pretrained(plain(base), folder)


def test_virtual_tokens_can_not_be_merged(exported, tmp_path) -> None:
    with pytest.raises(SFTError, match="PROMPT_TUNING adapter has nothing that could be added"):
        merging.write(exported("prompt"), tmp_path / "merged", dtype=None, tolerance=0.01)


def test_without_bitsandbytes_it_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr(qlora, "find_spec", lambda name: None)
    with pytest.raises(SFTError, match="QLoRA needs bitsandbytes") as caught:
        QLoRA().quantization()
    assert "lightning-sft[qlora]" in str(caught.value.fix)
