"""The evaluators' data: every kind of file, and errors that name the row."""

from __future__ import annotations

import csv
import json

import pytest

from lightning_sft import Answered, Generated, Likelihood, LogLikelihood, Message, SFTError
from lightning_sft_evaluators.bbh import BBH
from lightning_sft_evaluators.mmlu import MMLU
from lightning_sft_evaluators.perplexity import Perplexity
from lightning_sft_evaluators.prompts import shares

QUESTIONS = [(f"What is {n}? ", [f"{n}", "no, really", " c", "d"], n % 4) for n in range(6)]


def write(folder, kind, subjects=("chess", "go"), questions=QUESTIONS):
    """The same questions in a kind of file; `test` and the first two as `dev`."""
    for split, chosen in (("dev", questions[:2]), ("test", questions)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        for subject in subjects:
            stem = folder / split / f"{subject}_{split}"
            if kind.startswith("csv"):
                with stem.with_suffix(".csv").open("w", newline="") as file:
                    writer = csv.writer(file)
                    if kind == "csv-header":
                        writer.writerow(["question", "choice0", "choice1", "choice2", "choice3", "answer"])
                    for text, choices, answer in chosen:
                        writer.writerow([text, *choices, answer if kind == "csv-header" else "ABCD"[answer]])
                continue
            rows = [{"question": q, "choices": c, "answer": a, "subject": subject} for q, c, a in chosen]
            if kind == "jsonl":
                stem.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            else:
                import pyarrow as pa
                import pyarrow.parquet as pq

                pq.write_table(pa.Table.from_pylist(rows), stem.with_suffix(".parquet"))
    return str(folder)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_every_kind_of_file_asks_the_same(tmp_path, kind):
    expected = MMLU(write(tmp_path / "a", "csv-header"), shots=2).requests()
    assert MMLU(write(tmp_path / "b", kind), shots=2).requests() == expected
    assert [item.task for item in expected] == ["chess"] * 6 + ["go"] * 6
    assert [item.target for item in expected[:6]] == ["A", "B", "C", "D", "A", "B"]


def test_one_file_with_a_subject_column(tmp_path):
    write(tmp_path, "jsonl")
    for split in ("dev", "test"):
        files = sorted((tmp_path / split).iterdir())
        (tmp_path / f"{split}.jsonl").write_text("".join(file.read_text() for file in files))
    one = MMLU(str(tmp_path / "test.jsonl"), dev=str(tmp_path / "dev.jsonl"), shots=1).requests()
    assert one == MMLU(str(tmp_path), shots=1).requests()


def test_copies_of_the_hub_s_folders(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = {
        subject: [{"question": q, "choices": c, "answer": a, "subject": subject} for q, c, a in QUESTIONS]
        for subject in ("chess", "go")
    }
    for folder, kept in (("mmlu", True), ("redux", False)):
        for name, found in (rows | ({"all": [*rows["chess"], *rows["go"]]} if kept else {})).items():
            (tmp_path / folder / name).mkdir(parents=True)
            table = pa.Table.from_pylist(found)
            table = table if kept else table.drop_columns("subject")
            for split in ("dev", "test"):
                pq.write_table(table, tmp_path / folder / name / f"{split}-00000-of-00001.parquet")
    expected = MMLU(write(tmp_path / "a", "csv"), shots=2).requests()
    for folder in (
        "mmlu",
        "redux",
    ):  # cais/mmlu's has all questions once more; mmlu-redux names them by folder only
        assert MMLU(str(tmp_path / folder), shots=2).requests() == expected


def test_the_prompt_is_the_harness_s(tmp_path):
    item = MMLU(write(tmp_path, "csv"), shots=1, subjects=["go"]).requests()[2]
    assert item.requests[0].context == (
        "The following are multiple choice questions (with answers) about go.\n\n"
        "What is 0?\nA. 0\nB. no, really\nC.  c\nD. d\nAnswer: A\n\n"
        "What is 2?\nA. 2\nB. no, really\nC.  c\nD. d\nAnswer:"
    )
    assert [each.continuation for each in item.requests] == [" A", " B", " C", " D"]


def test_a_chat_has_turns_or_one_turn(tmp_path):
    path = write(tmp_path, "csv")
    many = MMLU(path, shots=1, chat=True).requests()[1].requests[0]
    assert [message.role for message in many.context] == ["system", "user", "assistant", "user"]
    assert many.context[2] == Message("assistant", "A")
    assert many.continuation == "A"
    one = MMLU(path, shots=1, chat=True, turns=False).requests()[1].requests[0]
    assert [message.role for message in one.context] == ["system", "user"]
    assert one.context[1].content == many.context[1].content + " A\n\n" + many.context[3].content


def test_styles(tmp_path):
    path = write(tmp_path, "csv")
    continuation = MMLU(path, shots=0, style="continuation", limit=1)
    item = continuation.requests()[0]
    assert item.requests[1] == LogLikelihood(
        "The following are questions (with answers) about chess.\n\nQuestion: What is 0?\nAnswer:",
        " no, really",
    )
    likelihoods = [Likelihood(value, 1, False) for value in (-2.0, -9.0, -1.9, -3.0)]
    (record,) = continuation.score([Answered(item, tuple(likelihoods))]).records
    assert record.metrics == {"acc": 0.0, "acc_norm": 0.0}  # c is likelier; per character it is "no, really"
    row = {"question": "q", "choices": ["a", "bbb", "c", "d"], "answer": 1, "subject": "go"}
    (tmp_path / "one.jsonl").write_text(json.dumps(row) + "\n")
    for chat in (False, True):  # without a chat there is a space before each choice, which doesn't count
        asker = MMLU(str(tmp_path / "one.jsonl"), shots=0, style="continuation", chat=chat)
        responses = tuple(Likelihood(value, 1, False) for value in (-1.0, -2.5, -9.0, -9.0))
        (record,) = asker.score([Answered(asker.requests()[0], responses)]).records
        assert record.metrics == {"acc": 0.0, "acc_norm": 1.0}
    generative = MMLU(path, shots=0, style="generative", limit=1)
    (record,) = generative.score([Answered(generative.requests()[0], (Generated(" a.", 3),))]).records
    assert record.metrics == {"acc": 1.0}


def test_limits_are_seeded_and_stratified(tmp_path):
    path = write(tmp_path, "csv")
    first = MMLU(path, shots=0, limit=2).requests()
    assert [item.number for item in first] == [0, 1, 0, 1]
    drawn = [item.number for item in MMLU(path, shots=0, limit=3, seed=1).requests()]
    assert drawn == [item.number for item in MMLU(path, shots=0, limit=3, seed=1).requests()]
    assert drawn != [item.number for item in MMLU(path, shots=0, limit=3, seed=2).requests()]
    assert [item.task for item in MMLU(path, shots=0, total=5).requests()].count("chess") == 3
    assert shares([100, 50, 1], 15) == [10, 5, 0]


def test_pro_and_redux_by_options(tmp_path):
    rows = [
        {
            "question": "q",
            "options": [str(n) for n in range(10)],
            "answer": "J",
            "category": "law",
            "ok": "yes",
        },
        {"question": "r", "options": ["1", "2", "3"], "answer": "B", "category": "law", "ok": "no"},
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = MMLU(str(tmp_path / "test.jsonl"), shots=0, choices=None).requests()
    assert [(item.target, len(item.requests)) for item in items] == [("J", 10), ("B", 3)]
    kept = MMLU(str(tmp_path / "test.jsonl"), shots=0, choices=10, keep={"ok": "yes"}).requests()
    assert len(kept) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "q"}, "row 2: no column question"),
        ({"question": "q", "answer": 0, "subject": "go"}, "row 2: no column choices"),
        ({"question": "q", "choices": ["a"] * 3, "answer": 0}, "row 2: the question has 3 choices, not 4"),
        ({"question": "q", "choices": ["a"] * 4, "answer": 4}, "row 2: the answer 4 is out of range"),
        ({"question": "q", "choices": ["a"] * 4, "answer": "E"}, "row 2: the answer 'E' is out of range"),
        ({"question": "q", "choices": ["a"] * 4, "answer": "none"}, "row 2: the answer is 'none'"),
        ({"question": "q", "choices": ["a"] * 4, "answer": "²"}, "row 2: the answer is '²'"),
        ({"question": "q", "choices": ["a"] * 4}, "row 2: no column answer"),
        ({"question": "q", "choices": ["a", "b", None, "d"], "answer": 0}, "row 2: C is null"),
        ({"question": None, "choices": ["a"] * 4, "answer": 0}, "row 2: question is null"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, message):
    good = {"question": "q", "choices": ["a", "b", "c", "d"], "answer": 3, "subject": "go"}
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in (good, {"subject": "go", **row})))
    with pytest.raises(SFTError, match=message) as error:
        MMLU(str(path), shots=0).requests()
    assert str(path) in str(error.value)


