"""Which plug-ins are installed, and the classes behind them.

A plug-in is a class that a distribution lists in its entry points, in the group `lightning_sft.<kind>` under
the class's name. Listing them reads metadata only and imports nothing, so a broken plug-in hurts nobody
until it is named.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import metadata
from inspect import isclass
from pathlib import Path

from lightning_sft import __version__
from lightning_sft.errors import SFTError
from lightning_sft.plugin_kinds import GROUP_PREFIX
from lightning_sft.plugin_kinds import KINDS as _KINDS

KINDS: tuple[str, ...] = tuple(_KINDS)
"""The kinds of plug-in; the entry-point group of a kind is `lightning_sft.<kind>`."""

DEFAULTS_GROUP = f"{GROUP_PREFIX}defaults"
"""The entry-point group that maps a kind to the class that is used where none is named."""

DISABLE = "LIGHTNING_SFT_DISABLE_PLUGINS"
"""The environment variable with the plug-ins to do without: names, class paths or distributions, with commas."""

_SUFFIXES = (".yaml", ".yml", ".json")
_LARGEST_NESTED_CONFIG = 1 << 20


@dataclass(frozen=True, slots=True)
class Plugin:
    """One plug-in as its distribution's metadata lists it; nothing is imported before `load`.

    Args:
        kind: One of `KINDS`.
        name: The class's name, which is also its name in YAML.
        target: Where the class is: `module:attribute`.
        distribution: The distribution that it comes with.
        version: That distribution's version.
        requires: What that distribution asks of lightning-sft's version, such as `>=0.1,<0.2`; "" is nothing.
    """

    kind: str
    name: str
    target: str
    distribution: str
    version: str
    requires: str = ""

    def __str__(self) -> str:
        return f"{_KINDS[self.kind].one} {self.name} ({self.distribution} {self.version})"

    @property
    def class_path(self) -> str:
        """The full class path, which names this plug-in also where another has the same short name."""
        return self.target.replace(":", ".")

    @property
    def disabled(self) -> bool:
        """Whether the environment variable `LIGHTNING_SFT_DISABLE_PLUGINS` names it or its distribution."""
        named = {each.strip() for each in os.environ.get(DISABLE, "").split(",")} - {""}
        return bool(named & {self.name, self.class_path, self.distribution})

    @property
    def unmet(self) -> str | None:
        """What it asks of lightning-sft's version, if this version doesn't meet that."""
        if not self.requires:
            return None
        from packaging.specifiers import SpecifierSet

        met = SpecifierSet(self.requires).contains(__version__, prereleases=True)
        return None if met else f"needs lightning-sft {self.requires}, and this is {__version__}"

    def load(self) -> type:
        """The plug-in's class; its module is imported the first time.

        Raises:
            SFTError: It is disabled, needs another version of lightning-sft, can't be imported, or isn't a complete
                class of this kind under this name. The message names the distribution, its version and the cause.
        """
        if self.disabled:
            raise SFTError(f"the {self} is disabled", fix=f"take it out of the variable {DISABLE}")
        if self.unmet:
            raise SFTError(
                f"the {self} {self.unmet}",
                fix=f"install another version of lightning-sft, or of {self.distribution}",
            )
        try:
            loaded = metadata.EntryPoint(self.name, self.target, f"{GROUP_PREFIX}{self.kind}").load()
        except (Exception, SystemExit) as error:
            raise SFTError(
                f"the {self} can't be loaded: {type(error).__name__}: {error}",
                fix=f"install what it lacks, or upgrade or uninstall {self.distribution}",
            ) from error
        problem = self._problem(loaded)
        if problem:
            raise SFTError(
                f"the {self} is not usable: {self.class_path} {problem}",
                fix=f"this is for the authors of {self.distribution} to mend: upgrade or uninstall it",
            )
        return loaded

    def _problem(self, loaded: object) -> str | None:
        if not isclass(loaded):
            return f"is no class but {type(loaded).__name__}"
        if loaded.__name__ != self.name:
            return f"is a class named {loaded.__name__}, not {self.name} as the entry point says"
        base = _KINDS[self.kind].load_base()
        if base is not None and not issubclass(loaded, base):
            known = {f"{each.__module__}.{each.__name__}" for each in loaded.__mro__}
            wanted = f"{base.__module__}.{base.__name__}"
            if wanted.replace("lightning.pytorch", "pytorch_lightning", 1) in known:
                return (
                    f"subclasses {base.__name__} of pytorch_lightning, which is another class than that of "
                    "lightning.pytorch; it has to import from lightning.pytorch"
                )
            return f"does not subclass {wanted}"
        abstract = getattr(loaded, "__abstractmethods__", ())
        return f"does not define {', '.join(sorted(abstract))}" if abstract else None


def discover(kind: str | None = None, *, disabled: bool = False) -> tuple[Plugin, ...]:
    """The installed plug-ins, of one kind or of all, sorted by kind and name; imports none of them.

    A name that two distributions use is listed twice.

    Args:
        kind: One of `KINDS`; None: all.
        disabled: List those as well that the environment disables.
    """
    kinds = KINDS if kind is None else (kind,)
    found = {
        Plugin(group, entry.name, _target(entry), name, version, requires)
        for name, version, requires, entries in _distributions()
        for group in kinds
        for entry in entries.select(group=f"{GROUP_PREFIX}{group}")
    }
    listed = [plugin for plugin in found if disabled or not plugin.disabled]
    return tuple(sorted(listed, key=lambda p: (KINDS.index(p.kind), p.name, p.distribution, p.target)))


def find(kind: str, name: str) -> Plugin:
    """The installed plug-in of this kind with this short name or full class path.

    Raises:
        SFTError: There is none, or two distributions use the short name.
    """
    plugins, one = discover(kind, disabled=True), _KINDS[kind].one
    matching = [plugin for plugin in plugins if name in (plugin.name, plugin.class_path)]
    if not matching:
        known = sorted({plugin.name for plugin in plugins if not plugin.disabled})
        raise SFTError(f"no {one} is named {name!r}", fix=_suggestion(name, known, kind))
    enabled = [plugin for plugin in matching if not plugin.disabled]
    if len(enabled) > 1:
        raise SFTError(
            f"the name {name} is used by more than one {one}: {' and '.join(map(str, enabled))}",
            fix=f"give the full class path: {' or '.join(plugin.class_path for plugin in enabled)}",
        )
    return (enabled or matching)[0]


def default(kind: str) -> type:
    """The class of this kind that is used where the user names none.

    Raises:
        SFTError: No installed distribution gives a default for this kind, or more than one does.
    """
    one = _KINDS[kind].one
    plugins = sorted(
        {
            Plugin(kind, _target(entry).rpartition(":")[2], _target(entry), name, version, requires)
            for name, version, requires, entries in _distributions()
            for entry in entries.select(group=DEFAULTS_GROUP, name=kind)
        },
        key=str,
    )
    if not plugins:
        raise SFTError(
            f"no default {one}: the first-party plug-ins of lightning-sft seem not to be installed",
            fix=f"name the {one} yourself, or reinstall: `pip install -e .` in a checkout, "
            "else `pip install --force-reinstall lightning-sft`",
        )
    if len(plugins) > 1:
        raise SFTError(
            f"more than one default {one}: {' and '.join(map(str, plugins))}",
            fix=f"name the {one} yourself, or uninstall one of the distributions",
        )
    return plugins[0].load()


def describe(obj: object) -> str:
    """The plug-in that an object or class is of, with its distribution and version; else `module.Class`."""
    cls = obj if isinstance(obj, type) else type(obj)
    return str(plugin_of(cls) or f"{cls.__module__}.{cls.__qualname__}")


def plugin_of(cls: type) -> Plugin | None:
    """The installed plug-in that a class is; None if it is none."""
    for plugin in discover():
        module, _, attribute = plugin.target.partition(":")
        if plugin.name == cls.__name__ and getattr(sys.modules.get(module), attribute, None) is cls:
            return plugin
    return None


def named_in(argv: Sequence[str]) -> list[str]:
    """The texts in which a command line may name plug-ins: its arguments, and its config files' contents.

    Config files are the values of `--config` and `-c`, any other argument that is a `.yaml`, `.yml` or
    `.json` file of at most 1 MiB (larger ones are data), and the YAML files that a config file names.
    Files that can't be read are left out: the parser reports those.
    """
    texts, seen = list(argv), set[Path]()
    for before, argument in zip(["", *argv], argv, strict=False):
        flag, equals, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
        given = before in ("--config", "-c") or (flag in ("--config", "-c") and bool(equals))
        if given or value.endswith(_SUFFIXES):
            texts.extend(_config_texts(Path(value), seen, limited=not given))
    return texts


def load_named(texts: Iterable[str]) -> list[Plugin]:
    """Load the installed plug-ins that the texts name, so that a parser can resolve their short names.

    A plug-in is named where its name or full class path stands alone as a YAML, JSON or `--key=` value, not
    where it is part of a path, a longer text or a comment: a broken plug-in there breaks nothing.

    Returns:
        The plug-ins that were loaded.

    Raises:
        SFTError: A plug-in that is named can't be loaded, or is disabled.
    """
    text = "\n".join(texts)
    enabled = [(plugin.kind, plugin.name) for plugin in discover()]
    named = []
    for plugin in discover(disabled=True):
        stands_in = plugin.disabled and (plugin.kind, plugin.name) in enabled
        names = [plugin.class_path] if stands_in else [plugin.name, plugin.class_path]
        if plugin.name in text and _is_value(names, text):
            plugin.load()
            named.append(plugin)
    return named


def _is_value(names: Iterable[str], text: str) -> bool:
    either = "|".join(map(re.escape, names))
    before = r"""(?:^|[=:,\[{"']|-\s)[ \t]*(?:&\S+[ \t]+)?["']?"""
    after = r"""["']?[ \t]*(?:[,\]}#]|$)"""
    return re.search(f"{before}(?:{either}){after}", text, re.MULTILINE) is not None


def _config_texts(path: Path, seen: set[Path], *, limited: bool) -> Iterator[str]:
    path = path.expanduser()
    with suppress(OSError, ValueError):
        if path.resolve() in seen or not path.is_file():
            return
        if limited and path.stat().st_size > _LARGEST_NESTED_CONFIG:
            return
        seen.add(path.resolve())
        text = path.read_text(encoding="utf-8")
        yield text
        for nested in re.findall(r"""[^\s"'=:,\[\]{}#]+\.ya?ml\b""", text):
            yield from _config_texts(path.parent / nested, seen, limited=True)


def _distributions() -> Iterator[tuple[str, str, str, metadata.EntryPoints]]:
    """Name, version, demand on lightning-sft's version and entry points of each distribution with plug-ins.

    Of two copies of a distribution it is the one that is imported.
    """
    names = set()
    for distribution in metadata.distributions():
        with suppress(Exception):  # someone else's broken metadata
            if GROUP_PREFIX in (distribution.read_text("entry_points.txt") or ""):
                names.add(distribution.metadata["Name"])
    for name in sorted(filter(None, names)):
        distribution = metadata.distribution(name)
        try:
            entries = distribution.entry_points
        except Exception as error:
            warnings.warn(
                f"the plug-ins of {name} are left out: its entry_points.txt can't be read: {error}",
                stacklevel=2,
            )
            continue
        data = distribution.metadata
        yield (
            name,
            data["Version"],
            _required(data.get_all("Requires-Dist") or distribution.requires or ()),
            entries,
        )


def _required(requirements: Iterable[str]) -> str:
    """What `Requires-Dist` lines ask of lightning-sft's version; extras and lines for other machines aside."""
    specifiers = []
    for line in requirements:
        if re.match(r"lightning[-_.]+sft\b(?![-_.\w])", line, re.IGNORECASE):
            from packaging.requirements import InvalidRequirement, Requirement

            with suppress(InvalidRequirement):
                requirement = Requirement(line)
                if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                    specifiers.append(str(requirement.specifier))
    return ",".join(filter(None, specifiers))


def _target(entry: metadata.EntryPoint) -> str:
    return re.sub(r"\[.*|\s", "", entry.value)


def _suggestion(name: str, known: Sequence[str], kind: str) -> str:
    if not known:
        return f"no {kind} are installed; `lightning-sft plugins` lists what is"
    spelled = {each.casefold(): each for each in known}
    close = get_close_matches(name.casefold(), spelled, n=1)
    hint = f"did you mean {spelled[close[0]]}? " if close else ""
    return f"{hint}known {kind}: {', '.join(known)}"
