"""Accounts of parts of a source, added up; and accounts read back from JSON."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

Account = TypeVar("Account")

_LARGEST = frozenset({"longest"})
"""Fields of which the larger value counts, not the sum."""


def add(total: Account, more: Account) -> Account:
    """`total` with the counts of `more` added: numbers, and those in mappings and accounts within it.

    Texts and fractions say what an account is about: they stay those of `total`.
    """
    for field in fields(cast(Any, total)):
        mine, other = getattr(total, field.name), getattr(more, field.name)
        setattr(total, field.name, max(mine, other) if field.name in _LARGEST else _sum(mine, other))
    return total


def _sum(mine: Any, other: Any) -> Any:
    if isinstance(mine, int):
        return mine + other
    if isinstance(mine, dict):
        return mine | {key: _sum(mine[key], more) if key in mine else more for key, more in other.items()}
    return add(mine, other) if is_dataclass(mine) else mine


def from_json(kind: Any, value: Any) -> Any:
    """The dataclass `kind` of what `dataclasses.asdict` made of one, with those within it."""
    if is_dataclass(kind):
        types, make = get_type_hints(kind), cast(Any, kind)
        return make(**{name: from_json(types[name], each) for name, each in value.items()})
    if get_origin(kind) is dict:
        return {key: from_json(get_args(kind)[1], each) for key, each in value.items()}
    return value
