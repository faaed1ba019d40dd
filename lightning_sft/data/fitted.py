"""An example that was fitted into the context: what is kept of it, and an account of what isn't.

The law: tokens of the example + repeated = tokens kept + tokens lost; and the same for those of them that are trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from lightning_sft.example import Reason

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lightning_sft.rendering.encode import Rendering

BETWEEN = "the template's text between turns that are apart now"
"""The reason for losing what isn't written where a piece begins or ends."""

_EXCERPT = 24  # characters of each end of a text that was cut


@dataclass(frozen=True, slots=True)
class Cut:
    """Tokens of an example that are lost.

    Args:
        reason: Why, in words that are the same for all examples.
        tokens: How many.
        trained_tokens: How many fewer tokens are trained.
        what: What they are, for a person.
    """

    reason: str
    tokens: int
    trained_tokens: int
    what: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """What became of an example.

    Args:
        whole: The example as it was rendered.
        kept: What is trained on instead; nothing where it is dropped, and several pieces where it is split.
        cuts: What is lost: of a dropped example, everything, for one reason.
        repeated_tokens: Tokens that the pieces have more than the example: context that each of them repeats.
        retrained_tokens: Tokens trained that the example doesn't train: with `train_on_eot: last`, the end of
            every piece.
    """

    whole: Rendering
    kept: tuple[Rendering, ...]
    cuts: tuple[Cut, ...] = ()
    repeated_tokens: int = 0
    retrained_tokens: int = 0


def named(numbers: Sequence[int]) -> str:
    """Messages, counted from 1, as a person lists them: `messages 1-4, 7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1]:
            runs[-1][-1] = number + 1
        else:
            runs.append([number + 1, number + 1])
    listed = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"message{'s' if len(numbers) > 1 else ''} {listed}"


def trained_tokens(rendering: Rendering) -> int:
    """Tokens with a weight above 0."""
    return int(np.count_nonzero(rendering.example.weights > 0))


def accounted(whole: Rendering, kept: Sequence[Rendering], cuts: Sequence[Cut]) -> Fitted:
    """What was kept and cut, with what that has more than the whole, or less.

    Args:
        whole: The example.
        kept: What is kept of it.
        cuts: What is lost; at least one where nothing is kept.
    """
    if not kept:
        return Fitted(whole, (), (all_of(whole, cuts[0].reason),))
    tokens = sum(len(each.example) for each in kept) + sum(cut.tokens for cut in cuts) - len(whole.example)
    trained = sum(map(trained_tokens, kept)) + sum(cut.trained_tokens for cut in cuts) - trained_tokens(whole)
    if tokens < 0 or trained < 0:
        cuts = [*cuts, Cut(BETWEEN, max(0, -tokens), max(0, -trained))]
    return Fitted(whole, tuple(kept), tuple(cuts), max(0, tokens), max(0, trained))


def owners(rendering: Rendering) -> NDArray[np.int64]:
    """The message of each token; -1 for what the template itself wrote."""
    of_spans = [-1 if span.message is None else span.message for span in rendering.spans]
    return np.array(of_spans, dtype=np.int64)[rendering.span_of]


def excerpt(rendering: Rendering, start: int, end: int) -> str:
    """The text of some tokens, shortened."""
    first, last = int(rendering.offsets[start, 0]), int(rendering.offsets[end - 1, 1])
    text = rendering.text[max(0, first) : last]
    return repr(text if len(text) <= 2 * _EXCERPT else f"{text[:_EXCERPT]} … {text[-_EXCERPT:]}")


def all_of(whole: Rendering, reason: str) -> Cut:
    """The loss of a whole example."""
    return Cut(reason, len(whole.example), trained_tokens(whole))


def taken(
    whole: Rendering,
    tokens: NDArray[np.int64],
    untrained: NDArray[np.bool_] | None = None,
    because: Reason = Reason.CONTEXT,
) -> Rendering:
    """Some tokens of an example, with the weights that they have there.

    Args:
        whole: The example.
        tokens: int64 `[n]`: which of its tokens; one may come several times.
        untrained: bool `[n]`: those that aren't trained even if they are in the whole.
        because: The reason for it.
    """
    example = whole.example
    weights, reasons = example.weights[tokens], example.reasons[tokens]
    if untrained is not None:
        reasons[untrained & (weights > 0)] = because
        weights[untrained] = 0.0
    if weights[0] > 0:
        weights[0], reasons[0] = 0.0, Reason.FIRST
    part = replace(example, input_ids=example.input_ids[tokens], weights=weights, reasons=reasons)
    return replace(whole, example=part, offsets=whole.offsets[tokens], span_of=whole.span_of[tokens])


def cut_right(whole: Rendering, limit: int, reason: str) -> tuple[list[Rendering], list[Cut]]:
    """The first tokens, if any of them is trained, and what is lost."""
    kept = taken(whole, np.arange(limit))
    if not (left := trained_tokens(kept)):
        return [], [all_of(whole, f"without a trained token in the first {limit}")]
    over, lost = len(whole.example) - limit, trained_tokens(whole) - left
    return [kept], [Cut(reason, over, lost, excerpt(whole, limit, len(whole.example)))]
