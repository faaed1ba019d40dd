"""The model as lm-evaluation-harness sees it: what it asks is noted first, and answered from what came of it.

Imported only where the harness is installed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from lightning_sft import (
    Generate,
    Generated,
    Likelihood,
    LogLikelihood,
    Message,
    RollingLogLikelihood,
    SFTError,
)

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

Request = LogLikelihood | RollingLogLikelihood | Generate
Response = Likelihood | Generated

_CHAT = "\x00messages "  # marks a prompt that is messages, which the harness takes for text
_MOST = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is given
_IGNORED = ("top_p", "top_k", "min_p", "typical_p", "repetition_penalty")


class Noted(Exception):
    """Everything that is to be asked is known."""


class Tasks(TaskManager):
    """The harness's task manager, which keeps what it has loaded."""

    loaded: Mapping[str, Any] = {}

    def load(self, *args: Any, **kwargs: Any) -> Any:
        """The tasks, as the harness has them."""
        self.loaded = super().load(*args, **kwargs)
        return self.loaded


class AskedLM(LM):
    """Answers from responses that are known; without them it stops the harness where it begins to ask.

    Args:
        answers: The responses to the requests; None where they aren't known yet.
    """

    tokenizer_name = "lightning_sft"

    def __init__(self, answers: Mapping[Request, Response] | None = None) -> None:
        super().__init__()
        self.answers = answers

    def loglikelihood(self, requests: list[Instance], **kwargs: Any) -> list[tuple[float, bool]]:
        """Log p of each continuation, and whether it is what would be written."""
        return [(each.log_likelihood, each.greedy) for each in self._found(requests, Likelihood)]

    def loglikelihood_rolling(self, requests: list[Instance], **kwargs: Any) -> list[float]:
        """Log p of each text."""
        return [each.log_likelihood for each in self._found(requests, Likelihood)]

    def generate_until(self, requests: list[Instance], **kwargs: Any) -> list[str]:
        """What is written after each prompt."""
        return [each.text for each in self._found(requests, Generated)]

    def _found(self, requests: Sequence[Instance], kind: type) -> list[Any]:
        if self.answers is None:
            raise Noted
        found = [self.answers[request_of(each)] for each in requests]
        assert all(isinstance(each, kind) for each in found)
        return found

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The messages, marked, for `request_of` to find them again: the Scorer renders them.

        Raises:
            SFTError: The task begins the answer itself.
        """
        if not add_generation_prompt:
            raise SFTError(
                "the task begins the answer itself (gen_prefix), which isn't possible with the chat template",
                where="LMEvalHarness.chat",
                fix="set `chat: false`",
            )
        return _CHAT + json.dumps([[each["role"], each["content"]] for each in chat_history])

    def chat_template(self, chat_template: bool | str = False) -> str:
        """For the harness's record; the template is the model's."""
        return ""


def request_of(instance: Instance) -> Request:
    """What an instance of the harness asks.

    Raises:
        SFTError: It is something that the Scorer can't answer.
    """
    if instance.request_type == "loglikelihood":
        context, continuation = instance.args
        return LogLikelihood(_prompt(context), continuation)
    if instance.request_type == "loglikelihood_rolling":
        return RollingLogLikelihood(instance.args[0])
    if instance.request_type != "generate_until":
        raise SFTError(
            f"the task {instance.task_name} asks for {instance.request_type}", where="LMEvalHarness.tasks"
        )
    context, options = instance.args
    until = options.get("until") or []
    until = [until] if isinstance(until, str) else until
    drawn, heat = options.get("do_sample"), float(options.get("temperature") or 0.0)
    heat = 0.0 if drawn is False else heat or float(bool(drawn) and "temperature" not in options)
    most = next((options[name] for name in _MOST if options.get(name) is not None), 256)
    if heat and (instance.repeats or 1) > 1:
        raise SFTError(
            f"the task {instance.task_name} asks for {instance.repeats} draws of each answer",
            where="LMEvalHarness.tasks",
            fix="the same request gets the same answer here; set `gen_kwargs: {do_sample: false}`",
        )
    return Generate(_prompt(context), tuple(until), int(most), heat)


def ignored(instance: Instance) -> list[str]:
    """Options of drawing that the Scorer doesn't have."""
    if instance.request_type != "generate_until" or not instance.args[1].get("do_sample"):
        return []
    return [name for name in _IGNORED if name in instance.args[1]]


def question_of(task: Any, document: Any) -> str:
    """What a document asks, without examples; empty where the task has no such text.

    Tasks whose prompt isn't the question often name the column that training data is to be compared with.
    """
    column = getattr(task.config, "doc_to_decontamination_query", None)
    asked = document.get(column) if isinstance(column, str) and isinstance(document, dict) else None
    asked = asked if isinstance(asked, str) else task.doc_to_text(document)
    return asked if isinstance(asked, str) else ""


def _prompt(context: str) -> str | tuple[Message, ...]:
    if not context.startswith(_CHAT):
        return context
    try:
        said = json.loads(context.removeprefix(_CHAT))
    except ValueError as error:
        raise SFTError(
            "the task adds text to the chat's prompt", where="LMEvalHarness.chat", fix="set `chat: false`"
        ) from error
    return tuple(Message(role, text) for role, text in said)


def run(lm: AskedLM, manager: Tasks, tasks: Sequence[str], **options: Any) -> Mapping[str, Any]:
    """The harness's results. Its seeds are not left behind.

    Raises:
        SFTError: A task isn't there, or can't be loaded or asked.
    """
    with own_randomness():
        try:
            found: Mapping[str, Any] = simple_evaluate(
                lm, tasks=list(tasks), task_manager=manager, torch_random_seed=None, **options
            )
        except (Noted, SFTError):
            raise
        except Exception as error:  # tasks are programs, with data of their own
            raise SFTError(
                f"lm-evaluation-harness failed: {type(error).__name__}: {error}",
                where=f"LMEvalHarness.tasks: {', '.join(tasks)}",
                fix="`lm_eval ls tasks` lists its tasks; their data comes from the Hub",
            ) from error
    return found


@contextmanager
def own_randomness() -> Iterator[None]:
    """Within this context the harness may draw: afterwards the generators are as they were."""
    kept, kept_numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(kept)
        np.random.set_state(kept_numpy)
