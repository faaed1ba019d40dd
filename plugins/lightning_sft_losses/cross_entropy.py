"""Cross-entropy, with optional label smoothing and z-loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_sft import Loss, SFTError, TokenBatch

if TYPE_CHECKING:
    from torch import Tensor


class CrossEntropy(Loss):
    """Negative log-likelihood of the target token.

    Args:
        label_smoothing: Share of the target's probability that is spread evenly over the vocabulary
            (Szegedy et al., 2016), in [0, 1).
        z_loss: Coefficient of log² Z, with Z = Σ exp(logit), which keeps logits from drifting
            (PaLM, Chowdhery et al., 2022, where it is 1e-4).
    """

    def __init__(self, label_smoothing: float = 0.0, z_loss: float = 0.0) -> None:
        if not 0 <= label_smoothing < 1:
            raise SFTError(
                f"label_smoothing is {label_smoothing}",
                where="model.loss (CrossEntropy)",
                fix="give a number from 0 to below 1",
            )
        if not 0 <= z_loss < float("inf"):
            raise SFTError(
                f"z_loss is {z_loss}", where="model.loss (CrossEntropy)", fix="give a number of 0 or more"
            )
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss

    def per_token(self, batch: TokenBatch) -> Tensor:
        """−log p(target) + z_loss · log² Z, float `[n]`."""
        from torch.nn.functional import cross_entropy

        loss = cross_entropy(
            batch.logits, batch.targets, reduction="none", label_smoothing=self.label_smoothing
        )
        return loss + self.z_loss * batch.logits.logsumexp(-1) ** 2 if self.z_loss else loss

    def as_cross_entropy(self) -> float | None:
        """The label smoothing; None with z-loss, which isn't cross-entropy."""
        return None if self.z_loss else self.label_smoothing
