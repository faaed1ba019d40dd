"""Which rows of its sources an epoch sees: a source's weight says how often."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_sft.data.sources import Source
from lightning_sft.errors import SFTError


def rows_per_epoch(rows: int, weight: float) -> int:
    """How many rows an epoch takes from a source of `rows` rows: the nearest whole number, at least one."""
    return max(1, round(rows * weight)) if rows else 0


def draw(
    sources: Sequence[int] | NDArray[np.int32], weights: Sequence[float], *, seed: int, epoch: int
) -> NDArray[np.int64]:
    """The rows of an epoch, source by source; a row that is seen twice is in it twice.

    A source's rows go round in one seeded order, and every epoch takes the next `rows_per_epoch` of them. So
    after any number of epochs no row of a source was seen two times more often than another; at weight 0.5 two
    epochs together see every row once, and at whole weights every epoch sees all rows equally often.

    Args:
        sources: The source of each row, by index.
        weights: How often an epoch sees each source's rows; above 0.
        seed: Seed of the rounds.
        epoch: Which epoch.
    """
    source_of = np.asarray(sources, dtype=np.int64)
    drawn = []
    for source, weight in enumerate(weights):
        rows = np.flatnonzero(source_of == source)
        count = rows_per_epoch(len(rows), weight)
        if count % max(1, len(rows)):
            # Three words of entropy, the last not 0: never the stream of an epoch's order, which has two.
            rows = np.random.Generator(np.random.PCG64([seed, source, 1])).permutation(rows)
        if count:
            drawn.append(rows[(epoch * count + np.arange(count)) % len(rows)])
    return np.concatenate(drawn) if drawn else np.empty(0, np.int64)


def check_weights(sources: Mapping[str, Sequence[Source]]) -> None:
    """Refuse weights that mean nothing.

    Raises:
        SFTError: A weight isn't above 0, or is that of validation or test data.
    """
    for part, listed in sources.items():
        for source in listed:
            if not 0 < source.weight < math.inf:
                raise SFTError(
                    f"weight is {source.weight}",
                    where=f"data.{part}: {source.path}",
                    fix="give a number above 0, or leave the source out",
                )
            if part != "train" and source.weight != 1:
                raise SFTError(
                    f"weight is {source.weight}, but every row is evaluated once",
                    where=f"data.{part}: {source.path}",
                    fix="leave it out; weights are for data.train",
                )
