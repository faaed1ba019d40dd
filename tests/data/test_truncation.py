"""What becomes of examples that are longer than max_length, held against transformers and against slow searches."""

from __future__ import annotations

import copy
from collections import Counter
from itertools import chain
from typing import get_args

import numpy as np
import pytest
from chat_families import (
    BOS,
    CHATML,
    FAMILIES,
    META,
    build_tokenizer,
    chatml,
    conversation,
    law,
    make_renderer,
    swallowed,
    template_ids,
    trained_turns,
)
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from lightning_sft import Conversation, Message, Renderer, Segments, SFTError, ToolCall
from lightning_sft.data.fitted import BETWEEN
from lightning_sft.data.ledger import SourceLedger
from lightning_sft.data.truncation import Overlong, fit
from lightning_sft.example import Example, Reason

POLICIES = get_args(Overlong)
WORDS = "the user asks and the assistant answers hello there how are you I am fine thank you"

plenty = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def text(number: int, words: int) -> str:
    """So many words, another text for every number."""
    chosen = WORDS.split()
    return " ".join([str(number), *(chosen[(number + n) % len(chosen)] for n in range(words))])


@st.composite
def talks(draw, *, weights=(None,)) -> Conversation:
    """A conversation of one to five exchanges, some with a system message."""
    messages = [Message("system", "Be kind.")] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 5))):
        for role in ("user", "assistant"):
            weight = draw(st.sampled_from(weights)) if role == "assistant" else None
            messages.append(Message(role, text(len(messages), draw(st.integers(0, 12))), weight=weight))
    return Conversation(tuple(messages), (), META)


families = st.sampled_from(sorted(FAMILIES))
kinds = st.sampled_from(["bytes", "pieces"])
lengths = st.integers(2, 160)


def renderer_of(name: str, kind: str = "bytes", **policies) -> Renderer:
    family = FAMILIES[name]
    tokenizer = build_tokenizer(kind, family.added, rstrip=family.rstrip)
    return make_renderer(tokenizer, family.template, **policies)


def fitted(renderer: Renderer, talk, max_length: int, overlong: Overlong):
    """What becomes of each example of a conversation."""
    (renderings,) = renderer.explain([talk])
    return [fit(renderer, talk, each, max_length=max_length, overlong=overlong) for each in renderings]


def examples(renderer: Renderer, talk, max_length: int, overlong: Overlong):
    (one,) = fitted(renderer, talk, max_length, overlong)
    return [kept.example for kept in one.kept]


def ids_of(renderer: Renderer, talk: Conversation, numbers) -> list[int]:
    """transformers' own ids of some of the messages."""
    part = Conversation(tuple(talk.messages[n] for n in numbers), talk.tools, META)
    return template_ids(renderer.tokenizer, part, renderer.chat_template)


def exchanges_of(talk: Conversation) -> tuple[list[int], list[tuple[int, int]]]:
    """The system message's number, and those of each user's and assistant's message, which come in turn."""
    first = int(talk.messages[0].role == "system")
    return list(range(first)), [(n, n + 1) for n in range(first, len(talk.messages), 2)]


def trained_by_message(rendering) -> Counter:
    """The ids that are trained of each message, by message, id and place in it."""
    found: Counter = Counter()
    place: Counter = Counter()
    for token, weight, span in zip(
        rendering.example.input_ids.tolist(),
        rendering.example.weights.tolist(),
        rendering.span_of,
        strict=True,
    ):
        message = rendering.spans[int(span)].message
        if weight > 0:
            found[message, token, place[message], weight] += 1
            place[message] += 1
    return found


