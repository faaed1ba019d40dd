"""A renamed option keeps its old key, with a warning that names the new one."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from jsonargparse import ActionConfigFile, Namespace

from lightning_sft import Adapter, SFTModule
from lightning_sft.command_line import CommandParser


class Renaming(Adapter):
    """An adapter that has renamed its options.

    Args:
        r: Rank.
        names: Names.
    """

    renamed_options = {"rank": "r", "layers": "names"}

    def __init__(self, r: int = 1, names: list[str] | None = None) -> None:
        self.r = r
        self.names = names

    def prepare(self, model):
        return model

    def export(self, model, folder):
        pass


class Top:
    """What `SFTModule` is to a run.

    Args:
        adapter: An adapter.
        rate: A rate.
    """

    renamed_options = {"speed": "rate", "tuner": "adapter"}

    def __init__(self, adapter: Adapter | None = None, rate: float = 1.0) -> None:
        self.adapter = adapter
        self.rate = rate


def parser() -> CommandParser:
    parser = CommandParser()
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_class_arguments(Top, "model")
    return parser


def parse(*argv: str) -> tuple[Namespace, list[str]]:
    """The configuration, and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config = parser().parse_args(list(argv))
    return config, [str(warning.message) for warning in caught if warning.category is FutureWarning]


OLD = "model:\n  speed: 3\n  tuner: {class_path: Renaming, init_args: {rank: 7, layers: [a]}}\n"
NEW = "model:\n  rate: 3\n  adapter: {class_path: Renaming, init_args: {r: 7, names: [a]}}\n"


def test_old_keys_in_a_config_are_the_new_ones_with_a_warning_for_each(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text(OLD)
    (tmp_path / "new.yaml").write_text(NEW)
    old, told = parse("--config", str(tmp_path / "old.yaml"))
    new, nothing = parse("--config", str(tmp_path / "new.yaml"))
    printed = parser().dump(new)
    assert parser().dump(old) == printed
    assert "r: 7" in printed
    assert nothing == []
    assert {message.removesuffix(": write that") for message in told} == {
        "the option model.speed is now called model.rate",
        "the option model.tuner is now called model.adapter",
        "the option rank is now called r",
        "the option layers is now called names",
    }


@pytest.mark.parametrize(
    ("argv", "r", "names", "rate"),
    [
        (["--model.adapter=Renaming", "--model.adapter.rank=5", "--model.speed=2"], 5, None, 2.0),
        (["--model.adapter=Renaming", "--model.adapter.init_args.rank", "5"], 5, None, 1.0),
        (["--model.tuner=Renaming", "--model.tuner.rank=5"], 5, None, 1.0),
        (
            ["--model.adapter=Renaming", "--model.adapter.layers=[a]", "--model.adapter.layers+=b"],
            1,
            ["a", "b"],
            1.0,
        ),
    ],
)
def test_old_flags_set_the_new_options(argv: list[str], r: int, names: list[str] | None, rate: float) -> None:
    config, told = parse(*argv)
    made = parser().instantiate(config).model
    assert (made.adapter.r, made.adapter.names, made.rate) == (r, names, rate)
    assert told


def test_the_wrong_type_under_an_old_key_is_an_error_all_the_same(tmp_path: Path) -> None:
    from lightning_sft import SFTError

    with pytest.raises(SFTError, match="expected float, got 'fast'"):
        parse("--model.speed=fast")


def test_help_does_not_list_the_old_names() -> None:
    options = parser().format_help().partition("options:")[2]
    assert "--model.rate" in options
    assert "--model.speed" not in options


def test_the_new_names_exist() -> None:
    for cls in (SFTModule,):
        parser = CommandParser()
        parser.add_class_arguments(cls, "model")  # fails for one that renames to nothing
