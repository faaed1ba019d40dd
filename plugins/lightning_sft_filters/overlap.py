"""Training data that has texts in it that a model is evaluated on.

Brown et al. (2020), Language Models are Few-Shot Learners, appendix C: texts overlap that share a run of N = 13 words,
in lower case and without punctuation; for shorter texts N goes down to 8.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from lightning_sft import Conversation, Evaluator, Filter, Segments, SFTError, Source, Verdict, read_rows
from lightning_sft_filters.parts import Part, at_least, excerpt, text_of, words_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd; of the hash of a run


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A text that training data must not hold.

    Args:
        text: The text.
        whose: What it is part of, for the ledger.
        where: Its file and row, or the evaluator and the item.
    """

    text: str
    whose: str
    where: str


class Overlap(Filter):
    """Drops conversations that share a run of words with texts that are held out, such as the items of a benchmark.

    Args:
        held_out: Data files, folders or Hub ids with these texts, or one; every text in a row is one.
        evaluators: Evaluators, as they are configured for `evaluate`: the question of each item is one, and its right
            answer where that has `least_words` words.
        columns: Of `held_out`, only the texts in these columns.
        words: How many words in a row count as an overlap.
        least_words: A held-out text with fewer words than `words` is looked for as a whole if it has at least so many;
            shorter ones are left alone, for anybody may write them.
        part: Where to look: in the whole `conversation`, or only in what is asked (`prompt`) or answered (`response`).
    """

    def __init__(
        self,
        held_out: list[str] | str | None = None,
        evaluators: list[Evaluator] | None = None,
        columns: list[str] | None = None,
        words: int = 13,
        least_words: int = 8,
        part: Part = "conversation",
    ) -> None:
        at_least(self, "least_words", least_words, 1)
        at_least(self, "words", words, least_words)
        if not (held_out or evaluators):
            raise SFTError(
                "there is nothing to look for",
                where="data.filters (Overlap)",
                fix="give files as `held_out`, or `evaluators`",
            )
        self.part: Part = part
        paths = [held_out] if isinstance(held_out, str) else held_out or ()
        texts = chain(_of_files(paths, columns), _of_evaluators(evaluators or (), least_words))
        self.places: list[tuple[str, str]] = []
        self.runs = _runs(texts, words, least_words, self.places)

    def judge(self, conversation: Conversation | Segments) -> Verdict:
        """Drops it with the number of shared runs as the score; the detail is the first of them, and whose it is."""
        words = words_of(text_of(conversation, self.part))
        of_words = word_hashes(words)
        shared, reason, detail = 0, "", ""
        for size, (known, owners) in self.runs.items():
            found = run_hashes(of_words, size)
            nearest = np.searchsorted(known, found).clip(max=len(known) - 1)
            places = np.flatnonzero(known[nearest] == found)
            if len(places) and not shared:
                first = int(places[0])
                whose, where = self.places[owners[nearest[first]]]
                reason = f"words in common with {whose}"
                detail = f"{where}: {excerpt(words[first : first + size])}"
            shared += len(places)
        return Verdict(reason, shared, detail) if shared else Verdict()


def word_hashes(words: Sequence[str]) -> NDArray[np.uint64]:
    """A hash of each word."""
    return np.fromiter(map(_hash, words), np.uint64, len(words))


def run_hashes(words: NDArray[np.uint64], size: int) -> NDArray[np.uint64]:
    """A hash of each run of n words, by the words' hashes: Σ hash(word i) · factor^(n − i), modulo 2^64."""
    runs = max(0, len(words) - size + 1)
    found = np.zeros(runs, np.uint64)
    for at in range(size):
        found = (found + words[at : at + runs]) * _FACTOR
    return found


@lru_cache(1 << 16)
def _hash(word: str) -> int:
    return int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "little")


def _of_files(paths: Sequence[str], columns: Sequence[str] | None) -> Iterator[HeldOut]:
    """Every text in the files' rows, or in these columns of theirs."""
    for path in paths:
        for meta, row in read_rows(Source(path)):
            if columns and (missing := [name for name in columns if name not in row]):
                raise SFTError(
                    f"there is no column {missing[0]!r}",
                    where=f"data.filters (Overlap): {meta}",
                    fix="name others",
                )
            for value in row.values() if not columns else [row[name] for name in columns]:
                for text in _texts(value):
                    yield HeldOut(text, "a held-out text", str(meta))


def _of_evaluators(evaluators: Sequence[Evaluator], least: int) -> Iterator[HeldOut]:
    """The question of each item; and its right answer, where it has so many words."""
    for evaluator in evaluators:
        name = type(evaluator).__name__
        for item in evaluator.texts():
            whose, where = f"an item of {name}", f"{name} {item.id}"
            yield HeldOut(item.text, whose, where)
            if len(words_of(item.answer)) >= least:
                yield HeldOut(item.answer, whose, where)


def _runs(
    texts: Iterable[HeldOut], most: int, least: int, places: list[tuple[str, str]]
) -> dict[int, tuple[NDArray[np.uint64], NDArray[np.int64]]]:
    """The hashes of the runs to look for, sorted, and the first text that has each, by their number of words.

    Args:
        texts: What is looked for.
        most: Words of a run.
        least: Words of the shortest text.
        places: Gets, of each text that is looked for, whose it is, and where.

    Raises:
        SFTError: No text is long enough.
    """
    found: dict[int, list[NDArray[np.uint64]]] = {}
    owners: dict[int, list[NDArray[np.int64]]] = {}
    count = short = 0
    for each in texts:
        words = words_of(each.text)
        count += bool(words)
        short += 0 < len(words) < least
        if len(words) >= least:
            size = min(most, len(words))
            hashes = run_hashes(word_hashes(words), size)
            found.setdefault(size, []).append(hashes)
            owners.setdefault(size, []).append(np.full(len(hashes), len(places)))
            places.append((each.whose, each.where))
    if not found:
        raise SFTError(
            f"no held-out text has {least} words or more, so there is nothing to look for",
            where="data.filters (Overlap)",
            fix="give other texts, or fewer least_words",
        )
    if short:
        warnings.warn(
            f"Overlap leaves out {short:,} of {count:,} held-out texts, of fewer than {least} words.",
            stacklevel=3,
        )
    runs = {}
    for size in sorted(found, reverse=True):
        hashes, first = np.unique(np.concatenate(found[size]), return_index=True)
        runs[size] = hashes, np.concatenate(owners[size])[first]
    return runs


def _texts(value: object) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)
