"""What a filter has to do."""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from copy import deepcopy
from typing import ClassVar

from lightning_sft.bases import Filter, SetFilter, Verdict
from lightning_sft.conversation import Conversation, Message, Meta, Segments, ToolCall
from lightning_sft.data.filtering import Filters, Judge
from lightning_sft.testing.plugin import MissingSample, PluginTests

Item = Conversation | Segments

_TALK = (Message("user", "Why is the sky blue?"), Message("assistant", "It scatters blue light most."))
_CALL = Message("assistant", tool_calls=(ToolCall("weather", {"city": "Bath"}, "1"),))
_MESSAGES: tuple[tuple[Message, ...], ...] = (
    _TALK,
    _TALK,
    (
        Message("system", "Be short."),
        *_TALK,
        Message("user", "Why?"),
        Message("assistant", "So.", weight=0.0),
    ),
    (Message("user", "Rain?"), _CALL, Message("tool", "wet", tool_call_id="1"), Message("assistant", "Yes.")),
    (Message("user", "5 × 7?"), Message("assistant", "35", reasoning="7 + 7 + 7 + 7 + 7")),
    (Message("user", "שלום 👋🏽"), Message("assistant", "las olas\n\n\nlas olas\n" * 40)),
    (Message("user"), Message("assistant")),
    (),
)
_SEGMENTS: tuple[tuple[tuple[str, float], ...], ...] = (
    (("Once upon a time", 1.0),),
    (("Q: why? ", 0.0), ("A: so.", 1.0)),
    (("", 1.0),),
    (),
)
SAMPLES: tuple[Item, ...] = (
    *(Conversation(messages, meta=Meta("sample", row)) for row, messages in enumerate(_MESSAGES, 1)),
    *(Segments(segments, meta=Meta("texts", row)) for row, segments in enumerate(_SEGMENTS, 1)),
)
"""Conversations and segments of many kinds, empty ones among them."""


class FilterTests(PluginTests):
    """The tests of a filter.

    Attributes:
        kept: Conversations that it keeps, in this order.
        dropped: Conversations that it drops, each by itself; for a `SetFilter`, once it has seen all in `kept`.
    """

    kind = "filters"
    kept: ClassVar[Sequence[Item]] = ()
    dropped: ClassVar[Sequence[Item]] = ()

    def given(self, name: str) -> Sequence[Item]:
        """`kept` or `dropped`.

        Raises:
            MissingSample: There are none.
        """
        items: Sequence[Item] = getattr(self, name)
        if not items:
            raise MissingSample(f"set `{name}` in the test class of {self.plugin.__name__}")
        return items

    @property
    def samples(self) -> Sequence[Item]:
        """`kept`, `dropped`, and the kit's own."""
        return (*self.kept, *self.dropped, *SAMPLES)

    def test_it_judges_whatever_a_format_makes(self) -> None:
        """Conversations and segments of any kind get a verdict: kept, or dropped with a reason."""
        check_verdicts(self.make(), self.samples)

    def test_it_is_pure(self) -> None:
        """The same conversations get the same verdicts: again, from another instance, and in another process."""
        check_purity(self.make(), self.make(), self.samples)

    def test_its_verdicts_depend_on_the_order_only_if_it_says_so(self) -> None:
        """Only a `SetFilter` may judge a conversation by those before it, and then by those of its set alone."""
        check_order(self.make(), self.samples)

    def test_it_changes_no_conversation(self) -> None:
        """Conversations are the same after it has judged them."""
        check_unchanged(self.make(), self.samples)

    def test_it_keeps_and_drops_what_it_should(self) -> None:
        """`kept` is kept, and `dropped` dropped."""
        check_samples(self.make(), self.given("kept"), self.given("dropped"))


def verdicts(filter: Filter, items: Sequence[Item]) -> list[Verdict]:
    """The verdicts on the items of one set, in order."""
    if not isinstance(filter, SetFilter):
        return [filter.judge(item) for item in items]
    judge = filter.begin()
    return [judge(filter.look(item)) for item in items]


def check_verdicts(filter: Filter, items: Sequence[Item]) -> None:
    """Each item gets a Verdict with a reason of words, if it drops it, and a number, if there is a score."""
    for item in items:
        try:
            verdict = filter.judge(item)
        except Exception as error:
            raise AssertionError(
                f"{_name(filter)} fails with {type(error).__name__}: {error}, on {item}"
            ) from error
        assert isinstance(verdict, Verdict), (
            f"{_name(filter)} gives a {type(verdict).__name__}, not a Verdict"
        )
        assert verdict.reason is None or (isinstance(verdict.reason, str) and verdict.reason.strip()), (
            f"{_name(filter)} drops {item} and says not why: {verdict.reason!r}"
        )
        score = verdict.score
        assert score is None or (isinstance(score, int | float) and not math.isnan(score)), (
            f"{_name(filter)} gives the score {score!r}, which is no number"
        )


def check_purity(filter: Filter, other: Filter, items: Sequence[Item]) -> None:
    """The same verdicts: twice, from another instance, and from one that went through pickle."""
    first = verdicts(filter, items)
    assert verdicts(filter, items) == first, (
        f"{_name(filter)} judges the same conversations otherwise the second time"
    )
    assert verdicts(other, items) == first, f"another {_name(filter)} judges the same conversations otherwise"
    try:
        there = pickle.loads(pickle.dumps(filter))
        looks = pickle.loads(pickle.dumps([Filters([filter]).look(item) for item in items]))
    except Exception as error:
        raise AssertionError(
            f"{_name(filter)}, or what its `look` gives, can't be pickled: {type(error).__name__}: {error}"
        ) from error
    assert verdicts(there, items) == first, f"{_name(filter)} judges otherwise after it was pickled"
    judge = Judge(Filters([filter]))
    dropped = [judge.decide(Meta(), 1, each) for each in looks]
    assert [each and each.verdict for each in dropped] == [None if each.keep else each for each in first], (
        f"{_name(filter)} judges otherwise by what `look` gave after that was pickled"
    )


def check_order(filter: Filter, items: Sequence[Item]) -> None:
    """Verdicts don't depend on the items before; those of a `SetFilter` not on another set's."""
    first = verdicts(filter, items)
    if not isinstance(filter, SetFilter):
        assert verdicts(filter, items[::-1])[::-1] == first, (
            f"a verdict of {_name(filter)} depends on the conversations before: make it a SetFilter"
        )
        return
    one, other = filter.begin(), filter.begin()
    for item, verdict in zip(items, first, strict=True):
        seen = filter.look(item)
        assert one(seen) == verdict == other(filter.look(item)), (
            f"two judges of {_name(filter)} aren't apart: keep what was seen in the judge that `begin` gives"
        )


def check_unchanged(filter: Filter, items: Sequence[Item]) -> None:
    """The items are what they were."""
    before = deepcopy(list(items))
    verdicts(filter, items)
    assert list(items) == before, f"{_name(filter)} changes the conversations that it judges"


def check_samples(filter: Filter, kept: Sequence[Item], dropped: Sequence[Item]) -> None:
    """All of `kept` is kept, and each of `dropped` is dropped after it."""
    for item, verdict in zip(kept, verdicts(filter, kept), strict=True):
        assert verdict.keep, f"{_name(filter)} drops ({verdict.reason}) what it should keep: {item}"
    for item in dropped:
        assert not verdicts(filter, [*kept, item])[-1].keep, (
            f"{_name(filter)} keeps what it should drop: {item}"
        )


def _name(filter: Filter) -> str:
    return type(filter).__name__
