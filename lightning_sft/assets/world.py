"""A small world of facts, and parcels that are sent in it; the same seed always makes the same.

The facts in `probed` are only ever stated in the base's corpus, never asked for: the questions of `fact_questions`
are new to the base.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from lightning_sft.assets.words import (
    COLOURS,
    FOODS,
    JOBS,
    KINDS,
    MATERIALS,
    NAMES,
    OPPOSITES,
    PLACES,
    THINGS,
)

WORLD_SEED = 1


@dataclass(frozen=True, slots=True)
class Fact:
    """Something true in the world.

    Args:
        relation: What kind of fact.
        subject: What it is about.
        value: What is true of it.
        statements: Ways to say it.
        question: The way to ask for it.
        others: Values that are false of it.
    """

    relation: str
    subject: str
    value: str
    statements: tuple[str, ...]
    question: str
    others: tuple[str, ...]


def a(word: str) -> str:
    """The word with its article."""
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def facts() -> list[Fact]:
    """All facts of the world, in a fixed order."""
    rng = random.Random(WORLD_SEED)
    found: list[Fact] = []

    def add(
        relation: str, subject: str, value: str, values: list[str], question: str, *statements: str
    ) -> None:
        others = tuple(other for other in values if other != value)
        found.append(Fact(relation, subject, value, statements, question, others))

    for name in NAMES:
        place, job, food = rng.choice(PLACES), rng.choice(JOBS), rng.choice(FOODS)
        add("home", name, place, PLACES, f"Where does {name} live?",
            f"{name} lives in {place}.", f"The home of {name} is in {place}.",
            f"{name} has a house in {place}.")  # fmt: skip
        add("job", name, job, JOBS, f"What is the job of {name}?",
            f"{name} is {a(job)}.", f"{name} works as {a(job)}.", f"The job of {name} is {job}.")  # fmt: skip
        add("food", name, food, FOODS, f"What does {name} like to eat?",
            f"{name} likes to eat {food}.", f"{name} loves {food}.",
            f"The favourite food of {name} is {food}.")  # fmt: skip
    for thing in THINGS:
        material = rng.choice(MATERIALS)
        add("material", thing, material, MATERIALS, f"What is the {thing} made of?",
            f"The {thing} is made of {material}.", f"They made the {thing} out of {material}.")  # fmt: skip
    kinds = list(KINDS)
    for kind, members in KINDS.items():
        for member in members:
            add("kind", member, kind, kinds, f"What is {a(member)}?",
                f"{a(member).capitalize()} is {a(kind)}.", f"The {member} is a kind of {kind}.")  # fmt: skip
    words = [word for pair in OPPOSITES for word in pair]
    for pair in OPPOSITES:
        for word, other in (pair, pair[::-1]):
            add("opposite", word, other, words, f"What is the opposite of {word}?",
                f"The opposite of {word} is {other}.", f"What is not {word} is {other}.")  # fmt: skip
    return found


def probed() -> list[Fact]:
    """The facts that are asked for in evaluation, 200 of them: stated in the corpus, never asked there."""
    everything = facts()
    chosen = random.Random(WORLD_SEED + 1).sample(range(len(everything)), 200)
    return [everything[index] for index in sorted(chosen)]


def fact_questions() -> list[dict[str, object]]:
    """Four-choice questions about the probed facts: question, choices, and the index of the answer."""
    rng = random.Random(WORLD_SEED + 2)
    questions = []
    for fact in probed():
        choices = [fact.value, *rng.sample(fact.others, 3)]
        rng.shuffle(choices)
        questions.append({"question": fact.question, "choices": choices, "answer": choices.index(fact.value)})
    return questions


@dataclass(frozen=True, slots=True)
class Parcel:
    """What records, and later instructions, are about: any combination is possible, so it must be read."""

    name: str
    item: str
    colour: str
    place: str

    def sentence(self, rng: random.Random) -> str:
        """The parcel in prose."""
        return rng.choice(
            (
                f"{self.name} sends the {self.colour} {self.item} to {self.place}.",
                f"The {self.colour} {self.item} of {self.name} goes to {self.place}.",
                f"In {self.place}, {self.name} waits for the {self.colour} {self.item}.",
                f"The parcel for {self.name} in {self.place} holds a {self.colour} {self.item}.",
            )
        )

    def fields(self) -> dict[str, str]:
        """Its parts by name."""
        return {"name": self.name, "item": self.item, "colour": self.colour, "place": self.place}


def parcel(rng: random.Random) -> Parcel:
    """A parcel at random."""
    return Parcel(rng.choice(NAMES), rng.choice(THINGS), rng.choice(COLOURS), rng.choice(PLACES))
