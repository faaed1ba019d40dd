"""What a loss has to do. All of it in float64, on six tokens of a vocabulary of five."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_sft.bases import Loss, TokenBatch
from lightning_sft.testing.plugin import PluginTests

if TYPE_CHECKING:
    from torch import Tensor

_TOKENS, _VOCABULARY = 6, 5


class LossTests(PluginTests):
    """The tests of a loss."""

    kind = "losses"

    def test_it_gives_a_loss_for_each_token(self) -> None:
        """Float `[n]`, finite, differentiable in the logits."""
        check_shape(self.make())

    def test_it_keeps_no_state(self) -> None:
        """The same tokens have the same loss each time."""
        check_repeats(self.make())

    def test_tokens_of_weight_0_change_nothing(self) -> None:
        """Nor does their logits' gradient."""
        check_zero_weights(self.make())

    def test_chunks_change_nothing(self) -> None:
        """The loss of a token is the same in whatever chunk it comes."""
        check_chunks(self.make())

    def test_its_gradient_is_that_of_finite_differences(self) -> None:
        """Of Σ weight · loss, in the logits."""
        check_gradient(self.make())

    def test_it_is_cross_entropy_if_it_says_so(self) -> None:
        """`as_cross_entropy` lets a fused kernel stand in."""
        check_cross_entropy(self.make())


def check_shape(loss: Loss) -> None:
    """One finite float for each token, also for one and for none, differentiable in the logits."""
    import torch

    for tokens in (_TOKENS, 1, 0):
        batch = _batch(tokens)
        found = loss.per_token(batch)
        assert isinstance(found, torch.Tensor), f"{_name(loss)} gives a {type(found).__name__}, not a tensor"
        assert list(found.shape) == [tokens], (
            f"{_name(loss)} gives a loss of shape {list(found.shape)} for {tokens} tokens"
        )
        assert found.is_floating_point(), f"{_name(loss)} gives a loss of type {found.dtype}"
        assert bool(found.isfinite().all()), (
            f"{_name(loss)} is not finite for ordinary logits: {found.tolist()}"
        )
        assert tokens == 0 or found.requires_grad, f"{_name(loss)} can't be differentiated in the logits"


def check_repeats(loss: Loss) -> None:
    """A second call with the same tokens, after one with others, gives the same."""
    first = loss.per_token(_batch(_TOKENS))
    loss.per_token(_batch(_TOKENS, seed=1))
    again = loss.per_token(_batch(_TOKENS))
    assert first.equal(again), f"{_name(loss)} of the same tokens changes from call to call"


def check_zero_weights(loss: Loss) -> None:
    """Other logits and targets where the weight is 0 leave Σ weight · loss and its gradient as they are."""
    import torch

    batch = _batch(_TOKENS)
    ignored = batch.weights == 0
    other = _batch(_TOKENS, seed=1)
    logits = torch.where(ignored[:, None], other.logits, batch.logits).detach().requires_grad_()
    targets = torch.where(ignored, other.targets, batch.targets)
    sums, gradients = [], []
    for each in (batch, TokenBatch(logits=logits, targets=targets, weights=batch.weights)):
        total = (loss.per_token(each) * each.weights).sum()
        sums.append(total.detach())
        gradients.append(torch.autograd.grad(total, each.logits)[0])
    assert torch.allclose(sums[0], sums[1]), f"a token of weight 0 changes {_name(loss)} of the others"
    assert not gradients[0][ignored].any(), f"{_name(loss)} has a gradient at tokens of weight 0"
    assert torch.allclose(gradients[0][~ignored], gradients[1][~ignored]), (
        f"a token of weight 0 changes the gradient of {_name(loss)} at others"
    )


def check_chunks(loss: Loss) -> None:
    """The losses of two halves are those of the whole."""
    import torch

    batch = _batch(_TOKENS)
    halves = [
        loss.per_token(TokenBatch(logits=logits, targets=targets, weights=weights))
        for logits, targets, weights in zip(
            batch.logits.split(2), batch.targets.split(2), batch.weights.split(2), strict=True
        )
    ]
    assert torch.allclose(torch.cat(halves), loss.per_token(batch)), (
        f"{_name(loss)} of a token depends on the tokens that come with it; chunks come in any number and size"
    )


def check_gradient(loss: Loss) -> None:
    """Central differences of Σ weight · loss agree with autograd, in every logit."""
    import torch

    batch, step = _batch(_TOKENS), 1e-6

    def total(logits: Tensor) -> Tensor:
        each = TokenBatch(logits=logits, targets=batch.targets, weights=batch.weights)
        return (loss.per_token(each) * each.weights).sum()

    (found,) = torch.autograd.grad(total(batch.logits), batch.logits)
    expected = torch.zeros_like(found)
    for index in range(found.numel()):
        moved = torch.zeros_like(found)
        moved.view(-1)[index] = step
        with torch.no_grad():
            expected.view(-1)[index] = (total(batch.logits + moved) - total(batch.logits - moved)) / (
                2 * step
            )
    worst = float((found - expected).abs().max())
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-7), (
        f"the gradient of {_name(loss)} is off by {worst:.2g} from finite differences"
    )


def check_cross_entropy(loss: Loss) -> None:
    """Where `as_cross_entropy` gives a label smoothing, `per_token` is cross-entropy with it."""
    import torch

    smoothing = loss.as_cross_entropy()
    if smoothing is None:
        return
    batch = _batch(_TOKENS)
    expected = torch.nn.functional.cross_entropy(
        batch.logits, batch.targets, reduction="none", label_smoothing=smoothing
    )
    assert torch.allclose(loss.per_token(batch), expected), (
        f"{_name(loss)}.as_cross_entropy says {smoothing}, but its per_token is something else"
    )


def _batch(tokens: int, seed: int = 0) -> TokenBatch:
    """Tokens with weights 1, 0, 0.5, 1, 0, …"""
    import torch

    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, _VOCABULARY, generator=generator, dtype=torch.float64) * 2
    targets = torch.randint(_VOCABULARY, (tokens,), generator=generator)
    weights = torch.tensor([1.0, 0.0, 0.5] * tokens, dtype=torch.float64)[:tokens]
    return TokenBatch(logits=logits.requires_grad_(), targets=targets, weights=weights)


def _name(loss: Loss) -> str:
    return type(loss).__name__
