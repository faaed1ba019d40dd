"""BIG-Bench Hard (Suzgun et al., 2022), as lm-evaluation-harness asks it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_sft import (
    Answered,
    Evaluator,
    Generate,
    Item,
    Record,
    Results,
    Score,
    SFTError,
    Source,
    read_rows,
    scores_by_task,
)
from lightning_sft_evaluators import bbh_answers
from lightning_sft_evaluators.prompts import FewShot, chosen

TASKS = """boolean_expressions causal_judgement date_understanding disambiguation_qa dyck_languages formal_fallacies
    geometric_shapes hyperbaton logical_deduction_five_objects logical_deduction_seven_objects
    logical_deduction_three_objects movie_recommendation multistep_arithmetic_two navigate object_counting
    penguins_in_a_table reasoning_about_colored_objects ruin_names salient_translation_error_detection snarks
    sports_understanding temporal_sequences tracking_shuffled_objects_five_objects
    tracking_shuffled_objects_seven_objects tracking_shuffled_objects_three_objects web_of_lies word_sorting""".split()
"""The 27 tasks; those that differ in the number of objects only are one of 23 groups."""

_GET_BBH = (
    "get it from https://github.com/suzgunmirac/BIG-Bench-Hard, and give the folder of cot-prompts/ and bbh/"
)
_STEPS = "Let's think step by step."
_STOPS = ("</s>", "Q", "\n\n")
_ZERO_SHOT_STOPS = ("</s>", "Q:", "<|im_end|>")


@dataclass(frozen=True, slots=True)
class _Task:
    """One task: its description, its examples as (question, thoughts, answer), and its items."""

    name: str
    description: str
    shots: tuple[tuple[str, str, str], ...]
    items: tuple[tuple[str, str], ...]


class BBH(Evaluator):
    """27 hard tasks of BIG-Bench, answered in free text and compared to the letter.

    Args:
        path: A folder with `cot-prompts/<task>.txt` and `bbh/<task>.json` (or `tasks/<task>.json`).
        shots: Examples before each question: 0 to 3.
        cot: Ask for a chain of thought; the examples then have theirs.
        tasks: Only these; all 27 by default.
        limit: Only so many questions of each task: the first; with `seed`, some at random.
        seed: Seed of that choice.
        chat: Ask through the model's chat template, the description as the system message.
        turns: In a chat, each example is a turn of its own; else all is one turn.
        max_new_tokens: Most tokens of an answer; by default 1024 for few-shot chains of thought, else 256.
    """

    def __init__(
        self,
        path: str,
        shots: int = 3,
        cot: bool = True,
        tasks: list[str] | None = None,
        limit: int | None = None,
        seed: int | None = None,
        chat: bool = False,
        turns: bool = True,
        max_new_tokens: int | None = None,
    ) -> None:
        if not 0 <= shots <= 3:
            raise SFTError(
                f"shots is {shots}", where="BBH.shots", fix="give 0 to 3: there are three examples"
            )
        if limit is not None and limit < 1:
            raise SFTError(f"limit is {limit}", where="BBH.limit", fix="give 1 or more")
        if unknown := set(tasks or ()) - set(TASKS):
            raise SFTError(
                f"no task is named {min(unknown)!r}", where="BBH.tasks", fix=f"the tasks: {', '.join(TASKS)}"
            )
        self.path = Path(path).expanduser()
        self.shots = shots
        self.cot = cot
        self.tasks = tasks or TASKS
        self.limit, self.seed = limit, seed
        self.chat, self.turns = chat, turns
        self.max_new_tokens = max_new_tokens or (1024 if cot and shots else 256)

    def requests(self) -> Sequence[Item]:
        """One item for each question, task after task."""
        stops = _STOPS if self.shots else _ZERO_SHOT_STOPS
        items = []
        for task in map(self._read, self.tasks):
            writer = FewShot(
                task.description,
                [(self._asked(asked), self._answer(*rest)) for asked, *rest in task.shots[: self.shots]],
                "" if self.cot else " ",
                self.chat,
                self.turns,
            )
            for number in chosen(len(task.items), self.limit, self.seed):
                asked, target = task.items[number]
                request = Generate(writer.prompt(self._asked(asked)), stops, self.max_new_tokens)
                items.append(Item(task.name, number, (request,), target, {"question": asked}, text=asked))
        return items

    def score(self, answered: Sequence[Answered]) -> Results:
        """`exact_match` over all questions, the 23 groups and the 27 tasks; without examples `strict_match`, too."""
        records = tuple(self._judge(each) for each in answered)
        scores: list[Score] = []
        for metric in records[0].metrics if records else ():
            scores += scores_by_task(records, metric, "bbh", _groups)
        return Results(tuple(scores), records)

    def judge(self, task: str, question: str, text: str, target: str) -> tuple[str, dict[str, float]]:
        """The answer found in the text, and whether it is right by each metric."""
        if self.shots:
            answer = bbh_answers.after_the_answer_is(text) if self.cot else text
            return answer, {"exact_match": float(answer == target)}
        answer = bbh_answers.answer_of(task, question, text, -1 if self.cot else 0)
        strict = bbh_answers.after_an_answer_is(text) if self.cot else text
        return answer, {
            "exact_match": float(bbh_answers.same(answer, target)),
            "strict_match": float(bbh_answers.same(strict, target)),
        }

    def _judge(self, answered: Answered) -> Record:
        item = answered.item
        answer, metrics = self.judge(item.task, str(item.data["question"]), answered.text, item.target)
        return Record.of(answered, answer, metrics)

    def _asked(self, question: str) -> str:
        if not self.cot:
            return f"Q: {question}\nA:"
        return f"Q: {question}\nA: {_STEPS}" + ("\n" if self.shots else "")

    def _answer(self, thoughts: str, answer: str) -> str:
        return thoughts if self.cot else answer

    def _read(self, task: str) -> _Task:
        text = self._existing(self.path / "cot-prompts" / f"{task}.txt").read_text(encoding="utf-8")
        description, *examples = re.split(
            r"\n\n(?=Q: )", text.partition("-----\n")[2].strip() or text.strip()
        )
        shots = []
        for example in examples:
            asked, found, thoughts = example.partition(f"\nA: {_STEPS}")
            answer = re.search(r"the answer is (.*)\.$", thoughts, re.DOTALL)
            if not found or answer is None:
                raise SFTError(
                    f"the example {asked[:60]!r} has no answer",
                    where=str(self.path / "cot-prompts" / f"{task}.txt"),
                    fix=_GET_BBH,
                )
            shots.append((asked.removeprefix("Q: "), thoughts.lstrip(), answer.group(1)))
        if len(shots) < self.shots:
            raise SFTError(
                f"only {len(shots)} examples", where=str(self.path / "cot-prompts" / f"{task}.txt")
            )
        return _Task(task, f"{description}\n\n", tuple(shots), tuple(self._items(task)))

    def _items(self, task: str) -> list[tuple[str, str]]:
        folder = self.path / "bbh" if (self.path / "bbh").is_dir() else self.path / "tasks"
        file = self._existing(folder / f"{task}.json")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            rows = content["examples"]
        except (ValueError, KeyError, TypeError):
            rows = [row for _, row in read_rows(Source(str(file)))]
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict) or not all(
                isinstance(row.get(key), str) for key in ("input", "target")
            ):
                raise SFTError(
                    "an example needs `input` and `target`, both text",
                    where=f"{file}, example {number}",
                    fix=_GET_BBH,
                )
        return [(row["input"], row["target"]) for row in rows]

    def _existing(self, file: Path) -> Path:
        if not file.is_file():
            raise SFTError(f"{file} is not there", where="BBH.path", fix=_GET_BBH)
        return file


def _groups(task: str) -> Sequence[str]:
    """The group of tasks that differ in the number of objects only."""
    group = re.sub(r"_(three|five|seven)_objects$", "", task)
    return () if group == task else (group,)
