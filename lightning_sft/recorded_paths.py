"""Local paths in a run's configuration: kept absolute, so that the run can be read and continued from any folder."""

from __future__ import annotations

import os
from typing import Any

from jsonargparse import Namespace

from lightning_sft import assets, chat_templates

_BARE = frozenset(
    "base tokenizer chat_template train val test canaries path questions held_out init_from".split()
)
"""Options that may be the plain name of a file or folder; any other's value has to look like a path (`a/b`, `a.b`)."""


def absolute(value: Any, key: str = "") -> Any:
    """A copy of a configuration, or of a part of it, with the paths that lead to something made absolute.

    Args:
        value: Options by their names (a mapping, or jsonargparse's), lists of them, or a value.
        key: The option whose value it is.
    """
    if isinstance(value, Namespace):
        return Namespace(**{name: absolute(each, name) for name, each in vars(value).items()})
    if isinstance(value, dict):
        return {name: absolute(each, str(name)) for name, each in value.items()}
    if isinstance(value, list):
        return [absolute(each, key) for each in value]
    if isinstance(value, str) and (key in _BARE or _like_a_path(value)) and not _is_ours(key, value):
        return os.path.abspath(value) if os.path.exists(value) else value
    return value


def _like_a_path(value: str) -> bool:
    return {"/", "."} & set(value) != set() and value.strip("/.") != ""


def _is_ours(key: str, value: str) -> bool:
    """Whether it names something that comes with the package, whatever lies here."""
    if key == "chat_template":
        return value in chat_templates.names()
    return assets.model_path(value) != value or assets.data_path(value) is not None
