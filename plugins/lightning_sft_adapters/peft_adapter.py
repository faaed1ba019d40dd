"""What all adapters have in common that peft puts into the model, beside frozen weights."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_sft import Adapter, SFTError

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

OURS = "default"
"""The name that peft gives the adapter in training; it is saved in the folder itself, others below it."""


class PeftAdapter(Adapter):
    """An adapter of peft's: made of its configuration, of a saved one, and with others at its side."""

    init_from: str | None
    beside: dict[str, str] | None

    @abstractmethod
    def config(self, model: PreTrainedModel) -> PeftConfig:
        """The adapter's configuration, for this model."""

    def prepare(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model with the adapter in it; only the adapter is trained.

        Raises:
            SFTError: The options don't fit each other or the model, or a saved adapter doesn't.
        """
        from peft import get_peft_model

        with self.refusing():
            adapted: PeftModel = get_peft_model(model, self.config(model))
            if self.init_from is not None:
                self._start_from(adapted, saved_adapter(self.init_from, "init_from"))
        if self.beside:
            self._put_beside(adapted, self.beside)
        return adapted

    def export(self, model: PreTrainedModel, folder: Path) -> None:
        """Write the adapter as `PeftModel.from_pretrained` loads it, and those at its side in folders below.

        The base that it is put on needs the rows of new tokens.
        """
        # peft would put the whole embeddings beside the rows that were trained.
        model.save_pretrained(folder, save_embedding_layers=False if self.new_token_ids else "auto")

    @contextmanager
    def base_model(self, model: PreTrainedModel) -> Iterator[PreTrainedModel]:
        """The model with its adapters switched off."""
        with model.disable_adapter():
            yield model

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """What peft refuses in here is told as the user's."""
        try:
            yield
        except (
            ValueError, TypeError, LookupError, AttributeError, RuntimeError, ImportError, re.error
        ) as error:  # fmt: skip
            raise SFTError(
                str(error),
                where=f"model.adapter ({type(self).__name__})",
                fix="change the adapter's options",
            ) from error

    def _start_from(self, adapted: PeftModel, folder: Path) -> None:
        """Load a saved adapter's weights into the one just made.

        Raises:
            SFTError: It has other parameters, or another scale.
        """
        from peft import PeftConfig, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

        where = f"model.adapter.init_from: {folder}"
        saved, config = PeftConfig.from_pretrained(str(folder)), adapted.peft_config[OURS]
        weights = load_peft_weights(str(folder), device="cpu")
        ours = {name: tuple(t.shape) for name, t in get_peft_model_state_dict(adapted).items()}
        theirs = {name: tuple(t.shape) for name, t in weights.items()}
        if different := sorted({name for name, _ in ours.items() ^ theirs.items()}):
            raise SFTError(
                f"the saved adapter has other parameters than this one ({len(different)} differ in name or shape, the "
                f"first: {different[0]}, {theirs.get(different[0], 'not there')} -> "
                f"{ours.get(different[0], 'not there')})",
                where=where,
                fix="give the options that it was made with (its adapter_config.json), or start from it with Peft",
            )
        for option in ("peft_type", "lora_alpha", "use_rslora", "alpha_pattern"):
            before, now = getattr(saved, option, None), getattr(config, option, None)
            if before != now:
                raise SFTError(
                    f"{option} is {now} here, and {before} in the saved adapter",
                    where=where,
                    fix="give the options that it was made with, or start from it with Peft",
                )
        set_peft_model_state_dict(adapted, weights)

    def _put_beside(self, adapted: PeftModel, others: Mapping[str, str]) -> None:
        """Add saved adapters, frozen and at work together with the one in training."""
        trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
        for name, folder in others.items():
            place = saved_adapter(folder, f"beside.{name}")
            if not name.isidentifier() or name == OURS:
                raise SFTError(
                    f"{name!r} can't be an adapter's name",
                    where="model.adapter.beside",
                    fix=f"use letters and digits, and not {OURS!r}",
                )
            with self.refusing():
                adapted.load_adapter(str(place), adapter_name=name, is_trainable=False)
        with self.refusing():
            adapted.base_model.set_adapter([OURS, *others])
        for name, parameter in adapted.named_parameters():
            parameter.requires_grad = name in trained


def saved_adapter(name: str, option: str) -> Path:
    """The folder of a saved adapter.

    Raises:
        SFTError: There is none.
    """
    folder = Path(name)
    if not (folder / "adapter_config.json").is_file():
        raise SFTError(
            "no saved adapter there (no adapter_config.json)",
            where=f"model.adapter.{option}: {name}",
            fix="give the folder of one, such as a run's model/",
        )
    return folder