@plenty
@given(
    talk=talks(weights=(None, None, 0.0, 0.5)),
    family=families,
    kind=kinds,
    max_length=lengths,
    overlong=st.sampled_from(POLICIES),
    split_turns=st.booleans(),
    prompt_weight=st.sampled_from([0.0, 0.25]),
    train_on=st.sampled_from(["all_turns", "last_turn"]),
    train_on_eot=st.sampled_from(["turn", "last", "none"]),
)
def test_tokens_in_are_tokens_out_and_the_ledgers(talk, family, kind, max_length, overlong, **policies):
    renderer = renderer_of(family, kind, **policies)
    assume(has_something_to_train(talk, policies))
    (renderings,) = renderer.explain([talk])
    ledger = SourceLedger("rows.json", "", conversations=1)
    for whole in renderings:
        out = fit(renderer, talk, whole, max_length=max_length, overlong=overlong)
        ledger.count(out)
        kept, lost = sum(len(piece.example) for piece in out.kept), sum(cut.tokens for cut in out.cuts)
        assert len(whole.example) + out.repeated_tokens == kept + lost
        (before, *after), cuts = [trained(piece.example) for piece in (whole, *out.kept)], out.cuts
        assert before + out.retrained_tokens == sum(after) + sum(cut.trained_tokens for cut in cuts)
        assert all(cut.tokens >= 0 and cut.trained_tokens >= 0 for cut in cuts)
        assert (out.kept == (whole,)) == (len(whole.example) <= max_length)
        assert all(len(piece.example) <= max_length for piece in out.kept)
        assert all(after)
        again = policies["train_on_eot"] == "last" and len(out.kept) > 1
        assert out.retrained_tokens == 0 or again
        if overlong not in ("truncate_left", "truncate_right") and not again:
            pieces = sum(map(trained_by_message, out.kept), Counter())
            assert not pieces - trained_by_message(whole)  # nothing is trained twice
            if overlong == "split" and not any(cut.trained_tokens for cut in cuts):
                assert pieces == trained_by_message(whole)
        roles = {"assistant", "user", "system"} if policies["prompt_weight"] else {"assistant"}
        for piece in out.kept:
            ids, weights = piece.example.input_ids.tolist(), piece.example.weights
            assert ids.count(renderer.tokenizer.bos_token_id) == int(BOS in whole.text)
            assert {role_of(talk, piece, span) for span in piece.span_of[weights > 0].tolist()} <= roles
    ledger.check()
    assert ledger.examples == 0 or ledger.trained_tokens > 0


def trained(example: Example) -> int:
    return int((example.weights > 0).sum())


def has_something_to_train(talk: Conversation, policies) -> bool:
    answers = [m.weight != 0 for m in talk.messages if m.role == "assistant"]
    return policies["prompt_weight"] > 0 or (
        answers[-1] if policies["train_on"] == "last_turn" else any(answers)
    )


def role_of(talk: Conversation, rendering, span: int) -> str:
    message = rendering.spans[span].message
    return "template" if message is None else talk.messages[message].role


@plenty
@given(talk=talks(), family=families, kind=kinds, max_length=lengths)
def test_oldest_turns_are_dropped_until_the_rest_fits_and_no_more(talk, family, kind, max_length):
    renderer = renderer_of(family, kind)
    system, exchanges = exchanges_of(talk)
    candidates = [system + [n for pair in exchanges[k:] for n in pair] for k in range(len(exchanges))]
    fitting = [c for c in candidates if len(ids_of(renderer, talk, c)) <= max_length]
    found = examples(renderer, talk, max_length, "drop_oldest_turns")
    assert [example.input_ids.tolist() for example in found] == [
        ids_of(renderer, talk, numbers) for numbers in fitting[:1]
    ]
    for example in found:
        hold_against_the_law(renderer, FAMILIES[family], talk, fitting[0], example)


@plenty
@given(talk=talks(), family=families, kind=kinds, max_length=lengths)
def test_pieces_hold_as_many_exchanges_as_fit_and_each_once(talk, family, kind, max_length):
    renderer = renderer_of(family, kind)
    system, exchanges = exchanges_of(talk)
    expected, first = [], 0
    while first < len(exchanges):
        ends = range(first + 1, len(exchanges) + 1)
        parts = [system + [n for pair in exchanges[first:end] for n in pair] for end in ends]
        fitting = [p for p in parts if len(ids_of(renderer, talk, p)) <= max_length] or parts[:1]
        expected.append(fitting[-1])
        first += (len(fitting[-1]) - len(system)) // 2
    (out,) = fitted(renderer, talk, max_length, "split")
    lost = [cut for cut in out.cuts if cut.trained_tokens]
    found = {piece.part.messages: piece.example for piece in out.kept}
    whole = [part for part in expected if len(ids_of(renderer, talk, part)) <= max_length]
    assert [part for part in found if len(found[part]) == len(ids_of(renderer, talk, part))] == list(
        map(tuple, whole)
    )
    for part, example in found.items():
        assert list(part) in expected
        assert example.input_ids.tolist() == ids_of(renderer, talk, part)[:max_length]
        if list(part) in whole:
            hold_against_the_law(renderer, FAMILIES[family], talk, part, example)
    # what is cut off a piece may be text after its last turn, which isn't trained
    alone = [
        renderer.render(Conversation(tuple(talk.messages[n] for n in part), talk.tools, META))
        for part in expected
        if part not in whole
    ]
    assert bool(lost) == any((example.weights[max_length:] > 0).any() for example in alone)


