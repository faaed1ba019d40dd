"""Exact duplicates against a comparison of each text with all before; near ones against exact Jaccard indices."""

from __future__ import annotations

import random
import sys
from importlib import metadata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sft import Conversation, Message, Meta, Segments, SFTError, Verdict
from lightning_sft.testing.filters import verdicts
from lightning_sft_filters.duplicates import Duplicates
from lightning_sft_filters.near_duplicates import NearDuplicates, jaccard


def talk(asked: str, answered: str, row: int = 0) -> Conversation:
    return Conversation((Message("user", asked), Message("assistant", answered)), meta=Meta("a.jsonl", row))


def kept(filter, items) -> list[bool]:
    return [verdict.keep for verdict in verdicts(filter, items)]


TEXTS = st.text("aAbß \n", min_size=1, max_size=3)


@settings(deadline=None)
@given(
    pairs=st.lists(st.tuples(TEXTS, TEXTS), max_size=12),
    part=st.sampled_from(["prompt", "response", "conversation"]),
    normalize=st.booleans(),
)
def test_the_first_of_each_is_kept(pairs, part, normalize):
    def compared(pair):
        texts = {"prompt": pair[:1], "response": pair[1:], "conversation": pair}[part]
        return [" ".join(text.casefold().split()) if normalize else text for text in texts]

    expected = [all(compared(pair) != compared(other) for other in pairs[:n]) for n, pair in enumerate(pairs)]
    assert kept(Duplicates(part, normalize), [talk(*pair) for pair in pairs]) == expected


def test_the_first_ones_place_is_told():
    items = [talk("a", "b", 3), talk("a", "c", 4), talk("A ", "b", 9), talk("a", "b", 10)]
    same = Verdict("the same conversation as an earlier one", detail="a.jsonl, row 3")
    assert verdicts(Duplicates(), items) == [Verdict(), Verdict(), same, same]


def test_what_differs_in_anything_said_is_no_duplicate():
    tool = {"function": {"name": "add"}}
    base = talk("a", "b").messages
    items = [
        Conversation(base),
        Conversation(base, tools=(tool,)),
        Conversation((*base, Message("user", "c"))),
        Conversation((Message("system", "a"), base[1])),
        Conversation((base[0], Message("assistant", "b", reasoning="c"))),
        talk("a b", ""),
        Segments((("a", 0.0), ("b", 1.0))),
    ]
    assert kept(Duplicates(), [*items, *items]) == [True] * 7 + [False] * 7
    assert kept(Duplicates("response"), [items[0], items[1]]) == [True, False]


def test_forms_of_a_character_are_the_same_unless_asked_for():
    items = [talk("a", "caf\u00e9"), talk("a", "cafe\u0301")]
    assert kept(Duplicates(), items) == [True, False]
    assert kept(Duplicates(normalize=False), items) == [True, True]


@pytest.mark.parametrize("filter", [Duplicates("prompt"), NearDuplicates(part="prompt")])
def test_texts_without_the_part_are_kept(filter):
    assert kept(filter, [Segments((("once", 1.0),)), Segments((("upon", 1.0),))]) == [True, True]


# --------------------------------------------------------------------------------------------- near ones


def shingles(text: str, size: int, unit: str) -> set[tuple[str, ...]]:
    pieces = text.casefold().split() if unit == "words" else list(" ".join(text.casefold().split()))
    return {tuple(pieces[at : at + size]) for at in range(max(1, len(pieces) - size + 1))}


def similarity(one: str, other: str, size: int, unit: str) -> float:
    a, b = shingles(one, size, unit), shingles(other, size, unit)
    return len(a & b) / len(a | b)


def texts(number: int, seed: int) -> list[str]:
    """Texts of 40 words, half of them copies of earlier ones in which some words are exchanged."""
    draw = random.Random(seed)
    words = [f"w{n}" for n in range(60)]
    made: list[list[str]] = []
    for _ in range(number):
        if made and draw.random() < 0.5:
            text = [*draw.choice(made)]
            for _ in range(draw.randrange(0, 7)):
                text[draw.randrange(len(text))] = draw.choice(words)
        else:
            text = draw.choices(words, k=40)
        made.append(text)
    return [" ".join(text) for text in made]


@pytest.mark.parametrize(
    ("threshold", "size", "unit"),
    [(0.8, 3, "words"), (0.5, 2, "words"), (0.7, 6, "characters"), (1.0, 1, "words")],
)
def test_what_is_dropped_is_as_similar_as_told_to_one_that_is_kept(threshold, size, unit):
    given = texts(120, seed=size)
    found = verdicts(
        NearDuplicates(threshold, "response", size, unit),
        [talk("", text, row) for row, text in enumerate(given)],
    )
    left: list[int] = []
    missed = dropped = 0
    for row, verdict in enumerate(found):
        near = [n for n in left if similarity(given[n], given[row], size, unit) >= threshold]
        if verdict.keep:
            missed += bool(near)
            left.append(row)
            continue
        dropped += 1
        original = int(str(verdict.detail).rpartition(" ")[2])
        assert original in near
        assert verdict.score == similarity(given[original], given[row], size, unit)
    assert dropped >= 10
    assert missed <= 0.01 * (dropped + missed)


def test_bands_are_as_long_as_they_may_be_and_find_what_they_should():
    for threshold in (0.2, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0):
        count, size = NearDuplicates(threshold).bands
        assert count * size <= 128
        assert 1 - (1 - threshold**size) ** count >= 0.99
        longer = size + 1
        assert longer > 128 or 1 - (1 - threshold**longer) ** (128 // longer) < 0.99
    assert NearDuplicates(0.01).bands == (128, 1)


def test_a_text_shorter_than_a_shingle_is_one():
    items = [talk("", "so it is"), talk("", "So it is"), talk("", "so it isn't")]
    assert kept(NearDuplicates(1.0, "response", shingle=5), items) == [True, False, True]


def test_the_index_of_two_sets():
    import numpy as np

    def sets(*numbers):
        return np.array(numbers, dtype=np.uint64)

    assert jaccard(sets(1, 2, 3, 4), sets(3, 4, 5, 2**63)) == 2 / 6
    assert jaccard(sets(1), sets(1)) == 1


@pytest.mark.parametrize("options", [{"threshold": 0.0}, {"threshold": 1.1}, {"shingle": 0}])
def test_options_out_of_their_range_are_refused(options):
    with pytest.raises(SFTError, match=next(iter(options))):
        NearDuplicates(**options)


def test_without_rensa_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(SFTError, match="needs rensa") as caught:
        NearDuplicates()
    assert "lightning-sft[dedup]" in caught.value.fix


def test_what_another_rensa_kept_is_prepared_anew(monkeypatch):
    before = vars(NearDuplicates())
    assert before == vars(NearDuplicates())
    monkeypatch.setattr(metadata, "version", lambda name: "99")
    assert before != vars(NearDuplicates())
