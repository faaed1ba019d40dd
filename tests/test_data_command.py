"""`lightning-sft data convert`: every row is written exactly, or refused, or counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from stranger import FORMAT_SOURCE, install, install_broken, install_format

from lightning_sft.__main__ import main

ALPACA = [{"instruction": f"say {n}", "input": "", "output": f"{n} ü"} for n in range(3)]
TOOLS = '[{"type":"function","function":{"name":"f","parameters":{"b":1.0,"a":null}}}]'


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The current folder; what is imported from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def write(name, rows):
    Path(name).write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return name


def rows(name):
    return [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]


def run(capsys, *argv):
    """What is printed, with its runs of spaces as one."""
    assert main(["data", "convert", *argv]) == 0, capsys.readouterr().err
    return " ".join(capsys.readouterr().out.split())


def mistake(capsys, *argv):
    assert main(["data", *argv]) == 2
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    assert out == ""
    assert not list(Path().glob("*.partial"))
    return err


@pytest.mark.parametrize("to", ["messages", "Messages", "lightning_sft_formats.messages.Messages"])
def test_rows_become_rows_of_the_other_format(capsys, to):
    out = run(capsys, write("a.jsonl", ALPACA), "b.jsonl", "--to", to)
    assert out.startswith("a.jsonl (Alpaca) → b.jsonl (Messages) rows read 3 conversations 3 rows written 3")
    assert "not kept" not in out
    assert "left out" not in out
    assert rows("b.jsonl")[2] == {
        "messages": [{"role": "user", "content": "say 2"}, {"role": "assistant", "content": "2 ü"}]
    }
    assert "ü" in Path("b.jsonl").read_text(encoding="utf-8")


def test_there_and_back_again(capsys):
    write("a.jsonl", ALPACA)
    for before, after, to in [("a", "b", "sharegpt"), ("b", "c", "prompt_completion"), ("c", "d", "alpaca")]:
        run(capsys, f"{before}.jsonl", f"{after}.jsonl", f"--to={to}")
    assert rows("d.jsonl") == ALPACA


def test_nested_tool_json_keeps_its_keys_their_order_and_its_numbers(capsys):
    call = '{"name": "f", "arguments": {"z": 1.0, "a": [1, null, "ü", {"k": 1e-07}]}}'
    turns = [("human", "a"), ("function_call", call), ("observation", "1"), ("gpt", "b")]
    row = {"conversations": [{"from": who, "value": text} for who, text in turns], "tools": TOOLS}
    run(capsys, write("a.jsonl", [row]), "b.jsonl", "--to", "messages")
    (written,) = rows("b.jsonl")
    assert json.dumps(written["tools"], separators=(",", ":")) == TOOLS
    function = written["messages"][1]["tool_calls"][0]["function"]
    assert function["arguments"] == '{"z": 1.0, "a": [1, null, "ü", {"k": 1e-07}]}'
    run(capsys, "b.jsonl", "c.jsonl", "--to", "sharegpt")
    assert rows("c.jsonl")[0]["conversations"] == row["conversations"]


def test_options_of_both_formats(capsys):
    write("a.jsonl", [{"q": "a", "r": "b"}])
    argv = ["--format", "alpaca", "--format.instruction", "q", "--format.output", "r"]
    run(capsys, "a.jsonl", "b.jsonl", *argv, "--to", "messages", "--to.messages", "chat")
    assert [m["content"] for m in rows("b.jsonl")[0]["chat"]] == ["a", "b"]


def test_what_is_not_kept_is_told(capsys):
    row = {"instruction": "a", "context": "", "response": "b", "category": "qa", "id": 1}
    write("a.jsonl", [row, row | {"score": 3, "category": ""}])
    out = run(capsys, "a.jsonl", "b.jsonl", "--to", "messages")
    assert "not kept 2 column 'id' not kept 1 column 'score' not kept 1 task" in out
    assert "column 'category'" not in out


def test_keys_within_messages_that_are_not_kept_are_told(capsys):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"x": {"y": 1}}}}
    messages = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}],
            "id": 1,
        },
        {"role": "assistant", "content": None, "tool_calls": [call | {"index": 0}], "refusal": None, "id": 2},
    ]
    write("a.jsonl", [{"messages": messages, "tools": [tool]}])
    out = run(capsys, "a.jsonl", "b.jsonl", "--to", "messages")
    told = out[out.index("not kept") :].split("not kept ")[1:]
    assert sorted(line.strip() for line in told) == [
        "1 key 'messages[].content[].cache_control'",
        "1 key 'messages[].refusal'",
        "1 key 'messages[].tool_calls[].index'",
        "2 key 'messages[].id'",
    ]
    assert rows("b.jsonl")[0]["tools"] == [tool]


def test_objects_that_a_template_writes_are_kept_with_all_their_keys(capsys):
    write("a.jsonl", [{"q": {"deep": {"x": 1}, "list": [{"z": 1}]}, "r": {"k": 1, "other": 2}}])
    argv = ["--format", "columns", "--format.assistant", "{{ r.k }}", "--format.user", "{{ q | tojson }}"]
    out = run(capsys, "a.jsonl", "b.jsonl", *argv, "--to", "messages")
    assert out.endswith("not kept 1 key 'r.other'")


def test_what_is_looked_at_to_find_the_format_is_not_kept_by_that(capsys, folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    source = (
        FORMAT_SOURCE.format(name="Curious")
        + "\n    def fits(self, row):\n        return row['id'] is None\n"
    )
    install(folder, "curious", {"lightning_sft.formats": {"Curious": "curious:Curious"}}, {"curious": source})
    write("a.jsonl", [ALPACA[0] | {"id": 1}])
    assert "not kept 1 column 'id'" in run(capsys, "a.jsonl", "b.jsonl", "--to", "messages")


@pytest.mark.parametrize("user", ["{{ q }}", "{{ row.q }}", "{{ row['q'] }}"])
def test_columns_that_a_template_reads_are_kept(capsys, user):
    write("a.jsonl", [{"q": "a", "r": "b", "id": 1}])
    argv = ["--format", "columns", "--format.assistant", "{{ r }}", "--format.user", user]
    out = run(capsys, "a.jsonl", "b.jsonl", *argv, "--to", "messages")
    assert ("not kept 1 column 'id'" in out, "column 'q'" in out) == (True, False)


BAD = [
    ALPACA[0],
    {"instruction": "a", "input": "", "output": ""},
    ALPACA[1] | {"system": "s"},
    {"instruction": "b", "input": "", "output": " "},
]


def test_a_row_that_can_not_be_read_is_refused_with_its_place_and_no_output(capsys):
    text = mistake(capsys, "convert", write("a.jsonl", BAD), "b.jsonl", "--to", "messages")
    assert "a.jsonl, row 2, key 'output': the response is empty" in text
    assert not Path("b.jsonl").exists()


CHAT = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **extra}]}
    for extra in ({}, {"reasoning": "c"}, {"weight": 0.5}, {"reasoning": "d"})
]


def test_a_row_that_can_not_be_written_is_refused_with_its_place_and_no_output(capsys):
    text = mistake(capsys, "convert", write("a.jsonl", CHAT), "b.jsonl", "--to", "alpaca")
    assert "a.jsonl, row 2, message 2: there is no place for the assistant message's reasoning" in text
    assert "--skip" in text
    assert not Path("b.jsonl").exists()


def test_rows_that_are_skipped_are_counted_by_reason(capsys):
    out = run(capsys, write("a.jsonl", BAD), "b.jsonl", "--to", "messages", "--skip")
    assert "rows read 4 conversations 2 rows written 2" in out
    assert "left out 2 the response is empty (first: a.jsonl, row 2, key 'output')" in out
    assert [len(row["messages"]) for row in rows("b.jsonl")] == [2, 3]
    out = run(capsys, write("a.jsonl", CHAT), "c.jsonl", "--to", "alpaca", "--skip")
    assert "rows read 4 conversations 4 rows written 1" in out
    assert "left out 2 there is no place for the assistant message's reasoning (first: a.jsonl, row 2" in out
    assert "left out 1 there is no place for the assistant message's weight (first: a.jsonl, row 3" in out


def test_nothing_left_to_write_is_an_error_with_the_reasons(capsys):
    text = mistake(capsys, "convert", write("a.jsonl", CHAT[1:]), "b.jsonl", "--to", "alpaca", "--skip")
    assert "nothing to write: there is no place for the assistant message's reasoning; " in text
    assert not Path("b.jsonl").exists()


def test_what_would_read_back_as_something_else_is_refused(capsys):
    write("a.jsonl", [{"messages": [{"role": "system", "content": " "}, *CHAT[0]["messages"]]}])
    text = mistake(capsys, "convert", "a.jsonl", "b.jsonl", "--to", "alpaca")
    assert "a.jsonl, row 1: the format Alpaca would not read back the same conversation" in text


def test_what_the_format_would_not_read_back_at_all_is_refused(capsys):
    user, answer = CHAT[0]["messages"]
    write("a.jsonl", [{"messages": [user, answer | {"weight": 1}, user]}])
    text = mistake(capsys, "convert", "a.jsonl", "b.jsonl", "--to", "prompt_completion")
    assert (
        "a.jsonl, row 1: the format PromptCompletion doesn't take this conversation: there is nothing to"
        in text
    )


def oasst(name, parent, role, **fields):
    return {"message_id": name, "parent_id": parent, "text": name, "role": role, "user_id": "u", **fields}


def test_messages_of_trees_are_gathered(capsys):
    flat = [
        oasst("p", None, "prompter", lang="en"),
        oasst("a", "p", "assistant", rank=1, lang="en"),
        oasst("b", "p", "assistant", rank=0, lang="en"),
        oasst("q", None, "prompter", lang="de"),
    ]
    out = run(capsys, write("a.jsonl", flat), "b.jsonl", "--to", "messages")
    assert "rows read 4 gathered into 2 conversations 2 rows written 2 rows without conversation 1" in out
    assert "not kept 4 column 'user_id' not kept 2 language" in out
    assert [[m["content"] for m in row["messages"]] for row in rows("b.jsonl")] == [["p", "b"], ["p", "a"]]


def test_an_output_that_is_there_is_kept_unless_asked(capsys):
    write("a.jsonl", ALPACA)
    Path("b.jsonl").write_text("mine")
    assert "there already" in mistake(capsys, "convert", "a.jsonl", "b.jsonl", "--to", "messages")
    assert Path("b.jsonl").read_text() == "mine"
    run(capsys, "a.jsonl", "b.jsonl", "--to", "messages", "--overwrite")
    assert len(rows("b.jsonl")) == 3


def test_a_file_may_be_converted_into_itself(capsys):
    run(capsys, write("a.jsonl", ALPACA), "a.jsonl", "--to", "messages", "--overwrite")
    assert len(rows("a.jsonl")) == 3


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["b.json", "--to", "messages"], ".jsonl"),
        (["b.jsonl"], "--to must be given"),
        (["b.jsonl", "--to", "lima"], "format Lima (lightning-sft 0.1.0) can be read, not written"),
        (["b.jsonl", "--to", "mesages"], "did you mean Messages?"),
        (["b.jsonl", "--to", "messages", "--format", "alpca"], "did you mean Alpaca?"),
        (["b.jsonl", "--to", "messages", "--limit", "0"], "limit is 0"),
        (["b.jsonl", "--to", "messages", "--splt", "train"], "did you mean split?"),
    ],
)
def test_mistakes_are_told(capsys, argv, said):
    assert said in mistake(capsys, "convert", write("a.jsonl", ALPACA), *argv)


def test_an_unknown_command_of_data_is_told(capsys):
    assert "did you mean convert?" in mistake(capsys, "convrt")
    assert main(["data"]) == 0
    assert "convert" in capsys.readouterr().out


def test_the_formats_that_can_be_written_are_listed_without_a_broken_one(capsys, folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    install_broken(folder)
    install_format(folder, "stranger-formats", "Odd", "odd_formats")
    text = mistake(capsys, "convert", write("a.jsonl", ALPACA), "b.jsonl")
    assert text.endswith("Alpaca, Messages, PromptCompletion, RawText, Segments, ShareGPT\n")


def test_embedded_data_converts(capsys):
    out = run(capsys, "tiny:train", "b.jsonl", "--to", "sharegpt", "--limit", "5")
    assert "rows read 5" in out


def test_it_needs_no_torch(folder):
    write("a.jsonl", ALPACA)
    code = """if True:
        import sys
        from lightning_sft.__main__ import main
        assert main(["data", "convert", "a.jsonl", "b.jsonl", "--to", "messages"]) == 0
        heavy = {'torch', 'lightning', 'transformers', 'peft', 'datasets'}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", code], env=os.environ, check=True, stdout=subprocess.DEVNULL)
