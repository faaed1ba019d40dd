"""Where every row and token went: nothing is lost silently.

For each source: rows read → conversations converted → filtered → examples rendered → kept, truncated, split or dropped
(with the reason). Conversations = those filtered + those rendered. Tokens rendered + repeated = trained + context +
lost; and of those to train, rendered + retrained = trained + lost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from lightning_sft.data.fitted import BETWEEN, Fitted, trained_tokens
from lightning_sft.errors import SFTError


@dataclass
class Loss:
    """What was lost for one reason.

    Args:
        examples: Examples dropped, or cut.
        tokens: Their lost tokens.
        trained_tokens: How many of these would have been trained.
    """

    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0


@dataclass
class Pieces:
    """What was split.

    Args:
        examples: Examples that became several pieces.
        pieces: These pieces.
        repeated_tokens: Context that pieces repeat: system messages, tools, BOS.
        retrained_tokens: Tokens trained that the examples as rendered don't train: with `train_on_eot: last`, the
            end of every piece.
    """

    examples: int = 0
    pieces: int = 0
    repeated_tokens: int = 0
    retrained_tokens: int = 0


@dataclass
class SourceLedger:
    """The account of one source.

    Args:
        source: The file, folder or Hub dataset.
        format: The format its rows were read in.
        weight: How often an epoch sees its examples.
        rows: Rows read.
        gathered_rows: What the format made of them before it converted them: as many, unless it puts rows
            together, such as the messages of a tree.
        rows_without_conversation: Gathered rows of which the format made none, on purpose.
        conversations: Conversations made of the others (a format may make several of a row).
        filtered: How many of them each filter dropped, by filter and reason; they aren't rendered.
        rendered: Examples rendered: one of each conversation kept, or of each trained turn with `split_turns`.
        examples: Examples kept, pieces of one counted each.
        tokens: Tokens rendered.
        tokens_to_train: How many of them were to be trained.
        longest: Tokens of the longest example rendered.
        trained_tokens: Tokens kept that are trained (weight above 0).
        context_tokens: Tokens kept that are not trained.
        truncated_examples: Examples kept of which some messages were cut or left out.
        truncated: What that was, by reason.
        dropped: What was dropped whole, by reason.
        split: What became several pieces.
        notes: What is worth knowing about how examples were rendered, with their number.
    """

    source: str
    format: str
    weight: float = 1.0
    rows: int = 0
    gathered_rows: int = 0
    rows_without_conversation: int = 0
    conversations: int = 0
    filtered: dict[str, dict[str, int]] = field(default_factory=dict)
    rendered: int = 0
    examples: int = 0
    tokens: int = 0
    tokens_to_train: int = 0
    longest: int = 0
    trained_tokens: int = 0
    context_tokens: int = 0
    truncated_examples: int = 0
    truncated: dict[str, Loss] = field(default_factory=dict)
    dropped: dict[str, Loss] = field(default_factory=dict)
    split: Pieces = field(default_factory=Pieces)
    notes: dict[str, int] = field(default_factory=dict)

    def count_filtered(self, filter: str, reason: str) -> None:
        """Count a conversation that a filter dropped."""
        reasons = self.filtered.setdefault(filter, {})
        reasons[reason] = reasons.get(reason, 0) + 1

    @property
    def filtered_conversations(self) -> int:
        """Conversations that filters dropped."""
        return sum(count for reasons in self.filtered.values() for count in reasons.values())

    def count(self, fitted: Fitted) -> None:
        """Count an example that was rendered, and what became of it."""
        example = fitted.whole.example
        self.rendered += 1
        self.tokens += len(example)
        self.tokens_to_train += trained_tokens(fitted.whole)
        self.longest = max(self.longest, len(example))
        for note in example.notes:
            self.notes[note] = self.notes.get(note, 0) + 1
        for kept in fitted.kept:
            trained = trained_tokens(kept)
            self.examples += 1
            self.trained_tokens += trained
            self.context_tokens += len(kept.example) - trained
        if len(fitted.kept) > 1:
            self.split.examples += 1
            self.split.pieces += len(fitted.kept)
        self.split.repeated_tokens += fitted.repeated_tokens
        self.split.retrained_tokens += fitted.retrained_tokens
        self.truncated_examples += bool(fitted.kept) and any(cut.reason != BETWEEN for cut in fitted.cuts)
        account = self.truncated if fitted.kept else self.dropped
        for reason in dict.fromkeys(cut.reason for cut in fitted.cuts):
            entry = account.setdefault(reason, Loss())
            entry.examples += 1
            entry.tokens += sum(cut.tokens for cut in fitted.cuts if cut.reason == reason)
            entry.trained_tokens += sum(cut.trained_tokens for cut in fitted.cuts if cut.reason == reason)

    @property
    def lost(self) -> list[Loss]:
        """All losses, truncated and dropped."""
        return [loss for _, loss in self.by_reason]

    @property
    def by_reason(self) -> list[tuple[str, Loss]]:
        """All losses with their reasons."""
        return [*self.truncated.items(), *self.dropped.items()]

    def check(self) -> None:
        """Assert that nothing vanished: the columns of the account add up.

        Raises:
            AssertionError: They don't, which is a bug of lightning-sft.
        """
        kept = self.trained_tokens + self.context_tokens
        if self.tokens + self.split.repeated_tokens != kept + sum(loss.tokens for loss in self.lost):
            raise AssertionError(f"tokens don't add up: {self}")
        lost = sum(loss.trained_tokens for loss in self.lost)
        if self.tokens_to_train + self.split.retrained_tokens != self.trained_tokens + lost:
            raise AssertionError(f"tokens to train don't add up: {self}")
        dropped = sum(loss.examples for loss in self.dropped.values())
        made = self.rendered - self.split.examples + self.split.pieces
        if (
            made != self.examples + dropped
            or self.rendered < self.conversations - self.filtered_conversations
        ):
            raise AssertionError(f"examples don't add up: {self}")
        if self.gathered_rows - self.rows_without_conversation > self.conversations:
            raise AssertionError(f"rows don't add up: {self}")

    def as_json(self) -> dict[str, object]:
        """The account in JSON types, as `ledger.json` holds it."""
        return asdict(self)


def check_losses(
    ledgers: Sequence[SourceLedger],
    max_lost_fraction: float,
    *,
    max_length: int | None = None,
    context: int | None = None,
    overlong: str = "drop",
) -> None:
    """Refuse to go on when too much of what should be trained was lost.

    Args:
        ledgers: The accounts of all sources.
        max_lost_fraction: Most of the tokens to train that may be lost.
        max_length: Most tokens of an example, for the remedy.
        context: The model's context, likewise.
        overlong: What happened to longer examples, likewise.

    Raises:
        SFTError: More than `max_lost_fraction` of the tokens to train was lost, or nothing is left.
    """
    lost = [(reason, loss) for ledger in ledgers for reason, loss in ledger.by_reason if loss.trained_tokens]
    where = ", ".join(ledger.source for ledger in ledgers if ledger.lost or not ledger.examples)
    filters = {
        f"filtered by {filter} ({reason})"
        for ledger in ledgers
        for filter, filtered in ledger.filtered.items()
        for reason in filtered
    }
    reasons = ", ".join(sorted({reason for reason, _ in lost}))
    fixes = _remedies(max((ledger.longest for ledger in ledgers), default=0), max_length, context, overlong)
    if not any(ledger.examples for ledger in ledgers):
        if filters:
            fixes = ["change data.filters", *(fixes if reasons else [])]
        reasons = ", or ".join([*sorted(filters), *([reasons] if reasons else [])])
        raise SFTError(
            "nothing is left to train on" + (f": every example was {reasons}" if reasons else ""),
            where=where,
            fix="; or ".join(fixes) if reasons else "give data with at least one row",
        )
    lost_tokens = sum(loss.trained_tokens for _, loss in lost)
    whole = sum(ledger.trained_tokens for ledger in ledgers) + lost_tokens
    if (fraction := lost_tokens / whole) > max_lost_fraction:
        accepted = math.ceil(fraction * 1000) / 1000
        raise SFTError(
            f"{fraction:.1%} of the tokens to train ({lost_tokens:,} of {whole:,}, in "
            f"{sum(loss.examples for _, loss in lost):,} examples: {reasons}) would be lost, more than "
            f"data.max_lost_fraction {max_lost_fraction:.1%}",
            where=where,
            fix="; or ".join([*fixes, f"accept it with data.max_lost_fraction: {accepted:g}"]),
        )


def _remedies(longest: int, max_length: int | None, context: int | None, overlong: str) -> list[str]:
    """What loses less, the most useful first."""
    fixes = []
    if context is None or longest <= context:
        fixes.append(f"raise data.max_length to {longest}, the longest example")
    elif max_length is not None and max_length < context:
        fixes.append(f"raise data.max_length, up to the model's context of {context}")
    if overlong != "split":
        fixes.append("set data.overlong: split, which loses only what doesn't fit into any piece")
    if overlong == "drop":
        fixes.append("set data.overlong: truncate_right, which keeps the beginning of each example")
    return fixes or ["use a model with a longer context, or shorter rows"]
