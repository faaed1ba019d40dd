"""Answers beside references: by hand, and by other implementations of the same metric."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_sft import (
    Answered,
    Conversation,
    Generated,
    Message,
    Scorer,
    SFTError,
    SFTModule,
    is_valid_format,
)
from lightning_sft_evaluators.labels import plain
from lightning_sft_evaluators.reference_metrics import ReferenceMetrics
from lightning_sft_evaluators.references import said
from lightning_sft_evaluators.text_metrics import corpus_score, text_values
from lightning_sft_formats.alpaca import Alpaca

PAIRS = [
    ("The cat sat on the mat today.", "The cat sat on a mat."),
    ("A dog barks at night", "The dogs bark at night, loudly"),
    ("Nothing in common", "Altogether different words here"),
    ("Yes, it is so.", "Yes, it is so."),
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def answer(evaluator, texts):
    items = evaluator.requests()
    return evaluator.score(
        [Answered(item, (Generated(text, 1),)) for item, text in zip(items, texts, strict=True)]
    )


def values(results):
    return {(each.name, each.metric): each.value for each in results.scores}


# ------------------------------------------------------------------------------------------------- what is asked


def test_the_last_turn_is_the_reference_and_all_before_it_is_asked(tmp_path):
    tools = [{"type": "function", "function": {"name": "weather"}}]
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So."},
        {"role": "user", "content": "Thanks"},
    ]
    path = write(tmp_path / "a.jsonl", [{"messages": messages, "tools": tools}])
    (item,) = ReferenceMetrics(path, max_new_tokens=7, stop=["\n"]).requests()
    (asked,) = item.requests
    assert item.target == "So."
    assert [each.role for each in asked.prompt.messages] == ["system", "user", "assistant", "user"]
    assert list(asked.prompt.tools) == tools
    assert (asked.max_new_tokens, asked.stop) == (7, ("\n",))


def test_what_is_asked_does_not_depend_on_where_the_file_is(tmp_path):
    rows = [{"instruction": "say 1", "output": "1"}]
    keys = [
        ReferenceMetrics(write(tmp_path / name, rows)).requests()[0].key for name in ("a.jsonl", "b.jsonl")
    ]
    assert keys[0] == keys[1]


def test_text_rows_ask_what_stands_before_the_trained_text(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "1 + 1 =", "completion": " 2"}])
    (item,) = ReferenceMetrics(path).requests()
    assert (item.requests[0].prompt, item.target) == ("1 + 1 =", " 2")
    pieces = [("Q", False), ("a", True), (" R", False), (" b", True), ("c", True), (" end", False)]
    segments = [{"text": text, "label": label} for text, label in pieces]
    (item,) = ReferenceMetrics(write(tmp_path / "b.jsonl", [{"segments": segments}])).requests()
    assert (item.requests[0].prompt, item.target) == ("Qa R", " bc")


def test_a_conversation_is_asked_with_its_tools_and_its_options(model_folder, tokenizer):
    module = SFTModule(base=str(model_folder("llama")))
    module.configure_model()
    template = (
        "{% if tools %}{{ tools[0].name }} {% endif %}{{ mood | default('none') }}:{{ messages[0].content }}"
    )
    from lightning_sft import Renderer
    from lightning_sft.evaluation.encoding import RequestEncoder

    encoder = RequestEncoder(tokenizer, 64, Renderer(tokenizer, None))
    encoder.renderer.template.text = template
    asked = Conversation((Message("user", "hi"),), ({"name": "f"},), chat_template_kwargs={"mood": "glad"})
    assert encoder.text(asked) == "f glad:hi"
    assert encoder.text(asked.messages) == "none:hi"


CALL = {"type": "function", "function": {"name": "weather", "arguments": "{}"}}
USER, SAYS = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        (
            {"segments": [{"text": "a", "label": False}, {"text": "b", "label": True}]},
            {"segments": [{"text": "a", "label": True}]},
            "row 2: the row is text without a prompt",
        ),
        (
            {"messages": [USER, SAYS]},
            {"messages": [SAYS]},
            "row 2: there is no assistant turn after a prompt",
        ),
        (
            {"messages": [USER, SAYS]},
            {"messages": [USER, CALLS]},
            "row 2: the last assistant turn has no text",
        ),
    ],
)
def test_a_row_without_prompt_or_answer_is_named(tmp_path, good, bad, message):
    with pytest.raises(SFTError, match=message):
        ReferenceMetrics(write(tmp_path / "a.jsonl", [good, bad])).requests()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ["rogue"]}, "no metric is named 'rogue'"),
        ({"metrics": []}, "there is no metric"),
        ({"limit": 0}, "limit is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(SFTError, match=message):
        ReferenceMetrics("a.jsonl", **options)


def test_sacrebleu_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("lightning_sft_evaluators.text_metrics.find_spec", lambda name: None)
    with pytest.raises(SFTError, match="bleu, ter need sacrebleu") as error:
        ReferenceMetrics("a.jsonl", metrics=["bleu", "f1", "ter"])
    assert "lightning-sft[metrics]" in str(error.value)


# ------------------------------------------------------------------------------------------------------ metrics


def longest_common(a, b):
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + longest_common(a[1:], b[1:])
    return max(longest_common(a[1:], b), longest_common(a, b[1:]))


def edits(a, b):
    if not a or not b:
        return len(a) + len(b)
    return min(edits(a[1:], b) + 1, edits(a, b[1:]) + 1, edits(a[1:], b[1:]) + (a[0] != b[0]))


@given(st.lists(st.sampled_from("abcé"), max_size=6), st.lists(st.sampled_from("abcé"), max_size=6))
def test_rouge_and_edit_distance_are_what_the_slow_way_finds(a, b):
    if not a or not b:
        return
    left, right = " ".join(a), " ".join(b)
    common = longest_common(a, b)
    expected = 2 * common / (len(a) + len(b))
    assert text_values("rouge", left, right)["rougeL"] == pytest.approx(expected)
    shared = sum(min(a.count(word), b.count(word)) for word in set(a))
    assert text_values("rouge", left, right)["rouge1"] == pytest.approx(2 * shared / (len(a) + len(b)))
    assert text_values("edit_distance", "".join(a), "".join(b))["edit_distance"] == edits(a, b)


def test_exact_match_accuracy_and_f1_by_hand():
    assert text_values("exact_match", " Bath\n", "Bath") == {"exact_match": 1.0}
    assert text_values("exact_match", "bath", "Bath") == {"exact_match": 0.0}
    assert text_values("accuracy", "the  bath!", "Bath") == {"accuracy": 1.0}
    assert text_values("accuracy", "baths", "Bath") == {"accuracy": 0.0}
    f1 = text_values("f1", "A blue cat sat", "the cat sat down")  # cat, sat of 3 and of 3
    assert f1["f1"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("metric", ["bleu", "chrf", "ter"])
def test_corpus_metrics_are_those_of_torchmetrics(metric):
    from torchmetrics.functional.text import chrf_score, sacre_bleu_score, translation_edit_rate

    theirs = {
        "bleu": lambda a, b: sacre_bleu_score(a, b, smooth=False),
        "chrf": lambda a, b: chrf_score(a, b, n_word_order=0),
        "ter": translation_edit_rate,
    }
    answers, references = map(list, zip(*PAIRS, strict=True))
    score = corpus_score(metric, "x", answers, references)
    expected = float(theirs[metric](answers, [[each] for each in references]))
    assert score.value == pytest.approx(100 * expected, rel=1e-4)
    assert score.higher_is_better == (metric != "ter")
    assert score.items == len(PAIRS)
    assert score.stderr > 0
    assert corpus_score(metric, "x", answers, references) == score
    assert corpus_score(metric, "x", answers[:1], references[:1]).stderr is None
    (one,) = text_values(metric, *PAIRS[3]).values()
    assert one == pytest.approx(0.0 if metric == "ter" else 100.0)


def test_scores_are_means_over_rows_and_by_task(tmp_path):
    rows = [
        {"inputs": f"say {n}", "targets": f"{n}", "task_name": "odd" if n % 2 else "even"} for n in range(4)
    ]
    evaluator = ReferenceMetrics(
        write(tmp_path / "a.jsonl", rows), metrics=["exact_match", "edit_distance", "bleu"]
    )
    results = answer(evaluator, ["0", "1", "x", "<think>3? 4?</think>\n3"])
    assert values(results)["references", "exact_match"] == 0.75
    assert values(results)["references/even", "exact_match"] == 0.5
    assert [each.higher_is_better for each in results.scores if each.metric == "edit_distance"] == [False] * 3
    assert results.scores[0].metric == "bleu"
    assert results.records[2].answer == "x"
    assert results.records[2].metrics["edit_distance"] == 1.0
    assert "sentence_bleu" in results.records[0].metrics
    first = next(each for each in results.scores if each.metric == "exact_match")
    assert first.stderr == pytest.approx((3 * 0.25**2 + 0.75**2) ** 0.5 / 3**0.5 / 4**0.5, rel=0.2)


def test_formats_are_valid_or_not(tmp_path):
    rows = [{"instruction": f"say {n}", "output": "{}"} for n in range(3)]
    evaluator = ReferenceMetrics(write(tmp_path / "a.jsonl", rows), metrics=[], valid_as="json")
    results = answer(evaluator, ['{"a": 1}', "{a: 1}", "```json\n[1]\n```"])
    assert values(results) == {("references", "valid_json"): pytest.approx(2 / 3)}
    assert not any(is_valid_format(text, "json") for text in ("NaN", "[-Infinity]", "[" * 100_000))
    assert is_valid_format("<a>b</a>", "xml")
    assert not is_valid_format("<a>b</b>", "xml")
    assert not is_valid_format("[" * 5000, "json")


# ------------------------------------------------------------------------------------------------------- labels

TICKETS = ["billing", "billing", "access", "access", "hardware", "billing"]
ANSWERED = ["Billing.", "access", '"access"', "I think it is access", "refund", "billing"]


@pytest.fixture
def tickets(tmp_path):
    rows = [{"instruction": f"route ticket {n}", "output": label} for n, label in enumerate(TICKETS)]
    return write(tmp_path / "tickets.jsonl", rows)


def test_label_accuracy_and_f1_by_hand(tickets):
    results = answer(ReferenceMetrics(tickets, labels=["billing", "access", "hardware"]), ANSWERED)
    found = values(results)
    assert found["references", "label_accuracy"] == pytest.approx(3 / 6)
    assert found["references", "outside_labels"] == pytest.approx(2 / 6)
    # billing: 2 right of 2 answers and 3 references; access: 1 of 2 and 2; hardware: none of 0 and 1.
    assert found["references/billing", "label_f1"] == pytest.approx(2 * 2 / (2 + 3))
    assert found["references/access", "label_f1"] == pytest.approx(2 * 1 / (2 + 2))
    assert found["references/hardware", "label_f1"] == 0
    assert found["references", "label_f1"] == pytest.approx((0.8 + 0.5 + 0) / 3)
    assert [each.answer for each in results.records][:4] == [
        "billing",
        "access",
        "access",
        "I think it is access",
    ]
    (note,) = results.notes
    assert "2 of 6 answers are none of the labels: 'I think it is access' (1), 'refund' (1)" in note
    macro = next(each for each in results.scores if each.metric == "label_f1")
    assert 0.05 < macro.stderr < 0.4


def test_a_label_that_nobody_uses_does_not_count(tickets):
    three = ["billing", "access", "hardware"]
    one, other = (
        answer(ReferenceMetrics(tickets, labels=labels), ANSWERED) for labels in (three, [*three, "unused"])
    )
    assert values(one) == values(other)


def test_labels_from_the_data_are_the_same_for_a_part_of_it(tickets):
    evaluator = ReferenceMetrics(tickets, labels="data")
    items = evaluator.requests()
    whole = answer(evaluator, ANSWERED)
    assert values(whole)["references", "label_accuracy"] == 0.5
    part = evaluator.score([Answered(items[0], (Generated("access", 1),))])
    assert values(part)["references", "outside_labels"] == 0.0
    assert part.records[0].answer == "access"


def test_labels_that_are_none_are_refused(tickets, tmp_path):
    with pytest.raises(SFTError, match=r"tickets.jsonl, row 3: the reference 'access' is none of the labels"):
        ReferenceMetrics(tickets, labels=["billing", "hardware"]).requests()
    with pytest.raises(SFTError, match="labels that are alike"):
        ReferenceMetrics(tickets, labels=["billing", "Billing!"]).requests()
    rows = [{"instruction": f"say {n}", "output": f"text {n}"} for n in range(101)]
    with pytest.raises(SFTError, match="the references are 101 different texts"):
        ReferenceMetrics(write(tmp_path / "many.jsonl", rows), labels="data").requests()


@given(st.text(alphabet=' .!\naBß"'))
def test_what_does_not_count_in_a_label_is_gone_after_once(text):
    assert plain(f" *{plain(text)}.\n") == plain(plain(text))


def test_thoughts_are_not_said():
    assert said("<think>a\nb</think>\n\n c ") == "c"
    assert said(" c") == "c"


# ------------------------------------------------------------------------------------------------- with a model


def test_a_model_that_says_the_reference_is_right(tmp_path, model_folder):
    module = SFTModule(base=str(model_folder("llama")))
    module.configure_model()
    scorer = Scorer.of(module)
    rows = [{"instruction": f"how are you {n}?", "output": "?"} for n in range(3)]
    evaluator = ReferenceMetrics(
        write(tmp_path / "a.jsonl", rows), metrics=["exact_match"], max_new_tokens=4, format=Alpaca()
    )
    said_now = [each.text for each in scorer.answer(evaluator.requests())]
    rows = [{**row, "output": f"{text.strip()}."} for row, text in zip(rows, said_now, strict=True)]
    rows[0]["output"] = rows[0]["output"][:-1] or "?"
    evaluator = ReferenceMetrics(
        write(tmp_path / "b.jsonl", rows), metrics=["exact_match"], max_new_tokens=4, format=Alpaca()
    )
    results = evaluator.score(scorer.answer(evaluator.requests()))
    assert [each.metrics["exact_match"] for each in results.records] == [1.0, 0.0, 0.0]
