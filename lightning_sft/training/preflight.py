"""Preflight: what could go wrong only after hours is tried before the first step, on this model and these rows.

- Flattened rows compute what separate rows compute; else rows are padded (`find_layout`).
- The heaviest micro-batch of the run fits into memory: on a GPU it is tried, forward and backward, with room for
  the optimizer's state. A CPU's system would kill the process, not say no, so there an estimate is compared with
  what is available, and one row of it is tried.
- Its loss is a number, and a finite gradient reaches every parameter that is trained.
- A checkpoint that is written and read gives the same loss.

Weights, gradients, buffers, modes and random numbers are afterwards what they were: a run is the same, bit for bit,
with and without it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_sft import plugins
from lightning_sft.errors import SFTError
from lightning_sft.training import memory, optimizers
from lightning_sft.training.fsdp2 import is_sharded
from lightning_sft.training.head import NLL
from lightning_sft.training.layout import evaluating, zeros_moved
from lightning_sft.training.models import load_checkpoint
from lightning_sft.training.shards import local

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_sft.data.batch import Batch
    from lightning_sft.data.datamodule import SFTDataModule
    from lightning_sft.data.plan import MicroBatch
    from lightning_sft.training.module import SFTModule

_ROWS_LOOKED_AT = 10_000_000
"""The heaviest micro-batch is looked for in as many epochs as have this many rows together."""

LARGEST_CHECKPOINT = 2 << 30
"""Bytes of trained parameters up to which a checkpoint is tried: it takes seconds, and that memory once more."""

_OFF = "model.preflight: false starts without looking"


@dataclass(frozen=True, slots=True)
class Report:
    """What preflight found.

    Args:
        heaviest: The heaviest micro-batch in words: rows, tokens, longest row and targets.
        loss: The loss per unit of weight of what was tried of it.
        unreached: Trained parameters that no gradient reaches, where that is the model's own way.
        still: Trained parameters whose gradient is zero throughout.
        checkpoint: Whether a checkpoint was written and read.
    """

    heaviest: str
    loss: float
    unreached: tuple[str, ...]
    still: tuple[str, ...]
    checkpoint: bool


def check_trainer(trainer: Trainer) -> None:
    """Refuse what would make the plan's step sizes wrong.

    Raises:
        SFTError: Accumulation changes over the run, or Lightning would replace the batch order.
    """
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise SFTError(
            "GradientAccumulationScheduler changes how many tokens a step has behind the batch plan's back",
            where="trainer.callbacks",
            fix="set trainer.accumulate_grad_batches",
        )
    if trainer.overfit_batches:  # type: ignore[attr-defined]
        raise SFTError(
            "overfit_batches replaces the order of the batch plan",
            where="trainer.overfit_batches",
            fix="set `limit` of a data source, or trainer.limit_train_batches",
        )


def preflight(module: SFTModule) -> Report | None:
    """Try the model and the data of the attached trainer; None where the data has no plan to look at.

    Raises:
        SFTError: The run would fail, or train nothing.
    """
    from lightning_sft.data.datamodule import SFTDataModule

    data = getattr(module.trainer, "datamodule", None)
    with isolate_rng():
        layout = module.layout
        if not isinstance(data, SFTDataModule) or "train" not in data.prepared:
            return None
        heaviest = heaviest_of(module, data, [module.trainer.global_rank])
        chosen = [data.prepared["train"].examples[row] for row in heaviest.rows]
        one = min(chosen, key=len)
        batch = layout.collate(chosen, sum(float(e.weights.sum()) for e in chosen)).to(module.device)
        small = layout.collate([one], float(one.weights.sum())).to(module.device)
        tried = batch if _says_no(module.device) else small
        if tried is small:
            memory.refuse_too_much(module, batch)
        with _buffers_kept(module):
            loss, unreached, still = _check_gradients(module, tried, small)
        checkpoint = _check_checkpoint(module, small)
        module.watch.batch = None
    report = Report(memory.in_words(batch), loss, unreached, still, checkpoint)
    _tell(report)
    return report


def _says_no(device: torch.device) -> bool:
    """Whether too large an allocation on this device is an error, and not the end of the process."""
    return device.type != "cpu"


def heaviest_of(module: SFTModule, data: SFTDataModule, ranks: Sequence[int]) -> MicroBatch:
    """The ranks' micro-batch with the most tokens, padding included; of equal ones that with the longest row."""
    lengths = data.prepared["train"].lengths.tolist()
    padded = module.layout.padded_because is not None

    def weight(micro: MicroBatch) -> tuple[int, int]:
        rows = [lengths[row] for row in micro.rows]
        longest = max(rows)
        return (len(rows) * longest if padded else sum(rows)), longest

    epochs = module.trainer.max_epochs
    epochs = 1 if epochs is None or epochs < 1 else min(epochs, max(1, _ROWS_LOOKED_AT // len(lengths)))
    plans = map(data.plan, range(epochs))
    return max((micro for plan in plans for rank in ranks for micro in plan.rank(rank)), key=weight)


def _check_gradients(
    module: SFTModule, batch: Batch, small: Batch
) -> tuple[float, tuple[str, ...], tuple[str, ...]]:
    """Forward and backward of `batch`: its loss, and the parameters that no gradient reaches, or only zero.

    Where a gradient is zero because a factor is (LoRA's A, as B starts at zero), the factor is moved for a second
    pass over `small`, and put back.
    """
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    with memory.explained(module):
        each = optimizers.state_bytes(module)  # AdamW's averages, or what another optimizer keeps
        room = [
            torch.empty(int(each * p.numel()), dtype=torch.uint8, device=p.device)
            for p in map(local, trained.values())
        ]
        loss, gradients = _gradients(module, batch, trained)
        del room
    found = _judge(module, gradients)
    del gradients
    value = float(loss)
    wrong = [name for name, (finite, _) in found.items() if not finite]
    if getattr(module.trainer.precision_plugin, "scaler", None) is not None:
        wrong = []  # too large for 16 bits: that is for the scaler
    if not math.isfinite(value) or wrong:
        _report_bad_numbers(module, batch, value, wrong)
    unreached = [name for name in trained if name not in found]
    still = [name for name, (_, moves) in found.items() if not moves]
    if still:
        with zeros_moved(trained.values()):
            second = _judge(module, _gradients(module, small, {name: trained[name] for name in still})[1])
        still = [name for name in still if not second.get(name, (True, False))[1]]
    if len(unreached) + len(still) == len(trained):
        raise SFTError(
            f"no gradient reaches any of the {len(trained)} parameter tensors to train",
            where=f"model.adapter: {plugins.describe(module.adapter)}",
            fix="change its options, or model.gradient_checkpointing",
        )
    _refuse_unreached(module, unreached)
    return value, tuple(unreached), tuple(still)


def _gradients(
    module: SFTModule, batch: Batch, parameters: dict[str, nn.Parameter]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss per unit of weight, and the gradients of it, as training computes them; none is stored."""
    module.watch.batch = batch
    with module.trainer.precision_plugin.train_step_context():
        loss = module.weighted_loss(batch, module.loss) / batch.num_items
        if module.router is not None:
            loss = loss + module.router.take()
            module.router.mean()
    if not loss.requires_grad:
        return loss, {}
    if is_sharded(module.loaded):
        return loss.detach(), _sharded_gradients(module, loss, parameters)
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    found = {name: g for name, g in zip(parameters, gradients, strict=True) if g is not None}
    return loss.detach(), found


def _sharded_gradients(
    module: SFTModule, loss: Tensor, parameters: dict[str, nn.Parameter]
) -> dict[str, Tensor]:
    """What this rank has of the mean gradients over the ranks; autograd by itself doesn't know of shards."""
    loss.backward()
    found = {name: local(p.grad) for name, p in parameters.items() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return found


def _judge(module: SFTModule, gradients: dict[str, Tensor]) -> dict[str, tuple[bool, bool]]:
    """Of each gradient, whether it is finite and whether any of it isn't zero."""
    if not gradients:
        return {}
    verdicts = torch.stack([torch.stack((~g.isfinite().all(), g.any())) for g in gradients.values()])
    if is_sharded(module.loaded):
        verdicts = verdicts.int()
        torch.distributed.all_reduce(verdicts, torch.distributed.ReduceOp.MAX)
    return {
        name: (not wrong, bool(moves))
        for name, (wrong, moves) in zip(gradients, verdicts.tolist(), strict=True)
    }


def _report_bad_numbers(module: SFTModule, batch: Batch, loss: float, wrong: list[str]) -> None:
    """Say before training what would stop it then; where bad steps are skipped, a warning will do."""
    what = (
        f"the loss of the tried rows is {loss} before any training"
        if not math.isfinite(loss)
        else f"the loss of the tried rows is {loss:.3g}, but {len(wrong)} of its gradients are not "
        f"finite (the first: {wrong[0]})"
    )
    rows = "; ".join(map(str, batch.metas[:8])) + ("; …" if len(batch.metas) > 8 else "")
    if module.watch.policy == "skip":
        rank_zero_warn(f"Preflight: {what}. Its rows: {rows}")
        return
    raise SFTError(
        what,
        where=rows,
        fix="check the base's weights and these rows; compute in a wider trainer.precision (bf16-mixed or 32-true)",
    )


def _refuse_unreached(module: SFTModule, unreached: list[str]) -> None:
    """Refuse parameters that were chosen to be trained, and that the loss doesn't depend on.

    Where all parameters are trained nobody chose them: a model may have parts that text doesn't use. An expert may
    just have got no token of this batch.
    """
    chosen = [name for name in unreached if not re.search(r"\bexperts?\b", name)]
    if chosen and not all(p.requires_grad for p in module.loaded.parameters()):
        raise SFTError(
            f"no gradient reaches {len(chosen)} of the parameter tensors to train (the first: {chosen[0]}): the loss "
            "doesn't depend on them",
            where=f"model.adapter: {plugins.describe(module.adapter)}",
            fix=f"choose other layers with its options (LoRA: target_modules); {_OFF}",
        )


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Buffers that a forward pass replaces or changes (running statistics, grown RoPE tables) are put back."""
    kept = [
        (part, name, buffer, buffer.clone())
        for part in module.modules()
        for name, buffer in part.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        for part, name, buffer, values in kept:
            setattr(part, name, buffer)
            if not torch.equal(buffer, values):
                buffer.copy_(values)


def _check_checkpoint(module: SFTModule, batch: Batch) -> bool:
    """Write a checkpoint, overwrite what is trained, read it, and compare; on rank zero.

    Raises:
        SFTError: It can't be written, or what is read isn't what was written.
    """
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if sum(p.numel() * p.element_size() for p in trained.values()) > LARGEST_CHECKPOINT:
        return False
    root = Path(module.trainer.default_root_dir)
    try:
        with TemporaryDirectory(prefix=".preflight-", dir=root if root.is_dir() else None) as folder:
            path = Path(folder) / "preflight.ckpt"
            module.trainer.save_checkpoint(path, weights_only=True)
            if is_sharded(module.loaded):
                _compare(module, batch, trained, module.trainer.strategy.broadcast(path))
                module.trainer.strategy.barrier()
            elif module.trainer.is_global_zero:
                _compare(module, batch, trained, path)
    except OSError as error:
        raise SFTError(
            f"a checkpoint can't be written: {error.strerror or error}",
            where=str(root),
            fix=f"make room, or choose another trainer.default_root_dir; {_OFF}",
        ) from error
    return True


def _compare(module: SFTModule, batch: Batch, trained: dict[str, nn.Parameter], path: Path) -> None:
    before = {name: local(p).clone() for name, p in trained.items()}
    expected = _evaluate(module, batch)
    try:
        for p in trained.values():
            local(p).fill_(0.01)
        module.trainer.strategy.load_model_state_dict(load_checkpoint(path), strict=False)
        loss = _evaluate(module, batch)
        lost = [name for name, p in trained.items() if not torch.equal(local(p), before[name])]
    finally:
        for name, p in trained.items():
            local(p).copy_(before[name])
    if lost or not (loss == expected or math.isclose(loss, expected, rel_tol=1e-5) or math.isnan(expected)):
        raise SFTError(
            f"a checkpoint does not bring back what was saved: the loss is {loss:.6g}, not {expected:.6g}"
            + (f", and {len(lost)} parameters differ (the first: {lost[0]})" if lost else ""),
            where=f"model.adapter: {plugins.describe(module.adapter)}",
            fix=f"its parameters must be in state_dict() and load from it under their names; {_OFF}",
        )


def _evaluate(module: SFTModule, batch: Batch) -> float:
    with evaluating(module), torch.no_grad(), module.trainer.precision_plugin.val_step_context():
        return float(module.weighted_loss(batch, NLL) / batch.num_items)


def _tell(report: Report) -> None:
    rank_zero_info(
        f"Preflight: the heaviest micro-batch fits ({report.heaviest}), loss {report.loss:.3f}"
        + ("; a checkpoint reads back" if report.checkpoint else "; no checkpoint was tried, it is large")
        + "."
    )
    for names, problem in (
        (report.unreached, "no gradient reaches"),
        (report.still, "the gradient is zero throughout for"),
    ):
        if names:
            listed = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
            rank_zero_warn(
                f"Preflight: {problem} {len(names)} parameter tensors: {listed}. They will stay as they are, but for "
                "weight decay."
            )
