"""What the commands share that read the YAML of `fit` and load no weights: `preview` and `plan`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_sft import assets, command_line, plugins
from lightning_sft.data.datamodule import SFTDataModule
from lightning_sft.training.module import SFTModule


def prepared(argv: Sequence[str]) -> list[str]:
    """The arguments, once their config files are checked and the plug-ins that they name are loaded."""
    command_line.quieten()
    argv = [assets.config_path(argument) for argument in argv]
    command_line.check_configs(argv)
    plugins.load_named(plugins.named_in(argv))
    return argv


def parser(name: str, description: str) -> Any:
    """A parser that takes every option of `fit`; the command adds its own."""
    from jsonargparse import ActionConfigFile
    from lightning.pytorch import Trainer

    from lightning_sft.cli import Parser

    made = Parser(prog=f"lightning-sft {name}")
    made.description = description
    made.add_argument("-c", "--config", action=ActionConfigFile, help="The YAML file of `fit`.")
    made.add_lightning_class_args(SFTModule, "model")
    made.add_lightning_class_args(SFTDataModule, "data")
    made.add_lightning_class_args(Trainer, "trainer", required=False)
    for key in ("seed_everything", "ckpt_path", "weights_only", "checkpoints", "evaluators"):  # of `fit`
        made.add_argument(f"--{key}", type=Any, default=None, help="As in `fit`; changes nothing here.")
    return made


def instantiated(config: Any) -> tuple[SFTModule, SFTDataModule]:
    """The module and the data of a configuration; the trainer's callbacks are left alone."""
    from lightning_sft.cli import Parser

    made = Parser()
    made.add_lightning_class_args(SFTModule, "model")
    made.add_lightning_class_args(SFTDataModule, "data")
    both = made.instantiate(made.parse_object({"model": config.model, "data": config.data}))
    return both.model, both.data
