"""New tokens get a row in tokenizer and embeddings that is trained with any adapter, saved, and loaded again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import make_model_folder
from lightning.pytorch import Trainer
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional as F

from lightning_sft import Adapter, Segments, SFTDataModule, SFTError, SFTModule
from lightning_sft.__main__ import main
from lightning_sft.training.head import NLL, head_of, weighted_loss
from lightning_sft.training.layout import causal_lm, hidden_states, stock_attention
from lightning_sft.training.models import load_trained
from lightning_sft_adapters.full import Full
from lightning_sft_adapters.lora import LoRA
from lightning_sft_losses.cross_entropy import CrossEntropy

NEW = ["<|tool|>", "<obs>"]
ROWS = [
    {"messages": [
        {"role": "user", "content": f"say {n} <obs>"}, {"role": "assistant", "content": f"<|tool|> {n} hello<obs>"}
    ]}
    for n in range(8)
]  # fmt: skip
QUIET = {
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False,
    "enable_model_summary": False, "max_steps": 3, "max_epochs": -1,
}  # fmt: skip
FAMILIES = ["llama", "gemma3", "gpt2"]
"""Untied embeddings; tied ones that are scaled, with a soft cap; tied ones under other names."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


def module_of(folder: Path, adapter: Adapter, **options) -> SFTModule:
    options = {"new_tokens": NEW, "learning_rate": 0.02, **options}
    return SFTModule(base=str(folder), adapter=adapter, **options)


def fitted(folder: Path, adapter: Adapter, rows: str, **options) -> SFTModule:
    module = module_of(folder, adapter, **options)
    torch.manual_seed(0)
    Trainer(**QUIET).fit(module, SFTDataModule(train=rows, batch_size=3, seed=0))
    return module


def weights(model, part: str) -> torch.Tensor:
    """The embedding as it computes: the adapter's rows in it."""
    return getattr(causal_lm(model), f"get_{part}_embeddings")().weight.detach()


def logits(model, vocabulary: int) -> torch.Tensor:
    ids = torch.randint(3, vocabulary, (2, 24), generator=torch.Generator().manual_seed(0))
    ids[:, ::5] = vocabulary - 1
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def own_logits(module: SFTModule) -> torch.Tensor:
    with stock_attention(module.loaded):
        return logits(module.loaded, module.vocabulary)


# ------------------------------------------------------------------------------------------------ the rows


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_row_is_the_mean_as_transformers_makes_it(family, model_folder, tokenizer):
    module = module_of(model_folder(family), Full())
    module.configure_model()
    torch.manual_seed(0)
    reference = transformers.AutoModelForCausalLM.from_pretrained(model_folder(family))
    reference.resize_token_embeddings(len(tokenizer) + 2)
    assert module.vocabulary == module.loaded.config.vocab_size == len(tokenizer) + 2
    for part in ("input", "output"):
        ours, theirs = weights(module.loaded, part), weights(reference, part)
        assert ours.shape == theirs.shape
        assert torch.equal(ours[:-2], theirs[:-2])
        assert torch.allclose(ours[-2:], theirs[-2:], atol=1e-3)
    tied = module.loaded.get_input_embeddings().weight is module.loaded.get_output_embeddings().weight
    assert tied == (family != "llama")


