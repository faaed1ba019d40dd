"""The responses that a model has given, on disk as they come: a stopped evaluation doesn't ask them again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_sft.evaluation.requests import Answered, Conversed, Generated, Item, Likelihood, Response


class Journal:
    """One file for each process, of one line for each item: the item's key and its responses.

    The first line says of which model they are; those of another model are not read.

    Args:
        folder: Where the files are.
        model: What makes the model the one it is.
        rank: The process.
    """

    def __init__(self, folder: Path, model: Mapping[str, object], rank: int = 0) -> None:
        self.folder = folder
        self.model = dict(model)
        self.path = folder / f"responses-{rank}.jsonl"

    def known(self) -> dict[str, tuple[Response, ...]]:
        """The responses of this model so far, of all processes, by the items' keys."""
        found: dict[str, tuple[Response, ...]] = {}
        for path in sorted(self.folder.glob("responses-*.jsonl")):
            found |= _read(path, self.model)
        return found

    def write(self, answered: Iterable[tuple[int, Answered]]) -> Iterator[tuple[int, Answered]]:
        """Pass on what was answered, with each item written when it comes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = _read(self.path, self.model)
        fresh = self.path.with_suffix(".partial")  # anew: the last line may have been cut off
        with fresh.open("w", encoding="utf-8") as file:
            file.write(json.dumps({"model": self.model}) + "\n")
            file.writelines(_line(key, responses) for key, responses in kept.items())
        fresh.replace(self.path)
        with self.path.open("a", encoding="utf-8") as file:
            for number, each in answered:
                file.write(_line(each.item.key, each.responses))
                file.flush()
                yield number, each


def answered_before(items: Iterable[Item], known: Mapping[str, tuple[Response, ...]]) -> dict[int, Answered]:
    """Which items are in the journal, by their index."""
    found = {}
    for number, item in enumerate(items):
        responses = known.get(item.key)
        if responses is not None and len(responses) == len(item.requests):
            found[number] = Answered(item, responses)
    return found


def _line(key: str, responses: tuple[Response, ...]) -> str:
    return json.dumps([key, [_told(each) for each in responses]]) + "\n"


def _told(response: Response) -> list[object]:
    if isinstance(response, Likelihood):
        return [response.log_likelihood, response.tokens, response.greedy]
    if isinstance(response, Generated):
        return [response.text, response.tokens]
    return [[each.text, each.tokens] for each in response.answers]


def _response(told: list[Any]) -> Response:
    if isinstance(told[0], list):
        return Conversed(tuple(Generated(*each) for each in told))
    return Generated(*told) if isinstance(told[0], str) else Likelihood(*told)


def _read(path: Path, model: Mapping[str, object]) -> dict[str, tuple[Response, ...]]:
    """The responses in a file, up to a line that was cut off; none if they are another model's."""
    found: dict[str, tuple[Response, ...]] = {}
    if not path.is_file():
        return found
    with path.open(encoding="utf-8") as file:
        try:
            if json.loads(next(file, "null")) != {"model": model}:
                return found
            for line in file:
                key, told = json.loads(line)
                found[key] = tuple(_response(each) for each in told)
        except ValueError:
            pass
    return found
