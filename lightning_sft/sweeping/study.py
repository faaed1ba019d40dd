"""The trials of a sweep: what they try, one process after another, and what is known of them after a kill."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen
from typing import TYPE_CHECKING, Any, Literal

from lightning_sft import resume
from lightning_sft.errors import SFTError
from lightning_sft.sweeping import results
from lightning_sft.sweeping.options import FitOptions
from lightning_sft.sweeping.space import Parameter, grid, placed
from lightning_sft.sweeping.trial import GO_ON, STOP

if TYPE_CHECKING:
    import optuna

Sampler = Literal["tpe", "random", "grid"]
Pruner = Literal["none", "median"]

STUDY = "study.db"

_HOPELESS = 3  # so many failures, and no success, end the sweep


@dataclass(frozen=True, slots=True)
class Plan:
    """What is searched, and how.

    Args:
        parameters: The options.
        metric: The name of what is optimised, as in `metrics.csv`; its last value in a run counts.
        mode: Whether less is better, or more.
        sampler: How values are chosen.
        pruner: Which trials are stopped early.
        seed: Of the sampler.
    """

    parameters: Sequence[Parameter]
    metric: str = "val/loss"
    mode: Literal["min", "max"] = "min"
    sampler: Sampler = "tpe"
    pruner: Pruner = "none"
    seed: int = 0

    def as_json(self) -> dict[str, Any]:
        """What makes the sweep this one, beside the configuration."""
        return {
            "search": {parameter.key: parameter.spec for parameter in self.parameters},
            "metric": self.metric,
            "mode": self.mode,
            "sampler": self.sampler,
            "pruner": self.pruner,
            "seed": self.seed,
        }


class Study:
    """The trials of a sweep in its folder.

    Args:
        folder: The sweep's folder.
        plan: What is searched, and how.
        options: The configuration that all trials share.
    """

    def __init__(self, folder: Path, plan: Plan, options: FitOptions) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.folder, self.plan, self.options = folder, plan, options
        self.parameters = {parameter.key: parameter for parameter in plan.parameters}
        self.grid = grid(plan.parameters) if plan.sampler == "grid" else []
        self._study = optuna.create_study(
            storage=f"sqlite:///{(folder / STUDY).absolute()}",
            study_name="sweep",
            direction="minimize" if plan.mode == "min" else "maximize",
            pruner=optuna.pruners.MedianPruner() if plan.pruner == "median" else optuna.pruners.NopPruner(),
            load_if_exists=True,
        )

    def trials(self) -> list[results.Trial]:
        """All trials so far."""
        states: dict[str, results.State] = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
        found = []
        for trial in self._study.get_trials(deepcopy=False):
            last = trial.intermediate_values.get(max(trial.intermediate_values, default=-1))
            found.append(
                results.Trial(
                    trial.number,
                    states.get(trial.state.name, "unfinished"),
                    trial.value if trial.value is not None else last,
                    {key: self.parameters[key].value(value) for key, value in sorted(trial.params.items())},
                    self._folder(trial.number),
                    trial.user_attrs.get("error"),
                )
            )
        return found

    def run(self, trials: int, timeout: float | None) -> None:
        """Run trials until there are so many, all of the grid, or the time is up; an unfinished one first.

        Args:
            trials: How many, with those of before.
            timeout: Seconds after which no other trial begins.

        Raises:
            SFTError: The metric isn't logged, or the first trials have all failed.
        """
        began, failures = time.monotonic(), 0
        wanted = min(trials, len(self.grid)) if self.grid else trials
        while sum(trial.state != "unfinished" for trial in self.trials()) < wanted:
            if timeout is not None and time.monotonic() - began >= timeout:
                print(f"{timeout:g} seconds are over: no other trial begins")
                return
            try:
                error = self._next(wanted)
            finally:
                results.write(self.folder, self.trials(), self.plan.metric, self.plan.mode)
            failures = failures + 1 if error else 0
            if failures == _HOPELESS and results.best_of(self.trials(), self.plan.mode) is None:
                raise SFTError(
                    f"{failures} trials in a row have failed, and none has succeeded; the last: {error}",
                    where=str(self.folder),
                    fix="try the configuration with lightning-sft fit; trials/*.log hold what the trials said",
                )

    def _next(self, wanted: int) -> str | None:
        """Run one trial; what was wrong if it failed."""
        trial = self._begun()
        folder = self._folder(trial.number)
        drawn = {key: parameter.drawn(trial) for key, parameter in self.parameters.items()}
        short = results.shortened(sorted(drawn))
        told = ", ".join(f"{short[key]} {results.plain(value)}" for key, value in sorted(drawn.items()))
        print(f"trial {trial.number} ({trial.number + 1} of {wanted}): {told}", flush=True)
        try:
            results.write_config(folder, self.options.accepted(placed(self.options.resolved, drawn)))
            self._train(trial, folder)
        except SFTError as error:
            trial.set_user_attr("error", str(error))
            self._study.tell(trial, state=_state("FAIL"))
            print(f"  failed: {error}", flush=True)
            if isinstance(error, MetricMissing):
                raise
            return str(error)
        state = self.trials()[trial.number]
        best = results.best_of(self.trials(), self.plan.mode)
        beside = "" if best is None else f" (best: {best.value:.6g}, trial {best.number})"
        print(f"  {state.state}: {self.plan.metric} {state.value:.6g}{beside}", flush=True)
        return None

    def _begun(self) -> optuna.trial.Trial:
        """The trial that was killed with an earlier sweep, or a new one.

        Each trial has a sampler of its own, so that a sweep that goes on draws what it would have drawn.
        """
        import optuna

        known = self._study.get_trials(deepcopy=False)
        unfinished = [each for each in known if each.state.name == "RUNNING"]
        waiting = [each for each in known if each.state.name == "WAITING"]  # killed before it began
        number = unfinished[0].number if unfinished else len(known) - len(waiting)
        seed = self.plan.seed * 1_000_003 + number
        if self.plan.sampler == "tpe":
            self._study.sampler = optuna.samplers.TPESampler(seed=seed)
        else:
            self._study.sampler = optuna.samplers.RandomSampler(seed=seed)
        if unfinished:
            return optuna.trial.Trial(self._study, unfinished[0]._trial_id)
        if self.grid and not waiting:
            self._study.enqueue_trial(self.grid[number])
        return self._study.ask()

    def _train(self, trial: optuna.trial.Trial, folder: Path) -> None:
        """Run the trial's process, and tell the study what came of it.

        Raises:
            SFTError: The run failed, or has no value.
        """
        if resume.is_finished(folder):  # the sweep was killed before it could note that
            cut, names = bool(trial.user_attrs.get("told", {}).get("cut", False)), list[str]()
        else:
            cut, names = self._listened(trial, folder)
        told = trial.user_attrs.get("told")
        if told is None:
            close = [name for name in names if name.split("/")[-1] == self.plan.metric.split("/")[-1]]
            raise MetricMissing(
                f"the run has logged no {self.plan.metric}",
                where=f"--metric {self.plan.metric}",
                fix=f"give one that it logs: {', '.join(close or names)}",
            )
        value = told["value"]
        if not math.isfinite(value):
            raise SFTError(f"{self.plan.metric} is {value} at the end", where=str(folder))
        if cut:
            self._study.tell(trial, state=_state("PRUNED"))
        else:
            self._study.tell(trial, value)

    def _listened(self, trial: optuna.trial.Trial, folder: Path) -> tuple[bool, list[str]]:
        """Start the process and answer it until it ends; whether it was cut short, and what it logged."""
        reader, writer = os.pipe()
        log = folder.with_name(f"{folder.name}.log")
        command = [
            sys.executable, "-m", "lightning_sft.sweeping.trial", self.plan.metric, str(writer),
            "fit", "--config", str(results.config_of(folder)), "--trainer.default_root_dir", str(folder),
            "--ckpt_path", resume.LAST_RUN_OR_NEW,
        ]  # fmt: skip
        before = log.stat().st_size if log.exists() else 0
        cut, names = False, list[str]()
        with log.open("ab") as output, os.fdopen(reader, encoding="utf-8") as lines:
            process = Popen(
                command, stdin=PIPE, stdout=output, stderr=STDOUT, pass_fds=(writer,), start_new_session=True
            )
            os.close(writer)
            assert process.stdin is not None
            try:
                with _asked_to_end(process) as asked:
                    for line in lines:
                        told = json.loads(line)
                        if "value" not in told:
                            cut, names = told["cut"], told["names"]
                            continue
                        answer = STOP if self._stops(trial, **told) else GO_ON
                        with suppress(BrokenPipeError):
                            process.stdin.write(answer)
                            process.stdin.flush()
                    status = process.wait()
            except BaseException:
                _kill(process)
                raise
            finally:
                with suppress(BrokenPipeError):
                    process.stdin.close()
        if asked:
            raise KeyboardInterrupt
        if status:
            raise SFTError(_last_words(log, before, status))
        return cut, names

    def _stops(self, trial: optuna.trial.Trial, value: float, at: int) -> bool:
        known = self._study.get_trials(deepcopy=False)[trial.number].intermediate_values
        if at not in known:  # else from before the checkpoint that the trial goes on from
            trial.report(value, at)
        stops = bool(trial.should_prune())
        # The last one counts, also where that of the same thousandth of an epoch, or of a longer epoch, is known.
        trial.set_user_attr("told", {"value": value, "cut": stops})
        return stops

    def _folder(self, number: int) -> Path:
        return self.folder / "trials" / f"{number:03}"


class MetricMissing(SFTError):
    """No trial of the sweep will log the metric that it is about."""


def _state(name: str) -> optuna.trial.TrialState:
    import optuna

    return optuna.trial.TrialState[name]


@contextmanager
def _asked_to_end(process: Popen[bytes]) -> Iterator[list[int]]:
    """Within this context an interrupt lets the trial make its last checkpoint and end; the second one kills it.

    It isn't raised, so that no value is lost on the way to the study. Yields the signals that came.
    """
    asked: list[int] = []

    def ask(number: int, frame: object) -> None:
        if asked:
            _kill(process)
        elif process.poll() is None:
            process.send_signal(signal.SIGTERM)
        asked.append(number)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def _kill(process: Popen[bytes]) -> None:
    """End a trial with all its processes."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _last_words(log: Path, start: int, status: int) -> str:
    """Why a process has failed: its error, or the last line that it wrote."""
    with log.open("rb") as file:
        file.seek(start)
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    if status == -signal.SIGKILL:
        return "its process was killed (SIGKILL): the machine may have run out of memory"
    if status < 0:
        return f"its process was ended by {signal.Signals(-status).name}"
    errors = [line for line in lines if line.startswith("error: ")]
    said = errors[-1].removeprefix("error: ") if errors else (lines or ["it said nothing"])[-1].strip()
    return f"{said} ({log})"
