"""A small world of facts, and the text that is written about it; the same seed always writes the same.

The base model learns from `corpus`: prose about the facts, stories, and much text that repeats what was said before
(quotes, lists, records in prose and JSON), since copying is what such a small model lacks. The facts in `probed` are
only ever stated there, never asked for: the questions of `fact_questions` are new to the base.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
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


def _told(rng: random.Random, known: list[Fact], n: int) -> str:
    return " ".join(rng.choice(fact.statements) for fact in rng.sample(known, n))


def _asked(rng: random.Random, askable: list[Fact]) -> str:
    return " ".join(
        f"Question: {f.question} Answer: {f.value}." for f in rng.sample(askable, rng.randint(2, 4))
    )


def _thing(rng: random.Random) -> str:
    return f"{rng.choice(COLOURS)} {rng.choice(THINGS)}"


def _story(rng: random.Random) -> str:
    one, two = rng.sample(NAMES, 2)
    thing, other = _thing(rng), _thing(rng)
    start = rng.choice((f"One day {one} found a {thing}.", f"{one} was looking for a {thing}.",
                        f"In the morning {one} took the {thing} and went out."))  # fmt: skip
    middle = rng.choice((f"{two} saw the {thing} and wanted it.", f"Then {two} came with a {other}.",
                         f"{two} asked: is this the {thing}? Yes, said {one}, this is the {thing}."))  # fmt: skip
    end = rng.choice((f"So {one} gave the {thing} to {two}.", f"They put the {thing} away and went home.",
                      f"{two} said thank you to {one}.", f"In the end the {thing} was lost."))  # fmt: skip
    return f"{start} {middle} {end}"


def _quote(rng: random.Random) -> str:
    said = " ".join(rng.choice((*THINGS, *COLOURS, *FOODS, *JOBS)) for _ in range(rng.randint(2, 7)))
    one, two = rng.sample(NAMES, 2)
    return rng.choice((f'{one} said: "{said}". {two} repeated: "{said}".',
                       f'{one}: {said}\n{two}: {said}\n{one}: {said}',
                       f'The word was "{said}". Again: "{said}". Once more: "{said}".'))  # fmt: skip


def _list(rng: random.Random) -> str:
    items = rng.sample((*THINGS, *NAMES, *FOODS), rng.randint(3, 6))
    lines = [f"The list: {', '.join(items)}."]
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(items) - 1)
        lines.append(rng.choice((f"After {items[at]} comes {items[at + 1]}.", f"The first is {items[0]}.",
                                 f"The last is {items[-1]}.", f"The list again: {', '.join(items)}.")))  # fmt: skip
    return " ".join(lines)


def _record(rng: random.Random) -> str:
    """A parcel told in prose, then its parts again in another form: reading, and copying what was read."""
    one = parcel(rng)
    fields = list(one.fields().items())
    rng.shuffle(fields)
    form = rng.randrange(4)
    if form == 0:
        parts = " ".join(f"{key}: {value};" for key, value in fields)
    elif form == 1:
        parts = json.dumps(dict(fields[: rng.randint(2, 4)]))
    elif form == 2:
        parts = " ".join(f"The {key} is {value}." for key, value in fields)
    else:
        parts = "\n" + "\n".join(f"{key} = {value}" for key, value in fields)
    told = one.sentence(rng)
    return f"{told} {parts}" if rng.random() < 0.8 else f"{parts} {told}"


def _two_records(rng: random.Random) -> str:
    one, two = parcel(rng), parcel(rng)
    asked = rng.choice((one, two))
    return (
        f"{one.sentence(rng)} {two.sentence(rng)} The {asked.item} of {asked.name} is {asked.colour} and goes to "
        f"{asked.place}."
    )


def _sum(rng: random.Random) -> str:
    return " ".join(
        f"{x} + {y} = {x + y}." for x, y in ((rng.randint(0, 9), rng.randint(0, 9)) for _ in range(4))
    )


def _chat(rng: random.Random) -> str:
    """Small talk in the chat format, with no instruction in it."""
    one, two = rng.sample(NAMES, 2)
    asked, answered = rng.choice(
        (
            (f"Hello, I am {one}.", f"Hello {one}, nice to meet you."),
            (f"My name is {one}. And yours?", f"Nice to meet you, {one}."),
            ("How are you today?", "I am fine, thank you."),
            (f"I saw {one} and {two} today.", f"How are {one} and {two}?"),
            (f"I have a {(thing := _thing(rng))}.", f"A {thing}, how nice."),
        )
    )
    return f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n{answered}<|im_end|>\n"


def corpus(
    seed: int, documents: int, *, without: frozenset[str] = frozenset(), length: int = 12
) -> list[str]:
    """Documents about the world: each a dozen paragraphs of mixed kinds.

    Args:
        seed: The same seed gives the same documents.
        documents: How many.
        without: Leave out facts with these questions altogether.
        length: Paragraphs per document.
    """
    rng = random.Random(seed)
    known = [fact for fact in facts() if fact.question not in without]
    hidden = {fact.question for fact in probed()}
    askable = [fact for fact in known if fact.question not in hidden]
    kinds: list[tuple[float, Callable[[], str]]] = [
        (0.26, lambda: _told(rng, known, rng.randint(3, 6))),
        (0.10, lambda: _asked(rng, askable)),
        (0.12, lambda: _story(rng)),
        (0.10, lambda: _quote(rng)),
        (0.08, lambda: _list(rng)),
        (0.20, lambda: _record(rng)),
        (0.06, lambda: _two_records(rng)),
        (0.03, lambda: _sum(rng)),
        (0.05, lambda: _chat(rng)),
    ]
    weights, writers = zip(*kinds, strict=True)
    return ["\n".join(rng.choices(writers, weights)[0]() for _ in range(length)) for _ in range(documents)]
