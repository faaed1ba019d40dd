"""The preview as one self-contained page: every token with its reason on hover."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import groupby
from string import Template

from lightning_sft.preview import Shown, Token
from lightning_sft.preview_text import visible, visible_lines

_PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>lightning-sft preview</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.6 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1rem; margin: 2.5rem 0 .5rem; overflow-wrap: anywhere; }
pre { font: 14px/2 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid #8886;
  border-radius: 6px; padding: .75rem 1rem; margin: 0; unicode-bidi: plaintext; }
.t { border-bottom: 1px dotted #8888; padding: 1px 0; }
.t:hover { outline: 2px solid #48f; }
.trained { background: #2a92; border-bottom: 3px solid #2a9; }
.left-out { background: #e902; border-bottom: 5px double #c80; }
.special { font-weight: bold; border-radius: 4px; box-shadow: inset 0 0 0 1px #888; padding: 1px 2px;
  direction: ltr; unicode-bidi: isolate; }
.edge { color: #888; user-select: none; }
.warning { color: #8a5200; } .error { color: #c11; white-space: pre-wrap; overflow-wrap: anywhere; }
@media (prefers-color-scheme: dark) { .warning { color: #fb4; } .error { color: #f77; } }
</style>
</head>
<body>
<h1>lightning-sft preview</h1>
<p><span class="t trained">solid line</span> trained &nbsp; <span class="t left-out">double line</span>
left out of a message by a weight or policy &nbsp; <span class="t">dotted line</span> context &nbsp;
<span class="t special">box</span> special token &nbsp; ↵ newline &nbsp; ⇥ tab.
⟨weight … ⟩ encloses what is trained. Hover over a token for its id, weight, reason and origin.</p>
$examples
</body>
</html>
""")


def page(shown: Sequence[Shown]) -> str:
    """The page of these examples."""
    return _PAGE.substitute(examples="\n".join(_example(each) for each in shown))


def _example(each: Shown) -> str:
    lines = [f"<section>\n<h2>{escape(visible(each.title))}</h2>"]
    if each.error is not None:
        lines.append(f'<p class="error">{escape(visible_lines(each.error))}</p>')
    if each.filtered is not None:
        told = escape(visible(each.filtered))
        lines.append(f'<p class="warning">filtered, so nothing of this is trained: {told}</p>')
    lines += [f'<p class="warning">warning: {escape(visible(text))}</p>' for text in each.warnings]
    if each.tokens:
        lines.append(f"<pre>{''.join(map(_run, _runs(each.tokens)))}</pre>")
    return "\n".join([*lines, "</section>"])


def _runs(tokens: Sequence[Token]) -> list[list[Token]]:
    return [list(run) for _, run in groupby(tokens, key=lambda token: token.weight)]


def _run(tokens: Sequence[Token]) -> str:
    inner = "".join(map(_token, tokens))
    if (weight := tokens[0].weight) == 0:
        return inner
    return f'<span class="edge">⟨{weight:g} </span>{inner}<span class="edge">⟩</span>'


def _token(token: Token) -> str:
    kind = "trained" if token.weight > 0 else "" if token.reason == "context" else "left-out"
    classes = " ".join(filter(None, ("t", kind, "special" if token.special else "")))
    name = visible(f"{token.token} (id {token.id})")
    tip = f"{name}\nweight {token.weight:g}: {token.reason}\n{token.origin}"
    return f'<span class="{classes}" title="{escape(tip)}">{escape(visible(token.text))}</span>'
