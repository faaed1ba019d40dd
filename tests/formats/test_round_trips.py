"""What a format can express is written so that it reads back as the same conversation."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_sft import Conversation, Message, Segments, SFTError, ToolCall
from lightning_sft_formats.alpaca import Alpaca
from lightning_sft_formats.messages import Messages
from lightning_sft_formats.prompt_completion import PromptCompletion
from lightning_sft_formats.raw_text import RawText
from lightning_sft_formats.segments import Segments as SegmentsFormat
from lightning_sft_formats.sharegpt import ShareGPT

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
FILLED = TEXT.filter(lambda text: text.strip())
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=4,
)
OBJECTS = st.dictionaries(TEXT, JSON, max_size=3)
WEIGHTS = st.none() | st.sampled_from([0.0, 1.0]) | st.floats(0, 10)
CALLS = st.lists(
    st.builds(ToolCall, FILLED, OBJECTS | st.sampled_from(["print(1)", "[1]", ""]), st.none() | TEXT),
    min_size=1,
    max_size=2,
).map(tuple)
TOOLS = st.lists(OBJECTS, max_size=2).map(tuple)


def read_back(format, item):
    (back,) = format.convert(json.loads(json.dumps(format.to_row(item), ensure_ascii=False)))
    return back


def orders(item):
    """The order of the keys, which equality of objects doesn't look at."""
    if isinstance(item, Conversation):
        calls = [call.arguments for message in item.messages for call in message.tool_calls]
        return json.dumps([list(item.tools), calls], ensure_ascii=False)
    return ""


def assert_same(format, item):
    back = read_back(format, item)
    assert back == item
    assert orders(back) == orders(item)


def rich_messages(others, **assistant):
    answer = st.builds(Message, st.just("assistant"), FILLED, weight=WEIGHTS, **assistant)
    messages = st.lists(others | answer, max_size=4)
    last = st.builds(Message, st.just("assistant"), FILLED)
    return st.builds(lambda before, end: (*before, end), messages, last)


REASONED = rich_messages(
    st.builds(
        Message,
        st.sampled_from(["system", "developer", "user", "tool"]),
        TEXT,
        tool_call_id=st.none() | FILLED,
        name=st.none() | FILLED,
        weight=WEIGHTS,
    )
    | st.builds(Message, st.just("assistant"), TEXT, reasoning=st.none() | FILLED, tool_calls=CALLS),
    reasoning=st.none() | FILLED,
    tool_calls=st.just(()) | CALLS,
)


@given(st.builds(Conversation, REASONED, TOOLS))
def test_messages(conversation):
    assert_same(Messages(), conversation)
    assert_same(Messages(messages="chat", tools="functions_here"), conversation)


SPOKEN = rich_messages(
    st.builds(Message, st.sampled_from(["system", "user", "tool"]), TEXT, weight=WEIGHTS)
    | st.builds(Message, st.just("assistant"), tool_calls=CALLS, weight=WEIGHTS)
)


@given(st.builds(Conversation, SPOKEN, TOOLS))
def test_sharegpt(conversation):
    assert_same(ShareGPT(), conversation)
    assert_same(ShareGPT("c", "t", "role", "content"), conversation)


PAIRS = st.lists(st.tuples(TEXT, FILLED), max_size=2)


@given(st.none() | FILLED, PAIRS, FILLED, FILLED)
def test_alpaca(system, history, instruction, output):
    first = [Message("system", system)] if system is not None else []
    pairs = [*history, (instruction, output)]
    turns = [m for user, answer in pairs for m in (Message("user", user), Message("assistant", answer))]
    assert_same(Alpaca(), Conversation((*first, *turns)))


@given(st.builds(Conversation, REASONED, TOOLS))
def test_prompt_and_completion_of_messages(conversation):
    *before, last = conversation.messages
    weighted = [
        Message(m.role, m.content, m.reasoning, m.tool_calls, m.tool_call_id, m.name, m.weight or 0.0)
        if m.role == "assistant"
        else m
        for m in before
    ]
    assert_same(PromptCompletion(), Conversation((*weighted, last), conversation.tools))


