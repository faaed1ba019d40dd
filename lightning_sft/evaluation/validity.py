"""Whether an answer keeps to the format that was asked for."""

from __future__ import annotations

import json
import re
from xml.etree import ElementTree


def is_valid_format(answer: str, asked: str) -> bool:
    """Whether an answer is valid in a format of `ANSWER_FORMATS`.

    JSON and XML have to parse, alone or as the one fenced block of the answer. Markdown has to have its fences
    closed, its tables in columns of one number, and some of its marks: a heading, a list, a table, emphasis or code.
    """
    return _VALID[asked](answer.strip())


_FENCED = re.compile(r"```(\w*)\n(.*?)\n```", re.DOTALL)


def _content(answer: str, language: str) -> str:
    blocks = [body for name, body in _FENCED.findall(answer) if name.lower() in ("", language)]
    return blocks[0] if len(blocks) == 1 else answer


def _is_json(answer: str) -> bool:
    try:
        json.loads(_content(answer, "json"), parse_constant=_no_constant)
    except (ValueError, RecursionError):  # the latter of thousands of brackets
        return False
    return True


def _no_constant(name: str) -> None:
    """NaN and Infinity, which Python reads, are no JSON."""
    raise ValueError(name)


def _is_xml(answer: str) -> bool:
    content = _content(answer, "xml")
    if "<!DOCTYPE" in content or "<!ENTITY" in content:
        return False  # entities can be made to grow without end
    try:
        ElementTree.fromstring(content)
    except ElementTree.ParseError:
        return False
    return True


def _is_markdown(answer: str) -> bool:
    lines = answer.splitlines()
    if sum(line.lstrip().startswith("```") for line in lines) % 2:
        return False
    tables = re.findall(r"(?:^\|.*\|[ \t]*(?:\n|$)){2,}", answer, re.MULTILINE)
    for table in tables:
        if len({row.strip().replace("\\|", "").count("|") for row in table.strip().splitlines()}) != 1:
            return False
    marks = r"^#{1,6} \S|^\s*[-*+] \S|^\s*\d+[.)] \S|\*\*\S.*?\*\*|`[^`\n]+`|^```"
    return bool(tables) or re.search(marks, answer, re.MULTILINE) is not None


_VALID = {"json": _is_json, "xml": _is_xml, "markdown": _is_markdown}

ANSWER_FORMATS = tuple(_VALID)
"""The formats that `is_valid_format` knows."""
