"""`lightning-sft preview`: what is trained of each example and why, on the same YAML as `fit`, without any weights."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_sft import command_line, plugins, without_weights
from lightning_sft.conversation import Conversation, Meta, Row, Segments
from lightning_sft.data.conversion import convert_rows, format_of
from lightning_sft.data.filtering import Dropped, Filters, Judge
from lightning_sft.data.fitted import Fitted, named
from lightning_sft.data.sources import Source, read_rows
from lightning_sft.data.truncation import Overlong, fit
from lightning_sft.errors import SFTError
from lightning_sft.example import Reason
from lightning_sft.rendering import Renderer
from lightning_sft.rendering.encode import Rendering

REASONS = {
    Reason.CONTEXT: "context",
    Reason.TRAINED: "trained",
    Reason.ZERO_WEIGHT: "not trained: weight 0",
    Reason.FIRST: "not trained: nothing before it",
    Reason.OTHER_TURN: "not trained: another turn",
    Reason.REASONING: "not trained: reasoning",
    Reason.END_OF_TURN: "not trained: end of turn",
    Reason.CUT: "not trained: turn without its beginning",
}


@dataclass(frozen=True, slots=True)
class Token:
    """A token as it is shown.

    Args:
        id: Its id.
        token: Its name in the vocabulary.
        text: The characters it stands for, without those that a token before it has shown.
        special: Whether it is an added token, such as `<|im_end|>`.
        weight: Its loss weight.
        reason: Why it is trained or not.
        origin: Whose text it is: the template's, or that of a message or segment.
    """

    id: int
    token: str
    text: str
    special: bool
    weight: float
    reason: str
    origin: str


@dataclass(frozen=True, slots=True)
class Shown:
    """An example as it is shown; one that is refused has an error and no tokens, one that is filtered the reason."""

    source: str
    row: int
    turn: int | None
    tokens: tuple[Token, ...] = ()
    warnings: tuple[str, ...] = ()
    error: str | None = None
    piece: str | None = None
    filtered: str | None = None

    @property
    def title(self) -> str:
        """Where the example comes from, and how much of it is trained."""
        place = f"{self.source}, row {self.row}" + (f", message {self.turn}" if self.turn else "")
        place += f", {self.piece}" if self.piece else ""
        if self.error is not None:
            return f"{place}: refused"
        if self.filtered is not None:
            return f"{place}: filtered"
        trained = [token.weight for token in self.tokens if token.weight > 0]
        return f"{place}: {len(self.tokens):,} tokens, {len(trained):,} trained, Σ weights {sum(trained):g}"

    def as_json(self) -> dict[str, object]:
        """The example in JSON types."""
        out: dict[str, object] = {"source": self.source, "row": self.row, "turn": self.turn}
        if self.piece is not None:
            out["piece"] = self.piece
        if self.error is not None:
            return out | {"error": self.error}
        if self.filtered is not None:
            out["filtered"] = self.filtered
        tokens = [
            {name: getattr(token, name) for name in Token.__dataclass_fields__} for token in self.tokens
        ]
        return out | {"warnings": list(self.warnings), "tokens": tokens}


def command(argv: Sequence[str]) -> None:
    """Parse the command line and show the examples.

    Raises:
        SFTError: Something that the user gave is at fault.
    """
    argv = without_weights.prepared(argv)
    try:
        config = _parser().parse_args(argv)
        rows = _row_numbers(config.rows)
        if config.examples < 1:
            raise SFTError(f"it is {config.examples}", where="--examples", fix="give at least 1")
        module, data = without_weights.instantiated(config)
        renderer, max_length = module.renderer, data.max_length or module.context_length
    except SFTError as error:
        raise command_line.in_config(error, argv) from error
    sources = data.sources[config.part]
    if not sources:
        raise SFTError(
            f"no data is given for {config.part}",
            where=f"data.{config.part}",
            fix="give a file, folder or Hub id",
        )
    filters = Filters(data.filters if config.part == "train" else ())
    shown = [
        each
        for conversation, dropped in _selected(sources, rows, config.examples, filters)
        for each in show(conversation, renderer, max_length, data.overlong, dropped)
    ]
    if config.json:
        print(json.dumps([each.as_json() for each in shown], indent=1, ensure_ascii=False))
    if config.html is not None:
        from lightning_sft.preview_html import page

        _write(Path(config.html), page(shown))
        if not config.json:
            print(f"Written: {config.html}")
    if not config.json and config.html is None:
        from lightning_sft.preview_text import print_examples

        print_examples(shown)


def show(
    conversation: Conversation | Segments | Refused,
    renderer: Renderer,
    max_length: int | None = None,
    overlong: Overlong = "drop",
    dropped: Dropped | None = None,
) -> Iterator[Shown]:
    """What becomes of a conversation: its examples, or why it is refused or filtered.

    Args:
        conversation: The conversation.
        renderer: Renders it.
        max_length: Most tokens of an example.
        overlong: What happens to a longer one; of one that is dropped, everything is shown, with a warning.
        dropped: The filter that dropped it; everything is shown then, too, and nothing of it is trained.
    """
    meta = conversation.meta
    if isinstance(conversation, Refused):
        yield Shown(meta.source, meta.row, None, error=conversation.error)
        return
    try:
        (renderings,) = renderer.explain([conversation])
    except SFTError as error:
        refusal = None if dropped else str(error)  # what is filtered needn't be rendered
        yield Shown(meta.source, meta.row, None, error=refusal, filtered=str(dropped) if dropped else None)
        return
    for rendering in renderings:
        if dropped is not None:
            tokens = [_untrained(token) for token in _tokens(conversation, renderer, rendering)]
            yield Shown(meta.source, meta.row, rendering.example.turn, tuple(tokens), filtered=str(dropped))
            continue
        try:
            fitted = fit(renderer, conversation, rendering, max_length=max_length, overlong=overlong)
        except SFTError as error:
            yield Shown(meta.source, meta.row, rendering.example.turn, error=str(error))
            continue
        losses = list(_losses(fitted, max_length or 0, overlong))
        for number, kept in enumerate(fitted.kept or (rendering,), 1):
            piece = f"piece {number} of {len(fitted.kept)}" if len(fitted.kept) > 1 else None
            if piece and kept.part:
                piece += f": {named(kept.part.messages)}"
            yield Shown(
                meta.source,
                meta.row,
                kept.example.turn,
                tuple(_tokens(conversation, renderer, kept)),
                (*kept.example.notes, *losses, *_tags_disagree(conversation, renderer, kept)),
                piece=piece,
            )


def _untrained(token: Token) -> Token:
    return replace(token, weight=0.0, reason="not trained: filtered") if token.weight > 0 else token


def _losses(fitted: Fitted, max_length: int, overlong: str) -> Iterator[str]:
    """What the policy for longer examples did to one."""
    if not fitted.cuts and len(fitted.kept) == 1:
        return
    over = len(fitted.whole.example) - max_length
    yield f"{over:,} tokens longer than max_length {max_length:,}; data.overlong: {overlong}"
    for cut in fitted.cuts:
        what = f" ({cut.what})" if cut.what else ""
        verb = "lost" if fitted.kept else "dropped, so nothing of this is trained"
        yield f"{cut.tokens:,} tokens{what} {verb}, {cut.trained_tokens:,} of them to train: {cut.reason}"
    if fitted.repeated_tokens:
        yield f"the pieces repeat {fitted.repeated_tokens:,} tokens as context"


@dataclass(frozen=True, slots=True)
class Refused:
    """A row that its format can't convert."""

    meta: Meta
    error: str


