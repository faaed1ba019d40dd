import pytest

from lightning_sft import Segments, SFTError
from lightning_sft_formats.raw_text import RawText


def test_the_text_is_one_trained_segment_exactly_as_it_stands():
    assert list(RawText().convert({"text": " once\n"})) == [Segments(((" once\n", 1.0),))]


@pytest.mark.parametrize("text", ["", "\n", None])
def test_an_empty_text_is_refused(text):
    with pytest.raises(SFTError, match="the text is empty") as error:
        list(RawText().convert({"text": text}))
    assert error.value.where == "key 'text'"


def test_a_missing_column_is_named():
    with pytest.raises(SFTError, match="'text' is missing"):
        list(RawText().convert({"body": "a"}))


def test_it_matches_files_with_a_text_unless_they_are_a_chat():
    assert RawText().matches(frozenset({"text", "url"}))
    assert RawText(text="body").matches(frozenset({"body"}))
    assert not RawText().matches(frozenset({"body"}))
    assert not RawText().matches(frozenset({"instruction", "input", "output", "text"}))
