"""Options of the chat template, and tokens that a template writes and the tokenizer hasn't."""

import json
from dataclasses import replace

import pytest
import transformers
from chat_families import CHATML, IM, META, PAIR, build_tokenizer, trained_turns
from chat_families_newer import QWEN3
from hypothesis import given
from hypothesis import strategies as st

from lightning_sft import Conversation, Message, Renderer, SFTError, SFTModule
from lightning_sft.rendering.template import Template
from lightning_sft_formats.messages import Messages
from lightning_sft_formats.prompt_completion import PromptCompletion
from lightning_sft_formats.sharegpt import ShareGPT

PROMPT = "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
THINKING = QWEN3.replace(
    PROMPT, PROMPT + "{% if enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
)
"""Qwen3's: without thinking, the generation prompt holds an empty thought."""

DATED = "{{ 'Today is ' + date + '.\\n' }}{% if lang is defined %}{{ lang }}{% endif %}" + CHATML


def renderer(
    template: str = THINKING, added: tuple[str, ...] = (*IM, "<think>", "</think>"), **options
) -> Renderer:
    tokenizer = build_tokenizer("bytes", added)
    tokenizer.chat_template = template
    return Renderer(tokenizer, **options)


def trained(made: Renderer, talk: Conversation) -> str:
    ((_, text),) = trained_turns(made.tokenizer, made.render(talk))
    return text


def test_an_option_reaches_every_rendering():
    assert THINKING != QWEN3
    assert trained(renderer(), PAIR) == "<think>\n\n</think>\n\nhello<|im_end|>"
    quiet = renderer(chat_template_kwargs={"enable_thinking": False})
    assert trained(quiet, PAIR) == "hello<|im_end|>"
    assert quiet.generation_prompt([Message("user", "hi")]).endswith("assistant\n<think>\n\n</think>\n\n")
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    ids = quiet.tokenizer.apply_chat_template(messages, enable_thinking=False, return_dict=False)
    assert quiet.render(PAIR).input_ids.tolist() == ids


def test_a_row_may_have_options_of_its_own():
    made = renderer(chat_template_kwargs={"enable_thinking": False})
    thinks, doesnt = (replace(PAIR, chat_template_kwargs={"enable_thinking": on}) for on in (True, False))
    assert trained(made, thinks).startswith("<think>")
    assert trained(made, doesnt) == trained(made, PAIR) == "hello<|im_end|>"
    assert made.render(thinks).notes == ()
    (example,) = renderer(chat_template_kwargs={"enable_thinking": True}, split_turns=True).render(doesnt)
    assert example.weights.sum() == made.render(doesnt).weights.sum()
    (note,) = renderer(CHATML, IM).render(thinks).notes
    assert note == "the chat template doesn't use the row's chat_template_kwargs enable_thinking"


@pytest.mark.parametrize("kind", [Messages(), ShareGPT(), PromptCompletion()])
def test_a_rows_options_come_from_its_column_and_are_written_back(kind):
    talk = replace(PAIR, meta=META, chat_template_kwargs={"enable_thinking": False, "level": 2})
    row = kind.to_row(talk)
    assert row["chat_template_kwargs"] == {"enable_thinking": False, "level": 2}
    as_text = {**row, "chat_template_kwargs": json.dumps({**row["chat_template_kwargs"], "none": None})}
    for given_row in (row, as_text):
        (back,) = kind.convert(given_row)
        assert back.chat_template_kwargs == talk.chat_template_kwargs
    assert "chat_template_kwargs" not in kind.to_row(PAIR)


