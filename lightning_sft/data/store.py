"""Prepared examples in files, mapped into memory: what is read is what a batch needs.

```
<folder>/input_ids   int32, all tokens of all examples, one after the other
<folder>/weights     float32, likewise
<folder>/reasons     uint8, likewise
<folder>/records     one `RECORD` per example
<folder>/filtered    a line of JSON for each conversation that a filter dropped
<folder>/contents    the labels that records refer to, the accounts, and a hash of each file; written last
```

The arrays lie there as they are in memory, in the byte order of the machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, overload

import numpy as np
from numpy.typing import NDArray

from lightning_sft.conversation import Meta
from lightning_sft.example import Example

RECORD = np.dtype(
    [
        ("start", np.int64),  # the first of its tokens
        ("row", np.int64),  # `meta.row`
        ("key", np.uint64),  # a hash of its prompt
        ("weight", np.float64),  # Σ weights
        ("length", np.int32),  # tokens
        ("trained", np.int32),  # tokens with a weight above 0
        ("largest", np.int32),  # its largest token id
        ("source", np.int32),  # which source it is of
        ("label", np.int32),  # which of the labels
        ("turn", np.int32),  # `turn`, -1 for None
    ]
)
"""What is known of each example besides its tokens."""

_TOKENS: dict[str, np.dtype[Any]] = {
    "input_ids": np.dtype(np.int32),
    "weights": np.dtype(np.float32),
    "reasons": np.dtype(np.uint8),
}
_ARRAYS: dict[str, np.dtype[Any]] = {**_TOKENS, "records": RECORD}
_FILTERED = "filtered"
_CONTENTS = "contents"
_COPIED = 4096  # examples of a part that are copied at once to hash them

Label = tuple[str, str | None, str | None, tuple[str, ...]]
"""What many examples have in common: `meta.source`, `meta.task`, `meta.language` and `notes`."""


class Damaged(Exception):
    """The files of a store aren't what was written; says which."""


def key_of(prompt: str) -> int:
    """The hash of a prompt, 64 bits: two of a million prompts share one with a probability of 3e-8."""
    return int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=8).digest(), "little")


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's bytes.

    Raises:
        OSError: It can't be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True, slots=True)
class Block:
    """Some examples in arrays, as a worker hands them over.

    Args:
        arrays: The contents of the files, for these examples alone.
        labels: The labels that the records refer to.
    """

    arrays: dict[str, NDArray[Any]]
    labels: list[Label]

    @classmethod
    def of(cls, examples: Sequence[Example], prompts: Sequence[str], source: int) -> Block:
        """The block of some examples with their prompts, all of one source."""
        records = np.zeros(len(examples), RECORD)
        labels: dict[Label, int] = {}
        arrays: dict[str, NDArray[Any]] = {
            name: np.concatenate([getattr(example, name) for example in examples] or [np.empty(0, dtype)])
            for name, dtype in _TOKENS.items()
        }
        if examples:
            records["length"] = [len(example) for example in examples]
            records["row"] = [example.meta.row for example in examples]
            records["turn"] = [-1 if example.turn is None else example.turn for example in examples]
            records["key"] = [key_of(prompt) for prompt in prompts]
            records["label"] = [labels.setdefault(_label(each), len(labels)) for each in examples]
            records["source"] = source
            starts = records["start"] = np.cumsum(records["length"]) - records["length"]
            records["trained"] = np.add.reduceat(arrays["weights"] > 0, starts, dtype=np.int32)
            records["weight"] = np.add.reduceat(arrays["weights"], starts, dtype=np.float64)
            records["largest"] = np.maximum.reduceat(arrays["input_ids"], starts)
        return cls({**arrays, "records": records}, list(labels))


def _label(example: Example) -> Label:
    meta = example.meta
    return meta.source, meta.task, meta.language, example.notes


