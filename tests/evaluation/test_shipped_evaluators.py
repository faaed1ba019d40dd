"""The benchmarks in configs/evaluators on rows in the shape of the real data: prompts written out, scores by hand."""

from __future__ import annotations

import json
from math import log
from pathlib import Path

import pytest
import torch
import yaml

from lightning_sft import Answered, Generated, Likelihood, Scorer, SFTError
from lightning_sft_evaluators.generation_task import Extraction, GenerationTask
from lightning_sft_evaluators.multiple_choice import MultipleChoice

CONFIGS = Path(__file__).parents[2] / "configs/evaluators"

ARC = [
    {"id": "a1", "question": "Which is hot?", "choices": {"text": ["ice", "lava", "rain"], "label": ["A", "B", "C"]},
     "answerKey": "B"},
    {"id": "a2", "question": "Which is wet?", "choices": {"text": ["sand", "the sea"], "label": ["1", "2"]},
     "answerKey": "2"},
]  # fmt: skip
HELLASWAG = [
    {"ind": 4, "activity_label": "Baking", "ctx_a": "A man stands. [header] Bread [title] Mix  it.",
     "ctx_b": "the Man", "ctx": "…", "endings": [" eats [step] it ", "runs.", "bakes [title] Oven", "sits  down  now"],
     "label": "2", "split": "val", "source_id": "x~1"},
]  # fmt: skip
WINOGRANDE = [
    {"qID": "1", "sentence": "Ann thanked Bea because _ had helped with a file_name.", "option1": "Ann",
     "option2": "Bea", "answer": "2"},
    {"qID": "2", "sentence": "The cup broke, so I threw away the _ .", "option1": "cup", "option2": "table",
     "answer": "1"},
]  # fmt: skip
TRUTHFULQA = [
    {"question": "Can pigs fly?", "mc1_targets": {"choices": ["No.", "Yes."], "labels": [1, 0]},
     "mc2_targets": {"choices": ["No.", "They can't.", "Yes."], "labels": [1, 1, 0]}},
]  # fmt: skip
GSM8K = [
    {"question": "2 and 2 bags of 300?", "answer": "2+2=<<2+2=4>>4 bags.\n4*300=1,200\n#### 1,200"},
    {"question": "Half of 7?", "answer": "7/2=3.5\n#### 3.5"},
]


