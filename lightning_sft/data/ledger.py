"""Where every row and token went: nothing is lost silently.

For each source: rows read → conversations converted → examples rendered → kept, truncated or dropped (with the reason);
and tokens rendered = trained + context + truncated + dropped.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from lightning_sft.example import Example


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
        rendered: Examples rendered: one of each conversation, or of each trained turn with `split_turns`.
        examples: Examples kept.
        tokens: Tokens rendered.
        trained_tokens: Tokens kept that are trained (weight above 0).
        context_tokens: Tokens kept that are not trained.
        truncated: What was cut off examples that were kept, by reason.
        dropped: What was dropped whole, by reason.
        notes: What is worth knowing about how examples were rendered, with their number.
    """

    source: str
    format: str
    weight: float = 1.0
    rows: int = 0
    gathered_rows: int = 0
    rows_without_conversation: int = 0
    conversations: int = 0
    rendered: int = 0
    examples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    context_tokens: int = 0
    truncated: dict[str, Loss] = field(default_factory=dict)
    dropped: dict[str, Loss] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)

    def keep(self, example: Example) -> None:
        """Count an example that goes on."""
        trained = count_trained(example)
        self.examples += 1
        self.trained_tokens += trained
        self.context_tokens += len(example) - trained

    def lose(self, account: dict[str, Loss], reason: str, tokens: int, trained: int) -> None:
        """Count tokens that are lost; `account` is `self.truncated` or `self.dropped`."""
        entry = account.setdefault(reason, Loss())
        entry.examples += 1
        entry.tokens += tokens
        entry.trained_tokens += trained

    @property
    def lost(self) -> list[Loss]:
        """All losses, truncated and dropped."""
        return [*self.truncated.values(), *self.dropped.values()]

    def check(self) -> None:
        """Assert that nothing vanished: the columns of the account add up.

        Raises:
            AssertionError: They don't, which is a bug of lightning-sft.
        """
        lost_tokens = sum(loss.tokens for loss in self.lost)
        dropped = sum(loss.examples for loss in self.dropped.values())
        if self.tokens != self.trained_tokens + self.context_tokens + lost_tokens:
            raise AssertionError(f"tokens don't add up: {self}")
        if self.rendered != self.examples + dropped or self.rendered < self.conversations:
            raise AssertionError(f"examples don't add up: {self}")

    def as_json(self) -> dict[str, object]:
        """The account in JSON types, as `ledger.json` holds it."""
        return asdict(self)


def count_trained(example: Example) -> int:
    """Tokens of the example with a weight above 0."""
    return int(np.count_nonzero(example.weights > 0))
