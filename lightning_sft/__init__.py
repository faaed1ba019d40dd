"""lightning-sft: supervised fine-tuning of causal language models on PyTorch Lightning.

The names below are the public surface; they are imported when first used, so that this import is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "ANSWER_FORMATS": "lightning_sft.evaluation.validity",
    "Adapter": "lightning_sft.bases",
    "Answered": "lightning_sft.evaluation.requests",
    "BatchPlan": "lightning_sft.data.plan",
    "Conversation": "lightning_sft.conversation",
    "Converse": "lightning_sft.evaluation.requests",
    "Conversed": "lightning_sft.evaluation.requests",
    "DataFormat": "lightning_sft.bases",
    "Evaluator": "lightning_sft.bases",
    "Example": "lightning_sft.example",
    "Filter": "lightning_sft.bases",
    "Generate": "lightning_sft.evaluation.requests",
    "Generated": "lightning_sft.evaluation.requests",
    "Item": "lightning_sft.evaluation.requests",
    "ItemText": "lightning_sft.evaluation.requests",
    "Likelihood": "lightning_sft.evaluation.requests",
    "LogLikelihood": "lightning_sft.evaluation.requests",
    "Loss": "lightning_sft.bases",
    "Message": "lightning_sft.conversation",
    "Meta": "lightning_sft.conversation",
    "PartWeight": "lightning_sft.conversation",
    "Predictions": "lightning_sft.evaluation.divergence",
    "RateGroup": "lightning_sft.bases",
    "Record": "lightning_sft.evaluation.results",
    "RenderPolicies": "lightning_sft.rendering",
    "Renderer": "lightning_sft.rendering",
    "Results": "lightning_sft.evaluation.results",
    "RollingLogLikelihood": "lightning_sft.evaluation.requests",
    "Row": "lightning_sft.conversation",
    "RowExpression": "lightning_sft.row_template",
    "RowTemplate": "lightning_sft.row_template",
    "SFTDataModule": "lightning_sft.data.datamodule",
    "SFTError": "lightning_sft.errors",
    "SFTModule": "lightning_sft.training.module",
    "Score": "lightning_sft.evaluation.results",
    "Scorer": "lightning_sft.evaluation.scorer",
    "Segments": "lightning_sft.conversation",
    "SetFilter": "lightning_sft.bases",
    "Source": "lightning_sft.data.sources",
    "TextLoss": "lightning_sft.evaluation.divergence",
    "TokenBatch": "lightning_sft.bases",
    "ToolCall": "lightning_sft.conversation",
    "Verdict": "lightning_sft.bases",
    "is_valid_format": "lightning_sft.evaluation.validity",
    "read_conversations": "lightning_sft.data.conversion",
    "scores_by_task": "lightning_sft.evaluation.results",
    "read_rows": "lightning_sft.data.sources",
    "text_losses": "lightning_sft.evaluation.divergence",
    "turns": "lightning_sft.conversation",
    "full_tensor": "lightning_sft.training.shards",
    "checksum": "lightning_sft.training.fingerprint",
}

if TYPE_CHECKING:
    from lightning_sft.bases import (
        Adapter,
        DataFormat,
        Evaluator,
        Filter,
        Loss,
        RateGroup,
        SetFilter,
        TokenBatch,
        Verdict,
    )
    from lightning_sft.conversation import (
        Conversation,
        Message,
        Meta,
        PartWeight,
        Row,
        Segments,
        ToolCall,
        turns,
    )
    from lightning_sft.data.conversion import read_conversations
    from lightning_sft.data.datamodule import SFTDataModule
    from lightning_sft.data.plan import BatchPlan
    from lightning_sft.data.sources import Source, read_rows
    from lightning_sft.errors import SFTError
    from lightning_sft.evaluation.divergence import Predictions, TextLoss, text_losses
    from lightning_sft.evaluation.requests import (
        Answered,
        Converse,
        Conversed,
        Generate,
        Generated,
        Item,
        ItemText,
        Likelihood,
        LogLikelihood,
        RollingLogLikelihood,
    )
    from lightning_sft.evaluation.results import Record, Results, Score, scores_by_task
    from lightning_sft.evaluation.scorer import Scorer
    from lightning_sft.evaluation.validity import ANSWER_FORMATS, is_valid_format
    from lightning_sft.example import Example
    from lightning_sft.rendering import Renderer, RenderPolicies
    from lightning_sft.row_template import RowExpression, RowTemplate
    from lightning_sft.training.fingerprint import checksum
    from lightning_sft.training.module import SFTModule
    from lightning_sft.training.shards import full_tensor

__all__ = [
    "ANSWER_FORMATS",
    "Adapter",
    "Answered",
    "BatchPlan",
    "Conversation",
    "Converse",
    "Conversed",
    "DataFormat",
    "Evaluator",
    "Example",
    "Filter",
    "Generate",
    "Generated",
    "Item",
    "ItemText",
    "Likelihood",
    "LogLikelihood",
    "Loss",
    "Message",
    "Meta",
    "PartWeight",
    "Predictions",
    "RateGroup",
    "Record",
    "RenderPolicies",
    "Renderer",
    "Results",
    "RollingLogLikelihood",
    "Row",
    "RowExpression",
    "RowTemplate",
    "SFTDataModule",
    "SFTError",
    "SFTModule",
    "Score",
    "Scorer",
    "Segments",
    "SetFilter",
    "Source",
    "TextLoss",
    "TokenBatch",
    "ToolCall",
    "Verdict",
    "checksum",
    "full_tensor",
    "is_valid_format",
    "read_conversations",
    "read_rows",
    "scores_by_task",
    "text_losses",
    "turns",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'lightning_sft' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
