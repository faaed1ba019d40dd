"""A stranger's distribution: modules and installed metadata, made in a folder for `sys.path`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

FORMAT_SOURCE = '''\
"""A stranger's formats."""

from lightning_sft import Conversation, DataFormat, Message


class {name}(DataFormat):
    """Rows with a text,
    the stranger's way.

    Not part of the description.
    """

    def matches(self, columns):
        return "text" in columns

    def convert(self, row):
        return [Conversation((Message("user", row["text"]),))]
'''


def install(
    folder: Path,
    distribution: str,
    entry_points: Mapping[str, Mapping[str, str]],
    modules: Mapping[str, str],
    version: str = "2.5",
    requires: str = "",
) -> Path:
    """Write the modules (name → source) and metadata (group → name → target); returns the folder.

    `requires` is a line of `Requires-Dist`.
    """
    info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    metadata = [f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"]
    metadata += [f"Requires-Dist: {requires}\n"] if requires else []
    (info / "METADATA").write_text("".join(metadata))
    sections = [
        "\n".join([f"[{group}]", *(f"{name} = {target}" for name, target in entries.items())])
        for group, entries in entry_points.items()
    ]
    (info / "entry_points.txt").write_text("\n\n".join(sections) + "\n")
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source)
    return folder


def install_format(
    folder: Path, distribution: str, name: str, module: str, version: str = "2.5", requires: str = ""
) -> Path:
    """A distribution with one working format."""
    return install(
        folder,
        distribution,
        {"lightning_sft.formats": {name: f"{module}:{name}"}},
        {module: FORMAT_SOURCE.format(name=name)},
        version,
        requires,
    )


def install_class(folder: Path, kind: str, source: str, name: str = "Odd", **options: str) -> Path:
    """The distribution `odd-plugins` with one plug-in, in the module `odd_mod`."""
    return install(
        folder,
        "odd-plugins",
        {f"lightning_sft.{kind}": {name: f"odd_mod:{name}"}},
        {"odd_mod": source},
        **options,
    )


def install_broken(folder: Path, distribution: str = "broken-formats", name: str = "Shattered") -> Path:
    """A distribution with one format whose module fails when it is imported."""
    source = f'class {name}:\n    """Never seen."""\n\nraise RuntimeError("the stranger\'s fault")\n'
    return install(
        folder,
        distribution,
        {"lightning_sft.formats": {name: f"{name.lower()}_mod:{name}"}},
        {f"{name.lower()}_mod": source},
    )
