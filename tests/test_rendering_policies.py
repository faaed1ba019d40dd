"""The policies: what each leaves out of the mask, and nothing else."""

import numpy as np
import pytest
from chat_families import (
    CHATML,
    EOS,
    META,
    PAIR,
    QWEN,
    TOKENIZERS,
    build_tokenizer,
    conversation,
    make_renderer,
    trained_turns,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sft import Conversation, Message, Renderer, RenderPolicies, Segments, SFTError, ToolCall
from lightning_sft.example import Reason

ADDED = ("<|im_start|>", "<|im_end|>")
MARKS = (*ADDED, "<think>", "</think>", "<tool_call>", "</tool_call>")

TALK = conversation(
    ("system", "Be kind."), ("user", "hi"), ("assistant", "one"), ("user", "and?"), ("assistant", "two")
)


def renderer(kind="bytes", template=CHATML, added=ADDED, **policies) -> Renderer:
    tokenizer = build_tokenizer(kind, added)
    tokenizer.chat_template = template
    return Renderer(tokenizer, **policies)


def texts(made: Renderer, example) -> list[str]:
    return [text for _, text in trained_turns(made.tokenizer, example)]


def decoded(made: Renderer, example, reason: Reason) -> str:
    return made.tokenizer.decode(example.input_ids[example.reasons == reason])


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_last_turn_alone(kind):
    made = renderer(kind, train_on="last_turn")
    example = made.render(TALK)
    assert texts(made, example) == ["two<|im_end|>"]
    assert decoded(made, example, Reason.OTHER_TURN) == "one"
    weighted = conversation(
        ("user", "a"), ("assistant", "one", 3.0), ("user", "b"), ("assistant", "two", 0.5)
    )
    assert set(made.render(weighted).weights.tolist()) == {0.0, 0.5}


def test_a_conversation_whose_last_turn_has_weight_0_has_nothing_to_train():
    made = renderer(train_on="last_turn")
    with pytest.raises(SFTError, match="nothing to train on"):
        made.render(conversation(("user", "a"), ("assistant", "one"), ("user", "b"), ("assistant", "c", 0.0)))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_prompts_weight(kind):
    made = renderer(kind, prompt_weight=0.25)
    example = made.render(
        conversation(
            ("system", "S S"), ("user", "AA"), ("user", "BB", 0.0), ("tool", "CC"), ("assistant", "DD")
        )
    )
    prompt = made.tokenizer.decode(example.input_ids[example.weights == 0.25])
    assert prompt == "S SAA"
    assert texts(made, example)[-1] == "DD<|im_end|>"
    assert example.weights.sum() == 0.25 * (example.weights == 0.25).sum() + (example.weights == 1).sum()


def test_segments_keep_the_weights_that_their_format_gave_them():
    segments = Segments((("asked ", 0.0), ("answered", 1.0)), META)
    plain, weighted = renderer(), renderer(prompt_weight=1.0, train_on="last_turn", train_on_eot="none")
    assert plain.render(segments).weights.tolist() == weighted.render(segments).weights.tolist()


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("turn", ["one<|im_end|>", "two<|im_end|>"]),
        ("last", ["one", "two<|im_end|>"]),
        ("none", ["one", "two"]),
    ],
)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_end_of_turn(kind, policy, expected):
    made = renderer(kind, train_on_eot=policy)
    example = made.render(TALK)
    assert texts(made, example) == expected
    left_out = decoded(made, example, Reason.END_OF_TURN)
    assert left_out == "<|im_end|>" * {"turn": 0, "last": 1, "none": 2}[policy]
    assert (policy == "none") == any("no end of a turn is trained" in note for note in example.notes)


GLM = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
"""Ends no turn: the next one's header does."""


