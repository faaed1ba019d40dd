"""The LightningDataModule: prepared examples, split without leakage, served in the order of a batch plan."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from lightning_sft.bases import Filter
from lightning_sft.data.batch import Batch
from lightning_sft.data.cache import default_folder
from lightning_sft.data.canaries import check_planted
from lightning_sft.data.ledger import check_losses
from lightning_sft.data.loading import Examples, PlanSampler, as_it_is
from lightning_sft.data.mixture import check_weights, draw, rows_per_epoch
from lightning_sft.data.packing import check_options
from lightning_sft.data.plan import BatchPlan
from lightning_sft.data.prepare import Prepared, check_ids, prepare
from lightning_sft.data.sources import Source, Sources, as_sources
from lightning_sft.data.split import shared_prompts, split_indices
from lightning_sft.data.truncation import Overlong, longest
from lightning_sft.data.workers import cores
from lightning_sft.errors import SFTError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_sft.training.module import SFTModule


class SFTDataModule(LightningDataModule):
    """Reads conversations, renders them with the model's tokenizer, and serves them in planned batches.

    Args:
        train: Training data: a path, or a list of paths and sources (path, format, …).
        val: Validation data, likewise.
        test: Test data, likewise.
        filters: Filters that training data has to pass, in this order, before validation data is split off. Data given
            as `val` and `test` isn't filtered.
        canaries: A file of `lightning-sft data canaries`, or a source with a weight: trained on as one more source, and
            what `MemorizationProbe` asks for.
        val_split: Take validation data from the training data instead: a fraction (0.05) or a number of rows.
            Rows with the same prompt stay on one side.
        split_seed: Seed of that split; apart from `seed`, so that runs with other seeds stay comparable.
        max_length: Most tokens of an example; by default the model's context.
        overlong: What happens to longer ones: `drop` them; cut them with `truncate_right` or `truncate_left`;
            `drop_oldest_turns`; or `split` them into several examples.
        max_lost_fraction: Refuse to start if more than this fraction of the tokens to train would be lost.
        batch_size: Examples (with `packing`: packs) per rank in a micro-batch; with
            trainer.accumulate_grad_batches and the number of ranks it makes the global batch.
        batch_tokens: Instead of so many examples, as many as fit into this many tokens, per rank and micro-batch;
            `batch_size` then doesn't count.
        packing: Put examples into packs of up to `pack_length` tokens, as full as can be, so that micro-batches
            have about equally many tokens. Attention stays within each example.
        pack_length: Most tokens in a pack; `max_length` by default.
        order: Order of the examples in an epoch: `random`; `grouped`, in which the examples of an optimizer step
            have similar lengths; or `short_first`.
        val_batch_size: The same for validation and test; `batch_size` by default.
        num_workers: Processes that prepare batches beside training.
        preparation_workers: Processes that render large data before training; by default one per core, 0 or 1 for
            none besides this one.
        cache: Keep prepared data for the next run: true (in `~/.cache/lightning-sft`, or the folder that
            `LIGHTNING_SFT_CACHE` names), a folder, or false.
        seed: Seed of the order of the examples; by default `seed_everything`'s.
    """

    def __init__(
        self,
        train: Sources | None = None,
        val: Sources | None = None,
        test: Sources | None = None,
        filters: list[Filter] | None = None,
        canaries: str | Source | None = None,
        val_split: float | int | None = None,
        split_seed: int = 0,
        max_length: int | None = None,
        overlong: Overlong = "drop",
        max_lost_fraction: float = 0.01,
        batch_size: int = 8,
        batch_tokens: int | None = None,
        packing: bool = False,
        pack_length: int | None = None,
        order: Literal["random", "grouped", "short_first"] = "random",
        val_batch_size: int | None = None,
        num_workers: int = 0,
        preparation_workers: int | None = None,
        cache: bool | str = True,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if val is not None and val_split is not None:
            raise SFTError("data.val and data.val_split are both given", where="data", fix="give one of them")
        _at_least("batch_size", batch_size, 1)
        _at_least("val_batch_size", val_batch_size, 1)
        _at_least("num_workers", num_workers, 0)
        _at_least("preparation_workers", preparation_workers, 0)
        _at_least("seed", seed, 0)
        _at_least("batch_tokens", batch_tokens, 2)
        _at_least("pack_length", pack_length, 2)
        check_options(batch_tokens, packing, pack_length, order)
        self.canaries = as_sources([canaries] if canaries else None)
        trained = as_sources(train)
        self.sources = {
            "train": trained and trained + self.canaries,
            "val": as_sources(val),
            "test": as_sources(test),
        }
        check_weights(self.sources)
        self.filters = filters or []
        self.val_split = val_split
        self.split_seed = split_seed
        self.max_length = max_length
        self.overlong: Overlong = overlong
        self.max_lost_fraction = max_lost_fraction
        self.batch_size = batch_size
        self.batch_tokens = batch_tokens
        self.packing = packing
        self._pack_length = pack_length
        self.order: Literal["random", "grouped", "short_first"] = order
        self.val_batch_size = batch_size if val_batch_size is None else val_batch_size
        self.num_workers = num_workers
        self.preparation_workers = cores() if preparation_workers is None else preparation_workers
        self.cache_folder = default_folder() if cache is True else Path(cache).expanduser() if cache else None
        self._seed = seed
        self.prepared: dict[str, Prepared] = {}
        self._last_plan: tuple[tuple[object, ...], BatchPlan] | None = None
        self._total_steps: dict[tuple[object, ...], int] = {}
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
            if self.steps_vary:
                # Lightning reads the length of a loader when it gets it, so it has to get one in every epoch.
                self._attached.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]
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
                "tokens": int(prepared.lengths.sum()),
                "from_cache": prepared.from_cache,
                **({"examples_per_epoch": sum(self.examples_per_epoch)} if part == "train" else {}),
                "sources": [ledger.as_json() for ledger in prepared.ledgers],
            }
            for part, prepared in self.prepared.items()
        }

    @property
    def examples_per_epoch(self) -> list[int]:
        """How many examples an epoch of training takes from each source."""
        sources = self.sources["train"]
        have = np.bincount(self.prepared["train"].sources, minlength=len(sources)).tolist()
        return [rows_per_epoch(rows, source.weight) for rows, source in zip(have, sources, strict=True)]

    @property
    def pack_length(self) -> int | None:
        """Most tokens in a pack; None without packing.

        Raises:
            SFTError: Nothing says how long packs may be.
        """
        if not self.packing:
            return None
        for length in (self._pack_length, self.max_length, self._module.context_length):
            if length is not None:
                return length
        raise SFTError(
            "the model doesn't tell its context, so nothing says how long packs may be",
            where="data.pack_length",
            fix="give data.pack_length or data.max_length",
        )

    @property
    def steps_vary(self) -> bool:
        """Whether epochs may differ in their number of steps: how well bins fill depends on order or rows."""
        fractions = any(source.weight % 1 for source in self.sources["train"])
        return self.batch_tokens is not None or (self.packing and fractions)

    def plan(self, epoch: int) -> BatchPlan:
        """The training batches of an epoch, as the trainer at hand is configured."""
        key = (epoch, *self._plan_key)
        if self._last_plan is None or self._last_plan[0] != key:
            trainer, prepared = self._attached, self.prepared["train"]
            weights = [source.weight for source in self.sources["train"]]
            plan = BatchPlan(
                prepared.weight_sums,
                lengths=prepared.lengths,
                rows=draw(prepared.sources, weights, seed=self.seed, epoch=epoch),
                batch_size=self.batch_size,
                batch_tokens=self.batch_tokens,
                pack_length=self.pack_length,
                padded=self.batch_tokens is not None and self._module.layout.padded_because is not None,
                world_size=trainer.world_size,
                accumulate=trainer.accumulate_grad_batches,
                seed=self.seed,
                epoch=epoch,
                limit=trainer.limit_train_batches if trainer.limit_train_batches is not None else 1.0,
                order=self.order,
            )
            self._last_plan = (key, plan)
        return self._last_plan[1]

    def total_steps(self) -> int:
        """Optimizer steps of the whole run; 0 if the trainer sets no end.

        Where epochs differ in their number of steps, each of them is planned.
        """
        epochs, most = self._attached.max_epochs, self._attached.max_steps
        if epochs is None or epochs < 0:
            return max(0, most)
        key = (epochs, most, *self._plan_key)
        if key not in self._total_steps:
            steps = 0
            for epoch in range(epochs if self.steps_vary else min(1, epochs)):
                steps += self.plan(epoch).steps * (1 if self.steps_vary else epochs)
                if 0 <= most <= steps:
                    steps = most
                    break
            self._total_steps[key] = steps
        return self._total_steps[key]

    def train_dataloader(self) -> DataLoader[Batch]:
        """The batches of this rank, in the plan's order, another one in every epoch.

        Raises:
            SFTError: Packs are asked for, and the model takes padded rows.
        """
        self.check_packing()
        sampler = PlanSampler(self.plan, self._attached.global_rank, self.start)
        sampler.set_epoch(max(self.start[0], self._attached.current_epoch))
        return self._loader("train", sampler)

    def check_packing(self) -> None:
        """Refuse packs for a model that takes padded rows; raises as `train_dataloader` says."""
        if self.packing and (because := self._module.layout.padded_because):
            raise SFTError(
                f"packs need flattened rows, and this model gets padded ones: {because}",
                where="data.packing",
                fix="set data.batch_tokens or data.batch_size instead",
            )

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
    def _plan_key(self) -> tuple[object, ...]:
        """What plans depend on that may change under this data module."""
        trainer = self._attached
        limit = trainer.limit_train_batches
        return (
            self.seed,
            trainer.world_size,
            trainer.accumulate_grad_batches,
            type(limit),  # 1 is one micro-batch, 1.0 all of them
            limit,
            self.batch_size,
            self.batch_tokens,
        )

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
        context = module.context_length
        limit = longest(self.max_length, context)
        prepared = prepare(
            self.sources[part],
            module.renderer,
            max_length=limit,
            overlong=self.overlong,
            filters=self.filters if part == "train" else (),
            cache_folder=self.cache_folder,
            workers=self.preparation_workers,
        )
        check_losses(
            prepared.ledgers,
            self.max_lost_fraction,
            max_length=limit,
            context=context,
            overlong=self.overlong,
        )
        if part == "train":
            check_planted(prepared.ledgers[len(prepared.ledgers) - len(self.canaries) :])
        check_ids(prepared, module.tokenizer, module.vocabulary)
        self.prepared[part] = prepared

    def _split(self) -> None:
        if self.val_split is None or "val" in self.prepared:
            return
        whole = self.prepared["train"]
        planted = whole.sources >= len(self.sources["train"]) - len(self.canaries)  # all trained on
        train, val = split_indices(whole.keys, validation=self.val_split, seed=self.split_seed, kept=planted)
        self.prepared["train"] = whole.part(train)
        self.prepared["val"] = replace(whole.part(val), ledgers=[])

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
            lengths=self.prepared[part].lengths,
            batch_size=self.val_batch_size,
            world_size=trainer.world_size,
            order="given",
        )
        return self._loader(part, PlanSampler(lambda epoch: plan, trainer.global_rank))

    def _loader(self, part: str, sampler: PlanSampler) -> DataLoader[Batch]:
        return DataLoader(
            Examples(self.prepared[part].examples, self._module.layout.collate),
            sampler=sampler,
            batch_size=None,
            collate_fn=as_it_is,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )


def _at_least(option: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise SFTError(f"{option} is {value}", where=f"data.{option}", fix=f"give at least {least}")
