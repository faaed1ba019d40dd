"""From sources to examples: read, convert, render, fit into the context; every step counted in a ledger."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from typing import TYPE_CHECKING, Literal

from lightning_sft import plugins
from lightning_sft.conversation import Meta, Row
from lightning_sft.data.conversion import convert_rows, format_of
from lightning_sft.data.ledger import SourceLedger
from lightning_sft.data.sources import Source, read_rows
from lightning_sft.data.split import prompt_key
from lightning_sft.data.truncation import Overlong, fit
from lightning_sft.errors import SFTError
from lightning_sft.example import Example
from lightning_sft.rendering import Renderer
from lightning_sft.training.fingerprint import examples_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 256  # conversations that are encoded in one call


@dataclass
class Prepared:
    """The examples of some sources.

    Args:
        examples: In the order of sources and rows.
        keys: The prompt of each, normalised: what may not be on both sides of a split.
        ledgers: One account per source.
        sources: The source of each, by index.
    """

    examples: list[Example] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    ledgers: list[SourceLedger] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of every example."""
        return [len(example) for example in self.examples]

    @cached_property
    def weight_sums(self) -> list[float]:
        """Σ weights of every example."""
        return [float(example.weights.sum(dtype="float64")) for example in self.examples]

    def part(self, rows: Sequence[int]) -> Prepared:
        """Some of the examples, with the accounts of all."""
        return Prepared(
            [self.examples[row] for row in rows],
            [self.keys[row] for row in rows],
            self.ledgers,
            [self.sources[row] for row in rows],
        )

    @cached_property
    def digest(self) -> str:
        """A hash of the examples in their order: token ids and weights."""
        return examples_digest(self.examples)


def prepare(
    sources: Sequence[Source], renderer: Renderer, *, max_length: int | None, overlong: Overlong
) -> Prepared:
    """Read the sources and render their rows.

    Args:
        sources: What to read, in this order.
        renderer: Makes examples of conversations.
        max_length: Most tokens of an example; None is no limit.
        overlong: What happens to a longer one.

    Raises:
        SFTError: A source or a row is at fault; says which.
    """
    prepared = Prepared()
    for number, source in enumerate(sources):
        ledger = SourceLedger(source=source.path, format="", weight=source.weight)
        format, rows = format_of(source, _counted(read_rows(source), ledger, "rows"))
        ledger.format = description = plugins.describe(format)
        converted: set[tuple[str, int]] = set()
        conversations = convert_rows(_counted(rows, ledger, "gathered_rows"), format, description)
        while chunk := list(islice(conversations, _CHUNK)):
            ledger.conversations += len(chunk)
            converted.update(conversation.meta.place for conversation in chunk)
            for conversation, renderings in zip(chunk, renderer.explain(chunk), strict=True):
                key = prompt_key(conversation)
                for rendering in renderings:
                    fitted = fit(renderer, conversation, rendering, max_length=max_length, overlong=overlong)
                    ledger.count(fitted)
                    for kept in fitted.kept:
                        prepared.examples.append(kept.example)
                        prepared.keys.append(key)
                        prepared.sources.append(number)
        ledger.rows_without_conversation = ledger.gathered_rows - len(converted)
        ledger.check()
        prepared.ledgers.append(ledger)
    return prepared


def check_ids(prepared: Prepared, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """Refuse tokens that the model doesn't have. (A tokenizer may know some that never occur, as Gemma 3's does.)

    Raises:
        SFTError: An example holds a token id of `vocabulary` or above; names its row.
    """
    for example in prepared.examples:
        if (largest := int(example.input_ids.max())) >= vocabulary:
            ids = [each.input_ids[each.input_ids >= vocabulary].tolist() for each in prepared.examples]
            beyond = sorted({*chain.from_iterable(ids)})
            names = json.dumps(tokenizer.convert_ids_to_tokens(beyond[:8]), ensure_ascii=False)
            raise SFTError(
                f"the tokenizer makes token {largest}, the model's vocabulary has only {vocabulary}",
                where=f"model.tokenizer: {example.meta}",
                fix="use the tokenizer that the model was trained with; or, if the model is to learn these tokens, "
                f"set model.new_tokens: {names}",
            )


def _counted(
    rows: Iterator[tuple[Meta, Row]], ledger: SourceLedger, account: Literal["rows", "gathered_rows"]
) -> Iterator[tuple[Meta, Row]]:
    for item in rows:
        setattr(ledger, account, getattr(ledger, account) + 1)
        yield item
