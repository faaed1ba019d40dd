"""Every row of the real SFT files beside this checkout converts, renders and re-reads, or is refused."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_sft import Conversation, Meta, Renderer, SFTError
from lightning_sft.__main__ import main
from lightning_sft.data.conversion import convert_rows, format_of
from lightning_sft.data.sources import Source, read_rows
from lightning_sft.data.split import prompt_key, shared_prompts, split_indices
from lightning_sft_formats.alpaca import Alpaca
from lightning_sft_formats.messages import Messages
from lightning_sft_formats.sharegpt import ShareGPT

FOLDER = Path(__file__).parents[2].parent / "shared" / "real" / "sft"
MODELS = FOLDER.parent
FILES = {
    "alpaca_en_demo.json": 999,
    "identity.json": 91,
    "glaive_toolcall_en_demo.json": 300,
    "messages_segments_demo.jsonl": 500,
    "reason_tool_use_demo_50.jsonl": 50,
}

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the real SFT files are not beside this checkout")


def read(path):
    """The format that is found for a file, the rows and their conversations."""
    source = Source(str(path))
    rows = [row for _, row in read_rows(source)]
    format, placed = format_of(source, read_rows(source))
    return type(format), rows, list(convert_rows(placed, format, type(format).__name__))


def conversations(name):
    format, rows, items = read(FOLDER / name)
    assert all(isinstance(item, Conversation) for item in items)
    assert len(items) == len(rows)
    assert len({item.meta.place for item in items}) == len(rows)
    return format, items


@pytest.mark.parametrize(
    ("name", "format", "rows", "messages", "calls", "tools"),
    [
        ("alpaca_en_demo.json", Alpaca, 999, 1998, 0, 0),
        ("identity.json", Alpaca, 91, 182, 0, 0),
        ("glaive_toolcall_en_demo.json", ShareGPT, 300, 1914, 211, 219),
        ("messages_segments_demo.jsonl", Messages, 500, 1000, 0, 0),
        ("reason_tool_use_demo_50.jsonl", Messages, 50, 274, 68, 121),
    ],
)
def test_every_row_converts(name, format, rows, messages, calls, tools):
    detected, items = conversations(name)
    assert detected is format
    assert len(items) == rows
    assert sum(len(item.messages) for item in items) == messages
    assert sum(len(m.tool_calls) for item in items for m in item.messages) == calls
    assert sum(len(item.tools) for item in items) == tools


def test_weights_of_the_segments_file_are_those_of_its_messages():
    _, items = conversations("messages_segments_demo.jsonl")
    assert {(m.role, m.weight) for item in items for m in item.messages} == {
        ("user", 0.0),
        ("assistant", 1.0),
    }


def test_every_answer_of_the_reasoning_file_has_its_reasoning():
    _, items = conversations("reason_tool_use_demo_50.jsonl")
    answers = [m for item in items for m in item.messages if m.role == "assistant"]
    assert len(answers) == 112
    assert all(m.reasoning for m in answers)
    assert sum(bool(m.tool_calls) for m in answers) == 53
    assert not any(m.content and m.tool_calls for m in answers)


def test_a_split_of_real_rows_shares_no_prompt():
    _, items = conversations("alpaca_en_demo.json")
    keys = [prompt_key(item) for item in items]
    train, held_out = split_indices(keys, validation=0.1, seed=0)
    assert len(held_out) == 100
    assert len(set(keys)) < len(keys)
    assert shared_prompts([keys[i] for i in train], [keys[i] for i in held_out]) == 0


@pytest.mark.parametrize(
    ("tokenizer", "template", "refused"),
    [
        ("models/stories260k", "plain", {}),
        ("tokenizers/gpt2", "plain", {}),
        (
            "tokenizers/phi-3-mini",  # whose template knows no tools and no reasoning
            None,
            {"glaive_toolcall_en_demo.json": 191, "reason_tool_use_demo_50.jsonl": 50},
        ),
    ],
)
def test_every_row_renders_or_is_refused_with_its_place_and_reason(tokenizer, template, refused):
    from transformers import AutoTokenizer

    renderer = Renderer(AutoTokenizer.from_pretrained(MODELS / tokenizer), template)
    reasons = Counter()
    for name, rows in FILES.items():
        _, items = conversations(name)
        assert len(items) == rows
        for item in items:
            try:
                example = renderer.render(item)
            except SFTError as error:
                reasons[name, error.where.startswith(str(item.meta)) and "leaves out" in error.what] += 1
            else:
                assert example.meta.place == item.meta.place
                assert len(example.input_ids) == len(example.weights)
                assert (example.weights > 0).any()
    assert reasons == {(name, True): count for name, count in refused.items()}


NO_TOOLS = "there is no place for the conversation's tools"
NO_REASONING = "there is no place for the assistant message's reasoning"
SEVERAL = "more than one assistant turn is trained, only the last can be the completion"
NO_TEXT = "a conversation becomes text only through a model's chat template"


@pytest.mark.parametrize(
    ("name", "to", "refused"),
    [
        *((name, "messages", {}) for name in FILES),
        ("alpaca_en_demo.json", "sharegpt", {}),
        ("alpaca_en_demo.json", "alpaca", {}),
        ("alpaca_en_demo.json", "prompt_completion", {}),
        ("alpaca_en_demo.json", "segments", {NO_TEXT: 999}),
        ("identity.json", "sharegpt", {}),
        ("identity.json", "alpaca", {}),
        ("identity.json", "prompt_completion", {}),
        ("identity.json", "raw_text", {NO_TEXT: 91}),
        ("glaive_toolcall_en_demo.json", "sharegpt", {}),
        ("glaive_toolcall_en_demo.json", "alpaca", {NO_TOOLS: 191}),
        ("glaive_toolcall_en_demo.json", "prompt_completion", {SEVERAL: 261}),
        ("messages_segments_demo.jsonl", "sharegpt", {}),
        ("messages_segments_demo.jsonl", "alpaca", {"there is no place for the user message's weight": 500}),
        ("messages_segments_demo.jsonl", "prompt_completion", {}),
        ("reason_tool_use_demo_50.jsonl", "sharegpt", {NO_REASONING: 50}),
        ("reason_tool_use_demo_50.jsonl", "alpaca", {NO_TOOLS: 48, NO_REASONING: 2}),
        ("reason_tool_use_demo_50.jsonl", "prompt_completion", {SEVERAL: 22}),
    ],
)
def test_every_row_is_written_and_read_back_or_refused(name, to, refused, tmp_path, capsys):
    path = tmp_path / "out.jsonl"
    status = main(["data", "convert", str(FOLDER / name), str(path), "--to", to, "--skip"])
    out, err = capsys.readouterr()
    kept = FILES[name] - sum(refused.values())
    if kept == 0:
        assert status == 2
        assert all(reason in err for reason in refused)
        assert not path.exists()
        return
    report = [(line[:26].strip(), int(line[26:35]), line[37:]) for line in out.splitlines()[1:]]
    assert report[:3] == [
        ("rows read", FILES[name], ""),
        ("conversations", FILES[name], ""),
        ("rows written", kept, ""),
    ]
    assert {what.partition(" (first:")[0]: n for kind, n, what in report if kind == "left out"} == refused
    _, items = conversations(name)
    back = iter(read(path)[2])
    found = next(back)
    for item in items:  # what was written is there in its order
        if found is not None and replace(item, meta=Meta()) == replace(found, meta=Meta()):
            found = next(back, None)
    assert found is None


def test_tools_and_calls_survive_byte_for_byte():
    _, rows, items = read(FOLDER / "glaive_toolcall_en_demo.json")
    written = [ShareGPT().to_row(item) for item in items]
    assert [row["conversations"] for row in written] == [row["conversations"] for row in rows]
    assert [row.get("tools", "[]") for row in written] == [row["tools"] for row in rows]
    _, rows, items = read(FOLDER / "reason_tool_use_demo_50.jsonl")
    tools = [json.dumps(item.tools, ensure_ascii=False) for item in items]
    assert tools == [row["tools"] for row in rows]
    calls = [call for item in items for message in item.messages for call in message.tool_calls]
    parts = [part for row in rows for message in row["messages"] for part in message["content"]]
    given = [part["value"] for part in parts if part["type"] == "tool_call"]
    assert [
        json.dumps({"name": c.name, "arguments": c.arguments}, ensure_ascii=False) for c in calls
    ] == given
    assert len(given) == 68
