"""What a pattern finds in what a model wrote, with lm-evaluation-harness's definitions."""

from __future__ import annotations

import re
from collections.abc import Sequence

INVALID = "[invalid]"
"""The answer where none is found."""


def find(pattern: re.Pattern[str], text: str, place: int) -> str:
    """The find, stripped, which may be empty; `INVALID` where nothing is found, or groups that all are empty.

    Args:
        pattern: What to look for; of several groups the first that isn't empty counts.
        text: Where.
        place: Which of several finds: 0 the first, -1 the last.
    """
    found = pattern.findall(text)
    if not -len(found) <= place < len(found):
        return INVALID
    if isinstance(found[place], tuple) and not any(found[place]):
        return INVALID
    return first(pattern, text, place)


def first(pattern: re.Pattern[str], text: str, place: int) -> str:
    """The find's first group that isn't empty, stripped; empty where nothing is found."""
    found: Sequence[str | tuple[str, ...]] = pattern.findall(text)
    if not found:
        return ""
    chosen = found[place]
    if isinstance(chosen, tuple):
        chosen = next(filter(None, chosen), "")
    return chosen.strip()