def shipped(name, tmp_path, rows, **changes):
    """The evaluator of a shipped file, over these rows."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (written,) = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["evaluators"]
    options = written["init_args"] | {"path": str(tmp_path / "rows.jsonl")} | changes
    if "extract" in options:
        options["extract"] = {way: Extraction(**how) for way, how in options["extract"].items()}
    return {"MultipleChoice": MultipleChoice, "GenerationTask": GenerationTask}[written["class_path"]](
        **options
    )


def pairs(item):
    return [(request.context, request.continuation) for request in item.requests]


def metrics(evaluator, item, *values):
    answered = Answered(item, tuple(Likelihood(value, 1, False) for value in values))
    (record,) = evaluator.score([answered]).records
    return record.metrics


@pytest.mark.parametrize("name", ["arc_easy", "arc_challenge"])
def test_arc(tmp_path, name):
    evaluator = shipped(name, tmp_path, ARC)
    first, second = evaluator.requests()
    assert pairs(first) == [
        ("Question: Which is hot?\nAnswer:", f" {text}") for text in ("ice", "lava", "rain")
    ]
    assert [first.target, second.target] == ["lava", "the sea"]
    # by length: -6/4 is better than -5/3 and -7/4
    assert metrics(evaluator, first, -5.0, -6.0, -7.0) == {"acc": 0.0, "acc_norm": 1.0}
    assert [each.text for each in evaluator.texts()] == ["Which is hot?", "Which is wet?"]


def test_hellaswag_without_wikihows_marks(tmp_path):
    evaluator = shipped("hellaswag", tmp_path, HELLASWAG)
    (item,) = evaluator.requests()
    # stripped, " [title]" → ". ", brackets removed with what is in them, then two spaces → one, once; ctx_b capitalised
    context = "Baking: A man stands. Bread. Mix it. The man"
    assert pairs(item) == [
        (context, f" {text}") for text in ("eats it", "runs.", "bakes. Oven", "sits down now")
    ]
    assert item.target == "bakes. Oven"
    assert metrics(evaluator, item, -3.0, -4.0, -5.0, -30.0) == {"acc": 0.0, "acc_norm": 0.0}
    assert metrics(evaluator, item, -9.0, -9.0, -9.5, -30.0) == {"acc": 0.0, "acc_norm": 1.0}


def test_winogrande_scores_what_comes_after_the_blank(tmp_path):
    evaluator = shipped("winogrande", tmp_path, WINOGRANDE)
    first, second = evaluator.requests()
    assert pairs(first) == [
        (f"Ann thanked Bea because {name}", " had helped with a file_name.") for name in ("Ann", "Bea")
    ]
    assert pairs(second) == [
        (f"The cup broke, so I threw away the {what}", " .") for what in ("cup", "table")
    ]
    assert [metrics(evaluator, item, -2.0, -1.0) for item in (first, second)] == [{"acc": 1.0}, {"acc": 0.0}]
    with_shot = shipped("winogrande", tmp_path, WINOGRANDE, shots=1, shots_split=None, split=None)
    assert with_shot.requests()[1].requests[1].context == (
        "Ann thanked Bea because Bea had helped with a file_name.\n\nThe cup broke, so I threw away the table"
    )
    assert evaluator.texts()[0].text == WINOGRANDE[0]["sentence"]


def test_a_sentence_without_a_blank_is_named(tmp_path):
    rows = [WINOGRANDE[0], {**WINOGRANDE[0], "sentence": "No blank."}]
    with pytest.raises(SFTError, match=r"rows\.jsonl, row 2, continuation: the template fails"):
        shipped("winogrande", tmp_path, rows).requests()


def test_truthfulqa(tmp_path):
    one = shipped("truthfulqa_mc1", tmp_path, TRUTHFULQA)
    (item,) = one.requests()
    beginning, _, question = item.requests[0].context.partition("Barcelona, Spain.\n\n")
    assert beginning.startswith(
        "Q: What is human life expectancy in the United States?\nA: Human life expectancy"
    )
    assert beginning.count("\n\nQ: ") == 5
    assert question == "Q: Can pigs fly?\nA:"
    assert [continuation for _, continuation in pairs(item)] == [" No.", " Yes."]
    assert [metrics(one, item, *values) for values in ((-1, -2), (-2, -1))] == [{"acc": 1.0}, {"acc": 0.0}]
    several = shipped("truthfulqa_mc2", tmp_path, TRUTHFULQA)
    (item,) = several.requests()
    found = metrics(several, item, log(0.3), log(0.1), log(0.4))
    assert found["mc2"] == pytest.approx((0.3 + 0.1) / (0.3 + 0.1 + 0.4))
    assert several.texts()[0].text == "Can pigs fly?"


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        (" 4 bags.\n#### 1,200", 1, 1),
        (
            " It is $1200.",
            0,
            1,
        ),  # the last number is "$1200.": dollar and last full stop don't count
        (" 1200 bags of 3", 0, 0),
        (" #### 1200\n5", 1, 0),
        (" #### 12", 0, 0),
        (" many", 0, 0),
    ],
)
def test_gsm8k(tmp_path, text, strict, flexible):
    evaluator = shipped("gsm8k", tmp_path, GSM8K, shots=0)
    item = evaluator.requests()[0]
    (record,) = evaluator.score([Answered(item, (Generated(text, 5),))]).records
    assert record.metrics == {"exact_match_strict": strict, "exact_match_flexible": flexible}


def test_gsm8k_s_examples_have_their_whole_answers(tmp_path):
    evaluator = shipped("gsm8k", tmp_path, GSM8K, shots=1, shots_split=None, split=None)
    (request,) = evaluator.requests()[1].requests
    assert request.prompt == (
        f"Question: 2 and 2 bags of 300?\nAnswer: {GSM8K[0]['answer']}\n\nQuestion: Half of 7?\nAnswer:"
    )
    assert (request.stop, request.max_new_tokens) == (("Question:", "</s>", "<|im_end|>"), 256)


@torch.no_grad()
def test_the_embedded_facts_are_those_of_a_plain_loop(tmp_path):
    """Each choice by itself through transformers: Σ log p of its tokens, the likeliest is the answer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lightning_sft.assets import data_path, model_path

    model = AutoModelForCausalLM.from_pretrained(model_path("tiny")).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path("tiny"))
    evaluator = shipped("facts", tmp_path, [], path="tiny:facts", limit=24)
    records = evaluator.score(Scorer(model, tokenizer).answer(evaluator.requests())).records
    rows = [json.loads(line) for line in data_path("tiny:facts").read_text().splitlines()[:24]]
    right = []
    for row, record in zip(rows, records, strict=True):
        context = tokenizer.encode(f"Question: {row['question']} Answer:")
        sums = []
        for choice in row["choices"]:
            ids = tokenizer.encode(f"Question: {row['question']} Answer: {choice}")
            log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            sums.append(sum(float(log_p[place - 1, ids[place]]) for place in range(len(context), len(ids))))
        assert record.scores == pytest.approx(sums, abs=1e-4)
        right.append(float(sums.index(max(sums)) == row["answer"]))
    assert [record.metrics["acc"] for record in records] == right
    assert sum(right) > 15
