"""Prepared data that is kept from run to run, under a hash of everything that it was made of.

An entry is a folder of the cache, named by that hash: whatever changes the examples (a byte of the data, the template,
the tokenizer, an option, the code of the package or of a plug-in) leads to another one. It is written under another
name and renamed when it is whole.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import date
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_sft import plugins
from lightning_sft.bases import DataFormat, Filter
from lightning_sft.data.sources import Source, data_files, hub_dataset
from lightning_sft.data.store import Damaged, ExampleStore, file_digest
from lightning_sft.errors import SFTError

if TYPE_CHECKING:
    from lightning_sft.rendering import Renderer

VARIABLE = "LIGHTNING_SFT_CACHE"
"""The environment variable that names another folder than `~/.cache/lightning-sft`."""

MOST_BYTES = 20 * 2**30
"""What all entries may take; beyond it, those that weren't used for the longest time go."""

_LAYOUT = 2  # of the files of an entry
_LIBRARIES = ("jinja2", "numpy", "tokenizers", "transformers")
_PARTIAL = ".partial-"
_LOCKS = 256
_SECONDS_OF_A_DAY = 86_400


class NotCached(Exception):
    """Why something can't be kept: nothing says whether it would still be right."""


def default_folder() -> Path:
    """Where prepared data is kept if nothing else is said."""
    if own := os.environ.get(VARIABLE):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lightning-sft"


def facts(sources: Sequence[Source], renderer: Renderer, options: Mapping[str, object]) -> dict[str, object]:
    """Everything that prepared examples depend on, in JSON types.

    Args:
        sources: What is read.
        renderer: What renders it.
        options: All else.

    Raises:
        NotCached: One of them can't be compared with what it was.
        SFTError: A source isn't there.
    """
    return {
        "layout": _LAYOUT,
        "python": sys.version_info[:2],
        "libraries": {name: metadata.version(name) for name in _LIBRARIES},
        "code": _code("lightning_sft"),
        "renderer": renderer_facts(renderer),
        "sources": [_source(source) for source in sources],
        "options": _plain(dict(options), "options"),
    }


def renderer_facts(renderer: Renderer) -> dict[str, object]:
    """What a renderer's examples depend on.

    Raises:
        NotCached: The tokenizer's class has no source, or is slow.
    """
    tokenizer = renderer.tokenizer
    if not tokenizer.is_fast:
        raise NotCached(f"{type(tokenizer).__name__} is no fast tokenizer, whose settings could be compared")
    # What stands before the added tokens is how the last call padded and truncated; it is set anew by the next one.
    serialised = memoryview(text := tokenizer.backend_tokenizer.to_str().encode())
    own = type(tokenizer).__module__.partition(".")[0] == "transformers"
    return {
        "template": renderer.chat_template,
        "today": date.today().isoformat() if "strftime_now" in renderer.chat_template else None,
        "policies": _plain(renderer.policies, "model.render"),
        "tokenizer": hashlib.sha256(serialised[text.index(b'"added_tokens"') :]).hexdigest(),
        "class": f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}",
        "class code": None if own else file_digest(_module_file(type(tokenizer))),
        "special tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "split_special_tokens": bool(tokenizer.split_special_tokens),
    }


def digest(of: Mapping[str, object]) -> str:
    """The name of an entry: a hash of its facts."""
    text = json.dumps(of, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:32]


# ------------------------------------------------------------------------------------------------ entries


