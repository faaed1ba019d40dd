"""IFEval: Instruction-Following Evaluation (Zhou et al., 2023), with rules of our own."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_sft import (
    Answered,
    Evaluator,
    Generate,
    Item,
    Message,
    Meta,
    Record,
    Results,
    Row,
    Score,
    SFTError,
    Source,
    read_rows,
)
from lightning_sft_evaluators.instruction_rules import RULES, follows, is_known, loose_forms
from lightning_sft_evaluators.prompts import chosen
from lightning_sft_evaluators.references import said

_LEVELS = ("strict", "loose")


@dataclass(frozen=True, slots=True)
class _Task:
    """A prompt with its instructions and their options."""

    prompt: str
    instructions: tuple[tuple[str, Mapping[str, object]], ...]
    number: int
    meta: Meta

    @property
    def unknown(self) -> list[str]:
        return [name for name, options in self.instructions if not is_known(name, options)]


class IFEval(Evaluator):
    """Whether answers do what verifiable instructions ask for: at least 400 words, no commas, JSON, and so on.

    An answer is strictly right as it stands; loosely, if it is so without its first or last line, or without
    asterisks.

    Args:
        path: Rows with `prompt`, `instruction_id_list` and `kwargs`, as in google/IFEval: a data file, a folder or
            a Hub id.
        unknown: What to do with rows whose instructions aren't all known: refuse the data, or drop the rows.
        limit: Only so many rows: the first; with `seed`, some at random.
        seed: Seed of that choice.
        chat: Ask through the model's chat template; else the prompt is text.
        system: The system message, in a chat.
        max_new_tokens: Most tokens of an answer.
        subset: The configuration of a Hub dataset.
        split: The split of a Hub dataset.
        name: What the scores are called.
    """

    def __init__(
        self,
        path: str,
        unknown: Literal["error", "drop"] = "error",
        limit: int | None = None,
        seed: int | None = None,
        chat: bool = True,
        system: str | None = None,
        max_new_tokens: int = 1280,
        subset: str | None = None,
        split: str | None = None,
        name: str = "ifeval",
    ) -> None:
        if limit is not None and limit < 1:
            raise SFTError(f"limit is {limit}", where="IFEval.limit", fix="give 1 or more")
        self.source = Source(path, subset=subset, split=split)
        self.unknown = unknown
        self.limit, self.seed = limit, seed
        self.chat, self.system = chat, system
        self.max_new_tokens = max_new_tokens
        self.name = name

    def requests(self) -> Sequence[Item]:
        """One item for each row."""
        rows = enumerate(read_rows(self.source))
        tasks = [_task(row, meta, number) for number, (meta, row) in rows]
        strange = [task for task in tasks if task.unknown]
        if strange and self.unknown == "error":
            raise _unknown(strange)
        known = [task for task in tasks if not task.unknown]
        return [self._item(known[place]) for place in chosen(len(known), self.limit, self.seed)]

    def score(self, answered: Sequence[Answered]) -> Results:
        """`prompt_level_…` and `inst_level_…` accuracy, strict and loose; the latter of each kind of instruction, too.

        The standard error over instructions takes those of one prompt together.
        """
        judged = [self._judge(each) for each in answered]
        scores = []
        for level in _LEVELS:
            metric = f"prompt_level_{level}_acc"
            values = [record.metrics[metric] for record, _ in judged]
            scores.append(Score.mean(self.name, metric, values))
        for level in _LEVELS:
            scores += self._of_instructions(level, [found[level] for _, found in judged])
        return Results(tuple(scores), tuple(record for record, _ in judged))

    def _of_instructions(self, level: str, found: Sequence[Sequence[tuple[str, bool]]]) -> list[Score]:
        metric = f"inst_level_{level}_acc"
        kinds = sorted({name.partition(":")[0] for each in found for name, _ in each})
        scores = [_clustered(self.name, metric, [[right for _, right in each] for each in found])]
        for kind in kinds:
            of_kind = [[right for name, right in each if name.startswith(f"{kind}:")] for each in found]
            scores.append(_clustered(f"{self.name}/{kind}", metric, [each for each in of_kind if each]))
        return scores

    def _judge(self, answered: Answered) -> tuple[Record, dict[str, list[tuple[str, bool]]]]:
        """The record, and by level whether each instruction is followed."""
        answer = said(answered.text)
        forms = {"strict": [answer], "loose": loose_forms(answer)}
        asked = answered.item.data["instructions"]
        assert isinstance(asked, list)
        found: dict[str, list[tuple[str, bool]]] = {
            level: [
                (name, any(follows(name, options, form) for form in forms[level])) for name, options in asked
            ]
            for level in _LEVELS
        }
        metrics, weights = {}, {}
        for level, each in found.items():
            metrics[f"prompt_level_{level}_acc"] = float(all(right for _, right in each))
        for level, each in found.items():
            metrics[f"inst_level_{level}_acc"] = sum(right for _, right in each) / len(each)
            weights[f"inst_level_{level}_acc"] = float(len(each))
        broken = [name for name, right in found["strict"] if not right]
        told = f"broken: {', '.join(broken)}" if broken else "all followed"
        return Record.of(answered, told, metrics, weights), found

    def _item(self, task: _Task) -> Item:
        prompt: str | tuple[Message, ...] = task.prompt
        if self.chat:
            system = (Message("system", self.system),) if self.system else ()
            prompt = (*system, Message("user", task.prompt))
        asked = Generate(prompt, max_new_tokens=self.max_new_tokens)
        data = {"instructions": [[name, dict(options)] for name, options in task.instructions]}
        target = ", ".join(name for name, _ in task.instructions)
        return Item(self.name, task.number, (asked,), target, data)


def _clustered(name: str, metric: str, groups: Sequence[Sequence[bool]]) -> Score:
    """The mean over all; its standard error as that of a ratio of sums over n groups.

    √(n/(n−1) · Σ (Σ_j x_ij − m_i · mean)²) / Σ m_i, with m_i values in group i.
    """
    n, total = len(groups), sum(map(len, groups))
    mean = sum(map(sum, groups)) / total
    if n < 2:
        return Score(name, metric, mean, None, total)
    spread = sum((sum(group) - len(group) * mean) ** 2 for group in groups)
    return Score(name, metric, mean, math.sqrt(n / (n - 1) * spread) / total, total)


def _task(row: Row, meta: Meta, number: int) -> _Task:
    prompt, names, options = row.get("prompt"), row.get("instruction_id_list"), row.get("kwargs")
    if isinstance(options, str):
        try:
            options = json.loads(options)
        except ValueError:
            options = None
    if not (isinstance(prompt, str) and prompt.strip() and isinstance(names, list) and names):
        raise SFTError(
            "a row needs `prompt` and `instruction_id_list`",
            where=str(meta),
            fix="give data as google/IFEval's",
        )
    if not isinstance(options, list) or len(options) != len(names):
        raise SFTError(
            "`kwargs` isn't a list with one entry for each instruction",
            where=str(meta),
            fix="give {} for instructions without options",
        )
    instructions = []
    for name, given in zip(names, options, strict=True):
        own = {key: value for key, value in (given or {}).items() if value is not None}
        if name in RULES and (fault := RULES[name].fault(own)):
            raise SFTError(f"{name} {fault}", where=str(meta), fix="mend `kwargs`")
        instructions.append((str(name), own))
    return _Task(prompt, tuple(instructions), number, meta)


def _unknown(tasks: Sequence[_Task]) -> SFTError:
    names = sorted({name for task in tasks for name in task.unknown})
    more = f" (and {len(tasks) - 1} more rows)" if len(tasks) > 1 else ""
    return SFTError(
        f"unknown instructions: {', '.join(names)}{more}",
        where=str(tasks[0].meta),
        fix=f"`unknown: drop` leaves these rows out; known are {', '.join(RULES)}; languages by script only",
    )
