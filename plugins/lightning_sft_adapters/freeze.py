"""Fine-tuning of a part of the model's own parameters."""

from __future__ import annotations

import re
from pathlib import Path

from lightning_sft import Adapter, RateGroup, SFTError
from lightning_sft_adapters import heavy
from lightning_sft_adapters.depth import check_rates, depths, rate_groups


class Freeze(Adapter):
    """Trains the last blocks of the model, and what is named besides; all else is frozen.

    Args:
        layers: How many blocks are trained, counted from the head.
        norms: Train all norms, too.
        embeddings: Train the input embeddings, too. Many models share them with the head.
        head: Train the output embedding, too.
        train: Regular expressions of parameters to train besides, found anywhere in their names.
        freeze: Regular expressions of parameters that stay frozen, whatever the other options say.
        layer_decay: Factor of the learning rate from one block to the one below it, such as 0.9; the same rate for
            all by default.
        unfreeze_every: Gradual unfreezing: begin with the topmost part, and add one block, from the top down, every
            so many optimizer steps.
    """

    def __init__(
        self,
        layers: int = 2,
        norms: bool = False,
        embeddings: bool = False,
        head: bool = False,
        train: list[str] | None = None,
        freeze: list[str] | None = None,
        layer_decay: float | None = None,
        unfreeze_every: int | None = None,
    ) -> None:
        check_rates(layer_decay, unfreeze_every)
        self.layers = layers
        self.norms = norms
        self.embeddings = embeddings
        self.head = head
        self.train = train
        self.freeze = freeze
        self.layer_decay = layer_decay
        self.unfreeze_every = unfreeze_every
        self._groups: dict[str, RateGroup] = {}

    def prepare(self, model: heavy.PreTrainedModel) -> heavy.PreTrainedModel:
        """The model itself, with the chosen parameters trained.

        Raises:
            SFTError: None would be, the model has fewer blocks, or a pattern fits no name.
        """
        chosen = self._chosen(model)
        if not chosen:
            raise SFTError(
                "every parameter would be frozen",
                where="model.adapter (Freeze)",
                fix="set layers to 1 or more, or name parameters to train",
            )
        for name, parameter in model.named_parameters():
            parameter.requires_grad = name in chosen
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
        """Write the whole model, as `AutoModelForCausalLM.from_pretrained` loads it."""
        model.save_pretrained(folder)

    def _chosen(self, model: heavy.PreTrainedModel) -> set[str]:
        names = [name for name, _ in model.named_parameters()]
        chosen = _named(self.train, names, "train")
        if self.layers:
            where, count = depths(model)
            if not 0 < self.layers <= count:
                raise SFTError(
                    f"layers is {self.layers}, and the model has {count} blocks",
                    where="model.adapter.layers (Freeze)",
                    fix=f"give a number from 0 to {count}",
                )
            chosen |= {name for name, depth in where.items() if count - self.layers <= depth < count}
        if self.norms:
            norms = [
                name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()
            ]
            chosen |= {name for name in names if name.rpartition(".")[0] in norms}
        embeddings = {id(p) for p in model.get_input_embeddings().parameters()}
        output = model.get_output_embeddings()
        head = {id(p) for p in output.parameters()} if output is not None else set()
        if embeddings & head and self.embeddings != self.head:
            raise SFTError(
                "this model's input and output embedding are one matrix",
                where="model.adapter (Freeze)",
                fix="set embeddings and head both or neither",
            )
        wanted = (embeddings if self.embeddings else set()) | (head if self.head else set())
        chosen |= {name for name, parameter in model.named_parameters() if id(parameter) in wanted}
        return chosen - _named(self.freeze, names, "freeze")


def _named(patterns: list[str] | None, names: list[str], option: str) -> set[str]:
    found: set[str] = set()
    for pattern in patterns or ():
        where = f"model.adapter.{option} (Freeze)"
        try:
            fits = {name for name in names if re.search(pattern, name)}
        except re.error as error:
            raise SFTError(
                f"{pattern!r} is no regular expression: {error}",
                where=where,
                fix="escape its special characters",
            ) from error
        if not fits:
            raise SFTError(
                f"no parameter's name has {pattern!r}",
                where=where,
                fix=f"they look like {names[0]}, {names[len(names) // 2]}, {names[-1]}",
            )
        found |= fits
    return found
