"""Full fine-tuning."""

from __future__ import annotations

from pathlib import Path

from lightning_sft import Adapter, RateGroup
from lightning_sft_adapters import heavy
from lightning_sft_adapters.depth import check_rates, rate_groups


class Full(Adapter):
    """Trains every parameter of the model.

    Args:
        layer_decay: Factor of the learning rate from one block to the one below it (Howard & Ruder, 2018), such as
            0.9; the same rate for all by default.
        unfreeze_every: Gradual unfreezing (ibid.): begin with head and final norm, and add one block, from the top
            down, every so many optimizer steps.
    """

    def __init__(self, layer_decay: float | None = None, unfreeze_every: int | None = None) -> None:
        check_rates(layer_decay, unfreeze_every)
        self.layer_decay = layer_decay
        self.unfreeze_every = unfreeze_every
        self._groups: dict[str, RateGroup] = {}

    def prepare(self, model: heavy.PreTrainedModel) -> heavy.PreTrainedModel:
        """The model itself, with all parameters trained."""
        model.requires_grad_(True)
        self._groups = rate_groups(model, self.layer_decay, self.unfreeze_every)
        return model

    def rate_group(self, name: str) -> RateGroup:
        """By depth, if rates or starts differ."""
        return self._groups.get(name, RateGroup())

    @property
    def has_rate_groups(self) -> bool:
        """Whether rates or starts differ by depth."""
        return self.layer_decay is not None or self.unfreeze_every is not None

    def export(self, model: heavy.PreTrainedModel, folder: Path) -> None:
        """Write the model, as `AutoModelForCausalLM.from_pretrained` loads it."""
        model.save_pretrained(folder)
