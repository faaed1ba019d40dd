import json

import pytest

from lightning_sft import Conversation, Message, PartWeight, SFTError, ToolCall
from lightning_sft_formats.messages import Messages

ASK = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}


def convert(*messages, **columns):
    (conversation,) = Messages().convert({"messages": list(messages), **columns})
    return conversation


def assistant(**fields):
    return convert(ASK, {"role": "assistant", **fields}).messages[1]


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
def test_roles_are_kept(role):
    assert convert({"role": role, "content": "x"}, ANSWER).messages[0] == Message(role, "x")


def test_the_older_function_role_is_a_tool():
    message = convert(ASK, {"role": "function", "name": "f", "content": "1"}, ANSWER).messages[1]
    assert message == Message("tool", "1", name="f")


def test_an_unknown_role_is_refused():
    with pytest.raises(SFTError, match="unknown role 'asistant'") as error:
        convert(ASK, {"role": "asistant", "content": "b"})
    assert error.value.where == "key 'messages', message 2, key 'role'"
    assert "did you mean 'assistant'?" in error.value.fix


@pytest.mark.parametrize("key", ["text", "value"])
def test_text_parts_are_joined_as_they_stand(key):
    message = assistant(content=[{"type": "text", key: "one "}, {"type": "text", key: "two"}])
    assert message == Message("assistant", "one two")


def test_reasoning_and_tool_call_parts_go_to_their_fields():
    call = json.dumps({"name": "f", "arguments": {"z": 1, "a": 2}})
    parts = [
        {"type": "reasoning", "value": "Hm."},
        {"type": "text", "value": "I look."},
        {"type": "tool_call", "value": call},
        {"type": "tool_call", "value": call},
    ]
    message = assistant(content=parts)
    assert (message.content, message.reasoning) == ("I look.", "Hm.")
    assert message.tool_calls == (ToolCall("f", {"z": 1, "a": 2}),) * 2
    assert list(message.tool_calls[0].arguments) == ["z", "a"]


def test_parts_whose_order_would_be_lost_are_refused():
    with pytest.raises(SFTError, match="order") as error:
        assistant(content=[{"type": "text", "text": "b"}, {"type": "reasoning", "value": "Hm."}])
    assert error.value.where == "key 'messages', message 2, key 'content', part 2"


def test_a_part_that_is_not_text_is_refused():
    with pytest.raises(SFTError, match="'image_url', which is not text") as error:
        convert({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ANSWER)
    assert error.value.where == "key 'messages', message 1, key 'content', part 1"


@pytest.mark.parametrize("parts", [[{"type": "text"}], ["text"], [{"text": "no type"}], {"type": "text"}])
def test_malformed_parts_are_refused(parts):
    with pytest.raises(SFTError, match=r"part|object"):
        assistant(content=parts)


OPENAI_CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1, "a": 2}'}}


def test_openai_tool_calls_need_no_content():
    message = assistant(content=None, tool_calls=[OPENAI_CALL])
    assert message == Message("assistant", tool_calls=(ToolCall("f", {"x": 1, "a": 2}, "c1"),))


@pytest.mark.parametrize("arguments", ["not JSON", "[1, 2]", ""])
def test_arguments_that_are_not_an_object_stay_the_text_they_are(arguments):
    call = {"function": {"name": "f", "arguments": arguments}}
    assert assistant(content=None, tool_calls=[call]).tool_calls == (ToolCall("f", arguments),)


def test_the_older_function_call_field_is_a_tool_call():
    message = assistant(content=None, function_call={"name": "f", "arguments": "{}"})
    assert message.tool_calls == (ToolCall("f", {}),)


def test_a_tool_message_keeps_its_call_id_and_name():
    message = convert(
        ASK, {"role": "tool", "content": "", "tool_call_id": "c1", "name": "f"}, ANSWER
    ).messages[1]
    assert message == Message("tool", "", tool_call_id="c1", name="f")


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_fields(key):
    assert assistant(content="b", **{key: "Hm."}).reasoning == "Hm."
    assert assistant(content="b", **{key: None}).reasoning is None


