"""Callbacks of trials that go slowly, or go wrong."""

from __future__ import annotations

import os
import signal
import time

from lightning.pytorch import Callback

from lightning_sft import SFTError


class Slow(Callback):
    """Takes its time for each batch."""

    def on_train_batch_start(self, *args):
        time.sleep(0.2)


class Mine(Callback):
    """Goes wrong at some learning rates, in the middle of the run."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if module.learning_rate == 0.002:
            os.kill(os.getpid(), signal.SIGKILL)
        if module.learning_rate == 0.003:
            raise SFTError("the rate is cursed", fix="choose another")
