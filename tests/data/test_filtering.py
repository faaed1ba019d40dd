"""Filters in the pipeline: who is dropped by whom, counted and listed, however the work is shared."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stranger import install
from test_cache import accounts, contents, entries

from lightning_sft import (
    Conversation,
    DataFormat,
    Filter,
    Message,
    Renderer,
    Segments,
    SetFilter,
    SFTError,
    ToolCall,
    Verdict,
    turns,
)
from lightning_sft.data import prepare
from lightning_sft.data.ledger import check_losses
from lightning_sft.data.prepare import Prepared
from lightning_sft.data.sources import Source


class Texts(DataFormat):
    """Rows with any number of answers: a conversation of each."""

    def matches(self, columns):
        return False

    def convert(self, row):
        return [Conversation((Message("user", "say"), Message("assistant", text))) for text in row["texts"]]


def answer(conversation) -> str:
    return conversation.messages[-1].content


class Shorter(Filter):
    """Drops answers of `most` characters or more."""

    def __init__(self, most: int = 3) -> None:
        self.most = most

    def judge(self, conversation):
        size = len(answer(conversation))
        return Verdict(f"{self.most} characters or more" if size >= self.most else None, size)


class Often(SetFilter):
    """Drops an answer once it has seen it `times` times."""

    def __init__(self, times: int = 1) -> None:
        self.times = times

    def look(self, conversation):
        return answer(conversation)

    def begin(self):
        seen = Counter()

        def judge(text):
            seen[text] += 1
            return Verdict("seen too often" if seen[text] > self.times else None)

        return judge


class Without(Filter):
    """Drops answers with this character."""

    def __init__(self, character: str = "b") -> None:
        self.character = character

    def judge(self, conversation):
        found = self.character in answer(conversation)
        return Verdict("the character", detail=self.character) if found else Verdict()


@pytest.fixture(scope="module")
def renderer(tokenizer) -> Renderer:
    return Renderer(tokenizer)


def write(path: Path, rows: list[list[str]]) -> Source:
    path.write_text("".join(json.dumps({"texts": texts}) + "\n" for texts in rows))
    return Source(str(path), Texts())


def made(sources, renderer, filters, folder=None, **given) -> Prepared:
    options = {"max_length": None, "overlong": "drop"} | given
    return prepare.prepare(sources, renderer, filters=filters, cache_folder=folder, **options)


def listed(prepared: Prepared) -> list[dict[str, object]]:
    return [json.loads(line) for line in prepared.examples.filtered.tobytes().decode().splitlines()]


def by_hand(rows: list[list[str]], filters: list[Filter]) -> tuple[list[str], list[tuple[int, int, int]]]:
    """The answers that are left, and row, number and filter of the others: filter by filter over the whole set."""
    left = [(row, n, text) for row, texts in enumerate(rows, 1) for n, text in enumerate(texts, 1)]
    dropped = []
    for place, each in enumerate(filters):
        kept, seen = [], Counter()
        for row, n, text in left:
            seen[text] += 1
            bad = (
                len(text) >= each.most
                if isinstance(each, Shorter)
                else each.character in text
                if isinstance(each, Without)
                else seen[text] > each.times
            )
            (dropped if bad else kept).append((row, n, place) if bad else (row, n, text))
        left = kept
    return [text for _, _, text in left], sorted(dropped)


rows_lists = st.lists(st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), min_size=1, max_size=12)
chains = st.lists(
    st.one_of(
        st.builds(Shorter, st.integers(2, 5)),
        st.builds(Often, st.integers(1, 2)),
        st.builds(Without, st.sampled_from("abc")),
    ),
    max_size=4,
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=rows_lists, filters=chains, chunk=st.integers(1, 5), max_length=st.sampled_from([None, 12]))
def test_every_conversation_is_kept_or_counted_and_listed_once(
    rows, filters, chunk, max_length, renderer, tmp_path_factory
):
    source = write(tmp_path_factory.mktemp("law") / "rows.jsonl", rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "_CHUNK", chunk)
        prepared = made([source], renderer, filters, max_length=max_length)
    (ledger,) = prepared.ledgers
    left, dropped = by_hand(rows, filters)
    assert ledger.rows == len(rows)
    assert ledger.conversations == sum(map(len, rows)) == ledger.filtered_conversations + ledger.rendered
    assert ledger.rendered == len(left)
    assert ledger.examples + sum(loss.examples for loss in ledger.dropped.values()) == len(left)
    names = prepare.Filters(filters).names
    found = [(each["row"], each["conversation"], names.index(each["filter"])) for each in listed(prepared)]
    assert found == sorted(found)
    assert found == dropped
    counted = Counter((each["filter"], each["reason"]) for each in listed(prepared))
    assert counted == {(f, r): n for f, reasons in ledger.filtered.items() for r, n in reasons.items()}
    if max_length is None:
        said = [renderer.tokenizer.decode(each.input_ids[each.weights > 0]) for each in prepared.examples]
        assert [text.removesuffix("<|im_end|>") for text in said] == left


ROWS = [
    ["a"],
    ["bb", "a"],
    [],
    ["cccc", "b"],
    ["a"],
    ["c", "c"],
    ["bb"],
    ["dd"],
    ["cccc"],
    ["d"],
    ["dd", "a"],
] * 3
CHAIN = [Often(2), Shorter(4), Often(1), Without("b")]


@pytest.mark.parametrize("chunk", [1, 2, 5, 64])
@pytest.mark.parametrize("workers", [0, 3])
def test_the_verdicts_are_the_same_however_the_work_is_shared(
    chunk, workers, tmp_path, renderer, monkeypatch
):
    sources = [write(tmp_path / "a.jsonl", ROWS), write(tmp_path / "b.jsonl", ROWS[::-1])]
    whole = made(sources, renderer, CHAIN)
    assert {each["filter"] for each in listed(whole)} == {"Often 1", "Often 2", "Shorter", "Without"}
    monkeypatch.setattr(prepare, "_CHUNK", chunk)
    monkeypatch.setattr(prepare, "_ALONE", 1)
    shared = made(sources, renderer, CHAIN, workers=workers)
    assert listed(shared) == listed(whole)
    assert contents(shared) == contents(whole)
    assert accounts(shared) == accounts(whole)


def test_a_filter_sees_what_those_before_it_have_kept(tmp_path, renderer):
    source = write(tmp_path / "rows.jsonl", [["ab"], ["ab"], ["a"], ["a"]])
    first = made([source], renderer, [Without("b"), Often()])
    assert [(each["row"], each["filter"]) for each in listed(first)] == [
        (1, "Without"), (2, "Without"), (4, "Often"),
    ]  # fmt: skip
    other = made([source], renderer, [Often(), Without("b")])
    assert [(each["row"], each["filter"]) for each in listed(other)] == [
        (1, "Without"), (2, "Often"), (4, "Often"),
    ]  # fmt: skip


class Fragile(Filter):
    """Fails at answers with b."""

    def judge(self, conversation):
        assert "b" not in answer(conversation)
        return Verdict()


def test_a_filter_is_not_asked_about_what_one_before_it_has_dropped(tmp_path, renderer):
    source = write(tmp_path / "rows.jsonl", [["ab"], ["a"]])
    assert len(made([source], renderer, [Without("b"), Fragile()]).examples) == 1
    with pytest.raises(SFTError, match="Fragile failed: AssertionError"):
        made([source], renderer, [Fragile(), Without("b")])


def test_all_sources_are_one_set_and_each_has_its_account(tmp_path, renderer):
    sources = [write(tmp_path / name, [["a"], ["b"]]) for name in ("one.jsonl", "two.jsonl")]
    prepared = made(sources, renderer, [Often()])
    assert [ledger.filtered for ledger in prepared.ledgers] == [{}, {"Often": {"seen too often": 2}}]
    assert [(each["source"], each["row"]) for each in listed(prepared)] == [
        (sources[1].path, 1),
        (sources[1].path, 2),
    ]


def test_the_next_set_begins_anew(tmp_path, renderer):
    source, filters = write(tmp_path / "rows.jsonl", [["a"], ["a"]]), [Often()]
    assert [len(made([source], renderer, filters).examples) for _ in range(2)] == [1, 1]


def test_what_is_listed_has_place_reason_score_and_detail(tmp_path, renderer):
    source = write(tmp_path / "rows.jsonl", [["a"], ["a", "aaaa"], ["b"]])
    assert listed(made([source], renderer, [Shorter(), Without()])) == [
        {
            "source": source.path, "row": 2, "conversation": 2, "filter": "Shorter",
            "reason": "3 characters or more", "score": 4, "detail": None,
        },
        {
            "source": source.path, "row": 3, "conversation": 1, "filter": "Without",
            "reason": "the character", "score": None, "detail": "b",
        },
    ]  # fmt: skip


def test_a_score_that_json_has_no_number_for_is_null_and_a_librarys_is_a_number(tmp_path, renderer):
    class Scoring(Filter):
        def judge(self, conversation):
            scores = {"a": float("inf"), "b": np.float32(0.5), "c": np.int64(7)}
            return Verdict("too much", scores[answer(conversation)])

    source = write(tmp_path / "rows.jsonl", [["a"], ["b"], ["c"]])
    assert [each["score"] for each in listed(made([source], renderer, [Scoring()]))] == [None, 0.5, 7]


class Alone(Texts):
    """Conversations without an answer, which the renderer refuses."""

    def convert(self, row):
        return [Conversation((Message("user", text),)) for text in row["texts"]]


def test_what_is_filtered_is_not_rendered(tmp_path, renderer):
    sources = [write(tmp_path / "rows.jsonl", [["a"]]), write(tmp_path / "more.jsonl", [["c"]])]
    sources[1].format = Alone()
    with pytest.raises(SFTError, match=r"more\.jsonl, row 1"):
        made(sources, renderer, [])
    assert len(made(sources, renderer, [Without("c")]).examples) == 1


def test_nothing_left_names_the_filters(tmp_path, renderer):
    prepared = made([write(tmp_path / "rows.jsonl", [["aaaa"]])], renderer, [Shorter()])
    with pytest.raises(SFTError, match=r"filtered by Shorter \(3 characters or more\)") as caught:
        check_losses(prepared.ledgers, 1.0)
    assert caught.value.fix == "change data.filters"


def test_text_as_it_stands_is_judged_too(tmp_path, renderer):
    class Asked(Filter):
        def judge(self, conversation):
            assert isinstance(conversation, Segments)
            return Verdict("asked" if ("user", "b") in turns(conversation) else None)

    path = tmp_path / "rows.jsonl"
    rows = [{"segments": [["a", False], ["b", True]]}, {"segments": [["b", False], ["a", True]]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [each["row"] for each in listed(made([Source(str(path))], renderer, [Asked()]))] == [2]


def test_turns_are_roles_with_all_that_is_said():
    call = ToolCall("add", {"a": "é"}), ToolCall("raw", "{x")
    talk = Conversation((Message("user", "a"), Message("assistant", "b", reasoning="hm", tool_calls=call)))
    assert list(turns(talk)) == [("user", "a"), ("assistant", 'hm\nb\nadd {"a": "é"}\nraw {x')]
    assert list(turns(Segments((("a", 0.0), ("b", 0.5))))) == [("user", "a"), ("assistant", "b")]


# ------------------------------------------------------------------------------------------------ kept data


@pytest.mark.parametrize(
    "other", [[Shorter(2)], [Shorter(), Without()], [Without(), Shorter()], []], ids=lambda c: str(len(c))
)
def test_other_filters_options_or_order_make_it_anew(other, tmp_path, renderer):
    source, folder = write(tmp_path / "rows.jsonl", [["a"], ["aaaa"], ["b"]]), tmp_path / "cache"
    chain = [Shorter()] if other != [Without(), Shorter()] else [Shorter(), Without()]
    assert not made([source], renderer, chain, folder).from_cache
    assert not made([source], renderer, other, folder).from_cache
    assert made([source], renderer, chain, folder).from_cache


class Holding(Filter):
    """Holds something."""

    def __init__(self, held: object) -> None:
        self.held = held

    def judge(self, conversation):
        return Verdict()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (np.array([1, 2]), np.array([1, 3])),
        (np.array([1, 2]), np.array([[1, 2]])),
        (re.compile("a"), re.compile("b")),
        (re.compile("a"), re.compile("a", re.IGNORECASE)),
    ],
)
def test_arrays_and_patterns_that_a_filter_holds_are_compared(one, other, tmp_path, renderer):
    source = write(tmp_path / "rows.jsonl", [["a"]])
    cached = [
        made([source], renderer, [Holding(each)], tmp_path / "c").from_cache for each in (one, other, one)
    ]
    assert cached == [False, False, True]


@pytest.mark.parametrize("chain", [[Shorter()], CHAIN], ids=["each by itself", "sets"])
def test_what_was_dropped_is_kept_with_the_rest(chain, tmp_path, renderer):
    source, folder = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "cache"
    first, again = (made([source], renderer, chain, folder) for _ in range(2))
    assert again.from_cache
    assert listed(again) == listed(first) == listed(made([source], renderer, chain))
    assert accounts(again) == accounts(first)
    (entry,) = entries(folder)
    (entry / "filtered").unlink()  # what is mapped stays
    (entry / "filtered").write_text("")
    with pytest.warns(UserWarning, match="damaged.*filtered.*prepared anew"):
        assert listed(made([source], renderer, chain, folder)) == listed(first)


def test_what_was_dropped_is_there_though_the_entry_was_removed_meanwhile(tmp_path, renderer):
    folder = tmp_path / "cache"
    prepared = made([write(tmp_path / "rows.jsonl", [["a"], ["a"]])], renderer, [Often()], folder)
    (entry,) = entries(folder)
    shutil.rmtree(entry)
    assert [each["row"] for each in listed(prepared)] == [2]


class Opaque(Filter):
    """Keeps a function."""

    def __init__(self) -> None:
        self.test = lambda text: "b" in text

    def judge(self, conversation):
        return Verdict("b" if self.test(answer(conversation)) else None)


def test_a_filter_that_cannot_be_compared_is_not_kept_and_says_so(tmp_path, renderer):
    source = write(tmp_path / "rows.jsonl", [["a"]])
    for _ in range(2):
        with pytest.warns(UserWarning, match="isn't kept for the next run.*Opaque holds a function"):
            assert not made([source], renderer, [Opaque()], tmp_path / "cache").from_cache


@pytest.mark.parametrize("change", ["fewer rows", "more rows", "other rows"])
def test_data_that_changes_between_verdicts_and_examples_is_refused(change, tmp_path, renderer, monkeypatch):
    source = write(tmp_path / "rows.jsonl", [["a"], ["b"], ["c"]])
    changed = {"fewer rows": [["a"]], "more rows": [["a"]] * 5, "other rows": [["a", "b"], ["b"], ["c"]]}
    monkeypatch.setattr(prepare, "_CHUNK", 2)
    real = prepare.read_rows

    def meddled(source):
        yield from list(real(source))
        write(Path(source.path), changed[change])

    monkeypatch.setattr(prepare, "read_rows", meddled)
    with pytest.raises(SFTError, match="changed while it was read"):
        made([source], renderer, [Often()])


# ------------------------------------------------------------------------------------------------ whose fault

STRANGERS = """
from lightning_sft import Filter, SetFilter, SFTError, Verdict

