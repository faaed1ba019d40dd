"""Benchmarks declared by their data and templates: rows, choices, answers, examples, and what errors say."""

from __future__ import annotations

import csv
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sft import Answered, Generate, Generated, Likelihood, LogLikelihood, Message, SFTError
from lightning_sft_evaluators.choice_rows import index_of
from lightning_sft_evaluators.generation_task import Extraction, GenerationTask
from lightning_sft_evaluators.multiple_choice import MultipleChoice

ROWS = [
    {"q": f"q{n}?", "choices": ["x", f"y{n}", "zz"], "answer": n % 3, "part": "ab"[n % 2]} for n in range(8)
]


def write(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "data.jsonl")


def choice(path, prompt="Q: {{ q }}\nA:", **options):
    return MultipleChoice(path, prompt, **{"answer": "answer", **options})


def answered(item, *values):
    return Answered(item, tuple(Likelihood(value, 1, False) for value in values))


def metrics(evaluator, item, *values):
    (record,) = evaluator.score([answered(item, *values)]).records
    return record.metrics


def test_each_choice_is_scored_after_the_prompt_and_the_delimiter(data):
    items = choice(data).requests()
    assert items[1].requests == tuple(LogLikelihood("Q: q1?\nA:", f" {text}") for text in ("x", "y1", "zz"))
    assert [item.target for item in items[:3]] == ["x", "y1", "zz"]
    tight = choice(data, delimiter="").requests()
    assert tight[0].requests[0] == LogLikelihood("Q: q0?\nA:", "x")


def test_every_kind_of_file_asks_the_same(tmp_path, data):
    expected = choice(data).requests()
    (tmp_path / "data.json").write_text(json.dumps(ROWS))
    with (tmp_path / "data.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(ROWS[0])
        writer.writerows([row["q"], json.dumps(row["choices"]), row["answer"], row["part"]] for row in ROWS)
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "data.parquet")
    for kind in ("json", "csv", "parquet"):
        assert choice(str(tmp_path / f"data.{kind}")).requests() == expected


def test_choices_by_templates_and_letters_as_choices(data):
    evaluator = choice(
        data,
        "{{ q }}{% for each in choices %}\n{{ 'ABC'[loop.index0] }}. {{ each }}{% endfor %}\nAnswer:",
        choices=["A", "B", "C"],
    )
    item = evaluator.requests()[2]
    assert item.requests[1] == LogLikelihood("q2?\nA. x\nB. y2\nC. zz\nAnswer:", " B")
    assert item.target == "C"


# ---------------------------------------------------------------------------------------------- verdicts


def test_the_metrics_by_hand(tmp_path):
    # log-likelihoods -4, -5, -6 over "ab", "日本" and "abcdef":
    #   acc: -4, the first; per character: -2, -2.5, -1, the third; per byte (2, 6, 6): -2, -0.83, -1, the second
    path = write(tmp_path / "d.jsonl", [{"q": "q", "choices": ["ab", "日本", "abcdef"], "answer": 0}])
    evaluator = choice(path, metrics=["acc", "acc_norm", "acc_bytes"])
    (item,) = evaluator.requests()
    assert metrics(evaluator, item, -4.0, -5.0, -6.0) == {"acc": 1.0, "acc_norm": 0.0, "acc_bytes": 0.0}
    for answer, metric in ((1, "acc_bytes"), (2, "acc_norm")):
        path = write(
            tmp_path / "d.jsonl", [{"q": "q", "choices": ["ab", "日本", "abcdef"], "answer": answer}]
        )
        (item,) = evaluator.requests()
        found = metrics(evaluator, item, -4.0, -5.0, -6.0)
        assert [name for name, value in found.items() if value] == [metric]


def test_of_equal_choices_the_first_counts(data):
    evaluator = choice(data)
    first, second = evaluator.requests()[:2]
    assert metrics(evaluator, first, -1.0, -1.0, -1.0)["acc"] == 1.0
    assert metrics(evaluator, second, -1.0, -1.0, -1.0)["acc"] == 0.0


def test_several_right_choices(tmp_path):
    path = write(tmp_path / "d.jsonl", [{"q": "q", "choices": ["a", "b", "c"], "answer": [0, 2]}])
    evaluator = choice(path)
    (item,) = evaluator.requests()
    assert [metrics(evaluator, item, *values)["acc"] for values in ((-3, -2, -1), (-2, -1, -3))] == [1.0, 0.0]


def test_mc2_is_the_share_of_the_right_choices(tmp_path):
    from math import log

    path = write(tmp_path / "d.jsonl", [{"q": "q", "choices": ["a", "b", "c"], "labels": [1, 0, 1]}])
    evaluator = choice(path, answer=None, labels="labels", metrics=["mc2"])
    (item,) = evaluator.requests()
    # (0.1 + 0.05) / (0.1 + 0.2 + 0.05) = 3/7, and the same where exp() of each would be 0
    for less in (0.0, 5000.0):
        found = metrics(evaluator, item, log(0.1) - less, log(0.2) - less, log(0.05) - less)
        assert found["mc2"] == pytest.approx(3 / 7)


