"""Which strategies, precisions and adapters go together: decided at once, before any data or model is loaded.

What can't work is refused with the reason and the nearest that does. The table of it is in docs/distributed.md.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, StrategyRegistry

from lightning_sft import plugins
from lightning_sft.errors import SFTError
from lightning_sft.training.fsdp2 import FSDP2Strategy
from lightning_sft.training.optimizers import described

if TYPE_CHECKING:
    from jsonargparse import Namespace
    from lightning.pytorch import Trainer

    from lightning_sft.bases import Adapter
    from lightning_sft.training.optimizers import OptimizerFactory

_WHERE, _PRECISION = "trainer.strategy", "trainer.precision"

_ELEMENTWISE = (
    *(torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax),
    *(torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adadelta),
)
"""Optimizers whose step of a value depends on that value's gradients alone."""

_REFUSED = {
    "fsdp": (
        "it joins the weights of a block into one, so frozen and trained ones can't be in the same (LoRA), and "
        "Lightning neither clips gradients by norm under it nor runs it on a CPU",
        "fsdp2",
    ),
    "deepspeed": (
        "it counts accumulation windows itself: it makes no step of an epoch's partial last window, whose gradients "
        "would go into the next epoch's first step",
        "fsdp2 (in place of ZeRO 2 and 3), or fsdp2_offload",
    ),
    "ddp_spawn": ("processes that are spawned don't bring the trained model back", "ddp"),
    "ddp_fork": ("processes that are forked don't bring the trained model back", "ddp"),
    "ddp_notebook": ("processes that are forked don't bring the trained model back", "ddp"),
    "xla": ("it is for TPUs, which nothing of this has been tried on", "ddp, on GPUs or CPUs"),
    "single_xla": ("it is for TPUs, which nothing of this has been tried on", "auto, on a GPU or CPU"),
    "single_tpu": ("it is for TPUs, which nothing of this has been tried on", "auto, on a GPU or CPU"),
    "modelparallel": ("nothing says how to split the model's layers (tensor parallel)", "fsdp2"),
}
"""By the beginning of a strategy's name: why it is refused, and the nearest that isn't."""

_REFUSED_PRECISIONS = {
    "transformerengine": (
        "it puts layers of its own in place of the model's, which adapters and exports don't know",
        "bf16-mixed, or bf16-true",
    ),
    "bitsandbytes": (
        "it quantises every linear layer, LoRA's own among them",
        "model.adapter: QLoRA, with 32-true or bf16-mixed",
    ),
}
"""By the beginning of a precision's or its plug-in's name, without hyphens: as above."""


def check_options(trainer: Namespace) -> None:
    """Refuse a strategy, a precision or a plug-in for one by what the options say, before Lightning makes them.

    Raises:
        SFTError: One is known not to work, or no strategy has this name.
    """
    strategy, extra = trainer.strategy, trainer.plugins or ()
    named = isinstance(strategy, str)
    check_name(strategy if named else strategy.class_path, given=named)
    for each in (trainer.precision, *(extra if isinstance(extra, list) else [extra])):
        check_precision(str(getattr(each, "class_path", each)))


def check_name(name: str, *, given: bool = False) -> None:
    """Refuse a strategy by its name, or by that of its class, before Lightning tries to make it.

    Args:
        name: The name.
        given: It is what an option says, so a strategy has to be registered under it.

    Raises:
        SFTError: It is known not to work, or there is none.
    """
    plain = name.rpartition(".")[2].lower()
    for beginning, (reason, nearest) in _REFUSED.items():
        if plain.startswith(beginning) and not plain.startswith("fsdp2"):
            raise _refused(name.rpartition(".")[2], reason, f"use {nearest}")
    if name.isidentifier() and given and name.lower() not in (*StrategyRegistry, "auto"):
        ours = ["auto", "ddp", "fsdp2", "fsdp2_offload"]
        close = get_close_matches(plain.removesuffix("strategy"), ours, n=1)
        raise SFTError(
            f"no strategy is named {name!r}",
            where=_WHERE,
            fix=f"did you mean {close[0]}?" if close else f"use {', '.join(ours[:-1])} or {ours[-1]}",
        )


