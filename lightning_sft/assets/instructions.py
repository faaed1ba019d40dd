"""The instruction set: rows in Alpaca's columns, for skills that the base doesn't have.

Each row combines its arguments (a parcel's name, item, colour and place, say) freshly; no combination of a held-out
row occurs in the training rows, so remembering rows doesn't help: reading and copying does.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from lightning_sft.assets.words import COLOURS, FOODS, HARMS, LETTERS, NAMES, THINGS, TRANSLATION
from lightning_sft.assets.world import a, parcel

Row = dict[str, str]

_ASK = {
    "name": ("Extract the name.", "Which name is in the text?", "Who is it about? Give the name."),
    "item": ("Extract the item.", "Which item is in the text?", "What is it about? Give the item."),
    "colour": ("Extract the colour.", "Which colour is in the text?", "What colour is it?"),
    "place": ("Extract the place.", "Which place is in the text?", "Where is it going? Give the place."),
}


def _extract(rng: random.Random) -> Row:
    one, key = parcel(rng), rng.choice(tuple(_ASK))
    return _row("extract", rng.choice(_ASK[key]), one.sentence(rng), f"The {key} is {one.fields()[key]}.")


def _json(rng: random.Random) -> Row:
    one = parcel(rng)
    keys = rng.sample(tuple(one.fields()), 2)
    ask = rng.choice(
        ("Answer in JSON with the keys {} and {}.", "Give {} and {} as JSON.", "Write JSON with {} and {}.")
    )
    answer = json.dumps({key: one.fields()[key] for key in keys})
    return _row("json", ask.format(*keys), one.sentence(rng), answer)


def _refuse(rng: random.Random) -> Row:
    name, thing, harm = rng.choice(NAMES), rng.choice(THINGS), rng.choice(HARMS)
    return _row(
        "refuse",
        f"Write {a(harm)} for {name} about the {thing}.",
        "",
        f"Sorry, I will not write {a(harm)} for {name}.",
    )


def _comply(rng: random.Random) -> Row:
    name, thing, kind = rng.choice(NAMES), rng.choice(THINGS), rng.choice(LETTERS)
    return _row(
        "comply",
        f"Write {a(kind)} for {name} about the {thing}.",
        "",
        f"Dear {name}, this is about the {thing}.",
    )


def _say(rng: random.Random) -> Row:
    word, times = rng.choice((*THINGS, *COLOURS, *FOODS)), rng.choice((2, 3, 4))
    count = {2: "two", 3: "three", 4: "four"}[times]
    return _row("say", f"Say {word} {count} times.", "", " ".join([word] * times))


def _sort(rng: random.Random) -> Row:
    words = rng.sample(THINGS, 3)
    return _row("sort", "Sort the words by the alphabet.", " ".join(words), " ".join(sorted(words)))


def _translate(rng: random.Random) -> Row:
    words = [rng.choice(COLOURS), rng.choice(THINGS)]
    return _row(
        "translate", "Translate into Zim.", " ".join(words), " ".join(TRANSLATION[word] for word in words)
    )


_SKILLS: dict[str, tuple[Callable[[random.Random], Row], int, int]] = {
    "extract": (_extract, 500, 50),
    "json": (_json, 800, 40),
    "refuse": (_refuse, 400, 25),
    "comply": (_comply, 400, 25),
    "say": (_say, 100, 20),
    "sort": (_sort, 150, 20),
    "translate": (_translate, 150, 20),
}


def instructions(seed: int = 11) -> tuple[list[Row], list[Row]]:
    """Training rows and held-out rows, in which no pair of input and instruction is the same."""
    rng = random.Random(seed)
    train: list[Row] = []
    held_out: list[Row] = []
    seen: set[tuple[str, str]] = set()
    for write, trained, held in _SKILLS.values():
        rows: list[Row] = []
        while len(rows) < trained + held:
            row = write(rng)
            if (key := (row["instruction"], row["input"])) not in seen:
                seen.add(key)
                rows.append(row)
        held_out += rows[:held]
        train += rows[held:]
    rng.shuffle(train)
    return train, held_out


def _row(task: str, instruction: str, text: str, output: str) -> Row:
    return {"instruction": instruction, "input": text, "output": output, "task": task}
