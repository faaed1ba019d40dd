"""The head only where it counts: logits at trained positions, in chunks, with the gradient made in forward.

Hidden states are gathered at the positions that predict a trained token; the output embedding and the loss
run over chunks of them. Each chunk's gradient is taken at once (the trick of Liger-Kernel's fused linear
cross-entropy, Hsu et al. 2024), so neither `[n, vocab]` logits nor their gradient are ever held whole.
The loss inside a chunk may be any `Loss`; cross-entropy on a plain linear head goes without autograd, in place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_sft import plugins
from lightning_sft.bases import Loss, TokenBatch
from lightning_sft.errors import SFTError
from lightning_sft.training import linear_cross_entropy
from lightning_sft.training.new_tokens import rows_beside

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK = 512
"""Positions per chunk: large enough for fast matrix products, small enough that a chunk's logits stay small."""


@dataclass(frozen=True, slots=True)
class Head:
    """From hidden states to logits, as the model itself does it after its last norm.

    Args:
        linear: The output embedding.
        scale: Factor of the logits (Cohere, Granite, Falcon-H1).
        softcap: Logits become `softcap · tanh(logit / softcap)` (Gemma 2).
    """

    linear: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits `[n, V]`, in at least float32, of hidden states `[n, H]`."""
        linear, rows = rows_beside(self.linear)
        logits = linear(hidden)
        if rows is not None:
            own = nn.functional.linear(hidden, rows.values.to(logits.dtype))
            logits = logits.index_copy(-1, rows.ids, own)
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def head_of(model: PreTrainedModel) -> Head:
    """The head that a model's configuration describes; `preflight` proves it right for the model at hand."""
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    if divisor := getattr(config, "logits_scaling", None):
        scale = scale / divisor
    return Head(
        linear=model.get_output_embeddings(),
        scale=float(scale),
        softcap=getattr(config, "final_logit_softcapping", None),
    )


class _NegativeLogLikelihood(Loss):
    """−log p(target): what evaluation reports, whatever the training loss is."""

    def per_token(self, batch: TokenBatch) -> Tensor:
        return nn.functional.cross_entropy(batch.logits, batch.targets, reduction="none")

    def as_cross_entropy(self) -> float:
        return 0.0


NLL: Loss = _NegativeLogLikelihood()


def weighted_loss(hidden: Tensor, targets: Tensor, weights: Tensor, head: Head, loss: Loss) -> Tensor:
    """Σ weight · loss over `n` positions, a scalar in at least float32.

    Args:
        hidden: `[n, H]`: the model's last hidden states where a trained token is predicted.
        targets: int64 `[n]`.
        weights: float `[n]`.
        head: The model's head.
        loss: The loss per token.
    """
    if not torch.is_grad_enabled():
        return _sum_over_chunks(hidden, targets, weights, head, loss)
    parameters = [p for p in head.linear.parameters() if p.requires_grad]
    total: Tensor = _ChunkedLoss.apply(hidden, targets, weights, head, loss, *parameters)
    return total


def _chunk_loss(hidden: Tensor, targets: Tensor, weights: Tensor, head: Head, loss: Loss) -> Tensor:
    logits = head(hidden)
    per_token = loss.per_token(TokenBatch(logits=logits, targets=targets, weights=weights))
    if per_token.shape != targets.shape:
        raise SFTError(
            f"the {plugins.describe(loss)} gave a loss of shape {list(per_token.shape)} for {len(targets)} tokens",
            where="model.loss",
            fix="its per_token() must return one loss for each token",
        )
    return (per_token * weights.to(per_token.dtype)).sum()


def _sum_over_chunks(hidden: Tensor, targets: Tensor, weights: Tensor, head: Head, loss: Loss) -> Tensor:
    chunks = zip(hidden.split(CHUNK), targets.split(CHUNK), weights.split(CHUNK), strict=True)
    return torch.stack([_chunk_loss(*chunk, head, loss) for chunk in chunks]).sum()


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        weights: Tensor,
        head: Head,
        loss: Loss,
        *parameters: Tensor,
    ) -> Tensor:
        needs_hidden = ctx.needs_input_grad[0]
        hidden_grad = torch.empty_like(hidden) if needs_hidden else None
        exact = [torch.promote_types(p.dtype, torch.float32) for p in parameters]
        parameter_grads = [torch.zeros_like(p, dtype=d) for p, d in zip(parameters, exact, strict=True)]
        losses = []
        gradient_of = linear_cross_entropy.gradients_for(head, loss, parameters)
        for start in range(0, len(hidden), CHUNK):
            chunk = slice(start, start + CHUNK)
            if gradient_of is not None:
                value, grads = gradient_of(hidden[chunk], targets[chunk], weights[chunk], needs_hidden)
            else:
                with torch.enable_grad():
                    piece = hidden[chunk].detach().requires_grad_(needs_hidden)
                    value = _chunk_loss(piece, targets[chunk], weights[chunk], head, loss)
                    inputs = ([piece] if needs_hidden else []) + list(parameters)
                    grads = list(torch.autograd.grad(value, inputs)) if inputs else []
            if hidden_grad is not None:
                hidden_grad[chunk] = grads.pop(0)
            for total, grad in zip(parameter_grads, grads, strict=True):
                total += grad
            losses.append(value.detach())
        ctx.save_for_backward(*([hidden_grad] if hidden_grad is not None else []), *parameter_grads)
        ctx.needs_hidden = needs_hidden
        ctx.dtypes = [p.dtype for p in parameters]
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grad_outputs
        saved = list(ctx.saved_tensors)
        hidden_grad = None
        if ctx.needs_hidden:
            hidden_grad = saved.pop(0)
            hidden_grad = hidden_grad * scale.to(hidden_grad.dtype)
        grads = [(g * scale.to(g.dtype)).to(d) for g, d in zip(saved, ctx.dtypes, strict=True)]
        return hidden_grad, None, None, None, None, *grads