def examples(
    folder: Path | None,
    sources: Sequence[Source],
    renderer: Renderer,
    options: Mapping[str, object],
    fill: Callable[[Path], None],
) -> tuple[ExampleStore, bool]:
    """The examples of some sources, and whether they were there already.

    Args:
        folder: The cache; without one, or where it can't be used, the examples are this process's alone.
        sources: What they are made of.
        renderer: Likewise.
        options: Likewise.
        fill: Writes them to an empty folder.

    Raises:
        SFTError: There is no room for them, or the data was changed while it was read.
    """
    made: dict[str, Any] = {}
    cache: Cache | None = None
    if folder is not None:
        try:
            made = facts(sources, renderer, options)
            cache = Cache(folder)
        except (NotCached, OSError) as error:
            warnings.warn(f"Prepared data isn't kept for the next run: {error}.", stacklevel=2)
    try:
        if cache is None:
            return _temporary(fill), False

        def fill_and_check(partial: Path) -> None:
            fill(partial)
            for source, read in zip(sources, made["sources"], strict=True):
                if _files(source) != read["files"]:
                    raise changed(source.path)

        return cache.get(digest(made), fill_and_check)
    except OSError as error:
        raise SFTError(
            f"prepared data can't be written: {error}",
            where=str(tempfile.gettempdir() if cache is None else cache.folder),
            fix="make room, or give a folder on another disk: data.cache, or TMPDIR without one",
        ) from error


def changed(where: str) -> SFTError:
    """The error for data that is another one than when it was looked at first."""
    return SFTError("the data was changed while it was read", where=where, fix="start again")


