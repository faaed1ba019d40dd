"""Who is in which step: exactly once, on every rank equally often, and N is what the step trains on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.trainer.connectors.data_connector import _parse_num_batches
from lightning.pytorch.trainer.states import RunningStage

from lightning_sft import BatchPlan, SFTError
from lightning_sft.data.plan import MicroBatch

weight_sums = st.lists(st.sampled_from([0.5, 1.0, 2.0, 7.0, 123.0]), min_size=1, max_size=40)
shapes = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 9),
        "world_size": st.integers(1, 4),
        "accumulate": st.integers(1, 5),
        "seed": st.integers(0, 3),
        "epoch": st.integers(0, 3),
    }
)
ROWS = [float(row + 1) for row in range(37)]


def by_rank(plan: BatchPlan, start: int = 0) -> list[list[MicroBatch]]:
    return [list(plan.rank(rank, start)) for rank in range(plan.world_size)]


def real_rows(micro_batches) -> list[int]:
    return [row for micro in micro_batches if not micro.filler for row in micro.rows]


def rows_of_steps(plan: BatchPlan) -> list[list[int]]:
    """The rows of every optimizer step, over all ranks, sorted."""
    ranks = by_rank(plan)
    everywhere = [real_rows(at_once) for at_once in zip(*ranks, strict=True)]
    windows = (everywhere[k : k + plan.accumulate] for k in range(0, len(everywhere), plan.accumulate))
    return [sorted(row for rows in window for row in rows) for window in windows]


def same_numbers(a: float, b: float) -> bool:
    return a == pytest.approx(b, rel=1e-12)


@given(sums=weight_sums, shape=shapes)
def test_every_example_is_in_an_epoch_exactly_once(sums, shape):
    ranks = by_rank(BatchPlan(sums, **shape))
    assert sorted(row for rank in ranks for row in real_rows(rank)) == list(range(len(sums)))


@given(sums=weight_sums, shape=shapes)
def test_every_rank_has_as_many_micro_batches_and_none_is_without_rows(sums, shape):
    plan = BatchPlan(sums, **shape)
    for rank in by_rank(plan):
        assert len(rank) == plan.micro_batches
        assert all(micro.rows for micro in rank)
        assert all(len(micro.rows) <= shape["batch_size"] for micro in rank)


@given(sums=weight_sums, shape=shapes)
def test_a_rank_gets_a_filler_only_where_there_are_fewer_rows_than_ranks(sums, shape):
    plan = BatchPlan(sums, **shape)
    for at_once in zip(*by_rank(plan), strict=True):
        rows = len(real_rows(at_once))
        assert sum(micro.filler for micro in at_once) == max(0, plan.world_size - rows)


@given(sums=weight_sums, shape=shapes)
def test_the_ranks_share_a_micro_batch_as_evenly_as_it_goes(sums, shape):
    for at_once in zip(*by_rank(BatchPlan(sums, **shape)), strict=True):
        sizes = [0 if micro.filler else len(micro.rows) for micro in at_once]
        assert max(sizes) - min(sizes) <= 1


@given(sums=weight_sums, shape=shapes)
def test_n_of_a_step_is_the_weight_of_its_rows_on_all_ranks(sums, shape):
    plan = BatchPlan(sums, **shape)
    steps = rows_of_steps(plan)
    assert plan.steps == len(plan.num_items) == len(steps)
    for rows, num_items in zip(steps, plan.num_items, strict=True):
        assert same_numbers(num_items, sum(sums[row] for row in rows))
    for rank in by_rank(plan):
        assert [m.num_items for m in rank] == [plan.num_items[k // plan.accumulate] for k in range(len(rank))]


@given(sums=weight_sums, shape=shapes, data=st.data())
def test_starting_at_k_yields_the_tail(sums, shape, data):
    plan = BatchPlan(sums, **shape)
    k = data.draw(st.integers(0, plan.micro_batches))
    assert by_rank(plan, start=k) == [rank[k:] for rank in by_rank(plan)]


@given(sums=weight_sums, shape=shapes)
def test_the_same_inputs_give_the_same_plan(sums, shape):
    assert by_rank(BatchPlan(sums, **shape)) == by_rank(BatchPlan(list(sums), **shape))


def test_the_order_is_this_one_on_every_machine():
    plan = BatchPlan([1.0] * 8, batch_size=8, seed=1, epoch=2)
    assert next(plan.rank(0)).rows == (6, 0, 7, 5, 1, 4, 3, 2)


@pytest.mark.parametrize("other", [{"seed": 1}, {"epoch": 1}])
def test_another_seed_or_epoch_gives_another_order(other):
    first = real_rows(BatchPlan(ROWS, batch_size=4, seed=0, epoch=0).rank(0))
    second = real_rows(BatchPlan(ROWS, batch_size=4, **{"seed": 0, "epoch": 0, **other}).rank(0))
    assert first != second
    assert sorted(first) == sorted(second)


def test_seed_and_epoch_are_not_merely_added_up():
    first = BatchPlan(ROWS, batch_size=4, seed=0, epoch=1)
    second = BatchPlan(ROWS, batch_size=4, seed=1, epoch=0)
    assert by_rank(first) != by_rank(second)


def test_without_shuffling_the_order_is_that_of_the_examples():
    assert real_rows(BatchPlan(ROWS, batch_size=4, order="given").rank(0)) == list(range(len(ROWS)))


@given(sums=weight_sums, seed=st.integers(0, 3))
def test_the_rows_of_a_step_do_not_depend_on_how_eight_rows_are_spread(sums, seed):
    one_batch, accumulated, two_ranks, both = (
        BatchPlan(sums, batch_size=size, world_size=world, accumulate=accumulate, seed=seed)
        for size, world, accumulate in [(8, 1, 1), (1, 1, 8), (4, 2, 1), (2, 2, 2)]
    )
    expected = rows_of_steps(one_batch)
    for plan in (accumulated, two_ranks, both):
        assert rows_of_steps(plan) == expected
        assert all(map(same_numbers, plan.num_items, one_batch.num_items))


def lightnings_number(available: int, limit: float | int) -> int:
    return int(_parse_num_batches(RunningStage.TRAINING, available, limit))


@given(sums=weight_sums, shape=shapes, limit=st.one_of(st.integers(1, 50), st.floats(0.02, 1.0)))
def test_a_limit_means_what_it_means_to_lightning(sums, shape, limit):
    available = BatchPlan(sums, **shape).available
    if isinstance(limit, float) and int(available * limit) < 1:
        with pytest.raises(SFTError, match="leaves none"):
            BatchPlan(sums, **shape, limit=limit)
        return
    plan = BatchPlan(sums, **shape, limit=limit)
    assert plan.available == available
    assert plan.micro_batches == lightnings_number(available, limit)
    assert {len(rank) for rank in by_rank(plan)} == {plan.micro_batches}


@pytest.mark.parametrize("limit", [6, 0.5, 0.57])
def test_a_float_limit_is_rounded_down(limit):
    assert BatchPlan(ROWS[:12], batch_size=1, limit=limit).micro_batches == 6


def test_the_limit_1_is_one_micro_batch_and_the_limit_1_0_is_all_of_them():
    assert BatchPlan(ROWS, batch_size=4, limit=1).micro_batches == 1
    assert BatchPlan(ROWS, batch_size=4, limit=1.0).micro_batches == 10


@given(sums=weight_sums, shape=shapes, data=st.data())
def test_under_a_limit_n_of_every_window_counts_the_rows_that_are_left(sums, shape, data):
    limit = data.draw(st.integers(1, BatchPlan(sums, **shape).available))
    whole, limited = BatchPlan(sums, **shape), BatchPlan(sums, **shape, limit=limit)
    steps = rows_of_steps(limited)
    for rows, num_items in zip(steps, limited.num_items, strict=True):
        assert same_numbers(num_items, sum(sums[row] for row in rows))
    assert steps[:-1] == rows_of_steps(whole)[: len(steps) - 1]


def test_a_window_that_the_limit_cuts_short_has_an_n_of_its_own():
    plan = BatchPlan(ROWS, batch_size=2, world_size=2, accumulate=4, limit=6, order="given")
    assert plan.steps == 2
    assert plan.num_items == [sum(ROWS[:16]), sum(ROWS[16:24])]


@pytest.mark.parametrize("limit", [0, 0.0, 0.09])
def test_a_limit_that_leaves_nothing_is_refused_by_name(limit):
    with pytest.raises(SFTError, match="leaves none of the 10 micro-batches") as caught:
        BatchPlan(ROWS, batch_size=4, limit=limit)
    assert caught.value.where == "trainer.limit_train_batches"


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_size_below_one_is_refused_by_name(batch_size):
    with pytest.raises(SFTError, match="at least 1") as caught:
        BatchPlan(ROWS, batch_size=batch_size)
    assert caught.value.where == "data.batch_size"


def test_nothing_to_plan_for_is_refused():
    with pytest.raises(SFTError, match="no example"):
        BatchPlan([], batch_size=1)
