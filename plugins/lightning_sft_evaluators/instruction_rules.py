"""Instructions whose following a program can verify: the kinds of IFEval (Zhou et al., 2023), with rules of our own.

Words are runs of letters, digits and underscores. Sentences end in `.`, `!`, `?` or `…` before white space, but for
initials and common abbreviations, and in `。`, `！` or `？`. No rule needs a language model, and none but
`language:response_language` looks at the language: that one asks for the language's script.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

Options = Mapping[str, object]

_RELATIONS = ("less than", "at least")
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]*_]*(?=\s|$)|[。！？]+[”’」』）]*")
_NO_END = re.compile(
    r"(?:^|[\s(])(?:[A-HJ-Z]|(?i:mrs?|ms|dr|prof|st|no|vs|etc|e\.g|i\.e|cf|approx|u\.s|u\.k|a\.m|p\.m))\.$"
)
_CONSTRAINED = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_SCRIPTS = {
    "ar": "ARABIC", "fa": "ARABIC", "ur": "ARABIC", "ru": "CYRILLIC", "bg": "CYRILLIC", "uk": "CYRILLIC",
    "hi": "DEVANAGARI", "mr": "DEVANAGARI", "ne": "DEVANAGARI", "bn": "BENGALI", "gu": "GUJARATI", "kn": "KANNADA",
    "ml": "MALAYALAM", "pa": "GURMUKHI", "ta": "TAMIL", "te": "TELUGU", "th": "THAI", "ko": "HANGUL", "el": "GREEK",
    "he": "HEBREW", "ka": "GEORGIAN", "hy": "ARMENIAN", "zh": "CJK",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rule:
    """One kind of instruction.

    Args:
        follows: Whether an answer that isn't blank follows it, by its options.
        needs: The options that it needs, each with its type.
    """

    follows: Callable[[str, Options], bool]
    needs: Mapping[str, type] = field(default_factory=dict)

    def fault(self, options: Options) -> str | None:
        """What is wrong with the options of one instruction; None if nothing is."""
        for name, kind in self.needs.items():
            value = options.get(name)
            if kind is int and isinstance(value, float) and value.is_integer():
                continue  # as JSON of other programs has it
            if not isinstance(value, kind) or isinstance(value, bool) or value in ("", []):
                return f"needs `{name}` ({kind.__name__}), which is {value!r}"
            if isinstance(value, list) and not all(isinstance(each, str) and each for each in value):
                return f"needs texts in `{name}`"
            if name.endswith("relation") and value not in _RELATIONS:
                return f"has `{name}` {value!r}; there are {' and '.join(map(repr, _RELATIONS))}"
        return None


def is_known(instruction: str, options: Options) -> bool:
    """Whether there is a rule for the instruction; for a language, whether it is known by its script."""
    if instruction == "language:response_language" and isinstance(options.get("language"), str):
        return options["language"] in _SCRIPTS
    return instruction in RULES


def follows(instruction: str, options: Options, answer: str) -> bool:
    """Whether the answer follows the instruction; a blank one follows none."""
    return bool(answer.strip()) and RULES[instruction].follows(answer, options)


def loose_forms(answer: str) -> list[str]:
    """The answer, and without its first line, its last one, both; each also without asterisks (Zhou et al., 2023)."""
    lines = answer.split("\n")
    forms = [answer, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*forms, *(form.replace("*", "") for form in forms)]


def sentences(text: str) -> int:
    """How many sentences there are; what follows the last end is one, too."""
    count = start = 0
    for end in _SENTENCE_END.finditer(text):
        if not _NO_END.search(text[start : end.end()]):
            count += any(map(str.isalnum, text[start : end.end()]))
            start = end.end()
    return count + any(map(str.isalnum, text[start:]))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def _number(options: Options, name: str) -> int:
    value = options[name]
    assert isinstance(value, int | float)
    return int(value)


def _text(options: Options, name: str) -> str:
    return str(options[name])


def _texts(options: Options, name: str) -> list[str]:
    value = options[name]
    assert isinstance(value, list)
    return value


def _as_asked(count: int, options: Options, relation: str, number: str) -> bool:
    """Whether there are less than, or at least, as many."""
    asked = _number(options, number)
    return count < asked if options[relation] == _RELATIONS[0] else count >= asked


def _count(text: str, phrase: str) -> int:
    return len(re.findall(re.escape(phrase), text, re.IGNORECASE))


def _counted(counter: Callable[[str], int], number: str, relation: str = "relation") -> Rule:
    return Rule(
        lambda answer, options: _as_asked(counter(answer), options, relation, number),
        {relation: str, number: int},
    )


def _has_word(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


def _parts(text: str, divider: str) -> list[str] | None:
    """What the dividers part, without blank first and last parts; None where one between is blank."""
    parts = re.split(divider, text)
    parts = parts[not parts[0].strip() :]
    parts = parts[:-1] if parts and not parts[-1].strip() else parts
    return parts if all(part.strip() for part in parts) else None


def _number_of_paragraphs(answer: str, options: Options) -> bool:
    parts = _parts(answer, r"\*\*\*")
    return parts is not None and len(parts) == _number(options, "num_paragraphs")


def _first_word(answer: str, options: Options) -> bool:
    paragraphs = answer.split("\n\n")  # blank ones don't count, but have a place, as in the paper's code
    filled, place = sum(bool(part.strip()) for part in paragraphs), _number(options, "nth_paragraph") - 1
    if filled != _number(options, "num_paragraphs") or not 0 <= place < filled:
        return False
    word = re.split(r"[.,?!'\"\s]", paragraphs[place].strip().lstrip("'\""), maxsplit=1)[0]
    return word.lower() == _text(options, "first_word").lower()


def _postscript(answer: str, options: Options) -> bool:
    marker = _text(options, "postscript_marker")
    spaced = re.sub(r"\\\.(?=\w)", r"\\.\\s?", re.escape(marker))
    return re.search(spaced, answer, re.IGNORECASE) is not None


def _bullets(answer: str, options: Options) -> bool:
    found = re.findall(r"^\s*(?:\*[^*]|-)", answer, re.MULTILINE)
    return len(found) == _number(options, "num_bullets")


def _highlights(answer: str, options: Options) -> bool:
    """Runs between asterisks and runs between two, as the paper's code counts them: `***a***` is both."""
    found = re.findall(r"\*([^\n*]*)\*", answer) + re.findall(r"\*\*([^\n*]*)\*\*", answer)
    return sum(bool(text.strip()) for text in found) >= _number(options, "num_highlights")


