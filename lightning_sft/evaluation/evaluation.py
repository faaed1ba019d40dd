"""An evaluation: several evaluators on one model, and on the base beside it; kill-safe, on one process or several."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import metadata
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_sft import __version__
from lightning_sft.bases import Evaluator
from lightning_sft.data.cache import NotCached, renderer_facts
from lightning_sft.errors import SFTError
from lightning_sft.evaluation.files import ITEMS, as_json, write_evaluation
from lightning_sft.evaluation.journal import Journal, answered_before
from lightning_sft.evaluation.paired import Difference, differences
from lightning_sft.evaluation.requests import Answered, Item
from lightning_sft.evaluation.results import Results, undefined
from lightning_sft.evaluation.scorer import Scorer
from lightning_sft.training.fingerprint import weights_digest
from lightning_sft.training.fsdp2 import FSDP2Strategy, is_sharded
from lightning_sft.training.layout import causal_lm
from lightning_sft.training.models import load_model, load_trained
from lightning_sft.training.shards import local

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from lightning_sft.rendering import Renderer
    from lightning_sft.training.module import SFTModule

MODEL, BASE = "model", "base"


@dataclass(slots=True)
class Found:
    """What one evaluator found.

    Args:
        name: Its class's name, numbered where there are several.
        config: Its options.
        results: Of the model.
        base: Of the base, if it was asked.
        changes: From the base to the model.
        seconds: How long it took.
    """

    name: str
    config: Mapping[str, object]
    results: Results
    base: Results | None = None
    changes: list[Difference] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(slots=True)
class Evaluation:
    """What is to be evaluated, and where the results go.

    Args:
        evaluators: By name.
        configs: Their options, by name.
        folder: Gets `results.json`, and `evaluation/` with a file of records for each evaluator and model; what
            another evaluation left there is kept.
        model: What the model is, for the reader.
        source: The folder whose model is asked (an adapter on its base, or a whole model), not the module's.
        baseline: Ask the base, too, and compare.
        batch_tokens: Padded tokens of a batch; by default 512 on a CPU, else 16,384.
        show_progress: Show how far it is.
        found: What was found.
        earlier: Where the results that were in the folder are now, if there were others.
    """

    evaluators: Mapping[str, Evaluator]
    configs: Mapping[str, Mapping[str, object]]
    folder: Path
    model: Mapping[str, object]
    source: Path | None = None
    baseline: bool = False
    batch_tokens: int | None = None
    show_progress: bool = True
    found: list[Found] = field(default_factory=list)
    earlier: Path | None = None

    def run(self, module: SFTModule) -> list[Found]:
        """Ask everything; write, keep and return what was found.

        Raises:
            SFTError: An evaluator's data is missing or malformed, or a request can't be answered.
        """
        asked = {name: _items(name, evaluator) for name, evaluator in self.evaluators.items()}
        seconds = dict.fromkeys(asked, 0.0)
        answers: dict[str, dict[str, list[Answered]]] = {MODEL: {}, BASE: {}}
        beside = [name for name, each in self.evaluators.items() if self.baseline or each.needs_base]
        for part, names in ((MODEL, list(asked)), (BASE, beside)):
            if not names:
                continue
            with self._base_of(module) if part == BASE else _itself(module) as model:
                _refuse_bad_weights(model, part)
                scorer = Scorer(model, module.tokenizer, module.renderer, batch_tokens=self.batch_tokens)
                identity = _identity(scorer, str(module.trainer.precision))
                for name in names:
                    begun = time.perf_counter()
                    journal = Journal(self.folder / ITEMS / part / name, identity, module.trainer.global_rank)
                    answers[part][name] = self._answer(
                        module, scorer, asked[name], journal, f"{name} ({part})"
                    )
                    seconds[name] += time.perf_counter() - begun
        for name, evaluator in self.evaluators.items():
            begun = time.perf_counter()
            of_model, of_base = answers[MODEL][name], answers[BASE].get(name, [])
            base = None
            if evaluator.needs_base:
                results = scored_once(module, partial(evaluator.score_beside, of_model, of_base))
            else:
                results = scored_once(module, partial(evaluator.score, of_model))
                base = scored_once(module, partial(evaluator.score, of_base)) if of_base else None
            changes = differences(base.records, results.records) if base else []
            missing = [
                *undefined(results),
                *(f"of the base, {note}" for note in (undefined(base) if base else ())),
            ]
            results = replace(results, notes=(*results.notes, *missing))
            seconds[name] += time.perf_counter() - begun
            self.found.append(Found(name, self.configs.get(name, {}), results, base, changes, seconds[name]))
        if module.trainer.is_global_zero:
            self._write(module)
        return self.found

    def take(self, module: SFTModule) -> None:
        """Let the module have the source's model, tokenizer and chat template.

        Raises:
            SFTError: They can't be loaded.
        """
        if self.source is not None:
            trust = module.trust_remote_code
            module.use_tokenizer(str(self.source))
            module.model = load_trained(self.source, dtype=module.weights_dtype, trust_remote_code=trust)

    @contextmanager
    def _base_of(self, module: SFTModule) -> Iterator[nn.Module]:
        """The base: the model with its adapter off, where it has one that can be, else loaded anew."""
        model = module.loaded
        with ExitStack() as stack:
            try:
                if self.source is None:
                    model = stack.enter_context(module.adapter.base_model(model))
                elif hasattr(model, "disable_adapter"):
                    stack.enter_context(model.disable_adapter())
                else:
                    model = _loaded_anew(module)
            except SFTError:
                model = _loaded_anew(module)
            yield model

    def _answer(
        self, module: SFTModule, scorer: Scorer, items: Sequence[Item], journal: Journal, what: str
    ) -> list[Answered]:
        """All items answered, by this process or the others."""
        trainer = module.trainer
        rank, world = _share_of(module)
        # What the first process knows, for all, before any of them rewrites its file: what is left has to be the same
        # everywhere, also with a sharded model (each process has responses of its own) or a disk of each machine.
        known = trainer.strategy.broadcast(answered_before(items, journal.known()))
        left = [number for number in range(len(items)) if number not in known]
        mine = left[rank::world]
        if known and trainer.is_global_zero:
            print(f"{what}: {len(known)} of {len(items)} items were answered before")
        streamed = journal.write(scorer.stream_items([items[number] for number in mine]))
        with self._progress(trainer, what, len(mine)) as advance:
            fresh = {}
            for index, answered in streamed:
                fresh[mine[index]] = answered
                advance()
        for other in _gathered(fresh, world):
            known |= other
        complete = [known[number] for number in range(len(items))]
        _refuse_nan(complete, what)
        return complete

    @contextmanager
    def _progress(self, trainer: Any, what: str, total: int) -> Iterator[Any]:
        if not (self.show_progress and trainer.is_global_zero):
            yield lambda: None
            return
        from rich.console import Console
        from rich.progress import Progress

        console = Console()
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task(what, total=total)
            yield lambda: progress.advance(task)

    def _write(self, module: SFTModule) -> None:
        records = {
            f"{part}/{found.name}.jsonl": "".join(as_json(asdict(each)) + "\n" for each in results.records)
            for found in self.found
            for part, results in ((MODEL, found.results), (BASE, found.base))
            if results is not None
        }
        told = {
            "model": {**self.model, "precision": str(module.trainer.precision), **_facts(module)},
            "versions": _versions(),
            "evaluators": {found.name: _told(found) for found in self.found},
        }
        self.earlier = write_evaluation(self.folder, told, records)


def scored_once(module: SFTModule, score: Callable[[], Results]) -> Results:
    """What one process finds, for all: a score may cost something (a judge that is paid)."""
    return module.trainer.strategy.broadcast(score() if module.trainer.is_global_zero else Results((), ()))


def _items(name: str, evaluator: Evaluator) -> Sequence[Item]:
    items = evaluator.requests()
    if not items:
        raise SFTError("it asks nothing", where=f"evaluators: {name}", fix="check its data and limits")
    return items


def _refuse_bad_weights(model: nn.Module, part: str) -> None:
    """What such a model writes would be judged like any answer."""
    for name, parameter in model.named_parameters():
        values = local(parameter)
        if values.is_floating_point() and values.element_size() > 1 and not values.isfinite().all():
            raise SFTError(
                f"{name} has values that are NaN or infinite",
                where=f"the {part}",
                fix="evaluate another checkpoint, or look for the step in metrics.csv where the loss went wrong",
            )


def _refuse_nan(answered: Sequence[Answered], what: str) -> None:
    """The likeliest of choices that are NaN would be the first: a score like any other."""
    bad = [each.item for each in answered if any(map(isnan, each.log_likelihoods))]
    if bad:
        raise SFTError(
            f"the model's log-likelihoods are NaN for {len(bad)} of {len(answered)} items "
            f"(the first: {bad[0].task} {bad[0].number})",
            where=f"evaluators: {what}",
            fix="its weights aren't finite, or what it computes overflows: try trainer.precision: 32-true",
        )


@contextmanager
def _itself(module: SFTModule) -> Iterator[nn.Module]:
    yield module.loaded


def _loaded_anew(module: SFTModule) -> PreTrainedModel:
    base = load_model(
        module.base,
        dtype=module.loaded.dtype,
        revision=module.revision,
        trust_remote_code=module.trust_remote_code,
    )
    strategy = module.trainer.strategy
    if isinstance(strategy, FSDP2Strategy):
        strategy.shard(base)
        return base.eval()
    return base.to(module.device).eval()


def _share_of(module: SFTModule) -> tuple[int, int]:
    """The process's number and how many share the items; a sharded model needs all processes for each."""
    return (0, 1) if is_sharded(module.loaded) else (module.trainer.global_rank, module.trainer.world_size)


