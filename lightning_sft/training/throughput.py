"""What is logged of a step, with tokens per second and model FLOPs utilisation.

Both are counted on the host from what the batches say of themselves, so counting never waits for the device. Only
the steps that are logged cost anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from lightning_sft.training import optimizers
from lightning_sft.training.layout import causal_lm

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from torch import Tensor
    from transformers import PreTrainedModel

    from lightning_sft.data.batch import Batch
    from lightning_sft.training.module import SFTModule


@dataclass(frozen=True, slots=True)
class Flops:
    """What a training step of a dense transformer needs, after PaLM (Chowdhery et al., 2022, appendix B).

    Per token and parameter 2 FLOPs forward, 2 for the gradient of the activations and, where the parameter is
    trained, 2 for its own; 12 · layers · heads · head size · row length per token for attention. The head counts
    at the positions where it is computed, recomputed activations and input embeddings don't.

    Args:
        body: FLOPs per token outside head and attention.
        head: FLOPs per trained token of the output embedding.
        attention: FLOPs per token and token of its row.
    """

    body: float
    head: float
    attention: float

    @classmethod
    def of(cls, model: PreTrainedModel, *, recomputed: bool = False) -> Flops:
        """The model's, from its parameters and its text configuration.

        Args:
            model: The model as it is trained, with its adapter.
            recomputed: Count the second forward pass of recomputed activations: for time, not for utilisation.
        """
        config = model.config.get_text_config()
        embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
        ids = [{id(parameter) for parameter in module.parameters()} for module in embeddings]
        body = head = 0.0
        for parameter in model.parameters():
            flops = parameter.numel() * (6 if parameter.requires_grad else 4)
            if id(parameter) in ids[1]:
                head += flops
            elif id(parameter) not in ids[0]:
                body += flops + (2 * parameter.numel() if recomputed else 0)
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        attention = (
            (16.0 if recomputed else 12.0) * config.num_hidden_layers * config.num_attention_heads * width
        )
        return cls(body=body, head=head, attention=attention)

    def __call__(self, batch: Batch) -> float:
        """FLOPs of one micro-batch."""
        if batch.segments is not None:
            pairs = float(sum((end - start) ** 2 for start, end in pairwise(batch.segments)))
        else:  # padded: as if all rows were of the mean length
            pairs = batch.num_tokens**2 / len(batch.input_ids)
        return self.total(batch.num_tokens, len(batch.targets), pairs)

    def total(self, tokens: float, targets: float, pairs: float) -> float:
        """FLOPs of so many tokens and targets, with the sum of squares of the rows' lengths."""
        return self.body * tokens + self.head * targets + self.attention * pairs


def has_experts(model: PreTrainedModel) -> bool:
    """Whether a token takes only some of the parameters."""
    config = model.config.get_text_config()
    names = ("num_experts_per_tok", "num_local_experts", "num_experts")
    return any(getattr(config, name, None) for name in names)


class Throughput:
    """Counts between two logged steps."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.flops: Callable[[Batch], float] | None = None
        """FLOPs of a micro-batch; None where they, or the device's peak, aren't known."""
        self.peak = 1.0
        self.restart()

    def restart(self) -> None:
        """Count from now."""
        self._tokens, self._done, self._since = 0, 0.0, self.clock()
        self._paused: float | None = None

    def pause(self) -> None:
        """Something other than training follows."""
        self._paused = self.clock()

    def resume(self) -> None:
        """Training goes on: the time since `pause` doesn't count."""
        if self._paused is not None:
            self._since += self.clock() - self._paused
            self._paused = None

    def add(self, batch: Batch) -> None:
        """Count a micro-batch of this rank."""
        self._tokens += batch.num_tokens
        if self.flops is not None:
            self._done += self.flops(batch)

    def take(self, world_size: int) -> dict[str, float]:
        """`tokens_per_second` over all ranks, and `mfu` where it is known; the next count starts here."""
        seconds = max(self.clock() - self._since, 1e-9)
        taken = {"tokens_per_second": self._tokens * world_size / seconds}
        if self.flops is not None:
            taken["mfu"] = self._done / seconds / self.peak
        self.restart()
        return taken

    def meter(self, model: PreTrainedModel, peak: float | None) -> None:
        """Count FLOPs too, if the peak is known and every token takes every parameter.

        Args:
            model: The model as it is trained, with its adapter.
            peak: The device's FLOP/s at most.
        """
        packed = bool(getattr(causal_lm(model), "is_quantized", False))
        if peak is not None and not has_experts(model) and not packed:
            self.flops, self.peak = Flops.of(model), peak


def is_logged(trainer: Trainer) -> bool:
    """Whether the optimizer step at hand is logged: every `log_every_n_steps`, and the run's last."""
    step, every = trainer.global_step + 1, trainer.log_every_n_steps  # type: ignore[attr-defined]
    return step == trainer.max_steps or (every > 0 and step % every == 0)


def log_step(module: SFTModule, loss: Tensor) -> None:
    """Log an optimizer step: its loss over all ranks, the learning rate, and the speed since the last one.

    On an accelerator nothing goes to the bar this way: Lightning would wait for it on every batch.
    """
    world, bar = module.trainer.world_size, loss.device.type == "cpu"
    module.log("train/loss", loss, prog_bar=bar, sync_dist=world > 1, reduce_fx="sum", batch_size=1)
    if module.router is not None:
        module.log("train/router_aux_loss", module.router.mean(), sync_dist=world > 1, batch_size=1)
    for name, value in module.throughput.take(world).items():
        module.log(f"train/{name}", value, prog_bar=bar and name == "tokens_per_second", batch_size=1)
    for name, rate in optimizers.rates(module.trainer.optimizers[0], module.trainer.global_step).items():
        module.log(f"train/{name}", rate, batch_size=1)
