"""What LoRA's options mean, compared with peft's own functions; saved adapters to start from and beside."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import typing
from functools import partial
from itertools import pairwise
from pathlib import Path

import peft
import peft.optimizers
import pytest
import torch
from adapter_run import apart, logits, plain, raw, train, write_rows
from peft.tuners.lora.corda import preprocess_corda

from lightning_sft import SFTError, SFTModule
from lightning_sft.training.layout import stock_attention
from lightning_sft.training.models import load_trained
from lightning_sft_adapters import corda
from lightning_sft_adapters.any_peft import Peft
from lightning_sft_adapters.lora import LoRA
from lightning_sft_adapters.qlora import QLoRA


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def saved(model_folder, rows, tmp_path_factory):
    """A function from a number to the folder of an adapter of rank 2 that was trained on that base, and its logits."""
    made = {}

    def run(number: int, **options):
        if number not in made:
            folder = tmp_path_factory.mktemp("saved") / f"adapter{number}"
            module, _ = train(model_folder("llama"), rows, LoRA(r=2, alpha=4 + number, **options))
            module.export(folder)
            made[number] = folder
        return made[number]

    return run


def configured(model_folder, adapter, family: str = "llama") -> SFTModule:
    torch.manual_seed(0)
    module = SFTModule(str(model_folder(family)), adapter)
    module.configure_model()
    module.eval()
    return module


NAMES = {
    "alpha": "lora_alpha", "dropout": "lora_dropout", "layers": "layers_to_transform", "rslora": "use_rslora",
    "dora": "use_dora", "init": "init_lora_weights", "trainable_tokens": "trainable_token_indices",
}  # fmt: skip


def test_every_option_of_pefts_is_ours_or_left_out_for_a_reason() -> None:
    """A peft that has another one fails this."""
    ours = {NAMES.get(name, name) for name in inspect.signature(LoRA).parameters}
    theirs = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert ours - theirs == {"loraplus_ratio", "init_from", "beside"}
    reasons = (Path(__file__).parents[2] / "docs/decisions.md").read_text(encoding="utf-8")
    entry = reasons.partition("`LoraConfig` that `LoRA` hasn't")[2].partition("\n- **")[0]
    assert set(re.findall(r"`(\w+)`", entry)) >= theirs - ours
    inits = str(typing.get_type_hints(peft.LoraConfig)["init_lora_weights"])
    known = {
        "gaussian",
        "eva",
        "olora",
        "pissa",
        "pissa_niter_[number of iters]",
        "corda",
        "loftq",
        "orthogonal",
        "mica",
    }
    assert set(re.findall(r"'(.*?)'", inits)) == known


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"target_modules": ["q_proj"], "lora_bias": True}])
def test_lora_plus_has_the_rates_of_pefts_own_optimizer(options, model_folder, rows) -> None:
    module, trainer = train(
        model_folder("llama"), rows, LoRA(r=2, loraplus_ratio=16, **options), learning_rate=1e-3
    )
    theirs = peft.optimizers.create_loraplus_optimizer(
        module.loaded, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16
    )

    def rates(optimizer) -> dict[str, float]:
        names = {id(p): name for name, p in module.loaded.named_parameters()}
        return {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}

    assert rates(trainer.optimizers[0]) == pytest.approx(rates(theirs))
    assert set(rates(theirs).values()) == {1e-3, 16e-3}
    assert trainer.callback_metrics["train/learning_rate"] == pytest.approx(1e-3)
    assert trainer.callback_metrics["train/learning_rate/B"] == pytest.approx(16e-3)


@pytest.mark.parametrize(
    "options",
    [{}, {"layers": [0], "target_modules": "all-linear"}, {"layers": [1], "target_modules": ["q_proj"]}],
)
def test_the_layers_are_those_that_peft_chooses(options, model_folder) -> None:
    module = configured(model_folder, LoRA(r=2, **options))
    adapted = {name.partition(".lora_")[0] for name, p in module.loaded.named_parameters() if p.requires_grad}
    linear = {
        f"base_model.model.{name}"
        for name, part in plain(model_folder("llama")).named_modules()
        if isinstance(part, torch.nn.Linear) and name != "lm_head"
    }
    if "layers" in options:
        linear = {name for name in linear if f"layers.{options['layers'][0]}." in name}
    if isinstance(options.get("target_modules"), list):
        linear = {name for name in linear if name.endswith("q_proj")}
    assert adapted == linear


@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal", "olora", "pissa", "pissa_fast"])
def test_no_init_changes_what_the_model_computes(init, model_folder) -> None:
    module = configured(model_folder, LoRA(r=4, init=init))
    base = logits(plain(model_folder("llama")))
    assert apart(logits(module.loaded), base) < 2e-5
    trained = {n: p for n, p in module.loaded.named_parameters() if p.requires_grad}
    assert any(p.any() for n, p in trained.items() if "lora_B" in n) == (init not in ("default", "gaussian"))


def test_pissa_trains_the_largest_singular_values(model_folder) -> None:
    module = configured(model_folder, LoRA(r=4, alpha=4, init="pissa", target_modules=["q_proj"]))
    layer = module.loaded.base_model.model.model.layers[0].self_attn.q_proj
    whole = plain(model_folder("llama")).model.layers[0].self_attn.q_proj.weight
    largest = torch.linalg.svdvals(whole.detach())
    assert torch.allclose(torch.linalg.svdvals(layer.get_delta_weight("default"))[:4], largest[:4], rtol=1e-4)
    rest = torch.linalg.svdvals(layer.get_base_layer().weight.detach())
    assert torch.allclose(rest[:4], largest[4:8], rtol=1e-4)


def test_eva_begins_with_pefts_eva_of_the_same_rows(model_folder, rows) -> None:
    begun = {}

    class Keeping(LoRA):
        def initialize(self, model, batches, forward):
            super().initialize(model, batches, forward)
            begun.update({n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n})
            begun["rows"] = [batch.input_ids for batch in batches]
            begun["segments"] = [batch.segments for batch in batches]

    module, _ = train(model_folder("llama"), rows, Keeping(r=2, init="eva"), steps=1)
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=2, lora_alpha=32, target_modules="all-linear", init_lora_weights="eva", task_type="CAUSAL_LM",
        eva_config=peft.EvaConfig(rho=1.0),
    )  # fmt: skip
    theirs = peft.get_peft_model(plain(model_folder("llama")), config)
    longest = max(end - start for s in begun["segments"] for start, end in pairwise(s))
    padded = []
    for ids, segments in zip(begun["rows"], begun["segments"], strict=True):
        batch = torch.zeros(len(segments) - 1, longest, dtype=torch.long)
        mask = torch.zeros_like(batch)
        for row, (start, end) in enumerate(pairwise(segments)):
            batch[row, : end - start], mask[row, : end - start] = ids[0, start:end], 1
        padded.append({"input_ids": batch, "attention_mask": mask})
    peft.initialize_lora_eva_weights(theirs, padded, show_progress_bar=False)
    for name, p in theirs.named_parameters():
        if "lora_A" in name:
            cosine = torch.nn.functional.cosine_similarity(p, begun[name], dim=-1).abs()
            assert torch.allclose(cosine, torch.ones_like(cosine), atol=1e-3), name
        elif "lora_B" in name:
            assert not begun[name].any()
    assert module.loaded.peft_config["default"].r == 2


@pytest.mark.parametrize("tokens_per_width", [128, 0])
def test_corda_begins_with_pefts_corda_of_the_same_rows(
    tokens_per_width, model_folder, rows, monkeypatch
) -> None:
    """Peft sees one row at a time, ours come in batches; both see all of them, or ours those of the first batch."""
    monkeypatch.setattr(corda, "TOKENS_PER_WIDTH", tokens_per_width)
    begun, seen = {}, []

    class Keeping(LoRA):
        def initialize(self, model, batches, forward):
            super().initialize(model, batches, forward)
            layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]
            begun.update(
                {m: (m.get_base_layer().weight.clone(), m.get_delta_weight("default")) for m in layers}
            )
            for batch in batches:
                seen.extend(batch.input_ids[:, a:b] for a, b in pairwise(batch.segments))

    module, _ = train(model_folder("llama"), rows, Keeping(r=2, alpha=3, init="corda"), steps=1)
    assert len(seen) == 8
    theirs = plain(model_folder("llama"))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=targets, init_lora_weights="corda", task_type="CAUSAL_LM",
        corda_config=peft.tuners.lora.config.CordaConfig(corda_method="ipm"),
    )  # fmt: skip

    def look() -> None:
        for ids in seen if tokens_per_width else seen[:4]:
            theirs(input_ids=ids, use_cache=False)

    preprocess_corda(theirs, config, run_model=look)
    expected = dict(peft.get_peft_model(theirs, config).named_modules())
    layers = {name: m for name, m in module.loaded.named_modules() if m in begun}
    assert len(layers) == 14
    for name, layer in layers.items():
        weight, delta = begun[layer]
        assert apart(delta, expected[name].get_delta_weight("default")) < 1e-3, name
        assert apart(weight, expected[name].get_base_layer().weight) < 1e-3, name
        assert delta.abs().max() > 1e-2


def test_a_corda_run_from_a_checkpoint_looks_at_no_rows(model_folder) -> None:
    """The same part is taken out of the base, and only once."""
    first = configured(model_folder, LoRA(r=2, alpha=3, init="corda"))
    weights = {name: p.detach().clone() for name, p in first.loaded.named_parameters()}
    state = {
        name: 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
        for name, p in first.loaded.named_parameters()
        if p.requires_grad
    }
    before = logits(first.loaded)
    for _ in range(2):
        first.adapter.load_initial_state(first.loaded, state)
    assert first.adapter.initial_state() is state
    assert apart(logits(first.loaded), before) < 1e-5
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    layer = first.loaded.get_submodule(name)
    expected = weights[f"{name}.base_layer.weight"] - layer.get_delta_weight("default")
    assert torch.equal(layer.get_base_layer().weight, expected)


# ---------------------------------------------------------------------------- saved adapters


@pytest.mark.parametrize("made", [partial(LoRA, r=2, alpha=4), Peft], ids=["LoRA", "Peft"])
def test_a_run_starts_from_a_saved_adapter(made, saved, model_folder) -> None:
    folder = saved(0)
    module = configured(model_folder, made(init_from=str(folder)))
    assert torch.equal(logits(module.loaded), logits(load_trained(folder)))
    trained = {name for name, p in module.loaded.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in module.loaded.named_parameters() if "lora_" in name}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 4, "alpha": 4}, "other parameters than this one"),
        ({"r": 2, "alpha": 4, "target_modules": ["q_proj"]}, "not there"),
        ({"r": 2, "alpha": 8}, "lora_alpha is 8 here, and 4 in the saved adapter"),
        ({"r": 2, "alpha": 4, "rslora": True}, "use_rslora is True here, and False"),
    ],
)
def test_a_saved_adapter_of_another_kind_is_refused(options, message, saved, model_folder) -> None:
    with pytest.raises(SFTError, match=message):
        configured(model_folder, LoRA(init_from=str(saved(0)), **options))


def test_saved_adapters_work_beside_the_one_in_training_and_stay_as_they_are(
    saved, model_folder, rows, tmp_path
) -> None:
    adapter = LoRA(r=3, beside={"facts": str(saved(0)), "style": str(saved(1))})
    before = configured(model_folder, adapter)
    one = load_trained(saved(0))
    one.load_adapter(str(saved(1)), adapter_name="style")
    one.base_model.set_adapter(["default", "style"])
    assert apart(logits(before.loaded), logits(one)) < 1e-6  # the new one is zero at first
    assert apart(logits(before.loaded), logits(load_trained(saved(0)))) > 1e-3

    module, trainer = train(model_folder("llama"), rows, adapter)
    trained = {name: p for name, p in module.loaded.named_parameters() if p.requires_grad}
    assert trained
    assert all(".default." in name for name in trained)
    assert {id(p) for p in trainer.optimizers[0].state} == {id(p) for p in trained.values()}
    now, then = dict(module.loaded.named_parameters()), dict(before.loaded.named_parameters())
    assert all(raw(now[name]) == raw(p) for name, p in then.items() if name not in trained)

    folder = tmp_path / "model"
    module.export(folder)
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 3
    with stock_attention(module.loaded):
        ours = logits(module.loaded)
    assert torch.equal(logits(load_trained(folder)), ours)
    loaded = peft.PeftModel.from_pretrained(plain(model_folder("llama")), folder)
    for name in ("facts", "style"):
        loaded.load_adapter(folder / name, adapter_name=name)
    loaded.base_model.set_adapter(["default", "facts", "style"])
    assert torch.equal(logits(loaded.eval()), ours)
    assert apart(logits(loaded.merge_and_unload()), ours) < 1e-5


@pytest.mark.parametrize(
    ("others", "message"),
    [({"default": "x"}, "no saved adapter there"), ({"a": "nowhere"}, "no saved adapter there")],
)
def test_what_can_not_be_beside_is_refused(others, message, model_folder) -> None:
    with pytest.raises(SFTError, match=message):
        configured(model_folder, LoRA(r=2, beside=others))


@pytest.mark.parametrize("name", ["default", "a.b"])
def test_an_adapter_beside_needs_a_name_of_its_own(name, saved, model_folder) -> None:
    with pytest.raises(SFTError, match="can't be an adapter's name"):
        configured(model_folder, LoRA(r=2, beside={name: str(saved(0))}))


# ------------------------------------------------------------------------------- recomputed, compiled


RECOMPUTED = {
    "dora": partial(LoRA, r=2, dora=True),
    "token rows": partial(LoRA, r=2, trainable_tokens=[1, 2]),
    "pissa": partial(LoRA, r=2, init="pissa"),
    "ia3": lambda: Peft(peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])),
    "oft": lambda: Peft(peft.OFTConfig(oft_block_size=4, r=0, target_modules=["q_proj"])),
    "prompt": lambda: Peft(peft.PromptTuningConfig(num_virtual_tokens=4)),
    "nf4": partial(QLoRA, r=2, compute_dtype="float32"),
    "int8": partial(QLoRA, "int8", r=2),
}
BASES = {"nf4": "wide", "int8": "wide"}


@pytest.mark.parametrize("name", RECOMPUTED)
def test_recomputed_activations_give_the_same_steps(name, model_folder, rows) -> None:
    weights = [
        {n: p.detach().clone() for n, p in module.loaded.named_parameters() if p.requires_grad}
        for module, _ in (
            train(
                model_folder(BASES.get(name, "llama")),
                rows,
                RECOMPUTED[name](),
                gradient_checkpointing=checkpointing,
            )
            for checkpointing in (False, True)
        )
    ]
    assert all(torch.allclose(p, weights[1][n], rtol=1e-4, atol=1e-6) for n, p in weights[0].items())


def test_prefix_tuning_with_recomputed_activations_is_refused(model_folder, rows) -> None:
    adapter = Peft(peft.PrefixTuningConfig(num_virtual_tokens=4))
    with pytest.raises(SFTError, match="forgets the keys and values"):
        train(model_folder("llama"), rows, adapter, gradient_checkpointing=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dora", "ia3", "oft", "nf4", "int8"])
def test_compiled_blocks_give_the_same_steps(name, model_folder, rows) -> None:
    weights = [
        {n: p.detach().clone() for n, p in module.loaded.named_parameters() if p.requires_grad}
        for module, _ in (
            train(model_folder(BASES.get(name, "llama")), rows, RECOMPUTED[name](), compile=compiled)
            for compiled in (False, True)
        )
    ]
    assert all(torch.allclose(p, weights[1][n], rtol=1e-3, atol=1e-5) for n, p in weights[0].items())


@pytest.mark.parametrize(
    ("family", "adapter", "message", "fix"),
    [
        ("gemma3", lambda: LoRA(target_modules=["lm_head"], init="pissa"), "weight of lm_head apart", "out of targ"),
        ("llama", lambda: LoRA(target_modules=["embed_tokens"], trainable_tokens=[3]), "both low-rank", "target_mod"),
        ("gemma3", lambda: LoRA(target_modules=["lm_head"], trainable_tokens=[3]), "lm_head can't get both", "out"),
        (
            "gemma3", lambda: LoRA(modules_to_save=["lm_head"], trainable_tokens=[3]), "in full and by rows",
            "modules_to_save: \\[model.embed_tokens, lm_head\\], without",
        ),
        (
            "gpt2", lambda: Peft(peft.LoraConfig(target_modules=["lm_head"], ensure_weight_tying=True)),
            "can't tie adapters of transformer.wte", "leave ensure_weight_tying out",
        ),
    ],
)  # fmt: skip
def test_two_adapters_of_one_embedding_are_refused(family, adapter, message, fix, model_folder) -> None:
    with pytest.raises(SFTError, match=message) as caught:
        configured(model_folder, adapter(), family)
    assert re.search(fix, caught.value.fix)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"target_modules": ["lm_head"], "init": "pissa"}),
        ("llama", {"target_modules": ["lm_head"], "trainable_tokens": [3]}),
        ("llama", {"modules_to_save": ["lm_head"], "trainable_tokens": [3]}),
        ("gemma3", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    ],
)
def test_what_belongs_to_two_layers_is_not_refused(family, options, model_folder) -> None:
    """Untied embeddings, and what the advice says."""
    assert any(
        p.requires_grad for p in configured(model_folder, LoRA(r=2, **options), family).loaded.parameters()
    )
