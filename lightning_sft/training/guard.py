"""What watches over the steps of a run: no bad number reaches the weights, and memory errors are explained.

Before each optimizer step the losses of its micro-batches and its gradients (after they are added up over the
ranks) are looked at. If one of them is NaN or infinite, the step is not applied: neither weights nor the
optimizer's averages change. So whatever a run writes, it never writes weights that a bad step has spoilt.

One look costs one maximum over the gradients. A CPU knows the answer at once. With a fused optimizer on a GPU the
answer stays there: fused optimizers leave everything as it is when their `found_inf` is 1 (it is what loss scaling
uses), and the host reads the answers of several steps at once, where the run logs. Without a fused optimizer the
host waits for the answer, once per step. Under 16-bit loss scaling gradients overflow as a matter of course, and
the scaler leaves those steps out; there only the losses count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_sft.conversation import Meta
from lightning_sft.errors import SFTError
from lightning_sft.training import memory
from lightning_sft.training.shards import full_tensor

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_sft.data.batch import Batch
    from lightning_sft.training.module import SFTModule

OnBadLoss: TypeAlias = Literal["stop", "skip"]

MOST_SKIPPED = 10
"""Steps in a row that `skip` leaves out before it gives up: it is for a bad row, not for a run that diverges."""

_SHOWN = 8


@dataclass(frozen=True, slots=True)
class _Step:
    """What an optimizer step was made of.

    Args:
        number: Counted from 1.
        bad: Bool `[]` on the device: a loss or gradient is not finite, on any rank.
        losses: Float `[micro-batches]`: this rank's shares of the loss.
        metas: Where the rows of each micro-batch are from.
    """

    number: int
    bad: Tensor
    losses: Tensor
    metas: tuple[tuple[Meta, ...], ...]


class Watch:
    """Keeps bad steps from being applied, and says which rows they had.

    Args:
        policy: What follows a bad step: the run stops, or goes on without it.
    """

    def __init__(self, policy: OnBadLoss) -> None:
        self.policy: OnBadLoss = policy
        self.batch: Batch | None = None
        """The batch at hand, for errors that happen while it is computed."""
        self.skipped = 0
        """Steps that were left out so far."""
        self._in_a_row = 0
        self._norm: Tensor | None = None
        self._window: list[tuple[tuple[Meta, ...], Tensor]] = []
        self._pending: list[_Step] = []

    def start(self) -> None:
        """Forget the micro-batches of a window that was never finished."""
        self._window.clear()

    def saw(self, batch: Batch, loss: Tensor) -> None:
        """Note a micro-batch of the step at hand and its loss, a scalar."""
        self._window.append((batch.metas, loss.detach()))

    def before_step(self, module: LightningModule, optimizer: Optimizer) -> None:
        """Keep the optimizer from stepping on bad numbers.

        Raises:
            SFTError: The step is bad, and the policy is to stop, or too many were bad in a row.
        """
        window, self._window = self._window, []
        if not window:
            return
        trainer = module.trainer
        losses = torch.stack([loss for _, loss in window])
        gradients = [
            p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        bad = ~losses.isfinite().all()
        if scaler is None:
            # Clipping needs the same norm: it is computed once.
            shared = _clips_whole_norm(trainer)
            norm = full_tensor(torch.nn.utils.get_total_norm(gradients, 2.0 if shared else float("inf")))
            bad = bad | ~norm.isfinite()
            self._norm = norm if shared else None
        if trainer.world_size > 1:
            reduced = trainer.strategy.reduce(bad.float(), reduce_op="sum")
            bad = cast(Tensor, reduced) > 0
        self._pending.append(_Step(trainer.global_step + 1, bad, losses, tuple(metas for metas, _ in window)))
        fused = bool(optimizer.defaults.get("fused"))
        if scaler is None and fused:
            optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
            every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
            if _known_at_once(bad) or (trainer.global_step + 1) % max(1, every) == 0:
                self.settle(module)
        elif self.settle(module):
            if _unscales_itself(optimizer):  # the scaler's look at the gradients is still to come
                gradients[0].fill_(float("nan"))
            else:
                optimizer.zero_grad(set_to_none=True)
        if self.policy == "skip":
            module.log("train/skipped_steps", float(self.skipped), batch_size=1)

    def take_norm(self) -> Tensor | None:
        """The norm of all gradients of the step at hand, if clipping is to take it from here."""
        norm, self._norm = self._norm, None
        return norm

    def settle(self, module: LightningModule) -> bool:
        """Read which of the steps since the last time were bad, and follow the policy.

        Returns:
            Whether the latest one was.

        Raises:
            SFTError: One was bad, and the policy is to stop, or too many were bad in a row.
        """
        if not self._pending:
            return False
        steps, self._pending = self._pending, []
        verdicts = torch.stack([step.bad for step in steps]).tolist()
        for step, bad in zip(steps, verdicts, strict=True):
            self._in_a_row = self._in_a_row + 1 if bad else 0
            if bad:
                self._follow_policy(module, step)
        return bool(verdicts[-1])

    def _follow_policy(self, module: LightningModule, step: _Step) -> None:
        what, rows = _culprits(module, step)
        if self.policy == "stop" or self._in_a_row > MOST_SKIPPED:
            many = "" if self.policy == "stop" else f", as in {self._in_a_row - 1} steps before it"
            raise SFTError(
                f"{what}{many}; the step was not applied, and nothing was written from it",
                where=rows,
                fix="look at these rows; lower model.learning_rate, lengthen model.warmup or set "
                "trainer.gradient_clip_val; compute in a wider trainer.precision (bf16-mixed instead of "
                "16-mixed, or 32-true)"
                + ("; model.on_bad_loss: skip leaves such steps out" if self.policy == "stop" else ""),
            )
        self.skipped += 1
        rank_zero_warn(f"{what}: the step is left out ({self.skipped} so far). Its rows: {rows}")


class GuardedModule(LightningModule):
    """A LightningModule whose steps are watched; see the module's docstring."""

    watch: Watch

    def on_train_start(self) -> None:
        """Begin with an empty window."""
        super().on_train_start()
        self.watch.start()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to keep weights that are no numbers."""
        refuse_bad_weights(self)
        super().on_save_checkpoint(checkpoint)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Backpropagate, with memory errors explained."""
        with memory.explained(cast("SFTModule", self)):
            super().backward(loss, *args, **kwargs)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Step, with memory errors explained: AdamW's averages are made in the first one."""
        with memory.explained(cast("SFTModule", self)):
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Keep bad numbers from the weights."""
        self.watch.before_step(self, optimizer)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip, by the norm that the look for bad numbers has found."""
        norm = self.watch.take_norm()
        if norm is None or not gradient_clip_val:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, norm)

    def on_validation_start(self) -> None:
        """Stop before validation if a step was bad."""
        super().on_validation_start()
        self.watch.settle(self)

    def on_train_epoch_end(self) -> None:
        """Stop before the epoch's checkpoint if a step was bad."""
        super().on_train_epoch_end()
        self.watch.settle(self)


