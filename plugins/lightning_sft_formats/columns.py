"""Columns: anything else, with a template over the row's columns for each turn."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_sft import Conversation, DataFormat, Message, Meta, Row, RowTemplate, Segments, SFTError
from lightning_sft_formats.fields import read_filled


class Columns(DataFormat):
    """Rows of any columns, of which Jinja templates make the turns.

    A template names columns as `{{ question }}`, and those whose name is no Jinja name as
    `{{ row["the question"] }}`. Null becomes nothing, lists and objects need a filter (`tojson`, `join`). The
    templates run in a sandbox.

    Args:
        assistant: The template of the response to learn.
        user: The template of the user's turn. Without it the response is trained as a text of its own, without
            a chat template.
        system: The template of the system prompt; left out where it gives nothing.
        task: The template of the task's name.
        language: The template of the language's code.
    """

    def __init__(
        self,
        assistant: str,
        user: str | None = None,
        system: str | None = None,
        task: str | None = None,
        language: str | None = None,
    ) -> None:
        if user is None and system is not None:
            raise SFTError("a system prompt needs a user's turn", where="system", fix="give `user` as well")
        self.templates = {
            name: RowTemplate(text, name)
            for name, text in (
                ("assistant", assistant),
                ("user", user),
                ("system", system),
                ("task", task),
                ("language", language),
            )
            if text is not None
        }

    def matches(self, columns: frozenset[str]) -> bool:
        """False: which columns are meant is what the templates say, so this format has to be named."""
        return False

    def convert(self, row: Row) -> Iterable[Conversation | Segments]:
        """One conversation of at most three turns, or one text."""
        texts = {name: template.render(row) for name, template in self.templates.items()}
        meta = Meta(task=texts.get("task") or None, language=texts.get("language") or None)
        answer = read_filled(texts["assistant"], "assistant")
        if "user" not in texts:
            return [Segments(((answer, 1.0),), meta)]
        messages = [
            Message("user", read_filled(texts["user"], "user", "user's turn")),
            Message("assistant", answer),
        ]
        if texts.get("system", "").strip():
            messages.insert(0, Message("system", texts["system"]))
        return [Conversation(tuple(messages), meta=meta)]
