"""Work on all cores: items go to forked processes, results come back in order."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from itertools import islice
from typing import Any, TypeVar

from lightning_sft.errors import SFTError

Item = TypeVar("Item")
Result = TypeVar("Result")

_SECONDS_BETWEEN_LOOKS = 1.0

_work: Callable[[Any], Any] | None = None  # of a worker


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int, *, alone: int
) -> Iterator[Result]:
    """`work` of every item, in the order of the items.

    The first `alone` items are worked on here: so little isn't worth starting processes for. Workers are forked,
    so `work` needn't be picklable and the memory is shared; where a system can't fork, all is done here. An item
    on which a worker fails, or whose result can't be pickled, is worked on here once more, so that what comes of it
    is the same as without workers.

    Args:
        work: What to do with an item; items and results go through pickle.
        items: Taken one at a time, not far ahead of the results.
        workers: Processes; below 2, all is done here.
        alone: Items before workers are started.

    Raises:
        SFTError: A worker was killed.
    """
    iterator = iter(items)
    if not _can_fork(workers):
        yield from map(work, iterator)
        return
    yield from map(work, islice(iterator, alone))
    # Processes start when the first item is handed over.
    executor = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _begin, (work, os.getpid()))
    waiting: deque[tuple[Item, Future[list[Result]]]] = deque()
    failed: Exception | None = None
    try:
        while True:
            try:
                for item in islice(iterator, 2 * workers - len(waiting)):
                    waiting.append((item, executor.submit(_attempt, item)))
            except BrokenProcessPool:
                raise
            except Exception as error:  # of the items; what is wrong with those before it comes first
                failed, iterator = error, iter(())
            if not waiting:
                break
            item, future = waiting.popleft()
            yield from _result(future) or [work(item)]
    except BrokenProcessPool as error:
        raise SFTError(
            "a process that prepares data was killed, as systems do when memory runs out",
            where="data.preparation_workers",
            fix="give fewer; 0 prepares in the main process",
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)
    if failed is not None:
        raise failed


def _result(future: Future[list[Result]]) -> list[Result]:
    """What the worker has found, in a list; an empty one where that can't go through pickle."""
    try:
        return future.result()
    except BrokenProcessPool:
        raise
    except Exception:  # the worker's own are suppressed
        return []


def _can_fork(workers: int) -> bool:
    # macOS can fork, but its own libraries don't survive it.
    return workers > 1 and sys.platform != "darwin" and "fork" in multiprocessing.get_all_start_methods()


def _begin(work: Callable[[Any], Any], parent: int) -> None:
    """Make this process a worker: it leaves Ctrl-C to its parent, and ends with it."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each core has a worker already
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    os._exit(1)


def _attempt(item: Any) -> list[Any]:
    """The result, in a list; an empty one if the work failed."""
    assert _work is not None
    with suppress(Exception):
        return [_work(item)]
    return []
