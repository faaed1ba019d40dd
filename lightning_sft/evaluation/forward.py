"""One model's forward passes for evaluation: shared beginnings, branches, and the head only where it counts.

What a model can share is found by trying it, as its layout for training is: a trial of shared keys and values and of
branches must give what each row alone gives. A model that fails it, and rows longer than a sliding window, are
computed row by row, which is exact for all.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lightning_sft.evaluation.encoding import Scored
from lightning_sft.evaluation.sharing import Row, Target, rows_of
from lightning_sft.training.compiling import blocks_of
from lightning_sft.training.head import Head
from lightning_sft.training.layout import apart, backbone, causal_lm, choose_head, tolerance, works_around

if TYPE_CHECKING:
    from transformers import Cache

_TRIAL = [
    Scored(tuple(range(7)), (3, 5)),
    Scored(tuple(range(7)), (3, 6, 1)),
    Scored(tuple(range(7)), (4, 2, 2)),
    Scored(tuple(range(7)), (4,)),
    Scored((*range(5), 9, 8, 1), (5, 3)),
]
_LOGITS_AT_ONCE = 1 << 23


@dataclass(slots=True)
class Beginning:
    """The keys and values of tokens that rows share.

    Args:
        keys: `[1, heads, shared, size]` for each layer.
        values: Likewise.
        shared: How many tokens.
    """

    keys: list[Tensor]
    values: list[Tensor]
    shared: int


class Forward:
    """Computes hidden states and log-probabilities of one model, in the mode that it is in.

    Args:
        model: A causal language model of transformers, or peft's wrapper of one, with transformers' own attention.
    """

    def __init__(self, model: nn.Module) -> None:
        self.inner = causal_lm(model)
        self.backbone = backbone(self.inner)
        self.own_logits = False
        self.device = self.inner.get_input_embeddings().weight.device
        row = torch.arange(1, 8, device=self.device)[None] % self.inner.config.get_text_config().vocab_size
        known = inspect.signature(self.backbone.forward).parameters
        self.has_positions = "position_ids" in known
        config = self.inner.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ())
        window = getattr(config, "sliding_window", None)
        if window and getattr(config, "use_sliding_window", True) is False:
            window = None
        self.window: int | None = window or None
        self.around = model if model is not self.inner and works_around(model, self.inner, row) else None
        """The wrapper of an adapter that adds virtual tokens: its rows are computed whole, and share nothing."""
        self.head, self.own_logits = choose_head(self.inner, row, self.states(input_ids=row))
        if self.around is not None:
            self.head, self.own_logits = Head(nn.Identity()), True
        whole = self.has_positions and not getattr(config, "alibi", False)
        odd = kinds - {"full_attention", "sliding_attention"}
        self.has_cache = "past_key_values" in known and not odd and self.around is None
        self._mlp: nn.Module | None = None
        self._mlp = self._last_mlp()
        """The last block's feed-forward part, where it may be computed only for what is read."""
        self.shares = self.has_cache and whole and not (window and window < 16)
        self.shares = self.shares and self._trial_holds(branching=False)
        self.branches = self.shares and not window and self._trial_holds(branching=True)

    @property
    def longest_sharing(self) -> int | None:
        """Rows that are longer share nothing; None: there is no such limit."""
        return self.window if self.shares else 0

    def states(self, **inputs: Any) -> Tensor:
        """The model's last hidden states `[B, T, H]`, or its logits `[B, T, V]`: what `head` takes."""
        inputs = {"use_cache": False} | inputs
        if self.around is not None:
            ids = inputs["input_ids"]
            mask = torch.ones_like(ids)
            logits: Tensor = self.around(input_ids=ids, attention_mask=mask, use_cache=False).logits
            return logits[:, -ids.shape[1] :]
        out: Tensor = self.inner(**inputs).logits if self.own_logits else self.backbone(**inputs)[0]
        return out

    def beginning(self, ids: Sequence[int]) -> Beginning:
        """The keys and values of these tokens."""
        cache = DynamicCache()
        row = torch.tensor([list(ids)], device=self.device)
        self.backbone(input_ids=row, past_key_values=cache, use_cache=True)
        return Beginning(
            [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers], len(ids)
        )

    @cached_property
    def cache_bytes(self) -> int:
        """What the keys and values of one token take; 1 where the model has none."""
        if not self.has_cache:
            return 1
        found = self.beginning([0])
        return sum(each.nbytes for each in (*found.keys, *found.values)) or 1

    def hidden(self, rows: Sequence[Row], beginning: Beginning | None = None) -> Tensor:
        """The last hidden states (or logits) at all targets of the rows, `[n, H]`; rows padded at the right.

        Args:
            rows: Which tokens; their targets say where.
            beginning: What they all begin with, computed before.
        """
        shared = beginning.shared if beginning else 0
        longest = max(map(len, rows)) - shared
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        for number, row in enumerate(rows):
            ids[number, : len(row) - shared] = torch.tensor(row.ids[shared:])
        inputs: dict[str, Any] = {"input_ids": ids.to(self.device)}
        if beginning is not None:
            inputs |= {"past_key_values": _repeated(beginning, len(rows)), "use_cache": True}
        if any(len(row.branches) > 1 for row in rows):
            mask, positions = _branching(rows, shared, longest)
            smallest = max(torch.finfo(self.inner.dtype).min, torch.finfo(torch.bfloat16).min)
            bias = torch.zeros(mask.shape, dtype=self.inner.dtype).masked_fill(~mask, smallest)
            inputs |= {"attention_mask": bias.to(self.device), "position_ids": positions.to(self.device)}
        places = [
            number * longest + target.position - shared
            for number, row in enumerate(rows)
            for target in row.targets
        ]
        with self._mlp_at(sorted(set(places)), ids.numel()):
            states = self.states(**inputs).flatten(0, 1)
        return states.index_select(0, torch.tensor(places, device=self.device))

    @contextmanager
    def _mlp_at(self, places: Sequence[int], count: int) -> Iterator[None]:
        """The last block's feed-forward part only at these of `count` positions: behind it, no other is read."""
        if self._mlp is None or 2 * len(places) > count:
            yield
            return
        chosen = torch.tensor(places, device=self.device)
        whole = torch.empty(0)

        def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            nonlocal whole
            whole = torch.zeros_like(args[0])
            return args[0].flatten(0, 1).index_select(0, chosen)[None], *args[1:]

        def after(_: nn.Module, args: object, out: Tensor) -> Tensor:
            whole.flatten(0, 1)[chosen] = out[0].to(whole.dtype)
            return whole.to(out.dtype)

        hooks = self._mlp.register_forward_pre_hook(before), self._mlp.register_forward_hook(after)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _last_mlp(self) -> nn.Module | None:
        """The last block's `mlp`, if computing it at a few positions only changes nothing there."""
        blocks = blocks_of(self.inner)
        found = getattr(blocks[-1], "mlp", None) if blocks else None
        if not isinstance(found, nn.Module) or getattr(blocks[-1], "_compiled_call_impl", None) is not None:
            return None
        trial = [each.trunk + each.tail for each in _TRIAL]
        rows = [Row(ids, len(ids), targets=[Target(len(ids) - 1, 0, 0)]) for ids in trial]
        try:
            expected = self.hidden(rows)
            self._mlp = found
            mine = self.hidden(rows)
        except Exception:  # whatever an unusual model does: all positions are exact for all
            return None
        finally:
            self._mlp = None
        return found if self._is_close(mine, expected) else None

    def log_probabilities(self, hidden: Tensor, tokens: Sequence[int]) -> tuple[list[float], list[bool]]:
        """Log p of one token after each hidden state `[n, H]`, and whether it is the likeliest one."""
        wanted = torch.tensor(tokens, device=hidden.device)
        size = max(1, _LOGITS_AT_ONCE // self.inner.config.get_text_config().vocab_size)
        values, likeliest = [], []
        for states, token in zip(hidden.split(size), wanted.split(size), strict=True):
            logits = self.head(states)
            own = logits.gather(1, token[:, None])[:, 0]
            values.append(own - logits.logsumexp(-1))
            likeliest.append(logits.argmax(-1) == token)
        return torch.cat(values).tolist(), torch.cat(likeliest).tolist()

    def _trial_holds(self, *, branching: bool) -> bool:
        """Whether the trial's rows give with sharing what each alone gives."""
        try:
            alone = {}
            for owner, scored in enumerate(_TRIAL):
                (row,) = rows_of([scored], branching=False)
                alone[owner] = self.hidden([row])
            shared = _TRIAL[0].trunk[:4]
            rows = rows_of(_TRIAL, branching=branching)
            found = self.hidden(rows, self.beginning(shared))
        except Exception:  # whatever an unusual model does: rows alone are exact for all
            return False
        owners = [target.owner for row in rows for target in row.targets]
        for owner, expected in alone.items():
            mine = found[[number for number, other in enumerate(owners) if other == owner]]
            if not self._is_close(mine, expected):
                return False
        return True

    def _is_close(self, mine: Tensor, expected: Tensor) -> bool:
        allowed = tolerance(expected.to(self._computed_in(expected.dtype)))
        return mine.shape == expected.shape and apart(mine, expected) <= allowed

    def _computed_in(self, dtype: torch.dtype) -> torch.dtype:
        kind = self.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype


class _SharedLayer(DynamicLayer):
    """Keys and values that rows begin with. What comes behind them is not kept: nothing is asked after it."""

    def __init__(self, keys: Tensor, values: Tensor, times: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys.expand(times, -1, -1, -1), values.expand(times, -1, -1, -1)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


def _repeated(beginning: Beginning, times: int) -> Cache:
    """A cache in which each of so many rows begins alike; nothing is copied."""
    cache = DynamicCache()
    pairs = zip(beginning.keys, beginning.values, strict=True)
    cache.layers = [_SharedLayer(keys, values, times) for keys, values in pairs]
    return cache


def _branching(rows: Sequence[Row], shared: int, longest: int) -> tuple[Tensor, Tensor]:
    """Which slots each position sees, bool `[rows, 1, longest, shared + longest]`, and its position in its text."""
    seen = torch.ones(longest, shared + longest, dtype=torch.bool).tril(shared)
    mask = seen.repeat(len(rows), 1, 1)
    last = max(row.trunk for row in rows) - 1  # padding is given no position that the model may not have
    positions = torch.arange(shared, shared + longest).clamp(max=last).repeat(len(rows), 1)
    for number, row in enumerate(rows):
        for start, end in row.branches:
            mask[number, start - shared : end - shared, row.trunk : start] = False
            positions[number, start - shared : end - shared] = torch.arange(
                row.trunk, row.trunk + end - start
            )
    return mask[:, None], positions
