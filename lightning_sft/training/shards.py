"""Tensors of which every rank has a part (`DTensor`), and tensors of which it has the whole, treated alike."""

from __future__ import annotations

from typing import cast

from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """What this rank has of a sharded tensor, without its history; another tensor likewise. They share memory."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """A sharded tensor put together on all ranks, which have to take part; another one itself."""
    if not isinstance(tensor, DTensor):
        return tensor
    there = tensor.to(tensor.device_mesh.device_type)  # an offloaded one is on the CPU
    return cast("DTensor", there).full_tensor()
