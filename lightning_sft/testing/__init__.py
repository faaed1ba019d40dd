"""The conformance kit: what every plug-in of a kind has to do, as tests to inherit.

    from lightning_sft.testing import FormatTests
    from my_formats import QuestionAnswer

    class TestQuestionAnswer(FormatTests):
        plugin = QuestionAnswer
        rows = ({"question": "Why?", "answer": "So."},)
        bad_rows = ({"question": "Why?", "answer": ""},)

Each test calls a law: a function that raises AssertionError with what is wrong. `lightning-sft plugins --check` calls
the same ones; neither pytest nor anything else beyond lightning-sft is needed for it.
"""

from lightning_sft.testing.adapters import AdapterTests
from lightning_sft.testing.callbacks import CallbackTests
from lightning_sft.testing.evaluators import EvaluatorTests
from lightning_sft.testing.filters import FilterTests
from lightning_sft.testing.formats import FormatTests
from lightning_sft.testing.losses import LossTests
from lightning_sft.testing.plugin import MissingSample, PluginTests

__all__ = [
    "AdapterTests",
    "CallbackTests",
    "EvaluatorTests",
    "FilterTests",
    "FormatTests",
    "LossTests",
    "MissingSample",
    "PluginTests",
]