def _sections(answer: str, options: Options) -> bool:
    name = re.escape(_text(options, "section_spliter"))
    return len(re.findall(rf"{name}\s?\d+", answer)) >= _number(options, "num_sections")


def _is_json(answer: str, options: Options) -> bool:
    inside = re.sub(r"^```(?:json)?", "", answer.strip(), flags=re.IGNORECASE).removesuffix("```")
    try:
        json.loads(inside)
    except (ValueError, RecursionError):  # the latter of thousands of brackets
        return False
    return True


def _two_responses(answer: str, options: Options) -> bool:
    parts = _parts(answer, r"\*{6}")
    return parts is not None and len(parts) == 2 and parts[0].strip() != parts[1].strip()


def _in_script(answer: str, options: Options) -> bool:
    script = _SCRIPTS[_text(options, "language")]
    letters = [unicodedata.name(letter, "") for letter in answer if letter.isalpha()]
    return 2 * sum(name.startswith(script) for name in letters) > len(letters)


def _capital_words(text: str) -> int:
    return sum(word.isupper() for word in re.findall(r"\w+(?:['’-]\w+)*", text))


def _is_quoted(answer: str, options: Options) -> bool:
    text = answer.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


RULES: Mapping[str, Rule] = {
    "keywords:existence": Rule(
        lambda answer, options: all(_count(answer, word) for word in _texts(options, "keywords")),
        {"keywords": list},
    ),
    "keywords:frequency": Rule(
        lambda answer, options: _as_asked(
            _count(answer, _text(options, "keyword")), options, "relation", "frequency"
        ),
        {"keyword": str, "relation": str, "frequency": int},
    ),
    "keywords:forbidden_words": Rule(
        lambda answer, options: (
            not any(_has_word(answer, word) for word in _texts(options, "forbidden_words"))
        ),
        {"forbidden_words": list},
    ),
    "keywords:letter_frequency": Rule(
        lambda answer, options: _as_asked(
            answer.lower().count(_text(options, "letter").lower()), options, "let_relation", "let_frequency"
        ),
        {"letter": str, "let_relation": str, "let_frequency": int},
    ),
    "language:response_language": Rule(_in_script, {"language": str}),
    "length_constraints:number_sentences": _counted(sentences, "num_sentences"),
    "length_constraints:number_words": _counted(lambda answer: len(_words(answer)), "num_words"),
    "length_constraints:number_paragraphs": Rule(_number_of_paragraphs, {"num_paragraphs": int}),
    "length_constraints:nth_paragraph_first_word": Rule(
        _first_word, {"num_paragraphs": int, "nth_paragraph": int, "first_word": str}
    ),
    "detectable_content:number_placeholders": Rule(
        lambda answer, options: len(re.findall(r"\[.*?\]", answer)) >= _number(options, "num_placeholders"),
        {"num_placeholders": int},
    ),
    "detectable_content:postscript": Rule(_postscript, {"postscript_marker": str}),
    "detectable_format:number_bullet_lists": Rule(_bullets, {"num_bullets": int}),
    "detectable_format:constrained_response": Rule(
        lambda answer, options: any(text in answer for text in _CONSTRAINED)
    ),
    "detectable_format:number_highlighted_sections": Rule(_highlights, {"num_highlights": int}),
    "detectable_format:multiple_sections": Rule(_sections, {"section_spliter": str, "num_sections": int}),
    "detectable_format:json_format": Rule(_is_json),
    "detectable_format:title": Rule(
        lambda answer, options: re.search(r"<<[^\n]*[^\s<>][^\n]*>>", answer) is not None
    ),
    "combination:two_responses": Rule(_two_responses),
    "combination:repeat_prompt": Rule(
        lambda answer, options: (
            answer.strip().lower().startswith(_text(options, "prompt_to_repeat").strip().lower())
        ),
        {"prompt_to_repeat": str},
    ),
    "startend:start_checker": Rule(
        lambda answer, options: (
            answer.strip().lower().startswith(_text(options, "start_phrase").strip().lower())
        ),
        {"start_phrase": str},
    ),
    "startend:end_checker": Rule(
        lambda answer, options: (
            answer.strip().strip('"').lower().endswith(_text(options, "end_phrase").strip().lower())
        ),
        {"end_phrase": str},
    ),
    "startend:quotation": Rule(_is_quoted),
    "change_case:capital_word_frequency": _counted(_capital_words, "capital_frequency", "capital_relation"),
    "change_case:english_capital": Rule(lambda answer, options: answer.isupper()),
    "change_case:english_lowercase": Rule(lambda answer, options: answer.islower()),
    "punctuation:no_comma": Rule(lambda answer, options: "," not in answer),
}
"""The rules by the ids of IFEval's data, and `startend:start_checker`."""
