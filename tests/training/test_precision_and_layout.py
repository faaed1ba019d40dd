"""What a model is tried for before it is trained, and what a precision must not touch."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from lightning.pytorch import Trainer

from lightning_sft import Adapter, Loss, SFTDataModule, SFTError, SFTModule
from lightning_sft.training.layout import find_layout

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}


@pytest.fixture
def rows(tmp_path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "\n".join(json.dumps({"instruction": f"say {n}", "output": f"{n} " * (n + 1)}) for n in range(24))
    )
    return str(path)


def trained(
    precision: str, folder, rows: str, adapter: Adapter | None = None
) -> tuple[SFTModule, dict[str, float]]:
    module = SFTModule(base=str(folder), adapter=adapter)
    trainer = Trainer(
        precision=precision, max_epochs=1, limit_train_batches=2, enable_model_summary=False, **QUIET
    )
    trainer.fit(module, SFTDataModule(train=rows, val=rows, batch_size=2))
    return module, {name: float(value) for name, value in trainer.callback_metrics.items()}


class TestBf16True:
    def test_weights_are_bfloat16_but_sums_and_rope_are_not_rounded(self, model_folder, rows):
        module, _ = trained("bf16-true", model_folder("llama"), rows)
        assert {parameter.dtype for parameter in module.model.parameters()} == {torch.bfloat16}
        assert module.metrics["val"]["loss"].mean_value.dtype == torch.float32
        assert module.model.model.rotary_emb.inv_freq.dtype == torch.float32

    def test_adapters_stay_float32(self, model_folder, rows):
        from lightning_sft_adapters.lora import LoRA

        module, _ = trained("bf16-true", model_folder("llama"), rows, LoRA(r=2))
        assert {p.dtype for p in module.model.parameters() if p.requires_grad} == {torch.float32}

    def test_validation_loss_is_the_float64_sum_over_the_batches(self, model_folder, rows):
        module, metrics = trained("bf16-true", model_folder("llama"), rows)
        data = SFTDataModule(val=rows, batch_size=2)
        sums = []

        class Spy(SFTModule):
            def weighted_loss(self, batch, loss):
                total = super().weighted_loss(batch, loss)
                sums.append((float(total), float(batch.weights.double().sum())))
                return total

        spy = Spy(base=str(model_folder("llama")))
        spy.model = module.model
        (result,) = Trainer(precision="bf16-true", **QUIET).validate(spy, data, verbose=False)
        expected = sum(total for total, _ in sums) / sum(weight for _, weight in sums)
        assert result["val/loss"] == pytest.approx(expected, rel=1e-6)
        assert metrics["val/loss"] == pytest.approx(expected, rel=1e-6)


def llama(**changes):
    from conftest import tiny_config

    config = tiny_config("llama", 64)
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config)


class TestLayout:
    def test_a_window_that_only_a_mask_would_carry_means_padded_rows(self):
        config = transformers.PhimoeConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=2, sliding_window=200, max_position_embeddings=512,
            rope_scaling=None,
        )  # fmt: skip
        layout = find_layout(transformers.AutoModelForCausalLM.from_config(config), 0)
        assert "sliding window" in layout.padded_because

    def test_a_window_longer_than_the_trial_is_trusted_where_the_model_tells_it(self):
        from conftest import tiny_config

        config = tiny_config("mistral", 64)
        config.sliding_window = 200
        assert find_layout(transformers.AutoModelForCausalLM.from_config(config), 0).padded_because is None

    def test_nan_is_not_taken_for_equal(self):
        model = llama()
        model.model.norm.weight.data.fill_(float("nan"))
        assert find_layout(model, 0).padded_because is not None

    def test_the_model_is_as_it_was_after_a_trial_that_fails(self):
        model = llama()
        model.model.norm.weight.data.fill_(float("nan"))
        model.train()
        find_layout(model, 0)
        assert model.config._attn_implementation == "sdpa"
        assert all(module.training for module in model.modules())


class Mean(Loss):
    """A loss that gets its shape wrong."""

    def per_token(self, batch):
        return batch.logits.mean()


def test_a_loss_that_is_not_one_per_token_is_refused(model_folder, rows):
    module = SFTModule(base=str(model_folder("llama")), loss=Mean())
    trainer = Trainer(max_steps=1, enable_model_summary=False, **QUIET)
    with pytest.raises(SFTError, match=r"gave a loss of shape \[\] for"):
        trainer.fit(module, SFTDataModule(train=rows, batch_size=2))


def test_the_revision_of_the_base_goes_with_the_adapter(model_folder):
    from lightning_sft_adapters.lora import LoRA

    module = SFTModule(base=str(model_folder("llama")), adapter=LoRA(r=2), revision="v1")
    module.configure_model()
    assert module.model.peft_config["default"].revision == "v1"
