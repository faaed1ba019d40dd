"""Where the tokens of a fast tokenizer lie, without being told: what they stand for, one after the other, is the text.

Telling is a third of a tokenizer's work: a number for each end of each token, made in one language and read in another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightning_sft.rendering.offsets import Encoded

_BLANK = " \t\n\r"
_META = "\u2581"  # SentencePiece's sign for a space


class KnownOffsets:
    """The text that each token stands for, by which a row's offsets are counted, and proved by its text.

    Args:
        tokenizer: A fast tokenizer, byte-level or of SentencePiece's kind; of another, nothing is known.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = tokenizer.backend_tokenizer
        added = tokenizer.added_tokens_decoder
        names = tokenizer.convert_ids_to_tokens(range(max(len(tokenizer), *added, 0) + 1))
        makeup = f"{backend.normalizer} {backend.pre_tokenizer}"
        read = _of_bytes() if "ByteLevel(" in makeup else _of_words if _META in makeup else _unknown
        pieces = [None if name is None else read(name) for name in names]
        for number, token in added.items():
            pieces[number] = token.content
        self._pieces = [piece or "" for piece in pieces]
        self._lengths = np.array([-1 if piece is None else len(piece) for piece in pieces], dtype=np.int64)
        self._added = np.zeros(len(names), dtype=bool)
        self._added[list(added)] = True
        self._swallowing = {number for number, token in added.items() if token.rstrip}
        after = next((t.content for t in added.values() if not (t.rstrip or t.lstrip or t.single_word)), "")
        # Whether the tokenizer puts a space before a text, and before what follows an added token.
        self._begun, self._resumed = (
            "".join(self._pieces[number] for number in backend.encode(text, add_special_tokens=False).ids)
            != text
            for text in ("a", f"{after}a")
        )

    def of(self, ids: Sequence[int], text: str) -> Encoded | None:
        """Ids and offsets, as the tokenizer gives them; None where that isn't sure."""
        tokens = np.array(ids, dtype=np.int32)
        lengths = self._lengths.take(tokens)
        if len(ids) == 0 or lengths.min() < 0:
            return None
        position = start = 0
        for added in (*np.flatnonzero(self._added.take(tokens)).tolist(), len(ids)):
            if added > start:
                joined = "".join(map(self._pieces.__getitem__, ids[start:added]))
                if self._resumed if start else self._begun:
                    # No character of the text.
                    if joined[0] != " " or lengths[start] == 1:
                        return None
                    joined = joined[1:]
                    lengths[start] -= 1
                if not text.startswith(joined, position):
                    return None
                position += len(joined)
            if added < len(ids):
                if not text.startswith(self._pieces[ids[added]], position):
                    return None
                end = position = position + int(lengths[added])
                if ids[added] in self._swallowing:
                    end = len(text) - len(text[position:].lstrip(_BLANK))
                lengths[added] += end - position
                position = end
            start = added + 1
        if position != len(text):
            return None
        ends = lengths.cumsum()
        return tokens, np.stack([ends - lengths, ends], axis=1)


def _of_bytes() -> Callable[[str], str | None]:
    """What a byte-level token's name stands for; None for half a character."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    table = {ord(sign): byte for byte, sign in bytes_to_unicode().items()}

    def read(name: str) -> str | None:
        try:
            return name.translate(table).encode("latin-1").decode()
        except UnicodeError:
            return None

    return read


def _of_words(name: str) -> str | None:
    """What a token of SentencePiece's stands for; None for half a character."""
    if len(name) == 6 and name.startswith("<0x"):
        byte = int(name[3:5], 16)
        return chr(byte) if byte < 128 else None
    return name.replace(_META, " ")


def _unknown(name: str) -> str | None:
    return None
