"""Answers requests with the model in hand: log-likelihoods of given text, and generated answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Self

import torch

from lightning_sft.evaluation.encoding import RequestEncoder, Scored
from lightning_sft.evaluation.forward import Forward
from lightning_sft.evaluation.generation import Writer
from lightning_sft.evaluation.requests import (
    Answered,
    Converse,
    Conversed,
    Generate,
    Generated,
    Item,
    Likelihood,
    LogLikelihood,
    Request,
    Response,
    RollingLogLikelihood,
)
from lightning_sft.evaluation.sharing import Ids, Row, Target, batches_of, groups_of, rows_of
from lightning_sft.training.fsdp2 import gathered
from lightning_sft.training.layout import evaluating, stock_attention
from lightning_sft.training.models import context_length as context_length_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from lightning_sft.example import Example
    from lightning_sft.rendering import Renderer
    from lightning_sft.training.module import SFTModule

_UNKNOWN_CONTEXT = 2048  # lm-evaluation-harness's, too
_CACHE_BYTES = 384 << 20


class Scorer:
    """Asks a model, without touching its training: no gradients, no dropout, no random numbers.

    The definitions (how text is tokenised at the boundary, BOS, truncation, windows, stop texts) are those of
    lm-evaluation-harness 0.4. Answers don't depend on the order of the requests or the size of batches, beyond
    the rounding of the model's precision. With a sharded model (FSDP2) every rank has to ask, and the same.

    Args:
        model: A causal language model of transformers, or peft's wrapper of one.
        tokenizer: Its tokenizer.
        renderer: Renders prompts that are messages; by default with the tokenizer's own chat template.
        context_length: How many tokens the model takes at once; by default what its configuration says.
        batch_tokens: Padded tokens of a batch; by default 512 on a CPU, which its caches like, else 16,384.
            Answers are written in batches eight times as large, whose keys and values take at most 384 MiB, on a GPU
            an eighth of its memory.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        renderer: Renderer | None = None,
        *,
        context_length: int | None = None,
        batch_tokens: int | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        on_cpu = next(model.parameters()).device.type == "cpu"
        self.batch_tokens = batch_tokens or (512 if on_cpu else 16_384)
        if context_length is None:
            context_length = context_length_of(model.config, tokenizer) or _UNKNOWN_CONTEXT
        self.encoder = RequestEncoder(tokenizer, context_length, renderer)

    @classmethod
    def of(cls, module: SFTModule, *, batch_tokens: int | None = None) -> Self:
        """The Scorer of a module's model, with its tokenizer and chat template."""
        return cls(module.loaded, module.tokenizer, module.renderer, batch_tokens=batch_tokens)

    def run(self, requests: Sequence[Request]) -> list[Response]:
        """The response to each request, in their order; raises as `stream`."""
        found: dict[int, Response] = dict(self.stream(requests))
        return [found[number] for number in range(len(requests))]

    def answer(self, items: Sequence[Item]) -> list[Answered]:
        """The items with the responses to their requests, in their order; raises as `stream`."""
        answered = dict(self.stream_items(items))
        return [answered[number] for number in range(len(items))]

    def stream_items(self, items: Sequence[Item]) -> Iterator[tuple[int, Answered]]:
        """The index of each item with its responses, as they are complete; raises as `stream`."""
        places = [(n, place) for n, item in enumerate(items) for place in range(len(item.requests))]
        found: list[dict[int, Response]] = [{} for _ in items]
        yield from ((n, Answered(item, ())) for n, item in enumerate(items) if not item.requests)
        for index, response in self.stream([request for item in items for request in item.requests]):
            number, place = places[index]
            item, responses = items[number], found[number]
            responses[place] = response
            if len(responses) == len(item.requests):
                yield number, Answered(item, tuple(responses[n] for n in range(len(item.requests))))

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Response]]:
        """The index of each request with the response to it, as they are ready.

        Raises:
            SFTError: A request can't be answered: an empty continuation, or one longer than the model's context;
                no room for a prompt. Before anything is computed.
        """
        single = [(n, each) for n, each in enumerate(requests) if isinstance(each, LogLikelihood)]
        rolling = [(n, each) for n, each in enumerate(requests) if isinstance(each, RollingLogLikelihood)]
        written = [(n, each) for n, each in enumerate(requests) if isinstance(each, Generate)]
        talked = [(n, each) for n, each in enumerate(requests) if isinstance(each, Converse)]
        scored = self.encoder.log_likelihoods([each for _, each in single])
        parts = [(number, 1) for number, _ in single]
        for (number, _), windows in zip(
            rolling, self.encoder.windows([each for _, each in rolling]), strict=True
        ):
            scored += windows
            parts.append((number, len(windows)))
        prompts = self.encoder.prompts([each for _, each in written])
        self.encoder.prompts([each.next(()) for _, each in talked])
        yield from self._likelihoods(scored, parts)
        if written:
            answers = self._generated([each for _, each in written], prompts)
            yield from ((written[index][0], answer) for index, answer in answers)
        yield from self._conversed(talked)

    def negative_log_likelihoods(self, examples: Sequence[Example]) -> list[float]:
        """Σ weight · −log p(token) of each rendered example, in nats."""
        rows = []
        for number, example in enumerate(examples):
            ids = tuple(example.input_ids.tolist())
            places = [place for place in range(1, len(ids)) if example.weights[place] > 0]
            rows.append(Row(ids[:-1], 1, targets=[Target(p - 1, ids[p], number) for p in places]))
        totals = [0.0] * len(examples)
        for row, values, _ in self._scored([row for row in rows if row.targets]):
            number = row.targets[0].owner
            weights = examples[number].weights
            totals[number] = -sum(
                float(weights[target.position + 1]) * value
                for target, value in zip(row.targets, values, strict=True)
            )
        return totals

    @cached_property
    def _forward(self) -> Forward:
        return Forward(self.model)

    @contextmanager
    def _asking(self) -> Iterator[Forward]:
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.model))
            stack.enter_context(stock_attention(self.model))
            stack.enter_context(torch.no_grad())
            stack.enter_context(gathered(self.model))
            yield self._forward

    def _likelihoods(
        self, scored: Sequence[Scored], parts: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[int, Likelihood]]:
        """The sums over the parts (request, number of its entries in `scored`) as they become complete."""
        owners = [part for part, (_, size) in enumerate(parts) for _ in range(size)]
        missing = [0] * len(parts)
        for each, owner in zip(scored, owners, strict=True):
            missing[owner] += len(each.tail)
        tokens = list(missing)
        sums, greedy = [0.0] * len(parts), [True] * len(parts)
        yield from ((number, Likelihood(0.0, 0, True)) for number, size in parts if not size)
        with self._asking() as forward:
            rows = rows_of(scored, branching=forward.branches)
        for row, values, likeliest in self._scored(rows):
            for target, value, is_likeliest in zip(row.targets, values, likeliest, strict=True):
                owner = owners[target.owner]
                sums[owner] += value
                greedy[owner] &= is_likeliest
                missing[owner] -= 1
                if not missing[owner]:
                    yield parts[owner][0], Likelihood(sums[owner], tokens[owner], greedy[owner])

    def _scored(self, rows: Sequence[Row]) -> Iterator[tuple[Row, list[float], list[bool]]]:
        """Each row with log p of its targets, and whether each is the likeliest token."""
        if not rows:
            return
        with self._asking() as forward:
            groups = groups_of(rows, forward.longest_sharing)
        for group in groups:
            beginning = None
            for batch in batches_of(group, self.batch_tokens):
                with self._asking():
                    if group.shared and beginning is None:
                        beginning = forward.beginning(batch[0].ids[: group.shared])
                    hidden = forward.hidden(batch, beginning)
                    targets = [target for row in batch for target in row.targets]
                    values, likeliest = forward.log_probabilities(hidden, [t.token for t in targets])
                start = 0
                for row in batch:
                    end = start + len(row.targets)
                    yield row, values[start:end], likeliest[start:end]
                    start = end

    def _generated(
        self, requests: Sequence[Generate], prompts: Sequence[Ids]
    ) -> Iterator[tuple[int, Generated]]:
        asked: dict[tuple[object, ...], list[int]] = {}
        for index, (each, ids) in enumerate(zip(requests, prompts, strict=True)):
            asked.setdefault((ids, each.stop, each.max_new_tokens, each.temperature), []).append(index)
        rows: dict[int, list[Row]] = {}
        for same in asked.values():
            ids = prompts[same[0]]
            row = Row(ids, len(ids), targets=[Target(0, 0, index) for index in same])
            rows.setdefault(requests[same[0]].max_new_tokens, []).append(row)
        for new, alike in rows.items():
            with self._asking() as forward:
                longest, cached = forward.longest_sharing, _room(forward) // forward.cache_bytes
                groups = groups_of(alike, None if longest is None else max(0, longest - new))
            for group in groups:
                beginning = None
                for batch in batches_of(group, 8 * self.batch_tokens, new, cached):
                    with self._asking():
                        if group.shared and beginning is None:
                            beginning = forward.beginning(batch[0].ids[: group.shared])
                        chosen = [requests[row.targets[0].owner] for row in batch]
                        writer = Writer(forward, self.tokenizer, self._stop_ids(requests))
                        answers = writer.write(chosen, [row.ids for row in batch], beginning)
                    for row, answer in zip(batch, answers, strict=True):
                        yield from ((target.owner, answer) for target in row.targets)

    def _conversed(self, requests: Sequence[tuple[int, Converse]]) -> Iterator[tuple[int, Conversed]]:
        """The answers to all turns: the first ones of all requests, then the second ones, and so on."""
        found: dict[int, list[Generated]] = {number: [] for number, _ in requests}
        for turn in range(max((len(each.turns) for _, each in requests), default=0)):
            numbers = [number for number, each in requests if len(each.turns) > turn]
            asked = [
                each.next([answer.text for answer in found[number]])
                for number, each in requests
                if len(each.turns) > turn
            ]
            for index, answer in self._generated(asked, self.encoder.prompts(asked)):
                found[numbers[index]].append(answer)
            yield from (
                (number, Conversed(tuple(found[number])))
                for number, each in requests
                if len(each.turns) == turn + 1
            )

    def _stop_ids(self, requests: Sequence[Generate]) -> frozenset[int]:
        """What ends an answer: the model's and the tokenizer's EOS, and in a chat the template's ends of turn."""
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        ids = {self.tokenizer.eos_token_id}
        ids.update(configured if isinstance(configured, list) else [configured])
        if self.encoder.has_chat or any(not isinstance(each.prompt, str) for each in requests):
            ids.update(self.encoder.renderer.stop_token_ids)
        return frozenset(ids - {None})


def _room(forward: Forward) -> int:
    """How many bytes the keys and values of one batch may take: the same for all ranks, which a sharded model needs."""
    if forward.device.type == "cuda":
        return torch.cuda.mem_get_info(forward.device)[1] // 8
    return _CACHE_BYTES
