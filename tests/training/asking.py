"""A callback that asks the model in training on every rank; a run names it by its full class path."""

from __future__ import annotations

import json
from pathlib import Path

from lightning.pytorch import Callback

from lightning_sft import Generate, Scorer
from lightning_sft.conversation import Segments


class Asking(Callback):
    """Writes `asked-<rank>.json` at the run's end: scores of texts, and answers."""

    def on_train_end(self, trainer, pl_module):
        texts = [Segments(((f"hello {'there ' * n}", 1.0),)) for n in range(1, 4)]
        scorer = Scorer.of(pl_module)
        asked = [Generate(prompt, max_new_tokens=6) for prompt in ("hello", "how are you")]
        found = {
            "scores": scorer.negative_log_likelihoods(pl_module.renderer.render_all(texts)),
            "answers": [str(each) for each in scorer.run(asked)],
        }
        path = Path(trainer.default_root_dir) / f"asked-{trainer.global_rank}.json"
        path.write_text(json.dumps(found))
