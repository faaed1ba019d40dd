"""What an adapter has to do, tried on a tiny Llama with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning_sft.bases import Adapter
from lightning_sft.errors import SFTError
from lightning_sft.testing.plugin import PluginTests

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_VOCABULARY = 64


class AdapterTests(PluginTests):
    """The tests of an adapter."""

    kind = "adapters"

    def make_base(self, folder: Path) -> Path:
        """A pre-trained model to try the adapter on, written to `folder`; override it for another architecture."""
        return write_tiny_llama(folder)

    def test_it_trains_something(self, tmp_path: Path) -> None:
        """Some parameter requires a gradient, and gets one."""
        check_trains(self.make(), self.make_base(tmp_path))

    def test_its_parameters_come_back_from_a_checkpoint(self, tmp_path: Path) -> None:
        """The trained parameters, under their names, are all that a checkpoint needs."""
        check_checkpoint(self.make(), self.make(), self.make_base(tmp_path))

    def test_its_export_reloads_to_the_same_logits(self, tmp_path: Path) -> None:
        """Through plain transformers or peft, from safetensors."""
        check_export(self.make(), self.make_base(tmp_path / "base"), tmp_path / "export")

    def test_the_base_is_what_it_was_or_refused(self, tmp_path: Path) -> None:
        """`base_model` computes what the base did before training, or raises SFTError."""
        check_base_model(self.make(), self.make_base(tmp_path))


def write_tiny_llama(folder: Path) -> Path:
    """A Llama of three layers with random weights of std 0.2, so that every change shows in its logits."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def check_trains(adapter: Adapter, base: Path) -> None:
    """Some parameter requires a gradient, and the loss gives it one."""
    model = _prepared(adapter, base)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained, f"{_name(adapter)} leaves no parameter to train"
    _logits(model, grad=True).square().mean().backward()
    assert any(p.grad is not None for p in trained), f"no gradient reaches what {_name(adapter)} trains"


def check_checkpoint(adapter: Adapter, other: Adapter, base: Path) -> None:
    """The trained parameters alone bring a newly prepared model to the same logits."""
    import torch

    model = _moved(_prepared(adapter, base))
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    again = _prepared(other, base)
    state = {name: value for name, value in model.state_dict().items() if name in names}
    assert set(state) == names, f"{_name(adapter)} trains {min(names - set(state))}, which state_dict() lacks"
    again.load_state_dict(state, strict=False)
    assert torch.allclose(_logits(again), _logits(model), atol=1e-5), (
        f"the trained parameters of {_name(adapter)} do not bring back the model: part of it is kept elsewhere"
    )


def check_export(adapter: Adapter, base: Path, folder: Path) -> None:
    """What `export` writes, loaded by transformers or peft, gives the same logits."""
    import torch
    from transformers import AutoModelForCausalLM

    model = _moved(_prepared(adapter, base))
    expected = _logits(model)
    folder.mkdir()
    adapter.export(model, folder)
    change = float((_logits(model) - expected).abs().max())
    # A quantised base computes in 16 bits, and on a CPU bitsandbytes changes kernels once its state has been read.
    rounding = 0.0 if adapter.quantization() is None else 0.05 * float(expected.abs().max())
    assert change <= rounding, f"{_name(adapter)}.export changes the model: its logits move by {change:.2g}"
    pickles = [
        path.name for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")
    ]
    assert not pickles, f"{_name(adapter)} writes {pickles[0]}: weights have to be safetensors"
    if (folder / "adapter_config.json").is_file():
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(_loaded(adapter, base), str(folder))
    else:
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    worst = float((_logits(loaded) - expected).abs().max())
    assert worst < max(rounding, 1e-3), (
        f"the model that {_name(adapter)} exports has logits that are off by {worst:.2g}"
    )


def check_base_model(adapter: Adapter, base: Path) -> None:
    """Within `base_model` the base's logits, afterwards the tuned ones; or SFTError."""
    import torch

    expected = _logits(_loaded(adapter, base))
    model = _moved(_prepared(adapter, base))
    tuned = _logits(model)
    try:
        with adapter.base_model(model) as untrained:
            found = _logits(untrained)
    except SFTError:
        return
    assert torch.allclose(found, expected, atol=1e-4), (
        f"{_name(adapter)}.base_model gives another model than the base before training"
    )
    assert torch.equal(_logits(model), tuned), f"{_name(adapter)}.base_model leaves the model changed"


def _loaded(adapter: Adapter, base: Path) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM

    quantization = adapter.quantization()
    options = {} if quantization is None else {"quantization_config": quantization}
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options)
    return model


def _prepared(adapter: Adapter, base: Path) -> PreTrainedModel:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return adapter.prepare(_loaded(adapter, base))


def _moved(model: PreTrainedModel) -> PreTrainedModel:
    """The model with trained parameters that are no longer what they were."""
    import torch

    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator).to(parameter) * 0.05
    return model


def _logits(model: PreTrainedModel, *, grad: bool = False) -> Tensor:
    import torch

    ids = torch.arange(1, 13).view(1, -1) * 5 % _VOCABULARY
    with torch.set_grad_enabled(grad):
        logits: Tensor = model.eval()(input_ids=ids, use_cache=False).logits.float()
    return logits


def _name(adapter: Adapter) -> str:
    return type(adapter).__name__
