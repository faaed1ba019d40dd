import pytest

from lightning_sft import Message, SFTError
from lightning_sft_formats.lima import Lima


def convert(*texts):
    (conversation,) = Lima().convert({"conversations": list(texts), "source": "stackexchange"})
    return conversation.messages


def test_the_user_and_the_assistant_speak_in_turn():
    assert convert("a ", "b", "c", "d") == (
        Message("user", "a "),
        Message("assistant", "b"),
        Message("user", "c"),
        Message("assistant", "d"),
    )


def test_a_question_without_an_answer_as_in_the_test_split_is_refused():
    with pytest.raises(SFTError, match="nothing to train on"):
        convert("a")


def test_an_empty_answer_is_refused():
    with pytest.raises(SFTError, match="the response is empty") as error:
        convert("a", " ")
    assert error.value.where == "key 'conversations', message 2"


def test_turns_that_are_no_texts_are_refused():
    with pytest.raises(SFTError, match="expected text") as error:
        convert("a", {"from": "gpt", "value": "b"})
    assert error.value.where == "key 'conversations', message 2"
