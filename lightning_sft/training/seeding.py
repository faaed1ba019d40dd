"""Randomness as a function of where training is, so that a resumed run draws what the first one drew."""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_batch(seed: int, *, rank: int, epoch: int, batch: int) -> None:
    """Seed torch (CPU and every GPU), numpy and random for one micro-batch of one rank.

    The four numbers are mixed by numpy's `SeedSequence`, so that neighbours give unrelated streams.

    Args:
        seed: The run's seed.
        rank: The process; each has dropout masks of its own.
        epoch: The epoch, from 0.
        batch: The micro-batch within the epoch, from 0.
    """
    mixed = np.random.SeedSequence([seed, rank, epoch, batch]).generate_state(3, dtype=np.uint32)
    _seed_torch(int(mixed[0]) << 32 | int(mixed[1]))
    np.random.seed(int(mixed[1]))
    random.seed(int(mixed[2]))


def _seed_torch(seed: int) -> None:
    """What `torch.manual_seed` does, on the devices in use: for others it would queue the seed, batch after batch."""
    torch.default_generator.manual_seed(seed)
    for device in (torch.cuda, torch.xpu):
        if device.is_initialized():
            device.manual_seed_all(seed)
    if torch.mps.is_available():
        torch.mps.manual_seed(seed)
