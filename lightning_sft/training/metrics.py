"""Loss and perplexity over tokens, so that neither depends on how rows were batched."""

from __future__ import annotations

from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.text import Perplexity


class TokenLoss(MeanMetric):
    """Σ weight · loss over Σ weight, over all batches and ranks."""

    def update(self, total: Tensor, weight: Tensor) -> None:  # type: ignore[override]
        """Add a batch: its Σ weight · loss and its Σ weight."""
        self.mean_value += total.to(self.mean_value)
        self.weight += weight.to(self.weight)


class TokenPerplexity(Perplexity):
    """exp(Σ weight · nll / Σ weight), over all batches and ranks."""

    def update(self, total: Tensor, weight: Tensor) -> None:
        """Add a batch: its Σ weight · nll and its Σ weight."""
        self.total_log_probs += total.to(self.total_log_probs)
        self.count += weight.to(self.count)
