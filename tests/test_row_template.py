"""Templates and expressions over a row: what they give, and that they stay in their sandbox."""

from __future__ import annotations

import pytest

from lightning_sft import RowExpression, RowTemplate, SFTError

ROW = {
    "question": "Why [x] now?",
    "choices": {"text": ["a ", "b"], "label": ["1", "2"]},
    "key": "2",
    "n": None,
}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("question", "Why [x] now?"),
        ("choices.text", ["a ", "b"]),
        ("{{ choices.text }}", ["a ", "b"]),
        (" {{ choices.label.index(key) }} ", 1),
        ("choices.text | map('trim')", ["a", "b"]),
        ("row['key']", "2"),
        ("n", None),
        ("0", 0),
        ("{'a': {'b': 1}}", {"a": {"b": 1}}),
    ],
)
def test_an_expression_gives_any_value(text, value):
    assert RowExpression(text, "answer").value(ROW) == value


def test_what_is_read_of_a_row():
    assert RowTemplate("{{ question }} {{ row.key }}", "prompt").columns == {"question", "row"}
    assert RowExpression("{{ choices.label.index(key) }}", "answer").columns == {"choices", "key"}


def test_a_pattern_can_be_replaced():
    assert RowTemplate(r'{{ question | regex_replace("\[.*?\] ", "") }}', "prompt").render(ROW) == "Why now?"


@pytest.mark.parametrize("text", ["nothing", "choices.nothing", "choices.nothing | map('trim')", "key + 1"])
def test_an_expression_that_fails_names_the_option_and_the_columns(text):
    with pytest.raises(SFTError, match="the expression fails") as error:
        RowExpression(text, "answer").value(ROW)
    assert error.value.where == "answer"
    assert "'question', 'choices', 'key', 'n'" in error.value.fix


@pytest.mark.parametrize("text", ["a b", "{{ a", "{{ a }} and {{ b }}", "{% if a %}"])
def test_what_is_no_expression_is_refused_at_once(text):
    with pytest.raises(SFTError, match="is no Jinja expression") as error:
        RowExpression(text, "choices")
    assert error.value.where == "choices"


@pytest.mark.parametrize("text", ["''.__class__.__mro__", "choices.text.append('c')", "choices.text.clear()"])
def test_neither_python_nor_the_row_is_within_reach(text):
    with pytest.raises(SFTError, match="fails"):
        RowExpression(text, "answer").value(ROW)
    with pytest.raises(SFTError, match="fails"):
        RowTemplate("{{ " + text + " }}", "prompt").render(ROW)
    assert ROW["choices"]["text"] == ["a ", "b"]
