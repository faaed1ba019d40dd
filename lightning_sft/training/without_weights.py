"""What is known of a model before any weight is loaded: its configuration, tokenizer and chat template."""

from __future__ import annotations

from dataclasses import asdict
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule

from lightning_sft.rendering import Renderer, RenderPolicies
from lightning_sft.training.models import context_length, load_config, load_tokenizer
from lightning_sft.training.new_tokens import NewTokens, add_tokens

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


class WithoutWeights(LightningModule):
    """The part of `SFTModule` that data preparation and `preview` need."""

    base: str
    revision: str | None
    trust_remote_code: bool
    tokenizer_name: str | None
    new_tokens: list[str]
    chat_template: str | None
    chat_template_kwargs: dict[str, Any] | None
    render: RenderPolicies

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, the override or the base's own, with the new tokens."""
        return self._tokenizer_and_rows[0]

    @cached_property
    def rows(self) -> NewTokens:
        """The rows that the embeddings need: the base's, and those of new tokens."""
        return (self._tokenizer_and_rows[1] if self.new_tokens else None) or NewTokens(self._base_rows)

    @property
    def _base_rows(self) -> int:
        return int(self.base_config.get_text_config().vocab_size)

    @cached_property
    def _tokenizer_and_rows(self) -> tuple[PreTrainedTokenizerBase, NewTokens | None]:
        other = self.tokenizer_name
        tokenizer = load_tokenizer(
            self.base if other is None else other,
            revision=self.revision if other is None else None,
            trust_remote_code=self.trust_remote_code,
            key="model.base" if other is None else "model.tokenizer",
        )
        names = self.new_tokens
        return tokenizer, add_tokens(tokenizer, names, self._base_rows) if names else None

    def use_tokenizer(self, folder: str) -> None:
        """Take the tokenizer and the chat template of a model's folder, which new tokens and options are in already."""
        self.tokenizer_name, self.new_tokens = folder, []
        self.chat_template, self.chat_template_kwargs = None, None
        for cached in ("_tokenizer_and_rows", "rows", "renderer"):
            vars(self).pop(cached, None)

    @cached_property
    def base_config(self) -> PretrainedConfig:
        """The base's configuration."""
        return load_config(self.base, revision=self.revision, trust_remote_code=self.trust_remote_code)

    @property
    def vocabulary(self) -> int:
        """How many token ids the embeddings have, with those of new tokens."""
        return self.rows.size

    @property
    def context_length(self) -> int | None:
        """How many tokens the base can take at once."""
        return context_length(self.base_config, self.tokenizer)

    @cached_property
    def renderer(self) -> Renderer:
        """Renders conversations with this model's tokenizer and chat template."""
        return Renderer(self.tokenizer, self.chat_template, self.chat_template_kwargs, **asdict(self.render))
