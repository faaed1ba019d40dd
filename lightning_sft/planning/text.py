"""A plan in the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_sft.planning.estimate import CPU_UTILISATION, TIGHT, UTILISATION, Estimate
from lightning_sft.planning.plan import Plan
from lightning_sft.training.memory import in_gib


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Print the plan; words carry what the colours do."""
    console = console or Console(highlight=False)
    for name, line in _facts(plan):
        table = Table.grid(padding=(0, 1, 0, 0))
        table.add_column(width=8)
        table.add_column()
        table.add_row(Text(name, style="bold"), Text(line))
        console.print(table)
    console.print()
    console.print(_memory(plan.estimates))
    if plan.remedies:
        console.print("\nWhat to change, and what a rank needs then:", style="bold")
        console.print(_changes(plan))
    for each in plan.advice:
        console.print(Text(f"\nadvice: {each}", style="yellow"))
    console.print(Text("\n" + _ASSUMED, style="dim"))


_ASSUMED = (
    "Estimates. Memory is that of the heaviest micro-batch. Time is taken to be "
    f"{UTILISATION:.0%} of a GPU's bfloat16 peak, here {CPU_UTILISATION:.0%} of a matrix product just measured; "
    "validation, checkpoints and loading are left out."
)


def _facts(plan: Plan) -> Iterator[tuple[str, str]]:
    peak, work = plan.peak, plan.work
    yield (
        "model",
        f"{plan.base}: {peak.parameters:,} parameters, {peak.trained:,} trained "
        f"({peak.trained / peak.parameters:.2%}), {plan.adapter}",
    )
    yield "data", f"{work.examples:,} examples"
    steps = f"{work.steps:,} steps" if work.steps else "no end set: of one epoch"
    yield (
        "run",
        f"{steps}, {work.epochs:.3g} epochs, {work.tokens:,} tokens, {work.targets:,} of them trained, {plan.strategy}",
    )
    if len(plan.rates) > 1:
        yield "rates", "\n".join(plan.rates)
    rows = f"; rows are padded: {plan.padded_because}" if plan.padded_because else ""
    yield "heaviest", plan.batch + rows


def _memory(estimates: tuple[Estimate, ...]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("GiB")
    for each in estimates:
        table.add_column(each.device.name, justify="right")
    for part in dict.fromkeys(part for each in estimates for part in each.parts):
        table.add_row(part, *(_size(each.parts.get(part)) for each in estimates))
    table.add_row("all", *(_size(each.total) for each in estimates), style="bold")
    if any(each.ranks > 1 for each in estimates):
        table.add_row("ranks", *(str(each.ranks) for each in estimates))
    table.add_row("of", *(_size(each.device.memory) for each in estimates))
    table.add_row("", *(_verdict(each) for each in estimates))
    table.add_row("time", *(_time(each.seconds) for each in estimates))
    return table


def _changes(plan: Plan) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", ratio=1)
    for each in plan.remedies[0].estimates:
        table.add_column(each.device.name, justify="right")
    for remedy in plan.remedies:
        table.add_row(remedy.says, *(_with_verdict(each) for each in remedy.estimates))
    return table


def _with_verdict(each: Estimate) -> Text:
    return Text(f"{in_gib(each.total)}\n") + _verdict(each)


def _verdict(each: Estimate) -> Text:
    if each.share > 1:
        return Text("too much", style="red")
    return Text("tight", style="yellow") if each.share > TIGHT else Text("fits", style="green")


def _size(size: int | None) -> str:
    return "" if size is None else f"{size / 2**30:.2f}"


def _time(seconds: float | None) -> str:
    return "?" if seconds is None else str(timedelta(seconds=max(1, round(seconds))))
