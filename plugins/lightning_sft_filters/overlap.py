"""Training data that has texts in it that a model is evaluated on.

Brown et al. (2020), Language Models are Few-Shot Learners, appendix C: texts overlap that share a run of N = 13 words,
in lower case and without punctuation; for shorter texts N goes down to 8.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

from lightning_sft import Conversation, Filter, Segments, SFTError, Source, Verdict, read_rows
from lightning_sft_filters.parts import Part, at_least, excerpt, text_of, words_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd; of the hash of a run


class Overlap(Filter):
    """Drops conversations that share a run of words with texts that are held out, such as the items of a benchmark.

    Args:
        held_out: Data files, folders or Hub ids with these texts, or one; every text in a row is one.
        columns: Only the texts in these columns.
        words: How many words in a row count as an overlap.
        least_words: A held-out text with fewer words than `words` is looked for as a whole if it has at least so many;
            shorter ones are left alone, for anybody may write them.
        part: Where to look: in the whole `conversation`, or only in what is asked (`prompt`) or answered (`response`).
    """

    def __init__(
        self,
        held_out: list[str] | str,
        columns: list[str] | None = None,
        words: int = 13,
        least_words: int = 8,
        part: Part = "conversation",
    ) -> None:
        at_least(self, "least_words", least_words, 1)
        at_least(self, "words", words, least_words)
        self.part: Part = part
        paths = [held_out] if isinstance(held_out, str) else held_out
        self.runs = _runs(paths, columns, words, least_words)

    def judge(self, conversation: Conversation | Segments) -> Verdict:
        """Drops it with the number of shared runs as the score, and the first of them as the detail."""
        words = words_of(text_of(conversation, self.part))
        of_words = word_hashes(words)
        shared, first = 0, ""
        for size, known in self.runs.items():
            found = run_hashes(of_words, size)
            nearest = known[np.searchsorted(known, found).clip(max=len(known) - 1)]
            places = np.flatnonzero(nearest == found)
            if len(places) and not shared:
                first = excerpt(words[places[0] : places[0] + size])
            shared += len(places)
        return Verdict("words in common with a held-out text", shared, first) if shared else Verdict()


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


def _runs(
    paths: Sequence[str], columns: Sequence[str] | None, most: int, least: int
) -> dict[int, NDArray[np.uint64]]:
    """The hashes of the runs to look for, sorted, by their number of words.

    Raises:
        SFTError: A column isn't there, or no text is long enough.
    """
    found: dict[int, list[NDArray[np.uint64]]] = {}
    texts = short = 0
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
                    words = words_of(text)
                    texts += bool(words)
                    short += 0 < len(words) < least
                    if len(words) >= least:
                        size = min(most, len(words))
                        found.setdefault(size, []).append(run_hashes(word_hashes(words), size))
    if not found:
        raise SFTError(
            f"no held-out text has {least} words or more, so there is nothing to look for",
            where=f"data.filters (Overlap): {', '.join(paths)}",
            fix="give other texts, or fewer least_words",
        )
    if short:
        warnings.warn(
            f"Overlap leaves out {short:,} of {texts:,} held-out texts, of fewer than {least} words.",
            stacklevel=3,
        )
    return {size: np.unique(np.concatenate(runs)) for size, runs in sorted(found.items(), reverse=True)}


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
