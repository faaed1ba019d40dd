import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_sft import Conversation, Message, Segments, SFTError
from lightning_sft.data.split import prompt_key, shared_prompts, split_indices


def chat(*pairs):
    return Conversation(tuple(Message(role, content) for role, content in pairs))


def test_the_answer_is_not_part_of_the_key():
    assert prompt_key(chat(("user", "a"), ("assistant", "b"))) == prompt_key(
        chat(("user", "a"), ("assistant", "c"))
    )


def test_the_system_prompt_is_part_of_the_key():
    question = (("user", "a"), ("assistant", "b"))
    assert prompt_key(chat(("system", "s"), *question)) != prompt_key(chat(*question))


def test_case_and_amount_of_whitespace_do_not_count():
    first, second = chat(("user", "Hello  World\n")), chat(("user", " hello world"))
    assert prompt_key(first) == prompt_key(second)
    assert prompt_key(first) != prompt_key(chat(("user", "helloworld")))


def test_turns_do_not_run_together():
    assert prompt_key(chat(("user", "a"), ("user", "b"))) != prompt_key(chat(("user", "a b")))


def test_a_greeting_by_the_assistant_does_not_hide_the_question():
    first = chat(("assistant", "Hi!"), ("user", "a"), ("assistant", "b"))
    second = chat(("assistant", "Hi!"), ("user", "c"), ("assistant", "b"))
    assert prompt_key(first) != prompt_key(second)


def test_a_conversation_without_a_question_is_its_own_key():
    assert prompt_key(chat(("system", "s"), ("assistant", "a"))) != prompt_key(
        chat(("system", "s"), ("assistant", "b"))
    )


def test_the_untrained_head_of_segments_is_their_key():
    first = Segments((("Q", 0.0), (" one", 0.0), ("yes", 1.0), ("tail", 0.0)))
    assert prompt_key(first) == prompt_key(Segments((("q one", 0.0), ("no", 1.0))))


@pytest.mark.parametrize("head", [(), (("", 0.0),)])
def test_segments_that_are_trained_from_the_start_are_their_own_key(head):
    assert prompt_key(Segments((*head, ("one", 1.0)))) != prompt_key(Segments((*head, ("two", 1.0))))


keys_lists = st.lists(st.sampled_from("abcdefghij"), min_size=2, max_size=60).filter(
    lambda k: len(set(k)) > 1
)


@given(keys=keys_lists, seed=st.integers(0, 5), data=st.data())
def test_no_key_is_on_both_sides_and_no_row_is_lost(keys, seed, data):
    size = data.draw(st.integers(1, len(keys) - 1))
    train, held_out = split_indices(keys, validation=size, seed=seed)
    assert sorted(train + held_out) == list(range(len(keys)))
    assert train == sorted(train)
    assert held_out == sorted(held_out)
    assert train
    assert held_out
    assert shared_prompts([keys[i] for i in train], [keys[i] for i in held_out]) == 0
    assert abs(len(held_out) - size) <= max(keys.count(key) for key in keys)


@given(keys=keys_lists, seed=st.integers(0, 5), data=st.data())
def test_the_order_of_the_rows_does_not_matter(keys, seed, data):
    shuffled = data.draw(st.permutations(keys))
    first = {keys[i] for i in split_indices(keys, validation=0.5, seed=seed)[1]}
    second = {shuffled[i] for i in split_indices(shuffled, validation=0.5, seed=seed)[1]}
    assert first == second


@pytest.mark.parametrize(("validation", "size"), [(0.1, 10), (0.25, 25), (7, 7), (7.0, 7), (99, 99)])
def test_distinct_rows_give_exactly_the_size_asked_for(validation, size):
    train, held_out = split_indices([f"key {n}" for n in range(100)], validation=validation, seed=0)
    assert (len(train), len(held_out)) == (100 - size, size)


def test_the_seed_decides_which_rows():
    keys = [f"key {n}" for n in range(100)]
    assert split_indices(keys, validation=10, seed=1) == split_indices(keys, validation=10, seed=1)
    assert split_indices(keys, validation=10, seed=1) != split_indices(keys, validation=10, seed=2)


def test_a_group_too_large_for_the_size_is_left_out_while_smaller_ones_fit():
    keys = ["big"] * 50 + [f"key {n}" for n in range(50)]
    for seed in range(10):
        _, held_out = split_indices(keys, validation=20, seed=seed)
        assert len(held_out) == 20
        assert min(held_out) >= 50


def test_the_nearer_size_is_taken_where_groups_cannot_give_the_one_asked_for():
    keys = [letter for letter in "abcd" for _ in range(5)]
    assert [len(split_indices(keys, validation=n, seed=0)[1]) for n in (1, 5, 7, 8)] == [5, 5, 5, 10]


@pytest.mark.parametrize("validation", [0, -1, 1.5, -0.1, float("nan"), float("inf")])
def test_sizes_that_mean_nothing_are_refused(validation):
    with pytest.raises(SFTError, match="neither a fraction"):
        split_indices(["a", "b", "c"], validation=validation, seed=0)


@pytest.mark.parametrize(
    ("validation", "side"), [(3, "training"), (1.0 * 4, "training"), (0.1, "validation")]
)
def test_a_side_without_rows_is_refused(validation, side):
    with pytest.raises(SFTError, match=f"none for {side}"):
        split_indices(["a", "b", "c"], validation=validation, seed=0)


def test_one_prompt_alone_cannot_be_split():
    with pytest.raises(SFTError, match="same prompt"):
        split_indices(["a"] * 5, validation=1, seed=0)


def test_shared_prompts_counts_validation_rows():
    assert shared_prompts(["a", "a", "b"], ["a", "a", "c"]) == 2
    assert shared_prompts(["a"], ["b"]) == 0
