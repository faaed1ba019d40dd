"""Any other method of peft's, by its configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_sft import SFTError
from lightning_sft_adapters.peft_adapter import PeftAdapter, saved_adapter

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

_RATES = {
    "IA3": 3e-3,
    "VERA": 4e-3,
    "PROMPT_TUNING": 3e-2,
    "P_TUNING": 1e-3,
    "PREFIX_TUNING": 1e-3,
    "LORA": 2e-4,
}
_REFUSED = {
    "XLORA": "it computes the weights of its experts in a pass of its own",
    "POLY": "it needs task ids, which rows don't have",
    "ADALORA": "its ranks change with the step, which checkpoints don't hold",
    "MULTITASK_PROMPT_TUNING": "it needs task ids, which rows don't have",
    "LILY": "its router takes the mean over all tokens of a batch, so rows depend on each other",
    "CPT": "its loss is its own",
}
_REFUSED_LORA = {
    "arrow_config": "it routes between adapters that are trained already",
    "kasa_config": "it cuts the base's weights for good, and its loss is its own",
    "monteclora_config": "its loss is its own",
    "use_qalora": "it needs a base that GPTQ has quantised; other layers ignore it",
    "velora_config": "its gradients depend on which rows are in a batch, and its projections are in no checkpoint",
}
"""Options of LoraConfig that would train something else than they say."""
_NEEDS_DATA = ("eva", "corda", "loftq", "lora_ga")


class Peft(PeftAdapter):
    """Trains any adapter that peft has, by the class of its configuration: IA³, prompt and prefix tuning, OFT, VeRA, …

    Args:
        config: The configuration, such as `{class_path: peft.IA3Config}` with its options in `init_args`.
        init_from: A saved adapter of any kind to start from; without `config`, as it is.
        beside: Saved adapters of the same kind by name, which stay frozen and work together with the one in training.
    """

    default_learning_rate = 1e-3

    def __init__(
        self,
        config: PeftConfig | None = None,
        init_from: str | None = None,
        beside: dict[str, str] | None = None,
    ) -> None:
        self.given = config
        self.init_from = init_from
        self.beside = beside
        where = "model.adapter (Peft)"
        if config is None and init_from is None:
            raise SFTError(
                "neither config nor init_from is given",
                where=where,
                fix="give config: {class_path: peft.IA3Config}",
            )
        chosen = self._loaded() if config is None else config
        kind = str(chosen.peft_type.value)
        if kind in _REFUSED:
            raise SFTError(
                f"{kind} can't be trained here: {_REFUSED[kind]}", where=where, fix="use another method"
            )
        init = str(getattr(chosen, "init_lora_weights", ""))
        if init in _NEEDS_DATA or init.startswith(("pissa", "olora")):
            raise SFTError(
                f"init_lora_weights {init} changes the base, or needs the data",
                where=where,
                fix="use LoRA, whose init does pissa, olora, eva and corda",
            )
        if given := [option for option in _REFUSED_LORA if getattr(chosen, option, None)]:
            raise SFTError(
                f"{given[0]} can't be trained here: {_REFUSED_LORA[given[0]]}",
                where=where,
                fix="leave it out",
            )
        if getattr(chosen, "alora_invocation_tokens", None):
            raise SFTError(
                "activated LoRA depends on where its tokens are in each row", where=where, fix="use LoRA"
            )
        self.default_learning_rate = _RATES.get(kind, self.default_learning_rate)

    def config(self, model: PreTrainedModel) -> PeftConfig:
        """The given configuration, or that of the adapter to start from."""
        from copy import deepcopy

        chosen = deepcopy(self.given) if self.given is not None else self._loaded()
        chosen.task_type = "CAUSAL_LM"
        chosen.inference_mode = False
        return chosen

    def prepare(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model with the adapter in it.

        What is drawn for it depends on the run's seed alone: parts that aren't trained are in no checkpoint.

        Raises:
            SFTError: The options don't fit each other or the model.
        """
        import torch
        from peft.utils.constants import EMBEDDING_LAYER_NAMES

        embedding = model.get_input_embeddings()
        (name,) = (name for name, part in model.named_modules() if part is embedding)
        known = name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES
        if getattr(self.config(model), "ensure_weight_tying", False) and not known:
            raise SFTError(  # it would tie them in training, and not when the adapter is loaded
                f"peft can't tie adapters of {name}: it looks for {' and '.join(EMBEDDING_LAYER_NAMES)}",
                where="model.adapter (Peft)",
                fix="leave ensure_weight_tying out",
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch.initial_seed())
            return super().prepare(model)

    def _loaded(self) -> PeftConfig:
        from peft import PeftConfig

        return PeftConfig.from_pretrained(str(saved_adapter(str(self.init_from), "init_from")))
