"""Search spaces: how they are written, what is refused, and where the values go."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_sft.errors import SFTError
from lightning_sft.sweeping.space import grid, placed, read


def one(text: str):
    (parameter,) = read([f"a.b={text}"])
    return parameter


def test_a_file_and_flags_say_the_same(tmp_path):
    path = tmp_path / "search.yaml"
    path.write_text(
        "model.learning_rate: {log_uniform: [1e-5, 1e-3]}\n"
        "model.adapter: {choice: [LoRA, {class_path: LoRA, init_args: {alpha: 1e1}}]}\n"
        "trainer.max_epochs: {int: [1, 4]}\n"
        "data.train.1.weight: {uniform: [0, 1], step: 0.25}\n"
    )
    flags = [
        "trainer.max_epochs=int(1,4)",
        "data.train.1.weight=uniform(0, 1, step=0.25)",
        "model.learning_rate=log_uniform(1e-5,1e-3)",
        "model.adapter=choice(LoRA,{class_path: LoRA, init_args: {alpha: 10.0}})",
    ]
    assert read([str(path)]) == read(flags)
    assert [parameter.key for parameter in read(flags)] == sorted(flag.partition("=")[0] for flag in flags)


def test_values_are_drawn_as_their_kind_says():
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    parameters = read(
        ["u=uniform(2,3)", "l=log_uniform(1e-6,1)", "i=int(8,32,step=8)", "n=log_int(1,1000)",
         "c=choice(a,[1, 2],null,true)"]
    )  # fmt: skip
    drawn = {each.key: [each.drawn(study.ask()) for _ in range(200)] for each in parameters}
    assert all(2 <= value <= 3 for value in drawn["u"])
    assert 60 < sum(value < 1e-3 for value in drawn["l"]) < 140
    assert set(drawn["i"]) == {8, 16, 24, 32}
    assert 40 < sum(value < 31 for value in drawn["n"]) < 160
    assert all(isinstance(value, int) for value in drawn["n"])
    assert [value for value in ("a", [1, 2], None, True) if value in drawn["c"]] == ["a", [1, 2], None, True]
    assert {str(value) for value in drawn["c"]} == {"a", "[1, 2]", "None", "True"}


def test_a_grid_is_every_combination():
    found = grid(read(["b=int(1,3)", "a=choice(x,[1])", "c=uniform(0,1,step=0.5)"]))
    assert len(found) == 2 * 3 * 3
    assert found[:4] == [
        {"a": "x", "b": 1, "c": 0.0}, {"a": "x", "b": 1, "c": 0.5}, {"a": "x", "b": 1, "c": 1.0},
        {"a": "x", "b": 2, "c": 0.0},
    ]  # fmt: skip
    assert found[-1] == {"a": "[1]", "b": 3, "c": 1.0}
    assert read(["a=choice(x,[1])"])[0].value("[1]") == [1]
    assert grid([one("uniform(0.1,0.3,step=0.1)")]) == [{"a.b": 0.1}, {"a.b": 0.2}, {"a.b": 0.3}]


@pytest.mark.parametrize("text", ["uniform(0,1)", "log_uniform(1,2)", "log_int(1,4)"])
def test_a_grid_over_a_continuum_is_refused(text):
    with pytest.raises(SFTError, match="a grid has no end"):
        grid([one(text)])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0.1", "no range and no choice"),
        ("log(1,2)", "no range and no choice"),
        ("uniform[0,1]", "no range and no choice"),
        ("choice([1)", "no range and no choice"),
        ("choice()", "choice has no values"),
        ("choice(1,1)", "a value is there twice"),
        ("choice(1,2,step=1)", "a choice has no step"),
        ("uniform(0)", r"uniform is given \[0\]"),
        ("uniform(0,x)", r'uniform is given \[0, "x"\]'),
        ("int(0,1.5)", r"int is given \[0, 1.5\]"),
        ("int(0,4,step=0.5)", "step 0.5"),
        ("uniform(1,0)", "uniform from 1 to 0"),
        ("log_uniform(0,1)", "log_uniform from 0 to 1"),
        ("log_uniform(1,2,step=0.1)", "in steps of 0.1"),
        ("uniform(1,2,step=0)", "in steps of 0"),
    ],
)
def test_what_makes_no_sense_is_refused(text, says):
    with pytest.raises(SFTError, match=says) as caught:
        one(text)
    assert caught.value.where == "--search a.b"


def test_a_key_is_searched_once_and_something_is(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("a: {int: [1, 2]}\n")
    with pytest.raises(SFTError, match="searched twice"):
        read([str(path), "a=int(1,3)"])
    with pytest.raises(SFTError, match="nothing is searched"):
        read([])
    path.write_text("a:\n  b: {int: [1, 2]}\n")
    with pytest.raises(SFTError, match="no range and no choice") as caught:
        read([str(path)])
    assert caught.value.where == f"{path}, a"


CONFIG = {
    "model": {"rate": 0.1, "adapter": {"class_path": "x.LoRA", "init_args": {"r": 4, "alpha": 8}}, "optimizer": None},
    "data": {"train": [{"path": "a", "weight": 1.0}, {"path": "b", "weight": 1.0}]},
}  # fmt: skip


@pytest.mark.parametrize(
    ("values", "where", "expected"),
    [
        ({"model.rate": 1}, "model.rate", 1),
        ({"model.adapter.init_args.r": 8}, "model.adapter.init_args", {"r": 8, "alpha": 8}),
        ({"model.adapter.r": 8}, "model.adapter.init_args", {"r": 8, "alpha": 8}),
        (
            {"model.adapter.r": 8, "model.adapter": "Full"},
            "model.adapter",
            {"class_path": "Full", "init_args": {"r": 8}},
        ),
        ({"model.adapter.r": 8, "model.adapter": "LoRA"}, "model.adapter.init_args", {"r": 8, "alpha": 8}),
        ({"model.optimizer.class_path": "SGD"}, "model.optimizer", {"class_path": "SGD"}),
        (
            {"model.optimizer": "SGD", "model.optimizer.momentum": 0.5},
            "model.optimizer",
            {"class_path": "SGD", "init_args": {"momentum": 0.5}},
        ),
        ({"data.train.1.weight": 3}, "data.train", [{"path": "a", "weight": 1.0}, {"path": "b", "weight": 3}]),
        ({"seed": 3}, "seed", 3),
    ],
)  # fmt: skip
def test_values_go_where_their_key_says(values, where, expected):
    before = repr(CONFIG)
    found = placed(CONFIG, values)
    for part in where.split("."):
        found = found[part]
    assert found == expected
    assert repr(CONFIG) == before


@pytest.mark.parametrize("key", ["data.train.2.weight", "data.train.x.weight", "model.rate.x"])
def test_a_key_that_leads_nowhere_is_named(key):
    with pytest.raises(SFTError) as caught:
        placed(CONFIG, {key: 1})
    assert caught.value.where == f"--search {key}"


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=4), st.integers(), st.integers())
def test_the_last_value_placed_is_the_one_that_is_there(path, first, second):
    key = ".".join(path)
    once = placed({}, {key: second})
    assert placed(placed({}, {key: first}), {key: second}) == once
    for part in path:
        once = once[part]
    assert once == second
