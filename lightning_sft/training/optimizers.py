"""The optimizer: groups of parameters with rates and decay of their own, and the schedule over all of them.

Every group's rate is `model.learning_rate` times the factor that the adapter gives it (`Adapter.rate_group`) times the
schedule's. A group that begins later has its gradients dropped until then, after they were computed and added up over
the ranks. So ranks stay together, nothing but the step's number has to be resumed, and the optimizer has no state of
parameters that haven't been trained.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.optim import Optimizer

from lightning_sft.errors import SFTError
from lightning_sft.training import schedule as schedules
from lightning_sft.training.layout import causal_lm

if TYPE_CHECKING:
    from lightning.pytorch.utilities.types import OptimizerLRScheduler

    from lightning_sft.bases import RateGroup
    from lightning_sft.training.module import SFTModule

OptimizerFactory: TypeAlias = Callable[[Iterable[Any]], Optimizer]
"""From parameter groups to an optimizer. In YAML: `class_path`, and `init_args` without the parameters."""

_TRIED = 128
"""The side of the matrix that an optimizer is tried on to see what it keeps of it."""


def configure(module: SFTModule) -> OptimizerLRScheduler:
    """The module's optimizer, with its schedule stepped after every optimizer step.

    Raises:
        SFTError: The schedule has no end to go to, or the optimizer can't be made of its options.
    """
    trainer, total_steps = module.trainer, module.total_steps()
    epochs = trainer.max_epochs
    ends = trainer.max_steps >= 0 or (epochs is not None and epochs >= 0)
    if not ends and module.schedule != "constant":
        raise SFTError(
            f"the {module.schedule} schedule needs to know how many steps the run has",
            where="trainer",
            fix="set trainer.max_epochs or trainer.max_steps, or model.schedule: constant",
        )
    groups = parameter_groups(module)
    optimizer = build(module, groups)
    if len(lines := list(rates_in_words(groups))) > 1:
        rank_zero_info("Peak learning rates:\n" + "\n".join(f"  {line}" for line in lines))
    shape = partial(
        schedules.factor,
        schedule=module.schedule,
        total_steps=total_steps,
        warmup=schedules.warmup_steps(module.warmup, total_steps),
        final=module.final_learning_rate,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def parameter_groups(module: SFTModule) -> list[dict[str, Any]]:
    """What is trained, by the adapter's groups and by whether it is decayed: matrices are, norms and biases aren't.

    Raises:
        SFTError: No group is trained from the first step on.
    """
    found: dict[tuple[RateGroup, bool], list[nn.Parameter]] = {}
    for name, parameter in module.loaded.named_parameters():
        if parameter.requires_grad:
            found.setdefault((module.adapter.rate_group(name), parameter.ndim >= 2), []).append(parameter)
    if all(group.start > 0 for group, _ in found):
        raise SFTError(
            "no parameter is trained in the first step", where="model.adapter", fix="change its options"
        )
    return [
        {
            "params": parameters,
            "lr": module.learning_rate * group.scale,
            "weight_decay": module.weight_decay if decays else 0.0,
            "name": group.name if decays else f"{group.name}, not decayed",
            "rate": group.name,
            "scale": group.scale,
            "start": group.start,
        }
        for (group, decays), parameters in sorted(found.items(), key=lambda each: not each[0][1])
    ]


def build(module: SFTModule, groups: list[dict[str, Any]]) -> Optimizer:
    """The optimizer over these groups: AdamW, fused where it can be, or `model.optimizer`.

    Raises:
        SFTError: Its options are wrong, don't fit the model, or are the model's own.
    """
    factory: Callable[..., Optimizer] = module.optimizer or partial(torch.optim.AdamW, betas=module.betas)
    kind, options = described(factory)
    if "fused" in options and options["fused"] is None and _can_fuse(groups):
        factory = partial(factory, fused=True)
    try:
        optimizer = _muon(module, factory, groups) if kind is torch.optim.Muon else factory(groups)
    except (TypeError, ValueError, RuntimeError, AssertionError, ImportError) as error:
        raise SFTError(
            f"the optimizer can't be made: {error}", where="model.optimizer", fix="change its options"
        ) from error
    _refuse_unsuited(module, optimizer)
    # A fused AdamW could unscale gradients itself; Lightning would refuse to clip them, even in bfloat16.
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    return optimizer


def described(factory: OptimizerFactory) -> tuple[type | None, dict[str, Any]]:
    """The class that a factory makes, where it can be told, and all options of it."""
    given: dict[str, Any] = {}
    made: Any = factory
    while isinstance(made, partial):
        given = {**made.keywords, **given}
        made = next((each for each in made.args if isinstance(each, type)), made.func)
    if not isinstance(made, type):
        return None, given
    defaults = {
        name: option.default
        for name, option in inspect.signature(made).parameters.items()
        if option.default is not option.empty
    }
    return made, defaults | given


def check(factory: OptimizerFactory, betas_given: bool) -> None:
    """Refuse options that the model has itself, before anything is loaded.

    Raises:
        SFTError: The rate or the decay is given twice, or betas to the wrong one.
    """
    kind, options = described(factory)
    if kind is None:
        return
    signature = inspect.signature(kind).parameters
    for option, ours in (("lr", "learning_rate"), ("weight_decay", "weight_decay")):
        if option in options and options[option] != signature[option].default:
            raise SFTError(
                f"{option} would be set in two places",
                where=f"model.optimizer ({kind.__name__})",
                fix=f"leave it out there, and set model.{ours}",
            )
    if betas_given and kind is not torch.optim.Muon:
        raise SFTError(
            "model.betas is for the default optimizer",
            where="model.betas",
            fix=f"give them as an option of {kind.__name__}, in model.optimizer.init_args",
        )


def facts(factory: OptimizerFactory | None) -> str | None:
    """The optimizer's class and options, for comparison; None for the default one."""
    if factory is None:
        return None
    kind, options = described(factory)
    name = (
        f"{kind.__module__}.{kind.__qualname__}"
        if kind is not None
        else getattr(factory, "__qualname__", "?")
    )
    return name + "".join(f", {key} {value}" for key, value in sorted(options.items()))


