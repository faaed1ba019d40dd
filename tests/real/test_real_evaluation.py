"""Item by item what lm-evaluation-harness 0.4.13 found with the same model and files."""

from __future__ import annotations

import json
import math

import pytest
import torch

from lightning_sft import Answered, Generate, Generated, Item, RollingLogLikelihood, Scorer
from lightning_sft_evaluators.bbh import BBH
from lightning_sft_evaluators.mmlu import MMLU
from lightning_sft_evaluators.perplexity import Perplexity

THREE = ["boolean_expressions", "date_understanding", "word_sorting"]


@pytest.fixture(scope="module")
def scorer(shared):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared / "real/models/stories260k"
    return Scorer(AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder))


@pytest.fixture(scope="module")
def reference(shared):
    return lambda name: json.loads((shared / "reference" / f"{name}.json").read_text())


def answer(scorer, items):
    """The items with the model's responses."""
    found = iter(scorer.run([request for item in items for request in item.requests]))
    return [Answered(item, tuple(next(found) for _ in item.requests)) for item in items]


def check_scores(results, aggregates, prefix, metric, theirs):
    scores = {score.name: score for score in results.scores if score.metric == metric}
    for task, expected in aggregates.items():
        name = prefix if task == prefix else f"{prefix}/{task.removeprefix(f'{prefix}_')}"
        if name in scores:
            assert scores[name].value == pytest.approx(expected[theirs], abs=1e-12)
            stderr = expected[theirs.replace(",", "_stderr,")]
            assert scores[name].stderr == pytest.approx(stderr, abs=1e-12)
            assert scores[name].items == expected["sample_len"]
    return scores


TOO_CLOSE = {("st_mmlu0_l10_bs1", "world_religions", 2)}
"""Items whose two best choices the harness itself has less than 1e-4 apart."""


@pytest.mark.parametrize(
    ("name", "shots", "limit"),
    [
        ("st_mmlu0_l10_bs1", 0, 2),
        ("st_mmlu5_l5_bs1", 5, 1),
        pytest.param("st_mmlu0_l10_bs1", 0, 10, marks=pytest.mark.slow),
        pytest.param("st_mmlu5_l5_bs1", 5, 5, marks=pytest.mark.slow),
    ],
)
def test_mmlu_item_by_item(shared, scorer, reference, name, shots, limit):
    expected = reference(name)
    mmlu = MMLU(str(shared / "real/mmlu"), shots=shots, limit=limit)
    items = mmlu.requests()
    results = mmlu.score(answer(scorer, items))
    theirs = {(item["task"].removeprefix("mmlu_"), item["doc_id"]): item for item in expected["items"]}
    assert len(results.records) == limit * 57
    for item, record in zip(items, results.records, strict=True):
        other = theirs[record.task, record.number]
        assert item.requests[0].context == other.get("prompt", item.requests[0].context)
        assert record.scores == pytest.approx(other["loglikelihoods"], abs=1e-4)
        first, second = sorted(other["loglikelihoods"], reverse=True)[:2]
        assert (first - second < 1e-4) == ((name, record.task, record.number) in TOO_CLOSE)
        if first - second >= 1e-4:
            assert record.metrics["acc"] == other["acc"]
    if len(items) == len(theirs):
        scores = check_scores(results, expected["aggregates"], "mmlu", "acc", "acc,none")
        assert len(scores) == 1 + 4 + 57


def test_in_bfloat16_only_close_verdicts_flip(shared, scorer):
    from transformers import AutoModelForCausalLM

    folder = shared / "real/models/stories260k"
    rounded = Scorer(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval(), scorer.tokenizer
    )
    items = MMLU(str(shared / "real/mmlu"), shots=0, limit=2).requests()
    for one, other in zip(scorer.answer(items), rounded.answer(items), strict=True):
        first, second = sorted(one.log_likelihoods, reverse=True)[:2]
        assert one.likeliest == other.likeliest or first - second < 0.1


@pytest.mark.slow
def test_mmlu_in_full(shared, scorer, reference):
    mmlu = MMLU(str(shared / "real/mmlu"), shots=0)
    results = mmlu.score(answer(scorer, mmlu.requests()))
    check_scores(results, reference("st_mmlu0_full")["aggregates"], "mmlu", "acc", "acc,none")
    assert results.scores[0].items == 14042


