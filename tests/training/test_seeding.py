"""A batch's random numbers depend on where it is, and on nothing else."""

from __future__ import annotations

import random

import numpy as np
import torch

from lightning_sft.training.seeding import seed_batch


def drawn(**where: int) -> list[float]:
    seed_batch(7, **{"rank": 0, "epoch": 0, "batch": 0, **where})
    return [torch.rand(()).item(), float(np.random.rand()), random.random()]


def test_the_same_place_draws_the_same_numbers_and_every_other_place_others():
    places = [{}, {"rank": 1}, {"epoch": 1}, {"batch": 1}, {"rank": 1, "batch": 1}]
    first = [drawn(**place) for place in places]
    torch.rand(5)
    assert [drawn(**place) for place in places] == first
    for numbers in zip(*first, strict=True):
        assert len(set(numbers)) == len(places)


def test_torch_draws_what_its_own_seeding_would_make_it_draw():
    mixed = np.random.SeedSequence([7, 0, 2, 3]).generate_state(3, dtype=np.uint32)
    torch.manual_seed(int(mixed[0]) << 32 | int(mixed[1]))
    expected = torch.rand(()).item()
    assert drawn(epoch=2, batch=3)[0] == expected


def test_a_device_that_is_not_in_use_keeps_no_queue_of_seeds():
    before = len(torch.cuda._queued_calls)
    for batch in range(5):
        drawn(batch=batch)
    assert len(torch.cuda._queued_calls) == before
