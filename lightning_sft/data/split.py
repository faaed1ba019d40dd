"""A validation split without leakage: rows with the same prompt are all trained on or all held out."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_sft.conversation import Conversation, Segments
from lightning_sft.errors import SFTError


def prompt_key(conversation: Conversation | Segments) -> str:
    """What makes two conversations the same question: the text before the first answer.

    Of a conversation, the roles and contents before the first assistant message that follows a user's; of
    segments, the leading text of weight 0. Where that is nothing, everything. Case and the amount of
    whitespace don't count.
    """
    if isinstance(conversation, Segments):
        return _segments_key(conversation)
    messages = conversation.messages
    asked = next((n for n, m in enumerate(messages) if m.role == "user"), len(messages))
    answered = (n for n, m in enumerate(messages) if m.role == "assistant" and n > asked)
    prompt = messages[: next(answered, len(messages))]
    return "\n".join(f"{m.role}: {_normal(m.content)}" for m in prompt)


def _segments_key(segments: Segments) -> str:
    prompt = []
    for text, weight in segments.segments:
        if weight:
            break
        prompt.append(text)
    return _normal("".join(prompt)) or _normal("".join(text for text, _ in segments.segments))


def _normal(text: str) -> str:
    return " ".join(text.split()).casefold()


def split_indices(
    keys: ArrayLike, *, validation: float | int, seed: int, kept: NDArray[np.bool_] | None = None
) -> tuple[list[int], list[int]]:
    """The rows to train on and the rows to hold out, in ascending order; rows with one key stay together.

    Which keys are held out depends on the keys, their counts and the seed, not on the order of the rows.

    Args:
        keys: The prompt key of each row, or a hash of it.
        validation: How many rows to hold out: a fraction between 0 and 1, or a number of rows (a whole 50.0
            is 50 rows). Where whole groups don't give that number, a near one.
        seed: Which rows to hold out.
        kept: Rows that are trained on whatever is held out; they don't count.

    Raises:
        SFTError: The size is neither, or one side would have no rows.
    """
    free = np.arange(np.size(keys)) if kept is None else np.flatnonzero(~kept)
    each = np.asarray(keys)[free]
    target = _target(len(each), validation)
    values, group_of, counts = np.unique(each, return_inverse=True, return_counts=True)
    if len(values) < 2:
        raise SFTError(
            "all rows have the same prompt, so none can be held out without leaking",
            where="data.val_split",
            fix="give validation data of its own, or more rows",
        )
    hashes = [hashlib.sha256(f"{seed}\n{value}".encode()).digest() for value in values.tolist()]
    order = sorted(range(len(values)), key=hashes.__getitem__)
    sizes = counts.tolist()
    chosen = np.zeros(len(values), dtype=bool)
    missing = target
    for group in order:
        if sizes[group] <= missing:
            chosen[group] = True
            missing -= sizes[group]
    left = [group for group in order if not chosen[group]]
    smallest = min(left, key=sizes.__getitem__)
    overshoot = sizes[smallest] - missing
    if not chosen.any() or (overshoot < missing and len(left) > 1):
        chosen[smallest] = True
    held_out = np.zeros(np.shape(keys), dtype=bool)
    held_out[free] = chosen[group_of]
    return np.flatnonzero(~held_out).tolist(), np.flatnonzero(held_out).tolist()


def _target(rows: int, validation: float | int) -> int:
    if 0 < validation < 1:
        target = round(validation * rows)
    elif validation >= 1 and float(validation).is_integer():
        target = int(validation)
    else:
        raise SFTError(
            f"{validation!r} is neither a fraction between 0 and 1 nor a number of rows",
            where="data.val_split",
            fix="write 0.1 for a tenth of the rows or 100 for a hundred rows",
        )
    if not 0 < target < rows:
        side = "training" if target else "validation"
        raise SFTError(
            f"{validation:g} of {rows} rows leaves none for {side}",
            where="data.val_split",
            fix="ask for another size, or give more rows",
        )
    return target


def shared_prompts(train_keys: ArrayLike, val_keys: ArrayLike) -> int:
    """How many validation rows have a prompt that is also trained on: 0 where nothing leaks."""
    return int(np.isin(val_keys, train_keys).sum())
