"""`format: auto` among all installed formats: each file is found as the one format that it is in."""

import pytest

from lightning_sft import SFTError
from lightning_sft.data.conversion import _candidates, detect_format

TURNS = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
OASST_ROW = (
    "message_id parent_id user_id created_date text role lang review_count rank message_tree_id tree_state"
)


def filled(columns):
    return dict.fromkeys(columns.split(), "a")


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("Alpaca", filled("instruction input output")),
        ("Alpaca", filled("instruction output text")),
        ("Alpaca", filled("id instruction input output context")),
        ("Dolly", filled("instruction context response category")),
        ("Flan", filled("inputs targets task_source task_name template_type")),
        ("Flan", filled("inputs targets")),
        ("Lima", {"conversations": ["a", "b"], "source": "wikihow"}),
        ("ShareGPT", {"conversations": TURNS, "source": "x"}),
        ("ShareGPT", {"conversations": TURNS, "tools": "[]", "system": ""}),
        ("ShareGPT", {"conversations": '[{"from": "human"}]'}),
        ("Messages", {"messages": CHAT, "tools": []}),
        ("Messages", {"messages": CHAT, "text": "a", "prompt": "a"}),
        ("OASST", filled(OASST_ROW)),
        ("OASST", {"message_tree_id": "a", "tree_state": "ready", "prompt": {"text": "a"}}),
        ("PromptCompletion", filled("prompt completion")),
        ("RawText", filled("text url")),
        ("Segments", {"segments": [["a", True]]}),
        ("Segments", {"segments": [["a", True]], "text": "a"}),
        ("SelfInstruct", {**filled("id name instruction is_classification"), "instances": []}),
    ],
)
def test_a_row_is_of_one_format(name, row):
    assert type(detect_format(row, _candidates(), "file")).__name__ == name


@pytest.mark.parametrize(
    ("columns", "names"),
    [
        ("instruction context response output", "Alpaca and Dolly"),
        ("messages segments", "Messages and Segments"),
        ("inputs targets prompt completion", "Flan and PromptCompletion"),
    ],
)
def test_what_may_be_two_is_for_the_user_to_say(columns, names):
    with pytest.raises(SFTError, match=f"ambiguous.* fit {names}"):
        detect_format(filled(columns), _candidates(), "file")


def test_formats_that_need_options_are_left_out_without_a_word(recwarn):
    assert "Columns" not in _candidates()
    assert not recwarn
