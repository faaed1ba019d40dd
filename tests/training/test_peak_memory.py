"""A step on fake tensors needs what the step needs: counted against real tensors, and by hand."""

from __future__ import annotations

import weakref
from types import SimpleNamespace

import pytest
import torch
import zoo
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_sft import SFTModule
from lightning_sft.training.layout import batch_loss, find_layout
from lightning_sft.training.peak_memory import BETWEEN, KERNELS, PARTS, Twin
from lightning_sft.training.quantized import pretend_quantized
from lightning_sft_adapters.lora import LoRA
from lightning_sft_adapters.qlora import QLoRA


def module(config, adapter=None, precision: str = "32-true", **options) -> SFTModule:
    made = SFTModule(base="tiny", adapter=adapter, **options)
    made.__dict__["base_config"] = config
    made._trainer = SimpleNamespace(
        precision=precision, max_epochs=1, max_steps=9, estimated_stepping_batches=9, datamodule=None
    )
    return made


class Alive(TorchDispatchMode):
    """The most bytes of real storages that are alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor)
        return made

    def see(self, tensor):
        storage = tensor.untyped_storage()
        if storage not in self.seen:
            self.seen.add(storage)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.gone, storage.nbytes())

    def gone(self, size):
        self.now -= size


def really(made: SFTModule, examples) -> int:
    """The peak of the second of two real steps."""
    import transformers

    made.assemble(transformers.AutoModelForCausalLM.from_config(made.base_config, dtype=made.weights_dtype))
    made.loaded.train()
    layout = find_layout(made.loaded, 0)
    batch = layout.collate(examples, 1.0)
    optimizer = made.configure_optimizers()["optimizer"]
    with Alive() as alive:
        for tensor in (*made.loaded.parameters(), *made.loaded.buffers()):
            alive.see(tensor)
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=made.trainer.precision == "bf16-mixed"):
                loss = batch_loss(made.loaded, batch, layout, made.loss)
            optimizer.zero_grad()
            loss.backward()
            del loss
            optimizer.step()
    return alive.most


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("adapter", [None, LoRA(r=4)], ids=["full", "lora"])
def test_the_peak_is_that_of_real_tensors(adapter, precision, checkpointing):
    config = zoo.CONFIGS["olmo3"]()
    config.num_hidden_layers, config.layer_types = 4, ["full_attention"] * 4
    made = module(config, adapter, precision, gradient_checkpointing=checkpointing)
    twin = Twin(made)
    examples = zoo.examples((60, 31, 90))
    peak = twin.peak(twin.layout.collate(examples, 1.0))
    assert sum(peak.parts.get(part, 0) for part in PARTS) == pytest.approx(really(made, examples), rel=0.02)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "gemma2", "phimoe", "llama4", "lfm2", "falcon"])
def test_the_layout_is_expected_as_it_will_be_found(name):
    twin = Twin(module(zoo.CONFIGS[name]()))
    found = find_layout(zoo.model(name), 0)
    assert (twin.layout.padded_because is None) == (found.padded_because is None) == (name in zoo.FLATTENED)
    assert twin.peak(twin.layout.collate(zoo.examples(), 1.0)).total > 0


def test_parameters_are_those_of_peft():
    import peft
    import transformers

    config = zoo.CONFIGS["olmo3"]()
    twin = Twin(module(config, LoRA(r=4)))
    model = transformers.AutoModelForCausalLM.from_config(config)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    )
    assert (twin.trained, twin.parameters) == wrapped.get_nb_trainable_parameters()


def test_weights_gradients_and_averages_are_counted_by_hand():
    twin = Twin(module(zoo.CONFIGS["olmo3"]()))
    parts = twin.peak(twin.layout.collate(zoo.examples(), 1.0)).parts
    buffers = sum(b.nbytes for b in twin.model.buffers())
    assert parts["weights"] == 4 * twin.parameters + buffers
    assert 0 <= parts["optimizer"] - 8 * twin.parameters < 1024  # and the numbers of the step
    frozen = Twin(module(zoo.CONFIGS["olmo3"](), LoRA(r=4)))
    parts = frozen.peak(frozen.layout.collate(zoo.examples(), 1.0)).parts
    assert 0 <= parts["optimizer"] - 8 * frozen.trained < 1024


@pytest.mark.parametrize(("options", "bits"), [({"load_in_4bit": True}, 4.5), ({"load_in_8bit": True}, 8.0)])
def test_a_quantised_base_has_so_many_bits_a_weight(options, bits):
    made = module(zoo.CONFIGS["olmo3"](), LoRA(r=4))
    twin = Twin(made)
    linear = [
        layer.weight.numel()
        for name, layer in twin.model.named_modules()
        if type(layer) is torch.nn.Linear and "lora" not in name and "lm_head" not in name
    ]
    with twin.fake:
        packed = pretend_quantized(twin.model, SimpleNamespace(**options))
    assert len(packed) == len(linear)
    assert 8 * sum(p.nbytes for p in packed) / sum(linear) == pytest.approx(bits, rel=0.15)
    before = twin.peak(twin.layout.collate(zoo.examples(), 1.0))
    assert before.trained == twin.trained


class Made(Alive):
    """The bytes of what copies, casts, products and sums make, in order of size."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = self.now
        made = super().__torch_dispatch__(func, types, args, kwargs)
        if self.now != before and func.__name__.split(".")[0] in ("clone", "_to_copy", "mul", "add"):
            self.sizes.append(made.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_lora_on_quantised_layers_makes_what_it_makes_on_those_of_bitsandbytes(bits, autocast):
    import bitsandbytes
    import peft

    options = {f"load_in_{bits}bit": True}
    if bits == 4:
        options["bnb_4bit_compute_dtype"] = torch.bfloat16

    def sizes(layer, quantised):
        wrapped = torch.nn.ModuleDict({"layer": layer, "head": torch.nn.Linear(1, 1)})
        wrapped.requires_grad_(False)
        wrapped.get_output_embeddings = lambda: wrapped["head"]
        setattr(wrapped, f"is_loaded_in_{bits}bit", quantised)
        wrapped = peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["layer"]), wrapped)
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        if not quantised:
            assert len(pretend_quantized(wrapped, SimpleNamespace(**options))) == 1
        x = torch.ones(48, 256, requires_grad=True)
        with Made() as made:
            made.sizes = []
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                result = wrapped["layer"](x)
            result.float().sum().backward()
        return sorted(size for size in made.sizes if 2**14 < size < 2**16)  # of x and of the result

    if bits == 4:
        real = bitsandbytes.nn.Linear4bit(
            256, 320, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
        )
    else:
        real = bitsandbytes.nn.Linear8bitLt(256, 320, bias=False, has_fp16_weights=False, threshold=6.0)
    wanted = sizes(real.to("cpu"), True)
    assert len(wanted) > 3
    assert sizes(torch.nn.Linear(256, 320, bias=False), False) == wanted


