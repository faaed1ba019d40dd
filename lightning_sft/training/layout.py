"""How a model takes its batches: flattened or padded rows, which head; decided by trying this very model.

Flattened rows are used only where the model computes on them what it computes on each row alone, and where
a change in one segment moves nothing in another. Models that ignore the registered attention (Falcon, Bloom),
that mix positions some other way (Mamba), or that ask for what segment attention doesn't know, get padded
rows. A head that the configuration doesn't describe fully is replaced by the model's own logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from lightning_sft.data.batch import Batch, Collate, flatten, pad
from lightning_sft.errors import SFTError
from lightning_sft.training import attention
from lightning_sft.training.head import Head, head_of, weighted_loss
from lightning_sft.training.shards import local

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lightning_sft.bases import Loss
    from lightning_sft.training.router_loss import RouterLoss


@dataclass(frozen=True, slots=True)
class Layout:
    """What the trial of a model found.

    Args:
        collate: Makes batches as this model takes them.
        head: From what `hidden_states` returns to logits.
        own_logits: `hidden_states` returns the model's own logits, because its head isn't plain.
        padded_because: Why rows are padded; None where they are flattened.
        whole: The adapter works around the model, not only inside it (virtual tokens), so the model goes with it.
    """

    collate: Collate
    head: Head
    own_logits: bool
    padded_because: str | None
    whole: bool = False


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a peft wrapper, or the model itself."""
    return cast("PreTrainedModel", model.get_base_model() if hasattr(model, "get_base_model") else model)  # type: ignore[operator]


def backbone(inner: PreTrainedModel) -> nn.Module:
    """The model without its head; the model itself where it can't be told apart.

    `base_model` goes by a name, which may lead nowhere: Llama 4's says `language_model`, and the attribute is `model`.
    """
    found = inner.base_model if inner.base_model is not inner else getattr(inner, "model", inner)
    return cast(nn.Module, found)


def hidden_states(
    model: nn.Module, batch: Batch, *, own_logits: bool, whole: bool = False, router: RouterLoss | None = None
) -> Tensor:
    """The last hidden states `[n, H]` (or the logits `[n, V]`) at the batch's `n` positions.

    A `router` gets what the experts' routers gave on the way.

    Raises:
        SFTError: A router's loss is wanted of a row with virtual tokens.
    """
    inner = causal_lm(model)
    if whole:
        if router is not None:
            raise SFTError(
                "the routers' loss isn't known where the adapter adds virtual tokens",
                where="model.router_aux_loss",
                fix="set it to false, or use an adapter inside the model, such as LoRA",
            )
        logits: Tensor = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        ).logits
        return logits[:, -batch.input_ids.shape[1] :].flatten(0, 1).index_select(0, batch.positions)
    inputs: dict[str, object] = {"input_ids": batch.input_ids, "use_cache": False}
    if batch.segments is not None:
        inputs.update(
            position_ids=batch.position_ids, segments=attention.Segments(batch.segments, batch.cu_seqlens)
        )
    else:
        inputs.update(attention_mask=batch.attention_mask)
    if router is not None:
        inputs["output_router_logits"] = True
    outputs = inner(**inputs) if own_logits else backbone(inner)(**inputs)
    if router is not None:
        router.add(outputs.router_logits, batch.attention_mask)
    out: Tensor = outputs.logits if own_logits else outputs[0]
    return out.flatten(0, 1).index_select(0, batch.positions)


def batch_loss(
    model: nn.Module, batch: Batch, layout: Layout, loss: Loss, router: RouterLoss | None = None
) -> Tensor:
    """Σ weight · loss over the batch's targets: a scalar, in at least float32."""
    hidden = hidden_states(model, batch, own_logits=layout.own_logits, whole=layout.whole, router=router)
    return weighted_loss(hidden, batch.targets, batch.weights, layout.head, loss)


