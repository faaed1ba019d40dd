"""Where a text can be cut so that its pieces have, one after the other, the ids of the whole.

Byte-level BPE never merges across what its pre-tokenizer splits. The expressions of GPT-2 and of Llama 3, Qwen and
their like have no match that holds a letter with a space after it, none that looks back, and for a run of letters
none that looks ahead. So between an ASCII letter and a space with a letter after it there is always a split, and
neither side depends on the other. Prompts that differ at their ends only are encoded once up to there. Other
tokenizers encode every text as a whole.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CUT = re.compile(r"[A-Za-z](?= [A-Za-z])")
_NEAR = 400
_KNOWN = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
}


def can_cut(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer is one of which that is known."""
    if not tokenizer.is_fast:
        return False
    told: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model, added = told["model"], [token["content"] for token in told["added_tokens"]]
    odd = any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in told["added_tokens"])
    odd |= any(" " in text or re.search(r"^\w|\w$", text) for text in added)
    plain = model["type"] == "BPE" and not model.get("dropout") and told["normalizer"] is None
    plain &= not model.get("continuing_subword_prefix") and not model.get("end_of_word_suffix")
    whole = tokenizer.backend_tokenizer.encode("a").ids
    ends = whole[-1:] == tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).ids[-1:]
    return bool(plain and ends and not odd and _splits(told["pre_tokenizer"]))


def _splits(told: dict[str, Any] | None) -> bool:
    """Whether the pre-tokenizer splits with one of the known expressions."""
    if told is None:
        return False
    if told["type"] == "ByteLevel":
        return bool(told.get("use_regex", True)) and not told["add_prefix_space"]
    parts = told.get("pretokenizers", [])
    if told["type"] != "Sequence" or [part["type"] for part in parts] != ["Split", "ByteLevel"]:
        return False
    split, bytes_ = parts
    known = (
        split["pattern"].get("Regex") in _KNOWN and split["behavior"] == "Isolated" and not split["invert"]
    )
    return known and not bytes_.get("use_regex", True) and not bytes_["add_prefix_space"]


def cut(text: str) -> int:
    """The last such place near the end of a text; 0 where there is none."""
    start = max(0, len(text) - _NEAR)
    places = [match.end() for match in _CUT.finditer(text, start)]
    return places[-1] if places else 0