def test_parts_have_scores_of_their_own(data):
    evaluator = choice(data, task="part {{ part }}", metrics=["acc"], name="it")
    items = evaluator.requests()
    results = evaluator.score([answered(item, -1.0, -2.0, -3.0) for item in items])
    # right are the rows whose answer is 0: 0, 3 and 6; of part a 0 and 6 among 0, 2, 4, 6
    assert {s.name: (s.value, s.items) for s in results.scores} == {
        "it": (3 / 8, 8), "it/part a": (2 / 4, 4), "it/part b": (1 / 4, 4),
    }  # fmt: skip
    assert [score.name for score in choice(data).score([answered(items[0], -1, -2, -3)]).scores] == [
        "data", "data",
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("value", "choices", "way", "index"),
    [
        (2, "xyz", "auto", 2), ("2", "xyz", "auto", 2), ("b", "xyz", "auto", 1), ("C", "xyz", "auto", 2),
        ("y", "xyz", "auto", 1), (" y ", "xyz", "auto", 1), ("A", "ABC", "auto", 0), ("9", ["7", "9"], "auto", 1),
        ("1", ["2", "1", "0"], "text", 1), ("1", ["1", "2", "0"], "index", 1), (2, ["2", "1", "0"], "text", 0),
        ("y", ["x", " y "], "auto", 1), ("B", ["B", "A"], "letter", 1),
    ],
)  # fmt: skip
def test_an_answer_is_an_index_a_letter_or_a_text(value, choices, way, index):
    assert index_of(value, list(choices), way) == index


@pytest.mark.parametrize(
    ("value", "choices", "message"),
    [
        (3, "xyz", "the answer 3 is out of range\n  → the last choice is 2 or C"),
        (-1, "xyz", "the answer -1 is out of range"),
        ("E", "xyz", "the answer 'E' is out of range"),
        ("why", "xyz", "the answer is 'why'\n  → give an index from 0"),
        (True, "xyz", "the answer is True"),
        (None, "xyz", "the answer is None"),
        (1.0, "xyz", "the answer is 1.0"),
        ("1", ["1", "2"], "the answer '1' is index 1 as well as text 0\n  → say in `answer_as`"),
    ],
)
def test_an_answer_that_names_no_choice_or_two_is_refused(value, choices, message):
    with pytest.raises(SFTError) as error:
        index_of(value, list(choices))
    assert str(error.value).startswith(f"answer: {message}")


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"choices": ["a", "b"], "answer": 0}, {}, "prompt: the template fails: 'q' is undefined"),
        ({"q": "q", "answer": 0}, {}, "choices: the expression fails: 'choices' is undefined"),
        ({"q": "q", "choices": ["a", "b"]}, {}, "answer: the expression fails: 'answer' is undefined"),
        ({"q": "q", "choices": "a or b", "answer": 0}, {}, "choices: the choices are 'a or b', not a list"),
        ({"q": "q", "choices": ["a"], "answer": 0}, {}, "choices: the row has 1 choices, not 2 or more"),
        (
            {"q": "q", "choices": ["a", "b"], "answer": 0},
            {"n_choices": 3},
            "choices: the row has 2 choices, not 3",
        ),
        ({"q": "q", "choices": ["a", ""], "answer": 0}, {}, "choices: choice 1 is ''"),
        ({"q": "q", "choices": ["a", None], "answer": 0}, {}, "choices: choice 1 is None"),
        ({"q": "q", "choices": ["a", "b"], "answer": 2}, {}, "answer: the answer 2 is out of range"),
        ({"q": "q", "choices": ["a", "b"], "answer": []}, {}, "answer: no choice is right"),
        (
            {"q": "q", "choices": ["a", "b"], "answer": [1]},
            {"answer": None, "labels": "answer"},
            "labels: the labels are [1] for 2 choices",
        ),
        (
            {"q": "q", "choices": ["a", "b"], "answer": [0, 0]},
            {"answer": None, "labels": "answer"},
            "labels: no choice is right",
        ),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, options, message):
    good = {"q": "q", "choices": ["a", "b", "c"], "answer": [1, 0, 0] if "labels" in options else 1}
    path = write(tmp_path / "d.jsonl", [good, row])
    with pytest.raises(SFTError) as error:
        choice(path, **options).requests()
    assert str(error.value).startswith(f"{path}, row 2, {message}")


# ---------------------------------------------------------------------------------------------- examples


def asked(item):
    return item.requests[0].context


