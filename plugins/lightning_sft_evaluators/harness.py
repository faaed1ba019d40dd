"""Tasks of lm-evaluation-harness, on the model in hand."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from lightning_sft import (
    Answered,
    Converse,
    Conversed,
    Evaluator,
    Item,
    Likelihood,
    LogLikelihood,
    Record,
    Results,
    Score,
    SFTError,
)

if TYPE_CHECKING:
    from lightning_sft_evaluators.harness_lm import Tasks

_WHOLE = "none"  # the harness's name of the filter that leaves answers as they are


class LMEvalHarness(Evaluator):
    """Any task or group of tasks of the installed lm-evaluation-harness.

    The harness makes the prompts and judges; lightning-sft answers.

    Args:
        tasks: Names of tasks and groups, as `lm_eval ls tasks` lists them.
        shots: Examples before each question; by default the task's.
        limit: Only the first so many questions of each task.
        chat: Ask through the model's chat template.
        turns: In a chat, each shot is a turn of its own; else all is one turn.
        system: The system message (or what comes first, without a chat).
        include_path: A folder with further tasks in YAML.
        builtin: Know the harness's own tasks; to look through them takes it half a minute.
        gen_kwargs: Options of generation that go over the tasks' (`max_gen_toks`, `do_sample`, …).
        bootstrap_iters: Resamples for standard errors that have no formula.
        confirm_run_unsafe_code: Run tasks that execute what the model writes.
        name: What the scores are called.
    """

    def __init__(
        self,
        tasks: list[str],
        shots: int | None = None,
        limit: int | None = None,
        chat: bool = False,
        turns: bool = True,
        system: str | None = None,
        include_path: str | None = None,
        builtin: bool = True,
        gen_kwargs: dict[str, Any] | None = None,
        bootstrap_iters: int = 100_000,
        confirm_run_unsafe_code: bool = False,
        name: str = "harness",
    ) -> None:
        if not tasks or (limit is not None and limit < 1) or (shots is not None and shots < 0):
            raise SFTError(
                f"tasks are {tasks}, shots {shots}, limit {limit}",
                where="LMEvalHarness",
                fix="name at least one task; give at least 0 shots and a limit of 1",
            )
        self.tasks = tasks
        self.limit = limit
        self.include_path = include_path
        self.builtin = builtin
        self.name = name
        self.options: Mapping[str, Any] = {
            "num_fewshot": shots,
            "apply_chat_template": chat,
            "fewshot_as_multiturn": chat and turns,
            "system_instruction": system,
            "gen_kwargs": gen_kwargs,
            "bootstrap_iters": bootstrap_iters,
            "confirm_run_unsafe_code": confirm_run_unsafe_code,
        }

    def requests(self) -> Sequence[Item]:
        """One item for each of the tasks' documents."""
        self._check()
        from lightning_sft_evaluators.harness_lm import AskedLM, Noted, ignored, question_of, request_of, run

        manager = self._manager
        with suppress(Noted):
            run(AskedLM(), manager, self.tasks, limit=self.limit, **self.options)
        items = []
        left_out: set[str] = set()
        for task, loaded in manager.loaded["tasks"].items():
            documents: dict[int, list[Any]] = {}
            for instance in loaded.instances:
                documents.setdefault(instance.doc_id, []).append(instance)
                left_out.update(ignored(instance))
            items += [
                Item(
                    task,
                    number,
                    tuple(map(request_of, instances)),
                    text=question_of(loaded, instances[0].doc),
                )
                for number, instances in documents.items()
            ]
        if left_out:
            print(
                f"LMEvalHarness: {', '.join(sorted(left_out))} of the tasks aren't applied: only temperature is"
            )
        return items

    def score(self, answered: Sequence[Answered]) -> Results:
        """The harness's own figures for groups and tasks."""
        self._check()
        from lightning_sft_evaluators.harness_lm import AskedLM, own_randomness, run

        answers = {
            request: response
            for each in answered
            for request, response in zip(each.item.requests, each.responses, strict=True)
            if not isinstance(request, Converse) and not isinstance(response, Conversed)
        }
        chosen: dict[str, list[int]] = {}
        for each in answered:
            chosen.setdefault(each.item.task, []).append(each.item.number)
        with own_randomness():
            whole = set(self._manager.load(self.tasks)["tasks"]) <= set(chosen)
        names = self.tasks if whole else list(chosen)
        found = run(AskedLM(answers), self._manager, names, samples=chosen, **self.options)
        return Results(tuple(self._scores(found)), tuple(_records(answered, found["samples"])))

    def _scores(self, found: Mapping[str, Any]) -> list[Score]:
        scores = []
        groups = found.get("groups") or {}
        for task, values in {**groups, **found["results"]}.items():
            counts = found["n-samples"].get(task)
            subtasks = found.get("group_subtasks", {}).get(task, [])
            for key, value in values.items():
                metric, _, filtered = key.partition(",")
                if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                    continue
                error = values.get(f"{metric}_stderr,{filtered}")
                up = found["higher_is_better"].get(task, {}).get(metric)
                scores.append(
                    Score(
                        f"{self.name}/{task}",
                        _named(metric, filtered),
                        float(value),
                        float(error) if isinstance(error, int | float) else None,
                        counts["effective"] if counts else _size(found, subtasks),
                        up is not False,
                    )
                )
        return scores

    @cached_property
    def _manager(self) -> Tasks:
        from lightning_sft_evaluators.harness_lm import Tasks

        return Tasks(include_path=self.include_path, include_defaults=self.builtin)

    def _check(self) -> None:
        if find_spec("lm_eval") is None:
            raise SFTError(
                "lm-evaluation-harness isn't installed",
                where="LMEvalHarness",
                fix='pip install "lightning-sft[harness]"',
            )
        logging.getLogger("lm_eval").setLevel(logging.WARNING)


