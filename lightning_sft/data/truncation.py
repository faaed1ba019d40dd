"""What becomes of an example that is longer than `max_length`: `data.overlong`.

- `drop`: it is left out.
- `truncate_right`: its first `max_length` tokens are kept.
- `truncate_left`: its last tokens are kept, behind what stands before the first message that is no system message:
  BOS, system messages, tools. The last trained turn has to fit in whole, with the generation prompt before it; a
  turn whose beginning is cut off is context.
- `drop_oldest_turns`: exchanges (a user's message with all that follows up to the next one) are left out, the oldest
  first and as few as will do. The rest is rendered anew, as inference would see it. System messages and tools stay.
- `split`: it becomes several examples. Conversations are split between exchanges, each piece with the system messages
  and tools, and every trained message is trained in one piece; an exchange that is too long by itself is cut at the
  right. Text as it stands is split into windows, each after the first beginning with BOS, if there is one, and
  the token before it, so that every token has something to be predicted from.

Text as it stands has no turns: `drop_oldest_turns` cuts it at the left, as `truncate_left` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from lightning_sft.conversation import Conversation, Segments
from lightning_sft.data.exchanges import SYSTEM_ROLES, Exchanges
from lightning_sft.data.fitted import (
    Cut,
    Fitted,
    accounted,
    all_of,
    cut_right,
    excerpt,
    owners,
    taken,
    trained_tokens,
)
from lightning_sft.errors import SFTError
from lightning_sft.example import Reason
from lightning_sft.rendering.layout import common_length
from lightning_sft.rendering.template import as_chat_message

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lightning_sft.rendering import Renderer
    from lightning_sft.rendering.encode import Rendering

Overlong = Literal["drop", "truncate_right", "truncate_left", "drop_oldest_turns", "split"]


def longest(max_length: int | None, context: int | None) -> int | None:
    """Most tokens of an example, of what is asked for and the model's context; None is no limit.

    Raises:
        SFTError: `max_length` is below 2, or above the context.
    """
    if max_length is None:
        return context
    if max_length < 2:
        raise SFTError(f"max_length is {max_length}", where="data.max_length", fix="give at least 2")
    if context is not None and max_length > context:
        raise SFTError(
            f"max_length {max_length} is more than the model's context of {context}",
            where="data.max_length",
            fix=f"give at most {context}, or leave it out",
        )
    return max_length


def fit(
    renderer: Renderer,
    conversation: Conversation | Segments,
    rendering: Rendering,
    *,
    max_length: int | None,
    overlong: Overlong,
) -> Fitted:
    """What becomes of an example, with its losses.

    Args:
        renderer: Made the example.
        conversation: What it was made of.
        rendering: The example.
        max_length: Most tokens that it may have, at least 2; None is no limit.
        overlong: What happens if it has more.

    Raises:
        SFTError: The chat template refuses what is left of the conversation.
    """
    if max_length is None or len(rendering.example) <= max_length:
        return Fitted(rendering, (rendering,))
    too_long = f"longer than max_length {max_length}"
    if overlong == "drop":
        return accounted(rendering, [], [all_of(rendering, too_long)])
    if overlong == "truncate_right":
        return accounted(rendering, *cut_right(rendering, max_length, too_long))
    if isinstance(conversation, Segments):
        bos = renderer.tokenizer.bos_token_id
        head = int(bos is not None and int(rendering.example.input_ids[0]) == bos)
        if overlong == "split":
            return _windows(rendering, max_length, head)
        return _cut_left(rendering, max_length, head)
    if overlong == "truncate_left":
        return _cut_left_of_last_turn(renderer, conversation, rendering, max_length)
    exchanges = Exchanges(renderer, conversation, rendering, max_length)
    if not exchanges.groups:
        return accounted(rendering, [], [all_of(rendering, too_long)])
    return exchanges.without_oldest() if overlong == "drop_oldest_turns" else exchanges.split()


def _cut_left(whole: Rendering, limit: int, head: int, beheaded: NDArray[np.bool_] | None = None) -> Fitted:
    """The first `head` tokens and the last ones; of the whole's tokens, `beheaded` are context now."""
    size = len(whole.example)
    tokens = np.concatenate([np.arange(head), np.arange(size - limit + head, size)])
    kept = taken(whole, tokens, None if beheaded is None else beheaded[tokens], Reason.CUT)
    if not (left := trained_tokens(kept)):
        return accounted(whole, [], [all_of(whole, f"without a trained token in the last {limit}")])
    what = excerpt(whole, head, size - limit + head)
    cut = Cut(f"longer than max_length {limit}", size - limit, trained_tokens(whole) - left, what)
    return accounted(whole, [kept], [cut])


def _cut_left_of_last_turn(
    renderer: Renderer, conversation: Conversation, whole: Rendering, limit: int
) -> Fitted:
    size, owner = len(whole.example), owners(whole)
    head = _head(renderer, conversation, whole)
    last = int(np.flatnonzero(whole.example.weights > 0)[-1])
    if head + size - _turn_start(owner, last, head) > limit:
        reason = f"without room for the last trained turn in max_length {limit}"
        return accounted(whole, [], [all_of(whole, reason)])
    first = size - limit + head
    spoken = first + int(np.flatnonzero(owner[first:] >= 0)[0])
    prompt_is_cut = _turn_start(owner, spoken, head) < first
    return _cut_left(whole, limit, head, (owner == owner[spoken]) & prompt_is_cut)


def _turn_start(owner: NDArray[np.int64], token: int, head: int) -> int:
    """Where the message of this token begins, with the template's text before it: the generation prompt."""
    start = int(np.flatnonzero(owner == owner[token])[0])
    while start > head and owner[start - 1] < 0:
        start -= 1
    return start


def _head(renderer: Renderer, conversation: Conversation, whole: Rendering) -> int:
    """The number of tokens before the first message that is no system message: BOS, system messages and tools."""
    systems = []
    for number in whole.part.messages if whole.part else ():
        if conversation.messages[number].role not in SYSTEM_ROLES:
            break
        systems.append(number)
    try:
        alone = renderer.template.render(
            [as_chat_message(conversation.messages[number]) for number in systems], conversation.tools
        )
    except SFTError:  # the template takes no system message by itself, or writes it into the first user's
        alone = ""
    others = [span.start for span in whole.spans if span.message is not None and span.message not in systems]
    first = min(others, default=len(whole.text))
    written = [span.end for span in whole.spans if span.message in systems and span.end <= first]
    end = max([common_length(alone, whole.text), *written])
    bos = renderer.tokenizer.bos_token_id
    behind = np.flatnonzero(whole.offsets[:, 1] > end)
    return max(int(behind[0]), int(bos is not None and int(whole.example.input_ids[0]) == bos))


def _windows(whole: Rendering, limit: int, head: int) -> Fitted:
    """Consecutive tokens, each window after the first behind BOS (`head` tokens) and the token before it."""
    size, kept, cuts, at = len(whole.example), [], [], 0
    while at < size:
        before = [*range(head), at - 1][: limit - 1] if at else []
        end = min(size, at + limit - len(before))
        tokens = np.concatenate([np.array(before, dtype=np.int64), np.arange(at, end)])
        window = taken(whole, tokens, np.arange(len(tokens)) < len(before))
        if trained_tokens(window):
            kept.append(window)
        else:
            cuts.append(Cut("a window without a trained token", end - at, 0, excerpt(whole, at, end)))
        at = end
    return accounted(whole, kept, cuts)
