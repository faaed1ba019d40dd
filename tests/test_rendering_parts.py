"""Parts of a message with weights of their own: each token has that of the part that it ends in."""

from dataclasses import replace

import pytest
from chat_families import (
    CHATML,
    IM,
    META,
    QWEN,
    TOKENIZERS,
    build_tokenizer,
    conversation,
    law,
    make_renderer,
    template_ids,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sft import Message, PartWeight, Renderer, SFTError, ToolCall
from lightning_sft.example import Reason
from lightning_sft_formats.messages import Messages

MARKS = (*IM, "<think>", "</think>", "<tool_call>", "</tool_call>")
WEIGHTS = st.sampled_from([0.0, 0.5, 1.0, 2.0])


def message(role: str, *parts: tuple[str, float | None], weight: float | None = None) -> Message:
    """A message of these texts."""
    content = [{"type": "text", "text": t} | ({} if w is None else {"weight": w}) for t, w in parts]
    fields = {"role": role, "content": content} | ({} if weight is None else {"weight": weight})
    filler = {"role": "assistant", "content": "x"}
    return next(iter(Messages().convert({"messages": [fields, filler]}))).messages[0]


def characters(made: Renderer, talk) -> list[tuple[str, float]]:
    """(text, weight) of each run of one weight, character by character of the whole rendering."""
    ((rendering,),) = made.explain([talk])
    out: list[list] = []
    position = 0
    for (_, end), weight in zip(rendering.offsets.tolist(), rendering.example.weights.tolist(), strict=True):
        text, position = rendering.text[position:end], max(position, end)
        if out and out[-1][1] == weight:
            out[-1][0] += text
        elif text:
            out.append([text, weight])
    return [tuple(each) for each in out]


@settings(max_examples=80, deadline=None)
@given(
    parts=st.lists(st.tuples(st.text("ab <>|\nä é", max_size=5), st.none() | WEIGHTS), min_size=1, max_size=4)
    .filter(lambda parts: "".join(t for t, _ in parts).strip()),
    weight=st.none() | WEIGHTS,
    kind=st.sampled_from(TOKENIZERS),
    change=st.sampled_from(
        ["m.content", "m.content | trim", "(m.content | trim) + ' '", "m.content | replace('a', 'cc')"]
    ),
)  # fmt: skip
def test_every_token_has_the_weight_of_the_part_that_it_ends_in(parts, weight, kind, change):
    """By hand: the text that transformers renders, cut by what each part becomes; offsets give the last character."""
    template = CHATML.replace("m.content", change)
    made = make_renderer(build_tokenizer(kind, IM), template)
    said = message("assistant", *parts, weight=weight)
    talk = conversation(("user", "hi"), said)
    default = 1.0 if said.weight is None else said.weight
    expected_of = [w if w is not None else default for _, w in parts]
    if not any(w > 0 for (t, _), w in zip(parts, expected_of, strict=True) if t) and default == 0:
        with pytest.raises(SFTError, match="nothing to train on"):
            made.render(talk)
        return
    by_character = [w for (text, _), w in zip(parts, expected_of, strict=True) for _ in text]
    content = said.content
    lead, tail = len(content) - len(content.lstrip()), len(content) - len(content.rstrip())
    inner = by_character[lead : len(content) - tail]
    if (
        "trim" not in change
    ):  # outer whitespace goes with the part next to it inside, as the template's text does
        inner = [inner[0]] * lead + inner + [inner[-1]] * tail
    if "replace" in change:
        inner = [w for c, w in zip(content, inner, strict=True) for _ in range(2 if c == "a" else 1)]
    ((prompt, answer),) = law(made.tokenizer, talk, template, "<|im_end|>")
    weights = [0.0] * len(prompt) + inner + [inner[-1]] * (len(answer) - len(inner))
    if not any(weights):
        with pytest.raises(SFTError, match="nothing to train on"):
            made.render(talk)
        return
    example = made.render(talk)
    text = prompt + answer
    whole = made.tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": content}],
        chat_template=template, tokenize=False,
    )  # fmt: skip
    assert whole.startswith(text)
    offsets = made._encoder._tokens.whole(whole, add_special_tokens=False, return_offsets_mapping=True)
    weights += [0.0] * (len(whole) - len(text))
    assert example.input_ids.tolist() == template_ids(made.tokenizer, talk, template)
    assert example.weights.tolist() == [weights[end - 1] for _, end in offsets["offset_mapping"]]