def hold_against_the_law(renderer, family, talk, numbers, example):
    """What is trained is what inference has to produce after the shortened history."""
    part = Conversation(tuple(talk.messages[n] for n in numbers), talk.tools, META)
    expected = list(law(renderer.tokenizer, part, renderer.chat_template, family.stop))
    if family.rstrip:
        expected = [(swallowed(p, family.added), swallowed(p + t, family.added)) for p, t in expected]
        expected = [(prompt, through[len(prompt) :]) for prompt, through in expected]
    assert trained_turns(renderer.tokenizer, example) == expected


HI = Message("system", "Be kind.")
TALK = conversation(
    HI, ("user", "one"), ("assistant", "first"), ("user", "two"), ("assistant", "second"), ("user", "three"),
    ("assistant", "third"),
)  # fmt: skip
SYSTEM = "<|im_start|>system\nBe kind.<|im_end|>\n"


def exchange(asked: str, answered: str) -> str:
    return f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n{answered}<|im_end|>\n"


def size(renderer: Renderer, written: str) -> int:
    return len(renderer.tokenizer(written, add_special_tokens=False).input_ids)


def decoded(renderer: Renderer, found) -> list[str]:
    return [renderer.tokenizer.decode(example.input_ids) for example in found]


def test_the_oldest_exchanges_go_and_the_system_message_stays():
    renderer = chatml()
    two_left = SYSTEM + exchange("two", "second") + exchange("three", "third")
    (out,) = fitted(renderer, TALK, size(renderer, two_left), "drop_oldest_turns")
    assert decoded(renderer, [piece.example for piece in out.kept]) == [two_left]
    (cut,) = out.cuts
    assert cut.what == "messages 2-3"
    assert cut.tokens == size(renderer, exchange("one", "first"))
    assert cut.trained_tokens == size(renderer, "first<|im_end|>")
    (out,) = fitted(renderer, TALK, size(renderer, two_left) - 1, "drop_oldest_turns")
    assert decoded(renderer, [piece.example for piece in out.kept]) == [SYSTEM + exchange("three", "third")]
    assert [cut.what for cut in out.cuts] == ["messages 2-5"]
    shortest = size(renderer, SYSTEM + exchange("three", "third"))
    (out,) = fitted(renderer, TALK, shortest - 1, "drop_oldest_turns")
    assert (out.kept, out.cuts[0].reason) == (
        (),
        f"without room for the last exchange in max_length {shortest - 1}",
    )


def test_pieces_repeat_the_system_message_and_that_is_counted():
    renderer = chatml()
    limit = size(renderer, SYSTEM + exchange("one", "first") + exchange("two", "second"))
    (out,) = fitted(renderer, TALK, limit, "split")
    assert decoded(renderer, [piece.example for piece in out.kept]) == [
        SYSTEM + exchange("one", "first") + exchange("two", "second"),
        SYSTEM + exchange("three", "third"),
    ]
    assert not out.cuts
    assert out.repeated_tokens == size(renderer, SYSTEM)
    said = [[turn for _, turn in trained_turns(renderer.tokenizer, piece.example)] for piece in out.kept]
    assert said == [["first<|im_end|>", "second<|im_end|>"], ["third<|im_end|>"]]


def test_an_exchange_that_is_too_long_by_itself_is_cut_and_the_others_are_whole():
    renderer = chatml()
    talk = conversation(
        HI, ("user", "one"), ("assistant", "so " * 60), ("user", "hm " * 60), ("assistant", "ok"),
        ("user", "two"), ("assistant", "second"),
    )  # fmt: skip
    limit = 40
    (out,) = fitted(renderer, talk, limit, "split")
    whole = SYSTEM + exchange("one", "so " * 60)
    first, second = decoded(renderer, [piece.example for piece in out.kept])
    assert whole.startswith(first)
    assert second == SYSTEM + exchange("two", "second")
    assert len(out.kept[0].example) == limit
    cut, dropped = out.cuts
    assert (cut.reason, dropped.reason) == (
        "an exchange longer than max_length 40",
        "without a trained token in the first 40",
    )
    assert cut.tokens == size(renderer, whole) - limit
    assert cut.trained_tokens == cut.tokens - size(renderer, "\n")
    assert dropped.what == "messages 4-5"
    assert dropped.tokens == size(renderer, exchange("hm " * 60, "ok"))
    assert dropped.trained_tokens == size(renderer, "ok<|im_end|>")
    assert out.repeated_tokens == size(renderer, SYSTEM)


