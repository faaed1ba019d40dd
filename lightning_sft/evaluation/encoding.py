"""Requests as token ids, with the definitions of lm-evaluation-harness 0.4.

The continuation's ids are those of context and continuation together, from where the ids of the context alone end, and
are scored after the ids of the context alone, also where the two together would be merged across the boundary. White
space at the context's end goes into the continuation first. What doesn't fit goes first at the left.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from lightning_sft.conversation import Conversation
from lightning_sft.errors import SFTError
from lightning_sft.evaluation.pieces import can_cut, cut
from lightning_sft.evaluation.requests import Generate, LogLikelihood, Prompt, RollingLogLikelihood
from lightning_sft.rendering import Renderer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Ids = tuple[int, ...]

_AT_ONCE = 256  # texts; what the tokenizer tells of each is many times as large as its ids


class Scored(NamedTuple):
    """Token ids of which the last ones are scored; all together at most one more than the model's context.

    Args:
        trunk: What comes before, at least one. Requests with the same context have the same object.
        tail: The scored ones.
    """

    trunk: Ids
    tail: Ids


class RequestEncoder:
    """Encodes the requests to one model.

    Args:
        tokenizer: The model's.
        context_length: How many tokens the model takes at once.
        renderer: Renders prompts that are messages.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, context_length: int, renderer: Renderer | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.context_length = context_length
        self._renderer = renderer
        self.has_chat = renderer is not None
        """A chat template was chosen for the model, so its answers end as it says."""
        first = tokenizer.bos_token_id
        self.prefix_id = int(tokenizer.eos_token_id if first is None else first)
        """The token before an empty context: BOS, or EOS where there is none."""
        self._can_cut = can_cut(tokenizer)
        self._prefix_text = tokenizer.decode([self.prefix_id])

    @property
    def renderer(self) -> Renderer:
        """The renderer of messages; by default with the tokenizer's own chat template."""
        if self._renderer is None:
            self._renderer = Renderer(self.tokenizer)
        return self._renderer

    def text(self, prompt: Prompt) -> str:
        """The prompt as text. Where the chat template has no place for a system message, it is left out.

        Raises:
            SFTError: The chat template refuses the messages.
        """
        if isinstance(prompt, str):
            return prompt
        asked = prompt if isinstance(prompt, Conversation) else Conversation(prompt)
        try:
            return self._rendered(asked)
        except SFTError:
            if asked.messages[0].role != "system":
                raise
            warnings.warn("the chat template refuses system messages: they are left out", stacklevel=2)
            return self._rendered(replace(asked, messages=asked.messages[1:]))

    def _rendered(self, asked: Conversation) -> str:
        return self.renderer.generation_prompt(asked.messages, asked.tools, asked.chat_template_kwargs)

    def log_likelihoods(self, requests: Sequence[LogLikelihood]) -> list[Scored]:
        """What is scored for each request.

        Raises:
            SFTError: A continuation is empty, has no tokens of its own, or more than the model's context.
        """
        texts = {id(each.context): each.context for each in requests}
        contexts = {key: self.text(prompt) for key, prompt in texts.items()}
        pairs = [_split(contexts[id(each.context)], each.continuation) for each in requests]
        encoded = self._encode_pairs(pairs)
        bare = self._encode({pair[1] for pair in pairs if not pair[0]}, add_special_tokens=False)
        start: Ids = (self.prefix_id,)
        scored = []
        for request, (context, continuation) in zip(requests, pairs, strict=True):
            if not context:
                tail = bare[continuation]
                trunk, tail = start, tail[tail[:1] == start :]
            else:
                trunk, tail = encoded[context, continuation]
                trunk = trunk or start  # a context that makes no tokens
            if not request.continuation or not tail:
                raise SFTError(
                    "the continuation is empty"
                    if not request.continuation
                    else f"the continuation {request.continuation!r} has no tokens of its own after the context",
                    where=f"context ending in {context[-40:]!r}",
                    fix="give a continuation that the tokenizer doesn't merge into the context",
                )
            if len(tail) > self.context_length:
                raise SFTError(
                    f"the continuation has {len(tail)} tokens, the model's context is {self.context_length}",
                    where=f"continuation {request.continuation[:40]!r}…",
                    fix="shorten it, or ask for its RollingLogLikelihood",
                )
            scored.append(Scored(trunk[-(self.context_length + 1 - len(tail)) :], tail))
        return scored

    def _encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> dict[tuple[str, str], tuple[Ids, Ids]]:
        """Of each context that isn't empty, with its continuation: the ids of both."""
        places = {context: cut(context) if self._can_cut else 0 for context in {pair[0] for pair in pairs}}
        heads = self._encode({context[:place] for context, place in places.items() if place})
        found, todo = {}, list(dict.fromkeys(pair for pair in pairs if pair[0]))
        whole = {text for pair in todo if not places[pair[0]] for text in (pair[0], "".join(pair))}
        encoded = self._encode(whole)
        tails = {
            text
            for context, continuation in todo
            if (place := places[context])
            for text in (context[place:], context[place:] + continuation)
        }
        ends = self._encode(tails, add_special_tokens=False)
        trunks: dict[str, Ids] = {}
        for context, continuation in todo:
            if place := places[context]:
                tail = context[place:]
                before, after = ends[tail], ends[tail + continuation]
                if context not in trunks:
                    trunks[context] = heads[context[:place]] + before
            else:
                trunks[context] = before = encoded[context]
                after = encoded[context + continuation]
            found[context, continuation] = trunks[context], after[len(before) :]
        return found

    def windows(self, requests: Sequence[RollingLogLikelihood]) -> list[list[Scored]]:
        """The windows of each request's text; the tokens that the tokenizer puts first are scored, too."""
        encoded = self._encode({each.text for each in requests})
        return [list(self._windows(encoded[each.text])) for each in requests]

    def _windows(self, ids: Ids) -> Iterable[Scored]:
        size = self.context_length
        if ids:
            yield Scored((self.prefix_id,), ids[:size])
        for start in range(size, len(ids), size):
            end = min(start + size, len(ids))
            yield Scored(ids[end - size - 1 : start], ids[start:end])

    def prompts(self, requests: Sequence[Generate]) -> list[Ids]:
        """The ids of each prompt, without what doesn't fit before `max_new_tokens` more.

        Raises:
            SFTError: `max_new_tokens` leaves no room for a prompt.
        """
        texts = [self.text(each.prompt) for each in requests]
        encoded = self._encode(set(texts))
        found = []
        for request, text in zip(requests, texts, strict=True):
            room = self.context_length - request.max_new_tokens
            if request.max_new_tokens < 1 or room < 1:
                raise SFTError(
                    f"max_new_tokens is {request.max_new_tokens}, the model's context is {self.context_length}",
                    where="Generate",
                    fix="give at least 1, and fewer than the context",
                )
            found.append(encoded[text][-room:] or (self.prefix_id,))
        return found

    def _encode(self, texts: Iterable[str], add_special_tokens: bool = True) -> dict[str, Ids]:
        """The ids of each text; a text that begins with BOS as text gets no other."""
        groups: dict[bool, list[str]] = {}
        for text in texts:
            special = add_special_tokens and not text.startswith(self._prefix_text)
            groups.setdefault(special, []).append(text)
        found: dict[str, Ids] = {}
        one: dict[int, int] = {}  # an object for each id, not for each token
        for special, group in groups.items():
            left = iter(group)
            while some := list(islice(left, _AT_ONCE)):
                ids = self._ids(some, special)
                found.update(
                    (text, tuple(map(one.setdefault, i, i))) for text, i in zip(some, ids, strict=True)
                )
        return found

    def _ids(self, texts: list[str], add_special_tokens: bool) -> Iterable[list[int]]:
        if not self.tokenizer.is_fast:
            ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"]
            return ids
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        encodings = backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        return (each.ids for each in encodings)


def _split(context: str, continuation: str) -> tuple[str, str]:
    """White space at the end of the context is the continuation's."""
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation
