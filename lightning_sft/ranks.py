"""The processes of a run: which of them decides, and which of them speaks when they fail.

Before the processes know each other (torch.distributed), the environment tells which is the first: torchrun sets
RANK, srun SLURM_PROCID, and Lightning starts the others of a node with LOCAL_RANK.
"""

from __future__ import annotations

import os
import sys
import time

_RANKS = (
    "SLURM_PROCID",
    "OMPI_COMM_WORLD_RANK",
    "JSM_NAMESPACE_RANK",
    "NODE_RANK",
    "GROUP_RANK",
    "LOCAL_RANK",
)

_FAILED = (
    "lightning_sft/failed"  # in the store that all processes share: the first that failed, and its exit code
)

GRACE = 4.0
"""Seconds in which the processes of a run that fails end by themselves."""


def is_first_process() -> bool:
    """Whether this is the process that decides; the others are told by it, or find the same as it."""
    if "RANK" in os.environ:  # of torchrun, which may itself have been started by srun, in another order
        return int(os.environ["RANK"]) == 0
    return all(int(os.environ.get(name, 0)) == 0 for name in _RANKS)


def failed(status: int) -> int | None:
    """Note that this process fails with this exit status.

    Returns:
        None if it is the first that does, and has to say why; else the status of the one that was.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        if not is_first_process():
            time.sleep(
                GRACE
            )  # all of them may be about to say the same; who started them ends them after the first
        return None
    mine = f"{distributed.get_rank()} {status}"
    try:
        first = distributed.distributed_c10d._get_default_store().compare_set(_FAILED, "", mine).decode()
    except RuntimeError:
        return status  # the first process, which keeps the store, has ended, and has said why
    return None if first == mine else int(first.split()[1])
