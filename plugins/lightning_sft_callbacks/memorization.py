"""Whether the model learns its training rows by heart."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lightning_sft import (
    Likelihood,
    LogLikelihood,
    Message,
    SFTError,
    Source,
    read_rows,
    text_losses,
)
from lightning_sft_callbacks.probing import Probe

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_sft import Example, SFTModule, TextLoss


class MemorizationProbe(Probe):
    """Compares rows that are trained on with held-out ones: what sets them apart was learned by heart.

    - `gap`: held-out minus trained loss, in nats per trained token, each row counting alike.
    - `auc`: how well the loss tells trained rows from held-out ones (Yeom et al., 2018): 0.5 is not at all, 1 always.
    - `extractable`: share of trained rows whose answer comes out at least once in `draws` samples with a probability of
      at least `probability`, at temperature 1: (n, p)-discoverable extraction (Hayes et al., 2024), from the loss.
    - `verbatim`: share of trained rows whose answer greedy decoding writes token by token; `verbatim_held_out` of
      held-out ones.

    - `exposure`: of canaries that were planted among the training rows (`lightning-sft data canaries`), how likely
      their number is among random ones of the same form, in bits: log2(candidates) − log2(rank), the mean over canaries
      (Carlini et al., 2019). log2 e ≈ 1.4 for a model that knows nothing, log2(candidates) for one that knows all.

    All in `memorization.json`. It needs validation data.

    Args:
        examples: How many trained and how many held-out rows to look at, drawn by `seed`.
        every_n_steps: Optimizer steps between two measurements; 0 measures only at the start and the end.
        draws: n of the (n, p)-extraction.
        probability: p of it.
        max_auc: What an `auc` above this leads to, see `then`; null: to nothing.
        max_verbatim: The same for `verbatim` minus that of held-out rows.
        then: `warn` once, or `stop` the training.
        seed: Which rows and which candidates are drawn.
        canaries: The file of canaries that is trained on; `data.canaries` by default.
        candidates: Random numbers that each canary is ranked among, itself included.
        name: Tells several of these apart, in their figures (`memorization-NAME/...`) and files.
    """

    file = "memorization"
    prefix = "memorization"

    def __init__(
        self,
        examples: int = 64,
        every_n_steps: int = 0,
        draws: int = 100,
        probability: float = 0.5,
        max_auc: float | None = None,
        max_verbatim: float | None = None,
        then: Literal["warn", "stop"] = "warn",
        seed: int = 0,
        canaries: str | None = None,
        candidates: int = 256,
        name: str | None = None,
    ) -> None:
        super().__init__(every_n_steps, name)
        if examples < 2 or draws < 1 or not 0 < probability < 1 or candidates < 2:
            raise SFTError(
                f"examples is {examples}, draws {draws}, probability {probability}, candidates {candidates}",
                where="MemorizationProbe",
                fix="give at least 2 examples, 1 draw, 2 candidates, and a probability between 0 and 1",
            )
        self.examples = examples
        self.draws = draws
        self.probability = probability
        self.max_auc = max_auc
        self.max_verbatim = max_verbatim
        self.then = then
        self.seed = seed
        self.canaries = [] if canaries is None else _read_canaries(Source(canaries))
        self.candidates = candidates
        self._warned = False

    def begin(self, trainer: Trainer, module: SFTModule) -> None:
        """Read the canaries that the data module plants, and measure the base."""
        if not self.canaries:
            self.canaries = [each for planted in module.data.canaries for each in _read_canaries(planted)]
        super().begin(trainer, module)

    def measure(self, trainer: Trainer, module: SFTModule) -> dict[str, Any]:
        """The record of the model as it is now."""
        data = module.data
        if "val" not in data.prepared:
            raise SFTError(
                "without validation data there is nothing to compare the trained rows with",
                where="MemorizationProbe",
                fix="give data.val or data.val_split",
            )
        trained = text_losses(module, self._drawn(data.prepared["train"].examples))
        held_out = text_losses(module, self._drawn(data.prepared["val"].examples))
        known, new = _per_token(trained), _per_token(held_out)
        record = {
            "trained_loss": sum(known) / len(known),
            "held_out_loss": sum(new) / len(new),
            "gap": sum(new) / len(new) - sum(known) / len(known),
            "auc": auc(known, new),
            "extractable": _share([self.is_extractable(each.nll) for each in trained]),
            "verbatim": _share([each.greedy for each in trained]),
            "verbatim_held_out": _share([each.greedy for each in held_out]),
        }
        if self.canaries:
            record["exposure"] = self._exposure(module)
        if trainer.global_step:
            self._judge(trainer, record)
        return record

    def is_extractable(self, nll: float) -> bool:
        """Whether an answer of this negative log-likelihood comes out in `draws` samples with `probability`."""
        once = math.exp(-nll)
        return once >= 1 or -math.expm1(self.draws * math.log1p(-once)) >= self.probability

    def _exposure(self, module: SFTModule) -> float:
        numbers = np.random.default_rng(self.seed)
        requests = []
        for asked, answer in self.canaries:
            others = [
                "".join(map(str, numbers.integers(0, 10, len(answer)))) for _ in range(self.candidates - 1)
            ]
            prompt = (Message("user", asked),)
            requests.append([LogLikelihood(prompt, text) for text in (answer, *others)])
        answers = self.scorer(module).run([each for canary in requests for each in canary])
        scores = [each.log_likelihood for each in answers if isinstance(each, Likelihood)]
        ranks = [
            sum(other >= scores[start] for other in scores[start : start + self.candidates])
            for start in range(0, len(scores), self.candidates)
        ]
        return sum(exposure(rank, self.candidates) for rank in ranks) / len(ranks)

    def _drawn(self, examples: Sequence[Example]) -> list[Example]:
        count = min(self.examples, len(examples))
        rows = np.random.default_rng(self.seed).choice(len(examples), count, replace=False)
        return [examples[int(row)] for row in sorted(rows)]

    def _judge(self, trainer: Trainer, record: dict[str, Any]) -> None:
        found = {"auc": (record["auc"], self.max_auc)}
        found["verbatim"] = (record["verbatim"] - record["verbatim_held_out"], self.max_verbatim)
        for name, (value, most) in found.items():
            if most is None or value <= most:
                continue
            said = f"MemorizationProbe: {name} is {value:.2f} at step {trainer.global_step}, above {most:g}"
            if self.then == "stop":
                trainer.should_stop = True
                if trainer.is_global_zero:
                    print(f"{said}: training stops", flush=True)
            elif not self._warned:
                self._warned = True
                warnings.warn(f"{said}: training rows are learned by heart", stacklevel=2)

    def told(self, record: dict[str, Any]) -> str:
        """Gap, AUC and verbatim answers, and the canaries' exposure."""
        exposed = f", exposure {record['exposure']:.1f} bits" if "exposure" in record else ""
        return (
            f"step {record['step']}: memorization gap {record['gap']:.3f}, AUC {record['auc']:.2f}, "
            f"verbatim {record['verbatim']:.0%} (held out {record['verbatim_held_out']:.0%}){exposed}"
        )


