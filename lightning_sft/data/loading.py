"""What a DataLoader is given: micro-batches by the plan's order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, DistributedSampler

from lightning_sft.data.batch import Batch, Collate
from lightning_sft.data.plan import BatchPlan, MicroBatch
from lightning_sft.example import Example


class Examples(Dataset[Batch]):
    """Micro-batches by what the plan says of them."""

    def __init__(self, examples: Sequence[Example], collate: Collate) -> None:
        self.examples = examples
        self.collate = collate

    def __getitem__(self, micro: MicroBatch) -> Batch:
        examples = [self.examples[row] for row in micro.rows]
        batch = self.collate(examples, micro.num_items)
        if micro.filler:
            batch.weights = torch.zeros_like(batch.weights)
        return batch


class PlanSampler(DistributedSampler[MicroBatch]):
    """One rank's part of the plan. A `DistributedSampler`, so that Lightning leaves it in place.

    Args:
        plan_of: The plan of an epoch.
        rank: Whose part.
        start: The epoch and its micro-batch to begin with. (Lightning makes the first iterator before it says
            which epoch it is.)
    """

    def __init__(
        self, plan_of: Callable[[int], BatchPlan], rank: int, start: tuple[int, int] = (0, 0)
    ) -> None:
        self.plan_of = plan_of
        self.rank = rank
        self.start = start
        self.epoch = start[0]

    def __iter__(self) -> Iterator[MicroBatch]:
        first = self.start[1] if self.epoch == self.start[0] else 0
        return self.plan_of(self.epoch).rank(self.rank, first)

    def __len__(self) -> int:
        """Micro-batches of a whole epoch without any limit: Lightning applies `limit_train_batches` once more."""
        return self.plan_of(self.epoch).available


def as_it_is(batch: Any) -> Any:
    """The plan has made the batch already."""
    return batch
