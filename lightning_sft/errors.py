"""The one exception that users see: what was wrong, where, and what to do."""

from __future__ import annotations


class SFTError(Exception):
    """A mistake in the user's input; the command prints it as one message and exits with 2.

    Args:
        what: What was wrong, as one sentence.
        where: Where it was found: a file, a row, a key, a plug-in.
        fix: What to do about it.
    """

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(what, where, fix)

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n  → {self.fix}" if self.fix else text

    def at(self, where: str) -> SFTError:
        """The same error, placed: `where` goes in front of a place that is already known."""
        place = f"{where}, {self.where}" if self.where else where
        return type(self)(self.what, where=place, fix=self.fix)
