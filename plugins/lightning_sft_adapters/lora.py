"""LoRA: low-rank adapters beside frozen weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_sft import Adapter, SFTError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LoRA(Adapter):
    """Trains low-rank updates of linear layers and leaves the base as it is (Hu et al., 2021), through peft.

    Args:
        r: Rank of the updates.
        alpha: Scale of the updates: they are multiplied by alpha / r (alpha / √r with `rslora`).
        dropout: Probability of dropping an adapter's input.
        target_modules: Names (or one regular expression) of the layers to adapt; `all-linear` is every linear
            layer except the output embedding.
        modules_to_save: Layers to train in full beside the adapters.
        rslora: Rank-stabilised scaling (Kalajdzievski, 2023).
        dora: Weight-decomposed updates (Liu et al., 2024).
    """

    default_learning_rate = 2e-4
    saves_memory = True

    def __init__(
        self,
        r: int = 16,
        alpha: float = 32,
        dropout: float = 0.0,
        target_modules: str | list[str] = "all-linear",
        modules_to_save: list[str] | None = None,
        rslora: bool = False,
        dora: bool = False,
    ) -> None:
        self.r = r
        self.alpha = alpha
        self.dropout = dropout
        self.target_modules = target_modules
        self.modules_to_save = modules_to_save
        self.rslora = rslora
        self.dora = dora

    def prepare(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model with adapters in its linear layers; only they are trained.

        Raises:
            SFTError: The options don't fit each other or the model.
        """
        from peft import LoraConfig, get_peft_model

        try:
            config = LoraConfig(
                task_type="CAUSAL_LM",
                r=self.r,
                lora_alpha=self.alpha,
                lora_dropout=self.dropout,
                target_modules=self.target_modules,
                modules_to_save=self.modules_to_save,
                use_rslora=self.rslora,
                use_dora=self.dora,
            )
            return get_peft_model(model, config)
        except ValueError as error:
            raise SFTError(
                str(error), where="model.adapter (LoRA)", fix="change the adapter's options"
            ) from error

    def export(self, model: PreTrainedModel, folder: Path) -> None:
        """Write the adapter, as `PeftModel.from_pretrained` loads it."""
        model.save_pretrained(folder)

    @contextmanager
    def base_model(self, model: PreTrainedModel) -> Iterator[PreTrainedModel]:
        """The model with its adapters switched off."""
        with model.disable_adapter():
            yield model
