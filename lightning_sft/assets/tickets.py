"""Support tickets with the queue that each belongs to: a narrow classification, for `configs/ticket_routing.yaml`."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product

QUEUES: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "billing": (
        ("invoice", "refund", "receipt", "payment"),
        (
            "The {thing} of {day} is wrong.",
            "I still wait for the {thing} of {day}.",
            "I have two of the {thing} of {day}.",
        ),
    ),
    "access": (
        ("password", "account", "login", "code"),
        (
            "My {thing} does not work since {day}.",
            "I forgot my {thing} on {day}.",
            "Since {day} the {thing} is locked.",
        ),
    ),
    "hardware": (
        ("screen", "keyboard", "printer", "battery"),
        (
            "The {thing} broke on {day}.",
            "On {day} the {thing} got hot.",
            "The {thing} makes a noise since {day}.",
        ),
    ),
    "delivery": (
        ("parcel", "courier", "letter", "box"),
        (
            "The {thing} did not come on {day}.",
            "Where is the {thing} of {day}?",
            "The {thing} went to the wrong house on {day}.",
        ),
    ),
}
"""The queues, with what their tickets are about and how they say it."""

_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
_GREETINGS = ("", "Hello. ", "Please help. ", "Good morning. ")
_HELD_OUT = 60


def tickets(seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Tickets to train on and tickets to hold out, as rows of the format Alpaca; no ticket is in both."""
    rows = [
        {
            "instruction": "Which queue?",
            "input": greeting + text.format(thing=thing, day=day),
            "output": queue,
        }
        for queue, (things, texts) in QUEUES.items()
        for greeting, thing, text, day in product(_GREETINGS, things, texts, _DAYS)
    ]
    random.Random(seed).shuffle(rows)
    return rows[_HELD_OUT:], rows[:_HELD_OUT]
