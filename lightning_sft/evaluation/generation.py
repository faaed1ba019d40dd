"""Answers written in batches: each row stops by itself, finished rows make room, a shared beginning is computed once.

Prompts are padded at the left, between what they share and what is their own; their positions leave no gap. Keys and
values have their room from the start, so that no step copies them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.cache_utils import DynamicLayer

from lightning_sft.evaluation.forward import Beginning, Forward
from lightning_sft.evaluation.requests import Generate, Generated
from lightning_sft.evaluation.sharing import Ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class _RoomLayer(DynamicLayer):
    """Keys and values in tensors with room for all that is to come."""

    def __init__(self, rows: int, room: int, shared: int, keys: Tensor | None, values: Tensor | None) -> None:
        super().__init__()
        self.rows, self.room, self.length = rows, room, shared
        if keys is not None and values is not None:
            self.lazy_initialization(keys, values)
            self.keys[:, :, :shared], self.values[:, :, :shared] = keys, values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        heads = (self.rows, key_states.shape[1], self.room)
        self.keys = key_states.new_empty(*heads, key_states.shape[-1])
        self.values = value_states.new_empty(*heads, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[-2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        return self.length


@dataclass(slots=True)
class _Answer:
    """One answer as it is being written."""

    index: int
    stops: tuple[str, ...]
    lookback: int
    random: torch.Generator | None
    prompt: Ids
    ids: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Writer:
    """Writes answers with one model.

    Args:
        forward: The model.
        tokenizer: Its tokenizer.
        stop_ids: The ids that end every answer.
    """

    forward: Forward
    tokenizer: PreTrainedTokenizerBase
    stop_ids: frozenset[int]

    def write(
        self, requests: Sequence[Generate], prompts: Sequence[Ids], beginning: Beginning | None
    ) -> list[Generated]:
        """The answers to one batch of prompts, whose requests ask for as many tokens.

        Args:
            requests: What is asked.
            prompts: Their ids.
            beginning: What the prompts begin with, computed before.
        """
        if not self.forward.has_cache:
            return [self._alone(*pair) for pair in zip(requests, prompts, strict=True)]
        shared = beginning.shared if beginning else 0
        most = max(each.max_new_tokens for each in requests)
        longest = max(map(len, prompts)) - shared
        pads = torch.tensor([longest + shared - len(prompt) for prompt in prompts])
        ids = torch.tensor([[0] * int(pad) + list(p[shared:]) for pad, p in zip(pads, prompts, strict=True)])
        slots = torch.arange(shared + longest + most)
        mask = (slots < shared) | (slots >= shared + pads[:, None])
        cache = self._cache(len(prompts), len(slots), beginning)
        steps = _Steps(self.forward, ids, mask, pads, cache, shared)
        penalties = self._penalties()
        writing = [self._begun(*each) for each in zip(range(len(requests)), requests, prompts, strict=True)]
        done: dict[int, Generated] = {}
        for logits in steps:
            tokens = _chosen(penalties(logits, writing), writing, requests)
            for answer, token in zip(writing, tokens, strict=True):
                answer.ids.append(token)
            ended = self._ended(writing, requests)
            for answer, has_ended in zip(writing, ended, strict=True):
                if has_ended:
                    done[answer.index] = self._finished(answer)
            if all(ended):
                break
            kept = [place for place, has_ended in enumerate(ended) if not has_ended]
            steps.go_on([tokens[place] for place in kept], kept)
            writing = [writing[place] for place in kept]
        return [done[index] for index in range(len(requests))]

    def _cache(self, rows: int, room: int, beginning: Beginning | None) -> DynamicCache:
        cache = DynamicCache()
        layers = self.forward.inner.config.get_text_config().num_hidden_layers
        for number in range(layers):
            keys, values = (beginning.keys[number], beginning.values[number]) if beginning else (None, None)
            cache.layers.append(_RoomLayer(rows, room, beginning.shared if beginning else 0, keys, values))
        return cache

    def _penalties(self) -> _Penalties:
        config = self.forward.inner.generation_config
        found: list[LogitsProcessor] = []
        if (penalty := config.repetition_penalty) not in (None, 1.0):
            found.append(RepetitionPenaltyLogitsProcessor(penalty))
        if config.no_repeat_ngram_size:
            found.append(NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
        return _Penalties(found)

    def _begun(self, index: int, request: Generate, prompt: Ids) -> _Answer:
        lengths = [len(self.tokenizer.encode(stop, add_special_tokens=False)) for stop in request.stop]
        random = None
        if request.temperature > 0:
            seed = hashlib.sha256(repr(request).encode()).digest()[:8]
            random = torch.Generator().manual_seed(int.from_bytes(seed, "big") >> 1)
        return _Answer(index, request.stop, max(lengths, default=0) + 2, random, prompt)

    def _ended(self, writing: Sequence[_Answer], requests: Sequence[Generate]) -> list[bool]:
        """Whether each answer ends with its last token: a stop id, a stop text, or as many tokens as were asked."""
        tails = self.tokenizer.batch_decode([answer.ids[-answer.lookback :] for answer in writing])
        return [
            answer.ids[-1] in self.stop_ids
            or len(answer.ids) >= requests[answer.index].max_new_tokens
            or any(stop in tail for stop in answer.stops if stop)
            for answer, tail in zip(writing, tails, strict=True)
        ]

    def _finished(self, answer: _Answer) -> Generated:
        kept = answer.ids[:-1] if answer.ids[-1] in self.stop_ids else answer.ids
        text = self.tokenizer.decode(kept, skip_special_tokens=True)
        for stop in filter(None, answer.stops):
            text = text.split(stop)[0]
        return Generated(text, len(answer.ids))

    def _alone(self, request: Generate, prompt: Ids) -> Generated:
        """One answer without a cache of keys and values: what models with another kind of memory need."""
        answer, penalties = self._begun(0, request, prompt), self._penalties()
        while True:
            row = torch.tensor([[*prompt, *answer.ids]], device=self.forward.device)
            logits = self.forward.head(self.forward.states(input_ids=row)[:, -1])
            answer.ids += _chosen(penalties(logits, [answer]), [answer], [request])
            if self._ended([answer], [request])[0]:
                return self._finished(answer)


@dataclass(frozen=True, slots=True)
class _Penalties:
    """What the model's generation configuration takes off tokens that were there before, in prompt or answer."""

    processors: Sequence[LogitsProcessor]

    def __call__(self, logits: Tensor, writing: Sequence[_Answer]) -> Tensor:
        """The logits `[rows, V]`, penalised row by row: each has its own length."""
        if not self.processors:
            return logits
        rows = []
        for row, answer in zip(logits.float().split(1), writing, strict=True):
            ids = torch.tensor([[*answer.prompt, *answer.ids]], device=logits.device)
            for processor in self.processors:
                row = processor(ids, row)
            rows.append(row)
        return torch.cat(rows)


