"""The data module: a split that doesn't leak, batches in the plan's order, the number of steps, refusals."""

from __future__ import annotations

import json
import re
import warnings

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from lightning_sft import SFTDataModule, SFTError, SFTModule
from lightning_sft.data.plan import MicroBatch
from lightning_sft.data.sources import Source
from lightning_sft.training.progress import summary

CONTEXT = 256


def chat(asked: str, answered: str) -> dict[str, object]:
    return {
        "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}],
    }


@pytest.fixture
def rows_file(tmp_path):
    """A function from rows to the path of a JSONL file that holds them."""

    def write(rows: list[object], name: str = "train") -> str:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def ten_rows(rows_file) -> str:
    return rows_file([chat(f"question {n}", "answer " * (1 + n % 4)) for n in range(10)])


@pytest.fixture
def repeated_prompts(rows_file) -> str:
    """Forty rows with ten prompts, four answers to each, the prompts spelled in different ways."""
    spelled = ("how are you", "How are  you", "HOW ARE YOU", " how are you ")
    return rows_file([chat(f"{spelled[n % 4]} {n // 4}", f"fine {n}") for n in range(40)])


def trainer(**options) -> Trainer:
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
    }
    return Trainer(accelerator="cpu", **quiet, **options)


@pytest.fixture
def attached(model_folder):
    """A function from a data module's and a trainer's options to a data module that is part of a run."""

    def attach(*, options: dict[str, object] | None = None, **given) -> SFTDataModule:
        data = SFTDataModule(**given)
        data.trainer = trainer(**(options or {}))
        data.trainer.strategy.connect(SFTModule(base=str(model_folder("llama"))))
        return data

    return attach


def prompts(data: SFTDataModule, part: str) -> set[str]:
    return set(data.prepared[part].keys)


def rows(data: SFTDataModule, part: str) -> list[int]:
    return [example.meta.row for example in data.prepared[part].examples]


# ----------------------------------------------------------------------------------------------- split


@pytest.mark.parametrize("val_split", [0.1, 0.3, 8])
def test_no_prompt_is_on_both_sides_of_a_split(val_split, repeated_prompts, attached):
    data = attached(train=repeated_prompts, val_split=val_split)
    data.setup("fit")
    assert not prompts(data, "train") & prompts(data, "val")
    assert sorted(rows(data, "train") + rows(data, "val")) == list(range(1, 41))
    assert len(rows(data, "val")) == (val_split if isinstance(val_split, int) else 40 * val_split)


def held_out(data: SFTDataModule) -> list[int]:
    data.setup("fit")
    return rows(data, "val")


def test_which_rows_are_held_out_depends_on_split_seed_alone(repeated_prompts, attached, monkeypatch):
    chosen = held_out(attached(train=repeated_prompts, val_split=0.3, seed=0))
    assert held_out(attached(train=repeated_prompts, val_split=0.3, seed=1)) == chosen
    monkeypatch.setenv("PL_GLOBAL_SEED", "123")
    assert held_out(attached(train=repeated_prompts, val_split=0.3)) == chosen
    assert held_out(attached(train=repeated_prompts, val_split=0.3, split_seed=1)) != chosen


def test_validation_alone_holds_out_the_same_rows_as_a_fit(repeated_prompts, attached):
    chosen = held_out(attached(train=repeated_prompts, val_split=0.3))
    alone = attached(train=repeated_prompts, val_split=0.3)
    alone.setup("validate")
    assert rows(alone, "val") == chosen


def test_setting_up_twice_splits_once(repeated_prompts, attached):
    data = attached(train=repeated_prompts, val_split=0.3)
    data.setup("fit")
    before = rows(data, "train"), rows(data, "val")
    data.setup("fit")
    data.setup("validate")
    assert (rows(data, "train"), rows(data, "val")) == before


def test_validation_data_and_a_split_exclude_each_other(ten_rows):
    with pytest.raises(SFTError, match=r"data\.val and data\.val_split"):
        SFTDataModule(train=ten_rows, val=ten_rows, val_split=0.1)