def test_the_templates_text_goes_with_the_part_after_it_and_the_end_with_the_last():
    call = [ToolCall("f", {"x": "y"}), ToolCall("g", {"x": "z"})]
    said = Message(
        "assistant", "Look.", reasoning="Hm.", tool_calls=tuple(call),
        part_weights=(
            PartWeight("reasoning", 0, 3, 0.25), PartWeight("content", 0, 5, 0.0),
            PartWeight("tool_calls", 0, 1, 2.0), PartWeight("tool_calls", 1, 2, 0.5),
        ),
    )  # fmt: skip
    made = make_renderer(build_tokenizer("bytes", MARKS), QWEN)
    runs = characters(made, conversation(("user", "go"), said))
    assert runs[0][1] == 0.0
    assert [weight for _, weight in runs[1:]] == [0.25, 0.0, 2.0, 0.5, 0.0]
    assert runs[1][0] == "<think>\nHm."
    assert runs[2][0] == "\n</think>\n\nLook."
    assert '"name": "f"' in runs[3][0]
    assert runs[3][0].endswith('"x": "y')
    assert '"name": "g"' in runs[4][0]
    assert runs[4][0].endswith("<|im_end|>")


@pytest.mark.parametrize("policies", [{"train_on_eot": "none"}, {"train_reasoning": False}])
def test_policies_count_before_the_weights_of_parts(policies):
    tokenizer = build_tokenizer("bytes", MARKS)
    tokenizer.chat_template = QWEN
    made = Renderer(tokenizer, **policies)
    parts = (PartWeight("reasoning", 0, 3, 0.5), PartWeight("content", 0, 1, 2.0))
    talk = conversation(("user", "go"), Message("assistant", "2!", reasoning="Hm.", part_weights=parts))
    runs = [(text, weight) for text, weight in characters(made, talk) if weight]
    if "train_on_eot" in policies:
        assert runs == [("<think>\nHm.", 0.5), ("\n</think>\n\n2", 2.0), ("!", 1.0)]
    else:
        assert runs == [("<think>\n", 0.5), ("\n</think>\n\n2", 2.0), ("!<|im_end|>", 1.0)]


def test_parts_of_a_prompt():
    made = make_renderer(build_tokenizer("bytes", IM), CHATML)
    asking = message("user", ("Given:", 0), (" a rule.", 0.5), (" Go.", None))
    runs = characters(made, conversation(asking, ("assistant", "hello", 0.0)))
    assert [(text, weight) for text, weight in runs if weight] == [(" a rule.", 0.5)]
    tokenizer = build_tokenizer("bytes", IM)
    tokenizer.chat_template = CHATML
    example = Renderer(tokenizer, prompt_weight=0.25).render(conversation(asking, ("assistant", "hello")))
    assert tokenizer.decode(example.input_ids[example.weights == 0.25]) == " Go."
    assert tokenizer.decode(example.input_ids[example.reasons == Reason.ZERO_WEIGHT]) == "Given:"


def test_a_tools_result_has_no_trained_part():
    made = make_renderer(build_tokenizer("bytes", IM), CHATML)
    result = Message("tool", "ab", part_weights=(PartWeight("content", 0, 1, 0.5),))
    with pytest.raises(SFTError, match=r"message 2 \(tool\): the result of a tool has weight 0\.5"):
        made.render(conversation(("user", "x"), result, ("assistant", "y")))
    bad = Message("assistant", "ab", part_weights=(PartWeight("content", 0, 1, -1.0),))
    with pytest.raises(SFTError, match=r"message 2 \(assistant\): weight -1"):
        made.render(conversation(("user", "x"), bad))


def test_turns_with_parts_are_split_and_left_out_as_others_are():
    tokenizer = build_tokenizer("bytes", IM)
    tokenizer.chat_template = CHATML
    first, last = message("assistant", ("one", 0), ("two", 1)), message("assistant", ("a", 0.5), ("b", 2))
    talk = replace(conversation(("user", "x"), first, ("user", "y"), last), meta=META)
    split = Renderer(tokenizer, split_turns=True).render(talk)
    assert [example.turn for example in split] == [2, 4]
    whole = Renderer(tokenizer).render(talk)
    assert sum(example.weights.sum() for example in split) == whole.weights.sum()
    assert tokenizer.decode(split[1].input_ids[split[1].reasons == Reason.OTHER_TURN]) == "onetwo"
    alone = Renderer(tokenizer, train_on="last_turn").render(talk)
    assert alone.weights.sum() == split[1].weights.sum()


def test_a_template_that_changes_text_across_parts_is_refused():
    made = make_renderer(
        build_tokenizer("bytes", IM), CHATML.replace("m.content", "m.content | replace('ab', 'x')")
    )
    made.render(conversation(("user", "hi"), ("assistant", "abc")))
    with pytest.raises(SFTError, match=r"changes the messages' text"):
        made.render(conversation(("user", "hi"), message("assistant", ("a", 0), ("bc", 1))))
