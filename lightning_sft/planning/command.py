"""`lightning-sft plan`: memory, steps and time of a run, and what to change, on the same YAML as `fit`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lightning_sft import command_line, without_weights
from lightning_sft.errors import SFTError
from lightning_sft.planning.plan import Plan, make
from lightning_sft.training import devices


def command(argv: Sequence[str]) -> None:
    """Parse the command line and print the plan.

    Raises:
        SFTError: Something that the user gave is at fault.
    """
    plan = made(argv)
    if "--json" in argv:
        print(json.dumps(plan.as_json(), indent=1, ensure_ascii=False))
        return
    from lightning_sft.planning.text import print_plan

    print_plan(plan)


def made(argv: Sequence[str]) -> Plan:
    """The plan of the run that the command line describes.

    Raises:
        SFTError: Something that the user gave is at fault.
    """
    argv = without_weights.prepared(argv)
    try:
        config = _parser().parse_args(argv)
        asked = [devices.named(name) for name in (config.gpu or "").split(",") if name.strip()]
        if config.device_memory is not None:
            asked.append(devices.of_size(config.device_memory))
        return make(config, asked)
    except SFTError as error:
        raise command_line.in_config(error, argv) from error


def _parser() -> Any:
    parser = without_weights.parser(
        "plan", "Tell memory by part, steps, tokens and time of a run before anything runs; loads no weights."
    )
    names = ", ".join(gpu.name for gpu in devices.GPUS)
    parser.add_argument(
        "--gpu", type=str, default=None, help=f"GPUs to plan for, such as rtx-4090,h100-80gb: {names}."
    )
    parser.add_argument(
        "--device-memory", type=str, default=None, help="Another GPU by its memory, such as 24GiB."
    )
    parser.add_argument("--json", action="store_true", help="Print the plan as JSON, in bytes and seconds.")
    return parser
