"""CUDA kernels, tried with stand-ins of the same signatures on the CPU: used where they agree, and only there."""

from __future__ import annotations

import sys
import types
import warnings
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_sft.training import attention, kernels
from lightning_sft.training.attention import Segments, segment_attention
from lightning_sft.training.head import Head, weighted_loss
from lightning_sft_losses.cross_entropy import CrossEntropy

OFFSETS = (0, 1, 100, 137, 300)
CALLS: list[dict[str, object]] = []


def masked(q, k, v, cu, scale, window):
    """Varlen attention as FlashAttention's documentation states it, one segment after the other."""
    out = []
    for start, end in pairwise(cu.tolist()):
        groups = q.shape[1] // k.shape[1]
        a, b, c = (t[start:end].transpose(0, 1).float() for t in (q, k, v))
        b, c = b.repeat_interleave(groups, 0), c.repeat_interleave(groups, 0)
        scores = a @ b.transpose(1, 2) * (a.shape[-1] ** -0.5 if scale is None else scale)
        left, right = window
        apart = torch.arange(end - start)[:, None] - torch.arange(end - start)
        hidden = torch.zeros_like(apart, dtype=torch.bool)
        if left >= 0:
            hidden |= apart > left
        if right >= 0:
            hidden |= apart < -right
        out.append((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ c).transpose(0, 1))
    return torch.cat(out).to(q.dtype)


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                           softmax_scale=None, causal=False, window_size=(-1, -1)):  # fmt: skip
    """The signature of flash_attn 2."""
    assert cu_seqlens_q.dtype == torch.int32
    assert max_seqlen_q == max(b - a for a, b in pairwise(cu_seqlens_q.tolist()))
    CALLS.append({"cu": cu_seqlens_q.tolist(), "window": window_size})
    window = (window_size[0], 0) if causal else window_size
    return masked(q, k, v, cu_seqlens_q, softmax_scale, window)


def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
                window_size=(-1, -1), enable_gqa=False):  # fmt: skip
    """The signature of torch.nn.attention.varlen."""
    assert enable_gqa == (query.shape[1] != key.shape[1])
    CALLS.append({"cu": cu_seq_q.tolist(), "window": window_size})
    return masked(query, key, value, cu_seq_q, scale, window_size)


class Liger(torch.autograd.Function):
    """What Liger's kernel does: the logits are overwritten with their gradient in forward."""

    @staticmethod
    def forward(ctx, logits, target, smoothing):
        loss = F.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)
        classes = logits.shape[1]
        onehot = F.one_hot(target, classes) * (1 - smoothing) + smoothing / classes
        logits.data.copy_(logits.softmax(-1) - onehot)
        ctx.save_for_backward(logits.detach())
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        return ctx.saved_tensors[0] * grad_output[:, None], None, None


def liger_cross_entropy(input, target, weight=None, size_average=None, ignore_index=-100, reduce=None,
                        reduction="mean", label_smoothing=0.0, lse_square_scale=0.0, softcap=None):  # fmt: skip
    """The signature of liger_kernel.transformers.functional."""
    assert reduction == "none"
    CALLS.append({"smoothing": label_smoothing})
    return Liger.apply(input, target, label_smoothing)


@pytest.fixture(autouse=True)
def forget():
    """No kernel is remembered from another test."""
    CALLS.clear()
    cached = (
        kernels.installed_attention, kernels.installed_cross_entropy,
        kernels._trusted_attention, kernels._trusted_cross_entropy,
    )  # fmt: skip
    for each in cached:
        each.cache_clear()
    yield
    for each in cached:
        each.cache_clear()


def install(monkeypatch, name: str, **functions) -> None:
    module = types.ModuleType(name)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def as_if_on_cuda(monkeypatch):
    monkeypatch.setattr(kernels, "_half_on_cuda", lambda tensor: tensor.dtype == torch.bfloat16)


def with_flash(monkeypatch) -> None:
    install(monkeypatch, "flash_attn", flash_attn_varlen_func=flash_attn_varlen_func)


def with_torchs(monkeypatch) -> None:
    install(monkeypatch, "torch.nn.attention.varlen", varlen_attn=varlen_attn)


