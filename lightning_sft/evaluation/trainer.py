"""Lightning's Trainer with one more method: `evaluate`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer

from lightning_sft.bases import Evaluator
from lightning_sft.errors import SFTError
from lightning_sft.evaluation.evaluation import Evaluation, Found
from lightning_sft.evaluation.table import show
from lightning_sft.run_folder import CONFIG, RUNS, model_folder

if TYPE_CHECKING:
    from lightning_sft.training.module import SFTModule


class SFTTrainer(Trainer):
    """Lightning's Trainer, which also evaluates."""

    evaluators: Sequence[Evaluator] = ()
    evaluator_configs: Sequence[Mapping[str, object]] = ()

    def evaluate(
        self,
        model: SFTModule,
        datamodule: Any = None,
        source: str | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
        baseline: bool = False,
        batch_tokens: int | None = None,
        output: str | None = None,
    ) -> list[Found]:
        """Ask a model what the evaluators ask, and write `results.json` and a file of records for each.

        Asked is the model of `source`, else that of the checkpoint, else the base. An evaluation that was stopped
        goes on where it was.

        Args:
            model: The module; its base is the one to compare with.
            datamodule: Not needed.
            source: A run folder, or a model folder (a whole model or an adapter).
            ckpt_path: A checkpoint of a run; `last` is that of the run in trainer.default_root_dir.
            weights_only: As Lightning's.
            baseline: Ask the base, too, and show what changed.
            batch_tokens: Padded tokens of a batch; by default 512 on a CPU, else 16,384.
            output: Where the results go; by default the run's folder, trainer.default_root_dir, or one in `runs/`.

        Raises:
            SFTError: There is no evaluator or no model, or data is missing or malformed.
        """
        if not self.evaluators:
            raise SFTError(
                "there is no evaluator",
                where="evaluators",
                fix="add `evaluators:` with one or more, such as {class_path: MMLU, init_args: {path: …}}",
            )
        if source is not None and ckpt_path is not None:
            raise SFTError("source and ckpt_path are both given", where="--source", fix="give one of them")
        compared = baseline or any(each.needs_base for each in self.evaluators)
        if compared and source is None and ckpt_path is None:
            raise SFTError(
                "the base would be compared with itself",
                where="--baseline" if baseline else "evaluators",
                fix="give a run or model folder with --source, or a checkpoint with --ckpt_path",
            )
        if batch_tokens is not None and batch_tokens < 1:
            raise SFTError(f"it is {batch_tokens}", where="--batch_tokens", fix="give 1 or more")
        names = _names(self.evaluators)
        configs = self.evaluator_configs or [{} for _ in names]
        evaluation = Evaluation(
            dict(zip(names, self.evaluators, strict=True)),
            dict(zip(names, configs, strict=True)),
            self._folder(model, source, ckpt_path, output),
            {"base": model.base, "source": source, "checkpoint": ckpt_path},
            None if source is None else model_folder(source),
            baseline,
            batch_tokens,
            self.progress_bar_callback is not None,
        )
        evaluation.take(model)
        self.predict(
            model,
            dataloaders=_Only(evaluation.run),
            return_predictions=False,
            ckpt_path=ckpt_path,
            weights_only=weights_only,
        )
        if self.is_global_zero:
            show(evaluation.found, evaluation.folder, evaluation.earlier)
        return evaluation.found

    def _folder(
        self, model: SFTModule, source: str | None, ckpt_path: str | None, output: str | None
    ) -> Path:
        """Where the results go."""
        if output is not None:
            if any(each.is_file() for each in (Path(output), *Path(output).parents)):
                raise SFTError(f"{output} is no folder", where="--output", fix="give a folder, new or not")
            return Path(output)
        for place in (source and Path(source), ckpt_path and Path(ckpt_path).parent.parent):
            if place and (place / CONFIG).is_file():
                return place
        if Path(self.default_root_dir) != Path(os.getcwd()):
            return Path(self.default_root_dir)
        return RUNS / f"evaluation-{Path(source or model.base).name}"


class _Only:
    """A loader of one batch. Not a `DataLoader`: Lightning would give it to one process only."""

    def __init__(self, batch: object) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[object]:
        yield self.batch

    def __len__(self) -> int:
        return 1


def _names(evaluators: Sequence[Evaluator]) -> list[str]:
    """Their classes' names, numbered from the second of a name."""
    names: list[str] = []
    for evaluator in evaluators:
        name, number = type(evaluator).__name__, 1
        while (numbered := name if number == 1 else f"{name}-{number}") in names:
            number += 1
        names.append(numbered)
    return names
