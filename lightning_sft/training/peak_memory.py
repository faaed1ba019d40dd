"""The memory of training, by part, without any of it: the run's own steps on tensors that hold no numbers.

The model is built from its configuration, gets its adapter, and takes an optimizer step with the micro-batch at hand on
torch's fake tensors, which know shape and type only. Every storage is counted from its making to its end, so what
is found holds for any architecture, adapter, loss and optimizer, and takes a few seconds.

On a CPU every storage is asked of the allocator, too, to see what that loses between blocks. What an operation needs
inside itself isn't seen.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_sft.errors import SFTError
from lightning_sft.training import attention, optimizers
from lightning_sft.training.head import NLL
from lightning_sft.training.heap import Heap, kernel_bytes
from lightning_sft.training.layout import Layout, backbone, batch_loss, causal_lm, expected_layout
from lightning_sft.training.quantized import pretend_quantized
from lightning_sft.training.throughput import Flops, has_experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lightning_sft.data.batch import Batch
    from lightning_sft.training.module import SFTModule

PARTS = ("weights", "quantised base", "gradients", "optimizer", "activations", "logits")
"""What memory is for. Logits: all that the head makes, gradients of the output embedding before they are stored
included. Activations: everything else that a step makes, casts of weights included."""

BETWEEN, KERNELS = "between blocks", "kernels"
"""On a CPU: the most that the allocator ever holds, less all parts together; and what oneDNN keeps in bfloat16."""

_STEPS, _SETTLED = 6, 1.01
"""Steps at most, and the factor by which an allocator's heap grows in one when it hardly grows any more."""


@dataclass(frozen=True, slots=True)
class Peak:
    """The most memory that a step holds at once.

    Args:
        parts: Bytes by part, at that moment; parts are those of `PARTS`, and on a CPU `BETWEEN` and `KERNELS`.
        parameters: How many there are.
        trained: How many of them are trained.
        largest_block: Bytes of the weights of the largest decoder block, and of what belongs to none.
    """

    parts: dict[str, int]
    parameters: int
    trained: int
    largest_block: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return sum(self.parts.values())


