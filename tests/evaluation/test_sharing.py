"""What is shared changes nothing of what is asked."""

from __future__ import annotations

from itertools import chain

from hypothesis import given
from hypothesis import strategies as st

from lightning_sft.evaluation.encoding import Scored
from lightning_sft.evaluation.sharing import COST_OF_SHARING, Row, batches_of, groups_of, rows_of

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple)
REQUESTS = st.lists(st.builds(Scored, TOKENS, TOKENS), min_size=1, max_size=12)


def seen_at(row: Row, position: int) -> tuple[int, ...]:
    """The tokens that a position sees, itself included: the trunk, and what is before it in its branch."""
    if position < row.trunk:
        return row.ids[: position + 1]
    start = next(start for start, end in row.branches if start <= position < end)
    return row.ids[: row.trunk] + row.ids[start : position + 1]


@given(REQUESTS, st.booleans())
def test_each_token_is_scored_once_after_exactly_what_comes_before_it(requests, branching):
    rows = rows_of(requests, branching=branching)
    found = {number: [] for number in range(len(requests))}
    for row in rows:
        for target in row.targets:
            found[target.owner].append((*seen_at(row, target.position), target.token))
    for number, request in enumerate(requests):
        ends = range(len(request.tail))
        assert found[number] == [(*request.trunk, *request.tail[: end + 1]) for end in ends]


def test_choices_of_one_token_need_the_context_only():
    context = (5, 6, 7)
    (row,) = rows_of([Scored(context, (letter,)) for letter in (1, 2, 3, 4)], branching=True)
    assert row.ids == context
    assert [target.position for target in row.targets] == [2, 2, 2, 2]


def test_equal_requests_are_computed_once():
    rows = rows_of([Scored((1, 2), (3, 4))] * 3, branching=True)
    assert [len(row) for row in rows] == [3]
    assert len(rows[0].targets) == 6


def test_many_long_continuations_of_a_short_context_stay_in_rows_of_their_own():
    rows = rows_of([Scored((0,), (n,) * 200) for n in range(5)], branching=True)
    assert [len(row) for row in rows] == [200] * 5


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 150)), min_size=1, max_size=12), st.integers(1, 400)
)
def test_groups_and_batches_hold_every_row_once_with_its_beginning(shapes, budget):
    rows = [
        Row((family, *range(100, 100 + length), 7, n), length + 2)
        for n, (family, length) in enumerate(shapes)
    ]
    groups = groups_of(rows, None)
    assert sorted(row.ids for group in groups for row in group.rows) == sorted(row.ids for row in rows)
    for group in groups:
        assert len({row.ids[: group.shared] for row in group.rows}) == 1
        assert all(group.shared < row.trunk for row in group.rows)
        assert group.shared == 0 or group.shared * (len(group.rows) - 1) > COST_OF_SHARING
        batches = list(batches_of(group, budget))
        assert list(chain.from_iterable(batches)) == sorted(group.rows, key=len, reverse=True)
        for batch in batches:
            own = len(batch[0]) - group.shared + group.shared // 8
            assert len(batch) == 1 or len(batch) * own <= budget
        for batch in batches_of(group, 8 * budget, 10, budget):
            assert len(batch) == 1 or len(batch) * (len(batch[0]) + 10) <= budget


def test_a_subjects_questions_share_their_shots_and_not_those_of_another_subject():
    rows = [Row((*[subject] * 300, 9, question), 302) for subject in (1, 2) for question in range(10)]
    groups = groups_of(rows, None)
    assert [(group.shared, len(group.rows)) for group in groups] == [(301, 10), (301, 10)]


def test_rows_longer_than_a_sliding_window_share_nothing():
    rows = [Row((*[1] * 300, question), 301) for question in range(10)]
    assert [(group.shared, len(group.rows)) for group in groups_of(rows, 299)] == [(0, 10)]