def test_reasoning_that_is_given_twice_is_refused():
    with pytest.raises(SFTError, match="as a part and as a key"):
        assistant(reasoning="A", content=[{"type": "reasoning", "value": "B"}, {"type": "text", "text": "b"}])


def test_only_the_assistant_reasons_and_calls():
    with pytest.raises(SFTError, match="only the assistant"):
        convert(ASK | {"reasoning": "Hm."}, ANSWER)
    with pytest.raises(SFTError, match="only the assistant"):
        convert(ASK | {"tool_calls": [OPENAI_CALL]}, ANSWER)


@pytest.mark.parametrize(
    ("fields", "weight"),
    [
        ({}, None),
        ({"weight": None}, None),
        ({"weight": 1}, 1.0),
        ({"loss_weight": 0.25}, 0.25),
        ({"train": True}, 1.0),
        ({"training": True, "weight": 1}, 1.0),
    ],
)
def test_weights(fields, weight):
    found = assistant(content="b", **fields).weight
    assert found == weight
    assert found is None or type(found) is float


def test_a_user_turn_may_be_trained_and_an_answer_left_out():
    messages = convert(ASK | {"weight": 1}, ANSWER | {"train": False}).messages
    assert [m.weight for m in messages] == [1.0, 0.0]


@pytest.mark.parametrize("weight", [-1, "1", float("nan")])
def test_weights_that_are_no_weights_are_refused(weight):
    with pytest.raises(SFTError, match="number of 0 or more") as error:
        assistant(content="b", weight=weight)
    assert error.value.where == "key 'messages', message 2, key 'weight'"


def test_contradicting_weights_are_refused():
    with pytest.raises(SFTError, match="more than once"):
        assistant(content="b", weight=1, train=False)


@pytest.mark.parametrize("messages", [[], [ASK], [ASK, ANSWER | {"weight": 0}]])
def test_a_row_with_nothing_to_train_on_is_refused(messages):
    with pytest.raises(SFTError, match="nothing to train on"):
        convert(*messages)


@pytest.mark.parametrize("content", ["", " ", None, [], [{"type": "reasoning", "value": "Hm."}]])
def test_an_empty_answer_is_refused(content):
    with pytest.raises(SFTError, match="the response is empty") as error:
        assistant(content=content)
    assert error.value.where == "key 'messages', message 2"


def test_a_user_message_without_content_is_refused():
    with pytest.raises(SFTError, match="no content"):
        convert({"role": "user"}, ANSWER)


TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize("columns", [{"tools": [TOOL]}, {"tools": json.dumps([TOOL])}, {"functions": [TOOL]}])
def test_tools_of_the_row(columns):
    assert convert(ASK, ANSWER, **columns).tools == (TOOL,)


def test_messages_may_be_the_json_text_of_a_list_as_in_csv_files():
    (conversation,) = Messages().convert({"messages": json.dumps([ASK, ANSWER])})
    assert conversation.messages == (Message("user", "a"), Message("assistant", "b"))


def test_it_matches_files_with_its_column():
    assert Messages().matches(frozenset({"messages", "tools"}))
    assert not Messages().matches(frozenset({"conversations"}))
    assert Messages(messages="chat").matches(frozenset({"chat"}))


def parts(*weights, key="weight"):
    return [{"type": "text", "text": "b"} | ({} if w is None else {key: w}) for w in weights]


@pytest.mark.parametrize("key", ["weight", "loss_weight", "train", "training"])
def test_a_weight_that_all_parts_have_is_the_messages(key):
    assert convert(ASK, {"role": "assistant", "content": parts(1, 1, key=key)}).messages[1].weight == 1.0
    untrained = convert({"role": "assistant", "content": parts(0, key=key)}, ANSWER).messages[0]
    assert (untrained.content, untrained.weight) == ("b", 0.0)


