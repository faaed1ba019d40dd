"""What can't be rendered exactly is refused, with the row and the message named."""

import math

import pytest
from chat_families import (
    CHATML,
    META,
    PAIR,
    build_tokenizer,
    chatml,
    conversation,
    make_renderer,
    trained_turns,
)

from lightning_sft import Message, Renderer, Segments, SFTError, ToolCall


def refusal(renderer, item):
    """The message of the refusal; it names the row."""
    with pytest.raises(SFTError) as error:
        renderer.render_all([Segments((("fine", 1.0),)), item])
    assert str(error.value).startswith("rows.json, row 7")
    return str(error.value)


FORGETFUL = CHATML.replace(
    "m.content", "(m.reasoning_content + ' → ' if loop.last and m.reasoning_content else '') + m.content"
)
"""ChatML that shows the reasoning of the last turn only."""


def test_a_template_that_drops_earlier_reasoning_is_refused():
    thought = Message("assistant", "2", reasoning="One and one.")
    message = refusal(
        chatml(FORGETFUL), conversation(("user", "1+1?"), thought, ("user", "ok"), ("assistant", "yes"))
    )
    assert (
        "row 7, message 2 (assistant): the chat template rewrites history: once others follow, the chat template "
        "leaves out the reasoning of this message" in message
    )
    assert "set model.render.split_turns: true" in message
    chatml(FORGETFUL).render(conversation(("user", "1+1?"), thought))


def test_reasoning_may_be_left_out_of_a_turn_that_is_not_trained():
    first = Message("assistant", "2", reasoning="One and one.", weight=0.0)
    last = Message("assistant", "3", reasoning="Two and one.")
    renderer = chatml(FORGETFUL)
    example = renderer.render(conversation(("user", "1+1?"), first, ("user", "2+1?"), last))
    (turn,) = trained_turns(renderer.tokenizer, example)
    assert "One and one." not in turn[0]
    assert turn[1] == "Two and one. → 3<|im_end|>"


def test_a_template_that_rewrites_the_history_is_refused():
    template = "{% if messages[-1].role == 'assistant' %}{{ 'done ' }}{% endif %}" + CHATML
    message = refusal(chatml(template), PAIR)
    assert (
        "row 7, message 2 (assistant): the chat template renders this turn's history differently" in message
    )
    assert "character 0: '<|im_start|>user" in message


def test_a_template_that_ignores_a_role_is_refused():
    template = CHATML.replace("for m in messages", "for m in messages if m.role != 'tool'")
    message = refusal(chatml(template), conversation(("user", "hi"), ("tool", "ok"), ("assistant", "hello")))
    assert "row 7, message 2 (tool): the chat template leaves out text of this message" in message


@pytest.mark.parametrize("tool", [{"name": "f"}, {"type": "function", "function": {"name": "f"}}])
def test_a_template_that_ignores_tools_is_refused(tool):
    asked = conversation(("user", "hi"), ("assistant", "hello"), tools=[tool])
    assert "the row has tools, which the chat template leaves out" in refusal(chatml(), asked)
    Renderer(build_tokenizer("bytes"), "plain").render(asked)


def test_tools_that_are_rendered_in_some_conversations_only_are_refused_in_the_others():
    template = "{% if messages[0].role == 'system' %}{{ tools | tojson }}{% endif %}" + CHATML
    tools = [{"name": "f"}]
    with_system = conversation(("system", "s"), ("user", "hi"), ("assistant", "hello"), tools=tools)
    renderer = chatml(template)
    renderer.render(with_system)
    without = conversation(("user", "hi"), ("assistant", "hello"), tools=tools)
    assert "the row has tools, which the chat template leaves out" in refusal(renderer, without)


def test_a_call_that_the_template_leaves_out_is_refused():
    call = Message("assistant", "I look.", tool_calls=(ToolCall("f", {"x": 1}),))
    assert "message 2 (assistant): the chat template leaves out" in refusal(
        chatml(), conversation(("user", "hi"), call)
    )


def test_a_template_without_an_end_of_turn_token_is_refused():
    renderer = chatml("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}")
    assert "ends a turn with '\\n': no token that generation could stop on" in refusal(renderer, PAIR)
    with pytest.raises(SFTError, match="no token that generation could stop on"):
        _ = renderer.stop_token
    assert renderer.stop_token_ids == (renderer.tokenizer.eos_token_id,), "raw text still ends with EOS"


