"""What the allocator keeps is asked of the allocator itself, and oneDNN's kernels of past batches are let go."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lightning_sft import SFTModule
from lightning_sft.training.heap import Heap, apart, bound_kernel_caches, kernel_bytes

MIB = 1 << 20
BLOCK = 1 << 30
"""More than can be free in the heap of a process that runs tests; nobody writes to it."""
NAMES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


class Owner:
    """Something that lives and dies."""


@pytest.fixture
def heap():
    made = Heap()
    if not made.counts:
        pytest.skip("this C library doesn't tell the size of its heap (glibc 2.33 does)")
    return made


def test_the_heap_grows_by_what_is_held_together(heap):
    owners = [Owner() for _ in range(3)]
    for owner in owners:
        heap.hold(owner, BLOCK)
    assert 3 * BLOCK <= heap.most < 3 * BLOCK + MIB


def test_what_is_let_go_is_there_no_more(heap):
    for _ in range(3):
        heap.hold(Owner(), BLOCK)
    assert BLOCK <= heap.most < BLOCK + MIB


def test_what_the_address_space_has_no_room_for_ends_the_count(heap):
    owners = [Owner(), Owner()]
    heap.hold(owners[0], BLOCK)
    heap.hold(owners[1], 1 << 62)
    assert (heap.most, heap.counts) == (0, False)


def test_what_is_found_apart_leaves_the_heap_as_it_was(heap):
    owners = []

    def found():
        owners.append(Owner())
        heap.hold(owners[0], BLOCK)
        return heap.most

    assert apart(found) >= BLOCK
    assert (owners, heap.most) == ([], 0)


def test_what_fails_apart_fails_here():
    with pytest.raises(ValueError, match="no number"):
        apart(lambda: int("no number"))


def test_without_use_nothing_is_counted():
    heap, owner = Heap(used=False), Owner()
    heap.hold(owner, MIB)
    assert (heap.most, heap.counts) == (0, False)


def test_a_module_bounds_the_caches_of_kernels_unless_the_environment_does(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    assert kernel_bytes() == 1024 * 600 * 1024
    SFTModule(base="tiny")
    assert [os.environ[name] for name in NAMES] == ["64", "64"]
    assert kernel_bytes() == 64 * 600 * 1024
    monkeypatch.setenv(NAMES[0], "7")
    bound_kernel_caches()
    assert [os.environ[name] for name in NAMES] == ["7", "64"]


_MANY_LENGTHS = """
import sys, torch, psutil
from lightning_sft.training.heap import bound_kernel_caches
if sys.argv[1] == "bounded":
    bound_kernel_caches()
layers = [torch.nn.Linear(96, 32 * n).bfloat16() for n in range(1, 6)]
def run(lengths):
    for length in lengths:
        for layer in layers:
            layer(torch.ones(length, 96, dtype=torch.bfloat16)).sum().backward()
run(range(100, 120))
before = psutil.Process().memory_info().rss
run(range(120, 200))
print(psutil.Process().memory_info().rss - before)
"""


@pytest.mark.slow
def test_kernels_of_past_lengths_are_let_go():
    import torch

    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 on this CPU")
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    kept, bounded = (
        int(
            subprocess.run(
                [sys.executable, "-c", _MANY_LENGTHS, way],
                env=environment,
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for way in ("kept", "bounded")
    )
    assert bounded < kept / 3
