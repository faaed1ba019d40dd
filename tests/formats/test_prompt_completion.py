import pytest

from lightning_sft import Conversation, Message, Segments, SFTError
from lightning_sft_formats.prompt_completion import PromptCompletion


def convert(prompt, completion, *, chat=False, **columns):
    (item,) = PromptCompletion(chat=chat).convert({"prompt": prompt, "completion": completion, **columns})
    return item


def test_texts_are_two_segments_exactly_as_they_stand():
    assert convert("Q: 1+1? \n", " 2\n") == Segments((("Q: 1+1? \n", 0.0), (" 2\n", 1.0)))


def test_chat_makes_turns_of_the_texts():
    assert convert("1+1?", "2", chat=True) == Conversation(
        (Message("user", "1+1?"), Message("assistant", "2"))
    )


def test_messages_are_one_conversation_in_which_the_prompts_answers_are_not_trained():
    prompt = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    tool = {"name": "f"}
    item = convert(prompt, [{"role": "assistant", "content": "d"}], tools=[tool])
    assert item.messages == (
        Message("user", "a"),
        Message("assistant", "b", weight=0.0),
        Message("user", "c"),
        Message("assistant", "d"),
    )
    assert item.tools == (tool,)


def test_a_loss_weight_in_the_prompt_is_kept():
    prompt = [{"role": "assistant", "content": "b", "weight": 0.5}]
    assert convert(prompt, [{"role": "assistant", "content": "d"}]).messages[0].weight == 0.5


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("completion", ["", "  ", None])
def test_an_empty_completion_is_refused(completion, chat):
    with pytest.raises(SFTError, match="the completion is empty") as error:
        convert("a", completion, chat=chat)
    assert error.value.where == "key 'completion'"


@pytest.mark.parametrize("completion", [[], [{"role": "user", "content": "a"}]])
def test_completion_messages_without_an_answer_are_refused(completion):
    with pytest.raises(SFTError, match="nothing to train on"):
        convert([{"role": "user", "content": "a"}], completion)


def test_a_text_beside_messages_is_refused():
    with pytest.raises(SFTError, match="the prompt is text, but the completion is a list"):
        convert("a", [{"role": "assistant", "content": "b"}])


def test_a_missing_column_is_named():
    with pytest.raises(SFTError, match="'completion' is missing"):
        list(PromptCompletion().convert({"prompt": "a"}))


def test_it_matches_files_with_both_columns():
    assert PromptCompletion().matches(frozenset({"prompt", "completion"}))
    assert not PromptCompletion().matches(frozenset({"prompt", "messages"}))
