"""Who is in which step: exactly once, on every rank equally often, and N is what the step trains on."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.trainer.connectors.data_connector import _parse_num_batches
from lightning.pytorch.trainer.states import RunningStage

from lightning_sft import BatchPlan, SFTError
from lightning_sft.data.packing import best_fit
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


LONGEST = 60
examples = st.lists(
    st.tuples(st.sampled_from([0.5, 1.0, 7.0]), st.integers(1, LONGEST)), min_size=1, max_size=40
)
ways = st.one_of(
    st.fixed_dictionaries({"batch_size": st.integers(1, 5), "order": st.sampled_from(["random", "grouped"])}),
    st.fixed_dictionaries({"batch_size": st.integers(1, 5), "pack_length": st.integers(LONGEST, 200)}),
    st.fixed_dictionaries({"batch_tokens": st.integers(LONGEST, 200), "padded": st.booleans()}),
)
"""The ways to batch, with their options."""
spreads = st.fixed_dictionaries(
    {
        "world_size": st.integers(1, 4),
        "accumulate": st.integers(1, 5),
        "seed": st.integers(0, 3),
        "epoch": st.integers(0, 3),
    }
)
orders = st.sampled_from([{}, {"order": "short_first"}])


def make(given: list[tuple[float, int]], *options: dict[str, object]) -> BatchPlan:
    """The plan of examples of a weight sum and a length."""
    merged = {key: value for some in options for key, value in some.items()}
    return BatchPlan([one[0] for one in given], lengths=[one[1] for one in given], **merged)


def real_lengths(count: int, middle: int = 110, spread: float = 0.75, seed: int = 0) -> list[int]:
    """Log-normal, as instructions and answers are about."""
    generator = np.random.default_rng(seed)
    return np.clip(generator.lognormal(np.log(middle), spread, count), 8, 2048).astype(int).tolist()


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


# ------------------------------------------------------------------- token budgets, packs and orders


@given(given=examples, way=ways, spread=spreads, order=orders)
def test_in_every_way_an_epoch_has_every_example_once_and_no_rank_is_idle(given, way, spread, order):
    plan = make(given, way, spread, order)
    ranks = by_rank(plan)
    assert sorted(row for rank in ranks for row in real_rows(rank)) == list(range(len(given)))
    assert {len(rank) for rank in ranks} == {plan.micro_batches}
    assert all(micro.rows for rank in ranks for micro in rank)
    fillers = [sum(micro.filler for micro in at_once) for at_once in zip(*ranks, strict=True)]
    assert not any(fillers[:-1])


@given(given=examples, way=ways, spread=spreads, order=orders)
def test_in_every_way_n_is_the_weight_of_the_steps_rows(given, way, spread, order):
    plan = make(given, way, spread, order)
    for rows, num_items in zip(rows_of_steps(plan), plan.num_items, strict=True):
        assert same_numbers(num_items, sum(given[row][0] for row in rows))
    for rank in by_rank(plan):
        assert [m.num_items for m in rank] == [plan.num_items[k // plan.accumulate] for k in range(len(rank))]


@given(given=examples, way=ways, spread=spreads, data=st.data())
def test_in_every_way_starting_at_k_yields_the_tail_and_equal_inputs_an_equal_plan(given, way, spread, data):
    plan = make(given, way, spread)
    k = data.draw(st.integers(0, plan.micro_batches))
    assert by_rank(plan, start=k) == [rank[k:] for rank in by_rank(make(given, way, spread))]


@given(given=examples, way=ways, spread=spreads, limit=st.one_of(st.integers(1, 50), st.floats(0.1, 1.0)))
def test_in_every_way_a_limit_cuts_the_epoch_where_lightning_does(given, way, spread, limit):
    whole = make(given, way, spread)
    if not lightnings_wish(whole.available, limit):
        return
    plan = make(given, way, spread, {"limit": limit})
    assert plan.micro_batches == lightnings_number(whole.available, limit)
    steps = rows_of_steps(plan)
    assert steps[:-1] == rows_of_steps(whole)[: len(steps) - 1]
    for rows, num_items in zip(steps, plan.num_items, strict=True):
        assert same_numbers(num_items, sum(given[row][0] for row in rows))


def lightnings_wish(available: int, limit: float | int) -> bool:
    return isinstance(limit, int) or int(available * limit) > 0


@given(given=examples, spread=spreads, budget=st.integers(LONGEST, 200), order=orders)
def test_a_micro_batch_stays_within_its_tokens(given, spread, budget, order):
    for rank in by_rank(make(given, spread, order, {"batch_tokens": budget})):
        assert all(sum(given[row][1] for row in micro.rows) <= budget for micro in rank)


@given(given=examples, spread=spreads, budget=st.integers(LONGEST, 200), order=orders)
def test_with_padded_rows_the_tokens_of_a_micro_batch_include_the_padding(given, spread, budget, order):
    for rank in by_rank(make(given, spread, order, {"batch_tokens": budget, "padded": True})):
        for micro in rank:
            assert len(micro.rows) * max(given[row][1] for row in micro.rows) <= budget


@given(given=examples, spread=spreads, size=st.integers(1, 4), length=st.integers(LONGEST, 200))
def test_a_micro_batch_has_so_many_packs_of_so_many_tokens(given, spread, size, length):
    for rank in by_rank(make(given, spread, {"batch_size": size, "pack_length": length})):
        assert all(sum(given[row][1] for row in micro.rows) <= size * length for micro in rank)


@given(given=examples, length=st.integers(LONGEST, 200), seed=st.integers(0, 3))
def test_with_one_pack_a_micro_batch_packs_are_what_best_fit_makes_of_the_longest_first(given, length, seed):
    plan = make(given, {"batch_size": 1, "pack_length": length, "seed": seed})
    packed = sorted(sum(given[row][1] for row in micro.rows) for micro in plan.rank(0))
    descending = sorted((tokens for _, tokens in given), reverse=True)
    assert packed == sorted(sum(descending[i] for i in each) for each in best_fit(descending, length))
    assert plan.fill == pytest.approx(sum(descending) / (len(packed) * length))


@given(given=examples, way=ways, seed=st.integers(0, 3))
def test_the_rows_of_a_step_do_not_depend_on_how_eight_units_are_spread(given, way, seed):
    sizes = [(8, 1, 1), (1, 1, 8), (4, 2, 1), (2, 2, 2)] if "batch_tokens" not in way else []
    sizes += [(1, 1, 8), (1, 2, 4), (1, 8, 1), (1, 4, 2)]
    steps = [
        rows_of_steps(
            make(
                given, way, {"world_size": world, "accumulate": accumulate, "seed": seed}, own_size(way, size)
            )
        )
        for size, world, accumulate in sizes
    ]
    assert all(other == steps[0] for other in steps)


def own_size(way: dict[str, object], size: int) -> dict[str, object]:
    return {} if "batch_tokens" in way else {"batch_size": size}


@given(given=examples, way=ways, spread=spreads, data=st.data())
def test_an_epoch_of_some_rows_holds_these_and_repeats_what_is_repeated(given, way, spread, data):
    rows = data.draw(st.lists(st.integers(0, len(given) - 1), min_size=1, max_size=50))
    plan = make(given, way, spread, {"rows": rows})
    assert sorted(row for rank in by_rank(plan) for row in real_rows(rank)) == sorted(rows)
    assert plan.examples == len(rows)


def test_packs_are_as_many_in_every_epoch_and_not_the_same():
    lengths = real_lengths(500)
    plans = [BatchPlan([1.0] * 500, lengths=lengths, pack_length=2048, epoch=epoch) for epoch in range(3)]
    assert len({plan.micro_batches for plan in plans}) == 1
    assert by_rank(plans[0]) != by_rank(plans[1])
    together = [{frozenset(micro.rows) for micro in plan.rank(0)} for plan in plans]
    assert together[0] != together[1]


def test_epochs_of_a_token_budget_put_other_examples_together():
    lengths = real_lengths(500)
    first, second = (
        {
            frozenset(m.rows)
            for m in BatchPlan([1.0] * 500, lengths=lengths, batch_tokens=2048, epoch=e).rank(0)
        }
        for e in (0, 1)
    )
    assert not first & second


@pytest.mark.parametrize("way", [{"batch_size": 3}, {"batch_tokens": 2048}, {"pack_length": 2048}], ids=str)
def test_short_first_begins_with_the_shortest(way):
    lengths = real_lengths(300)
    plan = BatchPlan([1.0] * 300, lengths=lengths, order="short_first", **way)
    longest = [max(lengths[row] for row in micro.rows) for micro in plan.rank(0)]
    assert longest == sorted(longest)
    other = BatchPlan([1.0] * 300, lengths=lengths, order="short_first", epoch=1, **way)
    assert by_rank(other) != by_rank(plan)


@pytest.mark.parametrize("way", [{"pack_length": 2048}, {"batch_tokens": 2048, "padded": True}], ids=str)
def test_packs_and_sorted_bins_come_in_no_order_of_length(way):
    lengths = real_lengths(1000)
    plan = BatchPlan([1.0] * 1000, lengths=lengths, **way)
    longest = [max(lengths[row] for row in micro.rows) for micro in plan.rank(0)]
    assert len(longest) > 50
    assert abs(np.corrcoef(longest, range(len(longest)))[0, 1]) < 0.3


def test_grouped_steps_hold_examples_of_similar_length_in_no_order_of_length():
    lengths = real_lengths(512)
    plan = BatchPlan([1.0] * 512, lengths=lengths, batch_size=4, accumulate=2, order="grouped")
    steps = rows_of_steps(plan)
    assert all(len(rows) == 8 for rows in steps)
    spread = [max(lengths[row] for row in rows) - min(lengths[row] for row in rows) for rows in steps]
    assert np.median(spread) < 10
    middles = [sum(lengths[row] for row in rows) for rows in steps]
    assert abs(np.corrcoef(middles, range(len(middles)))[0, 1]) < 0.4


@pytest.mark.parametrize("middle", [110, 600])
@pytest.mark.parametrize(
    ("way", "most"),
    [
        ({"batch_size": 8}, 1.02),
        ({"batch_size": 4, "pack_length": 2048}, 1.01),
        ({"batch_tokens": 8192}, 1.02),
    ],
    ids=str,
)
@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (4, 4)])
def test_the_ranks_have_equally_many_tokens_in_every_step(way, most, world, accumulate, middle):
    lengths = real_lengths(20_000, middle)
    plan = BatchPlan([1.0] * 20_000, lengths=lengths, world_size=world, accumulate=accumulate, **way)
    loads = np.array(
        [[sum(lengths[row] for row in micro.rows) for micro in plan.rank(rank)] for rank in range(world)]
    )
    whole = loads[:, : (plan.steps - 1) * accumulate].reshape(world, -1, accumulate).sum(2)
    assert np.mean(whole.max(0) / whole.mean(0)) < most


@pytest.mark.parametrize("way", [{"batch_size": 8}, {"pack_length": 2048}, {"batch_tokens": 8192}], ids=str)
def test_two_hundred_thousand_examples_are_planned_in_a_moment(way):
    lengths = real_lengths(200_000, 600, 0.9)
    began = time.process_time()
    plan = BatchPlan([1.0] * 200_000, lengths=lengths, **way)
    assert time.process_time() - began < 4
    assert plan.fill is None or plan.fill > 0.99


@pytest.mark.parametrize("option", ["batch_tokens", "pack_length"])
def test_an_example_longer_than_the_room_for_it_is_refused_with_its_length(option):
    with pytest.raises(
        SFTError, match=f"2 examples are longer than {option} 100; the longest has 150"
    ) as caught:
        BatchPlan([1.0] * 3, lengths=[100, 101, 150], **{option: 100})
    assert caught.value.where == f"data.{option}"


def test_an_example_with_nothing_to_train_is_refused():
    with pytest.raises(SFTError, match="example 1 has no trained token"):
        BatchPlan([1.0, 0.0, 2.0])


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_size_below_one_is_refused_by_name(batch_size):
    with pytest.raises(SFTError, match="at least 1") as caught:
        BatchPlan(ROWS, batch_size=batch_size)
    assert caught.value.where == "data.batch_size"


def test_nothing_to_plan_for_is_refused():
    with pytest.raises(SFTError, match="no example"):
        BatchPlan([], batch_size=1)
