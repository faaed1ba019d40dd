"""Where the tokens of a slow tokenizer lie, which doesn't tell: found by decoding, and proved by the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_sft.errors import SFTError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HALF = "\ufffd"  # what bytes decode to that are no whole character yet


def slow_offsets(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str) -> list[tuple[int, int]]:
    """The characters of each token, as a fast tokenizer would give them.

    A token stands for what it adds to the decoding of the tokens before it; tokens that make up one character
    together all stand for it. It counts only if these pieces, one after the other, are exactly the text.

    Raises:
        SFTError: They aren't.
    """
    offsets: list[tuple[int, int]] = []
    position = before = 0  # characters found; the token at which the window of the decoding begins
    for number in range(1, len(ids) + 1):
        done = len(offsets)
        known, grown = (_decode(tokenizer, ids[before:end]) for end in (done, number))
        piece = grown[len(known) :]
        if number < len(ids) and (not piece or piece.endswith(_HALF)):
            # Half a character, unless it is the text's own sign for that: then the next token adds to it.
            more = _decode(tokenizer, ids[before : number + 1])
            if not piece or more == grown or not text.startswith(piece, position):
                continue
        if not grown.startswith(known) or not text.startswith(piece, position):
            raise _differs(tokenizer, text, position, piece)
        offsets += [(position, position + len(piece))] * (number - done)
        position += len(piece)
        before = done
    if position < len(text):
        raise _differs(tokenizer, text, position, "")
    return offsets


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(
        tokenizer.decode(
            list(ids),
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
            spaces_between_special_tokens=False,
        )
    )


def _differs(tokenizer: PreTrainedTokenizerBase, text: str, position: int, piece: str) -> SFTError:
    return SFTError(
        f"{type(tokenizer).__name__} is a slow tokenizer, which doesn't tell where a token lies, and what it makes of "
        f"the text can't be told from its decoding: character {position} is {text[position : position + 20]!r}, the "
        f"token there is {piece!r}",
        fix="save it as a fast tokenizer (a folder with tokenizer.json), and give that folder with model.tokenizer",
    )