@pytest.mark.parametrize(("compute", "forward", "backward"), [(torch.float32, 4, 4), (torch.bfloat16, 2, 6)])
def test_quantised_weights_are_made_anew_one_layer_at_a_time(compute, forward, backward):
    """In the type that is computed in; and for the backward pass in the one that they were loaded in first."""
    weight = torch.nn.Linear(512, 512, bias=False).requires_grad_(False)
    alive = []
    config = SimpleNamespace(load_in_4bit=True, bnb_4bit_compute_dtype=compute)
    wrapped = torch.nn.ModuleDict({"layer": weight, "head": torch.nn.Linear(1, 1)})
    wrapped.get_output_embeddings = lambda: wrapped["head"]
    pretend_quantized(wrapped, config)
    x = torch.zeros(2, 512, requires_grad=True)
    steps = ((lambda: alive.append(weight(x)), forward), (lambda: alive.pop().sum().backward(), backward))
    for step, size in steps:
        with Alive() as counted:
            step()
        assert counted.most == pytest.approx(size * 512 * 512, rel=0.02)
    assert x.grad.dtype == torch.float32


def test_kernels_are_those_of_bfloat16_on_a_cpu():
    examples = zoo.examples((60, 31, 90))

    def parts(precision, kind):
        twin = Twin(module(zoo.CONFIGS["olmo3"](), precision=precision), kind)
        return twin.peak(twin.layout.collate(examples, 1.0)).parts

    assert parts("bf16-mixed", "cpu")[KERNELS] == parts("bf16-true", "cpu")[KERNELS] > 0
    assert KERNELS not in parts("32-true", "cpu")
    adapter = QLoRA(r=2, compute_dtype="bfloat16")
    twin = Twin(module(zoo.CONFIGS["olmo3"](), adapter))
    assert KERNELS in twin.peak(twin.layout.collate(examples, 1.0)).parts
    assert not {KERNELS, BETWEEN} & parts("bf16-true", "cuda").keys()


def test_on_a_gpu_half_precision_attention_keeps_one_copy_of_keys():
    config = zoo.CONFIGS["mixtral"]()
    examples = zoo.examples((60, 31, 90))
    cpu, gpu = (
        twin.peak(twin.layout.collate(examples, 1.0)).parts["activations"]
        for twin in (Twin(module(config, precision="bf16-true"), kind) for kind in ("cpu", "cuda"))
    )
    assert gpu != cpu


def test_a_real_run_after_a_plan_sees_no_fake_masks():
    twin = Twin(module(zoo.CONFIGS["gemma2"]()))
    twin.peak(twin.layout.collate(zoo.examples(), 1.0))
    assert find_layout(zoo.model("gemma2"), 0).padded_because is None
