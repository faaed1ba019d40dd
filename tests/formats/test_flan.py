from collections import Counter

import pytest
from jsonargparse import ArgumentParser

from lightning_sft import Conversation, Message, Meta, SFTError, Source
from lightning_sft_formats.flan import Flan, FlanTemplate

ROW = {"inputs": "Is it?", "targets": "yes", "task_name": "rte"}
RTE = [
    FlanTemplate("{{ premise }} {{ n }}?", "{{ label }}"),
    FlanTemplate("So {{ premise }}?", "{{ label }}!"),
]


def test_inputs_and_targets_are_the_turns_as_they_stand():
    (conversation,) = Flan().convert(ROW)
    assert conversation == Conversation(
        (Message("user", "Is it?"), Message("assistant", "yes")), meta=Meta(task="rte")
    )


def test_the_task_may_be_absent():
    (conversation,) = Flan().convert({"inputs": "a", "targets": "b"})
    assert conversation.meta.task is None


@pytest.mark.parametrize("key", ["inputs", "targets"])
def test_an_empty_turn_is_refused(key):
    with pytest.raises(SFTError, match="is empty") as error:
        list(Flan().convert(ROW | {key: " "}))
    assert error.value.where == f"key {key!r}"


def raw(n):
    return {"task_name": "rte", "premise": f"it rains {n}", "n": n, "label": "no"}


def test_all_templates_of_a_task():
    first, second = Flan(templates={"rte": RTE}, use="all").convert(raw(3))
    assert [m.content for m in first.messages] == ["it rains 3 3?", "no"]
    assert [m.content for m in second.messages] == ["So it rains 3?", "no!"]
    assert first.meta.task == second.meta.task == "rte"


def test_one_template_is_drawn_by_the_rows_content_evenly():
    format, other = Flan(templates={"rte": RTE}), Flan(templates={"rte": RTE}, seed=1)
    drawn = [[next(iter(f.convert(raw(n)))) for n in range(400)] for f in (format, format, other)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    counts = Counter(conversation.messages[1].content for conversation in drawn[0])
    assert 160 < counts["no!"] < 240
    assert sum(counts.values()) == 400


def test_columns_that_no_template_reads_dont_change_the_draw():
    format = Flan(templates={"rte": RTE})
    assert all(
        list(format.convert(raw(n))) == list(format.convert(raw(n) | {"id": n, "x": []})) for n in range(50)
    )


def test_other_tasks_use_the_star_or_their_inputs_and_targets():
    star = {"*": [FlanTemplate("Q {{ inputs }}", "{{ targets }}")]}
    (conversation,) = Flan(templates=star | {"rte": RTE}).convert(ROW | {"task_name": "other"})
    assert conversation.messages[0].content == "Q Is it?"
    (conversation,) = Flan(templates=star).convert({"inputs": "a", "targets": "b"})
    assert conversation.messages[0].content == "Q a"
    (conversation,) = Flan(templates={"rte": RTE}).convert(ROW | {"task_name": "other"})
    assert conversation.messages[0].content == "Is it?"


def test_a_template_is_named_when_it_does_not_fit():
    with pytest.raises(SFTError, match="'premise' is undefined") as error:
        list(Flan(templates={"rte": RTE[1:]}).convert(ROW))
    assert error.value.where == "templates, task 'rte', template 1, inputs"
    with pytest.raises(SFTError, match="not Jinja") as error:
        Flan(templates={"rte": [FlanTemplate("a", "{{")]})
    assert error.value.where == "templates, task 'rte', template 1, targets"
    with pytest.raises(SFTError, match="no template"):
        Flan(templates={"rte": []})


def test_templates_are_given_in_yaml():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--train", type=list[Source])
    text = """[{path: a.jsonl, format: {class_path: Flan, init_args: {use: all, templates: {
        rte: [{inputs: "So {{ premise }}?", targets: "{{ label }}!"}]}}}}]"""
    (source,) = parser.instantiate(parser.parse_args([f"--train={text}"])).train
    assert [m.content for m in next(iter(source.format.convert(raw(1)))).messages] == [
        "So it rains 1?",
        "no!",
    ]
