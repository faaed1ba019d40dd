import pytest

from lightning_sft import Conversation, Message, Segments, SFTError, ToolCall
from lightning_sft_filters.length import Length

TALK = Conversation(
    (
        Message("system", "Be short."),
        Message("user", "Why is it so?"),
        Message("assistant", "Hm. It is."),
        Message("user", "Really?"),
        Message("assistant", "Yes", reasoning="Sure"),
    )
)
COUNTS = {
    ("words", "response"): 5,
    ("words", "prompt"): 2 + 4 + 1,
    ("words", "conversation"): 12,
    ("characters", "response"): len("Hm. It is.\nSure\nYes"),
    ("characters", "prompt"): len("Be short.\nWhy is it so?\nReally?"),
    ("turns", "response"): 2,
    ("turns", "prompt"): 2,
    ("turns", "conversation"): 4,
}


@pytest.mark.parametrize(("unit", "part"), COUNTS)
def test_what_is_within_the_limits_is_kept(unit, part):
    count = COUNTS[unit, part]
    exact = Length(least=count, most=count, unit=unit, part=part).judge(TALK)
    assert (exact.keep, exact.score) == (True, count)
    fewer = Length(least=count + 1, unit=unit, part=part).judge(TALK)
    assert fewer.reason == f"fewer than {count + 1} {unit} in the {part}"
    more = Length(least=None, most=count - 1, unit=unit, part=part).judge(TALK)
    assert more.reason == f"more than {count - 1} {unit} in the {part}"
    assert more.score == count


def test_segments_count_by_whether_they_are_trained():
    text = Segments((("Q: why?", 0.0), (" A: it", 1.0), (" is.", 0.5)))
    assert Length(part="response").judge(text).score == 3
    assert Length(unit="characters", part="prompt").judge(text).score == 7
    assert Length(unit="turns", part="conversation").judge(text).score == 3


def test_a_call_of_a_tool_is_an_answer():
    call = Message("assistant", tool_calls=(ToolCall("weather", {"city": "Bath"}),))
    assert Length().judge(Conversation((Message("user", "Rain?"), call))).keep
    assert not Length().judge(Conversation((Message("user", "Rain?"), Message("assistant", " \n")))).keep


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"least": -1}, "least is -1"),
        ({"least": 3, "most": 2}, "most is 2"),
        ({"least": None}, "neither least nor most"),
    ],
)
def test_limits_that_make_no_sense_are_refused(options, problem):
    with pytest.raises(SFTError, match=problem) as caught:
        Length(**options)
    assert "Length" in caught.value.where
