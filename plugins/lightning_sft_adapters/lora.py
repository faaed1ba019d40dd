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

    The embeddings' rows of new tokens (`model.new_tokens`) are trained in full.

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
                trainable_token_indices=self._new_rows(model),
            )
            return get_peft_model(model, config)
        except (ValueError, TypeError) as error:
            raise SFTError(
                str(error), where="model.adapter (LoRA)", fix="change the adapter's options"
            ) from error

    def _new_rows(self, model: PreTrainedModel) -> dict[str, list[int]] | None:
        """The rows of new tokens, by the name of each embedding that isn't trained in full; of tied ones the first.

        Raises:
            SFTError: The output embedding has a bias, which peft leaves out where it trains rows.
        """
        if not self.new_token_ids:
            return None
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        parts = [embedding] if head.weight is embedding.weight else [embedding, head]
        names = [name for name, part in model.named_modules() if part in parts]
        in_full = tuple(self.modules_to_save or ())
        rows = {name: list(self.new_token_ids) for name in names if not name.endswith(in_full)}
        if rows and getattr(head, "bias", None) is not None:
            raise SFTError(
                "the rows of new tokens can't be trained beside an output embedding with a bias",
                where="model.adapter (LoRA)",
                fix=f"train the embeddings in full: modules_to_save: [{', '.join(names)}]",
            )
        return rows or None

    def export(self, model: PreTrainedModel, folder: Path) -> None:
        """Write the adapter, as `PeftModel.from_pretrained` loads it (on a base with the rows of new tokens)."""
        # peft would put the whole embeddings beside the rows that were trained.
        model.save_pretrained(folder, save_embedding_layers=False if self.new_token_ids else "auto")

    @contextmanager
    def base_model(self, model: PreTrainedModel) -> Iterator[PreTrainedModel]:
        """The model with its adapters switched off."""
        with model.disable_adapter():
            yield model
