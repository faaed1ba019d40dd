"""Formats named and configured in the YAML of a run."""

import json

import yaml

from lightning_sft.__main__ import main

DATA = {
    "segments.jsonl": [{"segments": [["Q: what ", False], [f"A: {n}", True]]} for n in range(3)],
    "trees.jsonl": [
        {"message_id": f"{name}{n}", "parent_id": parent and f"{parent}{n}", "text": f"say {n}", "role": role}
        for n in range(2)
        for name, parent, role in (("p", None, "prompter"), ("a", "p", "assistant"), ("b", "p", "assistant"))
    ],
    "columns.jsonl": [{"q": f"why {n}", "a": "so"} for n in range(3)],
    "flan.jsonl": [{"task_name": "t", "x": f"x {n}", "y": "so"} for n in range(3)],
}
TEMPLATES = [{"inputs": "{{ x }}?", "targets": "{{ y }}"}, {"inputs": "So {{ x }}?", "targets": "{{ y }}!"}]
TRAIN = [
    {"path": "segments.jsonl", "format": "Segments"},
    {"path": "trees.jsonl", "format": {"class_path": "OASST", "init_args": {"max_depth": 2}}},
    {
        "path": "columns.jsonl",
        "format": {"class_path": "Columns", "init_args": {"assistant": "{{ a }}", "user": "{{ q }}"}},
    },
    {
        "path": "flan.jsonl",
        "format": {"class_path": "Flan", "init_args": {"use": "all", "templates": {"t": TEMPLATES}}},
    },
]


def test_a_run_over_sources_of_several_formats(tmp_path, monkeypatch, model_folder):
    monkeypatch.chdir(tmp_path)
    for name, rows in DATA.items():
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    config = {
        "model": {"base": str(model_folder("llama"))},
        "data": {"train": TRAIN, "batch_size": 4},
        "trainer": {"max_steps": 1},
    }
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", "my.yaml", "--trainer.default_root_dir", "run"]) == 0
    ledgers = json.loads((tmp_path / "run" / "ledger.json").read_text())["train"]["sources"]
    assert [(ledger["format"].split()[1], ledger["rows"], ledger["examples"]) for ledger in ledgers] == [
        ("Segments", 3, 3),
        ("OASST", 6, 4),
        ("Columns", 3, 3),
        ("Flan", 3, 6),
    ]