def _named(metric: str, filtered: str) -> str:
    return metric if filtered == _WHOLE else f"{metric},{filtered}"


def _size(found: Mapping[str, Any], tasks: Sequence[str]) -> int:
    """How many items the tasks of a group, and of groups in it, have."""
    counts, inner = found["n-samples"], found.get("group_subtasks", {})
    return sum(
        counts[task]["effective"] if task in counts else _size(found, inner.get(task, [])) for task in tasks
    )


def _records(
    answered: Sequence[Answered], samples: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[Record]:
    """The items' records, with the harness's verdicts where these are numbers."""
    judged: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for task, rows in samples.items():
        for row in rows:
            judged.setdefault((task, row["doc_id"]), []).append(row)
    records = []
    for each in answered:
        rows = judged[each.item.task, each.item.number]
        metrics = {
            _named(metric, row["filter"]): float(row[metric])
            for row in rows
            for metric in row["metrics"]
            if isinstance(row[metric], int | float)
        }
        (first, *_) = rows
        record = Record.of(each, _answer(each, first), metrics)
        records.append(replace(record, target=str(first["target"])))
    return records


def _answer(answered: Answered, row: Mapping[str, Any]) -> str:
    """What was written, or the likeliest choice: its text, or its number where only the contexts differ.

    A continuation that stands alone is the answer where it is what greedy decoding writes, else nothing is.
    """
    asked, (response, *others) = answered.item.requests, answered.responses
    if not isinstance(response, Likelihood):
        return str(row["filtered_resps"][0])
    texts = [each.continuation for each in asked if isinstance(each, LogLikelihood)]
    if not others:
        return "".join(texts).strip() if response.greedy else ""
    names = texts if len(set(texts)) > 1 else [str(number) for number in range(len(texts))]
    choices: dict[str, float] = {}
    for name, log_likelihood in zip(names, answered.log_likelihoods, strict=True):
        choices.setdefault(name, log_likelihood)  # what is asked a second time is asked without the question
    return max(choices, key=lambda name: choices[name]).strip()
