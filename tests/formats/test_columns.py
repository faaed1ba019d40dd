import pickle

import pytest

from lightning_sft import Conversation, Message, Meta, Segments, SFTError
from lightning_sft_formats.columns import Columns

ROW = {
    "question": "Why?",
    "the answer": "So.",
    "hints": ["a", "b"],
    "none": None,
    "facts": {"n": 1},
    "lang": "en",
}


def convert(assistant="So.", row=ROW, **options):
    (item,) = Columns(assistant, **options).convert(row)
    return item


def test_templates_over_columns_make_the_turns():
    item = convert(
        '{{ row["the answer"] }}', user="Q: {{ question }}\n", system="Hints: {{ hints | join(', ') }}"
    )
    assert item == Conversation(
        (Message("system", "Hints: a, b"), Message("user", "Q: Why?\n"), Message("assistant", "So."))
    )


def test_conditions_and_loops_work():
    user = "{% for hint in hints %}{{ loop.index }}{{ hint }}{% endfor %}{% if none %}!{% endif %}"
    assert convert(user=user).messages[0].content == "1a2b"


def test_without_a_user_it_is_a_text():
    assert convert("{{ question }} {{ none }}") == Segments((("Why? ", 1.0),))


def test_task_and_language():
    item = convert(user="a", task="{{ facts.n }}", language="{{ lang }}")
    assert item.meta == Meta(task="1", language="en")
    assert convert(user="a", task="{{ none }}").meta.task is None


def test_a_system_prompt_that_is_blank_is_left_out():
    assert [m.role for m in convert(user="a", system="{{ none }} ").messages] == ["user", "assistant"]


def test_lists_and_objects_need_a_filter():
    assert convert("{{ facts | tojson }}", user="a").messages[1].content == '{"n": 1}'
    for template in ("{{ facts }}", "{{ hints }}"):
        with pytest.raises(SFTError, match="tojson") as error:
            convert(template, user="a")
        assert error.value.where == "assistant"


def test_a_column_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(SFTError, match="'qestion' is undefined") as error:
        convert(user="{{ qestion }}")
    assert error.value.where == "user"
    assert "'question', 'the answer'" in error.value.fix


def test_a_column_named_row_goes_before_the_whole_row():
    assert convert("{{ row }}", row={"row": "seven"}).segments[0][0] == "seven"


@pytest.mark.parametrize("template", ["{{ question", "{% for %}", "{{ question | no_such_filter }}"])
def test_what_is_no_template_is_refused_at_once(template):
    with pytest.raises(SFTError, match="is not Jinja") as error:
        Columns("a", user=template)
    assert error.value.where == "user"


@pytest.mark.parametrize(
    "template",
    [
        "{{ question.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() | length }}",
        "{{ row.update({'question': 1}) }}",
        "{{ hints.append('c') }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ range(10000000) | length }}",
    ],
)
def test_the_templates_run_in_a_sandbox(template):
    with pytest.raises(SFTError, match="the template fails"):
        convert(template)
    assert ROW["hints"] == ["a", "b"]


@pytest.mark.parametrize("error", ["{{ 1 / 0 }}", "{{ question + 1 }}", "{{ facts['x']['y'] }}"])
def test_a_template_that_fails_is_an_error_of_the_row(error):
    with pytest.raises(SFTError, match="the template fails"):
        convert(error)


@pytest.mark.parametrize(("assistant", "user"), [("{{ none }}", "a"), ("a", " {{ none }}"), (" ", None)])
def test_an_empty_turn_is_refused(assistant, user):
    with pytest.raises(SFTError, match="is empty"):
        convert(assistant, user=user)


def test_a_system_prompt_without_a_user_is_refused():
    with pytest.raises(SFTError, match="needs a user"):
        Columns("a", system="b")


def test_it_goes_to_other_processes():
    copy = pickle.loads(pickle.dumps(Columns("{{ question }}", user="a")))
    assert list(copy.convert(ROW)) == [convert("{{ question }}", user="a")]
