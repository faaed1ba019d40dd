"""The gradient of an optimizer step is that of its rows, however they are spread; all through the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from gradient_dump import load_steps
from torch import Tensor
from torch.nn import functional as F

from lightning_sft import Conversation, Message, Renderer, cli

TOLERANCE = {"32-true": 2e-6, "64-true": 1e-12}
REFERENCE_TOLERANCE = {"32-true": 1e-5, "64-true": 1e-12}
PRECISIONS = list(TOLERANCE)
FAMILY = {"32-true": "llama", "64-true": "gpt2"}
"""Llama's norms round to float32 even in a float64 model, GPT-2's don't."""

WORDS = (1, 24, 3, 40, 2, 9, 31, 1, 17)
WEIGHTS = (1.0, 0.5, 2.0, 1.0, 0.25, 3.0, 1.0, 0.125, 1.5)
"""Nine rows, so that steps of eight leave one over, which is fewer rows than two ranks have."""


def row(words: int, weight: float) -> dict[str, object]:
    return {
        "messages": [
            {"role": "user", "content": "how are you? " * (1 + words % 3)},
            {"role": "assistant", "content": "the user answers " * words, "weight": weight},
        ]
    }


@dataclass(frozen=True)
class Spread:
    """How rows are spread: `size` per micro-batch and rank, `accumulate` micro-batches, `ranks`.

    With `pack`, `size` is a number of packs of so many tokens; with `tokens`, that is the budget instead.
    """

    size: int
    accumulate: int = 1
    ranks: int = 1
    limit: float | int | None = None
    clip: float | None = None
    pack: int | None = None
    tokens: int | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Step:
    """An optimizer step, over all ranks: its rows, and what rank zero saw."""

    rows: list[int]
    fillers: int
    loss: float
    gradients: dict[str, Tensor]
    stepped_with: dict[str, Tensor]


@pytest.fixture(scope="module")
def steps_of(tmp_path_factory, model_folder):
    """A function from precision and spread to the steps of one epoch of `fit`; the learning rate is 0."""
    rows = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows.write_text("".join(json.dumps(row(*given)) + "\n" for given in zip(WORDS, WEIGHTS, strict=True)))
    done: dict[tuple[str, Spread], list[Step]] = {}

    def run(precision: str, spread: Spread) -> list[Step]:
        if (precision, spread) not in done:
            folder = tmp_path_factory.mktemp("run")
            config = configuration(folder, model_folder(FAMILY[precision]), rows, precision, spread)
            (fit_in_processes if spread.ranks > 1 else fit)(config, spread.ranks)
            done[precision, spread] = [over_ranks(ranks, spread) for ranks in load_steps(folder / "steps")]
        return done[precision, spread]

    return run


def configuration(folder: Path, base: Path, rows: Path, precision: str, spread: Spread) -> Path:
    config = {
        "model": {"base": str(base), "learning_rate": 0.0},
        "data": {
            "train": [{"path": str(rows), "weight": spread.weight}],
            "batch_size": spread.size,
            "batch_tokens": spread.tokens,
            "packing": spread.pack is not None,
            "pack_length": spread.pack,
        },
        "trainer": {
            "max_epochs": 1,
            "accelerator": "cpu",
            "precision": precision,
            "accumulate_grad_batches": spread.accumulate,
            "limit_train_batches": spread.limit,
            "gradient_clip_val": spread.clip,
            "default_root_dir": str(folder),
            "callbacks": [
                {"class_path": "gradient_dump.GradientDump", "init_args": {"folder": str(folder / "steps")}}
            ],
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": False,
        },
    }
    path = folder / "invariance.yaml"
    path.write_text(json.dumps(config))
    return path


