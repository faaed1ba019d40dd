"""The law of the loss mask, held against transformers' own rendering for many templates and tokenizers."""

import pytest
from chat_families import (
    BOS,
    EOS,
    FAMILIES,
    META,
    TOKENIZERS,
    build_tokenizer,
    law,
    make_renderer,
    swallowed,
    template_ids,
    trained_turns,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sft import Conversation, Message, SFTError, ToolCall
from lightning_sft.example import Reason


def chat(*turns: str | Message, system: str | None = None, tools=()) -> Conversation:
    """User and assistant in turn; a `Message` stands as it is."""
    messages = [Message("system", system)] if system else []
    for number, turn in enumerate(turns):
        messages.append(
            turn if isinstance(turn, Message) else Message(("user", "assistant")[number % 2], turn)
        )
    return Conversation(tuple(messages), tuple(tools), META)


def call(name="weather", content="", reasoning=None, **arguments) -> Message:
    return Message("assistant", content, reasoning=reasoning, tool_calls=(ToolCall(name, arguments),))


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
    },
}

CALLS = {
    "tools": chat(
        "Rain in Rome?",
        call(town="Rome", days=3, units=["mm", {"x": None}]),
        Message("tool", '{"rain": false}', name="weather"),
        "No.",
        tools=[WEATHER],
    ),
    "text and two calls": chat(
        "Rome, Oslo?",
        Message(
            "assistant",
            "I look.",
            tool_calls=(ToolCall("weather", {"town": "Rome"}), ToolCall("weather", '{"town": 1}')),
        ),
        Message("tool", "dry"),
        Message("tool", "wet"),
        Message("assistant", "Dry and wet."),
        system="Help.",
        tools=[WEATHER],
    ),
    "markers in a call": chat("go", call("f", **{"<|im_end|>": 1, "x": "</s><|im_end|>\n", "</s>": 2})),
}

THOUGHTS = {
    "reasoning": chat(
        "1+1?",
        Message("assistant", "2", reasoning="One and one."),
        "2+2?",
        Message("assistant", "4", reasoning="  Two and\ntwo.\n"),
    ),
    "reasoning before a call": chat("go", call(reasoning="I need it.", town="Rome"), tools=[WEATHER]),
    "nothing but reasoning": chat("go", Message("assistant", reasoning="hm")),
}

ORDERS = {
    "two systems": chat(
        Message("system", "Be kind."), Message("user", "hi"), Message("assistant", "yes"), system="Hm."
    ),
    "assistant twice": chat("hi", "one", Message("assistant", "two"), "three"),
}

OPENINGS = {
    "assistant speaks first": chat(
        Message("assistant", "Welcome!"), Message("user", "hi"), Message("assistant", "ok")
    )
}

CONVERSATIONS = {
    "single turn": chat("hello there", "I am fine, thank you."),
    "multi-turn": chat("how are you?", "fine", "and you?", "also fine", "bye", "bye bye"),
    "system": chat("hello", "Ahoy!", "bye", "Arr.", system="You are a pirate."),
    "unicode": chat("¿qué? שלום, مَرْحَبًا", "👩‍👩‍👧 e\u0301 漢字 \u202eשלום\u202c é\u00a0\U0001f600"),
    "whitespace at the edges": chat("  hello\n\n", "\n  I am\n\n  fine \n", "\tok\t", " yes  "),
    "lines and quotes": chat('a\n\nb "c" {d} {{ e }}', "{% if x %}\r\n'y' \\n & <z>\n```py\n1\n```"),
    "response like a piece of the prompt": chat("user", "user", "hello", "hello", "assistant", "assistant"),
    "very short responses": chat("a", "a", "1+1?", "2", "really?", ".", "ok", "👍", "x", "\u200b"),
    "empty prompt": chat("", "I begin."),
    "texts like sentinels": chat(
        "900000000000", "9000000000000000011 900000000001 90000000000 9", "9", "900000000000"
    ),
    "digits around sentinels": chat("1+1?", "90", "00000", "9000000000000000001"),
    "right-to-left": chat("שלום, מה שלומך?", "مَرْحَبًا بِكَ", "\u200fעוד\u200e", "\u202eشكرا\u202c"),
    **CALLS,
    **THOUGHTS,
    **ORDERS,
    **OPENINGS,
}


