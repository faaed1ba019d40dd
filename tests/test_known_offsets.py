"""Offsets that are counted are those that the tokenizer tells, or none."""

from functools import cache

import numpy as np
import pytest
from chat_families import IM, build_tokenizer, chatml, conversation
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import Sequence as Processors

from lightning_sft.rendering.known_offsets import KnownOffsets
from lightning_sft.rendering.offsets import OffsetTokenizer

ADDED = ("<|user|>", "<|end|>", "aa")
KINDS = {
    "bytes": ("bytes", {}),
    "trimmed": ("trimmed", {}),
    "pieces": ("pieces", {}),
    "swallowing what follows": ("pieces", {"rstrip": True}),
    "bytes that swallow what follows": ("bytes", {"rstrip": True}),
    "swallowing what comes before": ("bytes", {"lstrip": True}),
}
BLANKS = [" ", "  ", "\n", "\t", "\x1c", "\u00a0"]
SIGNS = [*ADDED, *BLANKS, "a", "b", "é", "日本", "👩", "\u2581", "Ġ", "<0x41>", "the cat"]
PLAIN = ["the cat sat", "a b", "<|user|>the<|end|>", "<|user|>a\n<|end|>", "a\n\nb 1.5"]


@cache
def tokenizers(kind):
    """The tokenizer, what is known of it, and the library's own that tells offsets whole."""
    name, options = KINDS[kind]
    tokenizer = build_tokenizer(name, ADDED, **options)
    telling = build_tokenizer.__wrapped__(name, ADDED, **options).backend_tokenizer
    telling.post_processor = Processors([])
    return tokenizer, KnownOffsets(tokenizer), telling


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None)
@given(signs=st.lists(st.sampled_from(SIGNS), max_size=12))
def test_counted_offsets_are_those_that_are_told(kind, signs):
    _, known, telling = tokenizers(kind)
    text = "".join(signs)
    told = telling.encode(text, add_special_tokens=False)
    if (found := known.of(told.ids, text)) is not None:
        assert found[0].tolist() == told.ids
        assert list(map(tuple, found[1].tolist())) == told.offsets


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["the", "the 1.5", "<|user|>the<|end|>", "<|user|>\nthe the<|end|>\n \n"])
def test_those_of_plain_texts_are_counted(kind, text):
    _, known, telling = tokenizers(kind)
    assert known.of(telling.encode(text, add_special_tokens=False).ids, text) is not None


def test_a_text_that_the_ids_are_not_of_has_none():
    _, known, telling = tokenizers("bytes")
    ids = telling.encode("the cat", add_special_tokens=False).ids
    assert known.of(ids, "the cat") is not None
    assert [known.of(ids, text) for text in ("the Cat", "the cat ", " the cat", "the ca", "")] == [None] * 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("texts", [PLAIN * 20, ["日本語 é 👩‍💻", "a"] * 60])
def test_many_texts_get_the_offsets_of_each(kind, texts):
    tokenizer, _, telling = tokenizers(kind)
    encoder = OffsetTokenizer(tokenizer)
    for _ in range(3):  # where most have to be asked for, nothing is counted any more
        for text, (ids, chars) in zip(texts, encoder.encode(texts), strict=True):
            told = telling.encode(text, add_special_tokens=False)
            assert ids.tolist() == told.ids
            assert list(map(tuple, chars.tolist())) == told.offsets
    assert encoder._counted + encoder._asked == 3 * len(texts)


@pytest.mark.parametrize(("split", "keeps"), [(True, False), (False, True)])
def test_whole_texts_are_not_kept_as_words(split, keeps):
    from tokenizers.pre_tokenizers import Metaspace

    tokenizer = build_tokenizer.__wrapped__("pieces")
    tokenizer.backend_tokenizer.pre_tokenizer = Metaspace(prepend_scheme="first", split=split)
    assert OffsetTokenizer(tokenizer)._keeps_texts == keeps


def test_how_the_tokenizer_was_set_before_cuts_and_pads_nothing():
    tokenizer = build_tokenizer.__wrapped__("bytes", ADDED)
    backend, text = tokenizer.backend_tokenizer, f"the cat {tokenizer.eos_token or ADDED[0]} sat"
    encoder = OffsetTokenizer(tokenizer)
    ((whole, _),) = encoder.encode([text])
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    backend.encode_special_tokens = True
    ((again, _),) = encoder.encode([text])
    assert again.tolist() == whole.tolist()
    assert len(whole) > 2


def test_counting_ends_where_it_is_in_vain(monkeypatch):
    tokenizer, _, _ = tokenizers("bytes")
    encoder, calls = OffsetTokenizer(tokenizer), []
    monkeypatch.setattr(encoder._known, "of", lambda ids, text: calls.append(text))
    for _ in range(5):
        encoder.encode(["a"] * 40)
    assert len(calls) == 40


def test_many_conversations_are_rendered_as_each_alone():
    renderer = chatml()
    several = [
        conversation(("user", question), ("assistant", answer))
        for question in ("hi", " é", f"typed {IM[0]}", "the cat")
        for answer in ("yes", "日本", " two\n words ", "a", "b", "c", "d", "e", "f", "g")
    ]
    for item, example in zip(several, renderer.render_all(several), strict=True):
        alone = renderer.render(item)
        assert np.array_equal(alone.input_ids, example.input_ids)
        assert np.array_equal(alone.weights, example.weights)
