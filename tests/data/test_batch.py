"""What the model gets: the right targets at the right positions, flattened or padded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision, MixedPrecision

from lightning_sft import Example
from lightning_sft.conversation import Meta
from lightning_sft.data.batch import Batch, flatten, pad
from lightning_sft.example import Reason

VOCABULARY = 7
PAD = 3


def example(tokens: list[tuple[int, float]], row: int = 1) -> Example:
    """An example of (id, weight) pairs; the first token is never trained."""
    ids, weights = zip(*tokens, strict=True)
    weights = np.array([0.0, *weights[1:]], dtype=np.float32)
    reasons = np.where(weights > 0, Reason.TRAINED, Reason.CONTEXT).astype(np.uint8)
    return Example(np.array(ids, dtype=np.int32), weights, reasons, Meta("rows.jsonl", row))


token = st.tuples(st.integers(0, VOCABULARY - 1), st.sampled_from([0.0, 0.0, 0.1, 1.0, 2.5]))
examples = st.lists(st.lists(token, min_size=1, max_size=12).map(example), min_size=1, max_size=6)

LONG, SHORT = example([(1, 0), (2, 0), (3, 1), (4, 0.5)], row=4), example([(5, 0), (6, 2)], row=9)
UNTRAINED = example([(1, 0), (2, 0), (3, 0)])


def expected_targets(given: list[Example]) -> list[list[tuple[int, int, float]]]:
    """For each example: (index of the predicting token, id to predict, weight), one token after the other."""
    out = []
    for one in given:
        mine = []
        for index in range(1, len(one)):
            if one.weights[index] > 0:
                mine.append((index - 1, int(one.input_ids[index]), float(one.weights[index])))
        out.append(mine)
    return out


def listed(batch: Batch) -> list[tuple[int, int, float]]:
    return list(zip(batch.positions.tolist(), batch.targets.tolist(), batch.weights.tolist(), strict=True))


NO_TARGET = [(0, 0, 0.0)]


@given(given=examples)
def test_flattened_rows_hold_the_examples_one_after_the_other(given):
    batch = flatten(given, 5.0)
    ids = [int(token) for one in given for token in one.input_ids]
    assert batch.input_ids.tolist() == [ids]
    assert batch.position_ids.tolist() == [[index for one in given for index in range(len(one))]]
    assert batch.segments is not None
    assert batch.segments[0] == 0
    assert [end - start for start, end in zip(batch.segments, batch.segments[1:], strict=False)] == [
        *map(len, given)
    ]
    assert batch.attention_mask is None
    assert batch.num_tokens == len(ids)


@given(given=examples)
def test_flattened_targets_are_the_trained_tokens_each_at_the_position_before_it(given):
    offsets = np.cumsum([0, *map(len, given)]).tolist()
    expected = [
        (start + index, target, weight)
        for start, mine in zip(offsets, expected_targets(given), strict=False)
        for index, target, weight in mine
    ]
    assert listed(flatten(given, 5.0)) == (expected or NO_TARGET)


@given(given=examples)
def test_padded_rows_hold_one_example_each_padded_at_the_right(given):
    batch = pad(given, 5.0, pad_id=PAD)
    longest = max(map(len, given))
    assert batch.input_ids.shape == batch.position_ids.shape == (len(given), longest)
    for row, one in enumerate(given):
        assert batch.input_ids[row].tolist() == one.input_ids.tolist() + [PAD] * (longest - len(one))
        assert batch.attention_mask[row].tolist() == [1] * len(one) + [0] * (longest - len(one))
        assert batch.position_ids[row].tolist() == list(range(longest))
    assert batch.segments is None
    assert batch.num_tokens == sum(map(len, given))


@given(given=examples)
def test_padded_targets_are_the_trained_tokens_each_at_the_position_before_it(given):
    longest = max(map(len, given))
    expected = [
        (row * longest + index, target, weight)
        for row, mine in enumerate(expected_targets(given))
        for index, target, weight in mine
    ]
    assert listed(pad(given, 5.0, pad_id=PAD)) == (expected or NO_TARGET)


@given(given=examples, pad_id=st.integers(0, VOCABULARY - 1))
def test_the_targets_do_not_depend_on_what_rows_are_padded_with(given, pad_id):
    """The pad token may be a token that is trained, such as EOS."""
    assert listed(pad(given, 5.0, pad_id=pad_id)) == listed(pad(given, 5.0, pad_id=VOCABULARY))


@given(given=examples)
def test_no_target_is_predicted_from_another_example(given):
    batch = flatten(given, 5.0)
    ends = {end - 1 for end in batch.segments[1:]}
    trained = [
        position
        for position, weight in zip(batch.positions.tolist(), batch.weights.tolist(), strict=True)
        if weight
    ]
    assert not ends.intersection(trained)


@pytest.mark.parametrize(
    "collate", [flatten, lambda given, n: pad(given, n, pad_id=PAD)], ids=["flatten", "pad"]
)
def test_a_batch_without_a_trained_token_has_one_target_of_weight_zero(collate):
    batch = collate([UNTRAINED, UNTRAINED], 5.0)
    assert listed(batch) == NO_TARGET
    assert batch.weights.dtype == torch.float32


@pytest.mark.parametrize(
    "collate", [flatten, lambda given, n: pad(given, n, pad_id=PAD)], ids=["flatten", "pad"]
)
def test_a_batch_says_its_n_and_where_its_rows_come_from(collate):
    batch = collate([LONG, SHORT], 12.5)
    assert batch.num_items == 12.5
    assert [str(meta) for meta in batch.metas] == ["rows.jsonl, row 4", "rows.jsonl, row 9"]
    assert {batch.input_ids.dtype, batch.positions.dtype, batch.targets.dtype} == {torch.int64}
    assert batch.weights.dtype == torch.float32


@pytest.mark.parametrize(
    "collate", [flatten, lambda given, n: pad(given, n, pad_id=PAD)], ids=["flatten", "pad"]
)
@pytest.mark.parametrize("move", [Batch.to, move_data_to_device], ids=["to", "Lightning"])
def test_moving_a_batch_moves_every_tensor_and_keeps_the_rest(collate, move):
    batch = collate([LONG, SHORT], 12.5)
    moved = move(batch, torch.device("meta"))
    for name in Batch.__slots__:
        before, after = getattr(batch, name), getattr(moved, name)
        if isinstance(before, torch.Tensor):
            assert after.device.type == "meta", name
            assert (after.shape, after.dtype) == (before.shape, before.dtype), name
        else:
            assert after == before, name
    assert batch.input_ids.device.type == "cpu", "the batch itself stays where it is"


@pytest.mark.parametrize(
    "precision",
    [
        HalfPrecision("bf16-true"),
        HalfPrecision("16-true"),
        DoublePrecision(),
        MixedPrecision("bf16-mixed", "cpu"),
    ],
    ids=lambda precision: precision.precision,
)
def test_no_precision_of_lightning_rounds_the_weights(precision):
    third = example([(1, 0), (2, 1 / 3)])
    converted = precision.convert_input(flatten([third], 1 / 3))
    assert converted.weights.dtype == torch.float32
    assert converted.weights.item() == np.float32(1 / 3)
    assert converted.num_items == 1 / 3