def test_a_system_message_that_is_trained_is_trained_in_the_first_piece_alone():
    renderer = chatml(prompt_weight=0.5)
    limit = size(renderer, SYSTEM + exchange("three", "third"))
    first, *others = examples(renderer, TALK, limit, "split")
    assert len(others) == 2
    kind = renderer.tokenizer("Be kind.", add_special_tokens=False).input_ids
    at = next(n for n in range(len(first)) if first.input_ids[n : n + len(kind)].tolist() == kind)
    own = slice(at, at + len(kind))
    assert first.weights[own].tolist() == [0.5] * len(kind)
    for other in others:
        assert other.input_ids[own].tolist() == kind
        assert set(other.reasons[own].tolist()) == {Reason.OTHER_TURN}
        assert not other.weights[own].any()


def test_tools_are_in_every_piece_and_a_call_stays_with_its_result():
    renderer = renderer_of("qwen")
    tool = {"type": "function", "function": {"name": "rain", "description": "", "parameters": {}}}
    call = Message("assistant", tool_calls=(ToolCall("rain", {"town": "Rome"}),))
    talk = conversation(
        ("user", "one"), call, Message("tool", "dry"), ("assistant", "It is dry."),
        ("user", "two"), call, Message("tool", "wet"), ("assistant", "It is wet."),
        tools=(tool,),
    )  # fmt: skip
    limit = len(renderer.render(talk)) - 1
    assert [
        piece.part.messages for (out,) in [fitted(renderer, talk, limit, "split")] for piece in out.kept
    ] == [
        (0, 1, 2, 3),
        (4, 5, 6, 7),
    ]
    for overlong in ("split", "drop_oldest_turns"):
        for example in examples(renderer, talk, limit, overlong):
            assert '<tools>\n{"type": "function"' in renderer.tokenizer.decode(example.input_ids)


@pytest.mark.parametrize(
    ("roles", "kept", "pieces"),
    [
        ("auaua", (3, 4), [(0,), (1, 2), (3, 4)]),  # a greeting is an exchange of its own
        ("uuaua", (3, 4), [(0, 1, 2), (3, 4)]),  # messages of the user in a row belong together
        (
            "uauau",
            (2, 3, 4),
            [(0, 1), (2, 3, 4)],
        ),  # a question without an answer can't be the one that is kept
        ("suasua", (0, 3, 4, 5), [(0, 1, 2), (0, 3, 4, 5)]),  # system messages stay where they are
    ],
)
def test_where_exchanges_begin(roles, kept, pieces):
    renderer = chatml()
    names = {"s": "system", "u": "user", "a": "assistant"}
    talk = conversation(*((names[role], text(n, 4)) for n, role in enumerate(roles)))
    limit = max(len(ids_of(renderer, talk, numbers)) for numbers in [kept, *pieces])
    (oldest,), (split,) = (fitted(renderer, talk, limit, name) for name in ("drop_oldest_turns", "split"))
    assert [piece.part.messages for piece in oldest.kept] == [kept]
    assert [piece.part.messages for piece in split.kept][: len(pieces)] == pieces


def test_untrained_turns_are_context_where_there_is_room_and_are_no_piece():
    renderer = chatml(train_on="last_turn")
    limit = size(renderer, SYSTEM + exchange("two", "second") + exchange("three", "third"))
    (out,) = fitted(renderer, TALK, limit, "split")
    assert [piece.part.messages for piece in out.kept] == [(0, 3, 4, 5, 6)]
    (cut,) = out.cuts
    assert (cut.reason, cut.what) == ("untrained turns that fit into no piece", "messages 2-3")
    assert (cut.tokens, cut.trained_tokens) == (size(renderer, exchange("one", "first")), 0)


@pytest.mark.parametrize("overlong", ["drop_oldest_turns", "split"])
def test_a_turn_with_an_example_of_its_own_loses_its_oldest_history(overlong):
    renderer = chatml(split_turns=True)
    limit = size(renderer, SYSTEM + exchange("two", "second") + exchange("three", "third"))
    outs = fitted(renderer, TALK, limit, overlong)
    kept = [piece for out in outs for piece in out.kept]
    assert [piece.part.messages for piece in kept] == [(0, 1, 2), (0, 1, 2, 3, 4), (0, 3, 4, 5, 6)]
    assert [piece.example.turn for piece in kept] == [3, 5, 7]
    said = [[turn for _, turn in trained_turns(renderer.tokenizer, piece.example)] for piece in kept]
    assert said == [["first<|im_end|>"], ["second<|im_end|>"], ["third<|im_end|>"]]


