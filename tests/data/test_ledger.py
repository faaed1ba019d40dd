"""The ledger adds up, is shown as a table in any width, and refuses a run with the remedy that helps most."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_sft import SFTError
from lightning_sft.data.ledger import Loss, Pieces, SourceLedger, check_losses
from lightning_sft.data.ledger_table import ledger_lines, ledger_table, short


def account(source: str = "rows.jsonl", times: int = 1) -> SourceLedger:
    """Ten rows made into nine conversations: five whole, one cut, one split into three pieces, two dropped."""
    return SourceLedger(
        source,
        "format Alpaca (lightning-sft 0.1.0)",
        rows=10 * times,
        gathered_rows=10 * times,
        rows_without_conversation=times,
        conversations=9 * times,
        rendered=9 * times,
        examples=9 * times,
        tokens=1000 * times,
        tokens_to_train=500 * times,
        longest=400,
        trained_tokens=392 * times,
        context_tokens=438 * times,
        truncated_examples=times,
        truncated={"an exchange longer than max_length 100": Loss(times, 50 * times, 10 * times)},
        dropped={"without room for the last exchange in max_length 100": Loss(2 * times, 150 * times, 100 * times)},
        split=Pieces(times, 3 * times, 30 * times, 2 * times),
        notes={"no BOS": 9 * times},
    )  # fmt: skip


def test_an_account_that_adds_up_passes():
    account().check()


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"tokens": 1001}, "tokens don't"),
        ({"context_tokens": 437}, "tokens don't"),
        ({"tokens_to_train": 499}, "tokens to train don't"),
        ({"truncated": {}}, "tokens don't"),
        ({"truncated": {"x": Loss(1, 50, 11)}}, "tokens to train don't"),
        ({"split": Pieces(1, 3, 29, 2)}, "tokens don't"),
        ({"split": Pieces(1, 3, 30, 1)}, "tokens to train don't"),
        ({"split": Pieces(1, 2, 30, 2)}, "examples don't"),
        ({"dropped": {"x": Loss(1, 150, 100)}}, "examples don't"),
        ({"examples": 8}, "examples don't"),
        ({"rendered": 8, "examples": 8}, "examples don't"),
        ({"conversations": 10, "filtered": {}}, "examples don't"),
        ({"rows_without_conversation": 0}, "rows don't"),
    ],
    ids=str,
)
def test_one_that_does_not_is_a_bug_and_says_so(wrong, what):
    with pytest.raises(AssertionError, match=what):
        replace(account(), **wrong).check()


SPLIT = "set data.overlong: split"
CUT = "set data.overlong: truncate_right"
ACCEPT = "accept it with data.max_lost_fraction: 0.124"
LONGER = "use a model with a longer context"


@pytest.mark.parametrize(
    ("overlong", "max_length", "context", "fixes"),
    [
        ("drop", 100, None, ["raise data.max_length to 400", SPLIT, CUT, ACCEPT]),
        ("drop", 100, 400, ["raise data.max_length to 400", SPLIT, CUT, ACCEPT]),
        ("drop", 100, 399, ["raise data.max_length, up to the model's context of 399", SPLIT, CUT, ACCEPT]),
        ("drop", 399, 399, [SPLIT, CUT, ACCEPT]),
        ("truncate_right", 399, 399, [SPLIT, ACCEPT]),
        ("drop_oldest_turns", 399, 399, [SPLIT, ACCEPT]),
        ("split", 100, 500, ["raise data.max_length to 400", ACCEPT]),
        ("split", 399, 399, [LONGER, ACCEPT]),
    ],
    ids=str,
)
def test_a_refusal_names_what_loses_less_first(overlong, max_length, context, fixes):
    whole = replace(account("whole.jsonl"), truncated={}, dropped={})
    lossy = account()
    lost = 110 / (392 + 392 + 110)
    options = {"max_length": max_length, "context": context, "overlong": overlong}
    check_losses([whole, lossy], lost, **options)
    with pytest.raises(SFTError) as caught:
        check_losses([whole, lossy], lost - 1e-9, **options)
    assert caught.value.where == "rows.jsonl"
    assert "12.3% of the tokens to train (110 of 894, in 3 examples" in caught.value.what
    assert "longer than max_length 100, without room" in caught.value.what
    found = caught.value.fix.split("; or ")
    assert len(found) == len(fixes)
    assert all(each.startswith(start) for each, start in zip(found, fixes, strict=True))


@pytest.mark.parametrize("width", [80, 100, 120])
@pytest.mark.parametrize("times", [1, 1000, 1_000_000])
def test_the_table_fits_the_terminal_and_its_numbers_are_there(width, times):
    text = ledger_table({"train": [account("a/long/path/to/some/rows.jsonl", times)]}, width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    numbers = [10, 9, 1, 1, 2, 9, 392, 438, 200]
    written = lines[-1].split()
    exact = [f"{number * times:,}" for number in numbers]
    assert written[-9:] in (exact, [short(number * times) for number in numbers])
    assert times > 1000 or width == 80 or written[-9:] == exact
    assert written[0] == "train"
    assert written[-10].endswith("jsonl")
    assert written[-10] == "a/long/path/to/some/rows.jsonl" or written[-10].startswith("…")


def test_several_sources_have_a_sum():
    parts = {"train": [account("[a].jsonl"), account("b.jsonl", 2)], "val": [account("c.jsonl")]}
    lines = ledger_table(parts, 120).splitlines()
    head = " ".join(" ".join(lines[:2]).split())
    assert (
        head
        == "rows con- trun- tokens tokens tokens source read verted cated split dropped kept trained context lost"
    )
    assert [line.split()[:3] for line in lines[3:6]] == [
        ["train", "[a].jsonl", "10"],
        ["train", "b.jsonl", "20"],
        ["val", "c.jsonl", "10"],
    ]
    assert lines[-1].split() == ["all", "40", "36", "4", "4", "8", "36", "1,568", "1,752", "800"]


def test_columns_that_tell_nothing_are_left_out():
    plain = SourceLedger("rows.jsonl", "", rows=1, conversations=1, rendered=1, examples=1)
    text = ledger_table({"train": [plain]}, 80)
    assert "split" not in text
    assert "dered" not in text
    assert "all" not in text
    assert "dered" in ledger_table({"train": [replace(plain, rendered=2)]}, 80)


FILTERED = {"Length": {"fewer than 3 words in the response": 2}, "Duplicates": {"the same prompt": 1000}}


def test_what_is_filtered_needs_no_rendering_and_has_a_column_and_lines():
    ledger = replace(account(), conversations=1011, filtered=FILTERED)
    ledger.check()
    with pytest.raises(AssertionError, match="examples don't"):
        replace(ledger, conversations=1012).check()
    lines = ledger_table({"train": [ledger]}, 100).splitlines()
    assert "fil-" in lines[0].split()
    assert lines[-1].split()[2:6] == ["10", "1,011", "1,002", "1"]
    assert list(ledger_lines(ledger))[1:3] == [
        "filtered 2 conversations (Length): fewer than 3 words in the response",
        "filtered 1,000 conversations (Duplicates): the same prompt",
    ]


def test_every_reason_has_its_line():
    assert list(ledger_lines(account(times=1000))) == [
        "left out 1,000 rows: the format makes nothing of them",
        "9,000 examples: no BOS",
        "split 1,000 examples into 3,000, which repeat 30,000 tokens of context",
        "cut 1,000 examples (50,000 tokens lost, 10,000 of them to train): an exchange longer than max_length 100",
        "dropped 2,000 examples (150,000 tokens lost, 100,000 of them to train): without room for the last exchange in "
        "max_length 100",
    ]


@given(st.integers(0, 10**14))
def test_short_numbers_are_short_and_right(number):
    written = short(number)
    assert len(written) <= 5
    value = float(written.rstrip("kMBT").replace(",", ""))
    value *= {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(written[-1], 1)
    assert abs(value - number) <= 0.005 * number
