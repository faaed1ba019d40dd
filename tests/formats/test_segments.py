import pytest

from lightning_sft import Message, SFTError
from lightning_sft import Segments as TextSegments
from lightning_sft.conversation import Conversation
from lightning_sft_formats.segments import Segments


def convert(*segments):
    (item,) = Segments().convert({"segments": list(segments)})
    return item.segments


def test_every_text_stands_as_it_is_with_its_flag():
    row = [{"label": True, "text": "<s>Hey\n"}, {"label": False, "text": "hi "}, {"label": True, "text": ""}]
    assert convert(*row) == (("<s>Hey\n", 1.0), ("hi ", 0.0), ("", 1.0))


@pytest.mark.parametrize("key", ["label", "weight", "loss_weight", "train", "training"])
def test_the_flag_has_one_of_several_names_and_may_be_a_weight(key):
    assert convert({"text": "a", key: False}, {"text": "b", key: 0.25}) == (("a", 0.0), ("b", 0.25))


def test_pairs():
    assert convert(["a", False], ["b", True]) == (("a", 0.0), ("b", 1.0))


@pytest.mark.parametrize(
    "segment",
    [{"text": "a"}, {"label": True}, {"text": "a", "label": "yes"}, ["a"], "a", {"text": 1, "label": 1}],
)
def test_what_is_no_segment_is_refused_with_its_place(segment):
    with pytest.raises(SFTError) as error:
        convert({"text": "a", "label": True}, segment)
    assert error.value.where.startswith("key 'segments', segment 2")


def test_a_flag_that_is_given_twice_is_refused():
    with pytest.raises(SFTError, match="more than once"):
        convert({"text": "a", "label": True, "weight": 0.5})


@pytest.mark.parametrize("segments", [[], [["a", False]], [["", True], ["a", 0]]])
def test_a_row_with_nothing_to_train_on_is_refused(segments):
    with pytest.raises(SFTError, match="nothing to train on"):
        convert(*segments)


def test_they_are_written_with_a_label_or_a_weight():
    row = Segments("pieces").to_row(TextSegments((("a", 0.0), ("b", 1.0), ("c", 0.5))))
    assert row == {
        "pieces": [{"text": "a", "label": False}, {"text": "b", "label": True}, {"text": "c", "weight": 0.5}]
    }


def test_a_conversation_is_no_text():
    with pytest.raises(SFTError, match="chat template"):
        Segments().to_row(Conversation((Message("user", "a"),)))
