"""The choices of a row, and which of them its answer means."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Literal

from lightning_sft import SFTError
from lightning_sft_evaluators.questions import LETTERS

AnswerAs = Literal["auto", "index", "letter", "text"]


def checked(choices: object, n_choices: int | None) -> list[str]:
    """The choices as texts.

    Args:
        choices: What the data gives.
        n_choices: How many there have to be; None: 2 or more.

    Raises:
        SFTError: They aren't as many texts.
    """
    if not isinstance(choices, list | tuple):
        raise SFTError(
            f"the choices are {choices!r:.80}, not a list",
            where="choices",
            fix="name a column that holds a list, or give a list of templates, one for each choice",
        )
    if len(choices) < 2 or len(choices) != (n_choices or len(choices)):
        raise SFTError(
            f"the row has {len(choices)} choices, not {n_choices or '2 or more'}",
            where="choices",
            fix="mend the row, or set `n_choices` to the number that rows have, null for any",
        )
    for number, choice in enumerate(choices):
        if not str(choice) or choice is None or isinstance(choice, Mapping | list):
            raise SFTError(
                f"choice {number} is {choice!r:.80}",
                where="choices",
                fix="write a text, or remove the row",
            )
    return [str(choice) for choice in choices]


def index_of(value: object, choices: Sequence[str], answer_as: AnswerAs = "auto") -> int:
    """The index of the choice that an answer means.

    Args:
        value: The answer: an index from 0, a letter or a choice's text.
        choices: The choices.
        answer_as: Which of these it is; `auto`: whichever names a choice.

    Raises:
        SFTError: It names none, or two different ones.
    """
    text = str(value).strip()
    readings: dict[str, int] = {}
    if isinstance(value, int) and not isinstance(value, bool):
        readings["index"] = value
    elif isinstance(value, str):
        if text.isascii() and text.isdigit():
            readings["index"] = int(text)
        if len(text) == 1 and text.upper() in LETTERS:
            readings["letter"] = LETTERS.index(text.upper())
    texts = [choice.strip() for choice in choices]
    if text in texts and (isinstance(value, str) or answer_as == "text"):
        readings["text"] = texts.index(text)
    if answer_as != "auto":
        readings = {way: index for way, index in readings.items() if way == answer_as}
    fitting = {index for index in readings.values() if 0 <= index < len(choices)}
    if len(fitting) == 1:
        return fitting.pop()
    last = f"{len(choices) - 1} or {LETTERS[min(len(choices), 26) - 1]}"
    if fitting:
        raise SFTError(
            f"the answer {value!r} is {' as well as '.join(f'{w} {i}' for w, i in readings.items())}",
            where="answer",
            fix="say in `answer_as` what it is: index, letter or text",
        )
    if readings:
        raise SFTError(
            f"the answer {value!r} is out of range", where="answer", fix=f"the last choice is {last}"
        )
    raise SFTError(
        f"the answer is {value!r:.80}",
        where="answer",
        fix=f"give an index from 0, a letter, or a choice's text; the last choice is {last}",
    )


def labelled(value: object, size: int) -> list[int]:
    """The indices of the choices that are labelled 1.

    Raises:
        SFTError: The value isn't a label for each choice, or none is 1.
    """
    given = parsed(value)
    labels = given if isinstance(given, list | tuple) else []
    if len(labels) != size or any(each not in (0, 1, "0", "1") for each in labels):
        raise SFTError(
            f"the labels are {given!r:.80} for {size} choices",
            where="labels",
            fix="give 1 or 0 for each choice",
        )
    right = [index for index, each in enumerate(labels) if int(each)]
    if not right:
        raise SFTError("no choice is right", where="labels", fix="mend the row, or remove it")
    return right


def parsed(value: object) -> object:
    """The value; a list where it is the JSON text of one, as in CSV files."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value