class Writer:
    """Writes blocks to a folder, one after the other; nothing of them stays in memory.

    Args:
        folder: An empty folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, IO[bytes]] = {
            name: (folder / name).open("wb") for name in (*_ARRAYS, _FILTERED)
        }
        self._hashes = {name: hashlib.sha256() for name in self._files}
        self._labels: dict[Label, int] = {}
        self._tokens = 0

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()

    def append(self, block: Block) -> None:
        """Write some examples behind the others."""
        records = block.arrays["records"]
        numbers = [self._labels.setdefault(label, len(self._labels)) for label in block.labels]
        records["start"] += self._tokens
        records["label"] = np.array(numbers, np.int32)[records["label"]]
        self._tokens += len(block.arrays["input_ids"])
        for name, array in block.arrays.items():
            self._write(name, array.tobytes())

    def append_filtered(self, line: str) -> None:
        """Write a line about a conversation that a filter dropped."""
        self._write(_FILTERED, f"{line}\n".encode())

    def _write(self, name: str, data: bytes) -> None:
        self._files[name].write(data)
        self._hashes[name].update(data)

    def finish(self, accounts: object) -> None:
        """Write what says that the store is whole.

        Args:
            accounts: Whatever belongs to the examples, in JSON types.
        """
        for file in self._files.values():
            file.close()
        contents = {
            "byteorder": sys.byteorder,
            "sha256": {name: digest.hexdigest() for name, digest in self._hashes.items()},
            "labels": list(self._labels),
            "accounts": accounts,
        }
        text = json.dumps(contents).encode()
        (self._folder / _CONTENTS).write_bytes(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)


class ExampleStore(Sequence[Example]):
    """The examples of a folder that a `Writer` has filled, or some of them.

    An example is copied from the mapped files when it is asked for. Pickling gives the folder, not the data.

    Args:
        folder: The folder.
        check: Compare the files with their hashes.
        temporary: Remove the folder when neither this nor a part of it is used any more.

    Raises:
        Damaged: The files aren't those that were written.
    """

    def __init__(self, folder: Path, *, check: bool = True, temporary: bool = False) -> None:
        self.folder = folder
        self._owner = _Owner(folder) if temporary else None
        contents = _read_contents(folder)
        self.accounts: Any = contents["accounts"]
        """What was given to `Writer.finish`."""
        if check:
            for name, digest in contents["sha256"].items():
                if file_digest(folder / name) != digest:
                    raise Damaged(f"the file {name} has changed")
        self._labels: list[Label] = [
            (source, task, language, tuple(notes)) for source, task, language, notes in contents["labels"]
        ]
        self._arrays = {name: _mapped(folder / name, dtype) for name, dtype in _ARRAYS.items()}
        self.filtered = _mapped(folder / _FILTERED, np.dtype(np.uint8))
        """A line of JSON, in UTF-8, for each conversation that a filter dropped."""
        self._rows: NDArray[np.int64] | None = None

    def part(self, rows: Sequence[int] | NDArray[np.int64]) -> ExampleStore:
        """Some of the examples, by index, in this order."""
        part = object.__new__(ExampleStore)
        part.__dict__.update(self.__dict__)
        chosen = np.asarray(rows, dtype=np.int64)
        part._rows = chosen if self._rows is None else self._rows[chosen]
        return part

    def __len__(self) -> int:
        return len(self._arrays["records"] if self._rows is None else self._rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        row = index % len(self) if self._rows is None else self._rows[index]
        record = self._arrays["records"][row]
        start, length, turn = (int(record[name]) for name in ("start", "length", "turn"))
        source, task, language, notes = self._labels[record["label"]]
        return Example(
            **{name: self._arrays[name][start : start + length].copy() for name in _TOKENS},
            meta=Meta(source, int(record["row"]), task, language),
            turn=None if turn < 0 else turn,
            notes=notes,
        )

    def column(self, name: str) -> NDArray[Any]:
        """A field of `RECORD`, of every example."""
        values = self._arrays["records"][name]
        return np.ascontiguousarray(values if self._rows is None else values[self._rows])

    @property
    def digest(self) -> str:
        """A hash of the examples in their order: lengths, token ids and weights."""
        hashes = [hashlib.sha256(self.column("length").tobytes())]
        for name in ("input_ids", "weights"):
            hashes.append(digest := hashlib.sha256())
            for tokens in self._tokens_of(name):
                digest.update(tokens.tobytes())
        return hashlib.sha256(b"".join(each.digest() for each in hashes)).hexdigest()[:16]

    def _tokens_of(self, name: str) -> Iterable[NDArray[Any]]:
        """A file's tokens in the order of the examples, some at a time."""
        array = self._arrays[name]
        if self._rows is None:
            size = 1 << 20
            return (array[at : at + size] for at in range(0, len(array), size))
        return self._gathered(array)

    def _gathered(self, array: NDArray[Any]) -> Iterator[NDArray[Any]]:
        starts, lengths = self.column("start"), self.column("length")
        for at in range(0, len(self), _COPIED):
            pairs = zip(starts[at : at + _COPIED].tolist(), lengths[at : at + _COPIED].tolist(), strict=True)
            yield np.concatenate([array[start : start + length] for start, length in pairs])

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.folder, self._rows)


def _reopened(folder: Path, rows: Any) -> ExampleStore:
    """The store in another process, which needn't check what the first one has checked."""
    store = ExampleStore(folder, check=False)
    store._rows = rows
    return store


class _Owner:
    """What all parts of a temporary store have in common: its folder goes with it, or with this process."""

    def __init__(self, folder: Path) -> None:
        weakref.finalize(self, _remove, folder, os.getpid())


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # not in a worker that was forked
        shutil.rmtree(folder, ignore_errors=True)


def _read_contents(folder: Path) -> dict[str, Any]:
    try:
        digest, _, text = (folder / _CONTENTS).read_bytes().partition(b"\n")
    except OSError as error:
        raise Damaged(f"the file {_CONTENTS} can't be read: {error.strerror}") from error
    if hashlib.sha256(text).hexdigest().encode() != digest:
        raise Damaged(f"the file {_CONTENTS} has changed")
    contents: dict[str, Any] = json.loads(text)
    if contents["byteorder"] != sys.byteorder:
        raise Damaged("it was written on another kind of machine")
    return contents


def _mapped(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    if not path.stat().st_size:
        return np.empty(0, dtype)  # nothing can't be mapped
    return np.asarray(np.memmap(path, dtype, mode="r"))
