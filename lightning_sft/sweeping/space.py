"""What a sweep searches over: options of `fit`, each with a range or a choice of values."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, get_args

from lightning_sft.command_line import read_config
from lightning_sft.errors import SFTError

if TYPE_CHECKING:
    import optuna

Kind = Literal["uniform", "log_uniform", "int", "log_int", "choice"]
Scalar: TypeAlias = bool | int | float | str | None
"""What a study keeps of a parameter; see `Parameter.labels`."""

_EXAMPLE = "such as log_uniform(1e-5,1e-3), uniform(0,1), int(1,4), log_int(1,64) or choice(4,8,16)"
_CALL = re.compile(r"(\w+)\((.*?)(?:,\s*step\s*=\s*([^,]+))?\)", re.DOTALL)
_SCIENTIFIC = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
_CLASS = ("class_path", "init_args", "dict_kwargs")


@dataclass(frozen=True, slots=True)
class Parameter:
    """One option that is searched.

    Args:
        key: Its dotted key; parts of lists are numbers, from 0: `data.train.1.weight`.
        spec: What was asked, as in the YAML file: `{"log_uniform": [1e-5, 1e-3]}`.
        labels: What the texts stand for that the study has in place of lists and mappings among the choices.
    """

    key: str
    spec: dict[str, Any]
    labels: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        """How values are drawn."""
        return cast(Kind, next(iter(self.spec)))

    def drawn(self, trial: optuna.trial.Trial) -> Any:
        """The option's value in a trial, drawn if it wasn't yet."""
        values, step = self.spec[self.kind], self.spec.get("step")
        if self.kind == "choice":
            return self.value(trial.suggest_categorical(self.key, [self._label(value) for value in values]))
        low, high = values
        if self.kind == "int" or self.kind == "log_int":
            return trial.suggest_int(self.key, low, high, log=self.kind == "log_int", step=step or 1)
        return trial.suggest_float(self.key, low, high, log=self.kind == "log_uniform", step=step)

    def value(self, drawn: Scalar) -> Any:
        """The option's value of what the study has drawn."""
        return self.labels.get(drawn, drawn) if isinstance(drawn, str) else drawn

    def edges(self) -> list[Any]:
        """Values to try the option with before the sweep: all choices, or both ends of a range and one between."""
        values = self.spec[self.kind]
        if self.kind == "choice" or self.kind.endswith("int"):
            return list(values)
        low, high = values
        return [float(low), low + self.spec.get("step", 0.3 * (high - low)), float(high)]

    def grid(self) -> list[Scalar]:
        """All values, as the study has them.

        Raises:
            SFTError: There is no end of them.
        """
        values = self.spec[self.kind]
        if self.kind == "choice":
            return [self._label(value) for value in values]
        low, high = values
        step = self.spec.get("step", 1 if self.kind == "int" else None)
        if step is None:
            raise SFTError(
                f"a grid has no end over {self.kind}",
                where=f"--search {self.key}",
                fix="give choice, int, or uniform with a step; or another --sampler",
            )
        every = [low + step * number for number in range(int((high - low) / step + 1e-9) + 1)]
        # 0.3, not the 0.30000000000000004 of 0.1 + 2 · 0.1, which is out of range
        return every if self.kind == "int" else [float(f"{value:.12g}") for value in every]

    def _label(self, value: Any) -> Scalar:
        return value if value is None or isinstance(value, bool | int | float | str) else _text(value)


def read(searched: Sequence[str]) -> list[Parameter]:
    """The parameters that `--search` gives, in the order of their keys.

    Args:
        searched: YAML files of `key: {kind: values}`, or `key=kind(values)`.

    Raises:
        SFTError: One can't be read, or makes no sense; says which.
    """
    found: dict[str, Parameter] = {}
    for each in searched:
        key, equals, call = each.partition("=")
        entries = {key: _called(call, f"--search {key}")} if equals else read_config(each)
        for name, spec in entries.items():
            where = f"--search {name}" if equals else f"{each}, {name}"
            if name in found:
                raise SFTError("the option is searched twice", where=where, fix="leave one out")
            found[str(name)] = _parameter(str(name), spec, where)
    if not found:
        raise SFTError("nothing is searched", where="--search", fix=f"give key=kind(values), {_EXAMPLE}")
    return [found[name] for name in sorted(found)]


def grid(parameters: Sequence[Parameter]) -> list[dict[str, Scalar]]:
    """Every combination, the last parameter the fastest.

    Raises:
        SFTError: There is no end of them.
    """
    values = product(*(parameter.grid() for parameter in parameters))
    return [dict(zip((p.key for p in parameters), each, strict=True)) for each in values]


