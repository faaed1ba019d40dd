"""`lightning-sft plugins`: what is installed, without importing any of it; one's options; checks; a new one."""

from __future__ import annotations

import os
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from lightning_sft.errors import SFTError
from lightning_sft.plugin_kinds import GROUP_PREFIX
from lightning_sft.plugin_source import read_source
from lightning_sft.plugins import DISABLE, KINDS, Plugin, discover, find

_HOW_TO_WRITE_ONE = f"""\
To add your own: `lightning-sft plugins new my-plugin --kind formats`, or list a class in the entry points of any
installed package, under the class's name:

  [project.entry-points."{GROUP_PREFIX}formats"]
  MyFormat = "my_package.my_format:MyFormat"

Groups: {", ".join(GROUP_PREFIX + kind for kind in KINDS)}"""


@dataclass(frozen=True, slots=True)
class Listing:
    """One line of the listing; `state` is `ok` or `disabled`, or starts with `broken:` or `clash:` and says why."""

    kind: str
    name: str
    target: str
    distribution: str
    version: str
    requires: str
    description: str
    state: str


def listings() -> list[Listing]:
    """Every installed plug-in with its description and state, as far as can be seen without importing it."""
    plugins = discover(disabled=True)
    uses = Counter((plugin.kind, plugin.name) for plugin in plugins if not plugin.disabled)
    lines = []
    for plugin in plugins:
        source = read_source(plugin)
        problem = plugin.unmet or source.problem
        state = "ok"
        if plugin.disabled:
            state = "disabled"
        elif problem:
            state = f"broken: {problem}"
        elif uses[plugin.kind, plugin.name] > 1:
            state = f"clash: name it as {plugin.class_path}"
        lines.append(Listing(**asdict(plugin), description=source.description, state=state))
    return lines


def command(argv: Sequence[str]) -> None:
    """List the installed plug-ins, explain one, check them, or begin a new one.

    Raises:
        SFTError: No plug-in has the name given, or one that was checked is broken.
    """
    if argv[:1] == ["new"]:
        from lightning_sft.plugin_project import command as new

        new(argv[1:])
        return
    parser = ArgumentParser(
        "lightning-sft plugins",
        description="List the installed plug-ins. `lightning-sft plugins new --help` is about writing one.",
    )
    parser.add_argument(
        "names", metavar="NAME", nargs="*", help="show this one's options; with --check: check it"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    parser.add_argument("--check", action="store_true", help="import each, and run the conformance kit on it")
    options = parser.parse_args(argv)
    chosen = [plugin for name in options.names for plugin in _named(name)]
    if options.check:
        from lightning_sft.plugin_check import command as check

        check(chosen or discover(), as_json=options.json)
    elif chosen:
        from lightning_sft.plugin_help import show

        for plugin in chosen:
            show(plugin)
    elif options.json:
        import json

        print(json.dumps([asdict(line) for line in listings()], indent=2, ensure_ascii=False))
    else:
        _print_table(listings())


def _named(name: str) -> list[Plugin]:
    """The plug-ins of this name or class path, of whatever kind.

    Raises:
        SFTError: There is none, or several of one kind have the name.
    """
    plugins = discover(disabled=True)
    kinds = [
        kind for kind in KINDS if any(p.kind == kind and name in (p.name, p.class_path) for p in plugins)
    ]
    if not kinds:
        from difflib import get_close_matches

        spelled = {plugin.name.casefold(): plugin.name for plugin in plugins}
        close = get_close_matches(name.casefold(), spelled, n=1)
        hint = f"did you mean {spelled[close[0]]}? " if close else ""
        raise SFTError(f"no plug-in is named {name!r}", fix=f"{hint}`lightning-sft plugins` lists them")
    return [find(kind, name) for kind in kinds]


def _print_table(lines: Sequence[Listing]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for header in ("name", "description", "distribution", "version", "state"):
        width = max([len(header), *(len(getattr(line, header)) for line in lines)])
        whole = header in ("name", "distribution", "version")
        table.add_column(header, overflow="fold", min_width=width if whole else None)
    for kind in KINDS:
        of_kind = [line for line in lines if line.kind == kind]
        if of_kind:
            table.add_row()
            table.add_row(Text(kind, style="bold cyan"))
        for line in of_kind:
            table.add_row(
                Text(line.name),
                Text(line.description),
                Text(line.distribution),
                Text(line.version),
                Text(line.state, style="green" if line.state == "ok" else "red"),
            )
    console.print(table if lines else Text("No plug-in is installed."))
    if os.environ.get(DISABLE):
        console.print(f"\nDisabled by {DISABLE}: {os.environ[DISABLE]}", markup=False)
    console.print(f"\n{_HOW_TO_WRITE_ONE}", markup=False)
