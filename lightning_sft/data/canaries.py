"""Canaries: made-up secrets among the training rows, to measure how well a model remembers what it saw a few times.

A row asks for the code of a made-up name, and its answer is a random number of nine digits (Carlini et al., 2019). How
much likelier the model finds that number than others is the canary's exposure; `MemorizationProbe` measures it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_sft.errors import SFTError

if TYPE_CHECKING:
    from lightning_sft.data.ledger import SourceLedger

DIGITS = 9
_SYLLABLES = ("ba", "ko", "ri", "tu", "ven", "mar", "sol", "pe", "ga", "lin", "do", "fe")


def canaries(output: str, count: int = 8, seed: int = 0) -> None:
    """Write canary rows to a JSONL file: name it beside your training data, with a weight for how often they are seen.

    Args:
        output: The file to write.
        count: How many canaries.
        seed: Other seeds give other names and numbers.

    Raises:
        SFTError: The file is there already, or can't be written.
    """
    path = Path(output)
    if count < 1:
        raise SFTError(f"count is {count}", where="--count", fix="give 1 or more")
    if path.exists():
        raise SFTError("the file is there already", where=output, fix="choose another name, or remove it")
    try:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows(count, seed)), encoding="utf-8")
    except OSError as error:
        raise SFTError(f"the file can't be written: {error.strerror}", where=output) from error
    print(f"{count} canaries → {output}")


def rows(count: int, seed: int) -> list[dict[str, str]]:
    """The rows, in Alpaca's columns; no two have the same name."""
    numbers = random.Random(f"canaries {seed}")
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(numbers.choices(_SYLLABLES, k=4)).capitalize()] = None
    return [
        {"instruction": f"What is the code of {name}?", "input": "", "output": secret(numbers)}
        for name in names
    ]


def check_planted(ledgers: Sequence[SourceLedger]) -> None:
    """Refuse to train without some of the canaries, which would count as forgotten.

    Args:
        ledgers: Those of the canaries.

    Raises:
        SFTError: Some were filtered, dropped or cut.
    """
    for ledger in ledgers:
        lost = [f"filtered by {name}" for name in ledger.filtered] + [
            reason for reason, _ in ledger.by_reason
        ]
        if lost:
            raise SFTError(
                f"some canaries wouldn't be trained on: {', '.join(lost)}",
                where=f"data.canaries: {ledger.source}",
                fix="change data.filters or data.max_length, or leave the canaries out",
            )


def secret(numbers: random.Random) -> str:
    """A number as canaries have it, drawn uniformly."""
    return "".join(numbers.choices("0123456789", k=DIGITS))