def fit(config: Path, ranks: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS", "LIGHTNING_SFT_RUN_FOLDER"):
            patch.setenv(variable, "0")  # so that what the run sets is undone
        patch.delenv("LIGHTNING_SFT_RUN_FOLDER")
        cli.run(["fit", "--config", str(config)])


def fit_in_processes(config: Path, ranks: int) -> None:
    command = [sys.executable, "-m", "lightning_sft", "fit", "--config", str(config)]
    command += ["--trainer.strategy", "ddp", "--trainer.devices", str(ranks)]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, cwd=config.parent, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def over_ranks(ranks: list[dict], spread: Spread) -> Step:
    assert len(ranks) == spread.ranks
    for other in ranks[1:]:
        assert all(torch.equal(g, other["gradients"][name]) for name, g in ranks[0]["gradients"].items())
    return Step(
        rows=sorted(number for rank in ranks for number in rank["rows"]),
        fillers=sum(rank["fillers"] for rank in ranks),
        loss=ranks[0]["loss"],
        gradients=ranks[0]["gradients"],
        stepped_with=ranks[0]["stepped_with"],
    )


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return norm({name: a[name].double() - b[name].double() for name in a}) / norm(b)


def norm(gradients: dict[str, Tensor]) -> float:
    return sum(float(g.double().norm() ** 2) for g in gradients.values()) ** 0.5


ONE_BATCH = Spread(8)
ACCUMULATED = Spread(1, accumulate=8)
TWO_RANKS = Spread(4, ranks=2)
ALL_NINE = Spread(9)
"""Packs and budgets put other rows together, so to compare them with rows a step has to hold all of them."""


def assert_same_steps(steps: list[Step], expected: list[Step], precision: str) -> None:
    assert [step.rows for step in steps] == [step.rows for step in expected]
    for step, other in zip(steps, expected, strict=True):
        assert distance(step.gradients, other.gradients) <= TOLERANCE[precision]
        assert step.loss == pytest.approx(other.loss, rel=1e-5)


# ------------------------------------------------------------------------------- one reference, by hand


@pytest.fixture(scope="module")
def by_hand(model_folder, tokenizer):
    """A function from row numbers to Σ weight · nll / Σ weight and its gradients, by transformers alone.

    Row by row; `own_mean` divides by each row's own weights and takes the mean of that: what is wrong.
    """

    def compute(
        rows: list[int], precision: str, *, own_mean: bool = False
    ) -> tuple[float, dict[str, Tensor]]:
        dtype = {"32-true": torch.float32, "64-true": torch.float64}[precision]
        folder = model_folder(FAMILY[precision])
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        total, count = torch.zeros((), dtype=dtype), 0.0
        for number in rows:
            ids, trained = tokens_of(number, tokenizer)
            logits = model(input_ids=ids[None], use_cache=False).logits[0]
            weights = trained[1:].to(dtype) * WEIGHTS[number - 1]
            share = (F.cross_entropy(logits[:-1], ids[1:], reduction="none") * weights).sum()
            total = total + (share / weights.sum() if own_mean else share)
            count += 1 if own_mean else float(weights.sum())
        loss = total / count
        loss.backward()
        return loss.item(), {f"model.{name}": p.grad for name, p in model.named_parameters()}

    return compute


def tokens_of(number: int, tokenizer) -> tuple[Tensor, Tensor]:
    """The ids of a row, and which of them the assistant has to produce."""
    asked, answered = (message["content"] for message in row(WORDS[number - 1], 1.0)["messages"])
    prompt = f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    trained = tokenizer(f"{answered}<|im_end|>", add_special_tokens=False)["input_ids"]
    after = tokenizer("\n", add_special_tokens=False)["input_ids"]
    mask = [False] * len(before) + [True] * len(trained) + [False] * len(after)
    return torch.tensor(before + trained + after), torch.tensor(mask)


def assert_by_hand(steps: list[Step], by_hand, precision: str) -> None:
    for step in steps:
        loss, gradients = by_hand(step.rows, precision)
        assert distance(step.gradients, gradients) <= REFERENCE_TOLERANCE[precision]
        assert step.loss == pytest.approx(loss, rel=1e-5)


def test_the_rows_differ_so_much_that_a_mean_of_means_would_be_seen(by_hand, tokenizer):
    rows = list(range(1, 9))
    exact, wrong = by_hand(rows, "32-true"), by_hand(rows, "32-true", own_mean=True)
    assert distance(wrong[1], exact[1]) > 0.1
    example = Renderer(tokenizer).render(
        Conversation(tuple(Message(**message) for message in row(WORDS[1], WEIGHTS[1])["messages"]))
    )
    ids, trained = tokens_of(2, tokenizer)
    assert example.input_ids.tolist() == ids.tolist()
    assert example.weights.tolist() == (trained * WEIGHTS[1]).tolist()


# ---------------------------------------------------------------------------------------- one process


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_step_in_one_micro_batch_has_the_gradient_of_its_rows(precision, steps_of, by_hand):
    steps = steps_of(precision, ONE_BATCH)
    assert [len(step.rows) for step in steps] == [8, 1]
    assert_by_hand(steps, by_hand, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("spread", [ACCUMULATED, Spread(2, accumulate=4)], ids=str)
def test_accumulation_changes_no_gradient(spread, precision, steps_of):
    assert_same_steps(steps_of(precision, spread), steps_of(precision, ONE_BATCH), precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("spread", "sizes"),
    [
        (Spread(1, accumulate=4, limit=6), [4, 2]),
        (Spread(1, accumulate=3, limit=0.9), [3, 3, 2]),
        (Spread(2, accumulate=2, limit=3), [4, 2]),
        (Spread(2, accumulate=4), [8, 1]),
    ],
    ids=str,
)
def test_a_window_that_ends_early_has_the_gradient_of_the_rows_in_it(
    spread, sizes, precision, steps_of, by_hand
):
    steps = steps_of(precision, spread)
    assert [len(step.rows) for step in steps] == sizes
    assert_by_hand(steps, by_hand, precision)


def test_callbacks_see_the_true_gradient_and_the_optimizer_the_clipped_one(steps_of):
    free, clipped = steps_of("64-true", ONE_BATCH), steps_of("64-true", Spread(1, accumulate=8, clip=0.01))
    assert_same_steps(clipped, free, "64-true")
    for step in clipped:
        assert norm(step.gradients) > 0.1
        assert norm(step.stepped_with) == pytest.approx(0.01, rel=1e-4)
        scale = norm(step.stepped_with) / norm(step.gradients)
        assert distance(step.stepped_with, {name: g * scale for name, g in step.gradients.items()}) < 1e-12
    assert all(distance(step.stepped_with, step.gradients) == 0 for step in free)


# ------------------------------------------------------------------------- packs, token budgets, weights


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "spread",
    [
        Spread(4, pack=200),
        Spread(1, accumulate=4, pack=200),
        Spread(3, accumulate=8, pack=200),  # a window of eight that ends after two micro-batches
        Spread(tokens=1000, size=1),
        Spread(tokens=200, size=1, accumulate=8),
    ],
    ids=str,
)
def test_packs_and_token_budgets_change_no_gradient(spread, precision, steps_of):
    assert_same_steps(steps_of(precision, spread), steps_of(precision, ALL_NINE), precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("spread", "sizes"),
    [
        (Spread(1, accumulate=3, pack=200), None),
        (Spread(1, accumulate=2, pack=200, limit=3), None),
        (Spread(tokens=200, size=1), [3, 2, 3, 1]),
        (Spread(tokens=200, size=1, accumulate=2, limit=0.8), [5, 3]),
        (Spread(4, weight=0.5), [4]),
        (Spread(4, weight=2.0), [4, 4, 4, 4, 2]),
        (Spread(1, accumulate=4, pack=200, weight=2.0), None),
    ],
    ids=str,
)
def test_steps_of_packs_budgets_and_weights_have_the_gradient_of_their_rows(
    spread, sizes, precision, steps_of, by_hand
):
    steps = steps_of(precision, spread)
    assert sizes in (None, [len(step.rows) for step in steps])
    assert_by_hand(steps, by_hand, precision)
    if spread.limit is None:
        assert sum(len(step.rows) for step in steps) == int(len(WORDS) * spread.weight + 0.1)


def test_packs_are_clipped_like_rows(steps_of):
    packed, rows = (
        steps_of("64-true", spread)
        for spread in (Spread(1, accumulate=4, pack=200, clip=0.01), Spread(3, accumulate=3, clip=0.01))
    )
    assert_same_steps(packed, rows, "64-true")
    assert distance(packed[0].stepped_with, rows[0].stepped_with) < 1e-12
    assert norm(packed[0].stepped_with) == pytest.approx(0.01, rel=1e-4)


# ------------------------------------------------------------------------------------------- two ranks


def test_two_ranks_have_the_gradient_of_one_also_where_the_second_has_no_row(steps_of):
    steps = steps_of("64-true", TWO_RANKS)
    assert [step.fillers for step in steps] == [0, 1]
    assert_same_steps(steps, steps_of("64-true", ONE_BATCH), "64-true")


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("spread", "fillers"),
    [
        (TWO_RANKS, [0, 1]),
        (Spread(2, accumulate=2, ranks=2), [0, 1]),
        (Spread(1, accumulate=4, ranks=2), [0, 1]),
        (Spread(4, ranks=2, clip=0.01), [0, 1]),
    ],
    ids=str,
)
def test_ranks_and_accumulation_together_change_no_gradient(spread, fillers, precision, steps_of):
    steps = steps_of(precision, spread)
    assert [step.fillers for step in steps] == fillers
    assert_same_steps(steps, steps_of(precision, ONE_BATCH), precision)


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_window_that_ends_early_on_two_ranks_has_the_gradient_of_the_rows_in_it(
    precision, steps_of, by_hand
):
    steps = steps_of(precision, Spread(1, accumulate=2, ranks=2, limit=3))
    assert [len(step.rows) for step in steps] == [4, 2]
    assert_by_hand(steps, by_hand, precision)


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("spread", "fillers"),
    [
        (Spread(2, ranks=2, pack=200), 0),
        (Spread(1, accumulate=4, ranks=2, pack=200), 0),
        (Spread(1, accumulate=4, ranks=2, pack=220), 1),  # three packs for four places
        (Spread(tokens=200, size=1, accumulate=4, ranks=2), 0),
        (Spread(tokens=1000, size=1, ranks=2), 1),  # one bin: the other rank has nothing that counts
    ],
    ids=str,
)
def test_packs_and_token_budgets_on_two_ranks_change_no_gradient(spread, fillers, precision, steps_of):
    steps = steps_of(precision, spread)
    assert [step.fillers for step in steps] == [fillers]
    assert_same_steps(steps, steps_of(precision, ALL_NINE), precision)
