"""Whose fault an exception is: which plug-in's code it came out of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from traceback import format_exception
from types import TracebackType

from lightning_sft.plugins import Plugin, plugin_of


@dataclass(frozen=True, slots=True)
class Blame:
    """The plug-in that an exception came out of.

    Args:
        plugin: The plug-in.
        error: The exception.
        traceback: The exception's traceback from the plug-in's first frame on.
    """

    plugin: Plugin
    error: BaseException
    traceback: TracebackType

    def __str__(self) -> str:
        """One line that names the plug-in and the exception."""
        return f"{type(self.error).__name__} in the {self.plugin}: {self.error}"

    @property
    def in_constructor(self) -> bool:
        """Whether the plug-in was being made."""
        return self.traceback.tb_frame.f_code.co_name == "__init__"

    @property
    def told(self) -> str:
        """The traceback as text."""
        return "".join(format_exception(type(self.error), self.error, self.traceback))


def blame(error: BaseException) -> Blame | None:
    """The plug-in in whose methods the exception was raised, or in what they called; None if in none's.

    Of several that called each other it is the last one.
    """
    frames = list(_frames(error.__traceback__))
    known: dict[type, Plugin | None] = {}
    for frame in reversed(frames):
        plugin = _owner(frame, known)
        if plugin is not None:
            first = next(each for each in frames if _owner(each, known) == plugin)
            return Blame(plugin, error, first)
    return None


def _frames(traceback: TracebackType | None) -> Iterator[TracebackType]:
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next


def _owner(traceback: TracebackType, known: dict[type, Plugin | None]) -> Plugin | None:
    """The plug-in that a frame's `self` is an instance of."""
    code = traceback.tb_frame.f_code
    if not code.co_argcount or code.co_varnames[0] != "self":
        return None
    for cls in type(traceback.tb_frame.f_locals.get("self")).__mro__[:-1]:
        if cls not in known:
            known[cls] = plugin_of(cls)
        if known[cls] is not None:
            return known[cls]
    return None
