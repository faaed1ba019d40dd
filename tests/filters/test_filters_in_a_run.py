"""Filters named and configured in the YAML of a run: what is trained on, told, written and shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from lightning_sft.__main__ import main

ROWS = [
    ("1?", "one"),
    ("2?", "TODO"),
    ("3?", "three"),
    ("1?", "one"),
    ("4?", "four"),
    ("5?", "five"),
    ("6?", ""),
]
FILTERS = [
    "Duplicates",
    {"class_path": "Pattern", "init_args": {"drop": ["TODO"]}},
    {"class_path": "Length", "init_args": {"most": 1}},
]


@pytest.fixture
def config(tmp_path, monkeypatch, model_folder) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"{asked} {answered}".strip()} for asked, answered in ROWS]
    Path("texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"instruction": asked, "output": answered} for asked, answered in ROWS[:-1]]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    written = {
        "model": {"base": str(model_folder("llama"))},
        "data": {"train": ["rows.jsonl"], "val": ["rows.jsonl"], "filters": FILTERS, "batch_size": 2},
        "trainer": {"max_steps": 1, "accelerator": "cpu"},
    }
    path = Path("my.yaml")
    path.write_text(yaml.safe_dump(written))
    return path


def test_a_run_trains_on_what_is_left_and_tells_what_was_dropped(config, capsys):
    for folder in ("run", "again"):
        assert main(["fit", "--config", "my.yaml", "--trainer.default_root_dir", folder]) == 0
        out = capsys.readouterr().out
        ledger = json.loads(Path(folder, "ledger.json").read_text())
        (train,), (val,) = ledger["train"]["sources"], ledger["val"]["sources"]
        assert ledger["train"]["from_cache"] == (folder == "again")
        assert train["filtered"] == {
            "Duplicates": {"the same conversation as an earlier one": 1},
            "Pattern": {"'TODO' is in it": 1},
        }
        assert (train["rows"], train["conversations"], train["rendered"], train["examples"]) == (6, 6, 4, 4)
        assert (val["filtered"], val["examples"]) == ({}, 6)
        assert "filtered 1 conversations (Pattern): 'TODO' is in it" in out
        assert "fil-" in out
        listed = [json.loads(line) for line in Path(folder, "filtered.jsonl").read_text().splitlines()]
        assert [(each["row"], each["filter"], each["detail"]) for each in listed] == [
            (2, "Pattern", "TODO"),
            (4, "Duplicates", "rows.jsonl, row 1"),
        ]
        assert (
            "Duplicates left out 1 conversations of rows.jsonl" in Path(folder, "model/README.md").read_text()
        )


def test_what_is_held_out_of_the_training_data_is_filtered_before(config):
    data = yaml.safe_load(config.read_text()) | {}
    data["data"] = {"train": ["rows.jsonl"], "val_split": 1, "filters": FILTERS, "batch_size": 2}
    config.write_text(yaml.safe_dump(data))
    assert main(["fit", "--config", "my.yaml", "--trainer.default_root_dir", "run"]) == 0
    ledger = json.loads(Path("run", "ledger.json").read_text())
    assert (ledger["train"]["examples"], ledger["val"]["examples"]) == (3, 1)


def test_without_filters_nothing_is_listed(config):
    assert (
        main(["fit", "--config", "my.yaml", "--data.filters=null", "--trainer.default_root_dir", "run"]) == 0
    )
    assert not Path("run", "filtered.jsonl").exists()


def preview(capsys, *argv) -> list[dict[str, object]]:
    assert main(["preview", "--config", "my.yaml", "--json", *argv]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_preview_shows_what_is_filtered_and_why(config, capsys):
    shown = preview(capsys, "-n", "6")
    assert [each.get("filtered") for each in shown] == [
        None,
        "Pattern: 'TODO' is in it: TODO",
        None,
        "Duplicates: the same conversation as an earlier one: rows.jsonl, row 1",
        None,
        None,
    ]
    tokens = shown[1]["tokens"]
    assert not any(token["weight"] for token in tokens)
    assert {token["reason"] for token in tokens} == {"context", "not trained: filtered"}
    assert [each.get("filtered") for each in preview(capsys, "-n", "6", "--part", "val")] == [None] * 6


def test_a_preview_of_some_rows_judges_by_those_before_them(config, capsys):
    (fourth,) = preview(capsys, "--rows", "4")
    assert fourth["filtered"].startswith("Duplicates")
    twice = ["--data.train=[{path: rows.jsonl}, {path: texts.jsonl, limit: 4}, {path: rows.jsonl}]"]
    shown = preview(capsys, "-n", "1", *twice)
    assert [(each["source"], each["row"], "filtered" in each) for each in shown] == [
        ("rows.jsonl", 1, False),
        ("texts.jsonl", 1, True),
        ("rows.jsonl", 1, True),
    ]
    assert shown[1]["filtered"] == "Length: more than 1 words in the response (score 2)"


def test_the_terminal_and_the_page_say_so_too(config, capsys):
    assert main(["preview", "--config", "my.yaml", "--rows", "2"]) == 0
    out = capsys.readouterr().out
    assert "rows.jsonl, row 2: filtered" in out
    assert "filtered, so nothing of this is trained: Pattern: 'TODO' is in it: TODO" in out
    assert main(["preview", "--config", "my.yaml", "--rows", "2", "--html", "page.html"]) == 0
    assert (
        "filtered, so nothing of this is trained: Pattern: &#x27;TODO&#x27;" in Path("page.html").read_text()
    )


def test_what_is_filtered_is_shown_though_it_could_not_be_rendered(config, capsys):
    Path("talks.jsonl").write_text(json.dumps({"messages": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "TODO"},
    ]}) + "\n")  # fmt: skip
    (shown,) = preview(capsys, "--data.train=talks.jsonl")
    assert shown["filtered"].startswith("Pattern")
    Path("no.jinja").write_text("{{ raise_exception('no') }}")
    (shown,) = preview(capsys, "--data.train=talks.jsonl", "--model.chat_template=no.jinja")
    assert (shown["filtered"].startswith("Pattern"), shown["tokens"], "error" in shown) == (True, [], False)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("[Lenght]", "did you mean Length?"),
        ("[{class_path: Length, init_args: {leest: 3}}]", "did you mean least?"),
        ("[{class_path: Pattern, init_args: {drop: ['(']}}]", "'(' is no regular expression"),
        ("[{class_path: Refusals, init_args: {phrases: none.txt}}]", "none.txt"),
    ],
)
def test_mistakes_are_told_before_anything_is_read(given, said, config, capsys):
    assert main(["fit", "--config", "my.yaml", f"--data.filters={given}"]) == 2
    err = capsys.readouterr().err.partition("error: ")[2]
    assert said in err
    assert "Traceback" not in err
    assert not Path("runs").exists() or not list(Path("runs").iterdir())


def test_filters_and_their_options_are_in_the_help(capsys):
    assert main(["plugins", "NearDuplicates"]) == 0
    out = capsys.readouterr().out
    assert "data:\n    filters: [NearDuplicates]" in out
    assert "--threshold THRESHOLD" in out
