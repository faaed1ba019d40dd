"""A linear head and cross-entropy with their gradients written out, in place, chunk by chunk.

With z = softcap(scale · (W h + b)) and p = softmax(z), smoothing ε over V classes,

    loss = logsumexp(z) − (1 − ε) z_target − ε mean(z)        ∂loss/∂z = p − (1 − ε) onehot − ε / V

The logits turn into p and then into their gradient in the same memory, and the weight is cast once, not once a
chunk. What autograd would do takes three more tensors of that size. On CUDA, Liger-Kernel does the middle part
if it is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

from lightning_sft.training import kernels
from lightning_sft.training.new_tokens import Rows, rows_beside

if TYPE_CHECKING:
    from lightning_sft.bases import Loss
    from lightning_sft.training.head import Head

Gradients: TypeAlias = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, list[Tensor]]]
"""(hidden, targets, weights, with the gradient of hidden) → Σ weight · loss, gradients of hidden and parameters."""


def gradients_for(head: Head, loss: Loss, parameters: Sequence[nn.Parameter | Tensor]) -> Gradients | None:
    """What computes a chunk's loss and gradients, if the loss is cross-entropy and the head a plain linear.

    Args:
        head: The model's head.
        loss: The loss per token.
        parameters: Those of the head that are trained; their gradients come in this order.
    """
    smoothing = _smoothing(loss)
    linear, rows = rows_beside(head.linear)
    if (
        smoothing is None
        or type(linear) is not nn.Linear
        or linear._forward_hooks
        or linear._forward_pre_hooks
    ):
        return None
    kind = linear.weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else linear.weight.dtype
    weight = linear.weight.detach().to(dtype)
    bias = None if linear.bias is None else linear.bias.detach().to(dtype)
    beside = None if rows is None else Rows(rows.ids, rows.values.detach().to(linear.weight.dtype).to(dtype))

    def gradients(
        hidden: Tensor, targets: Tensor, weights: Tensor, with_hidden: bool
    ) -> tuple[Tensor, list[Tensor]]:
        hidden = hidden.detach()
        with torch.no_grad(), torch.autocast(kind, enabled=False):
            own, hidden = hidden.dtype, hidden.to(dtype)
            raw = nn.functional.linear(hidden, weight, bias)
            if beside is not None:
                raw.index_copy_(1, beside.ids, hidden @ beside.values.T)
            logits = raw.to(torch.promote_types(dtype, torch.float32))
            weights = weights.to(logits.dtype)
            value, grad = _of_linear_output(logits, targets, weights, smoothing, head)
            grad = raw.copy_(grad) if raw.dtype != grad.dtype else grad
            found, of_beside = [], None
            if beside is not None:
                of_beside = grad.index_select(1, beside.ids)
                grad.index_fill_(1, beside.ids, 0)
            if with_hidden:
                found.append((grad @ weight).to(own))
                if beside is not None and of_beside is not None:
                    found[0] += (of_beside @ beside.values).to(own)
            for parameter in parameters:
                if of_beside is not None and rows is not None and parameter is rows.values:
                    found.append(of_beside.T @ hidden)
                else:
                    found.append(grad.sum(0) if parameter is linear.bias else grad.T @ hidden)
        return value, found

    return gradients


def _of_linear_output(
    logits: Tensor, targets: Tensor, weights: Tensor, smoothing: float, head: Head
) -> tuple[Tensor, Tensor]:
    """Σ weight · loss and its gradient by the linear's output, which it overwrites."""
    if head.scale != 1.0:
        logits.mul_(head.scale)
    slope = None
    if head.softcap is not None:
        tanh = logits.div_(head.softcap).tanh_()
        slope = 1 - tanh.square()
        logits = tanh.mul_(head.softcap)
    kernel = kernels.cross_entropy_for(logits) or _cross_entropy
    value, grad = kernel(logits, targets, weights, smoothing)
    if slope is not None:
        grad.mul_(slope)
    return value, grad.mul_(head.scale) if head.scale != 1.0 else grad


def _cross_entropy(
    logits: Tensor, targets: Tensor, weights: Tensor, smoothing: float
) -> tuple[Tensor, Tensor]:
    log_sum = torch.logsumexp(logits, dim=-1)
    losses = log_sum - (1 - smoothing) * logits.gather(1, targets[:, None])[:, 0]
    if smoothing:
        losses -= smoothing * logits.mean(-1)
    grad = logits.sub_(log_sum[:, None]).exp_()
    if smoothing:
        grad -= smoothing / grad.shape[1]
    grad.scatter_add_(1, targets[:, None], torch.full_like(log_sum[:, None], smoothing - 1))
    return (losses * weights).sum(), grad.mul_(weights[:, None])


def _smoothing(loss: Loss) -> float | None:
    """The label smoothing of a loss that is cross-entropy and says so of this very `per_token`."""
    owner = next(each for each in type(loss).__mro__ if "per_token" in vars(each))
    return loss.as_cross_entropy() if "as_cross_entropy" in vars(owner) else None
