"""Texts that repeat themselves: the rules of Gopher's training data.

Rae et al. (2021), Scaling Language Models: Methods, Analysis & Insights from Training Gopher, appendix A.1.1 and
table A1.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain

from lightning_sft import Conversation, Filter, Segments, SFTError, Verdict
from lightning_sft_filters.parts import Part, at_least, text_of

TOP = {2: 0.20, 3: 0.18, 4: 0.16}
"""Table A1: the largest share of characters in the most frequent n-gram."""

REPEATED = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
"""Table A1: the largest share of characters in n-grams that occur more than once."""


class Repetition(Filter):
    """Drops texts of which too much is repeated: lines, paragraphs or n-grams of words, by Gopher's rules.

    Each limit is the largest share that is kept; the score is the share. Lines and paragraphs count as repeated from
    their second occurrence on, and empty ones don't count. An n-gram that occurs once is no repetition, and a word
    counts once, however many n-grams it is in. Characters are those of lines, paragraphs and words without the
    whitespace around.

    Args:
        part: What is looked at: what is answered (`response`), what is asked (`prompt`), or the whole `conversation`.
        min_words: Texts with fewer words are kept: the rules are made for documents, of which Gopher's have at least 50
            words.
        lines: Of all lines, the share that is repeated.
        line_characters: The share of characters in these.
        paragraphs: Of all paragraphs, the share that is repeated.
        paragraph_characters: The share of characters in these.
        top_ngrams: By n, the share of characters in the most frequent n-gram; those of the paper by default.
        repeated_ngrams: By n, the share of characters in n-grams that occur more than once; those of the paper
            by default.
    """

    def __init__(
        self,
        part: Part = "response",
        min_words: int = 50,
        lines: float = 0.30,
        line_characters: float = 0.20,
        paragraphs: float = 0.30,
        paragraph_characters: float = 0.20,
        top_ngrams: dict[int, float] | None = None,
        repeated_ngrams: dict[int, float] | None = None,
    ) -> None:
        self.part: Part = part
        at_least(self, "min_words", min_words, 0)
        self.min_words = min_words
        self.lines, self.line_characters = lines, line_characters
        self.paragraphs, self.paragraph_characters = paragraphs, paragraph_characters
        self.top_ngrams = TOP if top_ngrams is None else top_ngrams
        self.repeated_ngrams = REPEATED if repeated_ngrams is None else repeated_ngrams
        for n in (*self.top_ngrams, *self.repeated_ngrams):
            at_least(self, "n", n, 1)
        for share in (lines, line_characters, paragraphs, paragraph_characters, *self._ngram_limits):
            if not 0 <= share <= 1:
                raise SFTError(
                    f"a limit is {share}", where="data.filters (Repetition)", fix="give a share from 0 to 1"
                )

    @property
    def _ngram_limits(self) -> list[float]:
        return [*self.top_ngrams.values(), *self.repeated_ngrams.values()]

    def judge(self, conversation: Conversation | Segments) -> Verdict:
        """Drops it for the first limit, in the order of the options, that is exceeded."""
        text = text_of(conversation, self.part)
        if len(text.split()) < max(1, self.min_words):
            return Verdict()
        for what, share, limit in self._shares(text):
            if share > limit:
                return Verdict(f"more than {limit:.0%} {what}", share)
        return Verdict()

    def _shares(self, text: str) -> Iterator[tuple[str, float, float]]:
        """What is measured, the share, and its limit."""
        for pieces, name, most, most_characters in (
            (text.splitlines(), "line", self.lines, self.line_characters),
            (re.split(r"\n\s*\n", text), "paragraph", self.paragraphs, self.paragraph_characters),
        ):
            filled = [piece.strip() for piece in pieces if piece.strip()]
            again = repeated(filled)
            yield f"of the {name}s repeated", len(again) / len(filled), most
            yield f"of the characters in repeated {name}s", _length(again) / _length(filled), most_characters
        words = text.split()
        grams = repeated_ngrams(words, max([*self.top_ngrams, *self.repeated_ngrams], default=0))
        for n, most in self.top_ngrams.items():
            yield (
                f"of the characters in one {n}-gram",
                _length(in_top(words, n, grams[n])) / _length(words),
                most,
            )
        for n, most in self.repeated_ngrams.items():
            inside = covered(words, n, chain.from_iterable(grams[n].values()))
            yield f"of the characters in repeated {n}-grams", _length(inside) / _length(words), most


def repeated(pieces: Sequence[str]) -> list[str]:
    """Each piece as often as it is there again after its first occurrence."""
    return [piece for piece, count in Counter(pieces).items() for _ in range(count - 1)]


def repeated_ngrams(words: Sequence[str], longest: int) -> dict[int, dict[tuple[str, ...], list[int]]]:
    """By n, from 1 to the longest: each n-gram that occurs more than once, with its places.

    What begins a repeated n-gram begins a repeated (n − 1)-gram, so with each n fewer places are looked at.
    """
    found = {}
    places: Iterable[int] = range(len(words))
    for n in range(1, longest + 1):
        where: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
        for at in places:
            if at + n <= len(words):
                where[tuple(words[at : at + n])].append(at)
        found[n] = {gram: starts for gram, starts in where.items() if len(starts) > 1}
        places = sorted(chain.from_iterable(found[n].values()))
    return found


def in_top(words: Sequence[str], n: int, grams: Mapping[tuple[str, ...], Sequence[int]]) -> list[str]:
    """The words in the most frequent n-gram, the longest of several."""
    top = max(grams, key=lambda gram: (len(grams[gram]), _length(gram)), default=())
    return covered(words, n, grams.get(top, ()))


def covered(words: Sequence[str], n: int, starts: Iterable[int]) -> list[str]:
    """The words in the n-grams at these places, each once, however many of these it is in."""
    return [words[at] for at in sorted({start + more for start in starts for more in range(n)})]


def _length(texts: Sequence[str]) -> int:
    return sum(map(len, texts))
