"""`fit` and `plan` begin again without glibc's caches of small blocks, where tensors are glibc's; nothing else does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_sft import __main__ as command_line
from lightning_sft import allocator

ON_GLIBC = pytest.mark.skipif(
    not allocator._is_glibc() or allocator.has_gpu(), reason="tensors' memory isn't glibc's here"
)
SETTINGS = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"


@pytest.fixture
def started(monkeypatch):
    """What would be started again, on a computer without a GPU, as the installed script."""
    calls = []
    monkeypatch.setattr(os, "execve", lambda *call: calls.append(call))
    monkeypatch.setattr(allocator, "_is_glibc", lambda: True)
    monkeypatch.setattr(allocator, "has_gpu", lambda: False)
    for name in ("GLIBC_TUNABLES", allocator._MARK):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/lightning-sft", "fit"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "/somewhere/bin/lightning-sft", "fit"])
    return calls


def test_the_same_command_is_started_with_the_settings_added(started, monkeypatch):
    monkeypatch.setenv("KEPT", "1")
    allocator.start_again()
    ((program, arguments, environment),) = started
    assert program == sys.executable
    assert arguments == [sys.executable, "-X", "dev", "/somewhere/bin/lightning-sft", "fit"]
    mark = {"LIGHTNING_SFT_STARTED_AGAIN": str(os.getpid())}
    assert environment == {**os.environ, "GLIBC_TUNABLES": SETTINGS, **mark}
    assert environment["KEPT"] == "1"


@pytest.mark.parametrize("lost", ["nothing", "GLIBC_TUNABLES"])
def test_it_is_started_again_once(lost, started, monkeypatch):
    """Also where glibc takes its settings out of the environment, as it does for programs with privileges."""
    allocator.start_again()
    ((_, _, environment),) = started
    for name in environment.keys() - os.environ.keys() - {lost}:
        monkeypatch.setenv(name, environment[name])
    allocator.start_again()
    assert len(started) == 1


@pytest.mark.parametrize("script", ["/venv/bin/lightning-sft", command_line.__file__])
def test_both_ways_to_call_the_command_are_known(script, started, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script, "fit"])
    allocator.start_again()
    assert len(started) == 1


def test_settings_of_the_users_own_are_kept():
    name = "GLIBC_TUNABLES"
    assert allocator.environment({name: "glibc.rtld.nns=4"})[name] == f"glibc.rtld.nns=4:{SETTINGS}"
    own = {name: "glibc.malloc.arena_max=1"}
    assert allocator.environment(own) == own
    assert allocator.environment({name: ""})[name] == SETTINGS


@pytest.mark.parametrize("where", ["gpu", "other C library", "another program", "settings"])
def test_nothing_is_started_elsewhere(where, started, monkeypatch):
    if where == "gpu":
        monkeypatch.setattr(allocator, "has_gpu", lambda: True)
    elif where == "other C library":
        monkeypatch.setattr(allocator, "_is_glibc", lambda: False)
    elif where == "another program":
        monkeypatch.setattr(sys, "argv", ["train.py", "fit"])
    else:
        monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.perturb=1")
    allocator.start_again()
    assert started == []


def test_it_goes_on_as_it_is_where_it_cant_be_started_again(started, monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(os, "execve", refuse)
    allocator.start_again()


@pytest.mark.parametrize(("words", "times"), [(["fit"], 1), (["plan"], 1), (["plugins"], 0), ([], 0)])
def test_only_what_trains_or_plans_training_is_started_again(words, times, started, monkeypatch):
    monkeypatch.setattr(command_line, "_dispatch", lambda argv: None)
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/lightning-sft", *words])
    assert command_line.main() == 0
    assert len(started) == times
    assert command_line.main(["fit"]) == 0  # called from Python
    assert len(started) == times


_SEEN = """
import json, os, sys
from lightning_sft import __main__, allocator
seen = lambda argv: [os.getpid(), argv, os.environ.get("GLIBC_TUNABLES"), sys.stdin.read()]
__main__._dispatch = lambda argv: print(json.dumps(seen(argv)))
sys.exit(__main__.main())
"""


@ON_GLIBC
def test_it_stays_the_same_process(tmp_path):
    """Who started it waits for it and writes to it as before."""
    script = tmp_path / "lightning-sft"
    script.write_text(_SEEN)
    environment = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
    process = subprocess.Popen(
        [sys.executable, str(script), "fit", "--a", "b c"],
        env={**environment, "PYTHONPATH": str(Path(command_line.__file__).parents[1])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    told, _ = process.communicate("typed")
    assert json.loads(told) == [process.pid, ["fit", "--a", "b c"], SETTINGS, "typed"]
    assert process.returncode == 0
