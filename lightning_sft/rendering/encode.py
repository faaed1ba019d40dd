"""From a text with weighted spans to token ids with weights: by the offsets of a fast tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from lightning_sft.errors import SFTError
from lightning_sft.example import Example, Reason
from lightning_sft.rendering.layout import Layout, Part, Span
from lightning_sft.rendering.offsets import OffsetTokenizer, as_arrays
from lightning_sft.rendering.slow_offsets import slow_offsets

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from lightning_sft.rendering.offsets import Encoded

_TEMPLATE = Span(0, 0, 0.0, Reason.CONTEXT)


@dataclass(frozen=True, slots=True, eq=False)
class Rendering:
    """An example of `T` tokens with what it was made of.

    Args:
        example: Its ids, weights and reasons.
        text: The rendered text.
        offsets: int64 `[T, 2]`: the characters of each token; BOS and EOS around raw text have none.
        spans: What the text consists of; the first stands for what the template itself wrote.
        span_of: int64 `[T]`: the span that each token belongs to.
        part: What it holds of a conversation; None for text as it stands.
    """

    example: Example
    text: str
    offsets: NDArray[np.int64]
    spans: tuple[Span, ...]
    span_of: NDArray[np.int64]
    part: Part | None = None


class Encoder:
    """Encodes layouts in batches.

    Args:
        tokenizer: A fast tokenizer; a slow one works too, if its texts decode to what they were.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        added = list(tokenizer.added_tokens_decoder)
        self._added = np.zeros(max(len(tokenizer), *added, 0) + 1, dtype=bool)
        self._added[added] = True
        self._tokens = OffsetTokenizer(tokenizer)

    def encode(self, layouts: Sequence[Layout]) -> list[Rendering]:
        """The renderings of the layouts.

        Raises:
            SFTError: No token of one would be trained, or generation wouldn't stop at the end of a turn; names its row.
        """
        if not layouts:
            return []
        if self.tokenizer.is_fast:
            encoded = self._tokens.encode([layout.text for layout in layouts])
        else:
            encoded = list(map(self._slowly, layouts))
        both = [_surrounded(layout, *each) for layout, each in zip(layouts, encoded, strict=True)]
        return self._renderings(layouts, [ids for ids, _ in both], [chars for _, chars in both])

    def _slowly(self, layout: Layout) -> Encoded:
        ids = self.tokenizer(layout.text, add_special_tokens=False, verbose=False)["input_ids"]
        try:
            return as_arrays(ids, slow_offsets(self.tokenizer, ids, layout.text))
        except SFTError as error:
            raise error.at(str(layout.meta)) from None

    def _renderings(
        self,
        layouts: Sequence[Layout],
        ids: Sequence[NDArray[np.int32]],
        offsets: Sequence[NDArray[np.int64]],
    ) -> list[Rendering]:
        """The renderings of all layouts at once: a few operations on long arrays instead of many on short ones."""
        lengths = list(map(len, ids))
        bounds = [0, *accumulate(lengths)]
        tokens, chars = np.concatenate(ids), np.concatenate(offsets)
        # Counted through all texts, with room for what lies before and behind each.
        texts = [0, *accumulate(len(layout.text) + 3 for layout in layouts)]
        places = _Places(chars + np.repeat(np.array(texts[:-1]), lengths)[:, None])
        spans = [(_TEMPLATE, *layout.spans) for layout in layouts]
        firsts = [0, *accumulate(map(len, spans))]
        span_of = np.repeat(np.array(firsts[:-1]), lengths)
        self._assign(span_of, firsts, layouts, texts, tokens, places)
        weights = np.array([span.weight for each in spans for span in each], dtype=np.float32).take(span_of)
        reasons = np.array([span.reason for each in spans for span in each], dtype=np.uint8).take(span_of)
        for first, length in zip(bounds, lengths, strict=False):
            if length and weights[first] > 0:
                weights[first], reasons[first] = 0.0, Reason.FIRST
        trained = np.concatenate([[0], np.cumsum(weights > 0)])[bounds].tolist()
        span_of -= np.repeat(np.array(firsts[:-1]), lengths)
        stops = iter(
            places.at([t + at for t, layout in zip(texts, layouts, strict=False) for at, _ in layout.stops])
        )
        renderings = []
        for n, layout in enumerate(layouts):
            for (_, name), found in zip(layout.stops, stops, strict=False):
                self._check_stop(name, tokens[found].tolist(), layout)
            if trained[n] == trained[n + 1]:
                raise SFTError(
                    "nothing to train on: no token of this row has a weight above 0",
                    where=str(layout.meta),
                    fix="remove the row, or give one of its messages a weight",
                )
            own = slice(bounds[n], bounds[n + 1])
            turn = None if layout.part is None else layout.part.turn
            example = Example(tokens[own], weights[own], reasons[own], layout.meta, turn, layout.notes)
            renderings.append(
                Rendering(example, layout.text, chars[own], spans[n], span_of[own], layout.part)
            )
        return renderings

    def _check_stop(self, name: str, found: list[int], layout: Layout) -> None:
        """Refuse an end of turn that isn't its token here: generation stops on the token, not on the text."""
        if found != [self.tokenizer.convert_tokens_to_ids(name)]:
            made = " ".join(map(repr, self.tokenizer.convert_ids_to_tokens(found)))
            raise SFTError(
                f"the tokenizer makes {made} of the end-of-turn token {name} here: no stop for generation",
                where=str(layout.meta),
                fix="give it single_word: false in the tokenizer, or use another chat template",
            )

    def _assign(
        self,
        span_of: NDArray[np.int64],
        firsts: Sequence[int],
        layouts: Sequence[Layout],
        texts: Sequence[int],
        tokens: NDArray[np.int32],
        places: _Places,
    ) -> None:
        """Set the number of the span of each token that isn't the template's."""
        spans = [(n, span) for n, layout in enumerate(layouts) for span in layout.spans]
        numbers = (number for n, first in enumerate(firsts[1:]) for number in range(firsts[n] + 1, first))
        ranges = [(texts[n] + span.start, texts[n] + span.end) for n, span in spans]
        for (n, span), number, (begun, reaching) in zip(spans, numbers, places.within(ranges), strict=True):
            span_of[begun] = number
            for i in reaching:
                # A token that reaches into the span has to be produced, so it is trained; except an added
                # token of the header that has merely swallowed the whitespace after it.
                inside = layouts[n].text[span.start : places.ends[i] - texts[n]]
                if not (self._added[tokens[i]] and inside.isspace()):
                    span_of[i] = number