@given(TEXT, FILLED)
def test_prompt_and_completion_of_texts(prompt, completion):
    assert_same(PromptCompletion(), Segments(((prompt, 0.0), (completion, 1.0))))
    turns = (Message("user", prompt), Message("assistant", completion))
    assert_same(PromptCompletion(chat=True), Conversation(turns))


@given(st.lists(st.tuples(TEXT, st.floats(0, 10)), max_size=4), FILLED)
def test_segments(pieces, trained):
    assert_same(SegmentsFormat(), Segments((*pieces, (trained, 1.0))))


@given(FILLED)
def test_raw_text(text):
    assert_same(RawText(), Segments(((text, 1.0),)))


ASK, ANSWER = Message("user", "a"), Message("assistant", "b")
CALL = ToolCall("f", {})


@pytest.mark.parametrize(
    ("format", "item", "what"),
    [
        (Alpaca(), Conversation((ASK, ANSWER), ({"name": "f"},)), "no place for the conversation's tools"),
        (Alpaca(), Conversation((ASK, Message("assistant", "b", weight=0.5))), "message's weight"),
        (Alpaca(), Conversation((ASK, Message("assistant", "b", reasoning="c"))), "message's reasoning"),
        (Alpaca(), Conversation((ASK, Message("assistant", tool_calls=(CALL,)))), "message's tool_calls"),
        (Alpaca(), Conversation((ANSWER, ASK)), "the roles are assistant, user"),
        (Alpaca(), Conversation((ASK, ANSWER, ASK)), "the roles are"),
        (Alpaca(), Conversation((Message("system", "s"),)), "the roles are"),
        (Alpaca(), Segments((("a", 1.0),)), "no roles"),
        (
            ShareGPT(),
            Conversation((Message("developer", "s"), ASK, ANSWER)),
            "no speaker for the role developer",
        ),
        (ShareGPT(), Conversation((ASK, Message("assistant", "b", reasoning="c"))), "message's reasoning"),
        (ShareGPT(), Conversation((ASK, Message("assistant", "b", tool_calls=(CALL,)))), "not both"),
        (
            ShareGPT(),
            Conversation((Message("tool", "1", tool_call_id="c"), ANSWER)),
            "message's tool_call_id",
        ),
        (Messages(), Segments((("a", 1.0),)), "no roles"),
        (
            PromptCompletion(),
            Conversation((ASK, ANSWER, ASK, ANSWER)),
            "more than one assistant turn is trained",
        ),
        (PromptCompletion(), Segments((("a", 1.0),)), "there are weight 1, where"),
        (PromptCompletion(), Segments((("a", 1.0), ("b", 0.0))), "there are weight 1, weight 0, where"),
        (PromptCompletion(chat=True), Conversation((ANSWER, ASK)), "there are assistant, user, where"),
        (RawText(), Segments((("a", 0.0), ("b", 1.0))), "only one text"),
        (RawText(), Conversation((ASK, ANSWER)), "chat template"),
    ],
)
def test_what_a_format_has_no_place_for_is_refused(format, item, what):
    with pytest.raises(SFTError, match=what):
        format.to_row(item)


def test_messages_are_written_as_openai_has_them():
    call = ToolCall("f", {"z": 1, "ü": [1.0, None]}, "c1")
    conversation = Conversation(
        (
            ASK,
            Message("assistant", tool_calls=(call,), weight=0.0),
            Message("tool", "1", tool_call_id="c1"),
            ANSWER,
        ),
        ({"type": "function", "function": {"name": "f"}},),
    )
    assert Messages().to_row(conversation) == {
        "messages": [
            {"role": "user", "content": "a"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "id": "c1",
                        "type": "function",
                        "function": {"name": "f", "arguments": '{"z": 1, "ü": [1.0, null]}'},
                    }
                ],
                "weight": 0,
            },
            {"role": "tool", "content": "1", "tool_call_id": "c1"},
            {"role": "assistant", "content": "b"},
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    }


def test_sharegpt_is_written_as_its_files_are():
    conversation = Conversation(
        (Message("system", "s"), ASK, Message("assistant", tool_calls=(CALL,)), Message("tool", "1"), ANSWER),
        ({"name": "f"},),
    )
    assert ShareGPT().to_row(conversation) == {
        "conversations": [
            {"from": "system", "value": "s"},
            {"from": "human", "value": "a"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "b"},
        ],
        "tools": '[{"name": "f"}]',
    }
