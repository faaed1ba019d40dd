"""The preview in the terminal: a line for every run of tokens with one weight, reason and origin."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from itertools import groupby

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_sft.preview import Shown, Token

LEGEND = "+ trained   · not trained   ⟦special token⟧   ↵ newline   ␣ space at an edge"
_STYLES = {"trained": "bold green", "context": "dim"}
_JOINERS = "\u200c\u200d"  # parts of emoji and of Persian words, not to be told apart from what they join


def print_examples(shown: Sequence[Shown], console: Console | None = None) -> None:
    """Print the examples; marks and words carry what the colours do."""
    console = console or Console(highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console.width = 160
    for each in shown:
        console.print(Text(each.title, style="bold" if each.error is None else "bold red"))
        if each.error is not None:
            console.print(Text(visible_lines(each.error), style="red"))
        if each.filtered is not None:
            console.print(
                Text(f"  filtered, so nothing of this is trained: {visible(each.filtered)}", style="yellow")
            )
        for warning in each.warnings:
            console.print(Text(f"  warning: {visible(warning)}", style="yellow"))
        if each.tokens:
            console.print(_table(each.tokens))
        console.print()
    console.print(Text(LEGEND, style="dim"))


def _table(tokens: Sequence[Token]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for width in (1, 4, 14, 7):
        table.add_column(min_width=width, no_wrap=True)
    table.add_column(overflow="fold")
    for (weight, reason, origin), run in groupby(tokens, key=lambda t: (t.weight, t.reason, t.origin)):
        style = _STYLES.get(reason, "yellow")
        mark = "+" if weight > 0 else "·"
        cells = (mark, f"{weight:.3g}", origin, reason)
        table.add_row(*(Text(cell, style=style) for cell in cells), _run(list(run), style))
    return table


def _run(tokens: Sequence[Token], style: str) -> Text:
    """The tokens' text: special tokens in brackets, spaces at the edges and all that can't be seen made visible."""
    texts = [token.text for token in tokens]
    for strip, order in ((str.lstrip, range(len(texts))), (str.rstrip, range(len(texts) - 1, -1, -1))):
        for n in order:
            core = strip(texts[n], " ")
            if marks := "" if tokens[n].special else "␣" * (len(texts[n]) - len(core)):
                texts[n] = marks + core if strip is str.lstrip else core + marks
            if core:
                break
    out = Text()
    for token, text in zip(tokens, map(visible, texts), strict=True):
        out.append(f"⟦{text}⟧" if token.special else text, f"{style} underline" if token.special else style)
    return out


def visible(text: str) -> str:
    """The text with newlines marked and characters that can't be seen written out."""
    return "".join(_visible(character) for character in text)


def visible_lines(text: str) -> str:
    """The same for a text whose newlines are our own."""
    return "\n".join(map(visible, text.splitlines()))


def _visible(character: str) -> str:
    if character == "\n":
        return "↵\n"
    if character == "\t":
        return "⇥"
    if unicodedata.category(character)[0] == "C" and character not in _JOINERS:
        return f"\\u{ord(character):04x}" if ord(character) < 0x10000 else f"\\U{ord(character):08x}"
    return character