def test_a_file_without_rows_is_named(tmp_path):
    path = tmp_path / "test.csv"
    path.write_text("")
    with pytest.raises(SFTError, match=r"test.csv: there are no test questions in it"):
        MMLU(str(path), shots=0).requests()


def test_missing_data_names_the_file_and_how_to_get_it(tmp_path):
    path = write(tmp_path, "csv", subjects=("anatomy", "virology"))
    with pytest.raises(SFTError, match=r"test/abstract_algebra_test\.csv is not there") as error:
        MMLU(path, shots=0).requests()
    assert "cais/mmlu" in str(error.value)
    assert len(MMLU(path, shots=0, subjects=["virology"]).requests()) == 6
    with pytest.raises(SFTError, match="only 2 dev questions of anatomy; shots is 3"):
        MMLU(path, shots=3, subjects=["anatomy"]).requests()
    with pytest.raises(SFTError, match=r"nowhere.*is not there"):
        MMLU(str(tmp_path / "nowhere.csv"), shots=0).requests()
    (tmp_path / "empty").mkdir()
    with pytest.raises(SFTError, match=r"empty/test/<subject>_test\.csv is not there"):
        MMLU(str(tmp_path / "empty"), shots=0).requests()


def write_bbh(folder):
    (folder / "bbh").mkdir()
    (folder / "cot-prompts").mkdir()
    shots = "\n\n".join(
        f"Q: {n}?\nA: Let's think step by step. It is {n}. So the answer is {n}." for n in range(3)
    )
    (folder / "cot-prompts/navigate.txt").write_text(f"canary\n-----\nFind the way.\n\n{shots}")
    examples = [{"input": "7?", "target": "Yes"}, {"input": "8?", "target": "No"}]
    (folder / "bbh/navigate.json").write_text(json.dumps({"examples": examples}))
    return str(folder)