def _temporary(fill: Callable[[Path], None]) -> ExampleStore:
    folder = Path(tempfile.mkdtemp(prefix="lightning-sft-"))
    try:
        fill(folder)
        return ExampleStore(folder, check=False, temporary=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


class Cache:
    """A folder of entries.

    Args:
        folder: Where; made if it isn't there.

    Raises:
        OSError: Nothing can be written there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "prepared"
        self._locks = self.folder / "locks"
        self._locks.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=self.folder).close()

    def get(self, key: str, fill: Callable[[Path], None]) -> tuple[ExampleStore, bool]:
        """The entry, and whether it was there already.

        Of several processes that want the same entry one fills it, and the others wait.

        Args:
            key: The entry's name.
            fill: Writes the entry to an empty folder.
        """
        with self._locked(key):
            entry = self.folder / key
            if entry.exists():
                try:
                    store = ExampleStore(entry)
                    os.utime(entry)
                    return store, True
                except (Damaged, OSError) as error:
                    warnings.warn(
                        f"{entry}: the kept data is damaged ({error}), so the data is prepared anew.",
                        stacklevel=2,
                    )
                    shutil.rmtree(entry, ignore_errors=True)
            partial = Path(tempfile.mkdtemp(prefix=f"{key}{_PARTIAL}", dir=self.folder))
            try:
                fill(partial)
                try:
                    partial.rename(entry)
                except OSError:
                    if not entry.exists():  # without locks, another process may have been faster
                        raise
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            store = ExampleStore(entry, check=False)
        self._evict(key)
        return store, False

    @contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        """Alone with the entries of this lock; where a file system has no locks, not."""
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        with (self._locks / f"{int(key, 16) % _LOCKS:02x}").open("w") as file:
            with suppress(OSError):
                # lockf, not flock: the workers of a killed run would hold on to a lock that they inherit
                fcntl.lockf(file, fcntl.LOCK_EX)
                self._remove_partial(lambda name: name.startswith(f"{key}{_PARTIAL}"))
            yield

    def _remove_partial(self, chosen: Callable[[str], bool]) -> None:
        for path in self.folder.glob(f"*{_PARTIAL}*"):
            if chosen(path.name):
                shutil.rmtree(path, ignore_errors=True)

    def _evict(self, kept: str) -> None:
        """Remove what killed processes left, and the entries longest unused while all take too much.

        Where a process still has such an entry open, the system keeps its files until that ends.
        """
        with suppress(OSError):  # another process does the same
            paths = {path: path.stat().st_mtime for path in self.folder.iterdir() if path != self._locks}
            for path, used in paths.items():
                if _PARTIAL in path.name and used < time.time() - _SECONDS_OF_A_DAY:
                    shutil.rmtree(path, ignore_errors=True)
            entries = sorted((used, path) for path, used in paths.items() if _PARTIAL not in path.name)
            sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for _, path in entries}
            total = sum(sizes.values())
            for _, path in entries:
                if total > MOST_BYTES and path.name != kept:
                    shutil.rmtree(path, ignore_errors=True)
                    total -= sizes[path]


# -------------------------------------------------------------------------------------------------- facts


def _source(source: Source) -> dict[str, object]:
    return {
        "path": source.path,
        "files": _files(source),
        "options": [source.subset, source.split, source.revision, source.limit],
        "format": _installed() if source.format == "auto" else _plugin(source.format, "format"),
    }


def _files(source: Source) -> list[list[str]]:
    """Name and hash of each file that the rows are read from; those of a dataset have names that say nothing."""
    files = data_files(source)
    if files is not None:
        return [[str(file), file_digest(file)] for file in files]
    found = [["", file_digest(Path(file["filename"]))] for file in hub_dataset(source).cache_files]
    if not found:
        raise NotCached(f"the dataset {source.path} is in no file")
    return found


def _plugin(plugin: DataFormat | Filter, one: str) -> list[object]:
    """The class of a format or filter with its code, and the state that its options gave it."""
    cls = type(plugin)
    name = f"{cls.__module__}.{cls.__qualname__}"
    if "<locals>" in cls.__qualname__:
        raise NotCached(f"the {one} {name} is a class within a function")
    packages = {base.__module__.partition(".")[0] for base in cls.__mro__} - {
        "builtins",
        "abc",
        "lightning_sft",
    }
    code = {package: _code(package) for package in sorted(packages)}
    slots = [slot for base in cls.__mro__ for slot in getattr(base, "__slots__", ())]
    state = {slot: getattr(plugin, slot, None) for slot in slots} | getattr(plugin, "__dict__", {})
    return [name, plugins.describe(plugin), code, _plain(state, name)]


def _installed() -> dict[str, object]:
    """The formats that `auto` chooses from, with their code; none of it is imported."""
    found = [[str(plugin), plugin.target] for plugin in plugins.discover("formats")]
    packages = {re.split("[.:]", target)[0] for _, target in found}
    return {"formats": found, "code": {package: _code(package) for package in sorted(packages)}}


def _plain(value: object, where: str) -> object:
    """The value in JSON types, so that different values are told apart.

    Raises:
        NotCached: It holds something that can't be compared.
    """
    match value:
        case None | bool() | int() | float() | str():
            return [type(value).__name__, repr(value)]
        case bytes() | Path() | enum.Enum():
            return [type(value).__name__, str(value)]
        case re.Pattern():
            return ["pattern", repr(value.pattern), value.flags]
        case list() | tuple():
            return [type(value).__name__, [_plain(item, where) for item in value]]
        case set() | frozenset():
            return ["set", sorted((_plain(item, where) for item in value), key=json.dumps)]
        case Mapping():
            pairs = [[_plain(key, where), _plain(item, where)] for key, item in value.items()]
            return ["mapping", pairs]
        case np.ndarray() if not value.dtype.hasobject:
            content = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
            return ["array", str(value.dtype), list(value.shape), content]
        case DataFormat():
            return _plugin(value, "format")
        case Filter():
            return _plugin(value, "filter")
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            return [type(value).__qualname__, _plain(fields, where)]
    raise NotCached(f"{where} holds a {type(value).__name__}, which can't be compared")


def _code(package: str) -> str:
    """A hash of the source of a top-level package or module; one that isn't there has none.

    Raises:
        NotCached: It is there without source.
    """
    spec = sys.modules[package].__spec__ if package in sys.modules else find_spec(package)
    if spec is None and package not in sys.modules:
        return ""
    folders = list(spec.submodule_search_locations or []) if spec else []
    if spec is None or not (folders or (spec.origin or "").endswith(".py")):
        raise NotCached(f"the module {package} has no source")
    found = hashlib.sha256()
    files = [(Path(spec.origin), "")] if not folders and spec.origin else []
    files += [
        (path, str(path.relative_to(folder))) for folder in folders for path in Path(folder).rglob("*.py")
    ]
    for path, name in sorted(files, key=lambda pair: pair[1]):
        found.update(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return found.hexdigest()


def _module_file(cls: type) -> Path:
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    if file is None:
        raise NotCached(f"the class {cls.__qualname__} has no source")
    return Path(file)
