"""What the commands share: turning functions into commands, clear parser errors, and quiet libraries."""

from __future__ import annotations

import inspect
import json
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from lightning_sft import plugins
from lightning_sft.errors import SFTError
from lightning_sft.plugin_kinds import KINDS
from lightning_sft.renamed import add_renamed

_KEY = re.compile(r'(?:Parser key|[Kk]ey) "?\'?([\w.]+)')
_UNKNOWN_OPTION = re.compile(r"unrecognized arguments: --([\w.]+)|accept option '([\w.]+)'")
_WRONG_TYPE = re.compile(r"Expected an? (.+?)\. Got value: (.*)", re.DOTALL)
_WRONG_UNION = re.compile(r"Subtypes: \[(.+?)\]\n.*Given value: (.*)", re.DOTALL)
_REQUIRED = re.compile(r"arguments are required: (?:fit|validate|test|evaluate)?\.?(.+)")
_UNKNOWN_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
_AMBIGUOUS = re.compile(r"with name (\w+)\. Give the full class path to avoid ambiguity: (.+)\.\n")
_UNKNOWN_INIT_ARG = re.compile(
    r"Problem with given class_path '([\w.]+)':\s+(?:- )?"
    r"(?:Option '(\w+)' is not accepted|.*?[Kk]ey '(?:init_args\.)?(\w+)' is not expected)"
)
_OPTION_OF_CLASS = re.compile(
    r"\n *(?:- )?Problem with given class_path '([\w.]+)':\n( +)Parser key \"(\w+)\":(.*)", re.DOTALL
)
_OPTION_OF_CALLABLE = re.compile(
    r"Option '(\w+)' is not accepted\. Got value: Namespace\(class_path='([\w.]+)'"
)
_NOT_IN_MODULE = re.compile(r"module '([\w.]+)' has no attribute '(\w+)'")
_BASE = re.compile(r"lightning_sft\.bases\.(\w+)")
_NO_OPTION = re.compile(r"no option is named '([\w.]+)'")
_ABSENT = object()
_UNION_TRIED = "Does not validate against any of the Union subtypes"
_LIBRARYS_BASE = re.compile(r"<class '((?:lightning|peft)\.[\w.]+)'>")
_KINDS = {kind.base.rpartition(":")[2]: kind.name for kind in KINDS.values()}


class CommandParser(ArgumentParser):
    """A jsonargparse parser with errors in a sentence or two, without the usage and the search for a type.

    The old names of renamed options (`renamed_options` of a class) keep working, with a warning.
    """

    def add_class_arguments(self, theclass: type, nested_key: str | None = None, **kwargs: Any) -> list[str]:
        """The options of a class, also under the names that they had before."""
        added: list[str] = super().add_class_arguments(theclass, nested_key, **kwargs)
        add_renamed(self, theclass, nested_key)
        return added

    def instantiate(self, *args: Any, **kwargs: Any) -> Any:
        """The objects of a configuration.

        Raises:
            Exception: What a constructor raised, not jsonargparse's account of the types that it has tried then.
        """
        try:
            return super().instantiate(*args, **kwargs)
        except ValueError as error:
            raised: BaseException = error
            while str(raised).startswith(_UNION_TRIED) and raised.__cause__ is not None:
                raised = raised.__cause__
            if raised is error:
                raise
            raise raised from None

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what is wrong and what to do; `main` prints it and exits with 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        raise explain(message, options_of(self)) from None


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
    parser.add_function_arguments(function, as_positional=True, skip={*flags})
    for flag in sorted(flags):
        parser.add_argument(f"--{flag}", action="store_true", help=helps.get(flag))
    function(**vars(parser.instantiate(parser.parse_args(list(argv)))))


def check_configs(argv: Sequence[str]) -> None:
    """Read the config files that a command line names, for errors that say which file and line.

    Raises:
        SFTError: One is missing, is not YAML, or holds no options.
    """
    for name in _config_files(argv):
        read_config(name)