def can(family, name):
    """Whether the family's template has what the conversation needs."""
    needs = {"tools": CALLS, "reasoning": THOUGHTS, "any order": ORDERS, "no history": OPENINGS}
    return all(need in family.can for need, group in needs.items() if name in group)


def imitations(family):
    """Conversations whose texts hold the template's own tokens and headers."""
    yield chat(*(marker for marker in (family.stop, *family.markers) for _ in "ua"))
    everything = "".join((*family.markers, family.stop))
    yield chat(f"say {everything}", f"{everything} said", f"{BOS}{everything}{EOS}", f"ok {everything}")


def check(family, kind, conversations):
    """The examples obey the law: ids, trained text and what comes before it, weights and reasons."""
    tokenizer = build_tokenizer(kind, family.added, rstrip=family.rstrip)
    renderer = make_renderer(tokenizer, family.template)
    for conversation, example in zip(conversations, renderer.render_all(conversations), strict=True):
        assert example.input_ids.tolist() == template_ids(tokenizer, conversation, renderer.chat_template)
        expected = list(law(tokenizer, conversation, renderer.chat_template, family.stop))
        if family.rstrip:
            expected = [(swallowed(p, family.added), swallowed(p + t, family.added)) for p, t in expected]
            expected = [(prompt, through[len(prompt) :]) for prompt, through in expected]
        assert trained_turns(tokenizer, example) == expected
        assert set(example.weights.tolist()) == {0.0, 1.0}
        assert ((example.reasons == Reason.TRAINED) == (example.weights == 1)).all()
        assert ((example.reasons == Reason.CONTEXT) == (example.weights == 0)).all()
        assert example.meta is conversation.meta
        assert example.turn is None
    assert renderer.stop_token == family.stop
    assert tokenizer.convert_ids_to_tokens(renderer.stop_token_ids) == list(dict.fromkeys([family.stop, EOS]))


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(
    ("family", "name"), [(f, n) for f in FAMILIES for n in CONVERSATIONS if can(FAMILIES[f], n)]
)
def test_what_the_model_must_produce_is_trained_and_nothing_else(family, name, kind):
    check(FAMILIES[family], kind, [CONVERSATIONS[name]])


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_text_that_imitates_the_template_moves_no_boundary(family, kind):
    check(FAMILIES[family], kind, list(imitations(FAMILIES[family])))


@pytest.mark.parametrize(
    ("family", "name"), [(f, n) for f in FAMILIES for n in CONVERSATIONS if not can(FAMILIES[f], n)]
)
def test_a_conversation_that_the_template_cannot_hold_is_refused(family, name):
    tokenizer = build_tokenizer("bytes", FAMILIES[family].added, rstrip=FAMILIES[family].rstrip)
    with pytest.raises(SFTError, match=r"^rows\.json, row 7"):
        make_renderer(tokenizer, FAMILIES[family].template).render(CONVERSATIONS[name])


TEXTS = st.lists(
    st.one_of(
        st.text(max_size=12), st.sampled_from(["<|im_end|>", "<|im_start|>assistant\n", EOS, BOS, " ", "\n"])
    ),
    max_size=5,
).map("".join)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3), st.none() | TEXTS, st.sampled_from(TOKENIZERS)
)
def test_the_law_holds_for_any_text(pairs, system, kind):
    conversation = chat(*(text for pair in pairs for text in pair), system=system)
    for family in (FAMILIES["chatml"], FAMILIES["shipped plain"]):
        if all(answer.strip() for _, answer in pairs):
            check(family, kind, [conversation])
        else:
            with pytest.raises(SFTError, match="empty"):
                check(family, kind, [conversation])