def placed(config: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with these options in place, parents before what is in them.

    Raises:
        SFTError: A key leads nowhere.
    """
    result = dict(config)
    for key in sorted(values, key=lambda key: key.count(".")):
        result = _placed(result, key.split("."), values[key], key)
    return result


def _placed(node: Any, path: Sequence[str], value: Any, key: str) -> Any:
    if not path:
        is_class = isinstance(node, dict) and isinstance(value, str) and "class_path" in node
        same = is_class and value in (node["class_path"], node["class_path"].rpartition(".")[2])
        return node if same else value  # the class that it is keeps its options
    head, *rest = path
    if isinstance(node, list):
        if not head.isdigit() or int(head) >= len(node):
            raise SFTError(
                f"{head!r} is no place in a list of {len(node)}",
                where=f"--search {key}",
                fix="count from 0, and give the list in the config file",
            )
        return [_placed(each, rest, value, key) if n == int(head) else each for n, each in enumerate(node)]
    if isinstance(node, str) and not head.isdigit():
        node = {"class_path": node}
    if not isinstance(node, dict | None):
        raise SFTError(
            f"there is nothing below {node!r}",
            where=f"--search {key}",
            fix="check the key; lists begin with 0",
        )
    node = node or {}
    if "class_path" in node and head not in _CLASS:
        head, rest = "init_args", list(path)
    return {**node, head: _placed(node.get(head), rest, value, key)}


def _called(text: str, where: str) -> dict[str, Any]:
    """`kind(values, step=s)` as the mapping that a YAML file would hold."""
    import yaml

    match = _CALL.fullmatch(text.strip())
    try:
        values, step = (
            (yaml.safe_load(f"[{match[2]}]"), yaml.safe_load(match[3] or "")) if match else ([], None)
        )
    except yaml.YAMLError:
        match = None
    if match is None:
        raise SFTError(f"{text!r} is no range and no choice", where=where, fix=f"write one {_EXAMPLE}")
    return {match[1]: values} | ({} if step is None else {"step": step})


def _parameter(key: str, spec: object, where: str) -> Parameter:
    kinds = get_args(Kind)
    named = [name for name in spec if name != "step"] if isinstance(spec, dict) else []
    if not isinstance(spec, dict) or len(named) != 1 or named[0] not in kinds:
        raise SFTError(
            f"{_text(spec)} is no range and no choice",
            where=where,
            fix=f"give one of {', '.join(kinds)} with its values, {_EXAMPLE}",
        )
    kind, values, step = named[0], _numbers(spec[named[0]]), _numbers(spec.get("step"))
    if not isinstance(values, list) or not values:
        raise SFTError(f"{kind} has no values", where=where, fix=f"give a list, {_EXAMPLE}")
    if kind == "choice":
        if step is not None or len({_text(value) for value in values}) < len(values):
            what = "a choice has no step" if step is not None else "a value is there twice"
            raise SFTError(what, where=where, fix="leave it out")
        return Parameter(key, {kind: values}, {_text(v): v for v in values if isinstance(v, list | dict)})
    _check_range(kind, values, step, where)
    return Parameter(key, {kind: values} | ({} if step is None else {"step": step}))


def _check_range(kind: str, values: list[Any], step: Any, where: str) -> None:
    number: Any = int if kind.endswith("int") else int | float
    given = values if step is None else [*values, step]
    if len(values) != 2 or not all(isinstance(v, number) and not isinstance(v, bool) for v in given):
        raise SFTError(
            f"{kind} is given {_text(values)}" + ("" if step is None else f" and step {_text(step)}"),
            where=where,
            fix=f"give the least and the greatest {'whole number' if number is int else 'number'}",
        )
    low, high = values
    log = kind.startswith("log")
    if not low < high or (log and low <= 0) or (step is not None and (log or step <= 0)):
        raise SFTError(
            f"{kind} from {low} to {high}" + ("" if step is None else f" in steps of {step}"),
            where=where,
            fix="give the least value first; log needs it above 0 and has no step, and a step is above 0",
        )


def _numbers(value: Any) -> Any:
    """With 1e-5 as the number that it is in JSON; YAML 1.1 takes it for a text."""
    if isinstance(value, list):
        return [_numbers(each) for each in value]
    if isinstance(value, dict):
        return {key: _numbers(each) for key, each in value.items()}
    return float(value) if isinstance(value, str) and _SCIENTIFIC.fullmatch(value) else value


def _text(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
