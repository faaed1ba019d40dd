"""What a fast tokenizer makes of texts: the ids, and the characters of each token."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import chain, pairwise
from typing import TYPE_CHECKING

import numpy as np

from lightning_sft.rendering.known_offsets import KnownOffsets

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    Encoded = tuple[NDArray[np.int32], NDArray[np.int64]]
    """A text's ids, int32 `[T]`, and of each token its first character and the one behind its last, int64 `[T, 2]`."""

_MANY = 32  # texts in one call from which on it is worth knowing the vocabulary


class OffsetTokenizer:
    """Encodes texts in batches, as the tokenizer's own call does without special tokens around them.

    Args:
        tokenizer: A fast tokenizer; it is left as it is.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._counted = self._asked = 0  # texts whose offsets were counted, and asked for

    def encode(self, texts: list[str]) -> list[Encoded]:
        """Ids and offsets of each text."""
        tokenizer = self.whole
        if not self._is_plain:
            encoded = tokenizer(
                texts,
                add_special_tokens=False,
                return_offsets_mapping=True,
                return_attention_mask=False,
                verbose=False,
            )
            return list(map(as_arrays, encoded["input_ids"], encoded["offset_mapping"]))
        # The call's own encoding, without its many lists.
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = tokenizer.split_special_tokens
        if self._keeps_texts:
            backend.model._resize_cache(0)
        known: list[Encoded | None] = [None] * len(texts)
        # Where most have to be asked for, counting is in vain.
        if len(texts) >= _MANY and self._asked <= self._counted + _MANY:
            encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
            known = [self._known.of(each.ids, text) for each, text in zip(encodings, texts, strict=True)]
        asked = [text for text, each in zip(texts, known, strict=True) if each is None]
        self._asked += len(asked)
        self._counted += len(texts) - len(asked)
        told = (
            as_arrays(each.ids, each.offsets)
            for each in backend.encode_batch(asked, add_special_tokens=False)
        )
        return [next(told) if each is None else each for each in known]

    @cached_property
    def _known(self) -> KnownOffsets:
        return KnownOffsets(self.tokenizer)

    @cached_property
    def _keeps_texts(self) -> bool:
        """Whether the cache of words fills with whole texts, as no words are taken apart; 10,000 of them take 30 MB."""
        backend = self.tokenizer.backend_tokenizer
        words = backend.pre_tokenizer.pre_tokenize_str("a b") if backend.pre_tokenizer is not None else []
        return len(words) < 2 and hasattr(backend.model, "_resize_cache")

    @cached_property
    def _is_plain(self) -> bool:
        """Whether the tokenizer's class leaves encoding to the library that it is a face of."""
        from transformers import PreTrainedTokenizerFast

        plain = PreTrainedTokenizerFast
        names = ("__call__", "_encode_plus", "_convert_encoding", "set_truncation_and_padding")
        return all(getattr(type(self.tokenizer), name) is getattr(plain, name) for name in names)

    @cached_property
    def whole(self) -> PreTrainedTokenizerBase:
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


def as_arrays(ids: Sequence[int], offsets: Iterable[tuple[int, int]]) -> Encoded:
    """Python's numbers as arrays."""
    tokens = np.array(ids, dtype=np.int32)
    chars = np.fromiter(chain.from_iterable(offsets), dtype=np.int64, count=2 * len(ids))
    return tokens, chars.reshape(-1, 2)