def test_prompts_that_validation_data_shares_with_training_are_warned_of(ten_rows, rows_file, attached):
    val = rows_file([chat("question 3", "x"), chat("QUESTION  7", "y"), chat("another", "z")], "val")
    data = attached(train=ten_rows, val=val)
    with pytest.warns(
        UserWarning, match="2 of 3 validation rows have a prompt that is also in the training data"
    ):
        data.setup("fit")


def test_validation_data_of_its_own_is_not_warned_of(ten_rows, rows_file, attached):
    data = attached(train=ten_rows, val=rows_file([chat("another", "z")], "val"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.setup("fit")
    assert (len(rows(data, "train")), len(rows(data, "val"))) == (10, 1)


def test_the_ledger_counts_each_side_of_a_split_and_every_row_once(repeated_prompts, attached):
    data = attached(train=repeated_prompts, val_split=0.3)
    data.setup("fit")
    ledger = json.loads(json.dumps(data.ledger))
    assert (ledger["train"]["examples"], ledger["val"]["examples"]) == (28, 12)
    assert sum(source["rows"] for part in ledger.values() for source in part["sources"]) == 40
    tokens = sum(source["tokens"] for part in ledger.values() for source in part["sources"])
    assert ledger["train"]["tokens"] + ledger["val"]["tokens"] == tokens


# ------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("stage", "part"), [("fit", "train"), ("validate", "val"), ("test", "test")])
def test_a_stage_without_data_is_refused_by_name(stage, part, attached):
    with pytest.raises(SFTError, match=f"no data is given for {part}") as caught:
        attached().setup(stage)
    assert caught.value.where == f"data.{part}"


def test_a_max_length_above_the_context_is_refused_and_the_message_says_what_goes(ten_rows, attached):
    with pytest.raises(
        SFTError, match=f"max_length {CONTEXT + 1} is more than the model's context of {CONTEXT}"
    ) as e:
        attached(train=ten_rows, max_length=CONTEXT + 1).setup("fit")
    assert e.value.where == "data.max_length"
    attached(train=ten_rows, max_length=CONTEXT).setup("fit")


@pytest.mark.parametrize("max_length", [1, 0, -5])
def test_a_max_length_that_leaves_nothing_to_predict_is_refused(max_length, ten_rows, attached):
    with pytest.raises(SFTError, match=f"max_length is {max_length}"):
        attached(train=ten_rows, max_length=max_length).setup("fit")


def test_without_a_max_length_the_context_is_the_limit(rows_file, attached):
    path = rows_file([chat("a", "b"), chat("a", "the user asks " * 200)])
    data = attached(train=path, max_lost_fraction=1.0)
    data.setup("fit")
    assert rows(data, "train") == [1]
    with pytest.raises(SFTError, match=r"more than data\.max_lost_fraction 1\.0%"):
        attached(train=path).setup("fit")
    cut = attached(train=path, max_lost_fraction=1.0, overlong="truncate_right")
    cut.setup("fit")
    assert [len(example) <= CONTEXT for example in cut.prepared["train"].examples] == [True, True]
    assert len(cut.prepared["train"].examples[1]) == CONTEXT


# ------------------------------------------------------------------------------------------- batches


class Seen(Callback):
    """The rows of every training batch, in order, by epoch."""

    def __init__(self) -> None:
        self.rows: dict[int, list[list[int]]] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rows.setdefault(trainer.current_epoch, []).append([meta.row for meta in batch.metas])


def planned(data: SFTDataModule, epoch: int) -> list[list[int]]:
    examples = data.prepared["train"].examples
    return [[examples[row].meta.row for row in micro.rows] for micro in data.plan(epoch).rank(0)]


def test_every_epoch_is_trained_on_in_its_plans_order(ten_rows, model_folder):
    seen = Seen()
    run = trainer(max_epochs=2, callbacks=[seen])
    data = SFTDataModule(train=ten_rows, batch_size=3, seed=5)
    run.fit(SFTModule(base=str(model_folder("llama"))), datamodule=data)
    assert seen.rows == {epoch: planned(data, epoch) for epoch in (0, 1)}
    assert seen.rows[0] != seen.rows[1]


def test_the_order_follows_seed_everything_unless_data_has_a_seed_of_its_own(ten_rows, attached, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "11")
    follows, own = attached(train=ten_rows), attached(train=ten_rows, seed=3)
    follows.setup("fit")
    own.setup("fit")
    before = planned(follows, 0), planned(own, 0)
    monkeypatch.setenv("PL_GLOBAL_SEED", "12")
    assert planned(follows, 0) != before[0]
    assert planned(own, 0) == before[1]


def test_a_filler_counts_with_weight_zero(ten_rows, attached):
    data = attached(train=ten_rows)
    data.setup("fit")
    data.trainer.lightning_module.configure_model()
    dataset = data.train_dataloader().dataset
    counted, filler = (
        dataset[MicroBatch(rows=(4,), num_items=9.0, filler=filler)] for filler in (False, True)
    )
    assert counted.weights.sum() > 0
    assert filler.weights.tolist() == [0.0] * len(counted.weights)
    assert torch.equal(filler.input_ids, counted.input_ids)


def test_validation_serves_every_row_once_in_the_order_of_the_file(ten_rows, rows_file, attached):
    val = rows_file([chat(f"v {n}", "z") for n in range(7)], "val")
    data = attached(train=ten_rows, val=val, val_batch_size=3)
    data.setup("fit")
    data.trainer.lightning_module.configure_model()
    served = [[meta.row for meta in batch.metas] for batch in data.val_dataloader()]
    assert served == [[1, 2, 3], [4, 5, 6], [7]]


# --------------------------------------------------------------------------------------- total steps


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_epochs": 1}, 5),
        ({"max_epochs": 4}, 20),
        ({"max_epochs": 4, "accumulate_grad_batches": 2}, 12),  # windows 2, 2, 1 in every epoch
        ({"max_epochs": 4, "accumulate_grad_batches": 9}, 4),
        ({"max_steps": 7}, 7),
        ({"max_steps": 7, "max_epochs": 1}, 5),
        ({"max_steps": 2, "max_epochs": 4}, 2),
        ({"max_epochs": 4, "limit_train_batches": 3}, 12),
        ({"max_epochs": 4, "limit_train_batches": 0.5}, 8),
        ({"max_epochs": 4, "limit_train_batches": 3, "accumulate_grad_batches": 2}, 8),
        ({"max_epochs": -1}, 0),
    ],
    ids=str,
)
def test_total_steps_counts_epochs_windows_and_limits(options, steps, ten_rows, attached):
    data = attached(train=ten_rows, batch_size=2, options=options)
    data.setup("fit")
    assert data.total_steps() == steps


