"""Conversations with a text, or without one."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lightning_sft import Conversation, Filter, Segments, SFTError, Verdict, turns
from lightning_sft_filters.parts import excerpt

_ROLES = ("system", "developer", "user", "assistant", "tool")


class Pattern(Filter):
    """Drops conversations in which a regular expression is found, or one that has to be there isn't.

    How long a search takes is up to the expression: nested repetitions such as `(a+)+` can take for ever.

    Args:
        drop: Regular expressions (Python's) of which none may be found in any message.
        require: Regular expressions each of which has to be found in some message.
        roles: In whose messages to look. Of text as it stands, what is trained is the assistant's.
        ignore_case: Whether `a` also finds `A`.
    """

    def __init__(
        self,
        drop: list[str] | None = None,
        require: list[str] | None = None,
        roles: list[str] | None = None,
        ignore_case: bool = False,
    ) -> None:
        flags = re.IGNORECASE if ignore_case else 0
        self.drop = [_compiled(each, "drop", flags) for each in drop or ()]
        self.require = [_compiled(each, "require", flags) for each in require or ()]
        self.roles = ["assistant"] if roles is None else roles
        unknown = sorted({*self.roles} - {*_ROLES})
        if unknown or not self.roles:
            raise SFTError(
                f"{unknown[0]!r} is no role" if unknown else "roles is empty",
                where="data.filters (Pattern)",
                fix=f"choose of {', '.join(_ROLES)}",
            )

    def judge(self, conversation: Conversation | Segments) -> Verdict:
        """Drops it with the expression as the reason, and what was found as the detail."""
        texts = [text for role, text in turns(conversation) if role in self.roles]
        for pattern in self.drop:
            if found := _found(pattern, texts):
                return Verdict(f"{pattern.pattern!r} is in it", detail=excerpt([found.group()]))
        for pattern in self.require:
            if not _found(pattern, texts):
                return Verdict(f"{pattern.pattern!r} isn't in it")
        return Verdict()


def _found(pattern: re.Pattern[str], texts: Sequence[str]) -> re.Match[str] | None:
    return next(filter(None, map(pattern.search, texts)), None)


def _compiled(pattern: str, option: str, flags: int) -> re.Pattern[str]:
    try:
        return re.compile(pattern, flags)
    except re.error as error:
        place = "" if error.pos is None else f" at character {error.pos + 1}"
        raise SFTError(
            f"{pattern!r} is no regular expression: {error.msg}{place}",
            where=f"data.filters (Pattern): {option}",
            fix=r"write characters such as ( [ * ? . as they stand with a backslash: \(",
        ) from error
