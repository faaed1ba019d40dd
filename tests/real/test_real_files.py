"""Every row of the real SFT files beside this checkout converts; skipped where they are not."""

from pathlib import Path

import pytest

from lightning_sft import Conversation
from lightning_sft.data.conversion import convert_rows, detect_format
from lightning_sft.data.sources import Source, read_rows
from lightning_sft.data.split import prompt_key, shared_prompts, split_indices
from lightning_sft_formats.alpaca import Alpaca
from lightning_sft_formats.messages import Messages
from lightning_sft_formats.prompt_completion import PromptCompletion
from lightning_sft_formats.raw_text import RawText
from lightning_sft_formats.sharegpt import ShareGPT

FOLDER = Path(__file__).parents[2].parent / "shared" / "real" / "sft"
FORMATS = {format.__name__: format() for format in (Alpaca, Messages, PromptCompletion, RawText, ShareGPT)}

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="the real SFT files are not beside this checkout")


def conversations(name):
    rows = list(read_rows(Source(str(FOLDER / name))))
    format = detect_format(rows[0][1], FORMATS, name)
    items = list(convert_rows(rows, format, type(format).__name__))
    assert all(isinstance(item, Conversation) for item in items)
    assert [item.meta for item in items] == [meta for meta, _ in rows]
    return type(format), items


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
