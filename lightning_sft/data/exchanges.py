"""Conversations that are longer than the context, shortened or split between exchanges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from lightning_sft.conversation import Conversation
from lightning_sft.data.fitted import Cut, Fitted, accounted, all_of, cut_right, named, owners, trained_tokens
from lightning_sft.errors import SFTError
from lightning_sft.rendering.layout import Part

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lightning_sft.rendering import Renderer
    from lightning_sft.rendering.encode import Rendering

SYSTEM_ROLES = ("system", "developer")


@dataclass
class Exchanges:
    """A conversation that is too long, in exchanges: a user's message and all that follows up to the next one."""

    renderer: Renderer
    conversation: Conversation
    whole: Rendering
    limit: int
    placed: set[int] = field(default_factory=set)
    """Messages that are in a piece already."""

    def __post_init__(self) -> None:
        self._rendered: dict[Part, Rendering] = {}
        self.part = self.whole.part or Part((), frozenset())
        self.systems: list[int] = []
        self.groups: list[list[int]] = []
        for number in self.part.messages:
            role = self.conversation.messages[number].role
            if role in SYSTEM_ROLES:
                self.systems.append(number)
            elif self.groups and (role != "user" or self._role(self.groups[-1][-1]) == "user"):
                self.groups[-1].append(number)
            else:
                self.groups.append([number])

    def without_oldest(self) -> Fitted:
        """The example without as few of the oldest exchanges as will do."""
        found = self._longest([(n, len(self.groups)) for n in range(self._trained_groups[-1], 0, -1)])
        if found is None:
            reason = f"without room for the last exchange in max_length {self.limit}"
            return accounted(self.whole, [], [all_of(self.whole, reason)])
        begin, _, kept = found
        lost = len(self.whole.example) - len(kept.example)
        lost_trained = max(0, trained_tokens(self.whole) - trained_tokens(kept))
        reason = f"oldest turns, beyond max_length {self.limit}"
        cut = Cut(reason, lost, lost_trained, self._named(0, begin))
        return accounted(self.whole, [kept], [cut])

    def split(self) -> Fitted:
        """Pieces of as many exchanges as fit; none without a trained message."""
        kept: list[Rendering] = []
        cuts: list[Cut] = []
        done = 0
        for group in self._trained_groups:
            if group < done:
                continue
            # First as much as fits of the untrained exchanges before this one, then of all those after it.
            if found := self._longest([(n, group + 1) for n in range(group, done - 1, -1)]):
                begin = found[0]
                after = range(group + 1, len(self.groups) + 1)
                _, end, piece = self._longest([(begin, n) for n in after]) or found
                kept.append(piece)
                self.placed |= set(self._part(begin, end).messages)
            else:
                begin, end = group, group + 1
                self._cut_exchange(group, kept, cuts)
            cuts += self._context(done, begin)
            done = end
        return accounted(self.whole, kept, [*cuts, *self._context(done, len(self.groups))])

    def _cut_exchange(self, group: int, kept: list[Rendering], cuts: list[Cut]) -> None:
        """Keep what fits of an exchange that is too long by itself."""
        reason = f"an exchange longer than max_length {self.limit}"
        pieces, lost = cut_right(self._render(group, group + 1), self.limit, reason)
        if pieces:
            kept += pieces
            cuts += lost
            self.placed |= set(self._part(group, group + 1).messages)
        else:
            tokens = self._starts[group + 1] - self._starts[group]
            own = np.isin(self._owner, self.groups[group]) & (self.whole.example.weights > 0)
            cuts.append(
                Cut(lost[0].reason, tokens, int(np.count_nonzero(own)), self._named(group, group + 1))
            )

    def _context(self, begin: int, end: int) -> list[Cut]:
        """What is lost with untrained exchanges that are in no piece."""
        if begin == end:
            return []
        tokens = self._starts[end] - self._starts[begin]
        return [Cut("untrained turns that fit into no piece", tokens, 0, self._named(begin, end))]

    def _named(self, begin: int, end: int) -> str:
        return named([number for group in self.groups[begin:end] for number in group])

    def _role(self, number: int) -> str:
        return self.conversation.messages[number].role

    @cached_property
    def _owner(self) -> NDArray[np.int64]:
        return owners(self.whole)

    @cached_property
    def _trained_groups(self) -> list[int]:
        trained = set(self._owner[self.whole.example.weights > 0].tolist())
        return [n for n, group in enumerate(self.groups) if trained & set(group)] or [len(self.groups) - 1]

    @cached_property
    def _starts(self) -> list[int]:
        """About where each exchange begins in the tokens of the whole; behind the last, their number."""
        starts = [len(self._owner)]
        for group in reversed(self.groups):
            found = np.flatnonzero(np.isin(self._owner, group))
            starts.append(min(starts[-1], int(found[0])) if len(found) else starts[-1])
        return starts[::-1]

    def _estimate(self, begin: int, end: int) -> int:
        return self._starts[0] + self._starts[end] - self._starts[begin]

    def _longest(self, ranges: Sequence[tuple[int, int]]) -> tuple[int, int, Rendering] | None:
        """Of ranges of exchanges, each longer than the one before, the last that fits, rendered; None if none does.

        The tokens of the whole tell about which one that is. It is rendered, and its neighbours until the one
        behind it doesn't fit.
        """
        guess = max((n for n, each in enumerate(ranges) if self._estimate(*each) <= self.limit), default=0)
        n, found = guess, None
        while found is None and 0 <= n < len(ranges):
            found = self._fitting(*ranges[n])
            n -= 1
        if found is not None and n == guess - 1:
            for each in ranges[guess + 1 :]:
                if (longer := self._fitting(*each)) is None:
                    break
                found = longer
        return found

    def _fitting(self, begin: int, end: int) -> tuple[int, int, Rendering] | None:
        rendering = self._render(begin, end)
        return (begin, end, rendering) if len(rendering.example) <= self.limit else None

    def _part(self, begin: int, end: int) -> Part:
        own = [number for group in self.groups[begin:end] for number in group]
        behind = len(self.conversation.messages) if end == len(self.groups) else own[-1]
        messages = sorted([*own, *(number for number in self.systems if number < behind)])
        trained = (self.part.trained - self.placed) & set(messages)
        return Part(tuple(messages), frozenset(trained), self.part.turn, self.part.notes)

    def _render(self, begin: int, end: int) -> Rendering:
        part = self._part(begin, end)
        if part not in self._rendered:
            try:
                self._rendered[part] = self.renderer.explain_part(self.conversation, part)
            except SFTError as error:
                what = f"{error.what} (of {named(part.messages)} by themselves, as data.overlong leaves them)"
                fix = "choose another data.overlong, or raise data.max_length"
                raise SFTError(what, where=error.where, fix=fix) from error
        return self._rendered[part]
