"""What an adapter begins with that depends on the training rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_sft.errors import SFTError
from lightning_sft.training.layout import evaluating, hidden_states

if TYPE_CHECKING:
    from lightning_sft.data.batch import Batch
    from lightning_sft.data.datamodule import SFTDataModule
    from lightning_sft.training.module import SFTModule


class TrainingBatches:
    """The micro-batches of this rank's first epoch, as often as wanted."""

    def __init__(self, module: SFTModule, data: SFTDataModule) -> None:
        self.module, self.data = module, data
        self.plan = list(data.plan(0).rank(module.trainer.global_rank))

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[Batch]:
        examples, collate = self.data.prepared["train"].examples, self.module.layout.collate
        for micro in self.plan:
            yield collate([examples[row] for row in micro.rows], 1.0).to(self.module.device)


def initialize(module: SFTModule) -> None:
    """Let the adapter look at the training rows, if it wants to and the run is a new one.

    Raises:
        SFTError: There are none that could be gone through before training.
    """
    from lightning_sft.data.datamodule import SFTDataModule

    if not module.adapter.looks_at_rows:
        return
    data = getattr(module.trainer, "datamodule", None)
    if not isinstance(data, SFTDataModule):
        raise SFTError(
            "the adapter begins with a look at the training rows, which only SFTDataModule shows it",
            where="model.adapter",
            fix="use SFTDataModule, or another init",
        )
    layout = module.layout

    def forward(batch: Batch) -> None:
        hidden_states(module.loaded, batch, own_logits=layout.own_logits, whole=layout.whole)

    with isolate_rng(), evaluating(module), torch.no_grad():
        module.adapter.initialize(module.loaded, TrainingBatches(module, data), forward)
