"""Which process decides, as those who start processes tell it, and which one speaks."""

from __future__ import annotations

import os
import sys
import types

import pytest

from lightning_sft import ranks, run_folder

SETTINGS = [
    ({}, True),
    ({"LOCAL_RANK": "0", "NODE_RANK": "0"}, True),  # Lightning's own, one node
    ({"LOCAL_RANK": "1", "NODE_RANK": "0"}, False),
    ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, False),  # Lightning's own, the second node
    ({"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"}, True),  # torchrun
    ({"RANK": "8", "LOCAL_RANK": "0", "GROUP_RANK": "1"}, False),
    ({"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0", "SLURM_PROCID": "1"}, True),  # torchrun under srun
    ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}, True),  # srun
    ({"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"}, False),
    ({"SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "1"}, False),
    ({"SLURM_PROCID": "0", "LOCAL_RANK": "1"}, False),  # Lightning's own, in a batch script
]


@pytest.fixture(params=SETTINGS, ids=[" ".join(f"{k}={v}" for k, v in each.items()) for each, _ in SETTINGS])
def setting(request, monkeypatch) -> bool:
    for name in list(os.environ):
        if name.endswith("RANK") or name.startswith(("SLURM_", "LIGHTNING_SFT_")):
            monkeypatch.delenv(name)
    for name, value in request.param[0].items():
        monkeypatch.setenv(name, value)
    return request.param[1]


def test_one_process_of_all_claims_the_run_folder(setting, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ranks.is_first_process() == setting
    folder = run_folder.claim(None, "my", resuming=False)
    assert (tmp_path / "runs" / "my-1").is_dir() == setting
    run_folder.release(folder)


class Store:
    """What the processes of a run share, as TCPStore does it."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        if self.values.get(key, "") == expected:
            self.values[key] = desired
        return self.values[key].encode()


class Ended(Store):
    """A store whose process has ended."""

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        raise RuntimeError("connection reset")


def processes(monkeypatch, store: Store, rank: int) -> None:
    c10d = types.SimpleNamespace(_get_default_store=lambda: store)
    fake = types.SimpleNamespace(
        is_available=lambda: True, is_initialized=lambda: True, get_rank=lambda: rank, distributed_c10d=c10d
    )
    monkeypatch.setitem(sys.modules, "torch.distributed", fake)


def test_only_the_first_that_fails_speaks_and_all_end_as_it_does(monkeypatch):
    store = Store()
    processes(monkeypatch, store, 1)
    assert ranks.failed(2) is None
    processes(monkeypatch, store, 0)
    assert ranks.failed(1) == 2, "what follows from the other's failure ends as that does"
    processes(monkeypatch, store, 2)
    assert ranks.failed(2) == 2


def test_a_process_is_silent_when_the_first_has_gone(monkeypatch):
    processes(monkeypatch, Ended(), 1)
    assert ranks.failed(1) == 1


def test_a_process_by_itself_speaks_at_once(monkeypatch):
    monkeypatch.setattr(ranks.time, "sleep", lambda seconds: pytest.fail("it waits"))
    monkeypatch.delenv("RANK", raising=False)
    assert ranks.failed(2) is None