def test_the_first_rows_are_the_examples_but_never_the_row_itself(data):
    items = choice(data, "{{ q }}", shots=2, description="Do.\n", shots_separator="|").requests()
    assert asked(items[5]) == "Do.\nq0? x|q1? y1|q5?"
    assert asked(items[0]) == "Do.\nq1? y1|q2? zz|q0?"


def test_examples_of_another_file(tmp_path, data):
    others = write(tmp_path / "train.jsonl", [ROWS[3], *({**row, "q": f"train {row['q']}"} for row in ROWS)])
    items = choice(data, "{{ q }}", shots=1, shots_path=others, shots_split="train").requests()
    assert asked(items[0]) == "q3? x\n\nq0?"
    assert asked(items[3]) == "train q0? x\n\nq3?"  # the first row over there is the row itself


def test_a_chat_has_turns_or_one_turn(data):
    (request, *_) = choice(data, "{{ q }}", shots=1, chat=True, description="Do.").requests()[1].requests
    assert request == LogLikelihood(
        (Message("system", "Do."), Message("user", "q0?"), Message("assistant", "x"), Message("user", "q1?")),
        "x",
    )
    (request, *_) = choice(data, "{{ q }}", shots=1, chat=True, turns=False).requests()[1].requests
    assert request.context == (Message("user", "q0? x\n\nq1?"),)


@settings(max_examples=25)
@given(
    contents=st.lists(st.integers(0, 5), min_size=4, max_size=12),
    seed=st.integers(0, 3),
    shots=st.integers(1, 2),
    limit=st.integers(1, 12),
)
def test_drawn_examples_are_other_rows_and_depend_on_seed_and_row_alone(
    tmp_path_factory, contents, seed, shots, limit
):
    rows = [{"q": f"<{n}>", "choices": ["x", "y"], "answer": 0} for n in contents]
    path = write(tmp_path_factory.mktemp("law") / "d.jsonl", rows)
    evaluator = choice(path, "{{ q }}", shots=shots, shots_seed=seed, limit=limit)
    if any(sum(other != each for other in contents) < shots for each in contents[:limit]):
        with pytest.raises(SFTError, match="other rows for examples"):
            evaluator.requests()
        return
    items = evaluator.requests()
    whole = {asked(item) for item in items}
    for item, own in zip(items, contents, strict=False):
        given = asked(item).split("\n\n")
        assert given[-1] == f"<{own}>"
        assert len(given) == shots + 1
        assert f"<{own}> x" not in given
    assert {
        asked(i) for i in choice(path, "{{ q }}", shots=shots, shots_seed=seed, limit=1).requests()
    } <= whole


def test_another_seed_draws_other_examples(data):
    drawn = {tuple(map(asked, choice(data, shots=3, shots_seed=seed).requests())) for seed in range(4)}
    assert len(drawn) == 4
    items = choice(data, "{{ q }}", shots=3, shots_seed=0).requests()
    used = {example for item in items for example in asked(item).split("\n\n")[:3]}
    assert (
        len(used) > 4
    )  # were they the same for all, there would be three, and one more where one is the row itself


def test_limits_take_the_first_rows_or_draw_them(data):
    assert [item.number for item in choice(data, limit=3).requests()] == [0, 1, 2]
    drawn = [[item.number for item in choice(data, limit=3, seed=seed).requests()] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


# ---------------------------------------------------------------------------------------------- options and data


def test_missing_data_names_what_is_expected_and_how_to_get_it(tmp_path):
    path = str(tmp_path / "gone.jsonl")
    with pytest.raises(SFTError) as error:
        choice(path, how_to_get="download it from the moon", name="moon").requests()
    assert str(error.value).startswith(
        f"{path}: moon has no data: no such file\n  → download it from the moon; "
    )
    assert "with the columns answer, choices, q." in str(error.value)
    with pytest.raises(
        SFTError, match=r"someone/something: something has no data: the dataset can't be loaded"
    ):
        choice("someone/something", split="test").requests()


def test_data_that_is_there_but_broken_is_named_by_its_row(tmp_path, data):
    (tmp_path / "broken.jsonl").write_text(json.dumps(ROWS[0]) + '\n{"q": \n')
    with pytest.raises(SFTError, match=r"broken\.jsonl, row 2: malformed JSON"):
        choice(str(tmp_path / "broken.jsonl"), how_to_get="download it").requests()
    others = write(tmp_path / "train.jsonl", [ROWS[0], {**ROWS[1], "answer": 9}])
    with pytest.raises(SFTError, match=r"train\.jsonl, row 2, answer: the answer 9 is out of range"):
        choice(data, shots=1, shots_path=others).requests()


def test_a_file_has_no_splits(data):
    assert len(choice(data, split="test", subset="main", revision="v1").requests()) == 8
    with pytest.raises(
        SFTError, match="a file has no split 'train'\n  → name the examples' file in `shots_path`"
    ):
        choice(data, split="test", shots=1, shots_split="train").requests()
    with pytest.raises(SFTError, match="only 7 other rows for examples; shots is 8"):
        choice(data, shots=8).requests()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"answer": None}, "which choice is right"),
        ({"labels": "labels"}, "both answer and labels are given"),
        (
            {"continuation": "{{ q }}", "metrics": ["acc_norm"]},
            "acc_norm compares what is scored by its length",
        ),
        ({"shots": -1}, "shots is -1"),
        ({"limit": 0}, "limit is 0"),
        ({"name": "a/b"}, "the name is 'a/b'"),
        ({"choices": "a b"}, "'a b' is no Jinja expression"),
    ],
)
def test_options_that_make_no_sense_are_refused_at_once(options, message):
    with pytest.raises(SFTError, match=message):
        choice("nowhere.jsonl", **options)


