"""Overlap with held-out texts, against sets of word tuples."""

from __future__ import annotations

import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sft import Conversation, Message, SFTError
from lightning_sft_evaluators.mmlu import MMLU
from lightning_sft_filters.overlap import Overlap, run_hashes, word_hashes
from lightning_sft_filters.parts import words_of

ITEM = "A ball is thrown straight up into the air; how long until it comes down again?"  # 16 words


def said(text: str, asked: str = "") -> Conversation:
    return Conversation((Message("user", asked), Message("assistant", text)))


@pytest.fixture
def held_out(tmp_path):
    def write(*rows: object) -> list[str]:
        (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return [str(tmp_path / "items.jsonl")]

    return write


QUESTION = "Which of the small bones of the wrist lies nearest to the base of the thumb in an adult?"
SHORT = "Where is it?"
WORDS = st.lists(st.sampled_from(["a", "b", "c"]), max_size=12)


@settings(deadline=None)
@given(
    texts=st.lists(WORDS, min_size=1, max_size=3),
    answer=WORDS,
    size=st.integers(2, 4),
    least=st.integers(1, 2),
)
def test_a_shared_run_is_found_and_nothing_else(texts, answer, size, least, tmp_path_factory):
    path = tmp_path_factory.mktemp("held") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": " ".join(text)}) + "\n" for text in texts))
    if max(map(len, texts)) < least:
        with pytest.raises(SFTError, match="nothing to look for"):
            Overlap([str(path)], words=size, least_words=least)
        return
    known = {
        tuple(text[at : at + min(size, len(text))])
        for text in texts
        if len(text) >= least
        for at in range(len(text) - min(size, len(text)) + 1)
    }
    shared = sum(
        tuple(answer[at : at + n]) in known
        for n in {len(each) for each in known}
        for at in range(len(answer) - n + 1)
    )
    verdict = Overlap([str(path)], words=size, least_words=least).judge(said(" ".join(answer)))
    assert (verdict.keep, verdict.score or 0) == (not shared, shared)


def test_case_and_punctuation_do_not_count_and_the_run_is_told(held_out):
    overlap = Overlap(held_out({"question": ITEM}))
    verdict = overlap.judge(said(f"He asked: {ITEM.upper()} (Physics)"))
    assert (verdict.reason, verdict.score) == ("words in common with a held-out text", 4)
    assert verdict.detail.endswith(
        "items.jsonl, row 1: a ball is thrown straight up into the air how long until it"
    )
    assert overlap.judge(said("", asked=ITEM)).score == 4
    assert Overlap(*held_out({"question": ITEM})).judge(said(ITEM)).score == 4  # one path by itself
    assert Overlap(held_out({"question": ITEM}), part="response").judge(said("", asked=ITEM)).keep
    twelve = " ".join(ITEM.split()[:12])
    assert overlap.judge(said(twelve)).keep
    assert not overlap.judge(said(" ".join(ITEM.split()[:13]))).keep


def test_texts_are_found_at_any_depth_or_in_the_columns_named(held_out):
    row = {
        "question": "Short?",
        "meta": {"choices": [ITEM, "no"]},
        "note": "one two three four five six seven eight",
    }
    with pytest.warns(UserWarning, match="leaves out 2 of 4 held-out texts, of fewer than 8 words"):
        every = Overlap(held_out(row))
    assert not every.judge(said(ITEM)).keep
    assert not every.judge(said(f"zero {row['note']} nine")).keep
    assert every.judge(said(row["note"].rpartition(" ")[0])).keep
    assert Overlap(held_out(row), columns=["note"]).judge(said(ITEM)).keep
    with pytest.raises(SFTError, match="there is no column 'answer'"):
        Overlap(held_out(row), columns=["answer"])


def test_the_items_of_evaluators_are_held_out(tmp_path, held_out):
    """Questions of MMLU without its prompts, and declared items; the answer where it is long enough."""
    (tmp_path / "test").mkdir()
    choices = ["Yes.", "No.", "It depends.", f"Because {ITEM}"]
    (tmp_path / "test" / "anatomy_test.csv").write_text(
        f'"{QUESTION}",' + ",".join(f'"{each}"' for each in choices) + f",D\n{SHORT},a,b,c,d,A\n"
    )
    mmlu = MMLU(str(tmp_path), shots=0, subjects=["anatomy"])
    with pytest.warns(UserWarning, match="leaves out 1 of 3 held-out texts"):
        overlap = Overlap(evaluators=[mmlu])
    asked = overlap.judge(said("Wrist, I think.", asked=f"Tell me: {QUESTION}"))
    assert asked.reason == "words in common with an item of MMLU"
    assert asked.detail == f"MMLU anatomy/0: {' '.join(words_of(QUESTION)[:13])}"
    assert overlap.judge(said(f"Because {ITEM}")).detail.startswith("MMLU anatomy/0: because a ball is")
    assert overlap.judge(said(SHORT)).keep
    assert overlap.judge(
        said("The following are multiple choice questions (with answers) about anatomy. A")
    ).keep
    both = Overlap(held_out({"text": ITEM}), [mmlu])
    assert both.judge(said(f"{ITEM} {QUESTION}")).reason == "words in common with a held-out text"
    with pytest.raises(SFTError, match="there is nothing to look for"):
        Overlap()


def test_words_are_cut_at_whitespace_without_signs():
    assert words_of("It's  “Größe”\n1+1 = 2,5!") == ["its", "grösse", "11", "25"]


def test_runs_with_the_same_words_in_another_order_have_other_hashes():
    orders = [["a", "b", "c"], ["c", "b", "a"], ["b", "a", "c"], ["a", "a", "b"]]
    assert len({int(run_hashes(word_hashes(words), 3)[0]) for words in orders}) == 4
    assert len(run_hashes(word_hashes(["a", "b"]), 3)) == 0


def test_it_pickles_to_what_its_texts_take(held_out):
    assert len(pickle.dumps(Overlap(held_out({"question": ITEM})))) < 1000
