"""Each rule on answers that follow it and answers that don't; accuracies by hand."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_sft import Answered, Generated, Message, SFTError
from lightning_sft.evaluation.paired import differences
from lightning_sft_evaluators.ifeval import IFEval
from lightning_sft_evaluators.instruction_rules import RULES, follows, loose_forms, sentences

LESS, LEAST = "less than", "at least"
CASES = [
    ("keywords:existence", {"keywords": ["sun", "c++"]}, "The Sun, in C++.", "The sun only."),
    ("keywords:frequency", {"keyword": "no", "relation": LEAST, "frequency": 2}, "No, no!", "No."),
    ("keywords:frequency", {"keyword": "no", "relation": LESS, "frequency": 2}, "No.", "No and no"),
    ("keywords:forbidden_words", {"forbidden_words": ["art", "b."]}, "a heart, ab.", "fine Art"),
    ("keywords:letter_frequency", {"letter": "E", "let_relation": LEAST, "let_frequency": 3}, "eEe", "ee"),
    ("keywords:letter_frequency", {"letter": "!", "let_relation": LESS, "let_frequency": 2}, "ah!", "ah!!"),
    ("language:response_language", {"language": "ru"}, "Да, это так (ok).", "Yes, это."),
    ("language:response_language", {"language": "ko"}, "네, 그렇습니다", "はい"),
    (
        "length_constraints:number_sentences",
        {"relation": LEAST, "num_sentences": 2},
        "One. Two.",
        "One, two.",
    ),
    (
        "length_constraints:number_sentences",
        {"relation": LESS, "num_sentences": 2},
        "Dr. No e.g. here",
        "A b. C d",
    ),
    ("length_constraints:number_words", {"relation": LESS, "num_words": 3.0}, "a b", "a b c"),
    ("length_constraints:number_words", {"relation": LEAST, "num_words": 3}, "a-b c", "a b"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "***\na\n***\nb\n***", "a\n\nb"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a *** b", "a *** *** b"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "So"},
        "a b\n\n'so, it is'",
        "so\n\nand so",
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "so"},
        "so\n\n\nx",
        "so\n\nx\n\ny",
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "so"},
        "a\n\n\nso",
        "a\n\n\n\nso",  # the second one is blank
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] and [b c]", "[a] and (b)"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "a\np. s. b", "a psst"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "a\nP.P.S b", "a\nP.S. b"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "1P.S. b", "1P.S b"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n - b", "* a\n** b\n1. c"),
    ("detectable_format:constrained_response", {}, "So: My answer is no. Really.", "No."),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        "*a b* and **c**",
        "*a* and ** **",
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        "***a***",
        "**a** and **b*",
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1\na\nSECTION 2\nb",
        "SECTION 1\na\nSECTION b",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": [1]}\n```', 'Here: {"a": 1}'),
    ("detectable_format:json_format", {}, " [1, 2] ", "{a: 1}"),
    ("detectable_format:json_format", {}, "```JSON\n{}", "```yaml\n{}\n```"),
    ("detectable_format:json_format", {}, "[[]]", "[" * 100_000),
    ("detectable_format:title", {}, "<<joy>>\nText", "<joy>\n<< >>"),
    ("combination:two_responses", {}, "a\n******\nb", "a\n******\na"),
    ("combination:two_responses", {}, "a ****** b ******", "a ****** b ****** c"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Why me? "}, " why me? Because.", "Why? Why me?"),
    ("startend:start_checker", {"start_phrase": "Well,"}, " well, yes", "Yes, well,"),
    ("startend:end_checker", {"end_phrase": "the end."}, 'This is "The End."', "The end. No."),
    ("startend:quotation", {}, ' "so" ', '"'),
    (
        "change_case:capital_word_frequency",
        {"capital_relation": LEAST, "capital_frequency": 2},
        "WELL-DONE, ISN'T it",
        "WELL done",
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_relation": LESS, "capital_frequency": 1},
        "Not So",
        "I see",
    ),
    ("change_case:english_capital", {}, "ALL OF 3!", "ALL oF"),
    ("change_case:english_lowercase", {}, "all of 3!", "all Of"),
    ("punctuation:no_comma", {}, "a; b", "a, b"),
]


@pytest.mark.parametrize(("name", "options", "good", "bad"), CASES, ids=[case[0] for case in CASES])
def test_a_rule_tells_an_answer_that_follows_it_from_one_that_does_not(name, options, good, bad):
    assert RULES[name].fault(options) is None
    assert follows(name, options, good)
    assert not follows(name, options, bad)
    assert not follows(name, options, " \n")


def test_every_rule_has_a_case():
    assert {case[0] for case in CASES} == set(RULES)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("No end", 1),
        ("It costs 3.50 in all. Really?! Yes…", 3),
        ('He said "No." Then he left.', 2),
        ("Mr. J. Smith of the U.S. came at 5 p.m. on Monday.", 1),
        ("これは本です。本当？", 2),
        ("a.\n\n- b\n- c", 2),
        ("...", 0),
    ],
)
def test_sentences(text, count):
    assert sentences(text) == count


@given(st.lists(st.sampled_from(["Cats sleep", "it was 3.5 km", "why not"]), min_size=1, max_size=6))
def test_as_many_sentences_as_were_put_together(parts):
    assert sentences(" ".join(f"{part}." for part in parts)) == len(parts)


def test_loose_forms_are_those_of_the_paper():
    forms = loose_forms("Sure!\n*a*\nBye")
    assert set(forms) == {
        "Sure!\n*a*\nBye", "*a*\nBye", "Sure!\n*a*", "*a*", "Sure!\na\nBye", "a\nBye", "Sure!\na", "a",
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------- the evaluator


def row(*instructions, prompt="Write."):
    return {
        "key": 7,
        "prompt": prompt,
        "instruction_id_list": [name for name, _ in instructions],
        "kwargs": [{"num_words": None, **options} for _, options in instructions],
    }


NO_COMMA, LOWER = ("punctuation:no_comma", {}), ("change_case:english_lowercase", {})
JSON = ("detectable_format:json_format", {})
ROWS = [row(NO_COMMA, LOWER), row(JSON), row(NO_COMMA, LOWER, JSON, prompt="Third.")]


def write(path, rows):
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return str(path)


def scored(evaluator, texts):
    items = evaluator.requests()
    return evaluator.score(
        [Answered(item, (Generated(text, 1),)) for item, text in zip(items, texts, strict=True)]
    )


def test_accuracies_by_hand(tmp_path):
    evaluator = IFEval(write(tmp_path / "a.jsonl", ROWS))
    results = scored(evaluator, ["all low", "Here you are:\n{}", "No, never"])
    found = {(each.name, each.metric): each for each in results.scores}
    # strict: 2 of 2, 0 of 1, 0 of 3; loose: 2 of 2, 1 of 1, 0 of 3
    assert found["ifeval", "prompt_level_strict_acc"].value == pytest.approx(1 / 3)
    assert found["ifeval", "prompt_level_loose_acc"].value == pytest.approx(2 / 3)
    assert found["ifeval", "inst_level_strict_acc"].value == pytest.approx(2 / 6)
    assert found["ifeval", "inst_level_loose_acc"].value == pytest.approx(3 / 6)
    assert found["ifeval/punctuation", "inst_level_strict_acc"].value == 0.5
    assert found["ifeval/detectable_format", "inst_level_loose_acc"].value == 0.5
    assert found["ifeval", "inst_level_strict_acc"].items == 6
    residuals = [2 - 2 / 3, 0 - 1 / 3, 0 - 3 / 3]
    expected = (3 / 2 * sum(each**2 for each in residuals)) ** 0.5 / 6
    assert found["ifeval", "inst_level_strict_acc"].stderr == pytest.approx(expected)
    assert [each.answer for each in results.records] == [
        "all followed",
        "broken: detectable_format:json_format",
        "broken: punctuation:no_comma, change_case:english_lowercase, detectable_format:json_format",
    ]


def test_paired_means_are_the_scores(tmp_path):
    evaluator = IFEval(write(tmp_path / "a.jsonl", ROWS))
    before = scored(evaluator, ["A", "{}", "B, b"])
    after = scored(evaluator, ["a", "x", "{}"])
    changes = {each.metric: each for each in differences(before.records, after.records)}
    for score in after.scores[:2]:
        assert changes[score.metric].after == pytest.approx(score.value)
    metric = "inst_level_strict_acc"
    value = next(each.value for each in after.scores if each.metric == metric and each.name == "ifeval")
    assert changes[metric].after == pytest.approx(value)


def test_it_asks_as_a_chat_or_as_text(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS)
    (asked,) = IFEval(path, system="Be good.").requests()[2].requests
    assert asked.prompt == (Message("system", "Be good."), Message("user", "Third."))
    assert IFEval(path, chat=False).requests()[2].requests[0].prompt == "Third."


def test_unknown_instructions_are_named_before_anything_runs_or_dropped(tmp_path):
    strange = [
        row(NO_COMMA),
        row(("magic:rhyme", {})),
        row(("language:response_language", {"language": "de"})),
    ]
    path = write(tmp_path / "a.jsonl", strange)
    expected = r"a.jsonl, row 2: unknown instructions: language:response_language, magic:rhyme \(and 1 more"
    with pytest.raises(SFTError, match=expected):
        IFEval(path).requests()
    (item,) = IFEval(path, unknown="drop").requests()
    assert item.number == 0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompt": "a"}, "needs `prompt` and `instruction_id_list`"),
        ({**row(NO_COMMA), "prompt": " "}, "needs `prompt`"),
        ({**row(NO_COMMA), "kwargs": []}, "`kwargs` isn't a list with one entry"),
        ({**row(NO_COMMA), "kwargs": "{"}, "`kwargs` isn't a list"),
        (row(("startend:end_checker", {})), "startend:end_checker needs `end_phrase` (str), which is None"),
        (row(("keywords:existence", {"keywords": []})), "needs `keywords` (list), which is []"),
        (row(("keywords:existence", {"keywords": [1]})), "needs texts in `keywords`"),
        (
            row(("length_constraints:number_words", {"num_words": 3, "relation": "more than"})),
            "has `relation` 'more than'; there are 'less than' and 'at least'",
        ),
        (
            row(("length_constraints:number_words", {"num_words": "3", "relation": LEAST})),
            "needs `num_words` (int), which is '3'",
        ),
    ],
)
def test_a_bad_row_is_named(tmp_path, bad, message):
    with pytest.raises(SFTError, match=re.escape(message)) as error:
        IFEval(write(tmp_path / "a.jsonl", [row(NO_COMMA), bad])).requests()
    assert "a.jsonl, row 2" in str(error.value)


def test_kwargs_may_be_json_text(tmp_path):
    given = row(("startend:end_checker", {"end_phrase": "amen"}))
    (item,) = IFEval(
        write(tmp_path / "a.jsonl", [{**given, "kwargs": json.dumps(given["kwargs"])}])
    ).requests()
    assert item.data["instructions"] == [["startend:end_checker", {"end_phrase": "amen"}]]