def test_what_training_data_is_compared_with(data):
    texts = choice(data, shots=1, description="Do.").texts()
    assert (texts[1].id, texts[1].text, texts[1].answer) == ("data/1", "Q: q1?\nA:", "y1")
    assert choice(data, compared="{{ q }}", shots=1).texts()[1].text == "q1?"
    assert len({each.id for each in texts}) == 8


# ---------------------------------------------------------------------------------------------- written answers


def written(path, prompt="{{ q }}", **options):
    return GenerationTask(path, prompt, **options)


def verdicts(evaluator, text, targets, tmp_path):
    evaluator.declared.path = write(tmp_path / "g.jsonl", [{"q": "q", "answer": targets}])
    (item,) = evaluator.requests()
    (record,) = evaluator.score([Answered(item, (Generated(text, 1),))]).records
    return record


def test_a_question_is_asked_once_with_stops(data):
    evaluator = written(
        data, "{{ q }} =", stop=["\n"], max_new_tokens=4, temperature=0.5, shots=1, shot_answer="!"
    )
    assert evaluator.requests()[1].requests == (Generate("q0? = !\n\nq1? =", ("\n",), 4, 0.5),)
    assert evaluator.requests()[2].target == "2"


@pytest.mark.parametrize(
    ("options", "text", "targets", "right"),
    [
        ({}, " a b\n", "a b", True),
        ({}, "a b", " a b\n", True),
        ({"strip": False}, " a b", "a b", False),
        ({"strip": False}, "a b", "a b\n", False),
        ({}, "A b", "a b", False),
        ({"ignore_case": True}, "A b", "a B", True),
        ({"ignore_punctuation": True}, "a, b!", "a b", True),
        ({"ignore_numbers": True}, "a1 b", "a b2", True),
        ({}, "7", 7, True),
        ({}, "b", ["a", "b"], True),
        ({}, "c", ["a", "b"], False),
        ({"ignore": ["x+", "^-"]}, "x-a", "a", True),  # in this order: only then is - at the beginning
        ({"ignore": ["^-", "x+"]}, "x-a", "a", False),
        ({"ignore": ["X"], "ignore_case": True}, "xa", "a", False),  # patterns go before case
    ],
)
def test_what_counts_as_the_same(tmp_path, options, text, targets, right):
    record = verdicts(written("", **options, name="g"), text, targets, tmp_path)
    assert record.metrics == {"exact_match": float(right)}


@pytest.mark.parametrize(
    ("pattern", "place", "text", "answer"),
    [
        (r"#### (\d+)", 0, "#### 12 #### 13", "12"),
        (r"#### (\d+)", -1, "#### 12 #### 13", "13"),
        (r"#### (\d+)", 1, "#### 12", "[invalid]"),
        (r"#### (\d+)", 0, "12", "[invalid]"),
        (r"(a)|(b )", -1, "a b ", "b"),
        (r"(x?)(y?)", 0, "z", "[invalid]"),
        (r"\w+", 0, " w.", "w"),
    ],
)
def test_where_an_answer_is_found(tmp_path, pattern, place, text, answer):
    evaluator = written("", extract={"way": Extraction(pattern, place)}, name="g")
    record = verdicts(evaluator, text, answer, tmp_path)
    assert (record.answer, record.metrics) == (answer, {"exact_match_way": 1.0})


def test_written_answers_need_a_target_and_patterns_have_to_be_some(tmp_path):
    path = write(tmp_path / "d.jsonl", [{"q": "q", "answer": None}])
    with pytest.raises(SFTError) as error:
        written(path).requests()
    assert str(error.value).startswith(f"{path}, row 1, answer: the answer is None")
    with pytest.raises(SFTError, match=r"extract.way: '\(' is no regular expression"):
        written(path, extract={"way": Extraction("(")})
