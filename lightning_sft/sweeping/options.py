"""The options of `fit` that a sweep is about: checked by the parser of `fit`, without a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cached_property
from typing import Any

import yaml

from lightning_sft import assets, command_line, plugins
from lightning_sft.cli import SFTCommand
from lightning_sft.errors import SFTError
from lightning_sft.sweeping.space import Parameter, placed

_OWN = ("config", "ckpt_path", "trainer.default_root_dir")
_LONGEST = 200  # an error that shows a whole plug-in is longer


class FitOptions(SFTCommand):
    """`fit` up to its options: nothing is made of them.

    Args:
        argv: The arguments of `fit`.
        texts: Other texts that may name plug-ins.
    """

    def __init__(self, argv: Sequence[str], texts: Sequence[str] = ()) -> None:
        argv = ["fit", *map(assets.config_path, argv)]
        command_line.check_configs(argv)
        plugins.load_named([*plugins.named_in(argv), *texts])
        super().__init__(argv)
        for key in ("ckpt_path", "trainer.default_root_dir"):
            if self.config.fit[key] is not None:
                raise SFTError("a sweep chooses it for each trial", where=f"--{key}", fix="leave it out")

    def _set_seed(self) -> None:
        """Leave the seed to the trials."""

    def before_instantiate_classes(self) -> None:
        """Claim no run folder."""

    def instantiate_classes(self) -> None:
        """Make nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Run nothing."""

    @cached_property
    def resolved(self) -> dict[str, Any]:
        """The whole configuration, as a run folder's `config.yaml` has it."""
        config: dict[str, Any] = yaml.safe_load(self._dumped())
        return config

    def accepted(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration as the parser understands it.

        Raises:
            SFTError: It has an option that the parser refuses.
        """
        parser = self._parser("fit")
        # a copy, for jsonargparse puts its own objects into lists
        dumped = parser.dump(parser.parse_object(deepcopy(dict(config))), skip_none=False)
        found: dict[str, Any] = yaml.safe_load(dumped)
        return found

    def check(self, parameters: Sequence[Parameter]) -> None:
        """Try every choice and the ends of every range, each beside the first values of those that are above it.

        Raises:
            SFTError: A key isn't an option of `fit`, or a value is refused.
        """
        values: dict[str, Any] = {}
        for parameter in sorted(parameters, key=lambda each: each.key.count(".")):
            if parameter.key in _OWN:
                raise SFTError("a sweep chooses it for each trial", where=f"--search {parameter.key}")
            first, *others = parameter.edges()
            values[parameter.key] = first
            for value in (first, *others):
                try:
                    self.accepted(placed(self.resolved, values | {parameter.key: value}))
                except SFTError as error:
                    raise _refused(parameter, value, error) from error


def _refused(parameter: Parameter, value: object, error: SFTError) -> SFTError:
    """The parser's error, with what was searched in front."""
    if (error.where or "").startswith("--search"):
        return error
    what = error.what if len(error.what) <= _LONGEST else f"{value!r} is not accepted"
    return SFTError(what, where=error.where, fix=error.fix).at(f"--search {parameter.key}={value}")