class Twin:
    """A module's model without any numbers, and the layout that it will get.

    Args:
        module: Where model, adapter, loss, optimizer and precision come from; it need not be loaded.
        kind: The device it is to run on, `cpu` or `cuda`: attention differs.

    Raises:
        SFTError: The model or its adapter can't be made without numbers.
    """

    def __init__(self, module: SFTModule, kind: str = "cpu") -> None:
        self.fake = FakeTensorMode()
        self.kind = kind
        self.module = without_numbers(module)
        self.model = self.module.loaded
        parameters = {id(p): (p.numel(), p.requires_grad) for p in self.model.parameters()}
        self.parameters = sum(n for n, _ in parameters.values())
        self.trained = sum(n for n, trains in parameters.values() if trains)
        self.largest_block = _largest_block(causal_lm(self.model))
        again = module.gradient_checkpointing
        known = not has_experts(self.model) and hasattr(
            self.model.config.get_text_config(), "num_attention_heads"
        )
        self.flops = Flops.of(self.model, recomputed=again) if known else None
        self.quantized: list[nn.Parameter] = []
        with self.fake, _own_caches(), _Storages():
            _materialise(self.model)
            self.layout: Layout = expected_layout(self.model, int(module.tokenizer.pad_token_id))
            if (config := self.module.adapter.quantization()) is not None:
                self.quantized = pretend_quantized(self.model, config)
            if kind == "cuda" and causal_lm(self.model).config._attn_implementation == attention.NAME:
                attention.register_planned()
                causal_lm(self.model).set_attn_implementation(attention.PLANNED)
        self.module.__dict__["layout"] = self.layout
        self.kept = None if module.optimizer is None else optimizers.state_bytes(self.module)

    def peak(self, batch: Batch) -> Peak:
        """What a step with this micro-batch needs, after another one.

        A loss that asks what its numbers are is taken to need what cross-entropy does.
        """
        count = _Storages(Heap(used=self.kind == "cpu"))
        try:
            with self.fake, _own_caches(), count, self._watched(count):
                self._step(batch.map(lambda tensor: self.fake.from_tensor(tensor.cpu())), count)
        except Exception:
            if self.module.loss is NLL:
                raise
            self.module.loss = NLL
            return self.peak(batch)
        parts = {part: count.at_peak[part] for part in PARTS if count.at_peak[part]}
        if (lost := count.heap.most - sum(parts.values())) > 0:
            parts[BETWEEN] = lost
        if self.kind == "cpu" and self._in_bfloat16():
            parts[KERNELS] = kernel_bytes()
        return Peak(parts, self.parameters, self.trained, self.largest_block)

    @contextmanager
    def _watched(self, count: _Storages) -> Iterator[None]:
        """Tell the count what the tensors of the model are, and when its head begins."""
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            count.see(tensor, "weights")
        for tensor in self.quantized:
            count.see(tensor, "quantised base")
        hooks = [
            p.register_post_accumulate_grad_hook(lambda p: count.see(p.grad, "gradients"))
            for p in self.model.parameters()
            if p.requires_grad
        ]
        hooks.append(backbone(causal_lm(self.model)).register_forward_hook(lambda *_: count.now("logits")))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self.model.zero_grad()

    def _step(self, batch: Batch, count: _Storages) -> None:
        """Steps as Lightning's loop has them: forward, gradients of the step before dropped, backward, optimizer."""
        optimizer = self._optimizer()
        for parameter in self.model.parameters():
            if parameter.requires_grad:  # as the step before has left them
                parameter.grad = torch.empty_like(parameter)
                count.see(parameter.grad, "gradients")
        optimizer.step()
        for tensor in tree_leaves([list(state.values()) for state in optimizer.state.values()]):
            if isinstance(tensor, Tensor):
                count.see(tensor, "optimizer")
        for _ in range(_STEPS):
            before = count.heap.most
            count.now("activations")
            loss = self._loss(batch)
            count.now("activations")
            optimizer.zero_grad()
            loss.backward()
            del loss
            optimizer.step()
            if count.heap.most <= before * _SETTLED:
                break

    def _optimizer(self) -> Optimizer:
        """The run's AdamW; in place of others, which may ask what their numbers are, one with as much state."""
        if self.kept is not None:
            return _Keeping(self.model.parameters(), self.kept)
        return optimizers.build(self.module, optimizers.parameter_groups(self.module))

    def _in_bfloat16(self) -> bool:
        """Whether layers are computed in bfloat16, which is oneDNN's; wider types aren't."""
        if str(self.module.trainer.precision) == "bf16-mixed":
            return True
        quantized = getattr(self.module.adapter.quantization(), "bnb_4bit_compute_dtype", None)
        return torch.bfloat16 in {quantized, *(p.dtype for p in self.model.parameters())}

    def _loss(self, batch: Batch) -> Tensor:
        precision = str(self.module.trainer.precision)
        half = torch.float16 if precision.startswith("16") else torch.bfloat16
        with torch.autocast("cpu", half, enabled=precision.endswith("-mixed")):
            loss = batch_loss(self.model, batch, self.layout, self.module.loss, self.module.router)
            if self.module.router is not None:
                loss = loss + self.module.router.take()
        return loss


