import pytest

from lightning_sft import Conversation, Message, Meta, SFTError
from lightning_sft_formats.dolly import Dolly

ROW = {"instruction": "When?", "context": "It was 1984.", "response": "In 1984.", "category": "closed_qa"}


def convert(row, **options):
    (conversation,) = Dolly(**options).convert(row)
    return conversation


def test_the_context_follows_the_instruction_and_the_category_is_the_task():
    assert convert(ROW) == Conversation(
        (Message("user", "When?\n\nIt was 1984."), Message("assistant", "In 1984.")),
        meta=Meta(task="closed_qa"),
    )


@pytest.mark.parametrize("context", ["", " \n", None])
def test_a_blank_context_adds_nothing(context):
    assert convert(ROW | {"context": context}).messages[0].content == "When?"


def test_context_and_category_may_be_absent():
    conversation = convert({"instruction": "When?", "response": "Now."})
    assert (conversation.messages[0].content, conversation.meta.task) == ("When?", None)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"response": ""}, "key 'response'"),
        ({"instruction": " ", "context": ""}, "key 'instruction'"),
        ({"context": 3}, "key 'context'"),
        ({"category": ["qa"]}, "key 'category'"),
    ],
)
def test_what_is_empty_or_no_text_is_refused_with_its_key(change, where):
    with pytest.raises(SFTError) as error:
        convert(ROW | change)
    assert error.value.where == where


def test_the_options_name_the_columns():
    row = {"q": "a", "c": "b", "r": "d", "kind": 7}
    conversation = convert(row, instruction="q", context="c", response="r", category="kind")
    assert [m.content for m in conversation.messages] == ["a\n\nb", "d"]
    assert conversation.meta.task == "7"


def test_a_missing_column_is_named_with_its_option():
    with pytest.raises(SFTError, match="'response' is missing") as error:
        convert({"instruction": "a", "answer": "b"})
    assert "`response`" in error.value.fix
