"""What a callback has to do, tried in a run of two steps of the embedded tiny model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_sft.errors import SFTError
from lightning_sft.testing.plugin import MissingSample, PluginTests

if TYPE_CHECKING:
    from lightning.pytorch import Callback

_ROWS = [{"instruction": f"Say {word}.", "output": word} for word in ("yes", "no", "red", "blue")]


class CallbackTests(PluginTests):
    """The tests of a callback."""

    kind = "callbacks"

    def beside(self) -> Sequence[Callback]:
        """Other callbacks that the run needs; override it where yours goes by what another one measures."""
        return ()

    def test_its_state_comes_back_from_a_checkpoint(self, tmp_path: Path) -> None:
        """After two steps, through a file that is read with `weights_only=True`, into a new instance."""
        callback = self.make()
        try:
            run(callback, tmp_path, self.beside())
        except SFTError as error:
            raise MissingSample(
                f"the run with {self.plugin.__name__} is refused: {error}; set `options` or override `beside`"
            ) from error
        check_state(callback, self.make(), tmp_path)


def run(callback: Callback, folder: Path, beside: Sequence[Callback] = ()) -> None:
    """Two steps and a validation of the embedded tiny model, with the callbacks; on the CPU, in `folder`."""
    from lightning.pytorch import Trainer

    from lightning_sft.data.datamodule import SFTDataModule
    from lightning_sft.training.module import SFTModule

    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in _ROWS))
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=2,
        val_check_interval=1,
        callbacks=[*beside, callback],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
    )
    data = SFTDataModule(train=str(rows), val=str(rows), batch_size=2)
    trainer.fit(SFTModule(base="tiny", preflight=False), data)
    trainer.save_checkpoint(folder / "callback.ckpt")


def check_state(callback: Callback, other: Callback, folder: Path) -> None:
    """The state in the run's checkpoint is read without pickle, and makes another instance's state the same."""
    import torch

    name, state = type(callback).__name__, callback.state_dict()
    try:
        saved = torch.load(folder / "callback.ckpt", weights_only=True)["callbacks"]
    except Exception as error:
        raise AssertionError(
            f"the state of {name} can't be read with weights_only=True: keep numbers, texts, lists, dicts and "
            f"tensors in it ({type(error).__name__})"
        ) from error
    if state:
        assert callback.state_key in saved, f"the checkpoint has no state of {name}"
        assert _same(saved[callback.state_key], state), (
            f"the state of {name} is another one in the checkpoint"
        )
        other.load_state_dict(saved[callback.state_key])
        assert _same(other.state_dict(), state), (
            f"load_state_dict of {name} does not bring back what state_dict gave"
        )


def _same(one: Any, two: Any) -> bool:
    import torch

    if isinstance(one, torch.Tensor) or isinstance(two, torch.Tensor):
        return isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor) and torch.equal(one, two)
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(_same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(two, list | tuple):
        return len(one) == len(two) and all(map(_same, one, two))
    return bool(one == two)
