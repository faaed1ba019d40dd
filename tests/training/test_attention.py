"""Attention by segments equals masked attention written out, and nothing leaks from segment to segment."""

from __future__ import annotations

import math
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from lightning_sft.training import attention
from lightning_sft.training.attention import Segments, UnsupportedAttention, segment_attention

SEGMENTS = (0, 1, 12, 40, 57)
WINDOW = 5
HEADS, DIMENSION = 4, 8


def inputs(kv_heads: int = HEADS, value_dimension: int = DIMENSION) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value with scores large enough for a soft cap to bite."""
    torch.manual_seed(kv_heads)
    length = SEGMENTS[-1]
    shapes = [(HEADS, DIMENSION), (kv_heads, DIMENSION), (kv_heads, value_dimension)]
    return tuple(
        torch.randn(1, heads, length, size, dtype=torch.float64).mul(2).requires_grad_()
        for heads, size in shapes
    )


def visible(window: int | None) -> Tensor:
    """Which position sees which, one pair after the other."""
    out = torch.zeros(SEGMENTS[-1], SEGMENTS[-1], dtype=torch.bool)
    for start, end in pairwise(SEGMENTS):
        for here, there in product(range(start, end), repeat=2):
            out[here, there] = there <= here and (window is None or here - there < window)
    return out


def eager(query, key, value, *, scaling=None, window=None, softcap=None, sinks=None) -> Tensor:
    """Masked attention over the whole row, head by head."""
    groups = query.shape[1] // key.shape[1]
    heads = []
    for head in range(query.shape[1]):
        q, k, v = query[0, head], key[0, head // groups], value[0, head // groups]
        scores = q @ k.T * (1 / math.sqrt(q.shape[-1]) if scaling is None else scaling)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~visible(window), -math.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks[head].expand(len(scores), 1)], dim=1)
        heads.append(scores.softmax(-1)[:, : k.shape[0]] @ v)
    return torch.stack(heads, dim=1)[None]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("scaling", [None, 0.1])
@pytest.mark.parametrize("window", [None, WINDOW, 1, 1000])
@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("with_sinks", [False, True], ids=["", "sinks"])
def test_outputs_and_gradients_equal_masked_attention(kv_heads, scaling, window, softcap, with_sinks):
    query, key, value = inputs(kv_heads)
    sinks = torch.randn(HEADS, dtype=torch.float64).requires_grad_() if with_sinks else None
    expected = eager(query, key, value, scaling=scaling, window=window, softcap=softcap, sinks=sinks)
    out, weights = segment_attention(
        nn.Module(), query, key, value, None, scaling,
        segments=Segments(SEGMENTS), sliding_window=window, softcap=softcap, s_aux=sinks,
    )  # fmt: skip
    assert weights is None
    assert out.shape == (1, SEGMENTS[-1], HEADS, DIMENSION)
    assert torch.allclose(out, expected, rtol=1e-10, atol=1e-12)
    upstream = torch.randn_like(expected)
    differentiable = [query, key, value, *([sinks] if with_sinks else [])]
    ours = torch.autograd.grad(out, differentiable, upstream)
    theirs = torch.autograd.grad(expected, differentiable, upstream)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("softcap", [None, 0.5])
def test_values_may_have_another_size_than_keys(softcap):
    query, key, value = inputs(2, value_dimension=6)
    out, _ = segment_attention(
        nn.Module(), query, key, value, None, segments=Segments(SEGMENTS), softcap=softcap
    )
    assert torch.allclose(out, eager(query, key, value, softcap=softcap), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "option", [{"window": WINDOW}, {"softcap": 0.5}, {"scaling": 0.1}, {"sinks": torch.ones(HEADS)}]
)
def test_every_option_changes_the_outcome_so_that_ignoring_it_would_show(option):
    tensors = inputs()
    assert (eager(*tensors, **option) - eager(*tensors)).abs().max() > 0.05


KINDS = [{}, {"sliding_window": WINDOW}, {"softcap": 0.5}, {"s_aux": torch.ones(HEADS, dtype=torch.float64)}]


@pytest.mark.parametrize("options", KINDS, ids=lambda options: next(iter(options), "plain"))
@pytest.mark.parametrize("changed", range(len(SEGMENTS) - 1))
def test_a_change_in_one_segment_moves_nothing_in_another(changed, options):
    tensors = [tensor.detach() for tensor in inputs(2)]
    start, end = SEGMENTS[changed], SEGMENTS[changed + 1]
    others = [tensor.clone() for tensor in tensors]
    for tensor in others:
        tensor[:, :, start:end] += 100
    before, _ = segment_attention(nn.Module(), *tensors, None, segments=Segments(SEGMENTS), **options)
    after, _ = segment_attention(nn.Module(), *others, None, segments=Segments(SEGMENTS), **options)
    outside = torch.ones(SEGMENTS[-1], dtype=torch.bool)
    outside[start:end] = False
    assert torch.equal(before[:, outside], after[:, outside])
    assert not torch.equal(before[:, ~outside], after[:, ~outside])


@pytest.mark.parametrize("options", KINDS, ids=lambda options: next(iter(options), "plain"))
def test_a_later_token_moves_nothing_before_it(options):
    tensors = [tensor.detach() for tensor in inputs()]
    others = [tensor.clone() for tensor in tensors]
    position = 30
    for tensor in others:
        tensor[:, :, position] += 100
    before, _ = segment_attention(nn.Module(), *tensors, None, segments=Segments(SEGMENTS), **options)
    after, _ = segment_attention(nn.Module(), *others, None, segments=Segments(SEGMENTS), **options)
    assert torch.equal(before[:, :position], after[:, :position])


@pytest.mark.parametrize("options", KINDS, ids=lambda options: next(iter(options), "plain"))
def test_dropout_drops_attention_weights(options):
    tensors = inputs()
    certain, _ = segment_attention(
        nn.Module(), *tensors, None, dropout=1.0, segments=Segments(SEGMENTS), **options
    )
    assert torch.equal(certain, torch.zeros_like(certain))
    torch.manual_seed(0)
    some, _ = segment_attention(
        nn.Module(), *tensors, None, dropout=0.5, segments=Segments(SEGMENTS), **options
    )
    none, _ = segment_attention(
        nn.Module(), *tensors, None, dropout=0.0, segments=Segments(SEGMENTS), **options
    )
    assert not torch.equal(some, none)


def layer(is_causal: bool) -> nn.Module:
    module = nn.Module()
    module.is_causal = is_causal
    return module


@pytest.mark.parametrize(
    ("module", "mask", "keywords", "named"),
    [
        (nn.Module(), None, {"segments": Segments(SEGMENTS), "chunk_size": 8}, "chunk_size"),
        (nn.Module(), None, {"segments": Segments(SEGMENTS), "alibi": torch.ones(1)}, "alibi"),
        (nn.Module(), None, {"segments": Segments(SEGMENTS), "is_causal": False}, "is_causal=False"),
        (layer(is_causal=False), None, {"segments": Segments(SEGMENTS)}, "is_causal=False"),
        (nn.Module(), torch.ones(57, 57), {"segments": Segments(SEGMENTS)}, "attention_mask"),
        (nn.Module(), None, {}, "no segments"),
    ],
    ids=["unknown keyword", "unknown tensor", "not causal", "layer not causal", "mask", "no segments"],
)
def test_what_it_does_not_know_is_refused_by_name_and_not_ignored(module, mask, keywords, named):
    with pytest.raises(UnsupportedAttention, match=named):
        segment_attention(module, *inputs(), mask, **keywords)


def test_keywords_without_meaning_and_unknown_ones_that_ask_for_nothing_are_let_through():
    tensors = inputs()
    plain, _ = segment_attention(nn.Module(), *tensors, None, segments=Segments(SEGMENTS))
    asked, _ = segment_attention(
        layer(is_causal=True), *tensors, None,
        segments=Segments(SEGMENTS), use_cache=False, position_ids=torch.arange(57), is_causal=True, chunk_size=None,
    )  # fmt: skip
    assert torch.equal(plain, asked)


def test_transformers_knows_it_once_it_is_registered():
    attention.register()
    assert AttentionInterface()[attention.NAME] is segment_attention
