"""Options that were renamed: the old key keeps working, in YAML and on the command line, with a warning."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping
from typing import Any

from jsonargparse import ArgumentParser


class Renamed(argparse.Action):
    """The old name of an option: warns, and does what the new one does.

    Args:
        option_strings: The old flag.
        dest: The new option's key.
        target: The new option.
    """

    def __init__(self, option_strings: list[str], dest: str, target: argparse.Action) -> None:
        super().__init__(option_strings, dest, default=argparse.SUPPRESS)
        self.target = target

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """The old flag on a command line."""
        self._warn()
        rest = (option_string or "").removeprefix(self.option_strings[0])  # `.r` of --model.old.r, or `+`
        self.target(parser, namespace, values, self.target.option_strings[0] + rest)

    def _check_type_(self, value: Any, **kwargs: Any) -> Any:
        """The old key in a configuration."""
        self._warn()
        check = getattr(self.target, "_check_type_", None)
        return check(value, **kwargs) if check else value

    _check_type = _check_type_  # jsonargparse asks for this one, and calls the other

    def _warn(self) -> None:
        old = self.option_strings[0].removeprefix("--")
        warnings.warn(f"the option {old} is now called {self.dest}: write that", FutureWarning, stacklevel=2)


def add_renamed(parser: ArgumentParser, cls: type, nested_key: str | None) -> None:
    """Let a parser that has a class's options accept their old names, which its `renamed_options` maps to the new."""
    renamed: Mapping[str, str] = getattr(cls, "renamed_options", {})
    prefix = f"{nested_key}." if nested_key else ""
    actions = {action.dest: action for action in parser._actions}
    for old, new in renamed.items():
        target = actions[prefix + new]
        flags = [
            f"--{prefix}{old}{more}"
            for more in ("", "+")
            if f"--{target.dest}{more}" in target.option_strings
        ]
        action = Renamed(flags, target.dest, target)
        parser._actions.append(action)  # and to no group, so that help leaves it out
        parser._option_string_actions |= dict.fromkeys(flags, action)