def test_bbh_prompts(tmp_path):
    path = write_bbh(tmp_path)
    (first, _) = BBH(path, tasks=["navigate"], shots=1).requests()
    assert first.requests[0].prompt == (
        "Find the way.\n\nQ: 0?\nA: Let's think step by step.\nIt is 0. So the answer is 0.\n\n"
        "Q: 7?\nA: Let's think step by step.\n"
    )
    assert first.requests[0].stop == ("</s>", "Q", "\n\n")
    (first, _) = BBH(path, tasks=["navigate"], shots=0).requests()
    assert first.requests[0].stop == ("</s>", "Q:", "<|im_end|>")
    (first, _) = BBH(path, tasks=["navigate"], shots=2, cot=False).requests()
    assert first.requests[0].prompt == "Find the way.\n\nQ: 0?\nA: 0\n\nQ: 1?\nA: 1\n\nQ: 7?\nA:"


def test_bbh_errors_name_the_file(tmp_path):
    path = write_bbh(tmp_path)
    with pytest.raises(SFTError, match=r"boolean_expressions\.txt is not there"):
        BBH(path).requests()
    (tmp_path / "bbh/navigate.json").write_text(json.dumps({"examples": [{"input": "7?"}]}))
    with pytest.raises(SFTError, match=r"navigate\.json, example 1: .*needs `input` and `target`"):
        BBH(path, tasks=["navigate"]).requests()
    with pytest.raises(SFTError, match="no task is named 'nonsense'"):
        BBH(path, tasks=["nonsense"])


def test_perplexity_of_no_texts_is_refused():
    with pytest.raises(SFTError, match=r"Perplexity\.limit: limit is -1"):
        Perplexity("tiny:general", limit=-1, seed=3)


def test_perplexity_names_the_row_without_text(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "a b"}\n{"body": "c"}\n')
    with pytest.raises(SFTError, match=r"t\.jsonl, row 2: no text in column 'text'"):
        Perplexity(str(tmp_path / "t.jsonl")).requests()


def test_perplexity_weighs_texts_by_their_size(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "a b"}\n{"text": "ç"}\n', encoding="utf-8")
    perplexity = Perplexity(str(tmp_path / "t.jsonl"))
    first, second = perplexity.requests()
    answered = [
        Answered(first, (Likelihood(-6.0, 2, False),)),
        Answered(second, (Likelihood(-2.0, 1, False),)),
    ]
    scores = {score.metric: score.value for score in perplexity.score(answered).scores}
    from math import exp, log

    assert scores["bits_per_byte"] == pytest.approx(8 / 5 / log(2))
    assert scores["byte_perplexity"] == pytest.approx(exp(8 / 5))
    assert scores["word_perplexity"] == pytest.approx(exp(8 / 3))
    assert scores["token_perplexity"] == pytest.approx(exp(8 / 3))