def _parser() -> Any:
    parser = without_weights.parser(
        "preview", "Show what is trained of the data's first examples, and why; loads no weights."
    )
    parser.add_argument("-n", "--examples", type=int, default=3, help="Conversations to show of each source.")
    parser.add_argument("--rows", type=str, default=None, help="Show these rows instead, such as 5,17.")
    parser.add_argument("--part", choices=["train", "val", "test"], default="train", help="Of which data.")
    parser.add_argument("--json", action="store_true", help="Print a JSON list with every token.")
    parser.add_argument("--html", type=str, default=None, help="Write a page with the reason of every token.")
    return parser


def _row_numbers(given: str | None) -> set[int] | None:
    if given is None:
        return None
    if not re.fullmatch(r"\s*[1-9]\d*(\s*,\s*[1-9]\d*)*\s*", given):
        raise SFTError(
            f"{given!r} are no row numbers", where="--rows", fix="give numbers from 1, such as 5,17"
        )
    return {int(number) for number in given.split(",")}


def _selected(
    sources: Sequence[Source], rows: set[int] | None, examples: int, filters: Filters
) -> Iterator[tuple[Conversation | Segments | Refused, Dropped | None]]:
    """The conversations of the rows asked for, or the first of each source, and which filter drops them.

    Where a filter judges whole sets, all rows before the last one asked for are looked at.
    """
    missing, last = set(rows or ()), 0
    judge = Judge(filters)
    for source in sources:
        format, read = format_of(source, read_rows(source))
        wanted, count = set(rows or ()), 0
        for meta, row in read:
            last = max(last, meta.row)
            asked = meta.row in rows if rows is not None else count < examples
            if not asked and not filters.judge_sets:
                continue
            missing.discard(meta.row)
            wanted.discard(meta.row)
            for number, conversation in enumerate(_converted(meta, row, format), 1):
                dropped = None if isinstance(conversation, Refused) else judge(conversation, number)
                if asked:
                    count += 1
                    yield conversation, dropped
            done = count >= examples if rows is None else not wanted
            if done and (source is sources[-1] or not filters.judge_sets):
                break
    if missing:
        listed = ", ".join(map(str, sorted(missing)))
        raise SFTError(f"there is no row {listed}", where="--rows", fix=f"the last row is {last}")


