"""Known mistakes of fine-tuning: told once, at the start of a run and by `plan`; warnings, never errors.

The rules go by what adapters and callbacks are, not by their names: a peft adapter is a model with `peft_config`, and
a callback that measures forgetting says so by `measures_forgetting = True`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities import rank_zero_warn

from lightning_sft.bases import Adapter
from lightning_sft.errors import SFTError
from lightning_sft.training.compiling import blocks_of
from lightning_sft.training.layout import causal_lm

if TYPE_CHECKING:
    from torch import nn

    from lightning_sft.training.module import SFTModule

FULL_RATE = Adapter.default_learning_rate
_SCHULMAN = "Schulman et al., LoRA Without Regret, 2025"


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the rules look at.

    Args:
        learning_rate: The peak.
        trains_all: Every parameter is trained.
        low_rank: Some parameters are LoRA's.
        attention_only: These are in attention layers alone, though the model has other linear layers.
        epochs: How often every example is seen, by the number of steps; 0 where nothing sets an end.
        examples: Examples of an optimizer step, on all ranks.
        callbacks: The classes of the trainer's callbacks.
    """

    learning_rate: float
    trains_all: bool
    low_rank: bool
    attention_only: bool
    epochs: float
    examples: float
    callbacks: tuple[type, ...]


@dataclass(frozen=True, slots=True)
class Rule:
    """A known mistake.

    Args:
        name: What silences it.
        applies: Whether the run makes it.
        says: What it is and what to do; a template over the facts.
        source: Who found it.
    """

    name: str
    applies: Callable[[Facts], bool]
    says: str
    source: str


RULES = (
    Rule(
        "full-rate",
        lambda run: run.trains_all and run.learning_rate > 2e-5,
        "a learning rate of {learning_rate:g} is high for full fine-tuning, which forgets more the higher it is: "
        "1e-5 is usual, 2e-5 the most",
        "Alpaca, 2023: 2e-5 for 7B; Tülu 3, 2024: 5e-6 for 8B",
    ),
    Rule(
        "lora-rate",
        lambda run: run.low_rank and run.learning_rate < 5 * FULL_RATE,
        "a learning rate of {learning_rate:g} is low for LoRA, whose best is about ten times that of full fine-tuning: "
        "1e-4 to 2e-4 is usual",
        f"{_SCHULMAN}; Hu et al., LoRA, 2021: 2e-4",
    ),
    Rule(
        "attention-only",
        lambda run: run.attention_only,
        "the adapters are in attention alone, which learns less at the same number of parameters: adapt the "
        "feed-forward layers too (target_modules: all-linear)",
        f"{_SCHULMAN}; Dettmers et al., QLoRA, 2023",
    ),
    Rule(
        "epochs",
        lambda run: run.epochs > 3 and not _any(run, lambda each: issubclass(each, EarlyStopping)),
        "{epochs:g} epochs without early stopping overfit most instruction data: 1 to 3 are usual; or add "
        "EarlyStopping on val/loss to trainer.callbacks",
        "Alpaca, 2023: 3; Tülu 3, 2024: 2, more didn't help",
    ),
    Rule(
        "lora-batch",
        lambda run: run.low_rank and run.examples > 32,
        "{examples:.0f} examples a step are many for LoRA, which loses more by large batches than full fine-tuning, at "
        "any rank: 32 or fewer are safe",
        f"{_SCHULMAN}; TRL's guide to it",
    ),
    Rule(
        "no-probe",
        lambda run: not _any(run, lambda each: bool(getattr(each, "measures_forgetting", False))),
        "nothing in trainer.callbacks measures what the model forgets: validation on the task doesn't show it",
        "Luo et al., 2023, on forgetting in fine-tuning; Biderman et al., LoRA Learns Less and Forgets Less, 2024",
    ),
)

ALL = "all"


def check_names(silenced: Sequence[str]) -> None:
    """Refuse names that are no rule's.

    Raises:
        SFTError: There is one.
    """
    known = [ALL, *(rule.name for rule in RULES)]
    for name in silenced:
        if name not in known:
            raise SFTError(
                f"no advice is named {name!r}",
                where="model.silenced_advice",
                fix=f"known: {', '.join(known)}",
            )


def advice(facts: Facts, silenced: Sequence[str] = ()) -> Iterator[tuple[Rule, str]]:
    """The rules that apply and aren't silenced, with what they say of this run."""
    values = {name: getattr(facts, name) for name in Facts.__dataclass_fields__}
    for rule in RULES:
        if not {rule.name, ALL} & set(silenced) and rule.applies(facts):
            yield rule, rule.says.format(**values)


def facts_of(module: SFTModule, callbacks: Sequence[type]) -> Facts:
    """The facts of a module with its model in it, attached to a trainer.

    Args:
        module: The module.
        callbacks: The classes of the trainer's callbacks.
    """
    from lightning_sft.data.datamodule import SFTDataModule

    model, data = module.loaded, getattr(module.trainer, "datamodule", None)
    low_rank = [name for name, _ in model.named_parameters() if ".lora_" in name]
    epochs, examples = float(max(0, module.trainer.max_epochs or 0)), 0.0
    if isinstance(data, SFTDataModule) and "train" in data.prepared:
        plan = data.plan(0)
        examples = plan.examples / max(1.0, plan.available / plan.accumulate)
        epochs = data.total_steps() / plan.steps
    return Facts(
        learning_rate=module.learning_rate,
        trains_all=all(p.requires_grad for p in model.parameters()),
        low_rank=bool(low_rank),
        attention_only=bool(low_rank) and all(map(_in_attention, low_rank)) and _has_others(model),
        epochs=epochs,
        examples=examples,
        callbacks=tuple(callbacks),
    )


def tell(module: SFTModule) -> None:
    """Warn of what the run at hand does, on rank zero."""
    callbacks = [type(each) for each in vars(module.trainer)["callbacks"]]
    for rule, says in advice(facts_of(module, callbacks), module.silenced_advice):
        rank_zero_warn(in_words(rule, says))


def in_words(rule: Rule, says: str) -> str:
    """A warning: the advice, its source and what silences it."""
    return f"Advice: {says} ({rule.source}). model.silenced_advice: [{rule.name}] silences this."


def _any(run: Facts, is_one: Callable[[type], bool]) -> bool:
    return any(is_one(each) for each in run.callbacks)


def _in_attention(name: str) -> bool:
    return any("attn" in part or "attention" in part for part in name.lower().split("."))


def _has_others(model: nn.Module) -> bool:
    """Whether the model's blocks have weight matrices outside of attention."""
    return any(
        parameter.ndim >= 2 and not _in_attention(name)
        for block in blocks_of(causal_lm(model))
        for name, parameter in block.named_parameters()
    )
