"""The questions that a judge's models are asked, and answers to them in files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lightning_sft import Row, SFTError, Source, read_rows

_QUESTION = ("instruction", "prompt", "question")
_ANSWER = ("output", "answer", "generated")


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked.

    Args:
        turns: The user's messages.
        category: What kind of question it is; empty where the data doesn't say.
        references: Reference answers to the turns, as far as there are any.
        human: What humans found of the answers: a preference, or a rating for each turn.
        number: Its place in the data, from 0.
        where: Its place, for errors.
    """

    turns: tuple[str, ...]
    category: str
    references: tuple[str, ...]
    human: object
    number: int
    where: str


def read_questions(path: str) -> list[Question]:
    """The questions of a data file: `instruction` (or `prompt`, `question`) or `turns`, and what else there is.

    Raises:
        SFTError: A row has no question; says which.
    """
    found = []
    for number, (meta, row) in enumerate(read_rows(Source(path))):
        turns = row.get("turns") or _first(row, _QUESTION)
        turns = [turns] if isinstance(turns, str) else turns
        if not (isinstance(turns, list) and turns and all(isinstance(t, str) and t.strip() for t in turns)):
            raise SFTError(
                "the row has no question",
                where=str(meta),
                fix="give `instruction`, or `turns`: a list of texts",
            )
        references = row.get("reference") or []
        references = [references] if isinstance(references, str) else references
        if not isinstance(references, list) or not all(isinstance(each, str) for each in references):
            raise SFTError("`reference` is no text or list of texts", where=str(meta), fix="mend the row")
        category = str(row.get("category") or "")
        found.append(Question(tuple(turns), category, tuple(references), row.get("human"), number, str(meta)))
    return found


def read_answers(path: str, questions: Sequence[Question]) -> list[str]:
    """Answers to the questions, from rows of `instruction` and `output`, or from records of an evaluation.

    Raises:
        SFTError: A question has none; says which.
    """
    answers: dict[object, str] = {}
    for meta, row in read_rows(Source(path)):
        answer, asked = _first(row, _ANSWER), _first(row, _QUESTION)
        if not isinstance(answer, str) or (asked is None and "number" not in row):
            raise SFTError(
                "the row has no answer to a question",
                where=str(meta),
                fix="give `instruction` and `output`, or the records of an evaluation (`number`, `generated`)",
            )
        answers[row["number"] if asked is None else asked] = answer
    found = []
    for question in questions:
        answer = answers.get(question.turns[0], answers.get(question.number))
        if answer is None:
            raise SFTError(
                f"there is no answer to {question.turns[0][:60]!r} ({question.where})",
                where=path,
                fix="add it, or leave the question out",
            )
        found.append(answer)
    return found


def read_template(given: str | None, packaged: str) -> Template:
    """The prompt of a judge: the given file, or one of this package.

    Raises:
        SFTError: It isn't there, or is no Jinja template.
    """
    path = Path(given).expanduser() if given else Path(__file__).parent / packaged
    try:
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
        return environment.from_string(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, TemplateError) as error:
        raise SFTError(
            f"the prompt can't be read: {error}",
            where=str(path),
            fix=f"give a Jinja file; the packaged one is {packaged}",
        ) from error


def render(template: Template, **values: object) -> str:
    """The prompt with its values.

    Raises:
        SFTError: The template needs another value, or fails.
    """
    try:
        return template.render(**values)
    except TemplateError as error:
        names = ", ".join(values)
        raise SFTError(
            f"the judge's prompt fails: {error}", where="Judge.prompt", fix=f"it has {names}"
        ) from error


def _first(row: Row, names: Sequence[str]) -> object:
    return next((row[name] for name in names if row.get(name) is not None), None)