def inputs(kv_heads: int, dtype: torch.dtype = torch.bfloat16):
    torch.manual_seed(0)
    return [
        torch.randn(1, heads, OFFSETS[-1], 8, dtype=dtype).requires_grad_()
        for heads in (4, kv_heads, kv_heads)
    ]


@pytest.mark.usefixtures("as_if_on_cuda")
@pytest.mark.parametrize("installed", [with_flash, with_torchs])
@pytest.mark.parametrize("window", [None, 1, 40, 1000])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("scaling", [None, 0.1])
def test_the_varlen_kernel_gives_what_sdpa_by_segments_gives(
    monkeypatch, installed, window, kv_heads, scaling
):
    installed(monkeypatch)
    tensors = inputs(kv_heads)
    options = {"scaling": scaling, "sliding_window": window, "segments": Segments(OFFSETS)}
    ours, _ = segment_attention(nn.Module(), *tensors, None, **options)
    assert CALLS[-1]["cu"] == list(OFFSETS)
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "attention_for", lambda *_: None)
        plain, _ = segment_attention(nn.Module(), *tensors, None, **options)
    assert ours.shape == plain.shape
    up = torch.randn_like(plain)
    pairs = zip(
        (ours, *torch.autograd.grad(ours, tensors, up)),
        (plain, *torch.autograd.grad(plain, tensors, up)),
        strict=True,
    )
    for a, b in pairs:
        assert float((a.double() - b.double()).abs().max()) <= 0.03 * float(b.double().abs().max())


@pytest.mark.usefixtures("as_if_on_cuda")
def test_flash_attn_goes_before_torchs_own(monkeypatch):
    with_torchs(monkeypatch)
    torchs = kernels.installed_attention()
    kernels.installed_attention.cache_clear()
    with_flash(monkeypatch)
    assert kernels.installed_attention().__name__ != torchs.__name__


@pytest.mark.usefixtures("as_if_on_cuda")
@pytest.mark.parametrize(
    "options",
    [{"softcap": 0.5}, {"s_aux": torch.ones(4)}, {"dropout": 0.1}],
    ids=["softcap", "sinks", "dropout"],
)
def test_what_the_kernel_does_not_know_is_computed_without_it(monkeypatch, options):
    with_flash(monkeypatch)
    segment_attention(nn.Module(), *inputs(2), None, segments=Segments(OFFSETS), **options)
    assert not CALLS


def test_float32_goes_by_segments_and_autocast_counts_as_its_type(monkeypatch, as_if_on_cuda):
    with_flash(monkeypatch)
    tensors = inputs(2, torch.float32)
    segment_attention(nn.Module(), *tensors, None, segments=Segments(OFFSETS))
    assert not CALLS
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = segment_attention(nn.Module(), *tensors, None, segments=Segments(OFFSETS))
    assert CALLS
    assert out.dtype == torch.bfloat16


@pytest.mark.usefixtures("as_if_on_cuda")
@pytest.mark.parametrize("fault", ["ignores windows", "leaks", "raises", "wrong gradient"])
def test_a_kernel_that_is_wrong_is_not_used_and_a_warning_says_so(monkeypatch, fault):
    def faulty(q, k, v, cu, cu_k, longest, longest_k, softmax_scale=None, causal=False, window_size=(-1, -1)):
        if fault == "raises":
            raise RuntimeError("no kernel image is available")
        if fault == "ignores windows":
            window_size = (-1, -1)
        if fault == "leaks":
            cu = torch.tensor([0, len(q)])
        out = masked(q, k, v, cu, softmax_scale, (window_size[0], 0))
        return out.detach() + q - q.detach() if fault == "wrong gradient" else out

    install(monkeypatch, "flash_attn", flash_attn_varlen_func=faulty)
    tensors = inputs(2)
    with pytest.warns(UserWarning, match="attention kernel isn't used"):
        ours, _ = segment_attention(nn.Module(), *tensors, None, segments=Segments(OFFSETS))
    with monkeypatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setattr(kernels, "attention_for", lambda *_: None)
        plain, _ = segment_attention(nn.Module(), *tensors, None, segments=Segments(OFFSETS))
    assert torch.equal(ours, plain)


