"""Jinja over the columns of a row, in a sandbox: templates that make text, expressions that make any value."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from jinja2 import StrictUndefined, Template, TemplateError, Undefined, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lightning_sft.conversation import Row
from lightning_sft.errors import SFTError

WHOLE_ROW = "row"
"""The variable that holds the whole row, for columns whose name is no Jinja name."""

_IN_BRACES = re.compile(r"\s*\{\{((?:(?!\{\{|\}\}).)*)\}\}\s*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class RowTemplate:
    """A Jinja template. Null becomes nothing; lists and objects need a filter, such as `tojson`.

    Beside Jinja's own filters there is `regex_replace(pattern, replacement)`.

    Args:
        text: The template; the row's columns are its variables, the row itself is `row`.
        where: Its place, for errors: an option's name.

    Raises:
        SFTError: It is not Jinja.
    """

    text: str
    where: str

    def __post_init__(self) -> None:
        try:
            _template(self.text)
        except TemplateError as error:
            raise SFTError(
                f"the template {self.text!r} is not Jinja: {error}",
                where=self.where,
                fix="write columns as {{ column }}",
            ) from error

    @property
    def columns(self) -> frozenset[str]:
        """The columns that it reads, `row` among them if it reads the whole row."""
        return _template(self.text)[1]

    def render(self, row: Row) -> str:
        """Its text for a row.

        Raises:
            SFTError: It names a column that isn't there, or fails.
        """
        template, names = _template(self.text)
        try:
            return template.render(_variables(row, names))
        except Exception as error:  # a template can raise whatever its filters and operators do
            raise _failed(error, "template", self.where, row) from error


@dataclass(frozen=True, slots=True)
class RowExpression:
    """A Jinja expression, such as a column's name, with or without `{{ }}` around it.

    Args:
        text: The expression, over what a `RowTemplate` has.
        where: Its place, for errors: an option's name.

    Raises:
        SFTError: It is not Jinja.
    """

    text: str
    where: str

    def __post_init__(self) -> None:
        try:
            _expression(self.text)
        except TemplateError as error:
            raise SFTError(
                f"{self.text!r} is no Jinja expression: {error}",
                where=self.where,
                fix="write a column's name, or an expression over columns, such as choices.text",
            ) from error

    @property
    def columns(self) -> frozenset[str]:
        """As a template's."""
        return _expression(self.text)[1]

    def value(self, row: Row) -> object:
        """What it gives for a row.

        Raises:
            SFTError: It names a column that isn't there, or fails.
        """
        evaluate, names = _expression(self.text)
        try:
            value = evaluate(_variables(row, names))
            if isinstance(value, Undefined):
                str(value)  # raises, and says what is undefined
            return list(value) if isinstance(value, Iterator) else value
        except Exception as error:  # as a template
            raise _failed(error, "expression", self.where, row) from error


def _failed(error: Exception, what: str, where: str, row: Row) -> SFTError:
    there = ", ".join(map(repr, row)) or "nothing"
    return SFTError(f"the {what} fails: {error}", where=where, fix=f"the row's columns: {there}")


def _variables(row: Row, names: frozenset[str]) -> dict[str, object]:
    variables = {name: row[name] for name in names if name in row}
    if WHOLE_ROW in names:
        variables.setdefault(WHOLE_ROW, row)
    return variables


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, keep_trailing_newline=True, finalize=_as_text
    )
    environment.filters["regex_replace"] = _regex_replace
    return environment


@lru_cache(maxsize=4096)
def _template(text: str) -> tuple[Template, frozenset[str]]:
    environment = _environment()
    names = meta.find_undeclared_variables(environment.parse(text))
    return environment.from_string(text), frozenset(names)


@lru_cache(maxsize=4096)
def _expression(text: str) -> tuple[Callable[[Mapping[str, object]], object], frozenset[str]]:
    environment, braced = _environment(), _IN_BRACES.fullmatch(text)
    bare = braced.group(1) if braced else text
    evaluate = environment.compile_expression(bare, undefined_to_none=False)
    names = meta.find_undeclared_variables(environment.parse("{{ (" + bare + ") }}"))
    return evaluate, frozenset(names)


def _as_text(value: object) -> object:
    if isinstance(value, Mapping | list | tuple):
        what = "a JSON object" if isinstance(value, Mapping) else "a list"
        raise TypeError(f"{what} has to be made text, with a filter such as tojson or join")
    return "" if value is None else value


def _regex_replace(text: str, pattern: str, replacement: str) -> str:
    return re.sub(pattern, replacement, text)