def test_without_trained_ends_a_template_needs_none():
    added = ("<|user|>", "<|assistant|>", "<|system|>")
    with pytest.raises(SFTError, match="no token that generation could stop on"):
        renderer(template=GLM, added=added).render(TALK)
    made = renderer(template=GLM, added=added, train_on_eot="none")
    assert texts(made, made.render(TALK)) == ["one", "two"]
    assert made.stop_token_ids == (made.tokenizer.eos_token_id,)
    call = conversation(("user", "go"), Message("assistant", "", tool_calls=(ToolCall("f", {"x": 1}),)))
    made = renderer(template=QWEN.replace("<|im_end|>", ""), added=ADDED, train_on_eot="none")
    assert texts(made, made.render(call)) == [
        '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    ]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_reasoning_that_is_not_trained(kind):
    made = renderer(kind, QWEN, MARKS, train_reasoning=False)
    thought = Message("assistant", "2", reasoning="\nOne and one.\n")
    example = made.render(conversation(("user", "1+1?"), thought))
    assert texts(made, example) == ["<think>\n", "\n</think>\n\n2<|im_end|>"]
    assert decoded(made, example, Reason.REASONING) == "One and one."
    calling = Message("assistant", "", reasoning="hm", tool_calls=(ToolCall("f", {"x": "y"}),))
    example = made.render(conversation(("user", "go"), calling))
    assert decoded(made, example, Reason.REASONING) == "hm"
    assert texts(made, example)[1].endswith('"arguments": {"x": "y"}}\n</tool_call><|im_end|>')


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_reasoning_in_the_content_that_is_not_trained(kind):
    made = renderer(kind, added=MARKS, train_reasoning=False)
    example = made.render(conversation(("user", "x"), ("assistant", "<think>\nhm\n</think>\n\n2")))
    assert decoded(made, example, Reason.REASONING) == "hm"
    assert texts(made, example) == ["<think>\n", "\n</think>\n\n2<|im_end|>"]
    asking = conversation(("user", "<think>a</think>b"), ("assistant", "<think></think>2"))
    assert decoded(made, made.render(asking), Reason.REASONING) == ""


def test_reasoning_that_is_not_trained_may_be_left_out():
    thought = conversation(("user", "x"), Message("assistant", "2", reasoning="One."))
    with pytest.raises(
        SFTError, match=r"leaves out the reasoning of this message(.|\n)*train_reasoning: false"
    ):
        renderer().render(thought)
    made = renderer(train_reasoning=False)
    assert texts(made, made.render(thought)) == ["2<|im_end|>"]


def test_the_result_of_a_tool_is_never_trained():
    made = renderer(prompt_weight=1.0)
    asked = [Message("user", "x"), Message("tool", "RESULT", weight=1.0), Message("assistant", "y")]
    with pytest.raises(SFTError, match=r"row 7, message 2 \(tool\): the result of a tool has weight 1"):
        made.render(Conversation(tuple(asked), (), META))


@pytest.mark.parametrize(
    ("policies", "words"),
    [
        ({"train_on": "first_turn"}, r"model\.render\.train_on: train_on is 'first_turn'(.|\n)*all_turns"),
        (
            {"train_on_eot": "all"},
            r"model\.render\.train_on_eot: train_on_eot is 'all'(.|\n)*turn, last, none",
        ),
        ({"prompt_weight": -1.0}, r"model\.render\.prompt_weight: weight -1\.0"),
        ({"prompt_weight": float("nan")}, r"model\.render\.prompt_weight: weight nan"),
    ],
)
def test_a_policy_that_does_not_exist_is_refused(policies, words):
    with pytest.raises(SFTError, match=words):
        RenderPolicies(**policies)


# ---------------------------------------------------------------------------------------- split turns


def test_split_turns_train_every_token_once():
    talk = conversation(
        ("user", "AA", 0.5), ("assistant", "one"), ("user", "BB", 0.5), ("assistant", "two", 0.0),
        ("user", "CC"), ("assistant", "three", 2.0),
    )  # fmt: skip
    whole, split = renderer(), renderer(split_turns=True)
    first, second = split.render(talk)
    assert first.weights.sum() + second.weights.sum() == whole.render(talk).weights.sum()
    assert (first.turn, second.turn) == (2, 6)
    assert texts(split, first) == ["AA", "one<|im_end|>"]
    assert texts(split, second) == ["BB", "three<|im_end|>"]
    assert decoded(split, second, Reason.OTHER_TURN) == "AAone"
    assert decoded(split, second, Reason.ZERO_WEIGHT) == "two"
    assert [len(each) for each in split.render_each([talk, PAIR, talk])] == [2, 1, 2]
    assert len(split.render_all([talk, PAIR, talk])) == 5


def test_text_after_the_last_split_turn_is_told():
    talk = conversation(("user", "a"), ("assistant", "one"), ("user", "bye", 1.0))
    (example,) = renderer(split_turns=True).render(talk)
    assert any("after the last trained turn is in no example" in note for note in example.notes)


def test_without_a_trained_turn_there_is_nothing_to_split():
    (example,) = renderer(split_turns=True).render(conversation(("user", "asked", 1.0)))
    assert example.turn is None
    (example,) = renderer(split_turns=True).render(Segments((("text", 1.0),), META))
    assert example.turn is None


# ----------------------------------------------------------------------------------------------- BOS


def test_two_bos_tokens_are_refused():
    doubled = renderer(template="{{ bos_token + bos_token }}" + CHATML)
    with pytest.raises(SFTError, match="begins with two BOS tokens"):
        doubled.render(PAIR)
    glued = "{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    made = make_renderer(build_tokenizer("bytes"), glued)
    made.render(conversation(("user", "<s>hi"), ("assistant", "hello")))  # the user's own


def test_a_missing_bos_is_told():
    from tokenizers.processors import TemplateProcessing

    tokenizer = build_tokenizer.__wrapped__("bytes", ADDED)
    bos = ("<s>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[bos])
    assert any("writes no BOS token" in note for note in make_renderer(tokenizer, CHATML).render(PAIR).notes)
    made = make_renderer(tokenizer, "{{ bos_token }}" + CHATML)
    with_bos = made.render(PAIR)
    assert with_bos.notes == ()
    (note,) = made.render(conversation(("user", "<s>hi"), ("assistant", "hello"))).notes
    assert note == "there are BOS tokens (<s>) after the start: the template's, or in the messages"
    assert (with_bos.input_ids == tokenizer.bos_token_id).sum() == 1


# ---------------------------------------------------------------------------- any template, any policy

HEADERS = st.sampled_from(["<|im_start|>{r}\n", "### {r}:\n", "[{r}] ", "{r}: "])
FILTERS = st.sampled_from(["", " | trim", ".strip('\\n')", " | replace('a', 'bb')", " | upper"])
ENDS = st.sampled_from(["<|im_end|>\n", "<|im_end|>", "</s>", " </s>\n\n", "\n<|im_end|> "])
BEFORE = st.sampled_from(["", "{{ bos_token }}", "Below is a chat.\n\n"])
AFTER = st.sampled_from(["", "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"])
TEXTS = st.lists(
    st.one_of(st.text(max_size=8), st.sampled_from(["<|im_end|>", "### assistant:\n", EOS, "a", " ", "\n"])),
    max_size=4,
).map("".join)
TURNS = st.lists(
    st.tuples(TEXTS, TEXTS.filter(str.strip), st.sampled_from([None, 0.0, 0.5])), min_size=1, max_size=3
)


@settings(max_examples=120, deadline=None)
@given(
    header=HEADERS, change=FILTERS, end=ENDS, before=BEFORE, after=AFTER,
    turns=TURNS,
    kind=st.sampled_from(TOKENIZERS), train_on=st.sampled_from(["all_turns", "last_turn"]),
    eot=st.sampled_from(["turn", "last", "none"]), split=st.booleans(),
)  # fmt: skip
def test_any_template_and_policy(header, change, end, before, after, turns, kind, train_on, eot, split):
    head, tail = (repr(text.replace("\n", "\\n"))[1:-1].replace("\\\\n", "\\n") for text in (header, end))
    opening = "'" + head.replace("{r}", "' + {} + '") + "'"
    template = (
        f"{before}{{% for m in messages %}}{{{{ {opening.format('m.role')} + (m.content{change}) + '{tail}' }}}}"
        f"{{% endfor %}}{{% if add_generation_prompt %}}{{{{ {opening.format(repr('assistant'))} }}}}{{% endif %}}"
        f"{after}"
    )
    made = renderer(kind, template, train_on=train_on, train_on_eot=eot, split_turns=split)
    messages = [
        m for asked, said, w in turns for m in (Message("user", asked), Message("assistant", said, weight=w))
    ]
    talk = Conversation(tuple(messages), (), META)
    weights = [1.0 if w is None else w for _, _, w in turns]
    chosen = [n for n, w in enumerate(weights) if w and (train_on == "all_turns" or n == len(turns) - 1)]
    if not chosen:
        with pytest.raises(SFTError, match="nothing to train on"):
            made.render(talk)
        return
    examples = made.render(talk) if split else [made.render(talk)]
    tokenizer = made.tokenizer
    for example, last in zip(examples, chosen if split else [len(turns) - 1], strict=True):
        part = [{"role": m.role, "content": m.content} for m in messages[: 2 * last + 2]]
        ids = tokenizer.apply_chat_template(part, chat_template=template, tokenize=True, return_dict=False)
        assert example.input_ids.tolist() == ids
        expected = np.zeros(len(ids))
        text = tokenizer.apply_chat_template(part, chat_template=template, tokenize=False)
        offsets = renderer(kind)._encoder._tokens.whole(
            text, add_special_tokens=False, return_offsets_mapping=True
        )["offset_mapping"]
        for n in [last] if split else chosen:
            prompt = tokenizer.apply_chat_template(
                part[: 2 * n + 1], chat_template=template, tokenize=False, add_generation_prompt=True
            )
            through = tokenizer.apply_chat_template(part[: 2 * n + 2], chat_template=template, tokenize=False)
            if after:
                through = through.removesuffix(EOS)
            stop = made.stop_token
            stop_end = through.rindex(stop) + len(stop)
            trained_stop = eot == "turn" or (eot == "last" and (split or n == chosen[-1]))
            until = stop_end if trained_stop else stop_end - len(stop)
            for i, (a, b) in enumerate(offsets):
                if b > len(prompt) and a < until:
                    expected[i] = weights[n]
        assert example.weights.tolist() == expected.tolist()