@pytest.mark.parametrize(
    ("name", "options", "prefix"),
    [
        ("st_bbh_cot_l5_g128", {"max_new_tokens": 128}, "bbh_cot_fewshot_"),
        ("st_bbh_direct_l5", {"cot": False}, "bbh_fewshot_"),
        ("st_bbh_zero_l5", {"cot": False, "shots": 0}, "bbh_zeroshot_"),
        ("st_bbh_cotzero_l5", {"shots": 0}, "bbh_cot_zeroshot_"),
    ],
)
def test_bbh_item_by_item(shared, scorer, reference, name, options, prefix):
    expected = reference(name)
    bbh = BBH(str(shared / "real/bbh"), tasks=THREE, limit=5, **options)
    items = bbh.requests()
    results = bbh.score(answer(scorer, items))
    prompts = {(item.task, item.number): item.requests[0].prompt for item in items}
    found = {(record.task, record.number): record for record in results.records}
    for theirs in expected["items"]:
        key = theirs["task"].removeprefix(prefix), theirs["doc_id"]
        assert prompts[key] == theirs.get("prompt", prompts[key])
        assert found[key].generated == theirs["generated"]
        strict = theirs.get("filter") == "strict-match"
        assert found[key].metrics["strict_match" if strict else "exact_match"] == theirs["exact_match"]
        if not strict:
            assert found[key].answer == theirs["answer"]


@pytest.mark.parametrize(
    ("part", "options"),
    [
        ("cot_fewshot", {}),
        ("fewshot_direct_nolead", {"cot": False}),
        ("zeroshot_from_direct", {"cot": False, "shots": 0}),
    ],
)
def test_bbh_judges_recorded_answers_as_the_harness(shared, reference, part, options):
    for task, answers in reference("bbh_replay")[part].items():
        bbh = BBH(str(shared / "real/bbh"), tasks=[task], **options)
        items = {item.number: item for item in bbh.requests()}
        assert len(items) == 250
        for theirs in answers:
            item = items[theirs["doc_id"]]
            assert item.target == theirs["target"]
            (record,) = bbh.score([Answered(item, (Generated(theirs["response"], 1),))]).records
            strict = theirs["filter"] == "strict-match"
            assert record.metrics["strict_match" if strict else "exact_match"] == theirs["exact_match"]
            if not strict:
                assert record.answer == theirs["answer"], theirs["response"]


@pytest.mark.parametrize("task", ["ppl_wiki", "ppl_c4"])
def test_perplexity_text_by_text(scorer, reference, tmp_path, task):
    expected = reference("st_ppl")
    items = [item for item in expected["items"] if item["task"] == task]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": i["target"]}) + "\n" for i in items))
    evaluator = Perplexity(str(tmp_path / "texts.jsonl"))
    answered = answer(scorer, evaluator.requests())
    for theirs, mine in zip(items, answered, strict=True):
        # The harness adds up a window in float32: 1e-4 where sums are above a thousand.
        assert mine.log_likelihoods[0] == pytest.approx(float(theirs["answer"]), rel=5e-7)
    scores = {score.metric: score.value for score in evaluator.score(answered).scores}
    for metric in ("bits_per_byte", "byte_perplexity", "word_perplexity"):
        assert scores[metric] == pytest.approx(expected["aggregates"][task][f"{metric},none"], rel=1e-5)
    tokens = sum(response.tokens for each in answered for response in each.responses)
    total = sum(each.log_likelihoods[0] for each in answered)
    assert scores["token_perplexity"] == pytest.approx(math.exp(-total / tokens))


def test_free_generation(shared, scorer, reference):
    rows = json.loads((shared / "real/sft/alpaca_en_demo.json").read_text())
    by_output = {row["output"]: row for row in rows}
    expected = reference("st_sftgen")["items"]
    requests = []
    for item in expected:
        row = by_output[item["target"]]
        prompt = f"{row['instruction']}\n" + (f"{row['input']}\n" if row["input"] else "")
        requests.append(Generate(prompt, ("\n\n",), max_new_tokens=64))
    assert [response.text for response in scorer.run(requests)] == [item["generated"] for item in expected]


def test_long_texts_are_scored_in_windows(scorer):
    text = "Once upon a time there was a little girl. " * 100
    (mine,) = scorer.run([RollingLogLikelihood(text)])
    assert mine.tokens == len(scorer.tokenizer(text)["input_ids"])
    item = Item("t", 0, (RollingLogLikelihood(text),))
    assert answer(scorer, [item])[0].log_likelihoods == [mine.log_likelihood]
