"""Few-shot prompts as lm-evaluation-harness writes them: as text, as chat turns, or as one chat turn."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_sft import Message


@dataclass(frozen=True, slots=True)
class FewShot:
    """How prompts are written.

    Args:
        description: What comes first; in a chat the system message.
        shots: Questions with their answers.
        delimiter: Between a question and its answer, where both are in one text.
        chat: Prompts are messages for the model's chat template.
        turns: In a chat, each shot is a turn of the user and one of the assistant; else all is one turn.
        separator: After each shot, where all is one text.
    """

    description: str
    shots: Sequence[tuple[str, str]]
    delimiter: str = " "
    chat: bool = False
    turns: bool = True
    separator: str = "\n\n"

    def prompt(self, question: str) -> str | tuple[Message, ...]:
        """The prompt that ends in this question."""
        if self.chat and self.turns:
            said = [
                Message(role, text)
                for shot in self.shots
                for role, text in zip(("user", "assistant"), shot, strict=True)
            ]
            return (*self._system(), *said, Message("user", question))
        shots = (f"{asked}{self.delimiter}{answer}{self.separator}" for asked, answer in self.shots)
        text = "".join(shots) + question
        return (*self._system(), Message("user", text)) if self.chat else self.description + text

    def _system(self) -> tuple[Message, ...]:
        return (Message("system", self.description),) if self.description else ()


def chosen(size: int, limit: int | None, seed: int | None) -> list[int]:
    """Which of `size` items are asked, in their order: the first `limit` ones; with a seed, as many at random."""
    if limit is None or limit >= size:
        return list(range(size))
    if seed is None:
        return list(range(limit))
    return sorted(random.Random(f"{seed}:{size}").sample(range(size), limit))


def shares(sizes: Sequence[int], total: int) -> list[int]:
    """`total` divided in proportion to the sizes, none more than it has (largest remainders)."""
    total = min(total, sum(sizes))
    exact = [total * size / sum(sizes) for size in sizes]
    parts = [int(share) for share in exact]
    by_rest = sorted(range(len(sizes)), key=lambda i: (parts[i] - exact[i], i))
    for index in by_rest[: total - sum(parts)]:
        parts[index] += 1
    return parts