def test_growing_draws_nothing(model_folder):
    torch.manual_seed(5)
    module_of(model_folder("llama"), Full()).configure_model()
    after = torch.rand(1)
    torch.manual_seed(5)
    module_of(model_folder("llama"), Full(), new_tokens=None).configure_model()
    assert torch.equal(after, torch.rand(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_changes_these_rows_alone(family, model_folder, rows):
    module = fitted(model_folder(family), LoRA(r=2), rows)
    before = transformers.AutoModelForCausalLM.from_pretrained(model_folder(family))
    old = before.config.vocab_size
    for part in ("input", "output"):
        now, then = weights(module.loaded, part), weights(before, part)
        assert torch.equal(now[:old], then)
        assert ((now[old:] - then.mean(0)).abs().amax(1) > 1e-3).all()


def test_full_trains_them_with_all_others(model_folder, rows):
    module = fitted(model_folder("llama"), Full(), rows)
    assert all(parameter.requires_grad for parameter in module.loaded.parameters())
    assert len(weights(module.loaded, "input")) == module.vocabulary


@pytest.mark.parametrize("loss", [CrossEntropy(), NLL], ids=["fused", "autograd"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_rows_gradient_is_that_of_full_autograd(family, loss, model_folder, rows):
    """Against peft's own forward, the model's own logits and torch's cross-entropy over all of them."""
    module = module_of(model_folder(family), LoRA(r=2), loss=loss)
    module.configure_model()
    ids = [module.vocabulary - 1, 7, module.vocabulary - 2, 9, module.vocabulary - 1, 12, 30]
    torch.manual_seed(1)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    texts = module.tokenizer.decode(ids[:2]), module.tokenizer.decode(ids[2:])
    example = module.renderer.render(Segments(((texts[0], 0.0), (texts[1], 1.0))))
    batch = module.layout.collate([example], 1.0)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    hidden = hidden_states(module.loaded, batch, own_logits=module.layout.own_logits)
    assert not module.layout.own_logits
    ours = weighted_loss(hidden, batch.targets, batch.weights, module.layout.head, loss)
    with stock_attention(module.loaded):
        full = module.loaded(input_ids=torch.tensor([example.input_ids.tolist()])).logits[0].float()
    theirs = (F.cross_entropy(full[batch.positions], batch.targets, reduction="none") * batch.weights).sum()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    pairs = zip(*(torch.autograd.grad(each, list(trained.values())) for each in (ours, theirs)), strict=True)
    for name, (one, other) in zip(trained, pairs, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm(), name
        assert other.any() or "lora" in name, name


def test_with_the_adapter_off_the_head_is_the_bases(model_folder):
    module = module_of(model_folder("llama"), LoRA(r=2))
    module.configure_model()
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data += 1.0
    hidden = torch.randn(3, 32)
    head = head_of(causal_lm(module.loaded))
    base = module.loaded.get_base_model().lm_head.original_module.weight
    assert not torch.allclose(head(hidden), hidden @ base.T)
    with module.adapter.base_model(module.loaded):
        assert torch.equal(head(hidden), F.linear(hidden, base))


# ------------------------------------------------------------------------------------------ saved and loaded


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", [LoRA, Full])
def test_the_exported_folder_gives_the_same_logits(family, adapter, model_folder, rows, tmp_path):
    module = fitted(model_folder(family), adapter(), rows)
    module.export(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.convert_tokens_to_ids(NEW) == [module.vocabulary - 2, module.vocabulary - 1]
    assert tokenizer.decode(tokenizer("a<obs>b")["input_ids"], skip_special_tokens=True) == "ab"
    source = model_folder(family) if adapter is LoRA else tmp_path / "model"
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    if adapter is LoRA:
        names = {path.name for path in (tmp_path / "model").glob("*.safetensors")}
        assert names == {"adapter_model.safetensors"}
        model.resize_token_embeddings(len(tokenizer))
        model = PeftModel.from_pretrained(model, tmp_path / "model")
    with stock_attention(module.loaded):
        expected = own_logits(module)
    assert torch.allclose(logits(model, module.vocabulary), expected, atol=1e-5)
    assert torch.allclose(logits(load_trained(tmp_path / "model"), module.vocabulary), expected, atol=1e-5)


def test_the_adapter_folder_holds_rows_and_no_embedding(model_folder, rows, tmp_path):
    from safetensors.torch import load_file

    fitted(model_folder("llama"), LoRA(r=2), rows).export(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    beside = {name: tensor.shape[0] for name, tensor in saved.items() if "lora_" not in name}
    assert beside == {
        "base_model.model.lm_head.token_adapter.trainable_tokens_delta": 2,
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": 2,
    }


def test_embeddings_that_are_trained_in_full_take_the_new_rows_with_them(model_folder, rows, tmp_path):
    module = fitted(model_folder("llama"), LoRA(r=2, modules_to_save=["embed_tokens", "lm_head"]), rows)
    module.export(tmp_path / "model")
    loaded = load_trained(tmp_path / "model")
    assert torch.allclose(logits(loaded, module.vocabulary), own_logits(module), atol=1e-5)


@pytest.fixture(scope="module")
def commanded(model_folder, rows, tmp_path_factory) -> Path:
    """A run by the command, on a copy of the base."""
    here = tmp_path_factory.mktemp("command")
    shutil.copytree(model_folder("gemma3"), here / "base")
    config = {
        "model": {"base": str(here / "base"), "adapter": "LoRA", "new_tokens": NEW, "learning_rate": 0.02},
        "data": {"train": rows, "batch_size": 3},
        "trainer": {"max_steps": 4, "max_epochs": -1, "default_root_dir": str(here / "run"),
                    "enable_progress_bar": False, "accelerator": "cpu"},
        "checkpoints": {"every_n_steps": 2},
    }  # fmt: skip
    (here / "my.yaml").write_text(json.dumps(config))
    assert main(["fit", "--config", str(here / "my.yaml")]) == 0
    return here


def test_merging_gives_a_model_with_the_new_rows(commanded, tmp_path):
    assert main(["export", str(commanded / "run"), "--merge", "--output", str(tmp_path / "merged")]) == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert len(merged.get_input_embeddings().weight) == merged.config.vocab_size == len(tokenizer)
    adapter = load_trained(commanded / "run" / "model")
    assert torch.allclose(logits(merged, len(tokenizer)), logits(adapter, len(tokenizer)), atol=1e-5)


def test_a_checkpoint_exports_what_the_run_exported(commanded, tmp_path):
    checkpoint = commanded / "run" / "checkpoints" / "last.ckpt"
    out = tmp_path / "again"
    assert main(["export", str(commanded / "run"), "--ckpt_path", str(checkpoint), "--output", str(out)]) == 0
    for name in ("adapter_model.safetensors", "tokenizer.json"):
        assert (out / name).read_bytes() == (commanded / "run" / "model" / name).read_bytes()


def test_the_exported_model_answers_to_the_command(commanded, capsys):
    assert main(["generate", str(commanded / "run"), "--prompt", "<obs>", "--max_new_tokens", "4"]) == 0


# ------------------------------------------------------------------------------------------------ tokenizers


def test_a_tokenizer_with_more_tokens_than_the_model(model_folder, tokenizer, rows, tmp_path):
    """Refused with the option's name; with it, all rows beyond are there, and the named one's row is as it was."""
    other = transformers.AutoTokenizer.from_pretrained(model_folder("llama"))
    other.add_tokens(["<obs>", "<|tool|>", "<unused>"], special_tokens=True)
    other.save_pretrained(tmp_path)
    data = SFTDataModule(train=rows, batch_size=3)
    bare = module_of(model_folder("llama"), LoRA(r=2), tokenizer=str(tmp_path), new_tokens=None)
    with pytest.raises(SFTError, match=r'row 1(.|\n)*model\.new_tokens: \["<obs>", "<\|tool\|>"\]'):
        Trainer(**QUIET).fit(bare, data)
    known = ["<|im_start|>", "<obs>"]
    module = module_of(model_folder("llama"), LoRA(r=2), tokenizer=str(tmp_path), new_tokens=known)
    old = len(tokenizer)
    assert module.vocabulary == old + 3
    assert module.rows.fresh == (old, old + 1, old + 2)
    assert module.rows.trained == (tokenizer.convert_tokens_to_ids("<|im_start|>"), *module.rows.fresh)
    module.configure_model()
    before = transformers.AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    assert torch.equal(weights(module.loaded, "input")[:old], weights(before, "input"))


def test_a_token_without_a_row_of_its_own_may_take_a_spare_one(tokenizer, tmp_path):
    """Models with more rows than their tokenizer has tokens don't grow; the spare row becomes the mean."""
    folder = make_model_folder(tmp_path, "llama", tokenizer)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer) + 8)
    model.save_pretrained(folder)
    module = module_of(folder, LoRA(r=2), new_tokens=["<new>"])
    assert module.vocabulary == len(tokenizer) + 8
    assert module.rows.fresh == module.rows.trained == (len(tokenizer),)
    module.configure_model()
    now, then = weights(module.loaded, "output"), weights(model, "output")
    others = [n for n in range(len(then)) if n != len(tokenizer)]
    assert torch.equal(now[others], then[others])
    assert torch.allclose(now[len(tokenizer)], then[others].mean(0), atol=1e-6)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["<a>", "<a>"], r"model\.new_tokens: '<a>' is there twice"),
        ([" "], r"model\.new_tokens: ' ' is blank"),
        (["the"], r"model\.new_tokens: 'the' is an ordinary token(.|\n)*'<the>'"),
    ],
)
def test_names_that_cannot_be_new_tokens_are_refused(names, words, model_folder):
    assert "the" in transformers.AutoTokenizer.from_pretrained(model_folder("llama")).get_vocab()
    module = module_of(model_folder("llama"), Full(), new_tokens=names)
    with pytest.raises(SFTError, match=words):
        _ = module.tokenizer


# -------------------------------------------------------------------------------------------------- adapters


class HeadOnly(Full):
    """Trains the output embedding alone."""

    def prepare(self, model):
        model.requires_grad_(False)
        model.get_output_embeddings().requires_grad_(True)
        return model


def test_an_adapter_that_leaves_the_rows_is_refused(model_folder):
    with pytest.raises(SFTError, match=r"HeadOnly(.|\n)*in the input embedding"):
        module_of(model_folder("llama"), HeadOnly()).configure_model()


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_low_rank_updates_of_an_embedding_and_rows_of_it_exclude_each_other(target, model_folder):
    with pytest.raises(SFTError, match=r"both low-rank updates and rows(.|\n)*out of target_modules"):
        module_of(model_folder("llama"), LoRA(target_modules=["q_proj", target])).configure_model()


def test_rows_beside_a_head_with_a_bias_are_refused(tokenizer, tmp_path):
    config = transformers.GPTJConfig(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=4, rotary_dim=4)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(SFTError, match=r"a bias(.|\n)*modules_to_save: \[transformer\.wte, lm_head\]"):
        module_of(tmp_path, LoRA(r=2)).configure_model()
    module = module_of(tmp_path, Full())
    module.configure_model()
    bias = module.loaded.lm_head.bias.detach()
    assert bias[-1] == pytest.approx(bias[:-2].mean().item(), abs=1e-7)


def test_a_base_from_peft_itself_with_grown_embeddings_can_be_loaded(model_folder, tokenizer, tmp_path):
    """peft writes the whole embeddings where it finds them grown."""
    base = transformers.AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    base.resize_token_embeddings(len(tokenizer) + 5)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    loaded = load_trained(tmp_path)
    assert torch.equal(logits(loaded, len(tokenizer) + 5), logits(model, len(tokenizer) + 5))