def in_config(error: SFTError, argv: Sequence[str]) -> SFTError:
    """The error with the config file in front that gives the option it is about; if one does."""
    unknown = _NO_OPTION.fullmatch(error.what)
    key = unknown.group(1) if unknown else (error.where or "").partition(":")[0]
    if any(argument.lstrip("-").partition("=")[0].startswith(key) for argument in argv):
        return error
    for name in reversed(_config_files(argv)):
        found: object = read_config(name)
        for part in key.split("."):
            if isinstance(found, list):
                found = next((each for each in found if isinstance(each, dict) and part in each), _ABSENT)
            if isinstance(found, dict) and part not in found:
                found = found.get("init_args")
            found = found.get(part, _ABSENT) if isinstance(found, dict) else _ABSENT
        if found is not _ABSENT:
            return error.at(name)
    return error


def _config_files(argv: Sequence[str]) -> list[str]:
    """The values of `--config` that are files, not configurations themselves."""
    names = []
    for number, argument in enumerate(argv):
        flag, equals, value = argument.partition("=")
        if flag in ("--config", "-c") and (equals or number + 1 < len(argv)):
            names.append(value if equals else argv[number + 1])
    return [name for name in names if not name.lstrip().startswith("{") and "\n" not in name]


def read_config(name: str) -> dict[str, object]:
    """The options in a config file, as they stand.

    Raises:
        SFTError: There is no such file, it is not YAML, or holds no options.
    """
    import yaml

    path = Path(name).expanduser()
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SFTError("no such config file", where=name, fix=_nearest_file(path)) from error
    except (OSError, UnicodeDecodeError) as error:
        raise SFTError(f"the config file can't be read: {error}", where=name) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{name}, line {mark.line + 1}, column {mark.column + 1}" if mark else name
        problem = getattr(error, "problem", None) or str(error)
        raise SFTError(
            f"malformed YAML: {problem}",
            where=place,
            fix="check the indentation, brackets and quotes before it",
        ) from error
    if not isinstance(content, dict):
        raise SFTError(
            "the config file holds no options" if content is None else "the config file is no mapping",
            where=name,
            fix="write `model:`, `data:` and `trainer:` with their options below",
        )
    return content


def _nearest_file(path: Path) -> str:
    siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
    close = get_close_matches(path.name, siblings, n=1)
    if close:
        return f"did you mean {path.with_name(close[0])}?"
    return f"relative paths start at {Path.cwd()}"


def options_of(parser: ArgumentParser) -> list[str]:
    """The options that a parser and its subcommands know, as dotted keys."""
    options = [
        action.dest for action in parser._actions if action.dest not in ("help", "config", "subcommand")
    ]
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
    option = _OPTION_OF_CLASS.search(message)
    if option and (unknown := _UNKNOWN_CLASS.search(message)) and unknown.start() < option.start(3):
        option = None  # the class that has this option is another than the one that was named
    found = _KEY.search(message[: option.start()] if option else message)
    where = found.group(1) if found else None
    if twice := _AMBIGUOUS.search(message):
        paths = sorted(twice.group(2).split(", "))
        named = [str(plugin) for plugin in plugins.discover() if plugin.class_path in paths]
        return SFTError(
            f"the name {twice.group(1)} is used more than once: {' and '.join(named or paths)}",
            where=where,
            fix=f"give the full class path: {' or '.join(paths)}",
        )
    if option:
        class_path, indent, key, rest = option.groups()
        inside = takewhile(lambda line: not line or line.startswith(f"{indent} "), rest.split("\n"))
        inner = explain("\n".join(inside), options)
        of = "" if inner.where else f" (an option of {class_path.rpartition('.')[2]})"
        where = ".".join(filter(None, (where, key, inner.where)))
        return SFTError(inner.what + of, where=where, fix=inner.fix)
    if unknown := _UNKNOWN_CLASS.search(message):
        base = _BASE.search(message)
        kind = _KINDS.get(base.group(1)) if base else None
        if kind is not None:
            try:
                plugins.find(kind, unknown.group(1))
            except SFTError as error:
                return error.at(where) if where else error
        name = unknown.group(1)
        known = [*_imported_subclasses(message), *(plugin.name for plugin in plugins.discover())]
        fix = _nearest(name, known) or "give its full class path"
        return SFTError(f"no class is named {name!r}", where=where, fix=fix)
    if absent := _NOT_IN_MODULE.search(message):
        module, name = absent.groups()
        fix = _nearest(name, dir(import_module(module))) or "give its full class path"
        return SFTError(f"no class is named '{module}.{name}'", where=where, fix=fix)
    if option := _OPTION_OF_CALLABLE.search(message):
        name, class_path = option.groups()
        known = _parameters(class_path)
        return SFTError(
            f"{class_path.rpartition('.')[2]} has no option {name!r}",
            where=where,
            fix=_nearest(name, known) or f"its options: {', '.join(known)}",
        )
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
        return SFTError(
            f"no option is named {name!r}", fix=_nearest(name, options) or "--help lists the options"
        )
    if wrong := _WRONG_UNION.search(message) or _WRONG_TYPE.search(message):
        types, value = _plain(wrong.group(1)), wrong.group(2).strip()
        return SFTError(f"expected {types}, got {value!r}", where=where, fix=_as_list(types, value))
    if required := _REQUIRED.search(message):
        return SFTError(f"{required.group(1)} must be given", fix="--help lists the options")
    return SFTError(message.strip())


