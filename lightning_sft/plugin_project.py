"""`lightning-sft plugins new`: a complete project of a plug-in, which passes its own tests as it is."""

from __future__ import annotations

import keyword
import re
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from lightning_sft import __version__
from lightning_sft.errors import SFTError
from lightning_sft.plugin_kinds import KINDS, Kind
from lightning_sft.plugins import discover

TEMPLATES = Path(__file__).parent / "plugin_template"
WITH_TEMPLATES = [kind for kind in KINDS if (TEMPLATES / f"{kind}.py.jinja").is_file()]


def command(argv: Sequence[str]) -> None:
    """Parse the command line, write the project and say what comes next."""
    parser = ArgumentParser(
        "lightning-sft plugins new", description="Write a plug-in project that passes its own tests."
    )
    parser.add_argument(
        "project", metavar="NAME", help="the distribution's name, such as my-plugin: also the folder"
    )
    parser.add_argument("--kind", required=True, choices=WITH_TEMPLATES, help="what kind of plug-in")
    parser.add_argument(
        "--class", dest="name", help="the class's name; by default made of the project's: MyPlugin"
    )
    parser.add_argument("--folder", type=Path, default=Path(), help="where to make the project's folder (.)")
    options = parser.parse_args(argv)
    folder = write(options.folder / options.project, options.project, KINDS[options.kind], options.name)
    name = _class_name(options.project) if options.name is None else options.name
    print(
        f"{folder} is written. Next:\n\n  cd {folder}\n  pip install -e '.[test]'\n  pytest\n"
        f"  lightning-sft plugins {name} --check"
    )


def write(folder: Path, project: str, kind: Kind, name: str | None = None) -> Path:
    """Write the project's files.

    Args:
        folder: Where to; must not exist.
        project: The distribution's name.
        kind: What kind of plug-in.
        name: The class's name; None: made of the project's.

    Raises:
        SFTError: A name can't be used, or the folder is there already.
    """
    package = re.sub(r"\W+", "_", project).lower()
    name = _class_name(project) if name is None else name
    _check_names(project, package, kind, name)
    if folder.exists():
        raise SFTError("it exists already", where=str(folder), fix="choose another name or --folder")
    values = {
        "project": project,
        "package": package,
        "kind": kind.name,
        "one": kind.one,
        "name": name,
        "in_yaml": kind.in_yaml.replace("{name}", name),
        "requires": version_range(__version__),
    }
    files = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        ".gitignore": "gitignore",
        ".github/workflows/tests.yml": "ci.yml",
        f"{package}/__init__.py": "package.py",
        f"{package}/{kind.one}.py": f"{kind.name}.py",
        f"tests/test_{kind.one}.py": f"{kind.name}_test.py",
    }
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, keep_trailing_newline=True
    )
    for target, template in files.items():
        path = folder / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(templates.get_template(f"{template}.jinja").render(values), encoding="utf-8")
    return folder


def version_range(version: str) -> str:
    """The versions of lightning-sft that a plug-in works with that works with this one: see docs/plugins.md."""
    major, minor = map(int, version.split(".")[:2])
    return f">={major}.{minor},<{major + 1}" if major else f">=0.{minor},<0.{minor + 2}"


def _class_name(project: str) -> str:
    return "".join(part[:1].upper() + part[1:] for part in re.split(r"[\W_]+", project))


def _check_names(project: str, package: str, kind: Kind, name: str) -> None:
    if not re.fullmatch(r"[A-Za-z](?:[\w.-]*[A-Za-z0-9])?", project, re.ASCII):
        raise SFTError(
            f"{project!r} is no name of a distribution", fix="use letters, digits and -, such as my-plugin"
        )
    if keyword.iskeyword(package) or package in {*sys.stdlib_module_names, "lightning_sft"}:
        raise SFTError(f"{package} is the name of another module", fix="choose another name")
    if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_"):
        raise SFTError(f"{name!r} is no name of a class", where="--class", fix="choose one such as MyPlugin")
    for plugin in discover(kind.name):
        if plugin.name == name and plugin.distribution != project:
            raise SFTError(
                f"there is a {plugin} already",
                where="--class",
                fix="choose another, or give one with --class",
            )
