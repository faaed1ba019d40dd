"""The load-balancing loss of mixture-of-experts models, as transformers computes it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_sft.errors import SFTError
from lightning_sft.training.layout import causal_lm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WHERE = "model.router_aux_loss"


class RouterLoss:
    """How unevenly the tokens of a micro-batch go to the experts (Switch Transformers, Fedus et al., 2021, eq. 4–6).

    It is the model's own function over all its tokens, trained or not, without padding. As a product of two means
    it isn't additive over rows: the mean of micro-batches isn't what one large batch would give, so unlike the
    token loss it depends on how rows are spread. It is averaged over the micro-batches of a step and its ranks.

    Args:
        model: The model, with or without a peft wrapper.
        coefficient: What it is multiplied by before it is added to the token loss.

    Raises:
        SFTError: The model has no such loss.
    """

    def __init__(self, model: nn.Module, coefficient: float) -> None:
        inner = causal_lm(model)
        self.coefficient = coefficient
        self._loss: Any = getattr(sys.modules[type(inner).__module__], "load_balancing_loss_func", None)
        experts, top_k = _experts(inner)
        if self._loss is None or experts is None or top_k is None:
            raise SFTError(
                f"{inner.config.model_type} models have no load-balancing loss in transformers",
                where=_WHERE,
                fix="leave it out",
            )
        self._experts, self._top_k = experts, top_k
        self._now: Tensor | None = None
        self._seen: list[Tensor] = []

    def add(self, router_logits: tuple[Tensor, ...] | None, attention_mask: Tensor | None) -> None:
        """Compute the loss of a micro-batch.

        Args:
            router_logits: `[T, experts]` of each layer.
            attention_mask: `[B, L]` of padded rows; None where there is no padding.

        Raises:
            SFTError: The model gives no router logits.
        """
        if not router_logits:
            raise SFTError("the model gives no router logits", where=_WHERE, fix="set it to false")
        self._now = self._loss(tuple(router_logits), self._experts, self._top_k, attention_mask)

    def take(self) -> Tensor:
        """Coefficient · loss of the micro-batch that was added last, a scalar; it is forgotten."""
        assert self._now is not None, "take() follows add()"
        loss, self._now = self._now, None
        self._seen.append(loss.detach())
        return self.coefficient * loss

    def mean(self) -> Tensor:
        """The loss, without coefficient, averaged over the micro-batches since the last call."""
        seen, self._seen = self._seen, []
        return torch.stack(seen).mean()


def router_loss(model: nn.Module, asked: bool | float | None) -> RouterLoss | None:
    """The router loss that the option asks for, or None.

    Args:
        model: The model.
        asked: None: if the model's configuration says `output_router_logits`; True: with its
            `router_aux_loss_coef`; a number: with that coefficient; False: never.

    Raises:
        SFTError: It is asked for, and the model has none.
    """
    config = causal_lm(model).config.get_text_config()
    if asked is None:
        asked = bool(getattr(config, "output_router_logits", False))
    if asked is False or asked == 0:
        return None
    if asked is True:
        coefficient = getattr(config, "router_aux_loss_coef", None)
        if coefficient is None:
            raise SFTError(
                f"the configuration of this {config.model_type} model has no router_aux_loss_coef",
                where=_WHERE,
                fix="give the coefficient, or leave the option out",
            )
        return RouterLoss(model, float(coefficient))
    return RouterLoss(model, float(asked))


def _experts(inner: PreTrainedModel) -> tuple[int | None, int | None]:
    """The number of experts, and how many of them each token goes to."""
    config = inner.config.get_text_config()
    known = (
        getattr(inner, "num_experts", None),
        getattr(config, "num_experts", None),
        getattr(config, "num_local_experts", None),
    )
    top_k = getattr(inner, "num_experts_per_tok", None) or getattr(config, "num_experts_per_tok", None)
    return next((n for n in known if n), None), top_k