def _plain(types: str) -> str:
    """Type names as a YAML author would say them."""
    types = (
        re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", types)
        .replace("typing.", "")
        .replace("NoneType", "null")
    )
    types = re.sub(r"\blist\[(?:[\w.]*\.)?(\w+)\]", r"list of \1", types)
    return re.sub(r"Literal\[(.+?)\]", r"one of \1", types)


def _as_list(types: str, value: str) -> str | None:
    """What to write where a list is expected, and no list is given."""
    if not re.match(r"list\b", types, re.IGNORECASE) or value.startswith("["):
        return None
    if value.startswith("{"):
        return "write a list: `- ` before the entry, or [] around it"
    entry = value if re.fullmatch(r"[\w./:-]+", value) else json.dumps(value)
    return f"write a list: [{entry}]"


def _imported_subclasses(message: str) -> list[str]:
    """The short names of the classes that would do where a class of Lightning's or peft's is asked for."""
    asked = _LIBRARYS_BASE.search(message)
    if asked is None:
        return []
    module, _, name = asked.group(1).rpartition(".")
    todo, names = [getattr(sys.modules.get(module), name, None)], set()
    while todo:
        cls = todo.pop()
        if isinstance(cls, type):
            names.add(cls.__name__)
            todo += cls.__subclasses__()
    return sorted(names)


def _parameters(class_path: str) -> list[str]:
    from jsonargparse._util import import_object

    return [name for name in inspect.signature(import_object(class_path)).parameters if name != "self"]


def _nearest(name: str, known: Iterable[str]) -> str | None:
    known = list(known)
    close = get_close_matches(name, known, n=1, cutoff=0.6)
    if not close:
        names = {option.rpartition(".")[2]: option for option in reversed(known)}
        close = [names[last] for last in get_close_matches(name.rpartition(".")[2], names, n=1)]
    return f"did you mean {close[0]}?" if close else None


def quieten() -> None:
    """Leave out what libraries say that tells nothing about the run."""
    for message in (
        ".*args parameter is intended to run from within Python.*",
        ".*does not have many workers.*",
        ".*Total length of `list` across ranks is zero.*",
        "Total length of `list` across ranks is zero.*",
        ".*treespec, LeafSpec.*",
        ".*is_gradient_checkpointing.*deprecated.*",
        "Be aware that when using `ckpt_path`, callbacks used to create.*",
        "You're resuming from a checkpoint that ended before the epoch ended and your dataloader is not",
        "`loftq_config` specified but will be ignored.*",  # which jsonargparse makes for every LoraConfig
        r"You passed `Trainer\(accelerator='cpu', precision='16-mixed'\)`",  # which is refused
        "The dirpath has changed from .*checkpoints.* won't be reloaded",
    ):
        warnings.filterwarnings("ignore", message)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advert)


def quieten_continuing(folder: Path) -> None:
    """Leave out that the folder of a continued run isn't empty; its metrics have been kept."""
    name = re.escape(str(folder))
    warnings.filterwarnings("ignore", f"Experiment logs directory .*{name}.* exists and is not empty")
    warnings.filterwarnings("ignore", f"Checkpoint directory .*{name}.* exists and is not empty")


def _is_no_advert(record: logging.LogRecord) -> bool:
    return "💡" not in record.getMessage()