def _gathered(mine: dict[int, Answered], world: int) -> list[dict[int, Answered]]:
    if world == 1:
        return [mine]
    gathered: list[Any] = [None] * world
    torch.distributed.all_gather_object(gathered, mine)
    return gathered


def _identity(scorer: Scorer, precision: str) -> dict[str, object]:
    """What responses depend on, beside the requests."""
    inner = causal_lm(scorer.model)
    adapters = getattr(scorer.model, "peft_config", {})
    configured = [inner.config.to_dict(), inner.generation_config.to_dict(), *map(vars, adapters.values())]
    return {
        "weights": weights_digest(scorer.model),
        "configuration": _hashed(json.dumps(configured, default=_sorted)),
        "precision": precision,
        "tokenizer and chat template": _hashed(
            json.dumps(_rendering(scorer.encoder.renderer), sort_keys=True)
        ),
        "context": scorer.encoder.context_length,
        "versions": _versions(),
    }


def _rendering(renderer: Renderer) -> object:
    try:
        return renderer_facts(renderer)
    except NotCached:  # a slow tokenizer, whose settings can't be compared in full
        tokenizer = renderer.tokenizer
        return [renderer.chat_template, tokenizer.get_vocab(), str(tokenizer.special_tokens_map)]


def _sorted(value: object) -> object:
    """Sets in an order that is the same in each process; what JSON has no type for as text."""
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _facts(module: SFTModule) -> dict[str, object]:
    return {
        "dtype": str(module.loaded.dtype).removeprefix("torch."),
        "parameters": sum(parameter.numel() for parameter in module.loaded.parameters()),
        "context_length": module.context_length,
        "processes": module.trainer.world_size,
    }


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "tokenizers", "peft")
    return {"lightning-sft": __version__} | {name: metadata.version(name) for name in names}


def _told(found: Found) -> dict[str, object]:
    told: dict[str, object] = {
        "config": dict(found.config),
        "seconds": round(found.seconds, 3),
        "scores": [asdict(score) for score in found.results.scores],
    }
    if found.results.notes:
        told["notes"] = list(found.results.notes)
    if found.base is not None:
        told["base_scores"] = [asdict(score) for score in found.base.scores]
        told["changes"] = [asdict(change) for change in found.changes]
    return told
