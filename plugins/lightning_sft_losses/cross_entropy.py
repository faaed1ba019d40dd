"""Cross-entropy, with optional label smoothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_sft import Loss, TokenBatch

if TYPE_CHECKING:
    from torch import Tensor


class CrossEntropy(Loss):
    """Negative log-likelihood of the target token.

    Args:
        label_smoothing: Share of the target's probability that is spread evenly over the vocabulary
            (Szegedy et al., 2016), in [0, 1).
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def per_token(self, batch: TokenBatch) -> Tensor:
        """−log p(target), float `[n]`."""
        from torch.nn.functional import cross_entropy

        return cross_entropy(
            batch.logits, batch.targets, reduction="none", label_smoothing=self.label_smoothing
        )

    def as_cross_entropy(self) -> float:
        """The label smoothing."""
        return self.label_smoothing
