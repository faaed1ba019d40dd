"""Every adapter: what is trained, kept, exported and left alone, compared with plain peft and transformers."""

from __future__ import annotations

import os
from functools import partial

import peft
import pytest
import torch
from adapter_run import apart, logits, plain, raw, train, write_rows

from lightning_sft import SFTError
from lightning_sft.training.layout import causal_lm, stock_attention
from lightning_sft.training.models import keeping_compilers, load_trained, quantization_of
from lightning_sft_adapters.any_peft import Peft
from lightning_sft_adapters.freeze import Freeze
from lightning_sft_adapters.full import Full
from lightning_sft_adapters.lora import LoRA
from lightning_sft_adapters.qlora import QLoRA

TARGETS = ["q_proj", "up_proj"]


def each(names):
    """Parameters of a test; the adapters that are much like others run with the slow ones."""
    return pytest.mark.parametrize(
        "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]
    )


def of(kind: str, **options: object):
    return lambda: Peft(getattr(peft, kind)(**options))


LORAS = {
    "lora": partial(LoRA, r=2),
    "dora": partial(LoRA, r=2, dora=True),
    "rslora": partial(LoRA, r=2, rslora=True, alpha=3),
    "some layers": partial(LoRA, r=2, layers=[1]),
    "patterns": partial(LoRA, r=2, rank_pattern={"q_proj": 3}, alpha_pattern={"up_proj": 5.0}),
    "excluded": partial(LoRA, r=2, exclude_modules=["down_proj"]),
    "biases": partial(LoRA, r=2, target_modules=TARGETS, lora_bias=True),
    "head and embeddings": partial(LoRA, r=2, modules_to_save=["lm_head", "embed_tokens"]),
    "adapted head": partial(LoRA, r=2, target_modules=["q_proj", "lm_head"]),
    "token rows": partial(LoRA, r=2, trainable_tokens=[1, 2]),
    "gaussian": partial(LoRA, r=2, init="gaussian"),
    "orthogonal": partial(LoRA, r=2, init="orthogonal"),
    "mica": partial(LoRA, r=2, init="mica"),
    "eva": partial(LoRA, r=2, init="eva"),
    "lora+": partial(LoRA, r=2, loraplus_ratio=16),
}
MOVED = {name: partial(LoRA, r=2, init=name) for name in ("pissa", "pissa_fast", "olora", "corda")}
QUANTISED = {
    "nf4": partial(QLoRA, r=2),
    "fp4": partial(QLoRA, "fp4", False, "float32", r=2),
    "int8": partial(QLoRA, "int8", r=2),
    "nf4 dora": partial(QLoRA, r=2, dora=True),
}
VIRTUAL = {
    "prompt": of("PromptTuningConfig", num_virtual_tokens=4),
    "prefix": of("PrefixTuningConfig", num_virtual_tokens=4),
    "p-tuning": of("PromptEncoderConfig", num_virtual_tokens=4, encoder_hidden_size=16),
}
OTHERS = {
    "ia3": of("IA3Config", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": of("VeraConfig", r=4, target_modules=["q_proj", "o_proj"]),
    "oft": of("OFTConfig", oft_block_size=4, r=0, target_modules=TARGETS),
    "boft": of("BOFTConfig", boft_block_size=4, target_modules=TARGETS),
    "osf": of("OSFConfig", target_modules=TARGETS),
    "loha": of("LoHaConfig", r=2, target_modules=TARGETS),
    "lokr": of("LoKrConfig", r=2, target_modules=TARGETS),
    "norms": of("LNTuningConfig", target_modules=["input_layernorm"]),
    "adaption prompt": of("AdaptionPromptConfig", adapter_len=4, adapter_layers=2),
    "shira": of("ShiraConfig", r=2, target_modules=TARGETS),
    "hra": of("HRAConfig", r=2, target_modules=TARGETS),
    "fourier": of("FourierFTConfig", n_frequency=10, target_modules=TARGETS),
}
WEIGHTS = {
    "full": Full,
    "layer decay": partial(Full, layer_decay=0.5),
    "freeze": partial(Freeze, layers=1),
    "unfreezing": partial(Freeze, layers=2, unfreeze_every=1),
}
SLOW = {
    "rslora", "patterns", "excluded", "gaussian", "orthogonal", "pissa", "fp4", "nf4 dora", "p-tuning", "boft", "loha",
    "lokr", "hra", "fourier", "shira", "layer decay",
}  # fmt: skip
BESIDE = LORAS | MOVED | QUANTISED | VIRTUAL | OTHERS


@pytest.fixture(scope="module")
def base(model_folder):
    """A function from an adapter's name to the folder of its base: 4 bits take blocks of 64 weights."""
    return lambda name: model_folder("wide" if name in QUANTISED else "llama")


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """A function from an adapter's name to its run of two steps and what that exported; made once."""
    rows, made = write_rows(tmp_path_factory.mktemp("data")), {}

    def run(name: str):
        if name not in made:
            compilers = [os.environ.get(name) for name in ("CC", "CXX")]
            module, trainer = train(base(name), rows, (BESIDE | WEIGHTS)[name]())
            # a compiler of peft's choice would be torch.compile's too
            assert [os.environ.get(name) for name in ("CC", "CXX")] == compilers
            folder = tmp_path_factory.mktemp("exported") / "model"
            module.export(folder)
            made[name] = module, trainer, folder
        return made[name]

    return run


def quantised(folder) -> dict[str, object]:
    """The options to load the base with, as it was in training."""
    quantization = quantization_of(folder)
    return {} if quantization is None else {"quantization_config": quantization}


@each(BESIDE)
def test_what_is_exported_gives_the_same_logits_in_peft(name, runs, base) -> None:
    module, _, folder = runs(name)
    untrained = partial(plain, base(name), **quantised(folder))
    with keeping_compilers():  # peft's own doing, for BOFT
        loaded = peft.PeftModel.from_pretrained(untrained(), folder).eval()
    with stock_attention(module.loaded):
        ours = logits(module.loaded)
    assert apart(logits(loaded), ours) <= (2e-5 if name in MOVED else 1e-6)
    assert apart(logits(load_trained(folder, dtype=torch.float32)), ours) <= (2e-5 if name in MOVED else 1e-6)
    assert apart(ours, logits(untrained())) > 1e-4


@each(WEIGHTS)
def test_what_is_exported_gives_the_same_logits_in_transformers(name, runs, model_folder) -> None:
    module, _, folder = runs(name)
    with stock_attention(module.loaded):
        ours = logits(module.loaded)
    assert torch.equal(logits(plain(folder)), ours)
    assert apart(ours, logits(plain(model_folder("llama")))) > 1e-4


@each(BESIDE)
def test_as_many_parameters_are_trained_as_peft_counts(name, runs) -> None:
    module, *_ = runs(name)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert trained == module.loaded.get_nb_trainable_parameters()[0] > 0


@each(BESIDE | WEIGHTS)
def test_the_optimizer_keeps_state_of_what_is_trained_and_of_nothing_else(name, runs) -> None:
    module, trainer, _ = runs(name)
    trained = {id(p) for p in module.parameters() if p.requires_grad}
    assert {id(p) for p in trainer.optimizers[0].state} == trained
    assert {id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]} == trained


