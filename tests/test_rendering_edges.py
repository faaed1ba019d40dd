"""Weights, raw text, stop tokens, and tokens that straddle the boundary of what is trained."""

import copy

import numpy as np
import pytest
from chat_families import (
    BOS,
    CHATML,
    EOS,
    FAMILIES,
    IM,
    META,
    PAIR,
    PHI3,
    build_tokenizer,
    chatml,
    conversation,
    make_renderer,
    trained_turns,
)
from hypothesis import given
from hypothesis import strategies as st

from lightning_sft import Message, Renderer, Segments, SFTError
from lightning_sft.example import Reason
from lightning_sft.rendering.encode import _Places


def test_weights_of_messages_are_those_of_their_tokens():
    renderer = chatml()
    example = renderer.render(
        conversation(
            ("user", "AA", 0.25),
            ("assistant", "BB", 0.5),
            ("user", "CC", 0.0),
            ("assistant", "DD", 0.0),
            ("assistant", "EE"),
        )
    )
    decode = renderer.tokenizer.decode
    by_weight = {w: decode(example.input_ids[example.weights == w]) for w in (0.25, 0.5, 1.0)}
    assert by_weight == {0.25: "AA", 0.5: "BB<|im_end|>", 1.0: "EE<|im_end|>"}
    assert decode(example.input_ids[example.reasons == Reason.ZERO_WEIGHT]) == "DD"
    assert ((example.reasons == Reason.TRAINED) == (example.weights > 0)).all()
    assert example.weights.dtype == np.float32
    assert example.input_ids.dtype == np.int32


def test_a_weight_too_small_for_a_float32_is_0():
    example = chatml().render(
        conversation(("user", "hi", 1e-50), ("assistant", "no", 1e-50), ("assistant", "hello"))
    )
    assert ((example.reasons == Reason.TRAINED) == (example.weights > 0)).all()


def test_the_first_token_is_never_trained():
    template = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    renderer = make_renderer(build_tokenizer("bytes"), template)
    example = renderer.render(conversation(("assistant", "abc")))
    assert example.reasons.tolist() == [Reason.FIRST, *[Reason.TRAINED] * (len(example) - 1)]
    assert example.weights.tolist() == [0.0, *[1.0] * (len(example) - 1)]


def test_padding_that_is_the_end_of_turn_token_is_trained_by_position(tokenizer):
    assert tokenizer.pad_token == tokenizer.eos_token
    renderer = Renderer(tokenizer, "plain")
    twice = conversation(
        ("user", "say <|endoftext|>"), ("assistant", "hi"), ("user", "bye"), ("assistant", "bye")
    )
    example = renderer.render(twice)
    ends = example.input_ids == tokenizer.eos_token_id
    assert example.weights[ends].tolist() == [0.0, 1.0, 1.0]
    assert [text for _, text in trained_turns(tokenizer, example)] == ["hi<|endoftext|>", "bye<|endoftext|>"]


def test_a_conversation_renders_alike_alone_and_among_others():
    renderer = chatml()
    several = [PAIR, conversation(("user", "a much longer question"), ("assistant", "yes")), PAIR]
    for item, example in zip(several, renderer.render_all(several), strict=True):
        alone = renderer.render(item)
        assert alone.input_ids.tolist() == example.input_ids.tolist()
        assert alone.weights.tolist() == example.weights.tolist()
    assert renderer.render_all([]) == []


# ------------------------------------------------------------------------ tokens across the boundary

COLON = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.mark.parametrize("kind", ["bytes", "trimmed"])
def test_an_ordinary_token_that_reaches_into_the_response_is_trained(kind):
    tokenizer = build_tokenizer(kind)
    example = make_renderer(tokenizer, COLON).render(conversation(("user", "x"), ("assistant", "hello 1")))
    assert "Ġhello" in tokenizer.convert_ids_to_tokens(example.input_ids)
    assert trained_turns(tokenizer, example) == [(f"user: x{EOS}assistant:", f" hello 1{EOS}")]


@pytest.mark.parametrize("kind", ["bytes", "trimmed"])
def test_a_space_of_the_header_that_is_its_own_token_is_not_trained(kind):
    tokenizer = build_tokenizer(kind)
    example = make_renderer(tokenizer, COLON).render(conversation(("user", "x"), ("assistant", "5 + 5")))
    assert trained_turns(tokenizer, example) == [(f"user: x{EOS}assistant: ", f"5 + 5{EOS}")]


@pytest.mark.parametrize("kind", ["bytes", "trimmed"])
def test_a_newline_merged_with_the_responses_spaces_is_trained(kind):
    tokenizer = build_tokenizer(kind, IM, text="def f(x):\n    return x\n    \n    pass\n")
    example = make_renderer(tokenizer, CHATML).render(
        conversation(("user", "x"), ("assistant", "    return x"))
    )
    assert "ĊĠĠĠ" in tokenizer.convert_ids_to_tokens(example.input_ids)
    (turn,) = trained_turns(tokenizer, example)
    assert turn == ("<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant", "\n    return x<|im_end|>")