class _Keeping(Optimizer):
    """Keeps so many bytes for each value of a matrix, and computes nothing."""

    def __init__(self, parameters: Iterable[nn.Parameter], kept: float) -> None:
        super().__init__([p for p in parameters if p.requires_grad], {})
        self.kept = kept

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make the state, once."""
        for parameter in (p for group in self.param_groups for p in group["params"] if not self.state[p]):
            size = math.ceil(self.kept * parameter.numel())
            self.state[parameter]["kept"] = torch.empty(size, dtype=torch.uint8)


class _Storages(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, by part, and keeps the count of the worst moment."""

    def __init__(self, heap: Heap | None = None) -> None:
        super().__init__()
        self.heap = heap or Heap(used=False)
        self.alive: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self._total = self._most = 0
        self._part = "activations"
        self._part_of: weakref.WeakKeyDictionary[Any, list[str]] = weakref.WeakKeyDictionary()

    def now(self, part: str) -> None:
        """What is made from here on is for this part."""
        self._part = part

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = _grouped(*args, **(kwargs or {})) if func is _GROUPED else func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor):
                self.see(leaf)
        return made

    def see(self, tensor: Tensor, part: str | None = None) -> None:
        """Count a tensor's storage, if it is new; with a part, for that."""
        storage = tensor.untyped_storage()
        known, size = self._part_of.get(storage), storage.nbytes()
        if known is None:
            known = self._part_of[storage] = [part or self._part]
            self.alive[known[0]] += size
            self._total += size
            weakref.finalize(storage, self._gone, known, size)
            self.heap.hold(storage, size)
            if self._total > self._most:
                self._most, self.at_peak = self._total, self.alive.copy()
        elif part is not None and part != known[0]:
            self.alive[known[0]] -= size
            self.alive[part] += size
            known[0] = part

    def _gone(self, part: list[str], size: int) -> None:
        self.alive[part[0]] -= size
        self._total -= size


_GROUPED = torch.ops.aten._grouped_mm.default


def _grouped(a: Tensor, b: Tensor, offsets: Tensor | None = None, **_: Any) -> Tensor:
    """What experts' products are like: torch's fake version takes bfloat16 alone, its real one any type."""
    return torch.empty_like(_GROUPED(a.bfloat16(), b.bfloat16(), offsets), dtype=a.dtype)


def without_numbers(module: SFTModule) -> SFTModule:
    """A copy of the module with its model and adapter on the meta device; nothing of the base but its config is read.

    Raises:
        SFTError: The model or its adapter can't be made without numbers.
    """
    bare = _without_model(module)
    with torch.device("meta"):
        try:
            bare.assemble(_on_meta(module))
        except NotImplementedError as error:
            raise SFTError(
                f"nothing can be said of this adapter without the base's weights: {error}",
                where="model.adapter",
                fix="choose a start of its parameters that doesn't depend on the weights",
            ) from error
    return bare


def _on_meta(module: SFTModule) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(
        copy.deepcopy(module.base_config),
        dtype=module.weights_dtype,
        trust_remote_code=module.trust_remote_code,
    )
    return model.train()


def _without_model(module: SFTModule) -> SFTModule:
    """A copy of the module, still attached to its trainer, with no model."""
    bare = copy.copy(module)
    bare._trainer = module._trainer
    bare._modules = {}
    bare.model = None
    bare.__dict__.pop("layout", None)
    return bare


def _materialise(model: nn.Module) -> None:
    """Put fake CPU tensors where the meta tensors are; what is shared stays so."""
    made: dict[int, Any] = {}
    for part in model.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    blank = torch.empty(parameter.shape, dtype=parameter.dtype)
                    made[id(parameter)] = nn.Parameter(blank, requires_grad=parameter.requires_grad)
                part._parameters[name] = made[id(parameter)]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                if id(buffer) not in made:
                    made[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype)
                part._buffers[name] = made[id(buffer)]


def _largest_block(model: PreTrainedModel) -> int:
    from lightning_sft.training.compiling import blocks_of

    sizes = [sum(p.numel() * p.element_size() for p in block.parameters()) for block in blocks_of(model)]
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    return max(sizes, default=whole) + whole - sum(sizes)


@contextmanager
def _own_caches() -> Iterator[None]:
    """Keep masks of fake tensors out of real runs, and the other way round."""
    forget: Callable[[], None] = attention._visible.cache_clear
    forget()
    try:
        yield
    finally:
        forget()
