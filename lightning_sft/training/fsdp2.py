"""Fully sharded training (FSDP2): every rank keeps a part of each weight, gradient and optimizer average.

Each decoder block is gathered while it computes, and the model around them (embeddings, last norm and head) from the
beginning of a forward pass to the end of its backward pass (Zhao et al., 2023). Losses and gradients are those of
one process. What a run writes is whole: a checkpoint goes on under any strategy.

Whatever computes with the model has to do it on all ranks, and what needs the head's weights inside `as_forward`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils import _pytree as pytree

from lightning_sft.errors import SFTError
from lightning_sft.training.compiling import blocks_of
from lightning_sft.training.layout import causal_lm
from lightning_sft.training.models import load_checkpoint
from lightning_sft.training.shards import full_tensor, local

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.core.optimizer import LightningOptimizer
    from torch.optim import Optimizer

T = TypeVar("T")


class FSDP2Strategy(ModelParallelStrategy):
    """Shards weights, gradients and optimizer over all processes.

    Args:
        cpu_offload: Keep them in the CPU's memory, and bring a block to the device while it computes; the optimizer
            steps on the CPU.
        process_group_backend: By default what the device needs: gloo, nccl, or both with `cpu_offload`.
        timeout: How long a process waits for the others.
    """

    def __init__(
        self,
        cpu_offload: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.cpu_offload = cpu_offload

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Checkpoints are those of any strategy, so Lightning restores the optimizer from them."""
        return True

    def shard(self, model: nn.Module) -> None:
        """Shard a model that has its adapter, in place; its parameters keep their names.

        Raises:
            SFTError: The model can't be sharded.
        """
        from torch.distributed.fsdp import (
            CPUOffloadPolicy,
            MixedPrecisionPolicy,
            OffloadPolicy,
            fully_shard,
            register_fsdp_forward_method,
        )

        inner = causal_lm(model)
        blocks = blocks_of(inner)
        _refuse_unshardable(model, inner, blocks)
        cuda = self.root_device.type == "cuda"
        policies: dict[str, Any] = {
            "mesh": self.device_mesh["data_parallel"],
            "mp_policy": MixedPrecisionPolicy(reduce_dtype=_reduced_in(model)),
            "offload_policy": CPUOffloadPolicy(pin_memory=cuda) if self.cpu_offload else OffloadPolicy(),
        }
        for block in blocks:
            fully_shard(block, **policies)
        fully_shard(inner, **policies)
        inner.computing = MethodType(lambda self, compute: compute(), inner)
        register_fsdp_forward_method(inner, "computing")

    def setup(self, trainer: Trainer) -> None:
        """Without inference mode: weights that are gathered in it can't be trained afterwards."""
        trainer.fit_loop.epoch_loop.val_loop.inference_mode = False
        trainer.validate_loop.inference_mode = trainer.test_loop.inference_mode = False
        super().setup(trainer)

    def model_to_device(self) -> None:
        """Move the model, unless its shards are to stay in the CPU's memory: then what else there is."""
        if not self.cpu_offload:
            super().model_to_device()
            return
        assert self.model is not None
        for part in self.model.modules():
            for name, buffer in part.named_buffers(recurse=False):
                setattr(part, name, buffer.to(self.root_device))
        for metrics in cast(Iterable[nn.Module], self.model.children()):
            if not any(True for _ in metrics.parameters()):
                metrics.to(self.root_device)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole parameters that are trained, on rank 0 and in the CPU's memory; elsewhere nothing."""
        assert self.lightning_module is not None
        reshard(self.lightning_module)
        trained = {
            name: p.detach() for name, p in self.lightning_module.named_parameters() if p.requires_grad
        }
        return self._gathered(trained)

    def optimizer_state(self, optimizer: Optimizer | LightningOptimizer) -> dict[str, Any]:
        """The whole state, as an unsharded optimizer has it, on rank 0; elsewhere nothing."""
        return self._gathered(cast(Any, getattr(optimizer, "_optimizer", optimizer)).state_dict())

    def _gathered(self, state: dict[str, Any]) -> dict[str, Any]:
        whole = pytree.tree_map_only(DTensor, partial(_whole_on_rank_zero, rank=self.global_rank), state)
        return cast(dict[str, Any], whole) if self.is_global_zero else {}

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The checkpoint, mapped to memory: each rank reads the part that is its own."""
        return load_checkpoint(Path(self.broadcast(checkpoint_path)), weights_only=weights_only is not False)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take this rank's part of the parameters that the checkpoint has."""
        assert self.lightning_module is not None
        reshard(self.lightning_module)
        for name, parameter in self.lightning_module.named_parameters():
            if name in checkpoint["state_dict"]:
                part = part_of(checkpoint["state_dict"][name], parameter)
                local(parameter).copy_(local(part))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this rank's part of the optimizer's state."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                index: pytree.tree_map_only(Tensor, partial(part_of, like=parameters[index]), values)
                for index, values in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})

    def _setup_distributed(self) -> None:
        if self.cpu_offload and self.root_device.type == "cuda" and self._process_group_backend is None:
            self._process_group_backend = "cpu:gloo,cuda:nccl"  # norms of gradients are taken on the CPU
        super()._setup_distributed()
        self._data_parallel_size = self.world_size


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="Fully sharded data parallel (FSDP2)")
StrategyRegistry.register(
    "fsdp2_offload", FSDP2Strategy, description="The same, in the CPU's memory", cpu_offload=True
)


