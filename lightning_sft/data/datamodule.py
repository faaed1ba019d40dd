"""The LightningDataModule: prepared examples, split without leakage, served in the order of a batch plan."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lightning_sft.data.batch import Batch, Collate
from lightning_sft.data.plan import BatchPlan, MicroBatch
from lightning_sft.data.prepare import Overlong, Prepared, check_ids, check_losses, prepare
from lightning_sft.data.sources import Source
from lightning_sft.data.split import shared_prompts, split_indices
from lightning_sft.errors import SFTError
from lightning_sft.example import Example

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_sft.training.module import SFTModule

Sources = str | list[str | Source]
"""A path by itself, or a list of paths and sources."""


class SFTDataModule(LightningDataModule):
    """Reads conversations, renders them with the model's tokenizer, and serves them in planned batches.

    Args:
        train: Training data: a path, or a list of paths and sources (path, format, …).
        val: Validation data, likewise.
        test: Test data, likewise.
        val_split: Take validation data from the training data instead: a fraction (0.05) or a number of rows.
            Rows with the same prompt stay on one side.
        split_seed: Seed of that split; apart from `seed`, so that runs with other seeds stay comparable.
        max_length: Most tokens of an example; by default the model's context.
        overlong: What happens to longer ones: drop them, or cut them off at the right.
        max_lost_fraction: Refuse to start if more than this fraction of the tokens to train would be lost.
        batch_size: Examples per rank in a micro-batch; with trainer.accumulate_grad_batches and the number of
            ranks it makes the global batch.
        val_batch_size: The same for validation and test; `batch_size` by default.
        num_workers: Processes that prepare batches beside training.
        seed: Seed of the order of the examples; by default `seed_everything`'s.
    """

    def __init__(
        self,
        train: Sources | None = None,
        val: Sources | None = None,
        test: Sources | None = None,
        val_split: float | int | None = None,
        split_seed: int = 0,
        max_length: int | None = None,
        overlong: Overlong = "drop",
        max_lost_fraction: float = 0.01,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if val is not None and val_split is not None:
            raise SFTError("data.val and data.val_split are both given", where="data", fix="give one of them")
        _at_least("batch_size", batch_size, 1)
        _at_least("val_batch_size", val_batch_size, 1)
        _at_least("num_workers", num_workers, 0)
        self.sources = {"train": _sources(train), "val": _sources(val), "test": _sources(test)}
        self.val_split = val_split
        self.split_seed = split_seed
        self.max_length = max_length
        self.overlong: Overlong = overlong
        self.max_lost_fraction = max_lost_fraction
        self.batch_size = batch_size
        self.val_batch_size = batch_size if val_batch_size is None else val_batch_size
        self.num_workers = num_workers
        self._seed = seed
        self.prepared: dict[str, Prepared] = {}
        self._last_plan: tuple[tuple[object, ...], BatchPlan] | None = None
        self.start = (0, 0)
        """Where training begins: the epoch and its micro-batch. A checkpoint sets it after `setup`."""

    @property
    def seed(self) -> int:
        """The seed of the order: `data.seed`, or the one given to `seed_everything`."""
        return int(os.environ.get("PL_GLOBAL_SEED", 0)) if self._seed is None else self._seed

    def setup(self, stage: str) -> None:
        """Read and render what the stage (fit, validate, test) needs.

        Raises:
            SFTError: Something in the data or its options is at fault; nothing has been trained yet.
        """
        if stage == "fit":
            self.start = (0, 0)
            self._prepare("train")
            if self.val_split is not None:
                self._split()
            elif self.sources["val"]:
                self._prepare("val")
            if "val" in self.prepared:
                self._warn_of_shared_prompts()
        elif stage == "validate":
            if self.val_split is not None:
                self._prepare("train")
                self._split()
            else:
                self._prepare("val")
        elif stage == "test":
            self._prepare("test")

    @property
    def ledger(self) -> dict[str, object]:
        """What became of every row and token, in JSON types, for `ledger.json`."""
        return {
            part: {
                "examples": len(prepared.examples),
                "tokens": sum(len(example) for example in prepared.examples),
                "sources": [ledger.as_json() for ledger in prepared.ledgers],
            }
            for part, prepared in self.prepared.items()
        }

    def plan(self, epoch: int) -> BatchPlan:
        """The training batches of an epoch, as the trainer at hand is configured."""
        trainer = self._attached
        limit = trainer.limit_train_batches if trainer.limit_train_batches is not None else 1.0
        key = (self.seed, epoch, trainer.world_size, trainer.accumulate_grad_batches, limit)
        if self._last_plan is None or self._last_plan[0] != key:
            plan = BatchPlan(
                self.prepared["train"].weight_sums,
                batch_size=self.batch_size,
                world_size=trainer.world_size,
                accumulate=trainer.accumulate_grad_batches,
                seed=self.seed,
                epoch=epoch,
                limit=limit,
            )
            self._last_plan = (key, plan)
        return self._last_plan[1]

    def total_steps(self) -> int:
        """Optimizer steps of the whole run; 0 if the trainer sets no end."""
        trainer = self._attached
        ends = []
        if trainer.max_epochs is not None and trainer.max_epochs >= 0:
            ends.append(self.plan(0).steps * trainer.max_epochs)
        if trainer.max_steps >= 0:
            ends.append(trainer.max_steps)
        return min(ends, default=0)

    def train_dataloader(self) -> DataLoader[Batch]:
        """The batches of this rank, in the plan's order, another one in every epoch."""
        return self._loader("train", _PlanSampler(self.plan, self._attached.global_rank, self.start))

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Let the module seed what a training batch draws: no other hook of the batch comes before this one."""
        if self._attached.training:
            self._module.begin_batch()
        return batch

    def val_dataloader(self) -> DataLoader[Batch] | list[object]:
        """The validation batches of this rank; an empty list where there is no validation data."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Batch] | list[object]:
        """The test batches of this rank."""
        return self._evaluation_loader("test")

    # ------------------------------------------------------------------------------------------------

    @property
    def _attached(self) -> Trainer:
        if self.trainer is None:
            raise RuntimeError(
                "SFTDataModule needs a Trainer: pass it to trainer.fit(module, datamodule=...)"
            )
        return self.trainer

    @property
    def _module(self) -> SFTModule:
        from lightning_sft.training.module import SFTModule

        module = self._attached.lightning_module
        if not isinstance(module, SFTModule):
            raise TypeError(f"SFTDataModule works with SFTModule, not {type(module).__name__}")
        return module

    def _prepare(self, part: str) -> None:
        if part in self.prepared:
            return
        if not self.sources[part]:
            raise SFTError(
                f"no data is given for {part}", where=f"data.{part}", fix="give a file, folder or Hub id"
            )
        module = self._module
        if self.max_length is not None and self.max_length < 2:
            raise SFTError(f"max_length is {self.max_length}", where="data.max_length", fix="give at least 2")
        context = module.context_length
        if self.max_length is not None and context is not None and self.max_length > context:
            raise SFTError(
                f"max_length {self.max_length} is more than the model's context of {context}",
                where="data.max_length",
                fix=f"give at most {context}, or leave it out",
            )
        prepared = prepare(
            self.sources[part],
            module.renderer,
            max_length=context if self.max_length is None else self.max_length,
            overlong=self.overlong,
        )
        check_losses(prepared, self.max_lost_fraction)
        check_ids(prepared, module.vocabulary)
        self.prepared[part] = prepared

    def _split(self) -> None:
        if self.val_split is None or "val" in self.prepared:
            return
        whole = self.prepared["train"]
        train, val = split_indices(whole.keys, validation=self.val_split, seed=self.split_seed)
        self.prepared["train"] = Prepared(
            [whole.examples[i] for i in train], [whole.keys[i] for i in train], whole.ledgers
        )
        self.prepared["val"] = Prepared([whole.examples[i] for i in val], [whole.keys[i] for i in val])

    def _warn_of_shared_prompts(self) -> None:
        keys = self.prepared["val"].keys
        if shared := shared_prompts(self.prepared["train"].keys, keys):
            rank_zero_warn(
                f"{shared} of {len(keys)} validation rows have a prompt that is also in the training data: the "
                "validation loss will look better than it is."
            )

    def _evaluation_loader(self, part: str) -> DataLoader[Batch] | list[object]:
        if part not in self.prepared:
            return []
        trainer = self._attached
        plan = BatchPlan(
            self.prepared[part].weight_sums,
            batch_size=self.val_batch_size,
            world_size=trainer.world_size,
            shuffle=False,
        )
        return self._loader(part, _PlanSampler(lambda epoch: plan, trainer.global_rank))

    def _loader(self, part: str, sampler: _PlanSampler) -> DataLoader[Batch]:
        return DataLoader(
            _Examples(self.prepared[part].examples, self._module.layout.collate),
            sampler=sampler,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )


class _Examples(Dataset[Batch]):
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


class _PlanSampler(DistributedSampler[MicroBatch]):
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


def _at_least(option: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise SFTError(f"{option} is {value}", where=f"data.{option}", fix=f"give at least {least}")


def _sources(given: Sources | None) -> list[Source]:
    if given is None:
        return []
    listed = [given] if isinstance(given, str) else given
    return [Source(path=each) if isinstance(each, str) else each for each in listed]


def _as_it_is(batch: Any) -> Any:
    return batch
