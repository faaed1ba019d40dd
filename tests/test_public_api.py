"""The contract with plug-in authors: an unannounced change of a public name or signature fails here.

Announced is a change that stands in CHANGELOG.md, under the policy of docs/plugins.md; then write the list anew:
`python tests/test_public_api.py`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import lightning_sft
from lightning_sft import bases
from lightning_sft.plugin_kinds import KINDS
from lightning_sft.plugins import DISABLE

LIST = Path(__file__).with_name("public_api.txt")
MODULES = ("lightning_sft", "lightning_sft.testing")


def public_api() -> str:
    """Every public name with its signature, a line each."""
    text = "\n".join(line for name in MODULES for line in lines_of(name)) + "\n"
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def lines_of(name: str) -> Iterator[str]:
    module = import_module(name)
    for each in sorted(module.__all__):
        yield from described(f"{name}.{each}", getattr(module, each))


def signature(thing: Callable[..., object]) -> str:
    try:
        return str(inspect.signature(thing))
    except ValueError:  # an exception's
        return ""


def described(path: str, thing: object) -> Iterator[str]:
    if not inspect.isclass(thing):
        yield f"{path}{signature(thing)}" if inspect.isfunction(thing) else f"{path} = {thing}"
        return
    bases = [base.__name__ for base in thing.__bases__ if base is not object]
    yield f"class {path}{signature(thing)}" + (f" of {', '.join(bases)}" if bases else "")
    for name, member in sorted(vars(thing).items()):
        if (
            name.startswith("_")
            or name in getattr(thing, "__dataclass_fields__", ())
            or is_lightnings(thing, name)
        ):
            continue
        if inspect.isfunction(member):
            abstract = "abstract " if getattr(member, "__isabstractmethod__", False) else ""
            yield f"  {abstract}{path}.{name}{signature(member)}"
        elif isinstance(member, property) or hasattr(member, "func"):
            yield f"  {path}.{name} (property)"
        elif not hasattr(member, "__get__"):
            yield f"  {path}.{name} = {member!r}"


def is_lightnings(cls: type, name: str) -> bool:
    """Whether another library's class has it first: a hook, say, of the LightningModule."""
    return any(hasattr(base, name) for base in cls.__mro__ if not base.__module__.startswith("lightning_sft"))


def test_no_public_name_or_signature_has_changed_unannounced() -> None:
    now, listed = public_api().splitlines(), LIST.read_text(encoding="utf-8").splitlines()
    gone = [line for line in listed if line not in now]
    new = [line for line in now if line not in listed]
    assert not gone, (
        f"gone or changed: {gone}; announce it in CHANGELOG.md, then run `python {Path(__file__).name}`"
    )
    assert not new, f"new: {new}; announce it in CHANGELOG.md, then run `python {Path(__file__).name}`"
    assert now == listed


def test_every_base_and_what_it_takes_is_public() -> None:
    public = {
        name for name, thing in vars(bases).items() if getattr(thing, "__module__", "") == bases.__name__
    }
    assert {name for name in public if not name.startswith("_")} <= {*lightning_sft.__all__}


def test_the_entry_point_groups_and_the_environment_variable_are_these() -> None:
    assert {kind.group for kind in KINDS.values()} == {
        f"lightning_sft.{kind}"
        for kind in ("formats", "filters", "adapters", "losses", "callbacks", "evaluators")
    }
    assert DISABLE == "LIGHTNING_SFT_DISABLE_PLUGINS"


if __name__ == "__main__":
    LIST.write_text(public_api(), encoding="utf-8")
