"""`lightning-sft plugins NAME`: a plug-in's options, as `--help` shows them."""

from __future__ import annotations

import inspect

from lightning_sft.command_line import CommandParser
from lightning_sft.plugin_kinds import KINDS
from lightning_sft.plugins import Plugin


def show(plugin: Plugin) -> None:
    """Print what a plug-in is, how a configuration names it, and its options.

    Raises:
        SFTError: It can't be loaded.
    """
    cls = plugin.load()
    print(f"{plugin}: {plugin.class_path}\n")
    print(inspect.cleandoc(cls.__doc__ or "").partition("\nArgs:")[0].strip() + "\n")
    example = KINDS[plugin.kind].in_yaml.replace("{name}", plugin.name)
    if example:
        print(f"In YAML:\n\n{_indented(example)}")
        print(f"\nwith options: {{class_path: {plugin.name}, init_args: {{…}}}} in place of {plugin.name}\n")
    parser = CommandParser(usage="", add_help=False)
    if parser.add_class_arguments(cls):
        lines = parser.format_help().splitlines()
        first = next(number for number, line in enumerate(lines) if line.startswith("  --"))
        print("\n".join(["Options:\n", *lines[first:]]))
    else:
        print("It has no options.")


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
