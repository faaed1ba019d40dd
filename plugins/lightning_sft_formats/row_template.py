"""Jinja templates over the columns of a row, in a sandbox."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from jinja2 import StrictUndefined, Template, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lightning_sft import Row, SFTError
from lightning_sft_formats.fields import kind

WHOLE_ROW = "row"
"""The variable that holds the whole row, for columns whose name is no Jinja name."""


def check(text: str, where: str) -> None:
    """Return if the text is a Jinja template.

    Args:
        text: The template.
        where: Its place, for the error.

    Raises:
        SFTError: It isn't.
    """
    try:
        _compile(text)
    except TemplateError as error:
        raise SFTError(
            f"the template {text!r} is not Jinja: {error}", where=where, fix="write columns as {{ column }}"
        ) from error


def column_names(text: str) -> frozenset[str]:
    """The columns that a template reads, `row` among them if it reads the whole row."""
    return _compile(text)[1]


def render(text: str, row: Row, where: str) -> str:
    """The template's text for a row. Null becomes nothing; lists and objects need a filter, such as `tojson`.

    Args:
        text: The Jinja template; the row's columns are its variables, the row itself is `row`.
        row: The row.
        where: The template's place, for the error.

    Raises:
        SFTError: The template names a column that isn't there, or fails.
    """
    template, names = _compile(text)
    variables = {name: row[name] for name in names if name in row}
    if WHOLE_ROW in names:
        variables.setdefault(WHOLE_ROW, row)
    try:
        return template.render(variables)
    except Exception as error:  # a template can raise whatever its filters and operators do
        there = ", ".join(map(repr, row)) or "nothing"
        raise SFTError(
            f"the template fails: {error}", where=where, fix=f"the row's columns: {there}"
        ) from error


@lru_cache(maxsize=4096)
def _compile(text: str) -> tuple[Template, frozenset[str]]:
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, keep_trailing_newline=True, finalize=_as_text
    )
    names = meta.find_undeclared_variables(environment.parse(text))
    return environment.from_string(text), frozenset(names)


def _as_text(value: object) -> object:
    if isinstance(value, Mapping | list | tuple):
        raise TypeError(f"{kind(value)} has to be made text, with a filter such as tojson or join")
    return "" if value is None else value
