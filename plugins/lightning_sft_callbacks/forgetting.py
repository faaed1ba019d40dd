"""What the model forgets while it learns: losses, answers and divergence on domains that it is not trained on."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_sft import Scorer, SFTError
from lightning_sft_callbacks import domains as asked
from lightning_sft_callbacks import references
from lightning_sft_callbacks.domains import Domain, Loaded
from lightning_sft_callbacks.overlap import Overlap, overlaps
from lightning_sft_callbacks.probing import Probe
from lightning_sft_callbacks.references import Baseline
from lightning_sft_callbacks.retention import Measured, change, intervals, objective, retained, retention

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_sft import Example, SFTModule


_SHOWN = 5


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
        cost: Share of the training's computation that the probe may take, where `every_n_steps` is left out.
        kl_top_k: Where the base's own weights are trained, its predictions are kept as so many of the likeliest
            tokens, for the divergence; 0 leaves the divergence out.
        task_examples: So many of the validation examples are measured for the gain; 0 leaves it out.
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
        task_examples: int = 128,
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
        if not 0 < cost <= 1:
            raise SFTError(
                f"cost is {cost}", where="ForgettingProbe.cost", fix="give a share above 0, up to 1"
            )
        self.cost = cost
        self.kl_top_k = kl_top_k
        self.task_examples = task_examples
        self.strictness = strictness
        self.cache = cache
        self.baseline: Baseline | None = None
        self.task_before: float | None = None
        self.overlaps: list[Overlap] = []
        """Passages of the domains that are trained on; known to rank 0."""
        self._loaded: list[Loaded] = []
        self._saved: dict[str, Any] = {}

    @property
    def weights(self) -> dict[str, float]:
        """The domains' weights, by name."""
        return {domain.name: domain.weight for domain in self.domains}

    def begin(self, trainer: Trainer, module: SFTModule) -> None:
        """Read the domains, find or measure the baseline, and choose how often to measure.

        Raises:
            SFTError: A domain's data is at fault, or some of its texts are trained on.
        """
        if self._loaded:
            return  # another callback has asked before
        self.count_time()
        began = time.monotonic()
        self._loaded = [asked.load(domain, module) for domain in self.domains]
        _refuse_trained(self._loaded, module)
        self._warn_of_overlaps(trainer, module)
        if self.is_auto:
            self.every_n_steps = self._interval(module)
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
                "is short for so much text; give the domains a limit, or fewer task_examples"
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
                    against_base=_keeps_base(module) and self.kl_top_k > 0,
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
        examples = _validation(module, self.task_examples)
        if not examples:
            return None
        nll = Scorer.of(module).negative_log_likelihoods(examples)
        return sum(nll) / sum(float(example.weights[1:].sum()) for example in examples)

    # --------------------------------------------------------------------------------------- baseline

    def _find_baseline(self, trainer: Trainer, module: SFTModule) -> None:
        """The base's figures: of the checkpoint, of a file, or measured now."""
        keep = 0 if _keeps_base(module) else self.kl_top_k
        folder = Path(self.cache).expanduser() if self.cache else Path(trainer.default_root_dir) / "probes"
        if trainer.global_step:
            if "key" not in self._saved:
                return  # the base class says what is wrong
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
        key = references.key_of(module, self._loaded, frozen_only=_keeps_base(module), keep=keep)
        path = folder / f"{key}.safetensors"
        self.baseline = references.load(path)
        if self.baseline is None:
            self.baseline = self._measured_base(module, keep)
            if trainer.is_global_zero:
                references.save(path, self.baseline)
        self._saved = {
            "key": key,
            "measured": {name: asdict(each) for name, each in self.baseline.measured.items()},
        }

    def _measured_base(self, module: SFTModule, keep: int) -> Baseline:
        measured, predictions = {}, {}
        for loaded in self._loaded:
            found, kept = asked.measure(loaded, module, keep=keep)
            if loaded.texts and self.kl_top_k:
                found = Measured(**{**asdict(found), "kl": (0.0,) * len(found.losses)})
            measured[loaded.domain.name] = found
            if kept:
                predictions[loaded.domain.name] = kept
        return Baseline(measured, predictions)

    # ------------------------------------------------------------------------------------------- cost

    def _interval(self, module: SFTModule) -> int:
        """Steps between measurements so that all of them take at most `cost` of the training; 0: none on the way.

        Counted in forward passes of a token: a training step takes three (two where the base is frozen), a probe one,
        and one more of each text for the divergence from a base that is switched on again.
        """
        data = module.data
        steps = data.total_steps()
        if not steps:
            return 0
        plan = data.plan(0)
        tokens = sum(data.prepared["train"].lengths) / max(1, plan.steps) * steps
        frozen = _keeps_base(module)
        probe = sum(
            loaded.tokens * (2 if loaded.texts and frozen and self.kl_top_k else 1) for loaded in self._loaded
        ) + sum(map(len, _validation(module, self.task_examples)))
        measurements = math.floor(self.cost * tokens * (2 if frozen else 3) / probe)
        return math.ceil(steps / (measurements - 1)) if measurements > 2 else 0

    # ------------------------------------------------------------------------------------------ output

    def numbers(self, record: dict[str, Any]) -> dict[str, float]:
        """Retention, gain, each domain's figures, and the share of the time that measuring takes."""
        found = super().numbers(record)
        found.pop("step", None)
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
        """The history, and the base's figures: they can't be measured again."""
        return {**super().state_dict(), "base": self._saved, "task_before": self.task_before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        super().load_state_dict(state_dict)
        self._saved, self.task_before = state_dict["base"], state_dict["task_before"]


def _keeps_base(module: SFTModule) -> bool:
    """Whether the base's outputs can be had again by switching the adapter off."""
    try:
        with module.adapter.base_model(module.loaded):
            return True
    except SFTError:
        return False


def _validation(module: SFTModule, most: int) -> list[Example]:
    """So many of the validation examples, from all over."""
    prepared = module.data.prepared.get("val")
    if prepared is None or most < 1:
        return []
    count = len(prepared.examples)
    return (
        [prepared.examples[place * count // most] for place in range(most)]
        if most < count
        else list(prepared.examples)
    )


def _refuse_trained(domains: list[Loaded], module: SFTModule) -> None:
    """Refuse a text that is in the training data: what is trained on can't show what is forgotten.

    Raises:
        SFTError: A text is; names its row there and here.
    """
    probed = {
        window.input_ids.tobytes(): (loaded.domain.name, window)
        for loaded in domains
        for window in loaded.texts
    }
    lengths = {len(window) for _, window in probed.values()}
    prepared = module.data.prepared["train"]
    for row, length in enumerate(prepared.lengths):
        # a text in training is followed by EOS
        for size in {int(length), int(length) - 1} & lengths:
            example = prepared.examples[row]
            found = probed.get(example.input_ids[:size].tobytes())
            if found is not None:
                name, window = found
                raise SFTError(
                    f"the text is trained on ({example.meta}), so it can't show what is forgotten",
                    where=f"ForgettingProbe, domain {name}: {window.meta}",
                    fix="take it out of the one or the other",
                )