def text(conversation):
    return conversation.messages[-1].content

class Raising(Filter):
    def judge(self, conversation):
        return Verdict() if text(conversation) != "x" else {}["x"]

class Refusing(Filter):
    def judge(self, conversation):
        if text(conversation) == "x":
            raise SFTError("can't tell", fix="remove it")
        return Verdict()

class Answering(Filter):
    def judge(self, conversation):
        return Verdict() if text(conversation) != "x" else False

class Looking(SetFilter):
    def look(self, conversation):
        return text(conversation) if text(conversation) != "x" else {}["x"]

    def begin(self):
        return lambda seen: Verdict()

class Judging(Looking):
    def look(self, conversation):
        return text(conversation)

    def begin(self):
        return lambda seen: Verdict() if seen != "x" else {}["x"]

class Scoring(Filter):
    def judge(self, conversation):
        return Verdict("bad", "high") if text(conversation) == "x" else Verdict()

class Telling(Judging):
    def begin(self):
        return lambda seen: Verdict("bad", detail=b"x") if seen == "x" else Verdict()

class Deciding(Judging):
    def begin(self):
        return lambda seen: Verdict() if seen != "x" else False
"""


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("Raising", "filter Raising (strange 2.5) failed: KeyError: 'x'"),
        ("Refusing", "can't tell"),
        ("Answering", "filter Answering (strange 2.5) gave a bool instead of a Verdict"),
        ("Looking", "filter Looking (strange 2.5) failed: KeyError: 'x'"),
        ("Judging", "filter Judging (strange 2.5) failed: KeyError: 'x'"),
        ("Scoring", "filter Scoring (strange 2.5) gave a str as a verdict's score"),
        ("Telling", "filter Telling (strange 2.5) gave a bytes as a verdict's detail"),
        ("Deciding", "filter Deciding (strange 2.5) gave a bool instead of a Verdict"),
    ],
)
def test_a_filter_that_fails_is_named_with_the_row(name, problem, workers, tmp_path, renderer, monkeypatch):
    names = re.findall(r"class (\w+)", STRANGERS)
    entry_points = {"lightning_sft.filters": {each: f"strange_filters:{each}" for each in names}}
    install(tmp_path, "strange", entry_points, {"strange_filters": STRANGERS})
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "strange_filters", raising=False)
    monkeypatch.setattr(prepare, "_CHUNK", 1)
    monkeypatch.setattr(prepare, "_ALONE", 1)
    source = write(tmp_path / "rows.jsonl", [["a"]] * 6 + [["x"], ["a"]])
    filter = getattr(__import__("strange_filters"), name)()
    with pytest.raises(SFTError) as caught:
        made([source], renderer, [filter], workers=workers)
    assert caught.value.what == problem
    assert caught.value.where == f"{source.path}, row 7"
    if name == "Refusing":
        assert caught.value.fix == "remove it"
