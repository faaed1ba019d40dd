"""`lightning-sft plugins --check`: every plug-in is imported, timed, and put through the conformance kit.

Each in a process of its own, forked from one that has loaded what `fit` loads: so a plug-in is charged with its own
imports alone, and one that exits, hangs or changes something global does so to nobody else.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import import_module, metadata
from inspect import signature
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import indent
from typing import TYPE_CHECKING

from lightning_sft.errors import SFTError
from lightning_sft.plugin_kinds import KINDS
from lightning_sft.plugin_source import imported_by
from lightning_sft.plugins import Plugin, discover

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, SpawnContext

SLOWEST_IMPORT = 0.5
"""Seconds that a plug-in's import may take beyond what `fit` has loaded."""

LONGEST_CHECK = 300
"""Seconds after which a plug-in's process is ended."""

HEAVY = frozenset(
    "accelerate bitsandbytes datasets deepspeed evaluate faiss jax keras matplotlib nltk pandas peft pyarrow scipy "
    "sentence_transformers sklearn spacy tensorflow trl vllm wandb".split()
)
"""Libraries to import inside the functions that need them."""

NO_TORCH = frozenset(["torch", "lightning", "transformers"])
"""What else to import there in plug-ins that commands without torch load."""

FACTORIES = ("lightning.pytorch.callbacks_factory", "lightning.fabric.callbacks_factory")


@dataclass(slots=True)
class Report:
    """What was found out about one plug-in.

    Args:
        plugin: The plug-in.
        broken: What is wrong with it.
        untried: Tests of the kit that need something of its author, such as rows.
        passed: How many tests it has passed.
        import_seconds: How long its import took, beyond what `fit` loads; None if it failed.
    """

    plugin: Plugin
    broken: list[str] = field(default_factory=list)
    untried: list[str] = field(default_factory=list)
    passed: int = 0
    import_seconds: float | None = None


def command(plugins: Sequence[Plugin], *, as_json: bool = False) -> None:
    """Check the plug-ins and print a line for each and what is wrong below it.

    Raises:
        SFTError: Some are broken.
    """
    reports = []
    for report in check(plugins):
        reports.append(report)
        if not as_json:
            print(_told(report), flush=True)
    warnings = list(callback_factories())
    if as_json:
        print(json.dumps([asdict(report) for report in reports], indent=2, ensure_ascii=False))
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    broken = [str(report.plugin) for report in reports if report.broken]
    if broken:
        raise SFTError(f"{len(broken)} of {len(reports)} plug-ins are broken: {', '.join(broken)}")


def check(plugins: Sequence[Plugin]) -> Iterator[Report]:
    """The report on each plug-in, in turn."""
    forks = "forkserver" in get_all_start_methods()
    context = get_context("forkserver") if forks else get_context("spawn")
    context.set_forkserver_preload(["lightning_sft.cli", "lightning_sft.testing"])
    everything = discover()
    for plugin in plugins:
        unmet = plugin.unmet
        report = Report(plugin, broken=[unmet]) if unmet else _in_own_process(context, plugin)
        twins = [p for p in everything if (p.kind, p.name) == (plugin.kind, plugin.name) and p != plugin]
        if twins:
            report.broken.append(
                f"its name is also that of the {' and the '.join(map(str, twins))}: only the class path "
                f"{plugin.class_path} names it"
            )
        yield report


def callback_factories() -> Iterator[str]:
    """A warning for each installed factory of callbacks that Lightning itself loads into every Trainer."""
    for group in FACTORIES:
        for entry in metadata.entry_points(group=group):
            owner = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "a distribution"
            yield (
                f"{owner} adds callbacks to every Trainer (entry point {entry.name} of [{group}]): they are in no "
                "configuration, and one that fails breaks every run"
            )


def _in_own_process(context: ForkServerContext | SpawnContext, plugin: Plugin) -> Report:
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(
        target=_child, args=(theirs, plugin, dict(os.environ), list(sys.path)), daemon=True
    )
    process.start()
    theirs.close()
    try:
        if ours.poll(LONGEST_CHECK):
            report: Report = ours.recv()
            process.join(timeout=10)
            return report
        problem = f"it had not ended after {LONGEST_CHECK} seconds"
    except EOFError:
        process.join()
        problem = f"its process ended with status {process.exitcode}"
    finally:
        process.kill()
        process.join()
    return Report(plugin, broken=[problem])


def _child(results: Connection, plugin: Plugin, environment: dict[str, str], path: list[str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:] = path
    import_module("lightning_sft.cli")
    import torch

    torch.set_num_threads(1)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)  # the loggers' streams included
    os.dup2(silence, 2)
    report = examine(plugin)
    results.send(report)


def examine(plugin: Plugin) -> Report:
    """Import a plug-in here, time that, and run the kit on it."""
    report = Report(plugin)
    before, began = set(sys.modules), time.perf_counter()
    with suppress(Exception, SystemExit):  # load() below says what is wrong
        import_module(plugin.target.partition(":")[0])
    seconds = time.perf_counter() - began
    new = {name.partition(".")[0] for name in set(sys.modules) - before}
    try:
        cls = plugin.load()
    except SFTError as error:
        report.broken.append(error.what)
        return report
    report.import_seconds = round(seconds, 3)
    heavy = sorted(new & HEAVY)
    if KINDS[plugin.kind].light:
        heavy += sorted(imported_by(plugin) & NO_TORCH)
    if heavy:
        report.broken.append(
            f"its module imports {', '.join(heavy)} when it is imported: do that inside the functions that need it"
        )
    if seconds > SLOWEST_IMPORT:
        report.broken.append(f"its import takes {seconds:.1f} s, more than {SLOWEST_IMPORT} s")
    _run_kit(cls, plugin, report)
    return report


def _run_kit(cls: type, plugin: Plugin, report: Report) -> None:
    from lightning_sft.testing.plugin import MissingSample, PluginTests

    mixin = KINDS[plugin.kind].load_tests() or PluginTests
    tests = type(f"Test{cls.__name__}", (mixin,), {"plugin": cls, "kind": plugin.kind})
    for name in sorted(each for each in dir(tests) if each.startswith("test_")):
        law = name.removeprefix("test_").replace("_", " ")
        method = getattr(tests(), name)
        try:
            with TemporaryDirectory() as folder:
                method(*[Path(folder) for parameter in signature(method).parameters])
        except MissingSample:
            report.untried.append(law)
        except AssertionError as error:
            report.broken.append(str(error))
        except (Exception, SystemExit) as error:
            report.broken.append(f"{law}: {type(error).__name__}: {error}")
        else:
            report.passed += 1


def _told(report: Report) -> str:
    seconds = "" if report.import_seconds is None else f", imported in {report.import_seconds:.2f} s"
    tests = f"{report.passed} tests passed" + (
        f", {len(report.untried)} need samples of its author" if report.untried else ""
    )
    if not report.broken:
        return f"ok      {report.plugin}: {tests}{seconds}"
    problems = "".join(indent(f"\n- {problem}", " " * 8) for problem in report.broken)
    return f"broken  {report.plugin}: {tests}{seconds}{problems}"
