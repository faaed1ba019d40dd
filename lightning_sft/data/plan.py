"""Who is in which step: a pure function from the examples' weights to the micro-batches of an epoch.

The order of an epoch is one seeded permutation, cut into global micro-batches of `batch_size · world_size`
rows; the ranks take contiguous shares of each. So the rows of an optimizer step depend only on how many rows
a step has, not on how they are spread over accumulation and ranks. Resuming needs no state: start at `k`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_sft.errors import SFTError


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one rank computes at once.

    Args:
        rows: The examples, by index.
        num_items: N of the optimizer step this belongs to: Σ weights over its window and all ranks.
        filler: The rows are only there to keep this rank busy: they count with weight 0.
    """

    rows: tuple[int, ...]
    num_items: float
    filler: bool = False


class BatchPlan:
    """The micro-batches of one epoch, for every rank.

    Args:
        weight_sums: Σ of the token weights of every example; all above 0.
        batch_size: Rows per rank per micro-batch.
        world_size: Number of ranks.
        accumulate: Micro-batches per optimizer step (`trainer.accumulate_grad_batches`).
        seed: Seed of the order.
        epoch: Which epoch; each has an order of its own.
        limit: `trainer.limit_train_batches`: a fraction of the micro-batches (float) or a number of them (int).
        shuffle: Whether the order is a permutation, or the order of the examples.

    Raises:
        SFTError: There is no example, or `limit` leaves no micro-batch.
    """

    def __init__(
        self,
        weight_sums: Sequence[float],
        *,
        batch_size: int,
        world_size: int = 1,
        accumulate: int = 1,
        seed: int = 0,
        epoch: int = 0,
        limit: float | int = 1.0,
        shuffle: bool = True,
    ) -> None:
        if batch_size < 1:
            raise SFTError(f"batch_size is {batch_size}; it must be at least 1", where="data.batch_size")
        sums = np.asarray(weight_sums, dtype=np.float64)
        rows = len(sums)
        if not rows:
            raise SFTError("there is no example to plan batches for")
        self.world_size = world_size
        self.accumulate = accumulate
        self._size = batch_size * world_size
        self.available = available = -(-rows // self._size)
        """Micro-batches per rank without any limit."""
        self.micro_batches = min(limit, available) if isinstance(limit, int) else int(available * limit)
        if self.micro_batches < 1:
            raise SFTError(
                f"limit_train_batches {limit} leaves none of the {available} micro-batches of an epoch",
                where="trainer.limit_train_batches",
                fix="raise it, or lower data.batch_size",
            )
        self.steps = -(-self.micro_batches // accumulate)
        """Optimizer steps in this epoch, the last of which may have a shorter window."""
        order = np.arange(rows)
        if shuffle:
            order = np.random.Generator(np.random.PCG64([seed, epoch])).permutation(rows)
        self._order = order[: self.micro_batches * self._size]
        per_step = self._size * accumulate
        self.num_items = [
            float(sums[self._order[step * per_step : (step + 1) * per_step]].sum())
            for step in range(self.steps)
        ]
        """N of every optimizer step: the sum of the weights it trains on, over all ranks."""

    def rank(self, rank: int, start: int = 0) -> Iterator[MicroBatch]:
        """The micro-batches of one rank in order, from number `start` on."""
        for index in range(start, self.micro_batches):
            rows = self._order[index * self._size : (index + 1) * self._size]
            share = np.array_split(rows, self.world_size)[rank]
            num_items = self.num_items[index // self.accumulate]
            if len(share):
                yield MicroBatch(tuple(int(row) for row in share), num_items)
            else:
                yield MicroBatch((int(rows[0]),), num_items, filler=True)
