"""How far a model has moved from its base on given texts: negative log-likelihoods, and the divergence per token.

KL(p0 ‖ pθ) = Σ_v p0(v) · log(p0(v) / pθ(v)) at each position, with p0 the base's and pθ the model's prediction of the
next token. It is exact where the base is still there (an adapter that can be switched off). Else the base's predictions
were kept as their K likeliest tokens and the mass of all others; the others count as one token then, so the figure is
a lower bound (the data-processing inequality), and equal where their proportions among themselves didn't change.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_sft.training.fsdp2 import gathered
from lightning_sft.training.layout import evaluating, hidden_states

if TYPE_CHECKING:
    from lightning_sft.data.batch import Batch
    from lightning_sft.example import Example
    from lightning_sft.training.module import SFTModule

_VALUES_AT_ONCE = 1 << 24
_TINY = 1e-30


@dataclass(frozen=True, slots=True)
class Predictions:
    """What a model predicts at the `n` scored positions of one text.

    Args:
        tokens: Int32 `[n, K]`: the likeliest tokens.
        log_p: Float32 `[n, K]`: their log-probabilities.
        rest: Float64 `[n]`: the probability of all other tokens together.
    """

    tokens: Tensor
    log_p: Tensor
    rest: Tensor


@dataclass(frozen=True, slots=True)
class TextLoss:
    """One text, measured.

    Args:
        nll: Σ −log p(token) over the scored tokens, in nats.
        tokens: How many those are.
        greedy: Each of them is the likeliest one at its place: greedy decoding writes them all.
        kl: Σ KL(p0 ‖ pθ) over the same positions, in nats; None where it wasn't asked for.
        predictions: What the model predicts there, where it was asked for.
    """

    nll: float
    tokens: int
    greedy: bool
    kl: float | None = None
    predictions: Predictions | None = None


def text_losses(
    module: SFTModule,
    examples: Sequence[Example],
    *,
    against_base: bool = False,
    reference: Sequence[Predictions] | None = None,
    keep: int = 0,
    batch_tokens: int = 4096,
) -> list[TextLoss]:
    """Measure texts with the module's model, without touching its training.

    Args:
        module: The module whose model is asked.
        examples: Rendered texts; tokens of weight above 0 are scored, and all count alike.
        against_base: Also measure the divergence from the base, exactly: the adapter is switched off for it.
        reference: What the base predicted of each example: also measure the divergence from that.
        keep: How many of the likeliest tokens to keep in `predictions`; 0 keeps none.
        batch_tokens: Most tokens of a batch, padding included.

    Raises:
        SFTError: `against_base`, and the adapter has changed the base's own weights.
    """
    found: list[TextLoss | None] = [None] * len(examples)
    trainer = module._trainer
    precision = trainer.precision_plugin.val_step_context() if trainer is not None else nullcontext()
    with evaluating(module), torch.no_grad(), precision, gathered(module.loaded):
        for chosen in _batches([len(example) for example in examples], batch_tokens):
            batch = module.layout.collate([examples[i] for i in chosen], 1.0).to(module.device)
            known = None if reference is None else [reference[i] for i in chosen]
            parts = list(_positions(module, batch, against_base, known, keep))
            counts = [int((examples[i].weights[1:] > 0).sum()) for i in chosen]
            nll = torch.cat([part[0] for part in parts]).split(counts)
            greedy = torch.cat([part[1] for part in parts]).split(counts)
            kl, predictions = (
                torch.cat(column).split(counts) if column else None
                for column in (
                    [part[2] for part in parts if part[2] is not None],
                    [part[3] for part in parts if part[3] is not None],
                )
            )
            for place, index in enumerate(chosen):
                found[index] = TextLoss(
                    nll=float(nll[place].sum()),
                    tokens=counts[place],
                    greedy=bool(greedy[place].all()),
                    kl=None if kl is None else float(kl[place].sum()),
                    predictions=None if predictions is None else _unpacked(predictions[place]),
                )
    return [loss for loss in found if loss is not None]


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of similar lengths, together at most `batch_tokens` with padding; a longer one alone."""
    chosen: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if chosen and lengths[index] * (len(chosen) + 1) > batch_tokens:
            yield chosen
            chosen = []
        chosen.append(index)
    if chosen:
        yield chosen


def _positions(
    module: SFTModule,
    batch: Batch,
    against_base: bool,
    reference: Sequence[Predictions] | None,
    keep: int,
) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]:
    """NLL, whether the target is likeliest, KL (each `[n]`), packed predictions `[n, 2K+1]`; some at a time."""
    layout = module.layout
    states = hidden_states(module.loaded, batch, own_logits=layout.own_logits, whole=layout.whole)
    base_states = None
    if against_base:
        with module.adapter.base_model(module.loaded):
            base_states = hidden_states(
                module.loaded, batch, own_logits=layout.own_logits, whole=layout.whole
            )
    tokens, log_p0, rest = (None, None, None)
    if reference is not None:
        tokens = torch.cat([each.tokens for each in reference]).long()
        log_p0 = torch.cat([each.log_p for each in reference])
        rest = torch.cat([each.rest for each in reference])
    size = max(1, _VALUES_AT_ONCE // module.vocabulary)
    for start in range(0, len(states), size):
        part = slice(start, start + size)
        log_p = layout.head(states[part]).log_softmax(-1)
        nll = -log_p.gather(1, batch.targets[part, None])[:, 0]
        kl = None
        if base_states is not None:
            with module.adapter.base_model(module.loaded):
                base = layout.head(base_states[part]).log_softmax(-1)
            kl = (base.exp() * (base - log_p)).sum(-1)
        elif tokens is not None and log_p0 is not None and rest is not None:
            device = log_p.device
            own = log_p.gather(1, tokens[part].to(device))
            p0 = log_p0[part].to(device)
            kl = (p0.exp() * (p0 - own)).sum(-1)
            left, mine = rest[part].to(device).double(), _rest(own)
            kl = kl.double() + left * (left.clamp_min(_TINY).log() - mine.clamp_min(_TINY).log())
        yield (
            nll.double().cpu(),
            (log_p.argmax(-1) == batch.targets[part]).cpu(),
            None if kl is None else kl.double().cpu(),
            _packed(log_p, keep) if keep else None,
        )


def _rest(log_p: Tensor) -> Tensor:
    """The probability of all tokens but these, `[n]`, in float64."""
    return -torch.expm1(log_p.double().logsumexp(-1).clamp_max(0.0))


def _packed(log_p: Tensor, keep: int) -> Tensor:
    values, tokens = log_p.topk(min(keep, log_p.shape[-1]), dim=-1)
    return torch.cat([tokens.double(), values.double(), _rest(values)[:, None]], dim=-1).cpu()


def _unpacked(packed: Tensor) -> Predictions:
    keep = (packed.shape[1] - 1) // 2
    return Predictions(packed[:, :keep].to(torch.int32), packed[:, keep : 2 * keep].float(), packed[:, -1])
