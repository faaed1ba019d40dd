"""Full fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning_sft import Adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Full(Adapter):
    """Trains every parameter of the model."""

    def prepare(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model itself, with all parameters trained."""
        return model.requires_grad_(True)

    def export(self, model: PreTrainedModel, folder: Path) -> None:
        """Write the model, as `AutoModelForCausalLM.from_pretrained` loads it."""
        model.save_pretrained(folder)
