"""A language model as the judge of answers (Zheng et al., 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from lightning_sft import Answered, Evaluator, Item, ItemText, Results, SFTError
from lightning_sft_evaluators.endpoint import Asker, Endpoint, Reply
from lightning_sft_evaluators.judge_data import read_answers, read_questions, read_template
from lightning_sft_evaluators.judge_styles import MT_BENCH_TEMPERATURES, Pairwise, Single
from lightning_sft_evaluators.prompts import chosen

_BASE = "base"
_LISTED = 10


class Judge(Evaluator):
    """What a model behind an OpenAI-compatible endpoint thinks of the answers.

    The style `pairwise` compares each with a baseline's answer, in both orders, as AlpacaEval does: win rate, also with
    length controlled. The style `single` rates each from 1 to 10, turn by turn, as MT-Bench does.

    Args:
        questions: Rows with `instruction`, or with `turns`, `category` and `reference` as MT-Bench has them. A column
            `human` with the verdicts of humans on the same answers (model, baseline or tie; a list of ratings) gives
            Cohen's kappa.
        endpoint: The judge: base_url and model at least.
        style: Compare two answers, or rate one.
        baseline: For `pairwise`: `base`, the model before tuning; or a file of answers, with `instruction` and
            `output`, or with the records of an evaluation.
        prompt: A Jinja file with the judge's prompt and rubric; by default a packaged one.
        limit: Only so many questions: the first; with `seed`, some at random.
        seed: Seed of that choice.
        system: The system message of the model that is judged.
        max_new_tokens: Most tokens of each of its answers.
        temperatures: For `single`: at what temperature it answers, by category; by default MT-Bench's.
        max_unjudged: Refuse the result where a larger share of the items has no verdict that can be read.
        name: What the scores are called.
    """

    def __init__(
        self,
        questions: str,
        endpoint: Endpoint,
        style: Literal["pairwise", "single"] = "pairwise",
        baseline: str = _BASE,
        prompt: str | None = None,
        limit: int | None = None,
        seed: int | None = None,
        system: str | None = None,
        max_new_tokens: int = 1024,
        temperatures: dict[str, float] | None = None,
        max_unjudged: float = 0.05,
        name: str = "judge",
    ) -> None:
        for option, value in (("limit", limit), ("max_new_tokens", max_new_tokens)):
            if value is not None and value < 1:
                raise SFTError(f"{option} is {value}", where=f"Judge.{option}", fix="give 1 or more")
        self.questions = questions
        self.endpoint = endpoint
        self.baseline = baseline
        self.limit, self.seed = limit, seed
        self.max_unjudged = max_unjudged
        template = read_template(prompt, f"judge_{style}.jinja")
        self.style: Pairwise | Single
        if style == "pairwise":
            self.style = Pairwise(template, name, system, max_new_tokens)
        else:
            heats = MT_BENCH_TEMPERATURES if temperatures is None else temperatures
            self.style = Single(template, name, system, max_new_tokens, heats)
        self.needs_base = style == "pairwise" and baseline == _BASE

    def requests(self) -> Sequence[Item]:
        """One item for each question."""
        self.endpoint.check("Judge.endpoint")
        return self._items()

    def texts(self) -> Sequence[ItemText]:
        """As the base class's, without the endpoint, whose key isn't needed for it."""
        return [item.exposed for item in self._items()]

    def _items(self) -> list[Item]:
        asked = read_questions(self.questions)
        asked = [asked[place] for place in chosen(len(asked), self.limit, self.seed)]
        answers: Sequence[str | None] = [None] * len(asked)
        if isinstance(self.style, Pairwise) and not self.needs_base:
            answers = read_answers(self.baseline, asked)
        return [self.style.item(*pair) for pair in zip(asked, answers, strict=True)]

    def score(self, answered: Sequence[Answered]) -> Results:
        """The judge's verdicts; asks the endpoint for those that aren't in its cache.

        Raises:
            SFTError: The requests may cost too much, the endpoint refuses them, or too few verdicts can be read.
        """
        return self._judged(answered, [str(each.item.data.get("baseline") or "") for each in answered])

    def score_beside(self, answered: Sequence[Answered], base: Sequence[Answered]) -> Results:
        """As `score`, with the base's answers as the baseline's."""
        return self._judged(answered, [each.text for each in base])

    def _judged(self, answered: Sequence[Answered], baselines: Sequence[str]) -> Results:
        pairs = zip(answered, baselines, strict=True)
        prompts = [self.style.prompts(each, baseline) for each, baseline in pairs]
        replies = iter(Asker(self.endpoint, "Judge").ask([prompt for each in prompts for prompt in each]))
        found = [[next(replies) for _ in each] for each in prompts]
        verdicts = [self.style.verdict(each) for each in found]
        note = _unjudged(answered, found, verdicts)
        missing = verdicts.count(None)
        if missing == len(verdicts) or missing > self.max_unjudged * len(verdicts):
            raise SFTError(
                note,
                where="Judge.max_unjudged",
                fix=f"it is {self.max_unjudged:g}; run it again to ask for those that failed (other replies are in "
                f"{self.endpoint.cache or 'no cache'}), or choose another model or prompt",
            )
        results = self.style.results(answered, baselines, verdicts)
        return replace(results, notes=(note,) if missing else ())


def _unjudged(
    answered: Sequence[Answered], replies: Sequence[Sequence[Reply]], verdicts: Sequence[str | None]
) -> str:
    """How many items have no verdict that can be read, and which, with why."""
    told = []
    for each, found, verdict in zip(answered, replies, verdicts, strict=True):
        if verdict is None:
            failures = [reply.failure for reply in found if reply.text is None]
            ends = [f"ends in {reply.text[-40:]!r}" for reply in found if reply.text is not None]
            told.append(f"{each.item.task} {each.item.number} ({(failures or ends)[0]})")
    more = f", and {len(told) - _LISTED} more" if len(told) > _LISTED else ""
    return (
        f"{len(told)} of {len(verdicts)} items have no verdict that can be read: "
        f"{', '.join(told[:_LISTED])}{more}"
    )
