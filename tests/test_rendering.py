"""The law of the loss mask, held against transformers' own rendering for many templates and tokenizers."""

import numpy as np
import pytest
from chat_families import (
    BOS,
    EOS,
    FAMILIES,
    TOKENIZERS,
    build_tokenizer,
    law,
    swallowed,
    template_ids,
    trained_turns,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lightning_sft import Conversation, Message, Meta, Reason, Renderer, SFTError, ToolCall
