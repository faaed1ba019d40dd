"""LoRA: low-rank adapters beside frozen weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from lightning_sft import RateGroup, SFTError
from lightning_sft_adapters import corda, heavy, lora_checks
from lightning_sft_adapters.peft_adapter import OURS, PeftAdapter

_INITS: dict[str, Any] = {"default": True, "pissa_fast": "pissa_niter_16"}
_MOVES_BASE = ("olora", "pissa", "pissa_fast", "corda")
_LOOKS_AT_ROWS = ("eva", "corda")


class LoRA(PeftAdapter):
    """Trains low-rank updates of linear layers and leaves the base as it is (Hu et al., 2021), through peft.

    The embeddings' rows of new tokens (`model.new_tokens`) are trained in full.

    Args:
        r: Rank of the updates.
        alpha: Scale of the updates: they are multiplied by alpha / r (alpha / √r with `rslora`).
        dropout: Probability of dropping an adapter's input.
        target_modules: Names (or one regular expression) of the layers to adapt; `all-linear` is every linear
            layer except the output embedding.
        exclude_modules: Names (or one regular expression) of layers that get no adapter all the same.
        target_parameters: Names of parameters to adapt that are no layer's weight, as experts of mixtures often are.
        layers: Numbers of the blocks to adapt; all by default.
        layers_pattern: Name of the list that the blocks are in, where peft can't find it.
        rank_pattern: Other ranks, by layer names or regular expressions.
        alpha_pattern: Other alphas, by layer names or regular expressions.
        bias: Biases to train besides: those of adapted layers, all, or none.
        lora_bias: Give B a bias.
        modules_to_save: Layers to train in full beside the adapters.
        trainable_tokens: Ids of tokens whose embedding rows are trained besides; or lists of them by embedding layer.
        rslora: Rank-stabilised scaling (Kalajdzievski, 2023).
        dora: Weight-decomposed updates (Liu et al., 2024).
        init: How A and B begin. `default` leaves the model's function as it is with B = 0; `gaussian` and
            `orthogonal` are other noise; `mica` (minor components) sets B to the smallest singular vectors of the
            weight and trains A alone; `olora` (Büyükakyüz, 2024) and `pissa` (Meng et al., 2024; `pissa_fast` with
            an approximate decomposition) take the main part out of the weights and train it; `eva` (Paischer et
            al., 2024) takes A from the activations on the training rows, and `corda` (Yang et al., 2024) takes out of
            the weights what matters most on them (its instruction-previewed mode).
        loraplus_ratio: LoRA+ (Hayou et al., 2024): learning rate of B over that of A, such as 16.
        init_from: A saved adapter with the same options, to start from.
        beside: Saved LoRA adapters by name, which stay frozen and work together with the one in training.
    """

    default_learning_rate = 2e-4
    saves_memory = True

    def __init__(
        self,
        r: int = 16,
        alpha: float = 32,
        dropout: float = 0.0,
        target_modules: str | list[str] = "all-linear",
        exclude_modules: str | list[str] | None = None,
        target_parameters: list[str] | None = None,
        layers: list[int] | None = None,
        layers_pattern: str | None = None,
        rank_pattern: dict[str, int] | None = None,
        alpha_pattern: dict[str, float] | None = None,
        bias: Literal["none", "all", "lora_only"] = "none",
        lora_bias: bool = False,
        modules_to_save: list[str] | None = None,
        trainable_tokens: list[int] | dict[str, list[int]] | None = None,
        rslora: bool = False,
        dora: bool = False,
        init: Literal[
            "default", "gaussian", "orthogonal", "mica", "olora", "pissa", "pissa_fast", "eva", "corda"
        ] = "default",
        loraplus_ratio: float = 1.0,
        init_from: str | None = None,
        beside: dict[str, str] | None = None,
    ) -> None:
        self.r = r
        self.alpha = alpha
        self.dropout = dropout
        self.target_modules = target_modules
        self.exclude_modules = exclude_modules
        self.target_parameters = target_parameters
        self.layers = layers
        self.layers_pattern = layers_pattern
        self.rank_pattern = rank_pattern
        self.alpha_pattern = alpha_pattern
        self.bias = bias
        self.lora_bias = lora_bias
        self.modules_to_save = modules_to_save
        self.trainable_tokens = trainable_tokens
        self.rslora = rslora
        self.dora = dora
        self.init = init
        self.loraplus_ratio = loraplus_ratio
        self.init_from = init_from
        self.beside = beside
        self.looks_at_rows = init in _LOOKS_AT_ROWS
        self._initial: dict[str, heavy.Tensor] = {}
        self._fast: set[str] = set()
        self._check()

    def config(self, model: heavy.PreTrainedModel) -> heavy.PeftConfig:
        """The configuration that peft makes of these options."""
        from peft import EvaConfig, LoraConfig

        targets = self.target_modules
        if self.layers is not None and targets == "all-linear":
            targets = _linear_layers(model)  # peft takes `layers` with a list of names only
        optional: dict[str, Any] = {
            "target_parameters": self.target_parameters,
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": self.alpha_pattern,
        }
        if self.init == "eva":
            optional["eva_config"] = EvaConfig(rho=1.0)  # the rank stays, so that checkpoints fit
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=targets,
            exclude_modules=self.exclude_modules,
            layers_to_transform=self.layers,
            layers_pattern=self.layers_pattern,
            bias=self.bias,
            lora_bias=self.lora_bias,
            modules_to_save=self.modules_to_save,
            trainable_token_indices=self._token_rows(model),
            use_rslora=self.rslora,
            use_dora=self.dora,
            # CorDA comes later, when there are rows to look at; without weights (in a plan) all take the same room
            init_lora_weights=True
            if self.init == "corda" or _without_weights(model)
            else _INITS.get(self.init, self.init),
            **{name: value for name, value in optional.items() if value is not None},
        )

    def prepare(self, model: heavy.PreTrainedModel) -> heavy.PreTrainedModel:
        """The model with adapters in its linear layers; only they are trained.

        Raises:
            SFTError: The options don't fit each other or the model.
        """
        import torch

        if self.init in (*_MOVES_BASE, "mica") and getattr(model, "is_quantized", False):
            raise SFTError(
                f"init {self.init} takes the base's weights apart, which are quantised",
                where=f"model.adapter.init ({type(self).__name__})",
                fix="use init: default or eva",
            )
        lora_checks.check_patterns(self)
        lora_checks.check_tokens(self, model)
        with self.refusing():
            lora_checks.check_embeddings(self, model, moves_base=self.init in _MOVES_BASE)
        before = [name for name, _ in model.named_modules()]
        with torch.random.fork_rng(devices=[], enabled=self.init == "pissa_fast"):
            if (
                self.init == "pissa_fast"
            ):  # which draws: the base must be the same again on resuming and export
                torch.manual_seed(0)
            adapted = super().prepare(model)
        lora_checks.check_names(self, adapted, before)
        if self.init in (*_MOVES_BASE, "eva"):
            lora_checks.check_ranks(self, adapted, OURS)
        trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
        if self.init in _MOVES_BASE and self.init not in _LOOKS_AT_ROWS:
            self._initial = {name: _kept(p) for name, p in trained.items()}
        # as peft's create_loraplus_optimizer has it
        self._fast = {name for name, p in trained.items() if "lora_B" in name or p.ndim == 1}
        return adapted

    def initialize(
        self, model: heavy.PreTrainedModel, batches: Iterable[Any], forward: Callable[[Any], None]
    ) -> None:
        """Take A from the activations (EVA: their first right singular vectors), or A and B out of the base (CorDA).

        All ranks see the rows of all.
        """
        if self.init == "corda":
            with self.refusing():
                corda.begin(model, model.peft_config[OURS], batches, forward)
            trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
            self._initial = {name: _kept(p) for name, p in trained.items()}
            corda.take_out(model)
            return
        from peft import initialize_lora_eva_weights

        def mask(batch: Any, config: object) -> heavy.Tensor | None:
            return None if batch.attention_mask is None else batch.attention_mask.bool()

        def seen(given: Any, mask: heavy.Tensor | None, name: str) -> heavy.Tensor:
            states: heavy.Tensor = given[0] if isinstance(given, tuple) else given
            return states.flatten(0, -2) if mask is None else states[mask]

        ranks = [part.r[OURS] for part in model.modules() if OURS in getattr(part, "lora_A", ())]
        lora_checks.check_tokens_seen(self, max(ranks), batches)
        with self.refusing():
            initialize_lora_eva_weights(
                model,
                dataloader=batches,
                forward_fn=lambda _, batch: forward(batch),
                prepare_model_inputs_fn=mask,
                prepare_layer_inputs_fn=seen,
                show_progress_bar=False,
            )

    def initial_state(self) -> dict[str, heavy.Tensor]:
        """Where CorDA began: what was taken out of the base."""
        return self._initial if self.init == "corda" else {}

    def load_initial_state(self, model: heavy.PreTrainedModel, state: dict[str, heavy.Tensor]) -> None:
        """Take the same out of the base, once."""
        if self._initial:
            return
        self._initial = state
        parameters = dict(model.named_parameters())
        for name, value in state.items():
            parameters[name].data.copy_(value)
        corda.take_out(model)

    def rate_group(self, name: str) -> RateGroup:
        """B by itself, where it has a rate of its own."""
        if self.loraplus_ratio == 1:
            return RateGroup()
        return RateGroup("B", scale=self.loraplus_ratio) if name in self._fast else RateGroup("A")

    @property
    def has_rate_groups(self) -> bool:
        """Whether B has a rate of its own."""
        return self.loraplus_ratio != 1

    def _token_rows(self, model: heavy.PreTrainedModel) -> list[int] | dict[str, list[int]] | None:
        """The rows to train, those of new tokens among them."""
        given, rows = self.trainable_tokens, self._new_rows(model)
        if rows is None or not given:
            return rows or given
        more = given if isinstance(given, dict) else {next(iter(rows)): given}
        for name, ids in more.items():
            key = next((known for known in rows if known.endswith(name)), name)
            rows[key] = sorted({*rows.get(key, []), *ids})
        return rows

    def _new_rows(self, model: heavy.PreTrainedModel) -> dict[str, list[int]] | None:
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
                where=f"model.adapter ({type(self).__name__})",
                fix=f"train the embeddings in full: modules_to_save: [{', '.join(names)}]",
            )
        return rows or None

    def export(self, model: heavy.PreTrainedModel, folder: Path) -> None:
        """Write the adapter, as `PeftModel.from_pretrained` loads it.

        Where a part was taken out of the base's weights, it becomes an adapter of twice the rank for the whole base.
        """
        if not self._initial:
            super().export(model, folder)
            return
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        with TemporaryDirectory() as place:
            initial = Path(place) / "initial"
            initial.mkdir()
            with self._begun_anew(model):
                weights = {
                    name: t.clone().contiguous() for name, t in get_peft_model_state_dict(model).items()
                }
            save_file(weights, initial / "adapter_model.safetensors", metadata={"format": "pt"})
            model.save_pretrained(folder, path_initial_model_for_weight_conversion=str(initial))

    @contextmanager
    def base_model(self, model: heavy.PreTrainedModel) -> Iterator[heavy.PreTrainedModel]:
        """The model with its adapters switched off, or as they were at first where they are a part of the base."""
        if self._initial:
            with self._begun_anew(model):
                yield model
        else:
            with super().base_model(model):
                yield model

    @contextmanager
    def _begun_anew(self, model: heavy.PreTrainedModel) -> Iterator[None]:
        parameters = dict(model.named_parameters())
        now = {name: parameters[name].detach().clone() for name in self._initial}
        try:
            for name, value in self._initial.items():
                parameters[name].data.copy_(value)
            yield
        finally:
            for name, value in now.items():
                parameters[name].data.copy_(value)

    def _check(self) -> None:
        where = f"model.adapter ({type(self).__name__})"
        if not 0 < self.loraplus_ratio < float("inf"):
            raise SFTError(
                f"loraplus_ratio is {self.loraplus_ratio}",
                where=where,
                fix="give a number above 0, such as 16",
            )
        if self.layers_pattern is not None and self.layers is None:
            raise SFTError(
                "layers_pattern says where the blocks of `layers` are, and layers isn't given",
                where=where,
                fix="give layers, or leave layers_pattern out",
            )
        if self.init == "mica" and self.loraplus_ratio != 1:
            raise SFTError(
                "init mica doesn't train B, so loraplus_ratio has no effect",
                where=where,
                fix="leave loraplus_ratio out",
            )
        if self.init not in _MOVES_BASE:
            return
        others = {
            "modules_to_save": self.modules_to_save,
            "trainable_tokens": self.trainable_tokens,
            "dora": self.dora,
            "bias": self.bias != "none",
            "lora_bias": self.lora_bias,
            "init_from": self.init_from,
            "beside": self.beside,
            "rslora and patterns of ranks or alphas": self.rslora
            and (self.rank_pattern or self.alpha_pattern),
        }
        if given := [name for name, value in others.items() if value]:
            raise SFTError(
                f"init {self.init} doesn't go together with {', '.join(given)}: the adapter couldn't be exported for "
                "the base as it is",
                where=where,
                fix="use init: default, or leave these out",
            )


def _kept(parameter: heavy.Tensor) -> heavy.Tensor:
    """A copy in the CPU's memory; of a parameter without numbers (in a plan) one without numbers."""
    value = parameter.detach()
    return value.clone() if value.is_meta else value.to("cpu", copy=True)


def _linear_layers(model: heavy.PreTrainedModel) -> list[str]:
    """The last parts of the names of all linear layers but the output embedding, as peft's `all-linear` has them."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    output = model.get_output_embeddings()
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear | Conv1D) and module is not output
        }
    )


def _without_weights(model: heavy.PreTrainedModel) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())
