"""glibc's allocator, told before a process begins not to keep small freed blocks for itself.

torch asks for every tensor at an aligned address, so glibc cuts it out of a larger block and keeps what is left over,
some dozens of bytes, in its caches of small blocks (tcache, fastbins). The next small object is put there, beside a
tensor that isn't its own, and when that tensor goes, its hole is a little too small for the next of its size.
Without these caches the leftovers join the hole again. A run on a CPU takes a tenth to nearly half less memory
so, and no more time (`docs/plan.md`). They can only be set in the environment that a process starts with.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

_NAME = "GLIBC_TUNABLES"
_SETTINGS = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"
_MARK = "LIGHTNING_SFT_STARTED_AGAIN"
"""The process that has been: where Python has privileges of its own, glibc's settings don't reach it."""

_GPUS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
"""There with a driver of NVIDIA's, the same in WSL, and AMD's."""


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """The given one with glibc's caches of small blocks turned off, unless it has settings of its own for malloc."""
    others = given.get(_NAME, "")
    if "glibc.malloc." in others:
        return dict(given)
    return {**given, _NAME: f"{others}:{_SETTINGS}" if others else _SETTINGS}


def start_again() -> None:
    """Replace this process by one of the same command with these settings; there is nothing to wait for or to clean up.

    Not where the memory of tensors isn't glibc's, on GPUs or another C library; nor in a program that isn't the
    `lightning-sft` command, which may have done something already.
    """
    wanted, process = environment(os.environ), str(os.getpid())
    if wanted == dict(os.environ) or os.environ.get(_MARK) == process:
        return
    if not _is_our_command() or not _is_glibc() or has_gpu():
        return
    try:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**wanted, _MARK: process})
    except OSError:
        return  # as it is, it needs more memory


def has_gpu() -> bool:
    """Whether there is a GPU's driver; asking torch would take a second."""
    return any(os.path.exists(path) for path in _GPUS)


def _is_our_command() -> bool:
    script = Path(sys.argv[0])
    return script.name == "lightning-sft" or script == Path(__file__).with_name("__main__.py")


def _is_glibc() -> bool:
    try:
        return sys.platform == "linux" and bool(os.confstr("CS_GNU_LIBC_VERSION"))
    except (OSError, ValueError):
        return False