def test_whitespace_is_no_end_of_turn_token():
    tokenizer = build_tokenizer("bytes", ("\n",))
    renderer = make_renderer(
        tokenizer, "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    )
    assert "no token that generation could stop on" in refusal(renderer, PAIR)


def test_a_template_that_ends_only_the_last_turn_is_refused():
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    template += "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    twice = conversation(("user", "hi"), ("assistant", "hello"), ("user", "hi"), ("assistant", "hello"))
    message = refusal(chatml(template), twice)
    assert "row 7, message 2 (assistant): the chat template writes no end-of-turn token (</s>)" in message


@pytest.mark.parametrize(
    "change", ["m.content | capitalize", "m.content[:3]", "m.content[:-1]", "m.content | reverse"]
)
def test_a_template_that_changes_the_text_is_refused(change):
    message = refusal(chatml(CHATML.replace("m.content", f"({change})")), PAIR)
    assert "the chat template changes the messages' text" in message


@pytest.mark.parametrize("change", ["m.content | upper", "m.content.replace('l', '')"])
def test_a_template_that_reformats_the_text_in_place_is_not(change):
    renderer = chatml(CHATML.replace("m.content", f"({change})"))
    (turn,) = trained_turns(renderer.tokenizer, renderer.render(PAIR))
    assert turn[1] == ("HELLO<|im_end|>" if "upper" in change else "heo<|im_end|>")


def test_a_template_that_repeats_a_trained_turn_is_refused():
    repeating = chatml(CHATML.replace("m.content", "m.content + m.content"))
    assert "message 2 (assistant): the chat template repeats the text" in refusal(repeating, PAIR)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('no such role') }}", "no such role"),
        ("{{ messages[0].text.strip() }}", "'dict object' has no attribute 'text'"),
        ("{{ 1 // 0 }}", "integer division or modulo by zero"),
    ],
)
def test_what_a_template_raises_is_said(template, words):
    message = refusal(chatml(template), PAIR)
    assert "the chat template refuses the conversation" in message
    assert words in message


@pytest.mark.parametrize("response", ["", " \n\t "])
def test_an_empty_response_is_refused(response):
    for template in ("bytes", "pieces"):
        empty = conversation(("user", "hi"), ("assistant", "hello"), ("user", "hi"), ("assistant", response))
        message = refusal(chatml(kind=template), empty)
        assert "row 7, message 4 (assistant): the response is empty" in message


@pytest.mark.parametrize(
    "messages",
    [(("user", "hi"), ("assistant", "hello", 0.0)), (("user", "hi"),), ()],
    ids=["weight 0", "no response", "no message"],
)
def test_a_row_without_anything_to_train_on_is_refused(messages):
    assert "nothing to train on" in refusal(chatml(), conversation(*messages))


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf, -0.5, 1e39])
def test_a_weight_that_is_no_finite_number_of_at_least_0_is_refused(weight):
    for role, number in (("user", 1), ("assistant", 2)):
        messages = [
            Message(m.role, m.content, weight=weight if m.role == role else None) for m in PAIR.messages
        ]
        message = refusal(chatml(), conversation(*messages))
        assert f"row 7, message {number} ({role}): weight {weight} is not a finite number" in message
    message = refusal(chatml(), Segments((("a", 1.0), ("b", weight)), META))
    assert f"row 7, segment 2: weight {weight} is not a finite number" in message


def test_half_a_character_is_refused():
    half = "\ud83d"
    assert "half a character" in refusal(chatml(), conversation(("user", half), ("assistant", "hello")))
    assert "half a character" in refusal(chatml(), Segments(((f"cut {half}", 1.0),), META))


def test_a_generation_prompt_that_holds_the_response_is_refused():
    template = CHATML.replace(
        "<|im_start|>assistant\\n' }}{% endif", "<|im_start|>assistant\\nhel' }}{% endif"
    )
    message = refusal(chatml(template), PAIR)
    assert "row 7, message 2 (assistant): the generation prompt reaches into this message" in message