def check_precision(name: str) -> None:
    """Refuse a precision by its name, or by that of its plug-in's class, before Lightning tries to make it.

    Raises:
        SFTError: It is known not to work.
    """
    plain = name.rpartition(".")[2].lower().replace("-", "")
    for beginning, (reason, nearest) in _REFUSED_PRECISIONS.items():
        if plain.startswith(beginning):
            raise SFTError(
                f"{name.rpartition('.')[2]} can't train here: {reason}",
                where=_PRECISION,
                fix=f"use {nearest}",
            )


def check(
    trainer: Trainer,
    adapter: Adapter,
    optimizer: OptimizerFactory | None = None,
    precision: str | None = None,
) -> None:
    """Refuse what can't work together.

    Args:
        trainer: The trainer, as Lightning has made it.
        adapter: The adapter.
        optimizer: What makes the optimizer; None: AdamW.
        precision: The precision that was asked for; Lightning changes some by itself.

    Raises:
        SFTError: Something can't.
    """
    check_precision(type(trainer.precision_plugin).__name__)
    strategy = trainer.strategy
    kind = type(strategy).__name__
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy | FSDP2Strategy):
        check_name(kind)
        raise _refused(kind, "the exact loss isn't known to hold under it", "use auto, ddp or fsdp2")
    if isinstance(strategy, DDPStrategy) and strategy._start_method != "popen":
        check_name(f"ddp_{strategy._start_method}")
    if strategy.root_device.type == "cpu" and precision in ("16", "16-mixed"):
        raise SFTError("a CPU has no 16-mixed precision", where=_PRECISION, fix="use bf16-mixed, or 32-true")
    if trainer.precision == "64-true" and adapter.quantization() is not None:
        raise SFTError(
            f"the {plugins.describe(adapter)} loads a quantized base, which can't compute in float64",
            where=_PRECISION,
            fix="use 32-true, or an adapter that doesn't quantize",
        )
    if strategy.root_device.type == "cuda" and str(trainer.precision).startswith("bf16"):
        _check_bfloat16(strategy.root_device)
    if isinstance(strategy, FSDP2Strategy):
        _check_sharded(trainer, adapter, optimizer)


def _check_bfloat16(device: torch.device) -> None:
    with torch.cuda.device(device):
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
    if not supported:
        name = torch.cuda.get_device_name(device)
        raise SFTError(f"{name} has no bfloat16", where=_PRECISION, fix="use 16-mixed, or 32-true")


def _check_sharded(trainer: Trainer, adapter: Adapter, optimizer: OptimizerFactory | None) -> None:
    if trainer.precision == "16-mixed":
        raise _refused(
            "fsdp2",
            "with 16-mixed each process would scale the loss by what it sees of the gradients",
            "use trainer.precision: bf16-mixed, or trainer.strategy: ddp",
        )
    if adapter.quantization() is not None:
        raise _refused(
            "fsdp2",
            f"the {plugins.describe(adapter)} loads a quantized base, whose scales would be left out of the shards",
            "use ddp, or an adapter that doesn't quantize",
        )
    if adapter.looks_at_rows:
        raise _refused(
            "fsdp2",
            f"the {plugins.describe(adapter)} begins with a look at the training rows, which needs whole weights",
            "use ddp, or another init of the adapter",
        )
    kind = None if optimizer is None else described(optimizer)[0]
    if optimizer is not None and (kind is None or kind not in _ELEMENTWISE):
        raise _refused(
            "fsdp2",
            f"{getattr(kind, '__name__', 'the optimizer')} may look at a matrix as a whole, of which each process has "
            "a part",
            "use ddp, or torch's AdamW (without model.optimizer)",
        )


def _refused(name: str, reason: str, fix: str) -> SFTError:
    return SFTError(f"{name} can't train here: {reason}", where=_WHERE, fix=fix)