class _Places:
    """Where tokens lie: `chars`, int64 `[T, 2]`, holds the first character of each and that behind its last one."""

    def __init__(self, chars: NDArray[np.int64]) -> None:
        self.starts, self.ends = np.ascontiguousarray(chars.T)
        self.in_order = all(bool((each[1:] >= each[:-1]).all()) for each in (self.starts, self.ends))

    def within(
        self, ranges: Sequence[tuple[int, int]]
    ) -> Iterable[tuple[slice | NDArray[np.intp], Iterable[int]]]:
        """For each range of characters, the tokens that begin in it, and those before it that reach into it."""
        if not self.in_order:
            return [
                (
                    np.flatnonzero((self.starts >= start) & (self.starts < end)),
                    np.flatnonzero((self.starts < start) & (self.ends > start)).tolist(),
                )
                for start, end in ranges
            ]
        edges = np.array(ranges, dtype=np.int64).reshape(-1, 2)
        begun = self.starts.searchsorted(edges).tolist()
        reaching = self.ends.searchsorted(edges[:, 0], "right").tolist()
        return [(slice(*both), range(first, both[0])) for both, first in zip(begun, reaching, strict=True)]

    def at(self, points: Sequence[int]) -> Iterable[slice | NDArray[np.intp]]:
        """For each character, the tokens that hold it."""
        if not self.in_order:
            return [np.flatnonzero((self.starts <= point) & (self.ends > point)) for point in points]
        firsts = self.ends.searchsorted(points, "right").tolist()
        return map(slice, firsts, self.starts.searchsorted(points, "right").tolist())


def _surrounded(layout: Layout, ids: NDArray[np.int32], chars: NDArray[np.int64]) -> Encoded:
    """The tokens of a layout's text with those around it."""
    if not (layout.prefix or layout.suffix):
        return ids, chars
    behind = len(layout.text)
    before = as_arrays(layout.prefix, [(-1, -1)] * len(layout.prefix))
    after = as_arrays(layout.suffix, [(behind, behind + 1)] * len(layout.suffix))
    return np.concatenate([before[0], ids, after[0]]), np.concatenate([before[1], chars, after[1]])
