"""From a text with weighted spans to token ids with weights: by the offsets of a fast tokenizer."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from typing import TYPE_CHECKING

import numpy as np

from lightning_sft.errors import SFTError
from lightning_sft.example import Example, Reason
from lightning_sft.rendering.layout import Layout, Part, Span
from lightning_sft.rendering.slow_offsets import slow_offsets

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

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

    def encode(self, layouts: Sequence[Layout]) -> list[Rendering]:
        """The renderings of the layouts.

        Raises:
            SFTError: No token of one would be trained, or generation wouldn't stop at the end of a turn; names its row.
        """
        if not layouts:
            return []
        if not self.tokenizer.is_fast:
            return [self._slowly(layout) for layout in layouts]
        encoded = self._encoded([layout.text for layout in layouts])
        pairs = zip(layouts, encoded, strict=True)
        return [self._rendering(layout, ids, offsets) for layout, (ids, offsets) in pairs]

    def _encoded(self, texts: list[str]) -> Iterator[tuple[list[int], Sequence[tuple[int, int]]]]:
        """Ids and offsets of each text, as the tokenizer's own call gives them, without that call's many lists."""
        tokenizer = self._offset_tokenizer
        if not self._is_plain:
            encoded = tokenizer(
                texts,
                add_special_tokens=False,
                return_offsets_mapping=True,
                return_attention_mask=False,
                verbose=False,
            )
            return zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = tokenizer.split_special_tokens
        encodings = backend.encode_batch(texts, add_special_tokens=False)
        return ((encoding.ids, encoding.offsets) for encoding in encodings)

    @cached_property
    def _is_plain(self) -> bool:
        """Whether the tokenizer's class leaves encoding to the library that it is a face of."""
        from transformers import PreTrainedTokenizerFast

        plain = PreTrainedTokenizerFast
        names = ("__call__", "_encode_plus", "_convert_encoding", "set_truncation_and_padding")
        return all(getattr(type(self.tokenizer), name) is getattr(plain, name) for name in names)

    def _slowly(self, layout: Layout) -> Rendering:
        ids = self.tokenizer(layout.text, add_special_tokens=False, verbose=False)["input_ids"]
        try:
            offsets = slow_offsets(self.tokenizer, ids, layout.text)
        except SFTError as error:
            raise error.at(str(layout.meta)) from None
        return self._rendering(layout, ids, offsets)

    @cached_property
    def _offset_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with offsets that hold all of a token's characters.

        Some byte-level tokenizers (Llama 3's) leave a token's spaces out of its offsets, so that it can't be
        told on which side of a boundary they are.
        """
        probe = self.tokenizer("a  b", add_special_tokens=False, return_offsets_mapping=True)
        if all(before[1] >= after[0] for before, after in pairwise(probe["offset_mapping"])):
            return self.tokenizer
        from tokenizers.processors import Sequence as Processors

        whole = copy.deepcopy(self.tokenizer)
        whole.backend_tokenizer.post_processor = Processors([])
        return whole

    def _rendering(self, layout: Layout, ids: list[int], offsets: Sequence[tuple[int, int]]) -> Rendering:
        if layout.prefix or layout.suffix:
            behind = len(layout.text)
            ids = [*layout.prefix, *ids, *layout.suffix]
            offsets = [*((-1, -1) for _ in layout.prefix), *offsets]
            offsets += [(behind, behind + 1) for _ in layout.suffix]
        tokens = np.array(ids, dtype=np.int32)
        chars = np.fromiter(chain.from_iterable(offsets), dtype=np.int64, count=2 * len(ids)).reshape(-1, 2)
        self._check_stops(layout, tokens, chars)
        spans = (_TEMPLATE, *layout.spans)
        span_of = self._span_of(layout, tokens, chars)
        weights = np.array([span.weight for span in spans], dtype=np.float32).take(span_of)
        reasons = np.array([span.reason for span in spans], dtype=np.uint8).take(span_of)
        if len(tokens) and weights[0] > 0:
            weights[0], reasons[0] = 0.0, Reason.FIRST
        if not weights.any():
            raise SFTError(
                "nothing to train on: no token of this row has a weight above 0",
                where=str(layout.meta),
                fix="remove the row, or give one of its messages a weight",
            )
        turn = None if layout.part is None else layout.part.turn
        example = Example(tokens, weights, reasons, layout.meta, turn, layout.notes)
        return Rendering(example, layout.text, chars, spans, span_of, layout.part)

    def _check_stops(self, layout: Layout, tokens: NDArray[np.int32], chars: NDArray[np.int64]) -> None:
        """Refuse an end of turn that isn't its token here: generation stops on the token, not on the text."""
        for start, name in layout.stops:
            found = tokens[(chars[:, 0] <= start) & (chars[:, 1] > start)]
            if found.tolist() != [self.tokenizer.convert_tokens_to_ids(name)]:
                made = " ".join(map(repr, self.tokenizer.convert_ids_to_tokens(found.tolist())))
                raise SFTError(
                    f"the tokenizer makes {made} of the end-of-turn token {name} here: no stop for generation",
                    where=str(layout.meta),
                    fix="give it single_word: false in the tokenizer, or use another chat template",
                )

    def _span_of(
        self, layout: Layout, tokens: NDArray[np.int32], chars: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """The number of the span that each token belongs to, counted from 1; 0 is the template's text."""
        starts, ends = np.ascontiguousarray(chars.T)
        span_of = np.zeros(len(tokens), dtype=np.int64)
        in_order = bool((starts[1:] >= starts[:-1]).all() and (ends[1:] >= ends[:-1]).all())
        for number, span in enumerate(layout.spans, 1):
            if in_order:
                first, last = starts.searchsorted((span.start, span.end)).tolist()
                span_of[first:last] = number
                reaching = list(range(int(ends.searchsorted(span.start, "right")), first))
            else:
                span_of[(starts >= span.start) & (starts < span.end)] = number
                reaching = np.flatnonzero((starts < span.start) & (ends > span.start)).tolist()
            for i in reaching:
                # A token that reaches into the span has to be produced, so it is trained; except an added
                # token of the header that has merely swallowed the whitespace after it.
                if not (self._added[tokens[i]] and layout.text[span.start : ends[i]].isspace()):
                    span_of[i] = number
        return span_of
