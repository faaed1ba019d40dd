"""Probe texts of which a passage is trained on: runs of words that are in both, as GPT-3's authors looked for them.

A run has as many words as the fifth percentile of a domain's texts, between 8 and 13, without punctuation and case
(Brown et al., 2020, appendix C). Training rows are first looked through for runs of the same tokens, with hashes over
arrays; only those that have one are compared by words. So a passage counts that is tokenised alike in both: another
punctuation or case inside it may hide it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from lightning_sft import Example, SFTError

if TYPE_CHECKING:
    from lightning_sft import SFTModule
    from lightning_sft_callbacks.domains import Loaded

SHORTEST, LONGEST = 8, 13
"""Words of a run."""

_BLOCK = 1 << 20  # tokens at once
_COMPARED = 2000  # rows that are compared by words, at most
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_ALONE = "぀-ヿ㐀-鿿가-힣"  # scripts without spaces: a character is a word
_WORD = re.compile(rf"[{_ALONE}]|[^\W{_ALONE}]+")


@dataclass(frozen=True, slots=True)
class Passage:
    """A text of a probe.

    Args:
        domain: The domain that it is of.
        where: Its row.
        text: What it says.
    """

    domain: str
    where: str
    text: str


@dataclass(frozen=True, slots=True)
class Overlap:
    """A run of words of a probe's text in a training row.

    Args:
        passage: The text.
        row: The training row.
        words: The run.
    """

    passage: Passage
    row: str
    words: str


def words_of(text: str) -> list[str]:
    """The words in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def overlaps(
    passages: Sequence[Passage],
    training: Sequence[Example],
    encode: Callable[[str], Sequence[int]],
    decode: Callable[[Sequence[int]], str],
) -> list[Overlap]:
    """The first run of each passage that is in a training row, in the order of the rows.

    Args:
        passages: The probes' texts.
        training: What is trained on.
        encode: From a text to its token ids, without special tokens.
        decode: From token ids to their text.
    """
    runs = _runs(passages)
    if not runs:
        return []
    encoded = [np.asarray(encode(each.text), np.uint64) for each in passages]
    lengths = sorted({len(run) for run in runs})
    per_word = min(
        len(ids) / max(1, len(words_of(each.text))) for ids, each in zip(encoded, passages, strict=True)
    )
    # the tokens at both ends of a run may differ, and a token may be of several words
    size = max(3, int(lengths[0] * min(1.0, per_word)) - 2)
    probed = np.unique(np.concatenate([_hashes(ids, size) for ids in encoded]))
    found: dict[Passage, Overlap] = {}
    for number, example in enumerate(_candidates(training, probed, size)):
        if number == _COMPARED or len(found) == len(passages):
            break
        words = words_of(decode(example.input_ids.tolist()))
        for length in lengths:
            for start in range(len(words) - length + 1):
                run = tuple(words[start : start + length])
                for passage in runs.get(run, ()):
                    found.setdefault(passage, Overlap(passage, str(example.meta), " ".join(run)))
    return list(found.values())


def refuse_trained(domains: Sequence[Loaded], module: SFTModule) -> None:
    """Refuse a text that is in the training data: what is trained on can't show what is forgotten.

    Raises:
        SFTError: A text is; names its row there and here.
    """
    probed = {
        window.input_ids.tobytes(): (loaded.domain.name, window)
        for loaded in domains
        for window in loaded.texts
    }
    lengths = {len(window) for _, window in probed.values()}
    prepared = module.data.prepared["train"]
    for row, length in enumerate(prepared.lengths):
        # a text in training is followed by EOS
        for size in {int(length), int(length) - 1} & lengths:
            example = prepared.examples[row]
            found = probed.get(example.input_ids[:size].tobytes())
            if found is not None:
                name, window = found
                raise SFTError(
                    f"the text is trained on ({example.meta}), so it can't show what is forgotten",
                    where=f"ForgettingProbe, domain {name}: {window.meta}",
                    fix="take it out of the one or the other",
                )


def _runs(passages: Sequence[Passage]) -> dict[tuple[str, ...], list[Passage]]:
    """The passages by their runs of words."""
    found: dict[tuple[str, ...], list[Passage]] = {}
    for domain in dict.fromkeys(each.domain for each in passages):
        texts = [(each, words_of(each.text)) for each in passages if each.domain == domain]
        shortest = float(np.percentile([len(words) for _, words in texts], 5))
        length = int(min(LONGEST, max(SHORTEST, shortest)))
        for passage, words in texts:
            for start in range(len(words) - length + 1):
                owners = found.setdefault(tuple(words[start : start + length]), [])
                if passage not in owners:
                    owners.append(passage)
    return found


def _candidates(training: Sequence[Example], probed: NDArray[np.uint64], size: int) -> Iterator[Example]:
    """The training rows with a run of tokens that a probe has, too."""
    shift = np.uint64(64 - 20)
    marked = np.zeros(1 << 20, bool)  # of most runs this tells already that no probe has them
    marked[(probed >> shift).astype(np.int64)] = True
    block: list[Example] = []
    tokens = 0
    for number, example in enumerate(training):
        block.append(example)
        tokens += len(example)
        if tokens < _BLOCK and number + 1 < len(training):
            continue
        hashes = _hashes(np.concatenate([each.input_ids for each in block]).astype(np.uint64), size)
        places = np.flatnonzero(marked[(hashes >> shift).astype(np.int64)])
        places = places[np.isin(hashes[places], probed)]
        ends = np.cumsum([len(each) for each in block])
        # a run that goes over from one row to the next is none; the words will say so
        for row in np.unique(np.searchsorted(ends, places, side="right")):
            yield block[row]
        block, tokens = [], 0


def _hashes(ids: NDArray[np.uint64], size: int) -> NDArray[np.uint64]:
    """A hash of each run of so many tokens."""
    count = max(0, len(ids) - size + 1)
    found = np.zeros(count, np.uint64)
    for place in range(size):
        found = found * _FACTOR + ids[place : place + count] + np.uint64(1)
    return found ^ (found >> np.uint64(29)) * _FACTOR
