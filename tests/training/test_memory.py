"""Recomputed activations give the same gradients from less memory, and [n, vocabulary] is never held."""

from __future__ import annotations

import subprocess
import sys
from functools import cache

import numpy as np
import pytest
import torch
import transformers
import zoo
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_sft import SFTError, SFTModule
from lightning_sft.conversation import Meta
from lightning_sft.example import Example
from lightning_sft.training.head import CHUNK, NLL
from lightning_sft.training.layout import causal_lm
from lightning_sft.training.memory import checkpoint_layers
from lightning_sft_adapters.lora import LoRA
from lightning_sft_losses.cross_entropy import CrossEntropy

ADAPTERS = {
    "full": lambda: None,
    "lora": lambda: LoRA(r=2, dropout=0.3),
    "dora": lambda: LoRA(r=2, dora=True),
}


class Saved:
    """Bytes that the graph keeps for the backward pass, each storage once, parameters not counted."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.own = {p.untyped_storage().data_ptr() for p in (*module.parameters(), *module.buffers())}
        self.kept: dict[int, int] = {}

    def __enter__(self) -> Saved:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *args: object) -> None:
        self.hooks.__exit__(*args)

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def bytes(self) -> int:
        return sum(self.kept.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A function from a family to the folder of a model of six layers, with dropout where the family has some."""

    def make(name: str) -> str:
        path = tmp_path_factory.mktemp("models") / name
        if name == "gpt2":
            config = transformers.GPT2Config(
                vocab_size=len(tokenizer), n_positions=256, n_embd=32, n_layer=6, n_head=4,
                resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2,
            )  # fmt: skip
        else:
            config = zoo.CONFIGS[name]() if name in zoo.CONFIGS else transformers.LlamaConfig(**zoo.COMMON)
            config.vocab_size, config.num_hidden_layers, config.attention_dropout = len(tokenizer), 6, 0.2
            if getattr(config, "layer_types", None):
                config.layer_types = (config.layer_types * 6)[:6]
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
        tokenizer.save_pretrained(path)
        return str(path)

    return cache(make)


def step(base: str, adapter: str, checkpointing: bool):
    """Loss, gradients and saved bytes of one batch, with dropout from one seed."""
    torch.manual_seed(0)
    module = SFTModule(base=base, adapter=ADAPTERS[adapter](), gradient_checkpointing=checkpointing)
    module.configure_model()
    module.train()
    generator = torch.Generator().manual_seed(1)
    for name, p in module.named_parameters():
        if "lora_B" in name:  # else A has no gradient
            p.data = torch.randn(p.shape, generator=generator) * 0.1
    batch = module.layout.collate(zoo.examples((60, 31, 90)), 1.0)
    torch.manual_seed(2)
    with Saved(module) as saved:
        loss = module.weighted_loss(batch, module.loss)
    loss.backward()
    gradients = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    return module, float(loss.detach()), gradients, saved.bytes


@pytest.mark.parametrize(
    ("name", "adapter"),
    [("llama", "full"), ("llama", "lora"), ("llama", "dora"), ("gpt2", "full"), ("gpt2", "lora"),
     ("gemma2", "full"), ("qwen3_moe", "full"), ("bloom", "lora")],
)  # fmt: skip
def test_gradients_are_the_same_dropout_included_and_less_is_kept(name, adapter, folder):
    plain, loss, gradients, kept = step(folder(name), adapter, checkpointing=False)
    _, other, recomputed, still_kept = step(folder(name), adapter, checkpointing=True)
    assert (plain.layout.padded_because is None) == (name != "bloom")
    assert other == loss
    assert recomputed.keys() == gradients.keys()
    for key, gradient in gradients.items():
        assert (gradient is None) == (recomputed[key] is None), key
        if gradient is not None:
            assert torch.allclose(
                recomputed[key], gradient, rtol=1e-5, atol=1e-6 * float(gradient.abs().max())
            ), key
    assert any(gradient is not None and gradient.any() for gradient in recomputed.values())
    assert still_kept < 0.45 * kept


