"""From sources to examples: read, convert, filter, render, fit into the context; every step counted in a ledger.

Where a filter judges whole sets, a source is read twice: once for the verdicts, which are given in order, and once for
the examples of what is kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import compress, islice, repeat, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_sft import plugins
from lightning_sft.bases import DataFormat, Filter
from lightning_sft.conversation import Meta, Row
from lightning_sft.data import accounts, cache
from lightning_sft.data.conversion import convert_rows, format_of
from lightning_sft.data.filtering import Dropped, Filters, Judge, Looks, numbered
from lightning_sft.data.ledger import SourceLedger
from lightning_sft.data.sources import Source, read_rows
from lightning_sft.data.split import prompt_key
from lightning_sft.data.store import Block, ExampleStore, Writer
from lightning_sft.data.truncation import Overlong, fit
from lightning_sft.data.workers import in_order
from lightning_sft.errors import SFTError
from lightning_sft.rendering import Renderer

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

_CHUNK = 64  # rows that are converted, rendered and encoded at once
_ALONE = 32  # chunks before other processes are started

Rows = list[tuple[Meta, Row]]
Kept = np.ndarray[Any, np.dtype[np.bool_]]  # which conversations of some rows are kept
Chunk = tuple[Rows, Kept | None]
Made = tuple[Block, SourceLedger, list[Dropped | None]]
Make = Callable[[DataFormat, str, Chunk], Made]


@dataclass
class Prepared:
    """The examples of some sources.

    Args:
        examples: In the order of sources and rows.
        ledgers: One account per source.
        from_cache: They were prepared by an earlier run.
    """

    examples: ExampleStore
    ledgers: list[SourceLedger]
    from_cache: bool = False

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of every example."""
        return self.examples.column("length").astype(np.int64)

    @cached_property
    def weight_sums(self) -> NDArray[np.float64]:
        """Σ weights of every example."""
        return self.examples.column("weight")

    @cached_property
    def sources(self) -> NDArray[np.int32]:
        """The source of every example, by index."""
        return self.examples.column("source")

    @cached_property
    def keys(self) -> NDArray[np.uint64]:
        """A hash of the prompt of every example, normalised: what may not be on both sides of a split."""
        return self.examples.column("key")

    @property
    def trained_tokens(self) -> int:
        """Tokens with a weight above 0."""
        return int(self.examples.column("trained").sum(dtype=np.int64))

    def part(self, rows: Sequence[int] | NDArray[np.int64]) -> Prepared:
        """Some of the examples, with the accounts of all."""
        return Prepared(self.examples.part(rows), self.ledgers, self.from_cache)

    @cached_property
    def digest(self) -> str:
        """A hash of the examples in their order: token ids and weights."""
        return self.examples.digest


def prepare(
    sources: Sequence[Source],
    renderer: Renderer,
    *,
    max_length: int | None,
    overlong: Overlong,
    filters: Sequence[Filter] = (),
    cache_folder: Path | None = None,
    workers: int = 0,
) -> Prepared:
    """Read the sources and render their rows, or find what an earlier run made of the same ones.

    Args:
        sources: What to read, in this order.
        renderer: Makes examples of conversations.
        max_length: Most tokens of an example; None is no limit.
        overlong: What happens to a longer one.
        filters: What conversations have to pass, in this order; all sources are one set.
        cache_folder: Where results are kept; None keeps them for this process alone.
        workers: Processes that share the work if there is much of it.

    Raises:
        SFTError: A source or a row is at fault; says which.
    """
    options: dict[str, Any] = {"max_length": max_length, "overlong": overlong}
    chain = Filters(filters)

    def fill(folder: Path) -> None:
        judge = Judge(chain)
        with Writer(folder) as writer:
            ledgers = []
            for number, source in enumerate(sources):
                ledger = SourceLedger(source=source.path, format="", weight=source.weight)
                kept = _judge(source, chain, judge, ledger, writer, workers) if chain.judge_sets else None
                make = partial(_make, number, renderer, options, chain)
                _write(source, make, kept, ledger, writer, workers)
                ledgers.append(ledger)
            writer.finish([ledger.as_json() for ledger in ledgers])

    facts = {**options, "filters": list(filters)}
    examples, from_cache = cache.examples(cache_folder, sources, renderer, facts, fill)
    ledgers = [accounts.from_json(SourceLedger, account) for account in examples.accounts]
    for ledger, source in zip(ledgers, sources, strict=True):
        ledger.weight = source.weight  # changes nothing of what is kept
    return Prepared(examples, ledgers, from_cache)


def _judge(
    source: Source, filters: Filters, judge: Judge, ledger: SourceLedger, writer: Writer, workers: int
) -> list[Kept]:
    """Which conversations of each chunk of a source are kept; the others are written and counted."""
    format, rows = format_of(source, read_rows(source))
    look = partial(_look, format, plugins.describe(format), filters)
    kept = []
    for looked in in_order(look, _chunks(rows), workers, alone=_ALONE):
        verdicts = [judge.decide(*each) for each in looked]
        _note(verdicts, ledger, writer)
        kept.append(_kept(verdicts))
    return kept


