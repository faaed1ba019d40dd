import json

import pytest

from lightning_sft import Message, PartWeight, SFTError, ToolCall
from lightning_sft_formats.sharegpt import ShareGPT


def turns(*pairs):
    return [{"from": role, "value": value} for role, value in pairs]


def convert(*pairs, **columns):
    (conversation,) = ShareGPT().convert({"conversations": turns(*pairs), **columns})
    return conversation


@pytest.mark.parametrize(
    ("speaker", "role"),
    [
        ("human", "user"),
        ("user", "user"),
        ("gpt", "assistant"),
        ("chatgpt", "assistant"),
        ("bing", "assistant"),
        ("model", "assistant"),
        ("system", "system"),
        ("observation", "tool"),
        ("tool", "tool"),
        ("function_response", "tool"),
    ],
)
def test_speakers_become_roles(speaker, role):
    messages = convert((speaker, "text"), ("gpt", "answer")).messages
    assert messages == (Message(role, "text"), Message("assistant", "answer"))


def test_a_function_call_is_an_assistant_turn_with_its_arguments_in_their_order():
    call = '{"name": "search", "arguments": {"z": 1, "a": [2, {"k": null}]}}'
    messages = convert(
        ("human", "go"), ("function_call", call), ("observation", "{}"), ("gpt", "ok")
    ).messages
    assert messages[1] == Message(
        "assistant", tool_calls=(ToolCall("search", {"z": 1, "a": [2, {"k": None}]}),)
    )
    assert list(messages[1].tool_calls[0].arguments) == ["z", "a"]
    assert [m.role for m in messages] == ["user", "assistant", "tool", "assistant"]


def test_several_calls_in_one_turn_are_one_message():
    calls = json.dumps([{"name": "f", "arguments": {}}, {"name": "g", "arguments": {"x": 1}}])
    message = convert(("human", "go"), ("function_call", calls)).messages[1]
    assert message.tool_calls == (ToolCall("f", {}), ToolCall("g", {"x": 1}))


def test_a_call_and_an_answer_in_a_row_stay_two_messages_in_their_order():
    call = '{"name": "f", "arguments": {}}'
    messages = convert(("human", "go"), ("gpt", "I look."), ("function_call", call), ("gpt", "ok")).messages
    assert [(m.content, len(m.tool_calls)) for m in messages[1:]] == [("I look.", 0), ("", 1), ("ok", 0)]


def test_arguments_that_are_the_text_of_an_object_are_parsed():
    call = json.dumps({"name": "f", "arguments": '{"b": 1}'})
    assert convert(("human", "go"), ("function_call", call)).messages[1].tool_calls[0].arguments == {"b": 1}


def test_arguments_that_are_other_text_stay_as_they_are():
    call = json.dumps({"name": "f", "arguments": "print(1)"})
    assert convert(("human", "go"), ("function_call", call)).messages[1].tool_calls[0].arguments == "print(1)"


@pytest.mark.parametrize(
    "value", ["search(x)", '{"name": "f", "arguments": {}', "[]", '{"arguments": {}}', '"f"']
)
def test_a_function_call_that_is_none_is_refused(value):
    with pytest.raises(SFTError) as error:
        convert(("human", "go"), ("function_call", value))
    assert error.value.where == "key 'conversations', message 2, key 'value'"


TOOLS = [{"name": "f", "parameters": {"type": "object"}}]


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
def test_tools_are_kept_as_given_from_a_list_or_its_text(tools):
    assert convert(("human", "a"), ("gpt", "b"), tools=tools).tools == tuple(TOOLS)


@pytest.mark.parametrize("tools", [None, "", "[]", []])
def test_no_tools(tools):
    assert convert(("human", "a"), ("gpt", "b"), tools=tools).tools == ()


@pytest.mark.parametrize("tools", ["[{", '{"name": "f"}', ["f"], 3])
def test_tools_that_are_not_a_list_of_objects_are_refused(tools):
    with pytest.raises(SFTError) as error:
        convert(("human", "a"), ("gpt", "b"), tools=tools)
    assert error.value.where.startswith("key 'tools'")


def test_an_unknown_speaker_is_refused_with_the_known_ones_and_the_nearest():
    with pytest.raises(SFTError, match="unknown role 'humna'") as error:
        convert(("humna", "a"), ("gpt", "b"))
    assert error.value.where == "key 'conversations', message 1, key 'from'"
    assert "did you mean 'human'?" in error.value.fix
    assert "observation" in error.value.fix