@pytest.mark.parametrize("kind", ["bytes", "trimmed", "pieces"])
def test_an_added_token_that_swallows_the_responses_whitespace_is_not_trained(kind):
    family = FAMILIES["phi3"]
    tokenizer = build_tokenizer(kind, family.added, rstrip=True)
    example = make_renderer(tokenizer, PHI3).render(conversation(("user", "x"), ("assistant", " \n hello ")))
    assert trained_turns(tokenizer, example) == [("<|user|>x<|end|><|assistant|>", "hello <|end|>")]
    glued = make_renderer(tokenizer, PHI3.replace("|>\\n", "|>"))
    example = glued.render(conversation(("user", "x"), ("assistant", " \n hello ")))
    assert trained_turns(tokenizer, example) == [("<|user|>x<|end|><|assistant|>", "hello <|end|>")]


@pytest.mark.parametrize("kind", ["bytes", "trimmed"])
def test_an_added_token_of_the_response_that_swallows_the_headers_space_is_trained(kind):
    tokenizer = build_tokenizer(kind, ("<tool>",), lstrip=True)
    example = make_renderer(tokenizer, COLON).render(
        conversation(("user", "x"), ("assistant", "<tool>hello"))
    )
    assert trained_turns(tokenizer, example) == [(f"user: x{EOS}assistant:", f"<tool>hello{EOS}")]


def test_the_users_tokenizer_is_left_as_it_is():
    tokenizer = build_tokenizer("trimmed")
    before = tokenizer.backend_tokenizer.to_str()
    make_renderer(tokenizer, COLON).render(PAIR)
    assert tokenizer.backend_tokenizer.to_str() == before


# ------------------------------------------------------------------------------------------- segments