@each(BESIDE)
def test_the_base_is_what_it_was(name, runs, base) -> None:
    module, _, folder = runs(name)
    untrained = plain(base(name), **quantised(folder))
    with module.adapter.base_model(module.loaded) as switched_off, stock_attention(switched_off):
        assert apart(logits(switched_off), logits(untrained)) <= (2e-5 if name in MOVED else 1e-6)
    if name in MOVED or name == "osf":
        return  # these take a part out of the base's weights
    now = {
        key.replace(".base_layer.", ".").replace(".self_attn.model.", ".self_attn."): p
        for key, p in causal_lm(module.loaded).named_parameters()
    }
    same = {key for key, p in untrained.named_parameters() if key in now and raw(p) == raw(now[key])}
    gone = {
        key for key, _ in untrained.named_parameters() if key not in now
    }  # peft has put another layer there
    assert same | gone == {key for key, _ in untrained.named_parameters()}
    assert len(gone) <= 2, gone


@each(BESIDE)
def test_virtual_tokens_need_padded_rows_and_the_models_own_head(name, runs) -> None:
    layout = runs(name)[0].layout
    assert layout.whole == (name in VIRTUAL)
    if name == "int8":  # which columns of a batch are outliers, and so not in 8 bits, depends on all its rows
        assert "a change in one segment moves another" in layout.padded_because
    else:
        assert (layout.padded_because is not None) == (name in VIRTUAL)