def test_the_end_of_every_piece_is_trained_where_that_of_an_example_is():
    renderer = chatml(train_on_eot="last")
    (out,) = fitted(renderer, TALK, size(renderer, SYSTEM + exchange("three", "third")), "split")
    assert (len(out.kept), out.retrained_tokens) == (3, 2)


def test_what_a_template_writes_between_turns_alone_is_lost_with_a_reason():
    last, between = "'<|im_end|>\\n' }}", "('<|im_end|>' if loop.last else '<|im_end|>----') }}"
    between = CHATML.replace(last, between)
    assert between != CHATML
    renderer = chatml(between)
    talk = conversation(("user", "one"), ("assistant", "first"), ("user", "two"), ("assistant", "second"))
    (out,) = fitted(renderer, talk, len(renderer.render(talk)) - 1, "split")
    assert len(out.kept) == 2
    (cut,) = out.cuts
    assert (cut.reason, cut.tokens) == (BETWEEN, size(renderer, "----"))
    ledger = SourceLedger("rows.json", "")
    ledger.count(out)
    assert (ledger.truncated_examples, ledger.split.examples, ledger.split.pieces) == (0, 1, 2)


@pytest.mark.parametrize("overlong", ["drop_oldest_turns", "split"])
def test_a_template_that_refuses_the_shortened_conversation_is_an_error_with_the_row(overlong):
    greeted = "{%- if messages | length > 2 and 'one' not in messages[1].content %}"
    renderer = chatml("".join([greeted, "{{ raise_exception('no greeting') }}{% endif %}", CHATML]))
    with pytest.raises(SFTError, match=r"no greeting.*as data\.overlong leaves them") as caught:
        fitted(renderer, TALK, len(renderer.render(TALK)) - 1, overlong)
    assert caught.value.where == str(META)
    assert "data.max_length" in caught.value.fix


def test_the_right_length_is_found_with_few_renderings(monkeypatch):
    renderer = chatml()
    talk = conversation(*((("user", "assistant")[n % 2], text(n, n % 7)) for n in range(120)))
    tried = []
    explain_part = renderer.explain_part
    monkeypatch.setattr(renderer, "explain_part", lambda *given: tried.append(given) or explain_part(*given))
    (out,) = fitted(renderer, talk, 400, "drop_oldest_turns")
    assert len(out.kept) == 1
    assert len(tried) <= 3
    tried.clear()
    (out,) = fitted(renderer, talk, 400, "split")
    assert len(tried) <= 3 * len(out.kept)


def test_what_is_cut_at_the_left_is_the_middle():
    renderer = renderer_of("llama3")
    whole = renderer.render(TALK)
    ids = whole.input_ids.tolist()
    head = len(ids_of(renderer, TALK, [0]))
    (out,) = fitted(renderer, TALK, len(ids) - 5, "truncate_left")
    (kept,) = (piece.example for piece in out.kept)
    assert kept.input_ids.tolist() == ids[:head] + ids[head + 5 :]
    assert (out.cuts[0].tokens, out.cuts[0].trained_tokens) == (5, 0)


def test_a_turn_without_its_beginning_is_context():
    renderer = chatml()
    whole = renderer.render(TALK)
    own = np.flatnonzero(whole.weights > 0)
    head, second = size(renderer, SYSTEM), int(own[size(renderer, "first<|im_end|>")])
    for over, said in [
        (second - head - size(renderer, "<|im_end|>\n<|im_start|>assistant\n"), ["second", "third"]),
        (second - head, ["third"]),
        (second - head + 1, ["third"]),
    ]:
        (kept,) = examples(renderer, TALK, len(whole) - over, "truncate_left")
        assert (
            kept.input_ids.tolist()
            == whole.input_ids[:head].tolist() + whole.input_ids[head + over :].tolist()
        )
        assert [turn for _, turn in trained_turns(renderer.tokenizer, kept)] == [
            f"{word}<|im_end|>" for word in said
        ]
        assert (Reason.CUT in kept.reasons) == (said == ["third"])


