"""A callback that asks the model in training on every rank; a run names it by its full class path."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from lightning.pytorch import Callback

from lightning_sft import Generate, Scorer
from lightning_sft.conversation import Segments
from lightning_sft.training.shards import full_tensor


class Asking(Callback):
    """Writes `asked-<rank>.json` at the run's end: scores of texts, answers, and each step's gradient norm.

    Behind clipping and AdamW nothing shows that a gradient is too large by a factor; the norm before clipping does.
    """

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = [full_tensor(p.grad) for p in pl_module.parameters() if p.grad is not None]
        self.norms.append(float(torch.stack([each.norm() for each in gradients]).norm()))

    def on_train_end(self, trainer, pl_module):
        texts = [Segments(((f"hello {'there ' * n}", 1.0),)) for n in range(1, 4)]
        scorer = Scorer.of(pl_module)
        asked = [Generate(prompt, max_new_tokens=6) for prompt in ("hello", "how are you")]
        found = {
            "scores": scorer.negative_log_likelihoods(pl_module.renderer.render_all(texts)),
            "norms": self.norms,
            "answers": [str(each) for each in scorer.run(asked)],
        }
        path = Path(trainer.default_root_dir) / f"asked-{trainer.global_rank}.json"
        path.write_text(json.dumps(found))
