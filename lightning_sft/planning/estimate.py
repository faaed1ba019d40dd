"""What a rank needs on a device, and how long the run takes there."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from lightning_sft.training.devices import Device
from lightning_sft.training.peak_memory import Peak

UTILISATION = 0.4
"""Share of a GPU's bfloat16 peak that training is taken to reach; 0.3 to 0.5 is usual for dense models."""

CPU_UTILISATION = 0.5
"""Share of the speed of a large matrix product, measured here, that training on this CPU is taken to reach."""

CUDA_FIXED = 800 << 20
"""Bytes of CUDA's context, kernels and workspaces, which no allocator counts."""

TIGHT = 0.9
"""From this share of a device's memory on it may not fit after all."""


@dataclass(frozen=True, slots=True)
class Sharding:
    """How a strategy spreads a model over ranks.

    Args:
        ranks: How many there are.
        weights: Weights are sharded, and a block at a time is gathered.
        gradients: Gradients are sharded.
        optimizer: Optimizer states are sharded.
        buckets: Gradients have a second copy, to send them together.
    """

    ranks: int = 1
    weights: bool = False
    gradients: bool = False
    optimizer: bool = False
    buckets: bool = False

    @classmethod
    def of(cls, strategy: str, ranks: int) -> Sharding:
        """That of a strategy by its name in the YAML, or its class's."""
        name = strategy.lower().replace("_", "")
        if ranks == 1:
            return cls()
        if "fsdp" in name or "modelparallel" in name:
            return cls(ranks, weights=True, gradients=True, optimizer=True)
        return cls(ranks, buckets=True)

    def parts(self, peak: Peak) -> dict[str, int]:
        """The parts of one rank."""
        parts = dict(peak.parts)
        if self.buckets and "gradients" in parts:
            parts["gradients"] *= 2
        for part, sharded in (
            ("weights", self.weights),
            ("quantised base", self.weights),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
        ):
            if sharded and part in parts:
                parts[part] = -(-parts[part] // self.ranks)
        if self.weights:
            parts["weights"] += peak.largest_block
        return parts


@dataclass(frozen=True, slots=True)
class Estimate:
    """A rank on a device.

    Args:
        device: The device.
        parts: Bytes by part; `framework` is what the process has before the model is loaded.
        ranks: How many share this memory: on a CPU all of the machine.
        seconds: How long the run takes; None where that can't be told.
    """

    device: Device
    parts: dict[str, int]
    ranks: int
    seconds: float | None

    @property
    def total(self) -> int:
        """Bytes of one rank."""
        return sum(self.parts.values())

    @property
    def share(self) -> float:
        """Of the device's memory; above 1 it doesn't fit."""
        return self.total * self.ranks / self.device.memory


def estimate(
    device: Device,
    peak: Peak,
    sharding: Sharding,
    *,
    fixed: dict[str, int],
    flops: float | None,
    speed: float | None,
    here: int,
) -> Estimate:
    """What one rank needs on the device.

    Args:
        device: The device.
        peak: What a step needs.
        sharding: How the model is spread.
        fixed: Bytes that the process has on a CPU before the model is loaded, by part.
        flops: Of the whole run.
        speed: FLOP/s that a rank reaches on this machine's CPU.
        here: How many ranks run on this machine.
    """
    parts = sharding.parts(peak) | (fixed if device.kind == "cpu" else {"framework": CUDA_FIXED})
    reached = speed if device.kind == "cpu" else device.peak and device.peak * UTILISATION
    seconds = flops / sharding.ranks / reached if flops is not None and reached else None
    return Estimate(device, parts, here if device.kind == "cpu" else 1, seconds)


def cpu_speed(dtype: torch.dtype) -> float:
    """FLOP/s that training may reach on this CPU, from large matrix products of this type, for half a second."""
    n = 512
    a, b = torch.ones(n, n, dtype=dtype), torch.ones(n, n, dtype=dtype)
    best, end = 1e-12, time.perf_counter() + 0.5
    while (start := time.perf_counter()) < end:
        torch.mm(a, b)
        best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best * CPU_UTILISATION


def resident() -> int:
    """Bytes of resident memory of this process."""
    import psutil

    return int(psutil.Process().memory_info().rss)
