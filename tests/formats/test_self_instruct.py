import pytest

from lightning_sft import Conversation, Message, Meta, SFTError
from lightning_sft_formats.self_instruct import SelfInstruct

TASK = {
    "id": "seed_task_0",
    "name": "breakfast",
    "instruction": "Suggest a breakfast.",
    "instances": [{"input": "", "output": "Eggs."}, {"input": "No eggs.", "output": "Oats."}],
    "is_classification": False,
}


def test_every_instance_is_a_conversation_of_the_task():
    first, second = SelfInstruct().convert(TASK)
    assert first == Conversation(
        (Message("user", "Suggest a breakfast."), Message("assistant", "Eggs.")), meta=Meta(task="breakfast")
    )
    assert [m.content for m in second.messages] == ["Suggest a breakfast.\n\nNo eggs.", "Oats."]


@pytest.mark.parametrize(
    ("instances", "where"),
    [
        ([], "key 'instances'"),
        ("text", "key 'instances'"),
        (["text"], "key 'instances', instance 1"),
        ([{"output": "a"}, {"input": "b", "output": ""}], "key 'instances', instance 2, key 'output'"),
        ([{"input": "b"}], "key 'instances', instance 1, key 'output'"),
    ],
)
def test_what_is_no_instance_is_refused_with_its_place(instances, where):
    with pytest.raises(SFTError) as error:
        list(SelfInstruct().convert(TASK | {"instances": instances}))
    assert error.value.where == where


def test_the_options_name_the_columns():
    row = {"task": "Say it.", "cases": [{"output": "It."}], "id": "t"}
    (conversation,) = SelfInstruct("task", "cases", "id").convert(row)
    assert [m.content for m in conversation.messages] == ["Say it.", "It."]
    assert conversation.meta.task == "t"
