"""`lightning-sft sweep`: its command line, and the folder in which a sweep goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from lightning_sft import command_line, resume, run_folder
from lightning_sft.errors import SFTError
from lightning_sft.sweeping import results, space
from lightning_sft.sweeping.options import FitOptions
from lightning_sft.sweeping.study import Plan, Pruner, Sampler, Study

SWEEPS = Path("sweeps")
DEFINITION = "sweep.json"

_TRIALS = 20


def command(argv: Sequence[str]) -> None:
    """Parse the command line, check everything, and run the trials that are missing.

    Raises:
        SFTError: Something that the user gave is at fault, Optuna isn't installed, or no trial succeeds.
    """
    command_line.quieten()
    own, fit = _parted(argv)
    asked = _parser().parse_args(own)
    if find_spec("optuna") is None:
        raise SFTError(
            "sweeps are made by Optuna, which is missing", fix="pip install 'lightning-sft[sweep]'"
        )
    if asked.trials is not None and asked.trials < 1:
        raise SFTError(f"trials is {asked.trials}", where="--trials", fix="give 1 or more")
    parameters = space.read(asked.search or [])
    plan = Plan(parameters, asked.metric, asked.mode, asked.sampler, asked.pruner, asked.seed)
    options = FitOptions(fit, [json.dumps(plan.as_json())])
    options.check(parameters)
    every = space.grid(parameters) if plan.sampler == "grid" else []
    _check_metric(plan.metric, options.resolved)
    config = options.config.fit.config
    name = Path(str(config[0])).stem if config else "sweep"
    folder = Path(asked.folder) if asked.folder else SWEEPS / name
    _claim(folder, {"fit": options.resolved, "sweep": plan.as_json()})
    try:
        study = Study(folder, plan, options)
        if known := study.trials():
            print(f"Continuing {folder} after {sum(trial.state != 'unfinished' for trial in known)} trials.")
        study.run(asked.trials or len(every) or _TRIALS, asked.timeout)
        results.write(folder, study.trials(), plan.metric, plan.mode)
        results.show(folder, study.trials(), plan.metric, plan.mode)
    except KeyboardInterrupt:
        print("\nThe same command goes on with this sweep.")
        raise
    finally:
        run_folder.unlock(folder)
    if study.trials() and results.best_of(study.trials(), plan.mode) is None:
        raise SFTError("no trial succeeded", where=str(folder), fix="trials/*.log hold what the trials said")


def _parser() -> Any:
    parser = command_line.CommandParser(
        prog="lightning-sft sweep", usage="%(prog)s --config C --search S [...]"
    )
    parser.description = (
        "Search over any options of fit: each trial is a run of its own. All other options, --config among them, "
        "are those of fit, for all trials. The same command goes on with a sweep that was stopped."
    )
    add = parser.add_argument
    add(
        "--search",
        action="append",
        help="A YAML file of `key: {kind: values}`, or key=kind(values) with uniform, log_uniform, int, log_int or "
        "choice; can be given again.",
    )
    add("--metric", type=str, default="val/loss", help="What is optimised: any name in metrics.csv.")
    add("--mode", choices=["min", "max"], default="min", help="Whether less of it is better, or more.")
    add("--sampler", choices=get_args(Sampler), default="tpe", help="How values are chosen.")
    add("--pruner", choices=get_args(Pruner), default="none", help="Which trials are stopped early.")
    add("--seed", type=int, default=0, help="Of the sampler; the trials' own is seed_everything.")
    add(
        "--trials", type=int, default=None, help=f"How many, in all; by default {_TRIALS}, or the whole grid."
    )
    add("--timeout", type=float, default=None, help="Seconds after which no other trial begins.")
    add("--folder", type=str, default=None, help="Where the sweep is; by default sweeps/<config name>.")
    return parser


def _parted(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments of the sweep, and those of `fit`."""
    flags = {
        f"--{key}"
        for key in ("search", "metric", "mode", "sampler", "pruner", "seed", "trials", "timeout", "folder")
    }
    own: list[str] = []
    fit: list[str] = []
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        flag, equals, _ = argument.partition("=")
        if flag in ("-h", "--help"):
            own.append(argument)
        elif flag in flags:
            own += [argument] if equals or not rest else [argument, rest.pop(0)]
        else:
            fit.append(argument)
    return own, fit


def _check_metric(metric: str, config: Mapping[str, Any]) -> None:
    data = config["data"]
    if metric.startswith("val/") and not data["val"] and data["val_split"] is None:
        raise SFTError(
            "there is no validation data, so no run logs it",
            where=f"--metric {metric}",
            fix="give data.val or data.val_split",
        )


def _claim(folder: Path, definition: dict[str, Any]) -> None:
    """Take the folder for this sweep, alone.

    Raises:
        SFTError: Another sweep is in it, or another process.
    """
    path = folder / DEFINITION
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_free = run_folder.lock(folder)
    except OSError as error:
        raise SFTError(
            f"the folder can't be made: {error.strerror}", where=str(folder), fix="choose another --folder"
        ) from error
    if not is_free:
        raise SFTError(
            "another process is sweeping in this folder",
            where=str(folder),
            fix="wait for it, or choose another --folder",
        )
    text = json.dumps(definition, indent=2, ensure_ascii=False)
    if not path.exists():
        results.write_whole(path, text + "\n")
        return
    before, now = (
        resume.flat(each["fit"], False) | resume.flat(each["sweep"], False)
        for each in (json.loads(path.read_text(encoding="utf-8")), json.loads(text))
    )
    different = [key for key in sorted(before | now) if before.get(key) != now.get(key)]
    if different:
        run_folder.unlock(folder)
        lines = [f"\n    {key}: {before.get(key)} -> {now.get(key)}" for key in different[:5]]
        raise SFTError(
            f"the folder holds another sweep, which differs in{''.join(lines)}",
            where=str(folder),
            fix="choose another --folder, or go on with that sweep's options",
        )