@pytest.fixture(scope="module")
def with_bos():
    """A tokenizer that puts BOS before a text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(build_tokenizer("bytes"))
    bos = (BOS, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[bos])
    return tokenizer


def segments(*pieces):
    return Segments(tuple((piece if isinstance(piece, tuple) else (piece, 1.0)) for piece in pieces), META)


def test_raw_text_gets_the_tokens_that_its_tokenizer_adds_and_a_trained_end(with_bos):
    example = Renderer(with_bos).render(segments("hello there"))
    assert example.input_ids.tolist() == [*with_bos("hello there").input_ids, with_bos.eos_token_id]
    assert example.input_ids[0] == with_bos.bos_token_id
    assert example.weights.tolist() == [0.0] + [1.0] * (len(example) - 1)
    assert example.reasons[0] == Reason.CONTEXT


def test_raw_text_gets_no_bos_where_the_tokenizer_adds_none():
    tokenizer = build_tokenizer("bytes")
    example = Renderer(tokenizer).render(segments("hello there"))
    assert example.input_ids.tolist() == [*tokenizer("hello there").input_ids, tokenizer.eos_token_id]
    assert example.reasons.tolist() == [Reason.FIRST] + [Reason.TRAINED] * (len(example) - 1)


def test_an_eos_that_the_tokenizer_adds_is_not_taken_for_a_bos_of_the_same_id():
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(build_tokenizer("bytes"))
    tokenizer.bos_token = EOS
    eos = (EOS, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {EOS}", special_tokens=[eos])
    example = Renderer(tokenizer).render(segments("hello there"))
    assert example.input_ids.tolist() == tokenizer("hello there").input_ids


def test_bos_and_eos_in_the_text_are_not_doubled(with_bos):
    example = Renderer(with_bos).render(segments(f"{BOS}hello{EOS}"))
    assert with_bos.decode(example.input_ids) == f"{BOS}hello{EOS}"
    assert example.reasons.tolist() == [Reason.FIRST] + [Reason.TRAINED] * (len(example) - 1)


def test_segments_are_encoded_as_one_text_with_their_own_weights(with_bos):
    example = Renderer(with_bos).render(
        segments(("hello", 0.0), (" there,", 0.5), (" how are", 0.0), (" you", 1.0))
    )
    assert example.input_ids.tolist() == [
        *with_bos("hello there, how are you").input_ids,
        with_bos.eos_token_id,
    ]
    assert with_bos.decode(example.input_ids[example.weights == 0.5]) == " there,"
    assert with_bos.decode(example.input_ids[example.weights == 1.0]) == f" you{EOS}"
    untrained = with_bos.decode(example.input_ids[example.reasons == Reason.ZERO_WEIGHT])
    assert untrained == "hello how are"


def test_a_token_across_segments_belongs_to_the_later_one():
    tokenizer = build_tokenizer("bytes")
    renderer = Renderer(tokenizer)
    assert "Ġhello" in tokenizer.convert_ids_to_tokens(tokenizer("x hello").input_ids)
    trained = renderer.render(segments(("x he", 0.0), ("llo", 1.0)))
    assert tokenizer.decode(trained.input_ids[trained.weights > 0]) == f" hello{EOS}"
    left_out = renderer.render(segments(("x x he", 1.0), ("llo", 0.0)))
    assert tokenizer.decode(left_out.input_ids[left_out.weights > 0]) == " x"


@pytest.mark.parametrize(
    "pieces", [(("", 0.0), "hello there"), (("", 1.0), ("hello", 0.0), ("", 0.5), " there")]
)
def test_an_empty_segment_changes_nothing(with_bos, pieces):
    example = Renderer(with_bos).render(segments(*pieces))
    assert example.input_ids.tolist() == [*with_bos("hello there").input_ids, with_bos.eos_token_id]
    assert set(example.weights.tolist()) == {0.0, 1.0}


def test_a_text_of_one_token_trains_its_end():
    tokenizer = build_tokenizer("bytes")
    example = Renderer(tokenizer).render(segments("x"))
    assert example.input_ids.tolist() == [*tokenizer("x").input_ids, tokenizer.eos_token_id]
    assert example.weights.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("pieces", [(), ("",), (("hello", 0.0),), (EOS,)])
def test_a_text_without_a_trained_token_is_refused(pieces):
    with pytest.raises(SFTError, match=r"^rows\.json, row 7: nothing to train on"):
        Renderer(build_tokenizer("bytes")).render(segments(*pieces))


# -------------------------------------------------------------------------------------- stop tokens


def test_eos_is_a_stop_token_beside_the_templates_own():
    renderer = chatml()
    assert renderer.stop_token == "<|im_end|>"
    ids = renderer.tokenizer.convert_tokens_to_ids(["<|im_end|>", EOS])
    assert renderer.stop_token_ids == tuple(ids)


def test_the_longest_of_the_tokens_that_could_end_a_turn_does():
    tokenizer = build_tokenizer("bytes", ("<end>", "<end>!", "!"))
    renderer = make_renderer(tokenizer, "{% for m in messages %}{{ m.content + ' <end>!' }}{% endfor %}")
    assert renderer.stop_token == "<end>!"


def test_the_generation_prompt_is_the_templates():
    renderer = Renderer(build_tokenizer("bytes"), "plain")
    prompt = renderer.generation_prompt([Message("user", "hi")], [{"name": "f"}])
    assert prompt == f'{BOS}### Tools:\n{{"name": "f"}}\n\n### User:\nhi\n\n### Assistant:\n'


@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 3)), max_size=12),
    st.lists(st.tuples(st.integers(0, 14), st.integers(0, 5)), max_size=6),
)
def test_tokens_of_a_range_of_characters_are_found_in_order_as_they_are_one_by_one(tokens, ranges):
    starts = np.sort([start for start, _ in tokens]).astype(np.int64)
    ends = np.maximum.accumulate(starts + [length for _, length in tokens]) if tokens else starts
    places = _Places(np.stack([starts, ends], axis=1))
    assert places.in_order
    ranges = [(start, start + length) for start, length in ranges]
    numbers = np.arange(len(tokens))
    for (start, end), (begun, reaching), holding in zip(
        ranges, places.within(ranges), places.at([start for start, _ in ranges]), strict=True
    ):
        assert numbers[begun].tolist() == [n for n in numbers if start <= starts[n] < end]
        assert list(reaching) == [n for n in numbers if starts[n] < start < ends[n]]
        assert numbers[holding].tolist() == [n for n in numbers if starts[n] <= start < ends[n]]


def test_tokens_out_of_order_get_the_weights_of_their_places():
    renderer = Renderer(build_tokenizer("bytes"))
    rows = [Segments((("1 2", 0.0), (" 3 4", 1.0)), META), Segments((("x", 0.0), ("yz", 1.0)), META)]
    expected = renderer.render_all(rows)
    encoder = renderer._encoder
    encoded = list(encoder._tokens.encode(["1 2 3 4", "xyz"]))
    order, first = list(range(len(expected[0]))), int(np.argmax(expected[0].weights > 0))
    order[first - 1 : first + 1] = [first, first - 1]
    encoded[0] = tuple(each[order[:-1]] for each in encoded[0])
    encoder._tokens.encode = lambda texts: encoded
    found = renderer.render_all(rows)
    assert first > 1
    assert found[0].input_ids.tolist() == expected[0].input_ids[order].tolist()
    assert found[0].weights.tolist() == expected[0].weights[order].tolist()
    assert found[1].input_ids.tolist() == expected[1].input_ids.tolist()
    assert found[1].weights.tolist() == expected[1].weights.tolist()
