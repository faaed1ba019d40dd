"""The chat templates that ship with lightning-sft, and how a template is chosen.

`plain` is the default for a tokenizer that has none; `alpaca` and `chatml` are there by name.
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_sft.errors import SFTError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT = "plain"


def names() -> list[str]:
    """The names of the shipped templates."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.jinja"))


def resolve(choice: str | None, tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template's text.

    Args:
        choice: A file, the name of a shipped template, or None for the tokenizer's own (`plain` if it has
            none).
        tokenizer: Where the model's own template is.

    Raises:
        SFTError: `choice` is neither a file nor a known name.
    """
    if choice is None:
        own = tokenizer.chat_template
        if isinstance(own, dict):
            own = own.get("default") or next(iter(own.values()))
        if own:
            return str(own)
        choice = DEFAULT
    if choice in names():
        return (Path(__file__).parent / f"{choice}.jinja").read_text(encoding="utf-8")
    path = Path(choice)
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SFTError(
                f"the chat template can't be read: {error}",
                where=f"model.chat_template: {choice}",
                fix="give a Jinja file in UTF-8",
            ) from error
    close = get_close_matches(choice, names(), n=1)
    raise SFTError(
        f"chat template {choice!r} is neither a file nor one of {', '.join(names())}",
        where="model.chat_template",
        fix=f"did you mean {close[0]!r}?" if close else "give the path of a Jinja file, or one of the names",
    )
