"""How an answer is found in what a model wrote for a BIG-Bench Hard task, with lm-evaluation-harness's definitions."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from lightning_sft_evaluators.finds import INVALID, find, first

_AFTER = re.compile(r"(?<=the answer is )(.*)(?=.)")
_AFTER_ANY = re.compile(
    "((?<=The answer is )(.*)(?=.)|(?<=the answer is )(.*)(?=.)|(?<=The answer: )(.*)(?=.)"
    "|(?<=The final answer: )(.*)(?=.))"
)
_IN_BRACKETS = re.compile(r"(\([A-Z]\))")
_OPTION = re.compile(r"\([A-Z]\)([^\n^(]*)")
_NUMBER = re.compile("([-0-9]+)")
_WORDS = {
    "boolean_expressions": r"\b(True|False)\b",
    "causal_judgement": r"\b(Yes|No|yes|no)\b",
    "navigate": r"\b(Yes|No|yes|no)\b",
    "dyck_languages": r'(?<= )([" \[\(<{}>\)\]]+)|([" \[\(<{}>\)\]]+)',
    "formal_fallacies": r"\b(valid|invalid)\b",
}
_MEANINGS = {
    "sports_understanding": {r"\b(no|not plausible)\b": "no", r"\b(yes|plausible)\b": "yes"},
    "web_of_lies": {
        r"\b(no|does not tell the truth|is not telling the truth)\b": "no",
        r"\b(yes|tells the truth|is telling the truth)\b": "yes",
    },
}
_UNITS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen""".split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_SCALES = {"hundred": 100, "thousand": 1_000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_VALUES = {word: n for n, word in enumerate(_UNITS)} | {word: 10 * n for n, word in enumerate(_TENS, 2)}
_SMALL = "zero|one|two|three|four|five"
_LARGE = "ten|eleven|twelve|fourteen|hundred|thousand|(?:m|b|tr)illion"
_STEM = "(?:twen|thir|for|fif|six|seven|nine)"
_IN_WORDS = re.compile(  # the harness's pattern, which finds no lone six, seven, eight or nine
    rf"((?:(?:{_SMALL}|{_STEM}(?:teen|ty)|eight(?:|een|y)|{_LARGE})"
    rf"(?:{_SMALL}|{_STEM}(?:|teen|ty)|eight(?:een|y)|{_LARGE}|[^\S\r\n]|,|and|&)+)?"
    rf"(?:{_SMALL}|{_STEM}(?:teen|ty)|eight(?:een|y)|{_LARGE}))"
)


def after_the_answer_is(text: str) -> str:
    """The chain of thought's answer: what follows the first "the answer is ", but for the line's last character."""
    return find(_AFTER, text, 0)


def after_an_answer_is(text: str) -> str:
    """The same after any of four such phrases."""
    return find(_AFTER_ANY, text, 0)


def answer_of(task: str, question: str, text: str, place: int) -> str:
    """The answer to a task without examples, found in free text.

    Args:
        task: The task's name: each has a way of its own.
        question: What was asked, with its options or words.
        text: What the model wrote.
        place: Which of several finds: 0 the first, -1 the last.
    """
    if task in _WORDS:
        return find(re.compile(_WORDS[task]), text, place)
    if task in _MEANINGS:
        return _meaning(_MEANINGS[task], text.lower(), place)
    if task in ("multistep_arithmetic_two", "object_counting"):
        return first(_NUMBER, text, place) or _number_in_words(text.lower(), place)
    if task == "word_sorting":
        return _in_order(question.split("List:")[1].split(), text)
    return _option(question, text, place)


def same(answer: str, target: str) -> bool:
    """Whether they are equal but for case, commas, quotes, backslashes, line ends and a final full stop."""
    return _plain(answer) == _plain(target)


def _plain(text: str) -> str:
    return re.sub(r'[,\n\\"]', "", re.sub(r"\.$", "", text)).lower()


def _meaning(meanings: dict[str, str], text: str, place: int) -> str:
    found = first(re.compile("|".join(meanings)), text, place)
    return next(
        (value for pattern, value in meanings.items() if found and re.search(pattern, found)), INVALID
    )


def _number_in_words(text: str, place: int) -> str:
    found = _IN_WORDS.findall(text)
    if not found:
        return INVALID
    total = current = 0
    for word in re.findall("[a-z]+", found[place]):
        if word == "hundred":
            current = max(current, 1) * 100
        elif word in _SCALES:
            total, current = total + max(current, 1) * _SCALES[word], 0
        else:
            current += _VALUES.get(word, 0)
    return str(total + current)


def _in_order(words: Sequence[str], text: str) -> str:
    """The question's words in the order in which each stands last in the text."""
    found = re.findall("|".join(rf"\b{word}\b" for word in words), text)
    return " ".join(reversed(dict.fromkeys(reversed(found))))


def _option(question: str, text: str, place: int) -> str:
    """The letter in brackets; else the option's text, else the letter after a colon."""
    if found := first(_IN_BRACKETS, text, place):
        return found
    options = [_bare(option.strip()) for option in _OPTION.findall(question)]
    letters = [chr(ord("A") + number) for number in range(len(options))]
    of_text = dict(zip(options, (f"({letter})" for letter in letters), strict=True))
    escaped = sorted(map(re.escape, options), key=len, reverse=True)
    if found := first(re.compile("|".join(escaped)), _bare(text), place):
        return of_text.get(found, found)
    if found := first(re.compile(rf":[\s]*({'|'.join(letters)})"), text, place):
        return f"({found})"
    return INVALID


def _bare(text: str) -> str:
    """Without case and punctuation."""
    return "".join(c for c in text.lower() if not unicodedata.category(c).startswith("P"))
