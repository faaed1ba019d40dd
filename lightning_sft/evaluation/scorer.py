"""Log-likelihoods and greedy answers of the model in training, in batches."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sft.example import Example
from lightning_sft.training.fsdp2 import as_forward, is_sharded
from lightning_sft.training.layout import causal_lm, evaluating, hidden_states, stock_attention

if TYPE_CHECKING:
    from lightning_sft.data.batch import Batch
    from lightning_sft.training.layout import Layout
    from lightning_sft.training.module import SFTModule


class Scorer:
    """Asks a model, without touching its training: no gradients, no dropout, no random numbers.

    With a sharded model (FSDP2) every rank has to ask, and the same.

    Args:
        module: The module whose model is asked.
        batch_size: Examples or prompts at once.
    """

    def __init__(self, module: SFTModule, batch_size: int = 32) -> None:
        self.module = module
        self.batch_size = batch_size

    def negative_log_likelihoods(self, examples: Sequence[Example]) -> list[float]:
        """Σ weight · −log p(token) of each example, in nats."""
        found = [0.0] * len(examples)
        order = sorted(range(len(examples)), key=lambda i: len(examples[i]))
        layout = self.module.layout
        with evaluating(self.module), torch.no_grad():
            for start in range(0, len(order), self.batch_size):
                chosen = order[start : start + self.batch_size]
                batch = layout.collate([examples[i] for i in chosen], 1.0).to(self.module.device)
                nll = as_forward(self.module.loaded, partial(_nll, self.module.loaded, batch, layout))
                counts = torch.tensor([int((examples[i].weights[1:] > 0).sum()) for i in chosen])
                owner = torch.arange(len(chosen)).repeat_interleave(counts).to(nll.device)
                sums = torch.zeros(len(chosen), dtype=nll.dtype, device=nll.device)
                sums.index_add_(0, owner, nll * batch.weights.to(nll.dtype))
                for index, total in zip(chosen, sums.tolist(), strict=True):
                    found[index] = total
        return found

    def generate(self, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        """The greedy continuation of each prompt, up to the end of the turn, without special tokens.

        Args:
            prompts: Texts as the model gets them: rendered with the chat template, special tokens included.
            max_new_tokens: Most tokens of an answer.
        """
        tokenizer, model = self.module.tokenizer, self.module.loaded
        pad, stops = int(tokenizer.pad_token_id), list(self.module.renderer.stop_token_ids)
        encoded = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
        answers = [""] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.module))
            stack.enter_context(stock_attention(model))
            stack.enter_context(torch.no_grad())
            for start in range(0, len(order), self.batch_size):
                chosen = order[start : start + self.batch_size]
                longest = max(len(encoded[i]) for i in chosen)
                ids = torch.tensor([[pad] * (longest - len(encoded[i])) + encoded[i] for i in chosen])
                mask = torch.tensor(
                    [[0] * (longest - len(encoded[i])) + [1] * len(encoded[i]) for i in chosen]
                )
                generate = partial(
                    causal_lm(model).generate,
                    input_ids=ids.to(self.module.device),
                    attention_mask=mask.to(self.module.device),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    eos_token_id=stops,
                    pad_token_id=pad,
                    synced_gpus=is_sharded(model),  # a rank that is done goes on until all are
                )
                out = as_forward(model, generate)
                texts = tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
                for index, text in zip(chosen, texts, strict=True):
                    answers[index] = text
        return answers


def _nll(model: nn.Module, batch: Batch, layout: Layout) -> Tensor:
    """−log p of each target of the batch: `[n]`."""
    hidden = hidden_states(model, batch, own_logits=layout.own_logits)
    chunks = zip(hidden.split(512), batch.targets.split(512), strict=True)
    return torch.cat([F.cross_entropy(layout.head(h), t, reduction="none") for h, t in chunks])