def find_layout(model: nn.Module, pad_id: int) -> Layout:
    """Try the model on a few random rows (well under a second for a small one) and choose its layout.

    Leaves the model on segment attention where flattened rows are exact, else as it was.
    """
    inner = causal_lm(model)
    if inner.config._attn_implementation == attention.NAME:  # from an earlier trial
        inner.set_attn_implementation(_stock(inner))
    lengths = _trial_lengths(inner)
    adapted = [] if model is inner else [p for p in model.parameters() if p.requires_grad]
    with evaluating(model), torch.no_grad(), zeros_moved(adapted):
        rows = _trial_rows(inner, lengths)
        if adapted and works_around(model, inner, rows[0]):
            return Layout(
                collate=partial(pad, pad_id=pad_id),
                head=Head(nn.Identity()),
                own_logits=True,
                padded_because="the adapter works around the model, not only inside it",
                whole=True,
            )
        separate = [backbone(inner)(input_ids=row, use_cache=False)[0] for row in rows]
        head, own_logits = choose_head(inner, rows[0], separate[0])
        because = _flattened_fails(inner, lambda: _flattened_differs(inner, rows, separate))
    collate: Collate = partial(pad, pad_id=pad_id) if because else flatten
    return Layout(collate=collate, head=head, own_logits=own_logits, padded_because=because)


def expected_layout(model: nn.Module, pad_id: int) -> Layout:
    """The layout to expect of a model whose tensors hold no numbers (fake ones), from its structure alone.

    Convolutions and state spaces mix positions where attention doesn't see it; they all hold a `Conv1d`.
    """
    inner = causal_lm(model)
    plain = isinstance(inner.get_output_embeddings(), nn.Module) and backbone(inner) is not inner
    head = head_of(inner) if plain else Head(linear=nn.Identity())
    with evaluating(model), torch.no_grad():
        if any(isinstance(module, nn.Conv1d) for module in inner.modules()):
            because: str | None = "its convolutions mix positions"
        else:
            rows = _trial_rows(inner, _trial_lengths(inner))
            because = _flattened_fails(inner, lambda: _flattened_refused(inner, rows)[0])
    collate: Collate = partial(pad, pad_id=pad_id) if because else flatten
    return Layout(collate=collate, head=head, own_logits=not plain, padded_because=because)


@contextmanager
def stock_attention(model: nn.Module) -> Iterator[None]:
    """The model with transformers' own attention, as generation and padded rows need it."""
    inner = causal_lm(model)
    if inner.config._attn_implementation != attention.NAME:
        yield
        return
    inner.set_attn_implementation(_stock(inner))
    try:
        yield
    finally:
        inner.set_attn_implementation(attention.NAME)


def _stock(inner: PreTrainedModel) -> str:
    return "sdpa" if inner._supports_sdpa else "eager"


def works_around(model: nn.Module, inner: PreTrainedModel, row: Tensor) -> bool:
    """Whether the model computes something else with its adapter's wrapper than without, on one row."""
    try:
        with_it = model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).logits
    except Exception as error:  # whatever an unusual adapter does
        raise SFTError(
            f"the adapter can't compute a row: {type(error).__name__}: {error}",
            where="model.adapter",
            fix="change its options, or use another one",
        ) from error
    own = inner(input_ids=row, use_cache=False).logits
    return with_it.shape != own.shape or not apart(with_it, own) <= tolerance(own, inner)


@contextmanager
def zeros_moved(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Parameters that are zero throughout get small random values in here."""
    zeros = [p for p in map(local, parameters) if not p.any()]
    before = [p.clone() for p in zeros]  # zeros may have a sign
    generator = torch.Generator().manual_seed(0)
    try:
        for p in zeros:
            p.copy_(torch.randn(p.shape, generator=generator) * 0.02)
        yield
    finally:
        for p, kept in zip(zeros, before, strict=True):
            p.copy_(kept)


def choose_head(inner: PreTrainedModel, row: Tensor, hidden: Tensor) -> tuple[Head, bool]:
    """The model's head, if it makes the model's own logits of the row's hidden states `[1, T, H]`.

    Returns:
        The head, and False; or none and True, for a model whose own logits have to be taken.
    """
    if isinstance(inner.get_output_embeddings(), nn.Module) and backbone(inner) is not inner:
        head = head_of(inner)
        ours, own = head(hidden[0]), inner(input_ids=row, use_cache=False).logits[0]
        if ours.shape == own.shape and apart(ours, own) <= tolerance(own, inner):
            return head, False
    return Head(linear=nn.Identity()), True


def _flattened_fails(inner: PreTrainedModel, trial: Callable[[], str | None]) -> str | None:
    """Why flattened rows aren't exact for this model; None (and segment attention set) if they are."""
    stock = inner.config._attn_implementation
    attention.register()
    try:
        inner.set_attn_implementation(attention.NAME)
        reason = trial()
    except Exception as error:  # whatever an unusual model does: padded rows are exact for all
        reason = f"{type(error).__name__}: {error}"
    if reason is not None and inner.config._attn_implementation != stock:
        inner.set_attn_implementation(stock)
    return reason


def _flattened_refused(inner: PreTrainedModel, rows: list[Tensor]) -> tuple[str | None, Tensor | None]:
    """What in the model's structure is against flattened rows, if anything, and what it makes of them."""
    if inner.config._attn_implementation != attention.NAME:
        return f"{inner.config.model_type} models don't take a registered attention function", None
    config = inner.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if "chunked_attention" in kinds:
        return "its attention is chunked", None
    calls = attention.CallCounter.calls
    attention.CallCounter.windows.clear()
    packed = _packed(inner, rows)
    if attention.CallCounter.calls == calls:
        return f"{inner.config.model_type} models don't call the registered attention function", None
    # The trial's rows are shorter than most windows, so a window that only a mask would carry must be asked for.
    window = getattr(config, "sliding_window", None)
    if window and (not kinds or "sliding_attention" in kinds) and window not in attention.CallCounter.windows:
        return (
            f"{inner.config.model_type} models don't tell the attention function their sliding window",
            None,
        )
    return None, packed


def _flattened_differs(inner: PreTrainedModel, rows: list[Tensor], separate: list[Tensor]) -> str | None:
    refused, packed = _flattened_refused(inner, rows)
    if packed is None:
        return refused
    expected = torch.cat(separate, dim=1)
    if not (by := apart(packed, expected)) <= tolerance(expected, inner):  # NaN is not equal either
        return f"flattened and separate rows differ by {by:.1e}, relative"
    first = rows[0].shape[1]
    other = _packed(inner, [_trial_rows(inner, [first], seed=1)[0], *rows[1:]])
    if not (moved := apart(other[:, first:], packed[:, first:])) <= tolerance(expected, inner) / 10:
        return f"a change in one segment moves another by {moved:.1e}, relative"
    return None


def _packed(inner: PreTrainedModel, rows: list[Tensor]) -> Tensor:
    lengths = [row.shape[1] for row in rows]
    segments = attention.Segments((0, *accumulate(lengths)))
    positions = torch.cat([torch.arange(length) for length in lengths])[None].to(rows[0].device)
    out: Tensor = backbone(inner)(
        input_ids=torch.cat(rows, dim=1), position_ids=positions, segments=segments, use_cache=False
    )[0]
    return out


def _trial_lengths(inner: PreTrainedModel) -> list[int]:
    """Three lengths, the second longer than three sliding windows where these are short."""
    config = inner.config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    longest = 3 * window + 5 if 0 < window <= 128 else 37
    context = (
        getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or longest
    )
    return [max(2, min(length, context)) for length in (11, longest, 23)]


def _trial_rows(inner: PreTrainedModel, lengths: list[int], seed: int = 0) -> list[Tensor]:
    device = inner.get_input_embeddings().weight.device
    generator = torch.Generator().manual_seed(seed)
    vocabulary = inner.config.get_text_config().vocab_size
    return [torch.randint(vocabulary, (1, length), generator=generator).to(device) for length in lengths]


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    a, b = a.double(), b.double()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def tolerance(like: Tensor, inner: nn.Module | None = None) -> float:
    """A few hundred roundings: 2e-5 in float32, 0.06 in bfloat16.

    Layers of 4 bits of the model `inner` round to the type that they compute in, those of 8 bits much as bfloat16 does.
    """
    dtype = like.dtype
    if getattr(inner, "is_quantized", False):
        config = cast("PreTrainedModel", inner).config.quantization_config
        dtype = getattr(config, "bnb_4bit_compute_dtype", None) or torch.bfloat16
        dtype = torch.bfloat16 if getattr(inner, "is_loaded_in_8bit", False) else dtype
    return max(min(0.06, 200 * torch.finfo(d).eps) for d in (like.dtype, dtype))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards every part is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