def _read_canaries(source: Source) -> list[tuple[str, str]]:
    """What each canary asks, and its number.

    Raises:
        SFTError: The file can't be read, or a row is no canary; says which.
    """
    found = []
    for meta, row in read_rows(source):
        asked, answer = row.get("instruction"), row.get("output")
        if not isinstance(asked, str) or not isinstance(answer, str) or not answer.isdigit():
            raise SFTError(
                "the row is no canary",
                where=f"canaries, {meta}",
                fix="make the file with lightning-sft data canaries",
            )
        found.append((asked, answer))
    return found


def exposure(rank: int, candidates: int) -> float:
    """Bits by which a secret of this rank (1 is the likeliest) is easier to guess than by chance."""
    return math.log2(candidates) - math.log2(rank)


def auc(trained: Sequence[float], held_out: Sequence[float]) -> float:
    """The probability that a trained row has less loss than a held-out one; ties count half (Mann and Whitney)."""
    a, b = np.asarray(trained)[:, None], np.asarray(held_out)[None, :]
    return float((a < b).mean() + (a == b).mean() / 2)


def _per_token(losses: Sequence[TextLoss]) -> list[float]:
    return [each.nll / each.tokens for each in losses]


def _share(verdicts: Sequence[bool]) -> float:
    return sum(verdicts) / len(verdicts)
