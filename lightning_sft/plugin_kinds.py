"""The kinds of plug-in: one entry each. Whatever is done for every kind walks this table.

A new kind is an entry here, a base in `lightning_sft.bases`, tests in `lightning_sft.testing`, and two templates in
`lightning_sft/plugin_template/`, named after the kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module

GROUP_PREFIX = "lightning_sft."
"""An entry-point group is this and a kind's name."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of plug-in.

    Args:
        name: The kind's name, in the plural: the last part of its entry-point group.
        one: One of them, in words.
        base: The class that they subclass: `module:attribute`.
        tests: The mixin of `lightning_sft.testing` that each has to pass: `module:attribute`; None: none yet.
        in_yaml: The lines of a configuration that name one, with `{name}` in its place.
        light: Whether commands that need no torch load such plug-ins.
    """

    name: str
    one: str
    base: str
    tests: str | None = None
    in_yaml: str = ""
    light: bool = False

    @property
    def group(self) -> str:
        """The entry-point group."""
        return GROUP_PREFIX + self.name

    def load_base(self) -> type | None:
        """The class that plug-ins of this kind subclass; None if there is none yet."""
        return _load(self.base)

    def load_tests(self) -> type | None:
        """The kind's mixin of the conformance kit; None if there is none yet."""
        return None if self.tests is None else _load(self.tests)


def _load(target: str) -> type | None:
    module, _, attribute = target.partition(":")
    loaded: type | None = getattr(import_module(module), attribute, None)
    return loaded


KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            "formats",
            "format",
            "lightning_sft.bases:DataFormat",
            "lightning_sft.testing.formats:FormatTests",
            "data:\n  train: [{path: rows.jsonl, format: {name}}]",
            light=True,
        ),
        Kind(
            "filters",
            "filter",
            "lightning_sft.bases:Filter",
            "lightning_sft.testing.filters:FilterTests",
            "data:\n  filters: [{name}]",
            light=True,
        ),
        Kind(
            "adapters",
            "adapter",
            "lightning_sft.bases:Adapter",
            "lightning_sft.testing.adapters:AdapterTests",
            "model:\n  adapter: {name}",
        ),
        Kind(
            "losses",
            "loss",
            "lightning_sft.bases:Loss",
            "lightning_sft.testing.losses:LossTests",
            "model:\n  loss: {name}",
        ),
        Kind(
            "callbacks",
            "callback",
            "lightning.pytorch:Callback",
            "lightning_sft.testing.callbacks:CallbackTests",
            "trainer:\n  callbacks: [{name}]",
        ),
        Kind(
            "evaluators",
            "evaluator",
            "lightning_sft.bases:Evaluator",
            "lightning_sft.testing.evaluators:EvaluatorTests",
            "evaluators: [{name}]",
        ),
    )
}
