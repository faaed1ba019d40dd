"""The core knows no plug-in, and a first-party plug-in is written as a stranger's has to be."""

from __future__ import annotations

import ast
import configparser
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

import lightning_sft

ROOT = Path(__file__).parents[1]
CORE = sorted((ROOT / "lightning_sft").rglob("*.py"))
PACKAGES = sorted(path for path in (ROOT / "plugins").iterdir() if (path / "__init__.py").exists())
PLUGIN_FILES = [(package.name, path) for package in PACKAGES for path in sorted(package.rglob("*.py"))]


def imports(path: Path, package: str) -> Iterator[tuple[str, str | None]]:
    """Each import anywhere in the file, as (absolute module, imported name or None)."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = f"{package}.{node.module or ''}" if node.level else node.module or ""
            yield from ((module, alias.name) for alias in node.names)


def texts(path: Path) -> Iterator[str]:
    """Each string in the file: `import_module` takes a module's name as one."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@pytest.mark.parametrize("path", CORE, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_core_imports_no_plugin(path: Path) -> None:
    named = [*(module for module, _ in imports(path, "lightning_sft")), *texts(path)]
    assert {name.partition(".")[0] for name in named} & {package.name for package in PACKAGES} == set()


@pytest.mark.parametrize(
    ("package", "path"), PLUGIN_FILES, ids=[str(path.relative_to(ROOT)) for _, path in PLUGIN_FILES]
)
def test_a_plugin_package_uses_the_public_names_and_no_other_plugin_package(package: str, path: Path) -> None:
    for module, name in imports(path, package):
        head = module.partition(".")[0]
        if head == "lightning_sft":
            assert module == "lightning_sft", f"{module} is not public; import the name from lightning_sft"
            assert name in lightning_sft.__all__
        else:
            assert head == package or not head.startswith("lightning_sft_")


def test_every_public_name_resolves() -> None:
    for name in lightning_sft.__all__:
        assert getattr(lightning_sft, name) is not None


def test_the_installed_entry_points_are_those_of_the_file() -> None:
    table = configparser.ConfigParser(delimiters=("=",), interpolation=None)
    table.optionxform = str  # type: ignore[assignment,method-assign]
    table.read(ROOT / "entry_points.txt")
    written = {(group, name, target) for group in table.sections() for name, target in table[group].items()}
    installed = {
        (entry.group, entry.name, entry.value)
        for entry in metadata.distribution("lightning-sft").entry_points
    }
    assert installed == written, "the install is older than entry_points.txt: redo `pip install -e .`"


def test_every_plugin_package_is_in_the_entry_points() -> None:
    named = set(re.findall(r"= *(lightning_sft_\w+)", (ROOT / "entry_points.txt").read_text()))
    assert named == {package.name for package in PACKAGES}
