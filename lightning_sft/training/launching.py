"""Starting the other processes of a node, and ending them all when one fails."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from subprocess import Popen, TimeoutExpired
from typing import Any

from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from lightning_sft.ranks import GRACE


class Launcher(_SubprocessScriptLauncher):
    """Lightning's, but when a process fails the command ends with its exit status, and in time.

    Lightning's own kills the first process as well, so that the command's status would be that of SIGKILL.
    """

    def launch(
        self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any
    ) -> Any:
        """Start the others, then call the function."""
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
            threading.Thread(target=_watch, args=(self.procs,), daemon=True).start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        try:
            return function(*args, **kwargs)
        except BaseException:
            _end(self.procs)
            raise


def use_launcher(trainer: Trainer) -> None:
    """Let a trainer that starts processes start them so."""
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _SubprocessScriptLauncher):
        trainer.strategy._launcher = Launcher(
            launcher.cluster_environment, launcher.num_processes, launcher.num_nodes
        )


def _watch(processes: list[Popen[bytes]]) -> None:
    """Wait for the others; if one fails, see that this process doesn't wait for it for ever."""
    while True:
        time.sleep(0.5)
        statuses = [process.poll() for process in processes]
        if all(status == 0 for status in statuses):
            return
        if bad := [status for status in statuses if status]:
            time.sleep(GRACE)
            _end(processes, at_once=True)
            os._exit(max(bad) if max(bad) > 0 else 1)


def _end(processes: list[Popen[bytes]], *, at_once: bool = False) -> None:
    until = time.monotonic() + (0 if at_once else GRACE)
    for process in processes:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except TimeoutExpired:
            process.kill()
