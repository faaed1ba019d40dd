"""Evaluators on the way: any benchmark, on a fixed part of its items."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_sft import Answered, Evaluator, Item, SFTError
from lightning_sft_callbacks.domains import items_of, scored
from lightning_sft_callbacks.probing import Probe

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_sft import SFTModule


class EvaluateDuringFit(Probe):
    """Runs evaluators at step 0, every so many steps and at the end, on the same items each time.

    Every score of each is kept in `evaluations.json`; the first one of each is logged.

    Args:
        evaluators: Which.
        every_n_steps: Optimizer steps between two measurements; 0 measures only at the start and the end.
        items: So many of each evaluator's items, drawn by `seed`; all of them where it is left out.
        seed: Which items are drawn.
        name: Tells several of these apart, in their figures (`evaluations-NAME/...`) and files.
    """

    file = "evaluations"
    prefix = "evaluations"

    def __init__(
        self,
        evaluators: list[Evaluator],
        every_n_steps: int = 0,
        items: int | None = None,
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        super().__init__(every_n_steps, name)
        if not evaluators or (items is not None and items < 1):
            raise SFTError(
                "there is no evaluator" if not evaluators else f"items is {items}",
                where="EvaluateDuringFit",
                fix="name at least one evaluator, and at least one item",
            )
        for each in evaluators:
            if each.needs_base:
                raise SFTError(
                    f"{type(each).__name__} needs the base's answers, which aren't asked for during training",
                    where="EvaluateDuringFit.evaluators",
                    fix="compare with answers in a file, or use `lightning-sft evaluate`",
                )
        self.evaluators = evaluators
        self.items = items
        self.seed = seed
        self._asked: list[list[Item]] = []

    def measure(self, trainer: Trainer, module: SFTModule) -> dict[str, Any]:
        """The scores of the model as it is now."""
        if not self._asked:
            where = "EvaluateDuringFit.evaluators"
            self._asked = [self._drawn(items_of(each, where)) for each in self.evaluators]
        scorer, record = self.scorer(module), dict[str, Any]()
        for evaluator, items in zip(self.evaluators, self._asked, strict=True):
            responses = iter(scorer.run([request for item in items for request in item.requests]))
            answered = [Answered(item, tuple(next(responses) for _ in item.requests)) for item in items]
            found = {
                f"{each.name}/{each.metric}": each.value
                for each in scored(evaluator, answered, trainer).scores
            }
            if both := found.keys() & record.keys():
                raise SFTError(
                    f"two evaluators have a score that is called {min(both)}",
                    where="EvaluateDuringFit.evaluators",
                    fix="give each an EvaluateDuringFit of its own, with a `name`",
                )
            record |= found
        return record

    def _drawn(self, items: list[Item]) -> list[Item]:
        if self.items is None or self.items >= len(items):
            return items
        rows = np.random.default_rng(self.seed).choice(len(items), self.items, replace=False)
        return [items[int(row)] for row in sorted(rows)]

    def numbers(self, record: dict[str, Any]) -> dict[str, float]:
        """The scores, without those of single tasks and groups where there is one over all."""
        found = super().numbers(record)
        depths: dict[str, int] = {}
        for name in found:
            evaluator = name.partition("/")[0]
            depths[evaluator] = min(name.count("/"), depths.get(evaluator, name.count("/")))
        return {n: value for n, value in found.items() if n.count("/") == depths[n.partition("/")[0]] > 0}

    def told(self, record: dict[str, Any]) -> str:
        """The scores that are logged."""
        values = "  ".join(f"{name} {value:.4g}" for name, value in self.numbers(record).items())
        return f"step {record['step']}: {values}"
