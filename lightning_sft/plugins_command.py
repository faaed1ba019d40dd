"""`lightning-sft plugins`: what is installed, without importing any of it."""

from __future__ import annotations

from argparse import ArgumentParser
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from lightning_sft.plugin_source import read_source
from lightning_sft.plugins import GROUP_PREFIX, KINDS, discover

_HOW_TO_WRITE_ONE = f"""\
To add your own, list a class in the entry points of any installed package, under the class's name:

  [project.entry-points."{GROUP_PREFIX}formats"]
  MyFormat = "my_package.my_format:MyFormat"

Groups: {", ".join(GROUP_PREFIX + kind for kind in KINDS)}"""


@dataclass(frozen=True, slots=True)
class Listing:
    """One line of the listing; `state` is `ok`, or starts with `broken:` or `clash:` and says why."""

    kind: str
    name: str
    target: str
    distribution: str
    version: str
    description: str
    state: str


def listings() -> list[Listing]:
    """Every installed plug-in with its description and state, as far as can be seen without importing it."""
    plugins = discover()
    uses = Counter((plugin.kind, plugin.name) for plugin in plugins)
    lines = []
    for plugin in plugins:
        source = read_source(plugin)
        state = "ok"
        if source.problem:
            state = f"broken: {source.problem}"
        elif uses[plugin.kind, plugin.name] > 1:
            state = f"clash: name it as {plugin.class_path}"
        lines.append(Listing(**asdict(plugin), description=source.description, state=state))
    return lines


def command(argv: Sequence[str]) -> None:
    """Print the installed plug-ins: a table, or with `--json` a JSON list of `Listing`s."""
    parser = ArgumentParser("lightning-sft plugins", description="List the installed plug-ins.")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    if parser.parse_args(argv).json:
        import json

        print(json.dumps([asdict(line) for line in listings()], indent=2, ensure_ascii=False))
    else:
        _print_table(listings())


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
    console.print(f"\n{_HOW_TO_WRITE_ONE}", markup=False)