def test_in_frozen_layers_every_adapter_gets_its_gradient(folder):
    """With re-entrant checkpointing and frozen embeddings none would, without a word."""
    _, _, gradients, _ = step(folder("llama"), "lora", checkpointing=True)
    assert len(gradients) == 2 * 7 * 6
    assert all(gradient is not None and gradient.any() for gradient in gradients.values())


def test_validation_does_not_recompute(folder):
    module, _, _, _ = step(folder("llama"), "full", checkpointing=True)
    calls = []
    causal_lm(module.loaded).model.layers[0].mlp.register_forward_pre_hook(lambda *args: calls.append(1))
    batch = module.layout.collate(zoo.examples(), 1.0)
    module.weighted_loss(batch, module.loss).backward()
    assert len(calls) == 2
    with torch.no_grad():
        module.weighted_loss(batch, NLL)
    assert len(calls) == 3


def test_a_model_that_can_not_recompute_says_so():
    model = zoo.model("olmo3")
    type(model).supports_gradient_checkpointing, before = False, type(model).supports_gradient_checkpointing
    try:
        with pytest.raises(SFTError, match="can't recompute") as caught:
            checkpoint_layers(model)
    finally:
        type(model).supports_gradient_checkpointing = before
    assert caught.value.where == "model.gradient_checkpointing"


# ------------------------------------------------------------------------------------- a large vocabulary

LARGE, ROWS = 131_072, 3


def large_vocabulary(vocabulary: int, targets: int, loss=None) -> tuple[SFTModule, object]:
    """A module with a tiny body and this vocabulary, and a batch with about that many targets."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=targets,
    )  # fmt: skip
    module = SFTModule(base="tiny", loss=loss)
    module.model = transformers.AutoModelForCausalLM.from_config(config).train()
    length = targets // ROWS
    examples = []
    for number in range(ROWS):
        ids = np.random.default_rng(number).integers(1, vocabulary, length).astype(np.int32)
        weights = np.ones(length, np.float32)
        examples.append(Example(ids, weights, np.zeros(length, np.uint8), Meta("rows", number)))
    return module, module.layout.collate(examples, float(targets))


class Sizes(TorchDispatchMode):
    """The elements of the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else [out]:
            if isinstance(made, Tensor):
                self.largest = max(self.largest, made.numel())
        return out


@pytest.mark.parametrize("training", [True, False], ids=["training", "validation"])
@pytest.mark.parametrize("loss", [CrossEntropy(), CrossEntropy(0.1, z_loss=1e-4)], ids=["plain", "smoothed"])
def test_no_tensor_of_all_targets_times_the_vocabulary_is_made(loss, training):
    vocabulary, targets = 4096, 3 * CHUNK
    module, batch = large_vocabulary(vocabulary, targets, loss)
    with Sizes() as sizes:
        if training:
            module.weighted_loss(batch, module.loss).backward()
        else:
            with torch.no_grad():
                module.weighted_loss(batch, NLL)
    assert sizes.largest <= CHUNK * vocabulary < 0.4 * len(batch.targets) * vocabulary


MEASURE = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import torch
from test_memory import LARGE, NLL, large_vocabulary
targets, training = int(sys.argv[2]), sys.argv[3] == "training"
module, batch = large_vocabulary(LARGE, targets)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if training:
    module.weighted_loss(batch, module.loss).backward()
else:
    with torch.no_grad():
        module.weighted_loss(batch, NLL)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["training", "validation"])
def test_peak_memory_does_not_grow_with_the_targets_times_a_vocabulary_of_128k(what, tmp_path):
    """8,000 targets would make 4 GiB of float32 logits, and as much for their gradient."""

    def peak(targets: int) -> float:
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(zoo.__file__).rpartition("/")[0], str(targets), what],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split()[-1]) / 2**20

    small, large = peak(1026), peak(8001)
    assert large < 2.0, f"{large:.2f} GiB"
    assert large - small < 0.5, f"{small:.2f} GiB for 1,000 targets, {large:.2f} GiB for 8,000"