@each(VIRTUAL)
def test_padding_changes_nothing_with_virtual_tokens(name, runs) -> None:
    """The loss of two rows in one batch is that of each alone, which peft's own labels give."""
    from lightning_sft.conversation import Meta
    from lightning_sft.example import Example
    from lightning_sft.training.head import NLL

    module, *_ = runs(name)
    examples = []
    for number, length in enumerate((9, 23)):
        drawn = torch.randint(3, 290, (length,), generator=torch.Generator().manual_seed(number)).numpy()
        weights = (torch.arange(length) >= length // 2).float().numpy()
        reasons = torch.zeros(length, dtype=torch.uint8).numpy()
        examples.append(Example(drawn.astype("int32"), weights, reasons, Meta(source="x", row=number)))
    with torch.no_grad():
        together = module.weighted_loss(module.layout.collate(examples, 1.0), NLL)
        alone = 0.0
        for example in examples:
            row = torch.tensor(example.input_ids, dtype=torch.long)[None]
            labels = torch.where(torch.tensor(example.weights)[None] > 0, row, -100)
            out = module.loaded(input_ids=row, attention_mask=torch.ones_like(row), labels=labels)
            alone += float(out.loss) * int((labels[:, 1:] != -100).sum())
    assert float(together) == pytest.approx(alone, rel=1e-5)


REFUSED = {
    "ranks that change": (of("AdaLoraConfig", total_step=10), "ADALORA can't be trained here"),
    "neither": (Peft, "neither config nor init_from"),
    "pissa by hand": (of("LoraConfig", init_lora_weights="pissa"), "use LoRA, whose init"),
    "pissa and dora": (partial(LoRA, init="pissa", dora=True), "doesn't go together with dora"),
    "a ratio of 0": (partial(LoRA, loraplus_ratio=0), "loraplus_ratio is 0"),
    "no such adapter": (partial(LoRA, init_from="nowhere"), "no saved adapter there"),
    "pissa of 4 bits": (partial(QLoRA, init="pissa"), "which are quantised"),
    "mica of 4 bits": (partial(QLoRA, init="mica"), "which are quantised"),
    "a rate of B, which mica doesn't train": (partial(LoRA, init="mica", loraplus_ratio=2), "has no effect"),
    "a rank that the weights don't have": (partial(LoRA, r=40, init="pissa"), "at most the rank 32"),
    "an export that peft can't make": (
        partial(LoRA, init="olora", rslora=True, rank_pattern={"q_proj": 2}),
        "rslora and",
    ),
    "a layer too many": (
        partial(LoRA, target_modules=["q_proj", "nope"]),
        "nothing that gets an adapter has nope",
    ),
    "a block too many": (partial(LoRA, layers=[0, 2]), "nothing that gets an adapter has 2"),
    "no such layer to exclude": (partial(LoRA, exclude_modules=["nope"]), "the model has no layer nope"),
    "no such layer to save": (partial(LoRA, modules_to_save=["nope"]), "the model has no layer nope"),
    "no such parameter": (
        partial(LoRA, target_parameters=["mlp.nope"]),
        "nothing that gets an adapter has mlp.nope",
    ),
    "a rank of nothing": (partial(LoRA, rank_pattern={"nope": 2}), "nothing that gets an adapter has nope"),
    "a wrong expression": (partial(LoRA, target_modules="*_proj"), "is no regular expression"),
    "a wrong expression of a rank": (partial(LoRA, rank_pattern={"*_proj": 2}), "is no regular expression"),
    "a pattern for no layers": (partial(LoRA, layers_pattern="layers"), "layers isn't given"),
    "no such token": (partial(LoRA, trainable_tokens=[99999]), "there is no token 99999"),
    "a token below 0": (partial(LoRA, trainable_tokens={"embed_tokens": [-1]}), "there is no token -1"),
    "more directions than tokens": (
        partial(LoRA, r=31, init="eva", target_modules=["q_proj"]),
        "none has more than",
    ),
    "a loss of its own": (of("LoraConfig", kasa_config={}, target_modules=TARGETS), "its loss is its own"),
    "routes": (of("LoraConfig", arrow_config={}, target_modules=TARGETS), "trained already"),
    "GPTQ alone": (of("LoraConfig", use_qalora=True, target_modules=TARGETS), "GPTQ"),
    "no such layer": (of("IA3Config", target_modules=["nope"], feedforward_modules=[]), "nope"),
}


@pytest.mark.parametrize(("made", "message"), REFUSED.values(), ids=REFUSED)
def test_what_can_not_be_is_refused(made, message, model_folder, tmp_path) -> None:
    with pytest.raises(SFTError, match=message):
        train(model_folder("llama"), write_rows(tmp_path), made(), batch_size=1)