@pytest.mark.parametrize("pairs", [[], [("human", "a")], [("system", "s"), ("human", "a")]])
def test_a_row_without_an_assistant_turn_is_refused(pairs):
    with pytest.raises(SFTError, match="nothing to train on"):
        convert(*pairs)


@pytest.mark.parametrize("value", ["", "  \n", None])
def test_an_empty_assistant_turn_is_refused(value):
    with pytest.raises(SFTError, match="the response is empty") as error:
        convert(("human", "a"), ("gpt", value))
    assert error.value.where == "key 'conversations', message 2"


def test_a_system_column_comes_first():
    messages = convert(("human", "a"), ("gpt", "b"), system="Be kind.").messages
    assert messages[0] == Message("system", "Be kind.")
    assert len(convert(("human", "a"), ("gpt", "b"), system="").messages) == 2


def test_two_system_prompts_are_refused_rather_than_one_dropped():
    with pytest.raises(SFTError, match="system prompt"):
        convert(("system", "s"), ("human", "a"), ("gpt", "b"), system="Be kind.")


def test_a_turn_may_have_a_loss_weight():
    row = {"conversations": [*turns(("human", "a")), {"from": "gpt", "value": "b", "weight": 0.5}]}
    (conversation,) = ShareGPT().convert(row)
    assert [m.weight for m in conversation.messages] == [None, 0.5]


def test_missing_keys_are_named():
    with pytest.raises(SFTError, match="'conversations' is missing"):
        list(ShareGPT().convert({"messages": []}))
    with pytest.raises(SFTError, match="'from' is missing") as error:
        list(ShareGPT().convert({"conversations": [{"role": "user", "content": "a"}]}))
    assert error.value.where == "key 'conversations', message 1"
    assert "`role_key`" in error.value.fix


def test_the_options_name_the_keys():
    format = ShareGPT(conversations="chat", role_key="role", content_key="content")
    row = {"chat": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (conversation,) = format.convert(row)
    assert conversation.messages == (Message("user", "a"), Message("assistant", "b"))


def test_it_matches_files_with_its_column():
    assert ShareGPT().matches(frozenset({"conversations", "id"}))
    assert not ShareGPT().matches(frozenset({"messages"}))


def test_other_names_of_speakers_are_mapped():
    format = ShareGPT(
        roles={"Kunde": "user", "Agent": "assistant", "calls": "function_call", "gpt": "system"}
    )
    call = '{"name": "f", "arguments": {}}'
    pairs = [("gpt", "s"), ("Kunde", "a"), ("calls", call), ("observation", "1"), ("Agent", "b")]
    (conversation,) = format.convert({"conversations": turns(*pairs)})
    assert [m.role for m in conversation.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert conversation.messages[2].tool_calls == (ToolCall("f", {}),)


def test_a_mapping_to_no_role_is_refused():
    with pytest.raises(SFTError, match="the role of 'Kunde' is 'customer'") as error:
        ShareGPT(roles={"Kunde": "customer"})
    assert error.value.where == "roles"
    assert "user, assistant, function_call, system, tool" in error.value.fix


@pytest.mark.parametrize(
    ("fields", "weight"),
    [
        ({"train": False}, 0.0),
        ({"training": True}, 1.0),
        ({"loss_weight": 0.5}, 0.5),
        ({"train": None}, None),
    ],
)
def test_the_names_of_loss_weights(fields, weight):
    row = {"conversations": [{"from": "gpt", "value": "b", **fields}, *turns(("gpt", "c"))]}
    (conversation,) = ShareGPT().convert(row)
    assert conversation.messages[0].weight == weight


@pytest.mark.parametrize("key", ["train_detail", "training_detail"])
def test_weights_of_ranges_of_characters(key):
    detail = [
        {"begin_offset": 0, "end_offset": 3, "train": False},
        {"begin_offset": 4, "end_offset": 5, "train": True},
    ]
    row = {"conversations": [{"from": "gpt", "value": "Hello.", key: detail}]}
    (conversation,) = ShareGPT().convert(row)
    assert conversation.messages[0].part_weights == (
        PartWeight("content", 0, 4, 0.0),
        PartWeight("content", 4, 6, 1.0),
    )
    with pytest.raises(SFTError, match="no place for the assistant message's part_weights"):
        ShareGPT().to_row(conversation)
