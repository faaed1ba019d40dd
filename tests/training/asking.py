"""A callback that asks the model in training on every rank; a run names it by its full class path."""

from __future__ import annotations

import json
from pathlib import Path

from lightning.pytorch import Callback

from lightning_sft import Scorer
from lightning_sft.conversation import Segments


class Asking(Callback):
    """Writes `asked-<rank>.json` at the run's end: scores of texts, and answers."""

    def on_train_end(self, trainer, pl_module):
        texts = [Segments(((f"hello {'there ' * n}", 1.0),)) for n in range(1, 4)]
        scorer = Scorer(pl_module, batch_size=2)
        asked = {
            "scores": scorer.negative_log_likelihoods(pl_module.renderer.render_all(texts)),
            "answers": scorer.generate(["hello", "how are you"], 6),
        }
        path = Path(trainer.default_root_dir) / f"asked-{trainer.global_rank}.json"
        path.write_text(json.dumps(asked))