def shard(module: Any) -> None:
    """Shard the module's model where the trainer's strategy does that, once."""
    strategy: Strategy | None = module.trainer.strategy if module._trainer is not None else None
    if isinstance(strategy, FSDP2Strategy) and not is_sharded(module.loaded):
        strategy.shard(module.loaded)


def is_sharded(model: nn.Module) -> bool:
    """Whether any of the parameters are sharded."""
    return hasattr(causal_lm(model), "computing")


def as_forward(model: nn.Module, compute: Callable[[], T]) -> T:
    """`compute()`; of a sharded model as its forward pass, with embeddings and head whole.

    Gradients flow through the tensors that it returns, and no others.
    """
    if not is_sharded(model):
        return compute()
    inner = cast(Any, causal_lm(model))
    result: T = inner.computing(compute)
    if not torch.is_grad_enabled():
        inner.reshard()  # there's no backward pass, which would
    return result


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Within this context, which is for evaluation only, embeddings and head of a sharded model are whole."""
    if not is_sharded(model):
        yield
        return
    as_forward(model, lambda: None)  # the first to compute is taken for the root
    inner = cast(Any, causal_lm(model))
    inner.unshard()
    try:
        yield
    finally:
        inner.reshard()


def reshard(model: nn.Module) -> None:
    """Let go of all weights that were gathered."""
    from torch.distributed.fsdp import FSDPModule

    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


@contextmanager
def whole_parameters(model: nn.Module) -> Iterator[None]:
    """Within this context rank 0 has whole parameters, in the CPU's memory, to write them; all ranks have to take part.

    Of a peft model only those that are trained: it writes no others.
    """
    reshard(model)
    trained_only = hasattr(model, "peft_config")
    rank = torch.distributed.get_rank() if is_sharded(model) else 0
    kept: list[tuple[nn.Module, str, nn.Parameter]] = []
    made: dict[nn.Parameter, nn.Parameter | None] = {}
    for part in model.modules():
        for name, parameter in part.named_parameters(recurse=False):
            shards = parameter.detach()
            if not isinstance(shards, DTensor) or (trained_only and not parameter.requires_grad):
                continue
            if parameter not in made:
                full = _whole_on_rank_zero(shards, rank=rank)
                made[parameter] = None if full is None else nn.Parameter(full, parameter.requires_grad)
            kept.append((part, name, parameter))
    try:
        for part, name, parameter in kept:
            if (replaced := made[parameter]) is not None:
                part._parameters[name] = replaced
        yield
    finally:
        for part, name, parameter in kept:
            part._parameters[name] = parameter


def _whole_on_rank_zero(tensor: DTensor, *, rank: int) -> Tensor | None:
    full = full_tensor(tensor)
    return full.cpu() if rank == 0 else None


def part_of(saved: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor the part that this rank has of one of the same shape; other tensors as they are."""
    if not isinstance(like, DTensor) or saved.shape != like.shape:
        return saved
    return distribute_tensor(saved, like.device_mesh, like.placements, src_data_rank=None).to(like.device)


def _refuse_unshardable(model: nn.Module, inner: nn.Module, blocks: list[nn.Module]) -> None:
    what = None
    inside = set(inner.parameters())
    outside = [name for name, p in model.named_parameters() if p.requires_grad and p not in inside]
    types = sorted({str(p.dtype) for p in model.parameters() if p.requires_grad})
    if not blocks:
        what = f"{type(inner).__name__} doesn't say which of its modules are blocks"
    elif not all(p.is_floating_point() for p in model.parameters()):
        what = "its weights are quantized, and their scales would be left out of the shards"
    elif outside:
        what = f"{len(outside)} trained parameters are outside of it (the first: {outside[0]})"
    elif len(types) > 1:
        what = f"its trained parameters have several types ({', '.join(types)})"
    if what is not None:
        raise SFTError(
            f"the model can't be sharded: {what}",
            where="trainer.strategy: fsdp2",
            fix="use trainer.strategy: ddp",
        )


def _reduced_in(model: nn.Module) -> torch.dtype:
    """Gradients of 16-bit weights are added up in float32."""
    dtype = next((p.dtype for p in model.parameters() if p.requires_grad), torch.float32)
    return torch.promote_types(dtype, torch.float32)