class _Steps:
    """The logits of the next token of each row, step by step."""

    def __init__(
        self, forward: Forward, ids: Tensor, mask: Tensor, pads: Tensor, cache: DynamicCache, shared: int
    ) -> None:
        self.forward, self.cache = forward, cache
        self.ids = ids.to(forward.device)
        self.mask = mask.to(forward.device)
        self.pads = pads.to(forward.device)
        self.slots = self.shared = shared

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            start, self.slots = self.slots, self.slots + self.ids.shape[1]
            inputs: dict[str, Any] = {"input_ids": self.ids, "past_key_values": self.cache, "use_cache": True}
            if bool(self.pads.any()):
                inputs["attention_mask"] = self.mask[:, : self.slots].long()
            if self.forward.has_positions:
                slots = torch.arange(start, self.slots, device=self.forward.device)
                inputs["position_ids"] = (slots - self.pads[:, None]).clamp_min(self.shared)
            yield self.forward.head(self.forward.states(**inputs)[:, -1])

    def go_on(self, tokens: Sequence[int], kept: Sequence[int]) -> None:
        """Go on with these tokens, in the kept rows only."""
        if len(kept) < len(self.ids):
            rows = torch.tensor(kept, device=self.forward.device)
            self.mask, self.pads = self.mask[rows], self.pads[rows]
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[rows], layer.values[rows]
        self.ids = torch.tensor(tokens, device=self.forward.device)[:, None]


def _chosen(logits: Tensor, writing: Sequence[_Answer], requests: Sequence[Generate]) -> list[int]:
    """The next token of each answer: the likeliest one, or one drawn."""
    tokens: list[int] = logits.argmax(-1).tolist()
    for place, answer in enumerate(writing):
        if answer.random is not None:
            heat = requests[answer.index].temperature
            chances = (logits[place].float().cpu() / heat).softmax(-1)
            tokens[place] = int(torch.multinomial(chances, 1, generator=answer.random))
    return tokens
