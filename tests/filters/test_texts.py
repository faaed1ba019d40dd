"""Patterns, refusals and repetition, against what can be counted by hand."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sft import Conversation, Message, Segments, SFTError, Verdict
from lightning_sft_filters.pattern import Pattern
from lightning_sft_filters.refusals import OURS, Refusals, read_phrases
from lightning_sft_filters.repetition import (
    REPEATED,
    TOP,
    Repetition,
    covered,
    in_top,
    repeated,
    repeated_ngrams,
)


def said(*answers: str) -> Conversation:
    return Conversation(
        tuple(
            m for text in answers for m in (Message("user", "As an AI, later?"), Message("assistant", text))
        )
    )


def test_a_pattern_drops_what_it_finds_and_says_what_that_is():
    pattern = Pattern(drop=["TO-?DO", "^x$"])
    assert pattern.judge(said("Done.", "A TO-DO\\n")) == Verdict("'TO-?DO' is in it", detail="TO-DO")
    assert pattern.judge(said("x")) == Verdict("'^x$' is in it", detail="x")
    assert pattern.judge(said("Done.", "todo")).keep
    assert not Pattern(drop=["TO-?DO"], ignore_case=True).judge(said("todo")).keep
    assert not Pattern(drop=["later"], roles=["user"]).judge(said("Done.")).keep
    assert not Pattern(drop=["a"], roles=["user"]).judge(Segments((("a", 0.0), ("b", 1.0)))).keep
    assert Pattern(drop=["a"]).judge(Segments((("a", 0.0), ("b", 1.0)))).keep


def test_every_required_pattern_has_to_be_in_some_message():
    pattern = Pattern(require=["a", "b"])
    assert pattern.judge(said("a", "b")).keep
    assert pattern.judge(said("a", "c")) == Verdict("'b' isn't in it")
    assert not Pattern(require=["later"]).judge(said("Done.")).keep  # only the user says it
    assert Pattern(require=["DONE"], ignore_case=True).judge(said("Done.")).keep


@pytest.mark.parametrize("option", ["drop", "require"])
def test_what_is_no_regular_expression_is_refused_when_it_is_given(option):
    with pytest.raises(SFTError, match=r"'\(a' is no regular expression: .* at character 1") as caught:
        Pattern(**{option: ["b", "(a"]})
    assert option in caught.value.where


@pytest.mark.parametrize("roles", [["wizard"], []])
def test_unknown_roles_are_refused(roles):
    with pytest.raises(SFTError, match="role"):
        Pattern(drop=["a"], roles=roles)


# ----------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("phrase", read_phrases(OURS))
def test_every_phrase_is_found(phrase):
    assert not Refusals().judge(said("Sure.", f"Well — {phrase.upper().replace(' ', chr(10))}, so.")).keep


@pytest.mark.parametrize(
    "text",
    [
        "As an aim, it will do.",
        "I'm sorry, I can't come.",
        "Las AI models are good at it.",
        "Caiman is an AI.",
    ],
)
def test_what_people_say_is_kept(text):
    assert Refusals().judge(said(text)).keep


def test_the_phrase_is_told_and_only_the_assistant_counts():
    assert Refusals().judge(said("I\u2019M  an AI.")).detail == "i'm an ai"
    assert Refusals().judge(said("Sure.")).keep


def test_only_the_beginning_may_be_looked_at():
    late = said("Sure. " * 10 + "As an AI")
    assert not Refusals().judge(late).keep
    assert Refusals(within=40).judge(late).keep


def test_own_phrases_come_from_a_file(tmp_path):
    path = tmp_path / "phrases.txt"
    path.write_text("# ours\n\nals KI\n")
    assert not Refusals(str(path)).judge(said("Als KI sage ich")).keep
    assert Refusals(str(path)).judge(said("As an AI")).keep
    path.write_text("# nothing\n")
    with pytest.raises(SFTError, match="there is no phrase in it"):
        Refusals(str(path))
    with pytest.raises(SFTError, match="can't be read"):
        Refusals(str(tmp_path / "none.txt"))


# --------------------------------------------------------------------------------------------- repetition

NOTHING = {
    "min_words": 0, "lines": 1.0, "line_characters": 1.0, "paragraphs": 1.0, "paragraph_characters": 1.0,
    "top_ngrams": {}, "repeated_ngrams": {},
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "option", "share", "reason"),
    [
        ("a\nbbb\na\n\nc\na", "lines", 2 / 5, "of the lines repeated"),
        ("a\nbbb\n a\n\nc\na", "line_characters", 2 / 7, "of the characters in repeated lines"),
        ("a b\nc\n\nd\n \na b\nc", "paragraphs", 1 / 3, "of the paragraphs repeated"),
        (
            "a b\nc\n\nd\n \na b\nc",
            "paragraph_characters",
            5 / 11,
            "of the characters in repeated paragraphs",
        ),
        ("a bb a bb c a bb", "top_ngrams", 9 / 10, "of the characters in one 2-gram"),
        ("ha ha ha ho", "top_ngrams", 6 / 8, "of the characters in one 2-gram"),
        ("a bb c a bb c a bb", "repeated_ngrams", 1.0, "of the characters in repeated 2-grams"),
        ("a bb c a bb dd", "repeated_ngrams", 6 / 9, "of the characters in repeated 2-grams"),
    ],
)
def test_a_share_is_what_is_counted_by_hand(text, option, share, reason):
    def judged(limit: float) -> Verdict:
        return Repetition(**{**NOTHING, option: {2: limit} if option.endswith("ngrams") else limit}).judge(
            said(text)
        )

    assert judged(min(1.0, share + 1e-9)).keep
    verdict = judged(share - 0.01)
    assert verdict.reason == f"more than {share - 0.01:.0%} {reason}"
    assert verdict.score == pytest.approx(share)


@settings(deadline=None)
@given(words=st.lists(st.sampled_from(["a", "bb", "ccc"]), max_size=14), n=st.integers(1, 4))
def test_ngrams_are_those_that_are_found_by_looking_everywhere(words, n):
    grams = [words[at : at + n] for at in range(len(words) - n + 1)]
    often = [grams.count(gram) for gram in grams]
    inside = [
        any(often[at] > 1 for at in range(max(0, place - n + 1), min(place + 1, len(grams))))
        for place in range(len(words))
    ]
    found = repeated_ngrams(words, n)[n]
    places = [at for starts in found.values() for at in starts]
    assert sorted(places) == [at for at, count in enumerate(often) if count > 1]
    assert covered(words, n, places) == [word for word, each in zip(words, inside, strict=True) if each]
    top = in_top(words, n, found)
    if max(often, default=0) < 2:
        assert top == []
        return
    most = [gram for gram, count in zip(grams, often, strict=True) if count == max(often)]
    longest = max(len("".join(gram)) for gram in most)
    possible = []
    for chosen in (gram for gram in most if len("".join(gram)) == longest):
        places = {at + k for at, gram in enumerate(grams) if gram == chosen for k in range(n)}
        possible.append([words[place] for place in sorted(places)])
    assert top in possible


def test_pieces_count_from_their_second_occurrence_on():
    assert sorted(repeated(["a", "b", "a", "c", "a", "b"])) == ["a", "a", "b"]


def test_the_limits_are_the_papers_and_short_texts_are_kept():
    plain = Repetition()
    assert (plain.lines, plain.line_characters, plain.paragraphs, plain.paragraph_characters) == (
        0.3,
        0.2,
        0.3,
        0.2,
    )
    assert (TOP, REPEATED) == (
        {2: 0.2, 3: 0.18, 4: 0.16},
        {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.1},
    )
    assert plain.judge(said("no " * 49)).keep
    assert not plain.judge(said("no " * 50)).keep
    assert plain.judge(said(" ".join(map(str, range(200))))).keep


@pytest.mark.parametrize(
    "options", [{"lines": 1.1}, {"top_ngrams": {2: -0.1}}, {"min_words": -1}, {"top_ngrams": {0: 1}}]
)
def test_limits_that_are_no_shares_are_refused(options):
    with pytest.raises(SFTError, match="Repetition"):
        Repetition(**options)