def test_the_last_turn_stays_whole_with_its_generation_prompt_or_the_example_goes():
    renderer = chatml()
    least = size(renderer, SYSTEM) + size(renderer, "<|im_end|>\n<|im_start|>assistant\nthird<|im_end|>\n")
    (kept,) = examples(renderer, TALK, least, "truncate_left")
    assert (
        renderer.tokenizer.decode(kept.input_ids)
        == SYSTEM + "<|im_end|>\n<|im_start|>assistant\nthird<|im_end|>\n"
    )
    (out,) = fitted(renderer, TALK, least - 1, "truncate_left")
    assert not out.kept
    assert out.cuts[0].reason == f"without room for the last trained turn in max_length {least - 1}"


@pytest.mark.parametrize("family", ["gemma", "mistral", "phi3", "vicuna", "qwen", "shipped plain"])
def test_bos_and_the_system_message_stay_wherever_the_template_writes_them(family):
    renderer = renderer_of(family)
    whole = renderer.render(TALK)
    (kept,) = examples(renderer, TALK, len(whole) - 4, "truncate_left")
    written = renderer.tokenizer.decode(kept.input_ids)
    through = renderer.tokenizer.decode(whole.input_ids).partition("Be kind.")
    assert written.startswith(through[0] + through[1])


raw = st.tuples(st.integers(0, 60), st.integers(1, 60), st.booleans(), st.integers(2, 40))


@plenty
@given(given=raw, overlong=st.sampled_from(POLICIES))
def test_windows_of_text_train_every_token_once(given, overlong):
    prompt, words, adds_bos, max_length = given
    renderer = Renderer(tokenizer_that_adds(adds_bos))
    pieces = [(text(1, prompt), 0.0)] * (prompt > 0) + [(text(2, words), 1.0)]
    segments = Segments(tuple(pieces), META)
    (out,) = fitted(renderer, segments, max_length, overlong)
    ids, weights = out.whole.example.input_ids.tolist(), out.whole.example.weights.tolist()
    assert (ids[0] == renderer.tokenizer.bos_token_id) == adds_bos
    if len(ids) <= max_length:
        assert out.kept == (out.whole,)
        return
    if overlong in ("truncate_left", "drop_oldest_turns"):
        (kept,) = (piece.example for piece in out.kept)
        tail = len(ids) - max_length + adds_bos
        assert kept.input_ids.tolist() == ids[:adds_bos] + ids[tail:]
        expected = [0.0] * adds_bos + weights[tail:]
        assert kept.weights.tolist() == [0.0, *expected[1:]]
    if overlong == "split":
        pieces = [piece.example for piece in out.kept]
        own = [np.flatnonzero(piece.weights > 0) for piece in pieces]
        taught = [piece.input_ids[where].tolist() for piece, where in zip(pieces, own, strict=True)]
        assert list(chain.from_iterable(taught)) == [
            token for token, weight in zip(ids, weights, strict=True) if weight > 0
        ]
        assert all(where[0] >= 1 for where in own)
        assert all(len(piece) == max_length for piece in pieces[:-1])


def tokenizer_that_adds(bos: bool):
    """A tokenizer that puts BOS before a text by itself, or doesn't."""
    made = copy.deepcopy(build_tokenizer("bytes"))
    if bos:
        made.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, made.bos_token_id)]
        )
    return made


@pytest.mark.parametrize("bos", [True, False])
def test_a_window_begins_with_bos_and_the_token_before_it(bos):
    renderer = Renderer(tokenizer_that_adds(bos))
    segments = Segments((("abcdefghij", 1.0),), META)
    first = [renderer.tokenizer.bos_token_id] * bos
    ids = renderer.render(segments).input_ids.tolist()
    assert len(ids) > 8
    (out,) = fitted(renderer, segments, 4, "split")
    a, b, *_ = (piece.example.input_ids.tolist() for piece in out.kept)
    assert a == ids[:4]
    assert b == [*first, ids[3], *ids[4 : 7 - bos]]
    assert out.kept[1].example.weights.tolist() == [0.0] * (1 + bos) + [1.0] * (3 - bos)
    assert out.repeated_tokens == (1 + bos) * (len(out.kept) - 1)
    assert not out.cuts


def test_windows_before_the_first_trained_token_are_lost_context():
    renderer = Renderer(tokenizer_that_adds(False))
    segments = Segments((("a b c d e f g h i j k l m n", 0.0), (" yes", 1.0)), META)
    (out,) = fitted(renderer, segments, 6, "split")
    assert {cut.reason for cut in out.cuts} == {"a window without a trained token"}
    assert sum(cut.trained_tokens for cut in out.cuts) == 0
    assert (
        sum(cut.tokens for cut in out.cuts) + sum(len(piece.example) for piece in out.kept)
        == len(out.whole.example) + out.repeated_tokens
    )