def test_on_the_cpu_no_kernel_is_asked_for(monkeypatch):
    with_flash(monkeypatch)
    segment_attention(nn.Module(), *inputs(2), None, segments=Segments(OFFSETS))
    assert not CALLS


def test_a_broken_installation_is_as_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # importing it raises
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    assert kernels.installed_attention() is None
    assert kernels.installed_cross_entropy() is None


def test_cu_seqlens_that_a_batch_brought_along_are_used_as_they_are():
    brought = torch.tensor(OFFSETS, dtype=torch.int32)
    assert Segments(OFFSETS, brought).on(brought.device) is brought
    made = Segments(OFFSETS).on(torch.device("cpu"))
    assert made.dtype == torch.int32
    assert made.tolist() == list(OFFSETS)


# --------------------------------------------------------------------------------------- cross-entropy


def with_liger(monkeypatch, kernel=liger_cross_entropy) -> None:
    install(monkeypatch, "liger_kernel")
    install(monkeypatch, "liger_kernel.transformers")
    install(monkeypatch, "liger_kernel.transformers.functional", liger_cross_entropy=kernel)

    def here(logits):
        found = kernels.installed_cross_entropy()
        return found if kernels._trusted_cross_entropy(found, logits.device, logits.dtype) else None

    monkeypatch.setattr(kernels, "cross_entropy_for", here)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_ligers_kernel_gives_the_loss_and_gradients_of_full_logits(monkeypatch, smoothing, softcap, scale):
    torch.manual_seed(0)
    linear = nn.Linear(16, 97)
    hidden = torch.randn(700, 16, requires_grad=True)
    targets, weights = torch.randint(97, (700,)), torch.rand(700)
    logits = linear(hidden) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing) @ weights
    inputs = [hidden, linear.weight, linear.bias]
    reference = torch.autograd.grad(expected, inputs)
    with_liger(monkeypatch)
    loss = weighted_loss(hidden, targets, weights, Head(linear, scale, softcap), CrossEntropy(smoothing))
    assert CALLS[-1] == {"smoothing": smoothing}
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(torch.autograd.grad(loss, inputs), reference, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


def test_a_liger_that_is_wrong_is_not_used(monkeypatch):
    def wrong(logits, targets, **options):
        return 1.01 * liger_cross_entropy(logits, targets, **options)

    with_liger(monkeypatch, wrong)
    linear, hidden = nn.Linear(16, 97), torch.randn(40, 16, requires_grad=True)
    targets = torch.randint(97, (40,))
    with pytest.warns(UserWarning, match="cross-entropy kernel isn't used"):
        loss = weighted_loss(hidden, targets, torch.ones(40), Head(linear), CrossEntropy())
    assert loss.item() == pytest.approx(
        F.cross_entropy(linear(hidden), targets, reduction="sum").item(), rel=1e-5
    )


class Doubled(CrossEntropy):
    """A subclass with a `per_token` of its own: no longer cross-entropy."""

    def per_token(self, batch):
        return 2 * super().per_token(batch)


def test_a_loss_made_of_cross_entropy_is_not_taken_for_it():
    linear, hidden = nn.Linear(16, 97), torch.randn(40, 16, requires_grad=True)
    targets = torch.randint(97, (40,))
    loss = weighted_loss(hidden, targets, torch.ones(40), Head(linear), Doubled())
    expected = 2 * F.cross_entropy(linear(hidden), targets, reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_head_that_is_more_than_a_linear_goes_through_autograd():
    class Shifted(nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden) + 1.5 * torch.arange(97) / 97

    linear, hidden = Shifted(16, 97), torch.randn(40, 16, requires_grad=True)
    targets = torch.randint(97, (40,))
    loss = weighted_loss(hidden, targets, torch.ones(40), Head(linear), CrossEntropy())
    expected = F.cross_entropy(linear(hidden), targets, reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_attention_is_registered_as_it_is():
    attention.register()
    from transformers import AttentionInterface

    assert AttentionInterface()[attention.NAME] is segment_attention