@pytest.mark.parametrize(
    "options",
    [
        {"max_epochs": 2, "accumulate_grad_batches": 2},
        {"max_epochs": 2, "accumulate_grad_batches": 2, "limit_train_batches": 0.7},
        {"max_steps": 4, "accumulate_grad_batches": 2},
    ],
    ids=str,
)
def test_a_run_makes_total_steps_steps_and_the_learning_rate_ends_where_it_should(
    options, ten_rows, model_folder
):
    run = trainer(**options)
    data = SFTDataModule(train=ten_rows, batch_size=2)
    module = SFTModule(base=str(model_folder("llama")), learning_rate=1e-3, final_learning_rate=0.25)
    run.fit(module, datamodule=data)
    assert run.global_step == data.total_steps()
    assert run.lr_scheduler_configs[0].scheduler.get_last_lr() == [pytest.approx(0.25e-3)] * 2


def test_a_schedule_without_an_end_is_refused(ten_rows, model_folder):
    run = trainer(max_epochs=-1, max_time={"minutes": 1})
    with pytest.raises(SFTError, match="how many steps"):
        run.fit(SFTModule(base=str(model_folder("llama"))), datamodule=SFTDataModule(train=ten_rows))


def test_sources_may_be_limited_one_by_one(ten_rows, rows_file, attached):
    other = rows_file([{"text": "hello"}] * 5, "other")
    data = attached(train=[Source(ten_rows, limit=4), Source(other, limit=2)])
    data.setup("fit")
    assert rows(data, "train") == [1, 2, 3, 4, 1, 2]


# ------------------------------------------------------------------------ token budgets, packs, mixtures


