"""What the commands share: turning functions into commands, clear parser errors, and quiet libraries."""

from __future__ import annotations

import inspect
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import NoReturn

from jsonargparse import ArgumentParser

from lightning_sft import plugins
from lightning_sft.errors import SFTError

_KEY = re.compile(r'(?:Parser key|[Kk]ey) "?\'?([\w.]+)')
_UNKNOWN_OPTION = re.compile(r"unrecognized arguments: --([\w.]+)|accept option '([\w.]+)'")
_WRONG_TYPE = re.compile(r"Expected an? (.+?)\. Got value: (.*)", re.DOTALL)
_WRONG_UNION = re.compile(r"Subtypes: \[(.+?)\]\n.*Given value: (.*)", re.DOTALL)
_REQUIRED = re.compile(r"arguments are required: (?:fit|validate|test)?\.?(.+)")
_UNKNOWN_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
_UNKNOWN_INIT_ARG = re.compile(
    r"Problem with given class_path '([\w.]+)':\s+(?:- )?"
    r"(?:Option '(\w+)' is not accepted|.*?[Kk]ey '(?:init_args\.)?(\w+)' is not expected)"
)
_BASE = re.compile(r"lightning_sft\.bases\.(\w+)")
_KINDS = {"DataFormat": "formats", "Adapter": "adapters", "Loss": "losses"}


class ClearErrors:
    """For a jsonargparse parser: errors in a sentence or two, without the usage and the search for a type."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what is wrong and what to do; `main` prints it and exits with 2."""
        if not self.exit_on_error:  # type: ignore[attr-defined]
            super().error(message, ex)  # type: ignore[misc]
        raise explain(message, options_of(self)) from None  # type: ignore[arg-type]


class CommandParser(ClearErrors, ArgumentParser):
    """The parser of the commands that are functions."""


def call(function: Callable[..., None], argv: Sequence[str], command: str) -> None:
    """Call a function with what the command line gives: required parameters by position, booleans as flags.

    Raises:
        SFTError: The command line doesn't fit the function.
    """
    import docstring_parser

    parser = CommandParser(prog=f"lightning-sft {command}")
    doc = docstring_parser.parse(function.__doc__ or "")
    parser.description = doc.short_description
    helps = {parameter.arg_name: parameter.description for parameter in doc.params}
    flags = {name for name, p in inspect.signature(function).parameters.items() if p.default is False}
    parser.add_function_arguments(function, as_positional=True, skip=flags)
    for flag in sorted(flags):
        parser.add_argument(f"--{flag}", action="store_true", help=helps.get(flag))
    function(**parser.parse_args(list(argv)).as_dict())


def options_of(parser: ArgumentParser) -> list[str]:
    """The options that a parser and its subcommands know, as dotted keys."""
    options = [action.dest for action in parser._actions if action.dest not in ("help", "config", "subcommand")]
    for action in parser._actions:
        for subparser in (getattr(action, "_name_parser_map", None) or {}).values():
            options += options_of(subparser)
    return list(dict.fromkeys(options))


def explain(message: str, options: Iterable[str]) -> SFTError:
    """A parser's message as an error for the person who reads it.

    Args:
        message: What jsonargparse says.
        options: The options that exist.
    """
    found = _KEY.search(message)
    where = found.group(1) if found else None
    if unknown := _UNKNOWN_CLASS.search(message):
        base = _BASE.search(message)
        kind = _KINDS.get(base.group(1)) if base else None
        if kind is not None:
            try:
                plugins.find(kind, unknown.group(1))
            except SFTError as error:
                return error.at(where) if where else error
        return SFTError(f"no class is named {unknown.group(1)!r}", where=where, fix="give its full class path")
    if option := _UNKNOWN_INIT_ARG.search(message):
        class_path, name = option.group(1), option.group(2) or option.group(3)
        known = _parameters(class_path)
        return SFTError(
            f"{class_path.rpartition('.')[2]} has no option {name!r}",
            where=where,
            fix=_nearest(name, known) or f"its options: {', '.join(known)}",
        )
    if option := _UNKNOWN_OPTION.search(message):
        name = option.group(1) or option.group(2)
        return SFTError(f"no option is named {name!r}", fix=_nearest(name, options) or "--help lists the options")
    if wrong := _WRONG_UNION.search(message) or _WRONG_TYPE.search(message):
        return SFTError(f"expected {_plain(wrong.group(1))}, got {wrong.group(2).strip()!r}", where=where)
    if required := _REQUIRED.search(message):
        return SFTError(f"{required.group(1)} must be given", fix="--help lists the options")
    return SFTError(message.strip())


def _plain(types: str) -> str:
    """Type names as a YAML author would say them."""
    types = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", types).replace("typing.", "").replace("NoneType", "null")
    return re.sub(r"Literal\[(.+?)\]", r"one of \1", types)


def _parameters(class_path: str) -> list[str]:
    from jsonargparse._util import import_object

    return [name for name in inspect.signature(import_object(class_path)).parameters if name != "self"]


def _nearest(name: str, known: Iterable[str]) -> str | None:
    known = list(known)
    close = get_close_matches(name, known, n=1, cutoff=0.6)
    if not close:
        last = name.rpartition(".")[2]
        close = [option for option in known if option.rpartition(".")[2] == last]
    return f"did you mean {close[0]}?" if close else None


def quieten() -> None:
    """Leave out what libraries say that tells nothing about the run."""
    for message in (
        ".*args parameter is intended to run from within Python.*",
        ".*does not have many workers.*",
        ".*treespec, LeafSpec.*",
        ".*is_gradient_checkpointing.*deprecated.*",
        "Be aware that when using `ckpt_path`, callbacks used to create.*",
    ):
        warnings.filterwarnings("ignore", message)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advert)


def _is_no_advert(record: logging.LogRecord) -> bool:
    return "💡" not in record.getMessage()
