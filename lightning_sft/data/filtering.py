"""Which conversations are kept: the filters of `data.filters`, one after the other.

A filter sees what those before it have kept. What filters make of a conversation by itself is found out in any process
and any order; judges of whole sets (`SetFilter`) are then asked in one process, in order. So the verdicts don't depend
on how the work was shared.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from numbers import Real
from typing import TypeVar

from lightning_sft import plugins
from lightning_sft.bases import Filter, SetFilter, Verdict
from lightning_sft.conversation import Conversation, Meta, Segments
from lightning_sft.errors import SFTError

Given = TypeVar("Given")
Got = TypeVar("Got")

Looks = tuple[object, ...]
"""What the filters make of one conversation by itself: their verdicts, and in the place of a `SetFilter` what its judge
is asked with. It ends with the first verdict that drops it."""


_VERDICT = (("reason", str), ("score", Real), ("detail", str))


@dataclass(frozen=True, slots=True)
class Dropped:
    """A conversation that a filter dropped.

    Args:
        meta: Where it comes from.
        number: Which conversation of its row it is, from 1.
        filter: The filter's name.
        verdict: Why.
    """

    meta: Meta
    number: int
    filter: str
    verdict: Verdict

    def __str__(self) -> str:
        """The filter with its verdict, for a person."""
        score = "" if self.verdict.score is None else f" (score {self.verdict.score:.4g})"
        detail = "" if self.verdict.detail is None else f": {self.verdict.detail}"
        return f"{self.filter}: {self.verdict.reason}{score}{detail}"

    @property
    def line(self) -> str:
        """A line of JSON; scores that JSON has no number for are null."""
        score = self.verdict.score
        return json.dumps(
            {
                "source": self.meta.source,
                "row": self.meta.row,
                "conversation": self.number,
                "filter": self.filter,
                "reason": self.verdict.reason,
                "score": None if score is None or not math.isfinite(score) else _plain(score),
                "detail": self.verdict.detail,
            },
            ensure_ascii=False,
        )


class Filters:
    """Filters in their order.

    Args:
        filters: The filters.
    """

    def __init__(self, filters: Sequence[Filter] = ()) -> None:
        self.filters = tuple(filters)
        classes = [type(each).__name__ for each in self.filters]
        self.names = [
            name if classes.count(name) == 1 else f"{name} {classes[: n + 1].count(name)}"
            for n, name in enumerate(classes)
        ]
        """The filters' names: those of their classes, numbered where there are several of one class."""
        self._described = [plugins.describe(each) for each in self.filters]

    @property
    def judge_sets(self) -> bool:
        """Whether a verdict may depend on the conversations before."""
        return any(isinstance(each, SetFilter) for each in self.filters)

    def look(self, conversation: Conversation | Segments) -> Looks:
        """What the filters make of a conversation by itself.

        Raises:
            SFTError: A filter fails; names the filter and the conversation's row.
        """
        looks: list[object] = []
        for n, filter in enumerate(self.filters):
            if isinstance(filter, SetFilter):
                looks.append(self.blamed(n, conversation.meta, filter.look, conversation))
                continue
            verdict = self.verdict(n, conversation.meta, filter.judge, conversation)
            looks.append(verdict)
            if not verdict.keep:
                break
        return tuple(looks)

    def verdict(self, n: int, meta: Meta, judge: Callable[[Given], Verdict], given: Given) -> Verdict:
        """A verdict of filter `n`; raises as `look` does."""
        verdict = self.blamed(n, meta, judge, given)
        if not isinstance(verdict, Verdict):
            raise SFTError(
                f"{self._described[n]} gave a {type(verdict).__name__} instead of a Verdict", where=str(meta)
            )
        for name, kind in _VERDICT:
            if (value := getattr(verdict, name)) is not None and not isinstance(value, kind):
                raise SFTError(
                    f"{self._described[n]} gave a {type(value).__name__} as a verdict's {name}",
                    where=str(meta),
                )
        return verdict

    def blamed(self, n: int, meta: Meta, call: Callable[[Given], Got], given: Given) -> Got:
        """What filter `n` gives, with its failures put down to it; raises as `look` does."""
        try:
            return call(given)
        except SFTError as error:
            raise error.at(str(meta)) from error
        except Exception as error:
            raise SFTError(
                f"{self._described[n]} failed: {type(error).__name__}: {error}", where=str(meta)
            ) from error


class Judge:
    """Judges the conversations of one set, in order.

    Args:
        filters: By which filters.
    """

    def __init__(self, filters: Filters) -> None:
        self._filters = filters
        self._judges = [each.begin() if isinstance(each, SetFilter) else None for each in filters.filters]

    def __call__(self, conversation: Conversation | Segments, number: int) -> Dropped | None:
        """Why the next conversation is dropped; None: it is kept. Raises as `Filters.look` does.

        Args:
            conversation: The conversation.
            number: Which one of its row it is, from 1.
        """
        return self.decide(conversation.meta, number, self._filters.look(conversation))

    def decide(self, meta: Meta, number: int, looks: Looks) -> Dropped | None:
        """The same, by what the filters made of the conversation."""
        for n, (judge, seen) in enumerate(zip(self._judges, looks, strict=False)):
            verdict = seen if judge is None else self._filters.verdict(n, meta, judge, seen)
            if isinstance(verdict, Verdict) and not verdict.keep:
                return Dropped(meta, number, self._filters.names[n], verdict)
        return None


def _plain(number: float) -> float:
    """Python's number of a library's, such as NumPy's."""
    return number if isinstance(number, int) else float(number)


def numbered(
    conversations: Iterable[Conversation | Segments],
) -> Iterator[tuple[int, Conversation | Segments]]:
    """The conversations with their number among those of their row, from 1."""
    for _, of_row in groupby(conversations, key=lambda each: each.meta.place):
        yield from enumerate(of_row, 1)