def test_a_format_without_place_for_a_rows_options_refuses_them():
    talk = replace(PAIR, chat_template_kwargs={"enable_thinking": False})
    with pytest.raises(SFTError, match="no place for the conversation's chat_template_kwargs"):
        PromptCompletion(chat=True).to_row(talk)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"enable_thinkng": False},
            r"enable_thinkng: the chat template doesn't use(.|\n)*mean enable_thinking",
        ),
        ({"messages": []}, "messages: this is no option of a chat template"),
        ({"add_generation_prompt": True}, "this is no option"),
        ({"eos_token": "x"}, "this is no option"),
        ({"not a name": 1}, "this is no option"),
    ],
)
def test_what_is_no_option_is_refused(options, words):
    with pytest.raises(SFTError, match=words):
        renderer(chat_template_kwargs=options)
    if "no option" in words:
        with pytest.raises(SFTError, match=r"rows\.json, row 7(.|\n)*" + words):
            renderer().render(replace(PAIR, meta=META, chat_template_kwargs=options))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 10**12) | st.floats(-1e6, 1e6) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(value=JSON, start=st.sampled_from(["", "\n", "  ", "\n  {% if true %}{% endif %}", "{#- x -#} "]))
def test_the_exported_template_has_the_options_as_defaults(value, start):
    tokenizer = build_tokenizer("bytes", IM)
    text = start + "{{ option | tojson }}" + CHATML
    exported = Template(tokenizer, text, {"option": value}).text_with_options
    messages = [{"role": "user", "content": "hi"}]
    expected = tokenizer.apply_chat_template(messages, chat_template=text, tokenize=False, option=value)
    assert tokenizer.apply_chat_template(messages, chat_template=exported, tokenize=False) == expected
    other = tokenizer.apply_chat_template(messages, chat_template=text, tokenize=False, option="other")
    assert (
        tokenizer.apply_chat_template(messages, chat_template=exported, tokenize=False, option="other")
        == other
    )


def test_a_module_exports_and_generates_with_its_options(model_folder, tmp_path):
    (tmp_path / "dated.jinja").write_text(DATED)
    options = {"chat_template": str(tmp_path / "dated.jinja"), "chat_template_kwargs": {"date": "Monday"}}
    module = SFTModule(base=str(model_folder("llama")), **options)
    module.configure_model()
    module.export(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    prompt = Renderer(tokenizer).generation_prompt([Message("user", "hi")])
    assert prompt == module.renderer.generation_prompt([Message("user", "hi")])
    assert prompt.startswith("Today is Monday.\n<|im_start|>user")


# ------------------------------------------------------------------------------- templates that are no Jinja


def test_a_syntax_error_names_file_and_line(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{# a comment #}\n{% for m in messages %}\n{{ m.content }\n{% endfor %}")
    with pytest.raises(
        SFTError, match=r"model\.chat_template: .*mine\.jinja, line 3: the chat template is no Jinja"
    ):
        Renderer(build_tokenizer("bytes"), str(path))
    with pytest.raises(
        SFTError, match="the tokenizer's own, line 1: the chat template is no Jinja: Unexpected end"
    ):
        renderer("{% for m in messages %}")


# ------------------------------------------------------------------------- tokens that the tokenizer hasn't


def test_a_template_whose_tokens_fall_to_pieces_is_told():
    words = 'model.new_tokens: ["<|im_start|>", "<|im_end|>"]'
    with pytest.raises(SFTError) as error:
        renderer(CHATML, ()).render(PAIR)
    assert "no token that generation could stop on" in str(error.value)
    assert words in str(error.value)
    (note, _) = renderer(CHATML, (), train_on_eot="none").render(PAIR).notes
    assert note.endswith(words)
    assert "<|im_start|>, <|im_end|>, of which this tokenizer makes several tokens" in note
    (note,) = renderer(CHATML, IM[1:]).render(PAIR).notes
    assert note.endswith('model.new_tokens: ["<|im_start|>"]')
    assert renderer(CHATML, IM).render(PAIR).notes == ()


def test_with_new_tokens_such_a_template_can_be_used(tmp_path):
    """ChatML on a tokenizer that has none of its tokens, as with `model.chat_template: chatml` on GPT-2."""
    tokenizer = build_tokenizer("bytes")
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    module = SFTModule(base=str(tmp_path), chat_template="chatml", new_tokens=list(IM))
    example = module.renderer.render(PAIR)
    assert trained_turns(module.tokenizer, example)[0][1] == "hello<|im_end|>"
    assert example.notes == ()
    assert module.renderer.stop_token_ids[0] == len(tokenizer) + IM.index("<|im_end|>")