def state_bytes(module: SFTModule) -> float:
    """Bytes that the optimizer keeps for each value of a trained matrix.

    AdamW keeps two averages in the matrix's type; of others it is found by a step on a small one.
    """
    like = next(p for p in module.loaded.parameters() if p.requires_grad)
    if module.optimizer is None:
        return 2.0 * like.element_size()
    tried = nn.Parameter(torch.zeros(_TRIED, _TRIED, dtype=like.dtype, device=like.device))
    tried.grad = torch.zeros_like(tried)
    optimizer = build(module, [{"params": [tried], "lr": 0.0, "weight_decay": 0.0}])
    optimizer.step()
    kept = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum(t.nbytes for t in kept) / tried.numel()


def hold_back(optimizer: Optimizer, step: int) -> None:
    """Drop the gradients of groups that begin after this optimizer step, counted from 0."""
    for group in optimizer.param_groups:
        if group.get("start", 0) > step:
            for parameter in group["params"]:
                parameter.grad = None


def rates(optimizer: Optimizer, step: int) -> dict[str, float]:
    """What to log of a step: `learning_rate`, and where groups differ, each group's after a slash.

    A group that hasn't begun has the rate 0.
    """
    groups = optimizer.param_groups
    first = next((g for g in groups if g.get("scale", 1.0)), groups[0])
    found = {"learning_rate": first["lr"] / first.get("scale", 1.0)}
    each = {g["rate"]: g["lr"] if g["start"] <= step else 0.0 for g in groups if "rate" in g}
    if len(each) > 1:
        found |= {f"learning_rate/{name}": rate for name, rate in each.items()}
    return found


def rates_in_words(groups: list[dict[str, Any]]) -> Iterator[str]:
    """A line for each rate of these parameter groups: its name, its peak, how many parameters, and when it begins."""
    rows: dict[str, tuple[float, int, int]] = {}
    for group in groups:
        _, _, before = rows.get(group["rate"], (0.0, 0, 0))
        rows[group["rate"]] = (group["lr"], group["start"], before + sum(p.numel() for p in group["params"]))
    width = max(map(len, rows))
    for name, (rate, start, count) in rows.items():
        begins = f", from step {start + 1}" if start else ""
        yield f"{name:<{width}}  {rate:.3g}  {count:,} parameters{begins}"


def _can_fuse(groups: list[dict[str, Any]]) -> bool:
    parameters = [p for group in groups for p in group["params"]]
    return {p.device.type for p in parameters} in ({"cpu"}, {"cuda"})


def _refuse_unsuited(module: SFTModule, optimizer: Optimizer) -> None:
    name = type(optimizer).__name__
    if module.weight_decay and not any("weight_decay" in part.defaults for part in _parts(optimizer)):
        raise SFTError(f"{name} knows no weight decay", where="model.weight_decay", fix="set it to 0")
    if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
        raise SFTError(
            f"{name} evaluates with other weights than it trains with (its train() and eval()), which checkpoints, "
            "validation and export don't know of",
            where="model.optimizer",
            fix="use another optimizer, such as torch.optim.AdamW with model.schedule: constant",
        )


# ------------------------------------------------------------------------------------------------ Muon


class Together(Optimizer):
    """Several optimizers as one: they share its groups and its state."""

    def __init__(self, *parts: Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load, and hand groups and state to the parts again."""
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of each."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def _share(self) -> None:
        start = 0
        for part in self.parts:
            end = start + len(part.param_groups)
            part.state, part.param_groups = self.state, self.param_groups[start:end]
            start = end


def _parts(optimizer: Optimizer) -> tuple[Optimizer, ...]:
    return optimizer.parts if isinstance(optimizer, Together) else (optimizer,)


def _muon(module: SFTModule, muon: OptimizerFactory, groups: list[dict[str, Any]]) -> Optimizer:
    """Muon for the hidden matrices, as its authors mean it, and AdamW for embeddings, head, norms and biases."""
    inner = causal_lm(module.loaded)
    embeddings = [inner.get_input_embeddings(), inner.get_output_embeddings()]
    others = {id(p) for each in embeddings if each is not None for p in each.parameters()}

    def chosen(hidden: bool) -> list[dict[str, Any]]:
        parts = [
            {
                **group,
                "params": [p for p in group["params"] if (p.ndim == 2 and id(p) not in others) == hidden],
            }
            for group in groups
        ]
        return [part for part in parts if part["params"]]

    made = [muon(chosen(True))] if chosen(True) else []
    if rest := [{**group, "name": f"{group.get('name', '')}, AdamW"} for group in chosen(False)]:
        made.append(torch.optim.AdamW(rest, betas=module.betas))
    return Together(*made) if len(made) > 1 else made[0]