def _clips_whole_norm(trainer: Trainer) -> bool:
    """Whether gradients are clipped by their norm, and this process has them whole."""
    value, algorithm = vars(trainer)["gradient_clip_val"], vars(trainer)["gradient_clip_algorithm"]
    alone = isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)
    return bool(value) and algorithm in (None, "norm") and alone


def _unscales_itself(optimizer: Optimizer) -> bool:
    """Whether a gradient scaler leaves unscaling, and the look for infinite values, to the optimizer's step."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def _known_at_once(answer: Tensor) -> bool:
    """Whether the host can read a tensor without waiting for a device."""
    return answer.device.type == "cpu"


def refuse_bad_weights(module: LightningModule) -> None:
    """Keep weights that are not numbers from being written.

    Raises:
        SFTError: A parameter that is trained holds NaN or an infinite value.
    """
    trained = [p.detach() for p in module.parameters() if p.requires_grad]
    if not full_tensor(torch.nn.utils.get_total_norm(trained, float("inf"))).isfinite():
        parameters = [(n, p.detach()) for n, p in module.named_parameters() if p.requires_grad]
        names = [n for n, p in parameters if not full_tensor(p).isfinite().all()]
        raise SFTError(
            f"{len(names)} of the trained parameters hold NaN or infinite values, so they are not written "
            f"(the first: {names[0]})",
            where="the model",
            fix="go on from an earlier checkpoint with a lower model.learning_rate",
        )


def _culprits(module: LightningModule, step: _Step) -> tuple[str, str]:
    """What is wrong with a bad step, and the rows that it is wrong with, over all ranks."""
    losses: list[float] = step.losses.tolist()
    finite: list[bool] = step.losses.isfinite().tolist()
    bad = [str(meta) for metas, fine in zip(step.metas, finite, strict=True) if not fine for meta in metas]
    everything = [str(meta) for metas in step.metas for meta in metas]
    found = [(bad, everything, [loss for loss, fine in zip(losses, finite, strict=True) if not fine])]
    if module.trainer.world_size > 1:
        gathered: list[Any] = [None] * module.trainer.world_size
        torch.distributed.all_gather_object(gathered, found[0])
        found = gathered
    values = [value for _, _, here in found for value in here]
    rows = [row for named, every, _ in found for row in (named if values else every)]
    shown = "; ".join(rows[:_SHOWN]) + (f"; and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else "")
    if values:
        return f"the loss of step {step.number} is {values[0]}", shown
    return f"the gradient of step {step.number} is not finite, though its loss is", shown
