"""Which computation several requests share; pure functions of token ids.

1. Continuations of one context make one *row*: the context (the trunk) with the continuations as branches behind it,
   each of which sees the trunk and itself. A choice of one token needs no branch: it is read off the trunk's last
   position. Equal continuations, and those that begin another one, are the same branch.
2. Rows whose trunks begin alike make a *group*: what they have in common is computed once, and its keys and values
   are reused. Sorted by their ids, such rows are neighbours.
3. The rows of a group are batched by length, as many as a budget of padded tokens allows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from lightning_sft.evaluation.encoding import Ids, Scored

COST_OF_SHARING = 64
"""How many tokens a group's own forward pass and smaller batches cost, about."""

_SHORT = 32


class Target(NamedTuple):
    """One token to score: `token` after position `position` of its row, for the request `owner`."""

    position: int
    token: int
    owner: int


@dataclass(slots=True)
class Row:
    """Tokens for one forward pass.

    Args:
        ids: The trunk, then the branches.
        trunk: How many tokens the trunk has.
        branches: Where each branch begins and ends.
        targets: What is scored.
    """

    ids: Ids
    trunk: int
    branches: tuple[tuple[int, int], ...] = ()
    targets: list[Target] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that begin with the same `shared` tokens, fewer than any of their trunks."""

    shared: int
    rows: list[Row]


def rows_of(requests: Sequence[Scored], *, branching: bool) -> list[Row]:
    """The rows that score all requests; `Target.owner` is the request's index.

    Args:
        requests: What to score; equal requests are computed once.
        branching: Rows may have several branches; without, each is a row of its own.
    """
    trunks: dict[Ids, dict[Ids, list[int]]] = {}
    for number, request in enumerate(requests):
        trunks.setdefault(request.trunk, {}).setdefault(request.tail, []).append(number)
    rows = [row for trunk, tails in trunks.items() for row in _rows(trunk, tails, branching)]
    return rows if branching else _without_beginnings(rows)


def _rows(trunk: Ids, tails: dict[Ids, list[int]], branching: bool) -> Iterator[Row]:
    """The rows of one trunk; `tails` are the scored tokens of its requests."""
    branches: dict[Ids, list[Ids]] = {}  # to the tails that lie on each
    longest: Ids | None = None
    for tail in sorted(tails, key=lambda tail: tail[:-1], reverse=True):
        if longest is None or longest[: len(tail) - 1] != tail[:-1]:
            longest = tail[:-1]
        branches.setdefault(longest, []).append(tail)
    for chosen in _together(branches, max(len(trunk), _SHORT) if branching else 0):
        row = Row(trunk, len(trunk))
        for branch in chosen:
            start = len(row)
            row.ids += branch
            row.branches += ((start, len(row)),) if branch else ()
            for tail in branches[branch]:
                for offset, token in enumerate(tail):
                    position = len(trunk) - 1 if offset == 0 else start + offset - 1
                    row.targets += [Target(position, token, owner) for owner in tails[tail]]
        yield row


def _together(branches: Iterable[Ids], most: int) -> Iterator[list[Ids]]:
    """Branches for one row each time: every position looks at all of them, so no more tokens than this."""
    chosen: list[Ids] = []
    for branch in branches:
        if chosen and sum(map(len, chosen)) + len(branch) > most:
            yield chosen
            chosen = []
        chosen.append(branch)
    yield chosen


def _without_beginnings(rows: list[Row]) -> list[Row]:
    """The rows without those that are the beginning of another one, which takes their targets."""
    kept: list[Row] = []
    for row in sorted(rows, key=lambda row: row.ids, reverse=True):
        if kept and row.trunk <= kept[-1].trunk and kept[-1].ids[: len(row)] == row.ids:
            kept[-1].targets += row.targets
            kept[-1].trunk = row.trunk
            kept[-1].branches = ((row.trunk, len(kept[-1])),)
        else:
            kept.append(row)
    return kept


def groups_of(rows: Sequence[Row], longest: int | None) -> list[Group]:
    """The rows in groups with a shared beginning, where that saves enough; the others in one without.

    Args:
        rows: Of any order.
        longest: Rows that are longer share nothing; None: there is no such limit.
    """
    free = [row for row in rows if longest is not None and len(row) > longest]
    able = [row for row in rows if longest is None or len(row) <= longest]
    able.sort(key=lambda row: row.ids[: row.trunk])
    groups, end = [], 0
    for shared, start, stop in _intervals([_common(a, b) for a, b in pairwise(able)]):
        free += able[end:start]
        groups.append(Group(shared, able[start:stop]))
        end = stop
    free += able[end:]
    return [*groups, *([Group(0, free)] if free else [])]


@dataclass(slots=True)
class _Interval:
    """Neighbours `start…` with at least `common` tokens in common; the most that groups in it save, and these."""

    common: int
    start: int
    saved: int = 0
    groups: list[tuple[int, int, int]] = field(default_factory=list)

    def add(self, part: _Interval) -> None:
        self.saved += part.saved
        self.groups += part.groups

    def closed(self, last: int) -> _Interval:
        """With the last row known: one group of all, if that saves more than the groups inside."""
        whole = (last - self.start) * self.common - COST_OF_SHARING
        if whole > self.saved:
            self.saved, self.groups = whole, [(self.common, self.start, last + 1)]
        return self


def _intervals(common: Sequence[int]) -> list[tuple[int, int, int]]:
    """Groups (shared, start, stop) of neighbours that save much, Σ (rows − 1) · shared − cost of each.

    Of each interval of the tree that common beginnings make, either all rows or the best groups inside it.

    Args:
        common: How many tokens each row shares with the next one.
    """
    open_: list[_Interval] = []
    for number, shared in enumerate([*common, -1]):
        found = _Interval(-1, number)
        while open_ and open_[-1].common > shared:
            open_[-1].add(found)
            found = open_.pop().closed(number)
        if open_ and open_[-1].common == shared:
            open_[-1].add(found)
        else:
            open_.append(_Interval(shared, found.start, found.saved, found.groups))
    return open_[0].groups


def _common(a: Row, b: Row) -> int:
    """How many tokens both trunks begin with, fewer than either has."""
    most = min(a.trunk, b.trunk) - 1
    low, high = 0, most
    if a.ids[:most] == b.ids[:most]:
        return most
    while low < high:  # by halves: slices compare faster than a loop over tokens
        middle = (low + high + 1) // 2
        if a.ids[low:middle] == b.ids[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def batches_of(
    group: Group, batch_tokens: int, to_come: int = 0, cached_tokens: int | None = None
) -> Iterator[list[Row]]:
    """The group's rows from long to short, so many at once that the padded tokens stay in the budget.

    What is shared, and tokens that are to come one by one, count an eighth: they take attention, but no large matrix
    products.

    Args:
        group: The rows.
        batch_tokens: The budget.
        to_come: How many tokens will be written to each row.
        cached_tokens: Where each row has keys and values of its own, also of what is shared: for how many tokens
            in all; None: there is no such limit.
    """
    batch: list[Row] = []
    for row in sorted(group.rows, key=len, reverse=True):
        longest = len(batch[0]) if batch else len(row)
        cost = longest - group.shared + (group.shared + to_come) // 8
        full = (len(batch) + 1) * cost > batch_tokens
        if cached_tokens is not None:
            full |= (len(batch) + 1) * (longest + to_come) > cached_tokens
        if batch and full:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