def _converted(meta: Meta, row: Row, format: Any) -> Iterator[Conversation | Segments | Refused]:
    try:
        yield from convert_rows([(meta, row)], format, plugins.describe(format))
    except SFTError as error:
        yield Refused(meta, str(error))


def _tokens(
    conversation: Conversation | Segments, renderer: Renderer, rendering: Rendering
) -> Iterator[Token]:
    example, text = rendering.example, rendering.text
    names = renderer.tokenizer.convert_ids_to_tokens(example.input_ids.tolist())
    added = set(renderer.tokenizer.added_tokens_decoder)
    seen = 0
    for n, (start, end) in enumerate(rendering.offsets.tolist()):
        inside = 0 <= start < len(text)
        piece = text[max(start, seen) : end] if inside else names[n]
        seen = max(seen, end)
        yield Token(
            id=int(example.input_ids[n]),
            token=names[n],
            text=piece,
            special=int(example.input_ids[n]) in added,
            weight=float(example.weights[n]),
            reason=REASONS[Reason(int(example.reasons[n]))],
            origin=_origin(conversation, rendering.spans[int(rendering.span_of[n])].message),
        )


def _origin(conversation: Conversation | Segments, number: int | None) -> str:
    if number is None:
        return "template"
    if isinstance(conversation, Segments):
        return f"segment {number + 1}"
    return f"message {number + 1} ({conversation.messages[number].role})"


def _tags_disagree(
    conversation: Conversation | Segments, renderer: Renderer, rendering: Rendering
) -> list[str]:
    """How the template's own `{% generation %}` tags differ from what is trained; nothing if they agree."""
    if isinstance(conversation, Segments) or not re.search(r"\{%-?\s*generation\b", renderer.chat_template):
        return []
    numbers = rendering.part.messages if rendering.part else ()
    template = renderer.template.with_options(conversation.chat_template_kwargs)
    tagged = template.tagged([conversation.messages[n] for n in numbers], conversation.tools)
    starts = rendering.offsets[:, 0]
    inside = [any(start <= at < end for start, end in tagged) for at in starts.tolist()]
    example = rendering.example
    pairs = list(zip(inside, (example.weights > 0).tolist(), strict=True))
    more = Counter(
        REASONS[Reason(int(example.reasons[n]))] for n, (tag, train) in enumerate(pairs) if tag and not train
    )
    fewer = [int(example.input_ids[n]) for n, (tag, train) in enumerate(pairs) if train and not tag]
    if not more and not fewer:
        return []
    why = f" ({', '.join(f'{count:,} {reason}' for reason, count in more.items())})" if more else ""
    first = f" (the first: {renderer.tokenizer.decode(fewer[:1])!r})" if fewer else ""
    return [
        f"the template's generation tags hold {more.total():,} tokens that aren't trained{why}, and leave out "
        f"{len(fewer):,} that are{first}: weights, policies and the generation prompt decide, not the tags"
    ]


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SFTError(f"the page can't be written: {error.strerror}", where=f"--html {path}") from error
