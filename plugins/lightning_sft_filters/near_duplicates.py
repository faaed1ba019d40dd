"""Conversations that are nearly like one before, by MinHash and locality-sensitive hashing.

Texts are compared as sets of shingles, runs of words or characters, by Jaccard's index |A ∩ B| / |A ∪ B|. The share of
equal values in two MinHash signatures estimates it (Broder, 1997). Signatures are cut into b bands of r values, and
texts with a band in common are candidates: with a probability of 1 − (1 − s^r)^b at similarity s (Leskovec, Rajaraman
and Ullman, Mining of Massive Datasets, chapter 3.4). Each candidate is then compared exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from lightning_sft import Conversation, Segments, SetFilter, SFTError, Verdict
from lightning_sft_filters.parts import Part, at_least, normal, text_of

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from rensa import RMinHash

_VALUES = 128  # of a signature, at most
_FOUND = 0.99  # of pairs that are as similar as the threshold
_SEED = 42


class Seen(NamedTuple):
    """What is known of a text: its signature and its shingles, hashed and sorted (None: it has no words)."""

    signature: RMinHash | None
    shingles: NDArray[np.uint64]
    place: str


class NearDuplicates(SetFilter):
    """Keeps the first of those that have nearly the same text, over all sources.

    Finds at least 99 % of the pairs at the threshold, more of those that are more alike, and drops none below it. Needs
    rensa: `pip install "lightning-sft[dedup]"`. Keeps about 2.2 kB of each text in memory, and its shingles in a
    temporary file. Conversations without any text in the part are kept.

    Args:
        threshold: Similar are those whose Jaccard index is as large: 1 is the same set of shingles.
        part: What is compared: what is asked (`prompt`), what is answered (`response`), or the whole `conversation`.
        shingle: Words or characters of a shingle. A shorter text is one shingle.
        unit: What shingles are made of; `characters` for languages that are written without spaces.
    """

    def __init__(
        self,
        threshold: float = 0.8,
        part: Part = "conversation",
        shingle: int = 3,
        unit: Literal["words", "characters"] = "words",
    ) -> None:
        if not 0 < threshold <= 1:
            raise SFTError(
                f"threshold is {threshold}",
                where="data.filters (NearDuplicates)",
                fix="give one above 0, up to 1",
            )
        at_least(self, "shingle", shingle, 1)
        if find_spec("rensa") is None:
            raise SFTError(
                "NearDuplicates needs rensa", where="data.filters", fix='pip install "lightning-sft[dedup]"'
            )
        self.made_by = (
            f"rensa {metadata.version('rensa')}"  # another one may find others: data is prepared anew
        )
        self.threshold = threshold
        self.part: Part = part
        self.shingle = shingle
        self.unit = unit

    @property
    def bands(self) -> tuple[int, int]:
        """Bands, and the values of each: the longest that still find 99 % at the threshold."""
        for size in range(_VALUES, 1, -1):
            count = _VALUES // size
            if 1 - (1 - self.threshold**size) ** count >= _FOUND:
                return count, size
        return _VALUES, 1

    def look(self, conversation: Conversation | Segments) -> Seen:
        """Signature and shingles of the text."""
        from rensa import RMinHash

        text = normal(text_of(conversation, self.part))
        if not text:
            return Seen(None, np.empty(0, np.uint64), "")
        pieces, space = (text.split(), " ") if self.unit == "words" else (list(text), "")
        shingles = {
            space.join(pieces[at : at + self.shingle]) for at in range(max(1, len(pieces) - self.shingle + 1))
        }
        count, size = self.bands
        signature = RMinHash(num_perm=count * size, seed=_SEED)
        signature.update(list(shingles))
        (hashes,) = RMinHash.hash_token_sets([list(shingles)])
        return Seen(signature, np.unique(np.array(hashes, dtype=np.uint64)), str(conversation.meta))

    def begin(self) -> Callable[[Seen], Verdict]:
        """A judge with an index of what it has kept."""
        from rensa import RMinHashLSH

        count, size = self.bands
        index = RMinHashLSH(threshold=self.threshold, num_perm=count * size, num_bands=count)
        file = TemporaryFile()  # noqa: SIM115  # it goes with the judge
        ends, places = [0], list[str]()

        def shingles(number: int) -> NDArray[np.uint64]:
            file.seek(ends[number])
            return np.frombuffer(file.read(ends[number + 1] - ends[number]), np.uint64)

        def judge(seen: Seen) -> Verdict:
            if seen.signature is None:
                return Verdict()
            for number in sorted(index.query(seen.signature)):
                similarity = jaccard(seen.shingles, shingles(number))
                if similarity >= self.threshold:
                    reason = f"nearly the same {self.part} as an earlier one"
                    return Verdict(reason, similarity, places[number])
            index.insert(len(places), seen.signature)
            places.append(seen.place)
            file.seek(ends[-1])
            ends.append(ends[-1] + file.write(seen.shingles.tobytes()))
            return Verdict()

        return judge


def jaccard(one: NDArray[np.uint64], other: NDArray[np.uint64]) -> float:
    """Jaccard's index of two sets, each sorted and without repetition."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)
