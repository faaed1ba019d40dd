"""What a plug-in's source says about it, read without executing any of it (nor the torch it imports)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, resolve_name
from pathlib import Path
from pkgutil import get_importer

from lightning_sft.plugins import Plugin


@dataclass(frozen=True, slots=True)
class SourceReport:
    """What was found.

    Args:
        description: The first paragraph of the class's docstring, or "".
        problem: Why the plug-in can't be loaded, as far as its source shows, or None.
    """

    description: str = ""
    problem: str | None = None


class _Broken(Exception):
    pass


def read_source(plugin: Plugin) -> SourceReport:
    """The plug-in's description, and what is plainly wrong with it: a missing module or class, bad syntax.

    No problem here is no proof that it loads: what its imports import in turn is not looked at.
    """
    module, _, attribute = plugin.target.partition(":")
    if attribute != plugin.name:
        return SourceReport(problem=f"the entry point {plugin.name} is of {attribute or 'no class'}")
    try:
        docstring = _docstring(module, attribute)
    except _Broken as error:
        return SourceReport(problem=str(error))
    except Exception as error:
        return SourceReport(problem=f"{type(error).__name__}: {error}")
    return SourceReport(" ".join(docstring.strip().split("\n\n")[0].split()))


def imported_by(plugin: Plugin) -> set[str]:
    """The top-level packages that a plug-in's module, and the packages around it, import when they are imported."""
    trees = [tree for _, tree in _trees(plugin.target.partition(":")[0]) if tree is not None]
    return {head for tree in trees for node in tree.body for head in _heads(node)}


def _docstring(module: str, name: str) -> str:
    """The docstring of a module's class, also where the module imports that from another; "" if unseen."""
    *_, (spec, tree) = _trees(module)
    if tree is None:
        return ""
    for node in reversed(tree.body):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return ast.get_docstring(node) or ""
        if isinstance(node, ast.ImportFrom):
            original = {alias.asname or alias.name: alias.name for alias in node.names}.get(name)
            if original:
                package = module if spec.submodule_search_locations else module.rpartition(".")[0]
                return _docstring(resolve_name("." * node.level + (node.module or ""), package), original)
    if any(_may_give(name, node) for node in ast.walk(tree)):
        return ""
    raise _Broken(f"no class {name} in module {module}")


def _may_give(name: str, node: ast.AST) -> bool:
    match node:
        case ast.Name(id=bound, ctx=ast.Store()) | ast.ClassDef(name=bound):
            return bound == name
        case ast.alias(name=original, asname=alias):
            return (alias or original) in (name, "*")
        case ast.FunctionDef(name="__getattr__"):
            return True
    return False


def _trees(module: str) -> Iterator[tuple[ModuleSpec, ast.Module | None]]:
    """Each package on the way to the module, then the module; no tree for what isn't Python source."""
    for spec in _specs(module):
        if spec.origin is None or not spec.origin.endswith(".py"):
            yield spec, None
            continue
        tree = ast.parse(Path(spec.origin).read_bytes(), filename=spec.origin)
        for missing in _missing(tree):
            raise _Broken(f"no module {missing}, which {spec.name} imports")
        yield spec, tree


def _specs(module: str) -> Iterator[ModuleSpec]:
    """The spec of each package on the way to the module and of the module; `find_spec` would import them."""
    name, *parts = module.split(".")
    top = find_spec(name)
    found = [top] if top else []
    for part in parts:
        if not found:
            break
        yield found[0]
        folders = [folder for spec in found for folder in spec.submodule_search_locations or []]
        name = f"{name}.{part}"
        portions = [spec for folder in folders if (spec := _spec_in(folder, name))]
        found = [spec for spec in portions if spec.loader][:1] or portions
    if not found:
        raise _Broken(f"no module {name}")
    yield found[0]


def _spec_in(folder: str, name: str) -> ModuleSpec | None:
    finder = get_importer(folder)
    return finder.find_spec(name) if finder else None


def _missing(tree: ast.Module) -> Iterator[str]:
    """The top-level packages that a module can't be imported without and that aren't there."""
    for node in tree.body:
        yield from (head for head in _heads(node) if find_spec(head) is None)


def _heads(node: ast.stmt) -> list[str]:
    """The top-level packages that an import statement imports."""
    match node:
        case ast.Import(names=names):
            return [alias.name.partition(".")[0] for alias in names]
        case ast.ImportFrom(module=str(source), level=0):
            return [source.partition(".")[0]]
    return []
