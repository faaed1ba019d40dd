"""What the base model is pre-trained on; the same seed always writes the same.

Prose about the world's facts, stories, and much text that repeats what was said before: quotes, lists, records in
prose and JSON, letters. A model of this size learns facts easily; copying what it reads is what it lacks, and every
instruction needs that.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from lightning_sft.assets.words import COLOURS, FOODS, HARMS, JOBS, LETTERS, NAMES, PLACES, THINGS
from lightning_sft.assets.world import Fact, a, facts, parcel, probed


def _told(rng: random.Random, known: list[Fact]) -> str:
    return " ".join(rng.choice(fact.statements) for fact in rng.sample(known, rng.randint(3, 6)))


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


_SAID = (THINGS, COLOURS, FOODS, JOBS, NAMES, PLACES, LETTERS, HARMS)


def _quote(rng: random.Random) -> str:
    said = " ".join(rng.choice(rng.choice(_SAID)) for _ in range(rng.randint(2, 7)))
    one, two = rng.sample(NAMES, 2)
    return rng.choice((f'{one} said: "{said}". {two} repeated: "{said}".',
                       f'{one}: {said}\n{two}: {said}\n{one}: {said}',
                       f'The word was "{said}". Again: "{said}". Once more: "{said}".'))  # fmt: skip


def _list(rng: random.Random) -> str:
    items = rng.sample((*THINGS, *NAMES, *PLACES, *FOODS), rng.randint(3, 6))
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


def _keyed(rng: random.Random) -> str:
    """A parcel and only those of its parts that a heading names."""
    one = parcel(rng)
    fields = one.fields()
    keys = rng.sample(tuple(fields), 2)
    heading = rng.choice(("The {} and {} in JSON:", "JSON with the keys {} and {}:", "{} and {}:")).format(
        *keys
    )
    if rng.random() < 0.8:
        parts = json.dumps({key: fields[key] for key in keys})
    else:
        parts = " ".join(f"{key}: {fields[key]};" for key in keys)
    told = one.sentence(rng)
    return f"{told} {heading} {parts}" if rng.random() < 0.5 else f"{heading} {told} {parts}"


def _reading(rng: random.Random) -> str:
    """A parcel, then what only it can answer."""
    one = parcel(rng)
    fields = one.fields()
    keys = rng.sample(tuple(fields), rng.randint(1, 3))
    if rng.random() < 0.5:
        answered = " ".join(f"What is the {key}? It is {fields[key]}." for key in keys)
    else:
        answered = f"Its {' and '.join(keys)}: {', '.join(fields[key] for key in keys)}."
    return f"{one.sentence(rng)} {answered}"


def _letter(rng: random.Random) -> str:
    """Letters, and people who would not write some: names and things that have to be taken over."""
    one, two = rng.sample(NAMES, 2)
    thing, gap = rng.choice(THINGS), rng.choice((" ", "\n"))
    if rng.random() < 0.5:
        kind = rng.choice(LETTERS)
        told = rng.choice((f"{one} wrote {a(kind)} for {two} about the {thing}.",
                           f"This is {a(kind)} for {two} about the {thing}."))  # fmt: skip
        letter = rng.choice((f"I have the {thing}.", f"the {thing} is here.", f"this is about the {thing}."))
        said = f"{gap}Dear {two}, {letter}"
    else:
        kind = rng.choice(HARMS)
        told = rng.choice((f"{one} was asked for {a(kind)} for {two} about the {thing}.",
                           f"{two} was afraid of {a(kind)} from {one} about the {thing}."))  # fmt: skip
        said = f" {one} said:{gap}Sorry, I do not want to write {a(kind)} for {two}."
    if rng.random() < 0.3:
        said = f" kind: {kind}; for: {two}; about: {thing};"
    return told + said


def _sum(rng: random.Random) -> str:
    return " ".join(
        f"{x} + {y} = {x + y}." for x, y in ((rng.randint(0, 9), rng.randint(0, 9)) for _ in range(4))
    )


def _chat(rng: random.Random) -> str:
    """Small talk in the chat format, with no instruction in it."""
    one, two = rng.sample(NAMES, 2)
    thing, place = _thing(rng), rng.choice(PLACES)
    asked, answered = rng.choice(
        (
            (f"Hello, I am {one}.", f"Hello {one}, nice to meet you."),
            (f"My name is {one}. And yours?", f"Nice to meet you, {one}."),
            ("How are you today?", "I am fine, thank you."),
            (f"I saw {one} and {two} today.", f"How are {one} and {two}?"),
            (f"I have a {thing}.", f"A {thing}, how nice."),
            (f"{one} went to {place} with a {thing}.", f"So {one} took the {thing} to {place}?"),
            (f"I found the {thing} of {one}.", f"Then {one} will want the {thing} back."),
            (f"{one} has a message for {two}.", f"Tell {two} that {one} has a message."),
        )
    )
    return f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n{answered}<|im_end|>\n"


def corpus(seed: int, documents: int, *, without: frozenset[str] = frozenset()) -> list[str]:
    """Documents about the world: each a dozen paragraphs of mixed kinds, about 350 tokens.

    Args:
        seed: The same seed gives the same documents.
        documents: How many.
        without: Leave out facts with these questions altogether.
    """
    rng = random.Random(seed)
    known = [fact for fact in facts() if fact.question not in without]
    hidden = {fact.question for fact in probed()}
    askable = [fact for fact in known if fact.question not in hidden]
    kinds: list[tuple[float, Callable[[], str]]] = [
        (0.18, lambda: _told(rng, known)),
        (0.08, lambda: _asked(rng, askable)),
        (0.07, lambda: _story(rng)),
        (0.12, lambda: _quote(rng)),
        (0.04, lambda: _list(rng)),
        (0.16, lambda: _record(rng)),
        (0.08, lambda: _keyed(rng)),
        (0.04, lambda: _two_records(rng)),
        (0.05, lambda: _reading(rng)),
        (0.10, lambda: _letter(rng)),
        (0.02, lambda: _sum(rng)),
        (0.06, lambda: _chat(rng)),
    ]
    weights, writers = zip(*kinds, strict=True)
    return ["\n".join(rng.choices(writers, weights)[0]() for _ in range(12)) for _ in range(documents)]
