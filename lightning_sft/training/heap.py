"""What the C library's allocator keeps for tensors on a CPU, beyond their bytes.

glibc takes blocks below a threshold (32 MiB at most) from its heap. An aligned request, as torch makes for every
tensor, is cut out of a larger block, and what is left over before it goes to small objects; so a freed block often
can't serve the next tensor of its size, and the heap grows: far with glibc's caches of small blocks, less without
(`lightning_sft.allocator`). How far depends on everything else that is asked for in between. So it isn't computed:
while a step is taken on tensors without numbers, every one of them is asked of the allocator itself, at the moment
and for as long as it would live. Blocks that nobody writes to cost
address space alone.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import weakref
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, TypeVar

Found = TypeVar("Found")

ALIGNMENT = 64
"""Of torch's tensors on a CPU, in bytes."""

KERNELS = 64
"""How many kernels each of oneDNN's two caches keeps."""

_KERNEL_BYTES = 600 << 10
"""Of a kernel for bfloat16, as measured: 607 MiB for the 1,024 that are kept otherwise."""

_ELSEWHERE = 0b110
"""In the word before a block, glibc's marks of one that is mapped by itself or lies in another thread's heap."""

_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
"""What oneDNN, and torch's way to it, read their sizes from."""


def bound_kernel_caches() -> None:
    """Let oneDNN keep the kernels of a few batches, not of all, unless the environment says how many.

    In bfloat16 it makes kernels for every length of a batch and keeps 1,024 of them, of half a megabyte each, though
    batches of other lengths don't use them again. The caches read their sizes when they keep the first one.
    """
    for name in _CACHES:
        os.environ.setdefault(name, str(KERNELS))


def kernel_bytes() -> int:
    """Bytes of the kernels that the caches keep once they are full: the two share them."""
    sizes = (os.environ.get(name, "") for name in _CACHES)
    return max(int(size) if size.isdigit() else 1024 for size in sizes) * _KERNEL_BYTES


class Heap:
    """The process's heap while blocks are taken from it; without glibc 2.33 or newer it counts nothing.

    Args:
        used: Whether to take blocks at all.
    """

    def __init__(self, used: bool = True) -> None:
        self._libc = _glibc() if used else None
        self._before = self._size()
        self._end = 0  # of the blocks in the main heap that were there when its size was asked
        self.most = 0
        """Bytes by which it has grown at most."""

    @property
    def counts(self) -> bool:
        """Whether blocks are taken."""
        return self._libc is not None

    def hold(self, owner: Any, size: int) -> None:
        """Take a block of so many bytes, for as long as its owner lives."""
        if self._libc is None or not size:
            return
        block = ctypes.c_void_p()
        if self._libc.posix_memalign(ctypes.byref(block), ALIGNMENT, size):  # address space is limited
            self._libc, self.most = None, 0
            return
        weakref.finalize(owner, self._libc.free, block)
        if self._may_have_grown(int(block.value or 0), size):
            self.most = max(self.most, self._size() - self._before)

    def _may_have_grown(self, start: int, size: int) -> bool:
        """Whether a new block lies elsewhere than in the part of the main heap that was there before.

        Asking for the size takes milliseconds in a process with many free blocks: glibc counts them all.
        """
        header = ctypes.c_size_t.from_address(start - ctypes.sizeof(ctypes.c_size_t)).value
        is_new = bool(header & _ELSEWHERE) or start + size > self._end
        if not header & _ELSEWHERE:
            self._end = max(self._end, start + size)
        return is_new

    def _size(self) -> int:
        if self._libc is None:
            return 0
        found = self._libc.mallinfo2()
        return int(found.arena + found.hblkhd)


def apart(find: Callable[[], Found]) -> Found:
    """What the function finds in a fork of this process, so that the heap it leaves isn't ours.

    Where there are no forks, or it fails in one, it is called here.
    """
    if "fork" in multiprocessing.get_all_start_methods():
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_send, args=(theirs, find), daemon=True)
        process.start()
        theirs.close()
        with suppress(EOFError):
            found: Found = ours.recv()
            process.join()
            return found
        process.join()
    return find()


def _send(results: Connection, find: Callable[[], object]) -> None:
    with suppress(Exception):
        results.send(find())


class _Mallinfo(ctypes.Structure):
    """glibc's `struct mallinfo2`; `arena` are the bytes of its heaps, `hblkhd` those of blocks of their own."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def _glibc() -> Any:
    try:
        library = ctypes.CDLL(None)
        library.mallinfo2.restype = _Mallinfo
    except (AttributeError, OSError, TypeError):  # another C library, or an older one
        return None
    library.posix_memalign.argtypes = (ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t)
    library.free.argtypes = (ctypes.c_void_p,)
    library.free.restype = None
    return library