@pytest.fixture
def uneven_rows(rows_file) -> str:
    """Forty rows of very different lengths, so that a token budget fills its bins now so, now so."""
    return rows_file([chat(f"question {n}", "answer " * (1 + 7 * n % 17)) for n in range(40)])


class Counted(Callback):
    """How many micro-batches and steps Lightning made of each epoch, and what it believed there were."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.believed: list[int] = []
        self.steps: list[int] = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.batches.append(0)
        self.believed.append(trainer.num_training_batches)
        self.steps.append(0)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches[-1] += 1

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps[-1] += 1


BUDGET = {"batch_tokens": 100}
PACKS = {"packing": True, "pack_length": 70, "batch_size": 1}


@pytest.mark.parametrize(
    ("batching", "weight", "options"),
    [
        (BUDGET, 1.0, {"accumulate_grad_batches": 2}),
        (BUDGET, 1.0, {"accumulate_grad_batches": 3, "limit_train_batches": 0.8}),
        (PACKS, 0.45, {"accumulate_grad_batches": 4}),
        (PACKS, 0.45, {"max_steps": 20}),
    ],
    ids=str,
)
def test_epochs_of_different_lengths_are_trained_to_their_end_and_counted_exactly(
    batching, weight, options, uneven_rows, model_folder
):
    seen, counted = Seen(), Counted()
    run = trainer(max_epochs=3, callbacks=[seen, counted], **options)
    data = SFTDataModule(train=[Source(uneven_rows, weight=weight)], **batching)
    module = SFTModule(base=str(model_folder("llama")), learning_rate=1e-3, final_learning_rate=0.25)
    run.fit(module, datamodule=data)
    plans = [data.plan(epoch) for epoch in range(3)]
    assert len({plan.micro_batches for plan in plans}) > 1, "the epochs should differ for this to be a test"
    assert run.global_step == data.total_steps()
    assert run.lr_scheduler_configs[0].scheduler.get_last_lr() == [pytest.approx(0.25e-3)] * 2
    if "max_steps" not in options:
        assert counted.batches == counted.believed == [plan.micro_batches for plan in plans]
        assert counted.steps == [plan.steps for plan in plans]
        assert seen.rows == {epoch: planned(data, epoch) for epoch in range(3)}
        assert data.total_steps() == sum(plan.steps for plan in plans)


def test_packs_of_whole_sources_are_as_many_in_every_epoch_so_one_plan_counts_all(uneven_rows, attached):
    options = {"max_epochs": 4, "accumulate_grad_batches": 2}
    data = attached(train=uneven_rows, packing=True, batch_size=2, pack_length=200, options=options)
    data.setup("fit")
    assert not data.steps_vary
    assert data.total_steps() == sum(data.plan(epoch).steps for epoch in range(4))
    assert data.trainer.reload_dataloaders_every_n_epochs == 0


def test_a_weight_says_how_often_rows_are_trained_on(ten_rows, rows_file, model_folder):
    other = rows_file([chat(f"other {n}", "yes") for n in range(6)], "other")
    seen = Seen()
    run = trainer(max_epochs=2, callbacks=[seen])
    data = SFTDataModule(train=[Source(ten_rows, weight=0.5), Source(other, weight=2.0)], batch_size=4)
    run.fit(SFTModule(base=str(model_folder("llama"))), datamodule=data)
    examples = data.prepared["train"].examples
    for epoch in (0, 1):
        names = [examples[row].meta.source for m in data.plan(epoch).rank(0) for row in m.rows]
        assert (names.count(ten_rows), names.count(other)) == (5, 12)
        assert sum(len(batch) for batch in seen.rows[epoch]) == 17
    assert data.examples_per_epoch == [5, 12]
    ledger = json.loads(json.dumps(data.ledger))["train"]
    assert (ledger["examples"], ledger["examples_per_epoch"]) == (16, 17)
    assert [source["weight"] for source in ledger["sources"]] == [0.5, 2.0]
    said = summary(run, run.lightning_module)
    assert "weight 0.5: 5 of its examples in each epoch" in said
    assert "weight 2: 12 of its examples in each epoch" in said
    assert "5 steps an epoch, 10 in all" in said


def test_a_weight_counts_the_rows_that_a_split_leaves(repeated_prompts, attached):
    data = attached(train=[Source(repeated_prompts, weight=0.5)], val_split=0.3)
    data.setup("fit")
    assert data.examples_per_epoch == [14]
    assert data.plan(0).examples == 14


@pytest.mark.parametrize(
    ("batching", "said"),
    [
        ({"batch_tokens": 150}, r"up to 150 tokens \(\d\d\.\d% filled\) × 1 accumulated × 1 rank"),
        ({"packing": True}, r"8 packs of 256 tokens \(\d\d\.\d% filled\) × 1 accumulated"),
        (
            {"batch_size": 3},
            r"3 examples × 1 accumulated × 1 rank, flattened rows, no padding; 14 steps an epoch",
        ),
    ],
    ids=str,
)
def test_the_summary_says_how_batches_are_made(batching, said, uneven_rows, model_folder):
    run = trainer(max_epochs=1)
    run.fit(
        SFTModule(base=str(model_folder("llama"))), datamodule=SFTDataModule(train=uneven_rows, **batching)
    )
    assert re.search(said, summary(run, run.lightning_module))


def test_the_length_of_packs_is_the_longest_an_example_may_have(ten_rows, attached):
    assert attached(train=ten_rows, packing=True).pack_length == CONTEXT
    assert attached(train=ten_rows, packing=True, max_length=100).pack_length == 100
    assert attached(train=ten_rows, packing=True, max_length=100, pack_length=200).pack_length == 200
    assert attached(train=ten_rows, max_length=100).pack_length is None


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"batch_tokens": 512, "packing": True}, "both given"),
        ({"pack_length": 512}, "pack_length is for packs"),
        ({"batch_tokens": 0}, "batch_tokens is 0"),
        ({"packing": True, "pack_length": 1}, "pack_length is 1"),
        ({"packing": True, "order": "grouped"}, "similar length"),
        ({"batch_tokens": 512, "order": "grouped"}, "similar length"),
        ({"seed": -1}, "seed is -1"),
    ],
    ids=str,
)
def test_options_that_make_no_batches_are_refused_before_anything_is_read(options, what):
    with pytest.raises(SFTError, match=what):
        SFTDataModule(train="nowhere.jsonl", **options)


def test_packs_for_a_model_that_takes_padded_rows_are_refused_with_the_reason(ten_rows, model_folder):
    data = SFTDataModule(train=ten_rows, packing=True)
    with pytest.raises(SFTError, match="this model gets padded ones: bloom models") as caught:
        trainer(max_epochs=1).fit(SFTModule(base=str(model_folder("bloom"))), datamodule=data)
    assert caught.value.where == "data.packing"


def test_a_token_budget_counts_the_padding_of_a_model_that_takes_padded_rows(uneven_rows, model_folder):
    sizes = []

    class Sizes(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            sizes.append(batch.input_ids.numel())

    data = SFTDataModule(train=uneven_rows, batch_tokens=200)
    trainer(max_epochs=1, callbacks=[Sizes()]).fit(
        SFTModule(base=str(model_folder("bloom"))), datamodule=data
    )
    assert max(sizes) <= 200
    assert len(sizes) == data.plan(0).micro_batches


def test_a_second_run_finds_its_data_prepared_and_says_so(ten_rows, attached, tmp_path):
    runs = [
        attached(train=ten_rows, val_split=2, cache=cache)
        for cache in (str(tmp_path / "kept"),) * 2 + (False,)
    ]
    for run in runs:
        run.trainer.datamodule = run
        run.setup("fit")
    ledgers = [run.ledger for run in runs]
    assert [[part.pop("from_cache") for part in ledger.values()] for ledger in ledgers] == [
        [False, False], [True, True], [False, False],
    ]  # fmt: skip
    assert ledgers[0] == ledgers[1] == ledgers[2]
    module = runs[1].trainer.lightning_module
    module.configure_model()
    assert summary(runs[1].trainer, module).count("from the cache") == 2
    assert len({run.prepared["train"].digest for run in runs}) == 1
    assert rows(runs[1], "val") == rows(runs[2], "val")
