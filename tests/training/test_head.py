"""The chunked head computes what full logits and torch's cross-entropy compute, in value and gradients."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_sft import Loss, SFTError
from lightning_sft.bases import TokenBatch
from lightning_sft.training.head import CHUNK, NLL, Head, weighted_loss
from lightning_sft_losses.cross_entropy import CrossEntropy

HIDDEN, VOCABULARY = 16, 97
AROUND_CHUNKS = [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 1100]


class SquaredError(Loss):
    """A loss of another kind: (1 − p(target))²."""

    def per_token(self, batch: TokenBatch) -> Tensor:
        return (1 - batch.logits.softmax(-1).gather(1, batch.targets[:, None])[:, 0]) ** 2


class Recorded(Loss):
    """Cross-entropy that keeps the batches it was given."""

    def __init__(self) -> None:
        self.batches: list[TokenBatch] = []

    def per_token(self, batch: TokenBatch) -> Tensor:
        self.batches.append(batch)
        return F.cross_entropy(batch.logits, batch.targets, reduction="none")


def problem(n: int, *, bias: bool = True, dtype: torch.dtype = torch.float64):
    """Random hidden states (of size 1, so that soft caps bite), targets and weights, and a linear head."""
    torch.manual_seed(n)
    linear = nn.Linear(HIDDEN, VOCABULARY, bias=bias, dtype=dtype)
    hidden = torch.randn(n, HIDDEN, dtype=dtype, requires_grad=True)
    targets = torch.randint(VOCABULARY, (n,))
    weights = torch.tensor([0.0, 0.5, 1.0, 3.0])[torch.randint(4, (n,))]
    weights[0] = 1.0
    return linear, hidden, targets, weights


def full_logits(
    linear: nn.Linear, hidden: Tensor, scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    logits = linear(hidden) * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def gradients(loss: Tensor, hidden: Tensor, linear: nn.Module) -> dict[str, Tensor]:
    inputs = {"hidden": hidden, **dict(linear.named_parameters())}
    found = torch.autograd.grad(loss, list(inputs.values()))
    return dict(zip(inputs, found, strict=True))


def apart(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("n", AROUND_CHUNKS)
def test_loss_and_gradients_equal_those_of_full_logits(n, scale, softcap, bias):
    linear, hidden, targets, weights = problem(n, bias=bias)
    logits = full_logits(linear, hidden, scale, softcap)
    expected = (F.cross_entropy(logits, targets, reduction="none") * weights).sum()
    loss = weighted_loss(hidden, targets, weights, Head(linear, scale, softcap), CrossEntropy())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    reference = gradients(expected, hidden, linear)
    for name, gradient in gradients(loss, hidden, linear).items():
        assert apart(gradient, reference[name]) < 1e-12, name


def test_the_gradient_follows_what_is_done_with_the_loss_afterwards():
    linear, hidden, targets, weights = problem(600)
    expected = gradients(
        F.cross_entropy(linear(hidden), targets, reduction="none") @ weights.double(), hidden, linear
    )
    loss = weighted_loss(hidden, targets, weights, Head(linear), CrossEntropy()) * 8 / 123.0
    for name, gradient in gradients(loss, hidden, linear).items():
        assert apart(gradient, expected[name] * 8 / 123.0) < 1e-12, name


@pytest.mark.parametrize("loss", [CrossEntropy(), SquaredError()], ids=["CrossEntropy", "custom"])
def test_without_gradients_the_value_is_the_same(loss):
    linear, hidden, targets, weights = problem(1100)
    with_gradients = weighted_loss(hidden, targets, weights, Head(linear, 0.5, 0.7), loss)
    with torch.no_grad():
        without = weighted_loss(hidden, targets, weights, Head(linear, 0.5, 0.7), loss)
    assert not without.requires_grad
    assert without.item() == pytest.approx(with_gradients.item(), rel=1e-14)


def test_a_custom_loss_goes_the_same_way_and_sees_final_logits_and_weights():
    linear, hidden, targets, weights = problem(1100)
    logits = full_logits(linear, hidden, 0.25, 0.7)
    probability = logits.softmax(-1)[torch.arange(len(targets)), targets]
    expected = (((1 - probability) ** 2) * weights).sum()
    loss = weighted_loss(hidden, targets, weights, Head(linear, 0.25, 0.7), SquaredError())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    reference = gradients(expected, hidden, linear)
    for name, gradient in gradients(loss, hidden, linear).items():
        assert apart(gradient, reference[name]) < 1e-12, name
    recorded = Recorded()
    weighted_loss(hidden, targets, weights, Head(linear, 0.25, 0.7), recorded)
    assert torch.allclose(
        torch.cat([batch.logits for batch in recorded.batches]), logits, rtol=1e-12, atol=1e-12
    )
    assert torch.equal(torch.cat([batch.targets for batch in recorded.batches]), targets)
    assert torch.equal(torch.cat([batch.weights for batch in recorded.batches]), weights)


@pytest.mark.parametrize("label_smoothing", [0.1, 0.5])
def test_label_smoothing_is_torchs(label_smoothing):
    linear, hidden, targets, weights = problem(700)
    per_token = F.cross_entropy(linear(hidden), targets, reduction="none", label_smoothing=label_smoothing)
    expected = (per_token * weights).sum()
    loss = weighted_loss(hidden, targets, weights, Head(linear), CrossEntropy(label_smoothing))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    reference = gradients(expected, hidden, linear)
    assert all(apart(g, reference[name]) < 1e-12 for name, g in gradients(loss, hidden, linear).items())
    plain = weighted_loss(hidden, targets, weights, Head(linear), NLL)
    assert abs(plain.item() - loss.item()) > 1.0


@pytest.mark.parametrize("loss", [CrossEntropy(), SquaredError()], ids=["CrossEntropy", "custom"])
def test_a_target_of_weight_zero_counts_nothing_but_keeps_every_parameter_in_the_graph(loss):
    linear, hidden, targets, _ = problem(1)
    value = weighted_loss(hidden, targets, torch.zeros(1), Head(linear), loss)
    assert value.item() == 0.0
    for gradient in gradients(value, hidden, linear).values():
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_a_frozen_linear_gets_no_gradient_and_the_hidden_states_do():
    linear, hidden, targets, weights = problem(600)
    expected = gradients(
        F.cross_entropy(linear(hidden), targets, reduction="none") @ weights.double(), hidden, linear
    )
    linear.requires_grad_(False)
    weighted_loss(hidden, targets, weights, Head(linear), CrossEntropy()).backward()
    assert linear.weight.grad is None
    assert linear.bias.grad is None
    assert apart(hidden.grad, expected["hidden"]) < 1e-12


def test_a_linear_alone_can_be_trained_on_frozen_hidden_states():
    linear, hidden, targets, weights = problem(600)
    expected = gradients(
        F.cross_entropy(linear(hidden), targets, reduction="none") @ weights.double(), hidden, linear
    )
    linear.bias.requires_grad_(False)
    weighted_loss(hidden.detach(), targets, weights, Head(linear), CrossEntropy()).backward()
    assert apart(linear.weight.grad, expected["weight"]) < 1e-12
    assert linear.bias.grad is None


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_gradients_are_there_and_close(hidden_dtype):
    linear, hidden, targets, weights = problem(1100, dtype=torch.float32)
    expected = gradients(F.cross_entropy(linear(hidden), targets, reduction="none") @ weights, hidden, linear)
    hidden = hidden.detach().to(hidden_dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = weighted_loss(hidden, targets, weights, Head(linear), CrossEntropy())
    assert loss.dtype == torch.float32
    loss.backward()
    for name, gradient in {
        "hidden": hidden.grad,
        "weight": linear.weight.grad,
        "bias": linear.bias.grad,
    }.items():
        assert gradient.abs().max() > 0, name
        assert apart(gradient, expected[name]) < 0.02, name


def test_a_validation_pass_in_the_same_autocast_context_takes_no_gradient_away():
    """Autocast keeps its cast of a weight; one that was made without gradients must not serve training."""
    linear, hidden, targets, weights = problem(600, dtype=torch.float32)
    expected = gradients(F.cross_entropy(linear(hidden), targets, reduction="none") @ weights, hidden, linear)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            weighted_loss(hidden, targets, weights, Head(linear), NLL)
        weighted_loss(hidden, targets, weights, Head(linear), CrossEntropy()).backward()
    assert apart(linear.weight.grad, expected["weight"]) < 0.02


def test_in_bfloat16_the_loss_and_the_sum_of_weight_gradients_are_kept_in_float32():
    """4,096 equal contributions: added up chunk by chunk in bfloat16, most of them would be rounded away."""
    n = 8 * CHUNK
    linear = nn.Linear(1, 2, bias=False, dtype=torch.bfloat16)
    nn.init.zeros_(linear.weight)
    hidden = torch.full((n, 1), 1.0, dtype=torch.bfloat16)
    hidden[CHUNK:] = 2**-9
    loss = weighted_loss(
        hidden, torch.zeros(n, dtype=torch.long), torch.ones(n), Head(linear), CrossEntropy()
    )
    loss.backward()
    assert loss.item() == pytest.approx(n * 0.6931472, rel=1e-6)
    exact = -0.5 * (CHUNK + 7 * CHUNK * 2**-9)
    assert linear.weight.grad[0].item() == torch.tensor(exact).to(torch.bfloat16).item()


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else [out]:
            if isinstance(made, Tensor):
                self.numel = max(self.numel, made.numel())
        return out


@pytest.mark.parametrize("context", [nullcontext, torch.no_grad], ids=["training", "validation"])
@pytest.mark.parametrize("loss", [CrossEntropy(0.1), SquaredError()], ids=["CrossEntropy", "custom"])
def test_logits_are_never_held_whole(loss, context):
    linear, hidden, targets, weights = problem(5 * CHUNK)
    with LargestTensor() as largest, context():
        value = weighted_loss(hidden, targets, weights, Head(linear, 0.5, 0.7), loss)
        if value.requires_grad:
            value.backward()
    assert max(CHUNK * VOCABULARY, hidden.numel()) == largest.numel < len(hidden) * VOCABULARY


def test_a_loss_sees_at_most_one_chunk_at_a_time():
    linear, hidden, targets, weights = problem(1100)
    recorded = Recorded()
    weighted_loss(hidden, targets, weights, Head(linear), recorded)
    assert [len(batch.targets) for batch in recorded.batches] == [CHUNK, CHUNK, 1100 - 2 * CHUNK]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_logits_reach_the_loss_in_at_least_float32(dtype):
    linear, hidden, _, _ = problem(4, dtype=torch.float32)
    logits = Head(linear.to(dtype), 0.5, 0.7)(hidden.to(dtype))
    assert logits.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("n", [1, CHUNK, 1100])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_z_loss_is_the_squared_log_of_the_partition_function(label_smoothing, n):
    linear, hidden, targets, weights = problem(n)
    logits = full_logits(linear, hidden, 0.5, 0.7)
    log_z = logits.exp().sum(-1).log()
    per_token = F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
    expected = ((per_token + 0.3 * log_z**2) * weights).sum()
    loss = weighted_loss(
        hidden, targets, weights, Head(linear, 0.5, 0.7), CrossEntropy(label_smoothing, z_loss=0.3)
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    reference = gradients(expected, hidden, linear)
    for name, gradient in gradients(loss, hidden, linear).items():
        assert apart(gradient, reference[name]) < 1e-12, name
    plain = weighted_loss(hidden, targets, weights, Head(linear, 0.5, 0.7), CrossEntropy(label_smoothing))
    assert abs(plain.item() - loss.item()) > 1.0


@pytest.mark.parametrize(
    ("option", "value"),
    [("label_smoothing", -0.1), ("label_smoothing", 1.0), ("z_loss", -1.0), ("z_loss", float("nan"))],
)
def test_an_option_that_makes_no_loss_is_refused(option, value):
    with pytest.raises(SFTError, match=f"{option} is {value}"):
        CrossEntropy(**{option: value})
