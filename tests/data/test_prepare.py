"""From sources to examples, with an account of every row and token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stranger import install

from lightning_sft import Conversation, DataFormat, Message, Renderer, Segments, SFTError
from lightning_sft.data.ledger import check_losses
from lightning_sft.data.prepare import Prepared, prepare
from lightning_sft.data.sources import Source
from lightning_sft.data.truncation import Overlong
from lightning_sft.example import Example
from lightning_sft_formats.messages import Messages


class Repeated(DataFormat):
    """Rows that say how many conversations they make: none, one or several."""

    def matches(self, columns):
        return False

    def convert(self, row):
        answer = Message("assistant", "the user asks " * row["long"])
        return [Conversation((Message("user", "hello"), answer))] * row["times"]


class Failing(DataFormat):
    """Fails at every row without a text, the way a careless plug-in does."""

    def matches(self, columns):
        return False

    def convert(self, row):
        return [Segments(((row["text"], 1.0),))]


@pytest.fixture(scope="module")
def renderer(tokenizer) -> Renderer:
    return Renderer(tokenizer)


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    """A function from rows to the path of a JSONL file that holds them."""
    folder = tmp_path_factory.mktemp("rows")

    def write(rows: Sequence[object]) -> str:
        path = folder / f"{len(list(folder.iterdir()))}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def chat(asked: str, answered: str) -> dict[str, object]:
    return {
        "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}],
    }


def trained(example: Example) -> int:
    return sum(weight > 0 for weight in example.weights.tolist())


counts = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 12)), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(counts=counts, max_length=st.integers(2, 80), overlong=st.sampled_from(get_args(Overlong)))
def test_every_row_and_token_is_accounted_for(counts, max_length, overlong, rows_file, renderer):
    rows = [{"times": times, "long": long} for times, long in counts]
    rendered = [renderer.render(item) for row in rows for item in Repeated().convert(row)]
    path = rows_file(rows)
    prepared = prepare([Source(path, Repeated())], renderer, max_length=max_length, overlong=overlong)
    (ledger,) = prepared.ledgers
    assert ledger.rows == len(rows)
    assert ledger.conversations == len(rendered)
    assert ledger.tokens == sum(map(len, rendered))
    kept_tokens = ledger.trained_tokens + ledger.context_tokens
    truncated = sum(loss.tokens for loss in ledger.truncated.values())
    dropped = sum(loss.tokens for loss in ledger.dropped.values())
    assert ledger.tokens == kept_tokens + truncated + dropped  # one exchange each, so nothing is repeated
    assert kept_tokens == sum(map(len, prepared.examples))
    assert ledger.trained_tokens == sum(map(trained, prepared.examples))
    assert ledger.trained_tokens + sum(loss.trained_tokens for loss in ledger.lost) == sum(
        map(trained, rendered)
    )
    assert ledger.examples == len(prepared.examples) == len(prepared.keys)
    assert ledger.conversations == ledger.examples + sum(loss.examples for loss in ledger.dropped.values())
    assert all(len(example) <= max_length for example in prepared.examples)
    assert all(trained(example) for example in prepared.examples)


def test_every_source_has_an_account_of_its_own(rows_file, renderer):
    first, second = rows_file([chat("a", "b")] * 3), rows_file([{"text": "hello"}] * 2)
    prepared = prepare([Source(first), Source(second)], renderer, max_length=None, overlong="drop")
    assert [(ledger.source, ledger.rows, ledger.examples) for ledger in prepared.ledgers] == [
        (first, 3, 3),
        (second, 2, 2),
    ]
    assert [(e.meta.source, e.meta.row) for e in prepared.examples] == [
        *((first, row) for row in (1, 2, 3)),
        *((second, row) for row in (1, 2)),
    ]
    assert prepared.weight_sums.tolist() == [float(e.weights.sum()) for e in prepared.examples]


def test_blank_lines_are_no_rows(tmp_path, renderer):
    path = tmp_path / "gaps.jsonl"
    path.write_text(f"{json.dumps(chat('a', 'b'))}\n\n   \n{json.dumps(chat('c', 'd'))}\n")
    prepared = prepare([Source(str(path))], renderer, max_length=None, overlong="drop")
    assert prepared.ledgers[0].rows == 2
    assert [example.meta.row for example in prepared.examples] == [1, 4]


@pytest.fixture
def short_and_long(rows_file) -> str:
    return rows_file([chat("hello", "ok"), chat("hello", "the user asks " * 20)])


def test_an_overlong_example_is_dropped_whole_or_cut_at_the_right(short_and_long, renderer):
    source = Source(short_and_long)
    whole = prepare([source], renderer, max_length=None, overlong="drop").examples
    assert len(whole[0]) < 40 < len(whole[1])
    dropped = prepare([source], renderer, max_length=40, overlong="drop")
    assert [len(example) for example in dropped.examples] == [len(whole[0])]
    lost = dropped.ledgers[0].dropped["longer than max_length 40"]
    assert (lost.examples, lost.tokens, lost.trained_tokens) == (1, len(whole[1]), trained(whole[1]))
    cut = prepare([source], renderer, max_length=40, overlong="truncate_right")
    assert cut.examples[1].input_ids.tolist() == whole[1].input_ids[:40].tolist()
    assert cut.examples[1].weights.tolist() == whole[1].weights[:40].tolist()
    assert len(cut.examples[1].reasons) == 40
    lost = cut.ledgers[0].truncated["longer than max_length 40"]
    assert (lost.examples, lost.tokens) == (1, len(whole[1]) - 40)
    assert lost.trained_tokens == trained(whole[1]) - trained(cut.examples[1])


def test_an_example_of_just_max_length_is_kept_whole(short_and_long, renderer):
    longest = max(
        map(len, prepare([Source(short_and_long)], renderer, max_length=None, overlong="drop").examples)
    )
    assert (
        not prepare([Source(short_and_long)], renderer, max_length=longest, overlong="drop").ledgers[0].lost
    )
    assert (
        prepare([Source(short_and_long)], renderer, max_length=longest - 1, overlong="drop").ledgers[0].lost
    )


def test_what_is_cut_down_to_its_prompt_is_dropped_and_says_so(rows_file, renderer):
    path = rows_file([chat("hello", "ok"), chat("hello there " * 20, "ok")])
    prepared = prepare([Source(path)], renderer, max_length=30, overlong="truncate_right")
    assert len(prepared.examples) == 1
    assert not prepared.ledgers[0].truncated
    assert list(prepared.ledgers[0].dropped) == ["without a trained token in the first 30"]


@pytest.mark.parametrize("overlong", ["drop", "truncate_right"])
def test_losing_too_much_is_refused_and_the_message_names_the_options(overlong, short_and_long, renderer):
    prepared = prepare([Source(short_and_long)], renderer, max_length=40, overlong=overlong)
    lost = sum(loss.trained_tokens for loss in prepared.ledgers[0].lost)
    fraction = lost / (lost + prepared.ledgers[0].trained_tokens)
    with pytest.raises(SFTError, match=f"{fraction:.1%}") as caught:
        check_losses(prepared.ledgers, fraction - 1e-6)
    assert "data.max_lost_fraction" in caught.value.what
    assert all(option in caught.value.fix for option in ("max_length", "overlong", "max_lost_fraction"))
    assert short_and_long in str(caught.value)
    check_losses(prepared.ledgers, fraction)


def test_losing_nothing_passes_even_where_nothing_may_be_lost(short_and_long, renderer):
    check_losses(prepare([Source(short_and_long)], renderer, max_length=None, overlong="drop").ledgers, 0.0)


def test_what_is_lost_counts_in_tokens_to_train_over_all_sources(rows_file, renderer):
    long_prompt = rows_file([chat("hello there " * 30, "ok")])
    long_answer = rows_file([chat("ok", "hello there " * 10)])
    prepared = prepare([Source(long_prompt), Source(long_answer)], renderer, max_length=60, overlong="drop")
    assert len(prepared.examples) == 1
    check_losses(
        prepared.ledgers, 0.2
    )  # one example of two is lost, but hardly any token that would be trained


def test_nothing_left_is_refused_with_the_reason(short_and_long, renderer):
    prepared = prepare([Source(short_and_long)], renderer, max_length=5, overlong="drop")
    with pytest.raises(SFTError, match=r"nothing is left to train on.*longer than max_length 5") as caught:
        check_losses(prepared.ledgers, 1.0)
    assert "data.max_length" in caught.value.fix


def test_rows_that_make_no_conversation_leave_nothing_and_that_is_refused(rows_file, renderer):
    path = rows_file([{"times": 0, "long": 1}] * 3)
    prepared = prepare([Source(path, Repeated())], renderer, max_length=None, overlong="drop")
    assert (prepared.ledgers[0].rows, list(prepared.examples)) == (3, [])
    with pytest.raises(SFTError, match="nothing is left to train on"):
        check_losses(prepared.ledgers, 1.0)


def test_a_plugin_that_fails_is_named_with_its_distribution_and_the_row(
    tmp_path, monkeypatch, rows_file, renderer
):
    source = 'from test_prepare import Failing\n\n\nclass Shaky(Failing):\n    """Fails."""\n'
    install(
        tmp_path,
        "stranger-formats",
        {"lightning_sft.formats": {"Shaky": "shaky_format_mod:Shaky"}},
        {"shaky_format_mod": source},
    )
    monkeypatch.syspath_prepend(tmp_path)
    import shaky_format_mod

    path = rows_file([{"text": "hello"}, {"text": "hello"}, {"other": "hello"}])
    with pytest.raises(SFTError) as caught:
        prepare([Source(path, shaky_format_mod.Shaky())], renderer, max_length=None, overlong="drop")
    assert caught.value.where == f"{path}, row 3"
    assert "format Shaky (stranger-formats 2.5)" in caught.value.what
    assert "KeyError: 'text'" in caught.value.what
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_format_that_is_not_installed_is_named_by_its_class(rows_file, renderer):
    path = rows_file([{"other": "hello"}])
    with pytest.raises(SFTError, match=r"test_prepare\.Failing failed"):
        prepare([Source(path, Failing())], renderer, max_length=None, overlong="drop")


def test_a_row_that_its_format_refuses_is_named(rows_file, renderer):
    path = rows_file([chat("a", "b"), {"messages": [{"role": "user", "content": "a"}]}])
    with pytest.raises(SFTError) as caught:
        prepare([Source(path, Messages())], renderer, max_length=None, overlong="drop")
    assert caught.value.where.startswith(f"{path}, row 2")


@pytest.mark.parametrize(
    ("row", "format"),
    [
        (chat("a", "b"), "Messages"),
        ({"instruction": "a", "input": "", "output": "b"}, "Alpaca"),
        ({"prompt": "a", "completion": "b"}, "PromptCompletion"),
        ({"text": "a b"}, "RawText"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "ShareGPT"),
    ],
)
def test_auto_finds_the_one_format_that_fits_the_columns(row, format, rows_file, renderer):
    prepared = prepare([Source(rows_file([row] * 3))], renderer, max_length=None, overlong="drop")
    (ledger,) = prepared.ledgers
    assert ledger.format.startswith(f"format {format} (lightning-sft")
    assert (ledger.rows, ledger.examples) == (3, 3)
    assert [example.meta.row for example in prepared.examples] == [1, 2, 3]


def test_columns_that_fit_several_formats_are_refused_with_the_candidates(rows_file, renderer):
    path = rows_file([{**chat("a", "b"), "instruction": "a", "output": "b"}])
    with pytest.raises(SFTError, match="fit Alpaca and Messages") as caught:
        prepare([Source(path)], renderer, max_length=None, overlong="drop")
    assert caught.value.where == path
    assert "format: Alpaca" in caught.value.fix
    explicit = prepare([Source(path, Messages())], renderer, max_length=None, overlong="drop")
    assert len(explicit.examples) == 1


def test_columns_that_fit_no_format_are_refused_with_what_there_is(rows_file, renderer):
    path = rows_file([{"frage": "a", "antwort": "b"}])
    with pytest.raises(SFTError, match="no format fits the columns 'antwort', 'frage'") as caught:
        prepare([Source(path)], renderer, max_length=None, overlong="drop")
    assert all(
        name in caught.value.fix for name in ("Alpaca", "Messages", "PromptCompletion", "RawText", "ShareGPT")
    )


def test_more_rows_than_are_encoded_at_once_keep_their_order_and_number(rows_file, renderer):
    rows = [chat("hello", f"{number}") for number in range(700)]
    prepared = prepare([Source(rows_file(rows))], renderer, max_length=None, overlong="drop")
    assert [example.meta.row for example in prepared.examples] == list(range(1, 701))
    assert prepared.ledgers[0].conversations == 700


def test_the_account_is_plain_json(rows_file, renderer):
    prepared: Prepared = prepare(
        [Source(rows_file([chat("a", "b")]))], renderer, max_length=None, overlong="drop"
    )
    account = prepared.ledgers[0].as_json()
    assert json.loads(json.dumps(account)) == account
    assert Path(str(account["source"])).suffix == ".jsonl"


def test_a_broken_format_that_nobody_named_breaks_no_other(tmp_path, monkeypatch, renderer):
    source = "from lightning_sft import DataFormat\nraise RuntimeError('broken on purpose')\n"
    entries = {"lightning_sft.formats": {"Broken": "broken_mod:Broken"}}
    site = install(tmp_path / "site", "broken-dist", entries, {"broken_mod": source})
    monkeypatch.syspath_prepend(site)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n')
    with pytest.warns(UserWarning, match=r"leaves out the format Broken \(broken-dist 2.5\)"):
        prepared = prepare([Source(str(path))], renderer, max_length=None, overlong="drop")
    assert prepared.ledgers[0].format.startswith("format Alpaca")


def test_rows_of_which_a_format_makes_nothing_are_counted(rows_file, renderer):
    class Every(DataFormat):
        def matches(self, columns):
            return True

        def convert(self, row):
            if row["keep"]:
                yield Conversation((Message("user", "a"), Message("assistant", "b")))
                yield Conversation((Message("user", "c"), Message("assistant", "d")))

    path = rows_file([{"keep": n % 3 == 0} for n in range(9)])
    (ledger,) = prepare(
        [Source(str(path), format=Every())], renderer, max_length=None, overlong="drop"
    ).ledgers
    assert (ledger.rows, ledger.rows_without_conversation, ledger.conversations) == (9, 6, 6)


def test_rows_that_a_format_puts_together_are_counted_before_and_after(rows_file, renderer):
    def message(name, parent, role):
        return {"message_id": name, "parent_id": parent, "text": f"hello {name}", "role": role}

    rows = [message("a", None, "prompter"), message("b", "a", "assistant"), message("c", None, "prompter")]
    prepared = prepare([Source(rows_file(rows))], renderer, max_length=None, overlong="drop")
    (ledger,) = prepared.ledgers
    assert ledger.format.startswith("format OASST")
    assert (ledger.rows, ledger.gathered_rows, ledger.rows_without_conversation) == (3, 2, 1)
    assert (ledger.conversations, ledger.examples) == (1, 1)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    talks=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=5),
    max_length=st.integers(2, 120),
    overlong=st.sampled_from(get_args(Overlong)),
)
def test_every_turn_and_token_is_accounted_for_when_turns_are_split(
    talks, max_length, overlong, rows_file, tokenizer
):
    renderer = Renderer(tokenizer, split_turns=True, train_on_eot="none")
    rows = [{"messages": [m for n in talk for m in chat("a" * n, "b" * n)["messages"]]} for talk in talks]
    path = rows_file(rows)
    whole = prepare([Source(path)], renderer, max_length=None, overlong=overlong)
    cut = prepare([Source(path)], renderer, max_length=max_length, overlong=overlong)
    (all_of_it,), (ledger,) = whole.ledgers, cut.ledgers
    assert ledger.conversations == len(talks)
    assert ledger.rendered == all_of_it.examples == sum(map(len, talks)) == sum(ledger.notes.values())
    lost = sum(loss.tokens for loss in ledger.lost)
    assert ledger.tokens == sum(map(len, whole.examples)) == sum(map(len, cut.examples)) + lost
    lost_trained = sum(loss.trained_tokens for loss in ledger.lost)
    assert ledger.trained_tokens + lost_trained == sum(map(trained, whole.examples))
    assert [example.turn for example in whole.examples] == [
        2 * n + 2 for talk in talks for n in range(len(talk))
    ]
