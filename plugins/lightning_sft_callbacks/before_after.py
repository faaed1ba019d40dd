"""What fine-tuning changed: the same questions to the model before its first step and after its last."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from lightning.pytorch import Callback

from lightning_sft import Generate, Generated, Message, Row, Scorer, Segments, SFTError, Source, read_rows

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_sft import Example, SFTModule


@dataclass(frozen=True, slots=True)
class Measured:
    """One measurement of the model.

    Args:
        validation_loss: Negative log-likelihood per trained token of the validation data.
        exact_match: Share of held-out instructions answered to the letter, over all.
        exact_match_by_task: The same for each value of the rows' `task` column.
        general_loss: Negative log-likelihood per token of general text: what is forgotten shows here.
        accuracy: Share of four-choice questions whose right choice is the likeliest.
        answers: The answers to the sample prompts.
    """

    validation_loss: float | None
    exact_match: float
    exact_match_by_task: dict[str, float]
    general_loss: float
    accuracy: float
    answers: list[str]


class BeforeAfter(Callback):
    """Measures the model before and after training and shows both, in the terminal and in `before_after.json`.

    Args:
        instructions: Held-out rows in Alpaca's columns, answered greedily and compared to the letter.
        general_text: Held-out text: rows with `text`.
        questions: Rows with `question`, `choices` and `answer`, the index of the right choice.
        samples: How many prompts to show with the answers of the base and of the tuned model.
        gated: Tasks (of the rows' `task` column) to sum up apart, beside the exact match over all.
        max_new_tokens: Most tokens of an answer.
    """

    measures_forgetting = True  # on general text

    def __init__(
        self,
        instructions: str,
        general_text: str,
        questions: str,
        samples: int = 3,
        gated: list[str] | None = None,
        max_new_tokens: int = 48,
    ) -> None:
        self.instructions = _rows(instructions, "instructions", ("instruction", "output"))
        self.general_text = _rows(general_text, "general_text", ("text",))
        self.questions = _rows(questions, "questions", ("question", "choices", "answer"))
        self.samples = samples
        self.gated = gated or []
        if unknown := set(self.gated) - {str(row.get("task", "")) for row in self.instructions}:
            raise SFTError(
                f"no instruction has the task {min(unknown)!r}",
                where="BeforeAfter.gated",
                fix="name values of the `task` column",
            )
        self.max_new_tokens = max_new_tokens
        self.before: Measured | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the base; on every rank, as each may have a part of it."""
        if self.before is None:
            self.before = self.measure(cast("SFTModule", pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the tuned model, and show both."""
        if self.before is None:
            return
        after = self.measure(cast("SFTModule", pl_module))
        if not trainer.is_global_zero:
            return
        path = Path(trainer.default_root_dir) / "before_after.json"
        result = {"before": asdict(self.before), "after": asdict(after)}
        path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        self._show(self.before, after, path)

    def measure(self, module: SFTModule) -> Measured:
        """Everything, of the model as it is now."""
        scorer = Scorer.of(module)
        answers = self._answers(scorer)
        right: dict[str, list[bool]] = defaultdict(list)
        for row, answer in zip(self.instructions, answers, strict=True):
            right[str(row.get("task", ""))].append(answer.strip() == str(row["output"]).strip())
        general = module.renderer.render_all(
            [Segments(((str(row["text"]), 1.0),)) for row in self.general_text]
        )
        held_out = module.data.prepared.get("val")
        return Measured(
            validation_loss=None if held_out is None else _per_token(scorer, held_out.examples),
            exact_match=_share([verdict for verdicts in right.values() for verdict in verdicts]),
            exact_match_by_task={task: _share(verdicts) for task, verdicts in right.items()},
            general_loss=_per_token(scorer, general),
            accuracy=self._accuracy(module, scorer),
            answers=answers[:: max(1, len(answers) // self.samples)][: self.samples] if self.samples else [],
        )

    def _answers(self, scorer: Scorer) -> list[str]:
        asked = [
            Generate((Message("user", _asked(row)),), max_new_tokens=self.max_new_tokens)
            for row in self.instructions
        ]
        return [each.text for each in scorer.run(asked) if isinstance(each, Generated)]

    def _accuracy(self, module: SFTModule, scorer: Scorer) -> float:
        """As MMLU is scored (Hendrycks et al., 2021): the choice with the highest log-likelihood is the answer."""
        asked = [
            # The empty last segment leaves the EOS token, which would follow, out of the sum.
            Segments(((f"Question: {row['question']} Answer:", 0.0), (f" {choice}", 1.0), ("", 0.0)))
            for row in self.questions
            for choice in _choices(row)
        ]
        scores = iter(scorer.negative_log_likelihoods(module.renderer.render_all(asked)))
        verdicts = []
        for row in self.questions:
            nll = [next(scores) for _ in _choices(row)]
            verdicts.append(nll.index(min(nll)) == row["answer"])
        return _share(verdicts)

    def _show(self, before: Measured, after: Measured, path: Path) -> None:
        from rich.console import Console
        from rich.table import Table

        table = Table("", "before", "after", title="What fine-tuning changed")
        for name, one, two in (
            ("validation loss", before.validation_loss, after.validation_loss),
            ("general text loss (forgetting)", before.general_loss, after.general_loss),
        ):
            if one is not None and two is not None:
                table.add_row(name, f"{one:.3f}", f"{two:.3f}")
        table.add_row("facts, four choices (chance 25 %)", f"{before.accuracy:.1%}", f"{after.accuracy:.1%}")
        if self.gated:
            table.add_row(
                f"exact match: {', '.join(self.gated)}",
                *(f"{self._exact_match_of_gated(measured):.1%}" for measured in (before, after)),
            )
        for task in before.exact_match_by_task if len(before.exact_match_by_task) > 1 else ():
            one, two = before.exact_match_by_task[task], after.exact_match_by_task[task]
            table.add_row(f"  exact match: {task}", f"{one:.1%}", f"{two:.1%}")
        table.add_row("exact match: all", f"{before.exact_match:.1%}", f"{after.exact_match:.1%}")
        console = Console()
        console.print(table)
        step = max(1, len(self.instructions) // max(1, self.samples))
        shown = self.instructions[::step][: self.samples]
        for row, base, tuned in zip(shown, before.answers, after.answers, strict=True):
            console.print(f"\n[bold]{_escaped(_asked(row))}[/bold]")
            console.print(f"  base   {_escaped(base)}", f"  tuned  {_escaped(tuned)}", sep="\n")
        console.print(f"\nThese figures are in {_escaped(str(path))}")

    def _exact_match_of_gated(self, measured: Measured) -> float:
        sizes = {
            task: sum(str(row.get("task", "")) == task for row in self.instructions) for task in self.gated
        }
        right = sum(measured.exact_match_by_task[task] * size for task, size in sizes.items())
        return right / sum(sizes.values())


def _rows(path: str, option: str, columns: tuple[str, ...]) -> list[Row]:
    rows = []
    for meta, row in read_rows(Source(path)):
        if missing := [column for column in columns if column not in row]:
            raise SFTError(
                f"no column {missing[0]!r}",
                where=f"BeforeAfter.{option}: {meta}",
                fix=f"it needs {', '.join(columns)}",
            )
        rows.append(row)
    return rows


def _asked(row: Row) -> str:
    return f"{row['instruction']}\n\n{row['input']}" if row.get("input") else str(row["instruction"])


def _choices(row: Row) -> list[object]:
    choices = row["choices"]
    return list(choices) if isinstance(choices, list | tuple) else [choices]


def _per_token(scorer: Scorer, examples: Sequence[Example]) -> float:
    return sum(scorer.negative_log_likelihoods(examples)) / sum(float(e.weights.sum()) for e in examples)


def _share(verdicts: Sequence[bool]) -> float:
    return sum(verdicts) / len(verdicts) if verdicts else float("nan")


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(" ⏎ ".join(text.split("\n")))