def test_parts_without_a_weight_have_that_of_the_message():
    assert assistant(content=parts(None, 0.5), weight=0.5).weight == 0.5
    assert assistant(content=parts(None, None)).weight is None
    assert assistant(content=parts(None, None), weight=0.5).weight == 0.5


def test_parts_of_different_weights_keep_them():
    assert assistant(content=parts(0, 1)).part_weights == (
        PartWeight("content", 0, 1, 0.0),
        PartWeight("content", 1, 2, 1.0),
    )
    some = assistant(content=parts(None, 1, None), weight=0.5)
    assert (some.weight, some.part_weights) == (0.5, (PartWeight("content", 1, 2, 1.0),))
    assert assistant(content=parts(1), weight=0.5) == Message("assistant", "b", weight=1.0)


def test_parts_of_all_types_keep_their_weights():
    call = {"name": "f", "arguments": {"x": 1}}
    content = [
        {"type": "reasoning", "value": "Hm.", "weight": 0.0},
        {"type": "text", "value": "I look.", "weight": 0.5},
        {"type": "tool_call", "value": call, "weight": 0.0},
        {"type": "tool_call", "value": [call, call], "weight": 2},
        {"type": "tool_call", "value": call},
    ]
    message = assistant(content=content)
    assert message.part_weights == (
        PartWeight("reasoning", 0, 3, 0.0),
        PartWeight("content", 0, 7, 0.5),
        PartWeight("tool_calls", 0, 1, 0.0),
        PartWeight("tool_calls", 1, 3, 2.0),
    )
    row = Messages().to_row(Conversation((Message("user", "a"), message)))
    (back,) = Messages().convert(json.loads(json.dumps(row)))
    assert back.messages[1] == message


def test_ranges_of_characters():
    details = [
        {"begin_offset": 0, "end_offset": 4, "train": False},
        {"begin_offset": 6, "end_offset": 10, "train": True},
    ]
    message = assistant(content="Hello there you", train_detail=details)
    assert message.weight is None
    assert [(message.content[p.start : p.end], p.weight) for p in message.part_weights] == [
        ("Hello", 0.0),
        (" ", 0.0),
        ("there", 1.0),
        (" you", 0.0),
    ]


@pytest.mark.parametrize(
    "details",
    [
        [{"begin_offset": 2, "end_offset": 1, "train": True}],
        [{"begin_offset": 0, "end_offset": 5, "train": True}],
        [{"begin_offset": 0, "end_offset": 2, "train": True}, {"begin_offset": 2, "end_offset": 3, "train": True}],
        [{"begin_offset": 0, "end_offset": "2", "train": True}],
        [{"begin_offset": 0, "end_offset": 2}],
        ["all"],
        {"begin_offset": 0},
    ],
)  # fmt: skip
def test_malformed_ranges_are_refused(details):
    with pytest.raises(SFTError) as error:
        assistant(content="Hello", training_detail=details)
    assert error.value.where.startswith("key 'messages', message 2, key 'training_detail'")


def test_weights_of_parts_and_of_ranges_exclude_each_other():
    details = [{"begin_offset": 0, "end_offset": 0, "train": True}]
    with pytest.raises(SFTError, match="parts and ranges"):
        assistant(content=parts(0, 1), train_detail=details)


def test_nothing_to_train_in_any_part_is_refused():
    with pytest.raises(SFTError, match="nothing to train on"):
        convert({"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0})
    trained = {"role": "assistant", "content": parts(None, 1), "weight": 0}
    assert convert({"role": "user", "content": "a"}, trained).messages[1].weight == 0.0


def test_a_part_with_a_weight_that_is_none_is_placed():
    with pytest.raises(SFTError, match="number of 0 or more") as error:
        assistant(content=parts(1, "no"))
    assert error.value.where == "key 'messages', message 2, key 'content', part 2, key 'weight'"
