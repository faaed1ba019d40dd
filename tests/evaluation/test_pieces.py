"""Cut texts have the ids of whole ones, and tokenizers that aren't known are left alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_sft import LogLikelihood, SFTError
from lightning_sft.evaluation.encoding import RequestEncoder
from lightning_sft.evaluation.pieces import _KNOWN, can_cut, cut

TEXT = st.text("abAB hé1'.\n\t\u3000<|im_end|>", max_size=30)


def with_expression(tokenizer, expression):
    """The tokenizer with a pre-tokenizer of this expression."""
    from copy import deepcopy

    from tokenizers import Regex, pre_tokenizers

    other = deepcopy(tokenizer)
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(expression), "isolated"),
            pre_tokenizers.ByteLevel(False, use_regex=False),
        ]
    )
    return other


@pytest.fixture(scope="module", params=[None, *sorted(_KNOWN)], ids=["ByteLevel", "1", "2", "3"])
def known(request, tokenizer):
    return tokenizer if request.param is None else with_expression(tokenizer, request.param)


@given(TEXT, TEXT)
def test_pieces_have_the_ids_of_the_whole(known, context, continuation):
    assert can_cut(known)
    kept = context.rstrip()
    encoder = RequestEncoder(known, 10_000)
    whole = known.encode(context + continuation)
    before = known.encode(kept) if kept else []
    try:
        (found,) = encoder.log_likelihoods([LogLikelihood(context, continuation)])
    except SFTError:
        assert not continuation or len(whole) <= len(before)
        return
    if kept:
        assert found == (tuple(before), tuple(whole[len(before) :]))


def test_the_last_cut_is_taken():
    assert cut("one two. three four") == len("one two. three")
    assert cut("12 34. 5") == 0


def test_other_tokenizers_are_left_alone(tokenizer):
    from tokenizers import normalizers

    assert not can_cut(with_expression(tokenizer, r"\S+ \S+|\s|\S+"))
    other = with_expression(tokenizer, sorted(_KNOWN)[0])
    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert not can_cut(other)
    other = with_expression(tokenizer, sorted(_KNOWN)[0])
    other.add_tokens("New York")
    assert not can_cut(other)
