"""What the model writes: the same prompts on the way, and whether its answers become all alike."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lightning_sft import Generate, Generated, Message, SFTError, Source, read_rows
from lightning_sft_callbacks.probing import Probe

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_sft import SFTModule


class GenerationProbe(Probe):
    """A probe that asks prompts and looks at the answers.

    Args:
        every_n_steps: Optimizer steps between two measurements; 0 measures only at the start and the end.
        max_new_tokens: Most tokens of an answer.
        temperature: 0 takes the likeliest token each time; else tokens are drawn, each time alike.
        name: Tells several of one class apart.
    """

    def __init__(
        self, every_n_steps: int, max_new_tokens: int, temperature: float = 0.0, name: str | None = None
    ) -> None:
        super().__init__(every_n_steps, name)
        if max_new_tokens < 1 or temperature < 0:
            raise SFTError(
                f"max_new_tokens is {max_new_tokens}, temperature {temperature}",
                where=type(self).__name__,
                fix="give at least 1 token, and a temperature of 0 or more",
            )
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature

    def ask(self, module: SFTModule, prompts: Sequence[str]) -> list[Generated]:
        """The answer to each prompt, asked as a user's turn."""
        requests = [
            Generate(
                (Message("user", prompt),), max_new_tokens=self.max_new_tokens, temperature=self.temperature
            )
            for prompt in prompts
        ]
        answers = self.scorer(module).run(requests)
        return [answer for answer in answers if isinstance(answer, Generated)]


class SampleGenerations(GenerationProbe):
    """Asks a few fixed prompts at step 0, on the way and at the end, and keeps the answers in `generations.json`.

    Of the answers together: `mean_tokens` and `cut` (share that reached `max_new_tokens`); `distinct_1` and
    `distinct_2`, the shares of different words and pairs of words (Li et al., 2016); `repeated_4`, the mean share of an
    answer's four-word runs that it has had before; and `alike`, the share of pairs of prompts that get the same answer.
    Answers that become short, repeated or all alike are a collapse.

    Args:
        prompts: What is asked; or
        path: a data file with a column `prompt` (or `instruction`).
        every_n_steps: Optimizer steps between two measurements; 0 measures only at the start and the end.
        max_new_tokens: Most tokens of an answer.
        temperature: 0 takes the likeliest token each time; else tokens are drawn, each time alike.
        shown: How many prompts to show in the terminal at the end, with the base's and the tuned model's answer.
        name: Tells several of these apart, in their figures (`generations-NAME/...`) and files.
    """

    file = "generations"
    prefix = "generations"

    def __init__(
        self,
        prompts: list[str] | None = None,
        path: str | None = None,
        every_n_steps: int = 0,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        shown: int = 3,
        name: str | None = None,
    ) -> None:
        super().__init__(every_n_steps, max_new_tokens, temperature, name)
        self.prompts = list(prompts or []) + (read_prompts(path, "SampleGenerations.path") if path else [])
        if not self.prompts:
            raise SFTError("there are no prompts", where="SampleGenerations", fix="give prompts or path")
        self.shown = shown

    def measure(self, trainer: Trainer, module: SFTModule) -> dict[str, Any]:
        """The answers and their statistics."""
        answers = self.ask(module, self.prompts)
        texts = [answer.text for answer in answers]
        return {
            **statistics(texts),
            "mean_tokens": sum(answer.tokens for answer in answers) / len(answers),
            "cut": sum(answer.tokens >= self.max_new_tokens for answer in answers) / len(answers),
            "answers": texts,
        }

    def report(self) -> dict[str, Any]:
        """The prompts before the history."""
        return {"prompts": self.prompts, **super().report()}

    def finish(self, trainer: Trainer, module: SFTModule) -> None:
        """Measure, and show some answers of base and tuned model."""
        super().finish(trainer, module)
        if not trainer.is_global_zero:
            return
        before, after = self.history[0]["answers"], self.history[-1]["answers"]
        for prompt, base, tuned in list(zip(self.prompts, before, after, strict=True))[: self.shown]:
            print(f"\n{prompt}\n  base   {_line(base)}\n  tuned  {_line(tuned)}")


def read_prompts(path: str, where: str) -> list[str]:
    """The prompts of a data file.

    Raises:
        SFTError: A row has no prompt; says which.
    """
    prompts = []
    for meta, row in read_rows(Source(path)):
        prompt = row.get("prompt", row.get("instruction"))
        if not isinstance(prompt, str) or not prompt.strip():
            raise SFTError("the row has no prompt", where=f"{where}: {meta}", fix="give a column `prompt`")
        prompts.append(prompt)
    return prompts


def statistics(texts: Sequence[str]) -> dict[str, float]:
    """How varied texts are: see `SampleGenerations`; words are what white space separates."""
    words = [text.split() for text in texts]
    runs = [list(zip(*(each[start:] for start in range(4)), strict=False)) for each in words]
    repeated = [1 - len(set(each)) / len(each) if each else 0.0 for each in runs]
    pairs = len(texts) * (len(texts) - 1) / 2
    same = sum(a == b for number, a in enumerate(texts) for b in texts[:number])
    return {
        "distinct_1": _different([word for each in words for word in each]),
        "distinct_2": _different([pair for each in words for pair in pairwise(each)]),
        "repeated_4": sum(repeated) / len(repeated),
        "alike": same / pairs if pairs else 0.0,
    }


def _different(values: Sequence[object]) -> float:
    return len(set(values)) / len(values) if values else 0.0


def _line(text: str) -> str:
    return " ⏎ ".join(text.split("\n"))
