"""Who is in which step: a pure function from the examples' weights and lengths to the micro-batches of an epoch.

An epoch is a seeded sequence of *units*: single examples, packs of examples, or bins of a token budget. It is cut
into global micro-batches of so many units per rank, and each of these is dealt out to the ranks so that they have
about equally many tokens. So the rows of an optimizer step depend only on how many units a step has, not on how
they are spread over accumulation and ranks. Resuming needs no state: start at `k`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lightning_sft.data.dealing import deal
from lightning_sft.data.packing import best_fit, rectangles
from lightning_sft.errors import SFTError

Order = Literal["random", "grouped", "short_first", "given"]

_Ints = NDArray[np.int64]
_GROUP = 64  # steps, or bins of padded rows, whose rows are sorted by length together


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
        lengths: Tokens of every example; by default all are taken to have one.
        rows: The examples of this epoch, by index, some perhaps repeatedly; by default each once.
        batch_size: Examples (or packs) per rank per micro-batch; not used with `batch_tokens`.
        batch_tokens: Most tokens per rank per micro-batch.
        pack_length: Pack examples into units of at most this many tokens.
        padded: The model takes padded rows, so that `batch_tokens` is rows · longest.
        world_size: Number of ranks.
        accumulate: Micro-batches per optimizer step (`trainer.accumulate_grad_batches`).
        seed: Seed of the order.
        epoch: Which epoch; each has an order of its own.
        limit: `trainer.limit_train_batches`: a fraction of the micro-batches (float) or a number of them (int).
        order: `random`; `grouped`, in which the examples of a step have similar lengths; `short_first`; or the
            order `given`.

    Raises:
        SFTError: There is no example, one has nothing to train or doesn't fit, or `limit` leaves no micro-batch.
    """

    def __init__(
        self,
        weight_sums: Sequence[float] | NDArray[np.float64],
        *,
        lengths: Sequence[int] | _Ints | None = None,
        rows: Sequence[int] | _Ints | None = None,
        batch_size: int = 1,
        batch_tokens: int | None = None,
        pack_length: int | None = None,
        padded: bool = False,
        world_size: int = 1,
        accumulate: int = 1,
        seed: int = 0,
        epoch: int = 0,
        limit: float | int = 1.0,
        order: Order = "random",
    ) -> None:
        sums = np.asarray(weight_sums, dtype=np.float64)
        tokens = np.ones(len(sums), np.int64) if lengths is None else np.asarray(lengths, dtype=np.int64)
        given: _Ints = np.arange(len(sums)) if rows is None else np.asarray(rows, dtype=np.int64)
        _check(sums, tokens, len(given), batch_size, batch_tokens, pack_length)
        self.world_size = world_size
        self.accumulate = accumulate
        self._size = world_size * (1 if batch_tokens is not None else batch_size)
        generator = np.random.Generator(np.random.PCG64([seed, epoch]))
        ordered = given if order == "given" else given[generator.permutation(len(given))]
        if order == "short_first":
            ordered = ordered[np.argsort(tokens[ordered], kind="stable")]
        bins: list[list[int]] | None = None
        if batch_tokens is not None:
            bins = _budgeted(tokens[ordered], batch_tokens, padded, generator)
        elif pack_length is not None:
            bins = _packed(tokens[ordered], pack_length, generator)
        elif order == "grouped":
            ordered = ordered[_grouped(tokens[ordered], self._size * accumulate, generator)]
        units = _Units(ordered, tokens, bins, padded=padded)
        if order == "short_first" and bins is not None:
            bins = [bins[unit] for unit in np.argsort(units.longest, kind="stable")]
            units = _Units(ordered, tokens, bins, padded=padded)

        self.examples = len(given)
        """Examples of this epoch without any limit, repeated ones counted again."""
        capacity = batch_tokens if batch_tokens is not None else pack_length
        self.fill = int(units.tokens.sum()) / (capacity * len(units.tokens)) if capacity else None
        """Tokens over the room for them, of packs and token budgets."""
        self.available = available = -(-len(units.tokens) // self._size)
        """Micro-batches per rank without any limit."""
        self.micro_batches = min(limit, available) if isinstance(limit, int) else int(available * limit)
        if self.micro_batches < 1:
            raise SFTError(
                f"limit_train_batches {limit} leaves none of the {available} micro-batches of an epoch",
                where="trainer.limit_train_batches",
                fix=f"raise it, or lower data.{'batch_size' if batch_tokens is None else 'batch_tokens'}",
            )
        self.steps = -(-self.micro_batches // accumulate)
        """Optimizer steps in this epoch, the last of which may have a shorter window."""
        self._units = units
        self._end = min(len(units.tokens), self.micro_batches * self._size)
        per_step = self._size * accumulate
        bounds = [min(step * per_step, self._end) for step in range(self.steps + 1)]
        self.num_items = [
            float(sums[units.rows[units.starts[first] : units.starts[last]]].sum())
            for first, last in pairwise(bounds)
        ]
        """N of every optimizer step: the sum of the weights it trains on, over all ranks."""

    def rank(self, rank: int, start: int = 0) -> Iterator[MicroBatch]:
        """The micro-batches of one rank in order, from number `start` on."""
        for step in range(start // self.accumulate, self.steps):
            first = step * self.accumulate
            loads = [0] * self.world_size
            for index in range(first, min(first + self.accumulate, self.micro_batches)):
                unit = index * self._size
                share = self._shares(unit, min(unit + self._size, self._end), loads)[rank]
                if index < start:
                    continue
                if share:
                    yield MicroBatch(self._units.rows_of(share), self.num_items[step])
                else:
                    row = int(self._units.rows[self._units.starts[unit]])
                    yield MicroBatch((row,), self.num_items[step], filler=True)

    def _shares(self, first: int, last: int, loads: list[int]) -> list[list[int]]:
        """The units from `first` to before `last`, by rank; `loads` is each rank's work in this step so far."""
        if self.world_size == 1:
            return [list(range(first, last))]
        shares = deal(self._units.costs[first:last].tolist(), loads)
        return [[first + unit for unit in share] for share in shares]


class _Units:
    """The units of an epoch, one after the other.

    Args:
        ordered: The epoch's examples.
        lengths: Tokens of every example.
        bins: Positions in `ordered`, unit by unit; None where every example is a unit.
        padded: A unit costs its padding too.
    """

    def __init__(
        self, ordered: _Ints, lengths: _Ints, bins: list[list[int]] | None, *, padded: bool = False
    ) -> None:
        self.rows = ordered
        self.starts = np.arange(len(ordered) + 1)
        """Where each unit begins in `rows`, and the end of the last."""
        if bins is not None:
            self.rows = ordered[np.fromiter(chain.from_iterable(bins), np.int64, len(ordered))]
            self.starts = np.cumsum([0, *map(len, bins)])
        own = lengths[self.rows]
        self.tokens: _Ints = np.add.reduceat(own, self.starts[:-1])
        self.longest: _Ints = np.maximum.reduceat(own, self.starts[:-1])
        self.costs: _Ints = self.longest * np.diff(self.starts) if padded else self.tokens

    def rows_of(self, units: list[int]) -> tuple[int, ...]:
        """The examples of some units."""
        spans = (self.rows[self.starts[unit] : self.starts[unit + 1]].tolist() for unit in units)
        return tuple(chain.from_iterable(spans))


def _packed(lengths: _Ints, capacity: int, generator: np.random.Generator) -> list[list[int]]:
    """Best-fit decreasing; equally long examples change places from epoch to epoch, and so do the packs."""
    descending = np.argsort(-lengths, kind="stable")
    bins = best_fit(lengths[descending].tolist(), capacity)
    shuffled = generator.permutation(len(bins)).tolist()
    return [descending[bins[index]].tolist() for index in shuffled]


def _budgeted(lengths: _Ints, capacity: int, padded: bool, generator: np.random.Generator) -> list[list[int]]:
    """Best fit in the order as it stands; padded rows are sorted a few at a time.

    (In descending order, a bin that has room for many examples would get those of one length.)
    """
    if not padded:
        return best_fit(lengths.tolist(), capacity)
    together = _GROUP * max(1, int(capacity / lengths.mean()))
    bins = []
    for start in range(0, len(lengths), together):
        descending = start + np.argsort(-lengths[start : start + together], kind="stable")
        bins += [descending[run].tolist() for run in rectangles(lengths[descending].tolist(), capacity)]
    return [bins[index] for index in generator.permutation(len(bins))]


def _grouped(lengths: _Ints, per_step: int, generator: np.random.Generator) -> _Ints:
    """The positions in an order in which the examples of a step have similar lengths; the steps are shuffled."""
    pieces = []
    for start in range(0, len(lengths), _GROUP * per_step):
        descending = start + np.argsort(-lengths[start : start + _GROUP * per_step], kind="stable")
        full = len(descending) // per_step
        steps = descending[: full * per_step].reshape(full, per_step)
        pieces += [generator.permutation(steps).ravel(), descending[full * per_step :]]
    return np.concatenate(pieces)


def _check(
    sums: NDArray[np.float64],
    lengths: _Ints,
    examples: int,
    batch_size: int,
    batch_tokens: int | None,
    pack_length: int | None,
) -> None:
    if batch_size < 1:
        raise SFTError(f"batch_size is {batch_size}; it must be at least 1", where="data.batch_size")
    if not len(sums) or not examples:
        raise SFTError("there is no example to plan batches for")
    if not (sums > 0).all():
        raise SFTError(f"example {int(np.argmin(sums > 0))} has no trained token")
    for option, most in (("batch_tokens", batch_tokens), ("pack_length", pack_length)):
        if most is not None and (longest := int(lengths.max())) > most:
            raise SFTError(
                f"{int((lengths > most).sum()):,} examples are longer than {option} {most:,}; the longest has "
                f"{longest:,} tokens",
                where=f"data.{option}",
                fix=f"give at least {longest}, or set data.max_length: {most}",
            )
