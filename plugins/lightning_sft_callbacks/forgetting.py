"""What the model forgets while it learns: losses, answers and divergence on domains that it is not trained on."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_sft import SFTError
from lightning_sft_callbacks import domains as asked
from lightning_sft_callbacks import planned, references
from lightning_sft_callbacks.domains import Domain, Loaded
from lightning_sft_callbacks.overlap import Overlap, overlaps, refuse_trained
from lightning_sft_callbacks.probing import Probe
from lightning_sft_callbacks.references import Baseline
from lightning_sft_callbacks.retention import Measured, change, intervals, objective, retained, retention

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_sft import Example, SFTModule


_SHOWN = 5
_KEPT = ("every_n_steps", "task_before", "asked", "planned_share", "_is_exact")


class ForgettingProbe(Probe):
    """Measures what the model still knows of what its base knew: at step 0, on the way, and at the end.

    For each domain: the change of the cross-entropy (nats per token; for questions of the right choice among the
    choices), of the bits per byte, the divergence KL(base ‖ model), the accuracy and which answers flipped. Over all:
    the retention R = Π r_d^(w_d / Σ w) with r_d = exp(−max(0, ΔCE_d)) and its worst domain, with bootstrap intervals.
    With validation data also the gain g = 1 − CE / CE at step 0, and J = g − strictness · (1 − R).

    Args:
        domains: What is not to be forgotten; by default the general text that comes with the package.
        every_n_steps: Optimizer steps between two measurements; 0 only measures at the start and the end; by
            default as often as `cost` allows.
        cost: Share of the training's computation that the probe may take. What isn't set is chosen so that it is
            kept: how often is measured, and how many texts, questions and validation examples are asked, of a
            domain at least 8 texts or 16 questions.
        kl_top_k: Where the base's own weights are trained, its predictions are kept as so many of the likeliest
            tokens, for the divergence; 0 leaves the divergence out.
        task_examples: So many of the validation examples are measured for the gain; 0 leaves it out; by default up
            to 128, as `cost` allows.
        strictness: How much lost retention weighs against the gain, in J.
        cache: A folder in which baselines are kept for other runs, by model and domains; by default `probes/` of
            the run folder.
        name: Tells several of these apart, in their figures (`forgetting-NAME/...`) and files.
    """

    measures_forgetting = True
    file = "forgetting"
    prefix = "forgetting"

    def __init__(
        self,
        domains: list[Domain] | None = None,
        every_n_steps: int | None = None,
        cost: float = 0.05,
        kl_top_k: int = 64,
        task_examples: int | None = None,
        strictness: float = 1.0,
        cache: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(every_n_steps or 0, name)
        self.is_auto = every_n_steps is None
        self.domains = [Domain("general", text="tiny:general")] if domains is None else domains
        names = [domain.name for domain in self.domains]
        if not names or len(set(names)) != len(names) or "task" in names:
            raise SFTError(
                f"the domains are called {', '.join(names) or 'nothing'}",
                where="ForgettingProbe.domains",
                fix="give at least one, each with a name of its own (other than task)",
            )
        if not sum(domain.weight for domain in self.domains):
            raise SFTError(
                "all weights are 0", where="ForgettingProbe.domains", fix="give one a weight above 0"
            )
        for option, value, is_right, fix in (
            ("cost", cost, 0 < cost <= 1, "give a share above 0, up to 1"),
            ("kl_top_k", kl_top_k, kl_top_k >= 0, "give 0 or more"),
            ("task_examples", task_examples, task_examples is None or task_examples >= 0, "give 0 or more"),
            ("strictness", strictness, 0 <= strictness < math.inf, "give 0 or more"),
        ):
            if not is_right:
                raise SFTError(f"{option} is {value}", where=f"ForgettingProbe.{option}", fix=fix)
        for domain in self.domains:
            asked.check(domain)
        self.cost = cost
        self.kl_top_k = kl_top_k
        self.task_examples = task_examples
        self.strictness = strictness
        self.cache = cache
        self.baseline: Baseline | None = None
        self.task_before: float | None = None
        self.overlaps: list[Overlap] = []
        """Passages of the domains that are trained on; known to rank 0."""
        self.asked: dict[str, int] = {}
        """How many texts, questions, items and (`task`) validation examples are asked, by domain."""
        self.of: dict[str, int] = {}
        """How many there are of each."""
        self.planned_share = 0.0
        """The part of the training's computation that measuring takes, as planned."""
        self._is_exact = False  # the base that the run began with can be switched on again
        self._task: list[Example] = []
        self._loaded: list[Loaded] = []
        self._saved: dict[str, Any] = {}

    @property
    def weights(self) -> dict[str, float]:
        """The domains' weights, by name."""
        return {domain.name: domain.weight for domain in self.domains}

    def begin(self, trainer: Trainer, module: SFTModule) -> None:
        """Read the domains, choose what to ask of them and how often, and find or measure the baseline.

        Raises:
            SFTError: A domain's data is at fault, or some of its texts are trained on.
        """
        if self._loaded:
            return  # another callback has asked before
        self.count_time()
        began = time.monotonic()
        self._loaded = [asked.load(domain, module) for domain in self.domains]
        refuse_trained(self._loaded, module)
        if not trainer.global_step:
            self._is_exact = references.keeps_base(module) and references.begins_as_base(module)
        self._choose(trainer, module)
        self._warn_of_overlaps(trainer, module)
        self._find_baseline(trainer, module)
        self.seconds += time.monotonic() - began
        super().begin(trainer, module)

    def _warn_of_overlaps(self, trainer: Trainer, module: SFTModule) -> None:
        """Warn of passages that are trained on, and keep them for the record; rank 0 looks."""
        if not trainer.is_global_zero:
            return
        passages = [passage for loaded in self._loaded for passage in loaded.passages]
        tokenizer = module.tokenizer
        self.overlaps = overlaps(
            passages,
            module.data.prepared["train"].examples,
            lambda text: tokenizer.encode(text, add_special_tokens=False),
            tokenizer.decode,
        )
        if self.overlaps:
            lines = [
                f"\n    {each.passage.domain}: {each.passage.where}, in {each.row}: “{each.words}”"
                for each in self.overlaps
            ]
            more = "\n    ..." if len(lines) > _SHOWN else ""
            warnings.warn(
                f"ForgettingProbe: {len(lines)} of {len(passages)} probe texts have a passage that is trained on, so "
                f"they show less of what is forgotten:{''.join(lines[:_SHOWN])}{more}",
                stacklevel=2,
            )

    def latest(self, trainer: Trainer, module: SFTModule) -> dict[str, Any]:
        """The record of the step at hand, measured now if it wasn't yet; also before the probe's own first hook."""
        if not self._loaded:
            self.begin(trainer, module)
        return super().latest(trainer, module)

    def finish(self, trainer: Trainer, module: SFTModule) -> None:
        """Measure what came out, and say so if the start and the end alone have taken more time than `cost`."""
        super().finish(trainer, module)
        if self.is_auto and self.share_of_time > self.cost and trainer.is_global_zero:
            print(
                f"ForgettingProbe took {self.share_of_time:.1%} of the time, more than cost ({self.cost:.0%}): the run "
                "is short for it"
            )

    def measure(self, trainer: Trainer, module: SFTModule) -> dict[str, Any]:
        """The record of the model as it is now."""
        assert self.baseline is not None
        now = self.baseline.measured
        task = self._task_loss(module)
        if trainer.global_step == 0:
            self.task_before = task
        else:
            now = {
                loaded.domain.name: asked.measure(
                    loaded,
                    module,
                    self.scorer(module),
                    against_base=self._is_exact and self.kl_top_k > 0,
                    reference=self.baseline.predictions.get(loaded.domain.name),
                )[0]
                for loaded in self._loaded
            }
        return self._record(now, task)

    def _record(self, now: dict[str, Measured], task: float | None) -> dict[str, Any]:
        assert self.baseline is not None
        before = self.baseline.measured
        kept = {name: retained(before[name], each) for name, each in now.items()}
        deltas, interval = intervals(before, now, self.weights)
        record: dict[str, Any] = {
            "retention": retention(kept, self.weights),
            "retention_interval": list(interval),
            "worst": min(kept, key=lambda name: kept[name]),
            "worst_retention": min(kept.values()),
            "domains": {name: change(before[name], each) for name, each in now.items()},
        }
        for name, (low, high) in deltas.items():
            record["domains"][name]["delta_ce_interval"] = [low, high]
        label = "retention" if self.name is None else f"retention {self.name}"
        self.in_progress_bar = {label: record["retention"]}
        if task is not None and self.task_before:
            record["task_loss"] = task
            record["gain"] = 1 - task / self.task_before
            record["objective"] = objective(record["gain"], record["retention"], self.strictness)
        return record

    def _task_loss(self, module: SFTModule) -> float | None:
        if not self._task:
            return None
        nll = self.scorer(module).negative_log_likelihoods(self._task)
        return sum(nll) / sum(float(example.weights[1:].sum()) for example in self._task)

    # --------------------------------------------------------------------------------------- baseline

    def _find_baseline(self, trainer: Trainer, module: SFTModule) -> None:
        """The base's figures: of the checkpoint, of a file, or measured now."""
        keep = 0 if self._is_exact else self.kl_top_k
        folder = Path(self.cache).expanduser() if self.cache else Path(trainer.default_root_dir) / "probes"
        if trainer.global_step:
            if "key" not in self._saved:
                return  # the base class says what is wrong
            for loaded in self._loaded:
                if loaded.digest != self._saved["digests"][loaded.domain.name]:
                    raise _changed(loaded.domain.name)
            found = references.load(folder / f"{self._saved['key']}.safetensors")
            predictions = found.predictions if found is not None else {}
            if keep and found is None and any(loaded.texts for loaded in self._loaded):
                raise SFTError(
                    "the base's predictions, which the divergence is measured from, are gone",
                    where=str(folder / f"{self._saved['key']}.safetensors"),
                    fix="bring the file back, or set ForgettingProbe.kl_top_k: 0",
                )
            self.baseline = Baseline(references.measured_of(self._saved["measured"]), predictions)
            return
        key = references.key_of(module, self._loaded, frozen_only=self._is_exact, keep=keep)
        path = folder / f"{key}.safetensors"
        self.baseline = references.load(path)
        if self.baseline is None:
            self.baseline = self._measured_base(module, keep)
            if trainer.is_global_zero:
                references.save(path, self.baseline)
        self._saved = {
            "key": key,
            "digests": {loaded.domain.name: loaded.digest for loaded in self._loaded},
            "measured": {name: asdict(each) for name, each in self.baseline.measured.items()},
        }

    def _measured_base(self, module: SFTModule, keep: int) -> Baseline:
        measured, predictions = {}, {}
        for loaded in self._loaded:
            found, kept = asked.measure(loaded, module, self.scorer(module), keep=keep)
            if loaded.texts and self.kl_top_k:
                found = Measured(**{**asdict(found), "kl": (0.0,) * len(found.losses)})
            if found.score is not None and not (
                found.score > 0 or (found.score == 0 and found.higher_is_better)
            ):
                raise SFTError(
                    f"the base's score is {found.score:g}, of which no share can be kept",
                    where=f"ForgettingProbe, domain {loaded.domain.name}",
                    fix="take an evaluator with a score above 0",
                )
            measured[loaded.domain.name] = found
            if kept:
                predictions[loaded.domain.name] = kept
        return Baseline(measured, predictions)

    # ------------------------------------------------------------------------------------------- cost

    def _choose(self, trainer: Trainer, module: SFTModule) -> None:
        """Keep of each domain what may be asked, the same as before where the run goes on; and say so."""
        sizes = {loaded.domain.name: loaded.size for loaded in self._loaded}
        validation = module.data.prepared.get("val")
        sizes["task"] = 0 if validation is None else len(validation.examples)
        if self.asked and (other := sizes.keys() ^ self.asked.keys()):
            raise _changed(min(other))
        if not self.asked:
            self._plan(module, sizes)
            if trainer.is_global_zero:
                told = planned.told(self.asked, sizes, self.every_n_steps, self.planned_share, self.cost)
                print(told if self.name is None else f"{self.name}: {told}", flush=True)
        self._loaded = [
            loaded.part(planned.spread(loaded.size, self.asked[loaded.domain.name]))
            for loaded in self._loaded
        ]
        self._task = (
            []
            if validation is None
            else [validation.examples[row] for row in planned.spread(sizes["task"], self.asked["task"])]
        )
        self.of = sizes

    def _plan(self, module: SFTModule, sizes: dict[str, int]) -> None:
        parts = []
        for loaded in self._loaded:
            passes = 2 if loaded.texts and self._is_exact and self.kl_top_k else 1
            floor = planned.TEXTS if loaded.texts else planned.QUESTIONS
            least = floor if loaded.domain.limit is None else loaded.size
            costs = [passes * cost for cost in loaded.costs(module.tokenizer)]
            parts.append(planned.Part(costs, least, loaded.size))
        most = min(sizes["task"], planned.EXAMPLES)
        least = planned.QUESTIONS
        if self.task_examples is not None:
            most = least = min(sizes["task"], self.task_examples)
        lengths = module.data.prepared["val"].lengths.tolist() if sizes["task"] else []
        parts.append(planned.Part(lengths, least, most))
        steps, training = planned.forward_passes(module, frozen=references.keeps_base(module))
        every = None if self.is_auto else self.every_n_steps
        cost = planned.AIM * self.cost
        found = planned.plan(parts, steps=steps, training=training, cost=cost, every_n_steps=every)
        self.every_n_steps, self.planned_share = found.every_n_steps, found.share
        self.asked = dict(zip(sizes, found.counts, strict=True))

    # ------------------------------------------------------------------------------------------ output

    def numbers(self, record: dict[str, Any]) -> dict[str, float]:
        """Retention, gain, each domain's figures, and the share of the time that measuring takes."""
        found = super().numbers(record)
        for name, values in record["domains"].items():
            found |= {f"{name}/{key}": value for key, value in values.items() if not isinstance(value, list)}
        if record["step"]:
            found["share_of_time"] = self.share_of_time
        return found

    def told(self, record: dict[str, Any]) -> str:
        """Retention with its interval and worst domain, and the gain."""
        low, high = record["retention_interval"]
        line = f"step {record['step']}: retention {record['retention']:.3f} [{low:.3f}, {high:.3f}]"
        if len(self.domains) > 1:
            line += f", worst {record['worst']} {record['worst_retention']:.3f}"
        if "gain" in record:
            line += f", gain {record['gain']:.3f}, objective {record['objective']:.3f}"
        return line

    def report(self) -> dict[str, Any]:
        """The history, what was asked, and the base's figures of every item."""
        assert self.baseline is not None
        return {
            "every_n_steps": self.every_n_steps,
            "weights": self.weights,
            "strictness": self.strictness,
            "asked": {name: {"asked": self.asked[name], "of": size} for name, size in self.of.items()},
            "cost": self.cost,
            "planned_share": round(self.planned_share, 4),
            "seconds": round(self.seconds, 3),
            "share_of_time": round(self.share_of_time, 4),
            "overlaps": [
                {
                    "domain": each.passage.domain,
                    "text": each.passage.where,
                    "row": each.row,
                    "words": each.words,
                }
                for each in self.overlaps
            ],
            "baseline": {name: asdict(each) for name, each in self.baseline.measured.items()},
            **super().report(),
        }

    def state_dict(self) -> dict[str, Any]:
        """The history, the base's figures, which can't be measured again, and what is asked."""
        kept = {name: getattr(self, name) for name in _KEPT}
        return {**super().state_dict(), "base": self._saved, **kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        super().load_state_dict(state_dict)
        self._saved = state_dict["base"]
        if self.is_auto:
            self.every_n_steps = state_dict["every_n_steps"]
        for name in _KEPT[1:]:
            setattr(self, name, state_dict[name])


def _changed(domain: str) -> SFTError:
    return SFTError(
        f"the domain {domain} isn't what it was when the run began, so nothing can be compared",
        where="ForgettingProbe.domains",
        fix="bring its data and options back, or start a new run",
    )