def _look(
    format: DataFormat, description: str, filters: Filters, rows: Rows
) -> list[tuple[Meta, int, Looks]]:
    """What the filters make of each conversation of some rows."""
    conversations = numbered(convert_rows(rows, format, description))
    return [(each.meta, number, filters.look(each)) for number, each in conversations]


def _write(
    source: Source,
    make: Make,
    kept: Sequence[Kept] | None,
    ledger: SourceLedger,
    writer: Writer,
    workers: int,
) -> None:
    """Write the examples of a source, and account for them in its ledger.

    Args:
        source: The source.
        make: Makes the examples of a chunk.
        kept: Which conversations of each chunk are kept; None: no filter judges whole sets.
        ledger: The source's account.
        writer: Writes them.
        workers: Processes.
    """
    format, rows = format_of(source, _counted(read_rows(source), ledger))
    ledger.format = plugins.describe(format)
    chunks = _with_verdicts(_chunks(rows), kept, source.path)
    for block, account, verdicts in in_order(
        partial(make, format, ledger.format), chunks, workers, alone=_ALONE
    ):
        writer.append(block)
        accounts.add(ledger, account)
        _note(verdicts, ledger, writer)
    ledger.check()


def _make(
    number: int,
    renderer: Renderer,
    options: dict[str, Any],
    filters: Filters,
    format: DataFormat,
    description: str,
    chunk: Chunk,
) -> Made:
    """The examples of some rows of source `number`, their account, and the verdicts if they weren't given before."""
    rows, kept = chunk
    ledger = SourceLedger(source="", format="", gathered_rows=len(rows))
    conversations = list(convert_rows(rows, format, description))
    ledger.conversations = len(conversations)
    ledger.rows_without_conversation = len(rows) - len({each.meta.place for each in conversations})
    verdicts: list[Dropped | None] = []
    if kept is None:
        judge = Judge(filters)
        verdicts = [judge(each, number) for number, each in numbered(conversations)]
        kept = _kept(verdicts)
    if len(kept) != len(conversations):
        raise cache.changed(str(rows[0][0]))
    conversations = list(compress(conversations, kept))
    examples, prompts = [], []
    for conversation, renderings in zip(conversations, renderer.explain(conversations), strict=True):
        prompt = prompt_key(conversation)
        for rendering in renderings:
            fitted = fit(renderer, conversation, rendering, **options)
            ledger.count(fitted)
            for piece in fitted.kept:
                examples.append(piece.example)
                prompts.append(prompt)
    return Block.of(examples, prompts, number), ledger, verdicts


def _kept(verdicts: Sequence[Dropped | None]) -> Kept:
    return np.array([verdict is None for verdict in verdicts], dtype=np.bool_)


def _note(verdicts: Sequence[Dropped | None], ledger: SourceLedger, writer: Writer) -> None:
    """Count and list what was dropped."""
    for dropped in verdicts:
        if dropped is not None:
            ledger.count_filtered(dropped.filter, str(dropped.verdict.reason))
            writer.append_filtered(dropped.line)


def _with_verdicts(chunks: Iterator[Rows], kept: Sequence[Kept] | None, where: str) -> Iterator[Chunk]:
    for rows, mask in zip(chunks, repeat(None)) if kept is None else zip_longest(chunks, kept):
        if rows is None or (mask is None and kept is not None):
            raise cache.changed(where)
        yield rows, mask


def _chunks(rows: Iterator[tuple[Meta, Row]]) -> Iterator[Rows]:
    return iter(lambda: list(islice(rows, _CHUNK)), [])


def check_ids(prepared: Prepared, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """Refuse tokens that the model doesn't have. (A tokenizer may know some that never occur, as Gemma 3's does.)

    Raises:
        SFTError: An example holds a token id of `vocabulary` or above; names its row.
    """
    largest = prepared.examples.column("largest")
    if (above := largest >= vocabulary).any():
        first = int(np.argmax(above))
        made = [prepared.examples[row].input_ids for row in np.flatnonzero(above).tolist()]
        beyond = sorted({*np.concatenate([ids[ids >= vocabulary] for ids in made]).tolist()})
        names = json.dumps(tokenizer.convert_ids_to_tokens(beyond[:8]), ensure_ascii=False)
        raise SFTError(
            f"the tokenizer makes token {largest[first]}, the model's vocabulary has only {vocabulary}",
            where=f"model.tokenizer: {prepared.examples[first].meta}",
            fix="use the tokenizer that the model was trained with; or, if the model is to learn these tokens, "
            f"set model.new_tokens: {names}",
        )


def _counted(rows: Iterator[tuple[Meta, Row]], ledger: SourceLedger) -> Iterator[tuple[Meta, Row]]:
    for item in rows:
        ledger.rows += 1
        yield item
