"""What `fit --print_config` says behind the configuration: the learning rate of each group of parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from lightning_sft.errors import SFTError

if TYPE_CHECKING:
    from lightning_sft.training.module import SFTModule

_HEADLINE = "# Peak learning rates of the parameter groups"


@contextmanager
def rates_behind_config() -> Iterator[None]:
    """Print the configuration that is printed in here, and the rates behind it, as YAML comments."""
    printed = StringIO()
    try:
        with redirect_stdout(printed):
            yield
    finally:
        text = printed.getvalue()
        print(text, end="", flush=True)
        print("".join(f"{line}\n" for line in comments(text)), end="")


def comments(config: str) -> list[str]:
    """The rates of a configuration of `fit` in YAML, as lines of comments; none where all parameters have the same.

    The model is built without its weights, as `plan` does; where that can't be done here, a line says why.
    """
    try:
        return _comments(yaml.safe_load(config))
    except Exception as error:  # a print of options must not fail by a model or an adapter
        lines = str(error).strip().splitlines()
        return [f"{_HEADLINE} aren't known here: {lines[0] if lines else type(error).__name__}"]


def _comments(config: object) -> list[str]:
    if not isinstance(config, dict) or "base" not in (config.get("model") or {}):
        return []
    module = _module(config["model"])
    if not module.adapter.has_rate_groups:
        return []
    from lightning_sft.training import optimizers
    from lightning_sft.training.peak_memory import without_numbers

    module.base = _here(module.base, module.revision)
    if module.new_tokens and module.tokenizer_name is not None:
        module.tokenizer_name = _here(module.tokenizer_name, None)
    groups = optimizers.parameter_groups(without_numbers(module))
    return [f"{_HEADLINE}:", *(f"#   {line}" for line in optimizers.rates_in_words(groups))]


def _module(options: dict[str, object]) -> SFTModule:
    from lightning_sft.cli import Parser
    from lightning_sft.training.module import SFTModule

    parser = Parser()
    parser.add_lightning_class_args(SFTModule, "model")
    module: SFTModule = parser.instantiate(parser.parse_object({"model": options})).model
    return module


def _here(name: str, revision: str | None) -> str:
    """The folder of a model on this machine: itself, or in the Hub's cache.

    Raises:
        SFTError: It isn't here; nothing is downloaded.
    """
    from huggingface_hub import try_to_load_from_cache

    if Path(name).is_dir():
        return name
    found = try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(found, str):
        raise SFTError(f"{name} isn't on this machine")
    return str(Path(found).parent)
