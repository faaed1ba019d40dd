"""The shipped chat templates render what they say, and the right template is chosen."""

import pytest
from chat_families import BOS, EOS, as_dicts, build_tokenizer, conversation

from lightning_sft import Message, Renderer, SFTError, ToolCall, chat_templates

CALL = Message(
    "assistant",
    "I look.",
    reasoning="It is about Rome.",
    tool_calls=(ToolCall("weather", {"town": "Röm", "days": 2}), ToolCall("note", "as text")),
)
TALK = conversation(
    ("system", "Be kind."),
    ("user", "Rain in Rome?"),
    CALL,
    ("tool", '{"rain": false}'),
    ("assistant", " No.\n"),
    tools=[{"name": "weather", "parameters": {"type": "object"}}, {"name": "note"}],
)
CHAT = conversation(("user", "hi"), ("assistant", "hello"), ("user", "bye"), ("assistant", "ok"))

PLAIN_TALK = """\
<s>### Tools:
{"name": "weather", "parameters": {"type": "object"}}
{"name": "note"}

### System:
Be kind.

### User:
Rain in Rome?

### Assistant:
<think>
It is about Rome.
</think>

I look.
<tool_call>
{"name": "weather", "arguments": {"town": "Röm", "days": 2}}
</tool_call>
<tool_call>
{"name": "note", "arguments": "as text"}
</tool_call></s>

### Tool:
{"rain": false}

### Assistant:
 No.
</s>

"""

ALPACA_CHAT = """\
<s>Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
hi

### Response:
hello</s>

### Instruction:
bye

### Response:
ok</s>

"""

CHATML_CHAT = """\
<|im_start|>user
hi<|im_end|>
<|im_start|>assistant
hello<|im_end|>
<|im_start|>user
bye<|im_end|>
<|im_start|>assistant
ok<|im_end|>
"""


def render(name, talk, messages=None, **options):
    tokenizer = build_tokenizer("bytes")
    return tokenizer.apply_chat_template(
        as_dicts(talk)[:messages],
        tools=list(talk.tools) or None,
        chat_template=chat_templates.resolve(name, tokenizer),
        tokenize=False,
        **options,
    )


@pytest.mark.parametrize(
    ("name", "talk", "text"),
    [("plain", TALK, PLAIN_TALK), ("alpaca", CHAT, ALPACA_CHAT), ("chatml", CHAT, CHATML_CHAT)],
)
def test_a_shipped_template_renders_as_documented(name, talk, text):
    assert render(name, talk) == text


@pytest.mark.parametrize(
    ("name", "talk", "text"),
    [("plain", TALK, PLAIN_TALK), ("alpaca", CHAT, ALPACA_CHAT), ("chatml", CHAT, CHATML_CHAT)],
)
def test_the_generation_prompt_of_a_shipped_template_is_where_the_response_begins(name, talk, text):
    last = talk.messages[-1].content
    assert render(name, talk, -1, add_generation_prompt=True) == text[: text.rindex(last)]


def test_the_alpaca_template_puts_a_system_message_in_place_of_its_own():
    text = render("alpaca", conversation(("system", "Be kind."), ("user", "hi"), ("assistant", "hello")))
    assert text == f"{BOS}Be kind.\n\n### Instruction:\nhi\n\n### Response:\nhello{EOS}\n\n"


def test_a_call_without_text_begins_its_turn():
    call = Message("assistant", tool_calls=(ToolCall("f", {}),))
    text = render("plain", conversation(("user", "go"), call))
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    assert text == f"{BOS}### User:\ngo\n\n### Assistant:\n{call}{EOS}\n\n"


@pytest.mark.parametrize("name", ["plain", "alpaca"])
def test_no_bos_is_written_where_it_is_also_the_eos(name, tokenizer):
    text = tokenizer.apply_chat_template(
        as_dicts(CHAT), chat_template=chat_templates.resolve(name, tokenizer), tokenize=False
    )
    assert text.startswith(("###", "Below"))
    assert text.count("<|endoftext|>") == 2


def test_the_shipped_templates_are_listed():
    assert chat_templates.names() == ["alpaca", "chatml", "plain"]


def test_without_a_choice_the_tokenizers_own_template_is_taken(tokenizer):
    assert Renderer(tokenizer).chat_template == tokenizer.chat_template


def test_of_several_templates_of_a_tokenizer_the_default_is_taken():
    tokenizer = build_tokenizer("pieces")
    tokenizer.chat_template = {"rag": "R", "default": "D"}
    assert chat_templates.resolve(None, tokenizer) == "D"
    tokenizer.chat_template = {"rag": "R", "tool_use": "T"}
    assert chat_templates.resolve(None, tokenizer) == "R"
    tokenizer.chat_template = None


def test_plain_is_the_default_of_a_tokenizer_without_a_template():
    tokenizer = build_tokenizer("trimmed")
    tokenizer.chat_template = None
    assert chat_templates.resolve(None, tokenizer) == chat_templates.resolve("plain", tokenizer)


def test_a_template_is_read_from_a_file(tmp_path, tokenizer):
    path = tmp_path / "mine.jinja"
    path.write_text("{{ 'für' }}", encoding="utf-8")
    assert Renderer(tokenizer, str(path)).chat_template == "{{ 'für' }}"


@pytest.mark.parametrize(
    ("choice", "fix"),
    [
        ("chatlm", "did you mean 'chatml'?"),
        ("Alpaca", "did you mean 'alpaca'?"),
        ("qwerty", "give the path of a Jinja file, or one of the names"),
    ],
)
def test_an_unknown_template_is_refused(choice, fix, tokenizer):
    with pytest.raises(SFTError) as error:
        Renderer(tokenizer, choice)
    assert str(error.value) == (
        f"model.chat_template: chat template {choice!r} is neither a file nor one of alpaca, chatml, plain\n"
        f"  → {fix}"
    )
