"""The law of the mask over templates of many families, whole and turn by turn."""

import pytest
from chat_families import (
    EOS,
    FAMILIES,
    TOKENIZERS,
    Family,
    as_dicts,
    build_tokenizer,
    make_renderer,
    swallowed,
    template_ids,
    trained_turns,
)
from chat_families_newer import DEEPSEEK_R1, NEWER, R1_TOKENS, REWRITING, SMOLLM
from test_rendering import CALLS, CONVERSATIONS, ORDERS, THOUGHTS, can, chat, check, imitations

from lightning_sft import Conversation, Message, Renderer, SFTError
from lightning_sft.example import Reason

KEEPING = FAMILIES | NEWER
ALL = KEEPING | REWRITING


CALL_ALONE = ("gpt-oss", "mistral3")
"""They render a call without the text beside it."""


def until(conversation: Conversation, turn: int) -> Conversation:
    return Conversation(conversation.messages[: turn + 1], conversation.tools, conversation.meta)


def law_of_turn(tokenizer, conversation: Conversation, template: str, stop: str) -> tuple[str, str]:
    """(prompt, what the model must produce after it) of the last turn, by transformers alone."""
    messages, tools = as_dicts(conversation), list(conversation.tools) or None

    def text(part, **options):
        (rendered,) = tokenizer.apply_chat_template(
            [part], tools=tools, chat_template=template, tokenize=False, **options
        )
        return rendered

    prompt, through = text(messages[:-1], add_generation_prompt=True), text(messages)
    through = through[: through.rindex(stop) + len(stop)]
    assert through.startswith(prompt)
    return prompt, through[len(prompt) :]


def stop_of(family: Family, message: Message) -> str:
    return "<|call|>" if message.tool_calls and family.stop == "<|return|>" else family.stop


def check_turns(family: Family, kind: str, conversation: Conversation) -> None:
    """Every trained turn is an example of its own, as inference would render it."""
    tokenizer = build_tokenizer(kind, family.added, rstrip=family.rstrip)
    plain = make_renderer(tokenizer, family.template)
    renderer = Renderer(tokenizer, None if "{" in family.template else family.template, split_turns=True)
    template = plain.chat_template
    turns = [n for n, m in enumerate(conversation.messages) if m.role == "assistant"]
    examples = renderer.render(conversation)
    assert [example.turn for example in examples] == [turn + 1 for turn in turns]
    for turn, example in zip(turns, examples, strict=True):
        part = until(conversation, turn)
        assert example.input_ids.tolist() == template_ids(tokenizer, part, template)
        prompt, answer = law_of_turn(tokenizer, part, template, stop_of(family, conversation.messages[turn]))
        if family.rstrip:
            through = swallowed(prompt + answer, family.added)
            prompt = swallowed(prompt, family.added)
            answer = through[len(prompt) :]
        assert trained_turns(tokenizer, example) == [(prompt, answer)]
        assert set(example.reasons[example.weights == 0]) <= {Reason.CONTEXT, Reason.OTHER_TURN}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("family", NEWER)
def test_what_the_model_must_produce_is_trained_and_nothing_else(family, kind):
    conversations = [CONVERSATIONS[name] for name in CONVERSATIONS if can(NEWER[family], name)]
    check(NEWER[family], kind, conversations)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("family", NEWER)
def test_text_that_imitates_the_template_moves_no_boundary(family, kind):
    check(NEWER[family], kind, list(imitations(NEWER[family])))


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("family", ALL)
def test_with_split_turns_every_turn_is_rendered_as_inference_would(family, kind):
    for name, conversation in CONVERSATIONS.items():
        if family in CALL_ALONE and name in ("nothing but reasoning", "text and two calls"):
            continue
        if can(ALL[family], name):
            check_turns(ALL[family], kind, conversation)
    for conversation in imitations(ALL[family]):
        check_turns(ALL[family], kind, conversation)


@pytest.mark.parametrize("family", REWRITING)
def test_rewritten_history_is_refused_with_the_row_and_the_remedy(family):
    given = REWRITING[family]
    tokenizer = build_tokenizer("bytes", given.added)
    long = chat("hi", "one", "and?", "two", "and?", "three", system="Count.")
    with pytest.raises(SFTError) as error:
        make_renderer(tokenizer, given.template).render(long)
    assert str(error.value).startswith("rows.json, row 7, message 3 (assistant): the chat template ")
    assert "set model.render.split_turns: true" in str(error.value)
    (example,) = Renderer(tokenizer, train_on="last_turn", split_turns=True).render(long)
    assert trained_turns(tokenizer, example)[0][1].endswith(f"three{given.stop}")


def test_one_turn_of_a_rewriting_template_needs_no_split():
    for family in REWRITING.values():
        tokenizer = build_tokenizer("bytes", family.added)
        make_renderer(tokenizer, family.template).render(chat("hi", "one", system="Count."))


def test_a_call_may_end_with_a_token_of_its_own():
    family = REWRITING["gpt-oss"]
    tokenizer = build_tokenizer("bytes", family.added)
    renderer = make_renderer(tokenizer, family.template)
    names = tokenizer.convert_ids_to_tokens(renderer.stop_token_ids)
    assert names == ["<|return|>", "<|call|>", EOS]


THINKING = "<think>\nOne and one.\n</think>\n\n2"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_thought_in_the_content_is_found_where_the_template_takes_it_apart(kind):
    family = REWRITING["qwen3"]
    check(family, kind, [chat("1+1?", THINKING)])
    check_turns(family, kind, chat("1+1?", THINKING, "2+2?", "<think>\nx\n</think>\n\n4"))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_generation_prompt_that_opens_what_the_turn_leaves_out(kind):
    tokenizer = build_tokenizer(kind, R1_TOKENS)
    renderer = make_renderer(tokenizer, DEEPSEEK_R1)
    for answer in ("2", "<b>2</b>", "<"):
        example = renderer.render(chat("1+1?", answer, "and?", "5"))
        assert example.input_ids.tolist() == template_ids(
            tokenizer, chat("1+1?", answer, "and?", "5"), DEEPSEEK_R1
        )
        first, second = trained_turns(tokenizer, example)
        assert first == ("<s><｜User｜>1+1?<｜Assistant｜>", f"{answer}<｜end｜>")
        assert second[1] == "5<｜end｜>"
        assert all(
            "which the rendered turn leaves out: trained from where they part" in n for n in example.notes
        )
        assert "'<think>\\n'" in example.notes[0]
    assert renderer.render(chat("a", "<think>")).notes  # content that begins like the opening
    with pytest.raises(SFTError, match="leaves out text of this message"):
        renderer.render(chat("1+1?", THINKING))


def test_generation_tags_agree():
    tokenizer = build_tokenizer("bytes", NEWER["smollm"].added)
    renderer = make_renderer(tokenizer, SMOLLM)
    for name in ("multi-turn", "unicode", "whitespace at the edges"):
        conversation = CONVERSATIONS[name]
        tagged = tokenizer.apply_chat_template(
            as_dicts(conversation),
            chat_template=SMOLLM,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        example = renderer.render(conversation)
        assert (example.weights > 0).tolist() == [mask == 1 for mask in tagged["assistant_masks"]]


def test_there_are_enough_families():
    assert len(ALL) >= 20
    assert len({family.template for family in ALL.values()}) == len(ALL)
    assert {*CALLS, *THOUGHTS, *ORDERS} < {*CONVERSATIONS}
