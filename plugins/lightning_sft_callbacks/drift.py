"""How far the weights have moved, layer by layer."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lightning_sft import SFTError, full_tensor
from lightning_sft_callbacks.probing import Probe

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_sft import SFTModule

_LAYER = re.compile(r"\.(?:layers|h|blocks|block)\.(\d+)\.")


class DriftProbe(Probe):
    """Measures ‖θ − θ0‖ / ‖θ0‖ of each layer, over the weights that differ from the base's, with the Frobenius norm.

    For an adapter beside the base's weights, θ − θ0 is what it adds to them when merged. Where the weights themselves
    are trained, the base's are kept in `probes/` of the run folder. All in `drift.json`.

    Args:
        every_n_steps: Optimizer steps between two measurements; 0 measures only at the start and the end.
        name: Tells several of these apart, in their figures (`drift-NAME/...`) and files.
    """

    file = "drift"
    prefix = "drift"

    def __init__(self, every_n_steps: int = 0, name: str | None = None) -> None:
        super().__init__(every_n_steps, name)

    def measure(self, trainer: Trainer, module: SFTModule) -> dict[str, Any]:
        """The record of the model as it is now."""
        from peft.utils.integrations import dequantize_module_weight

        moved: dict[str, float] = defaultdict(float)
        base: dict[str, float] = defaultdict(float)
        layers = {
            name: layer for name, layer in module.loaded.named_modules() if hasattr(layer, "get_delta_weight")
        }
        for name, layer in layers.items():
            weight = dequantize_module_weight(layer.get_base_layer())
            for adapter in layer.active_adapters:
                moved[_group(name)] += _squares(layer.get_delta_weight(adapter))
            base[_group(name)] += _squares(weight)
        inside = tuple(f"{name}." for name in layers)
        own = {
            name: parameter.detach()
            for name, parameter in module.loaded.named_parameters()
            if parameter.requires_grad and not name.startswith(inside)
        }
        if own:
            self._add_own(trainer, own, moved, base)
        shares = {
            group: (moved[group] / base[group]) ** 0.5 if base[group] else 0.0
            for group in sorted(base, key=_order)
        }
        total = sum(base.values())
        return {"all": (sum(moved.values()) / total) ** 0.5 if total else 0.0, "layers": shares}

    def numbers(self, record: dict[str, Any]) -> dict[str, float]:
        """All layers' distances, and that of all together."""
        return {"all": record["all"], **record["layers"]}

    def _add_own(
        self, trainer: Trainer, own: dict[str, torch.Tensor], moved: dict[str, float], base: dict[str, float]
    ) -> None:
        path = Path(trainer.default_root_dir) / "probes" / "trained-at-step-0.safetensors"
        if trainer.global_step == 0:
            kept = {}
            for name, tensor in own.items():
                full = full_tensor(tensor)
                if trainer.is_global_zero:
                    kept[name] = full.cpu().contiguous().clone()
            if trainer.is_global_zero:
                path.parent.mkdir(parents=True, exist_ok=True)
                partial = path.with_name(path.name + ".partial")
                save_file(kept, partial)
                partial.replace(path)
            trainer.strategy.barrier()
        if not path.is_file():
            raise SFTError(
                "the weights of step 0 are gone, so nothing says how far they have moved",
                where=str(path),
                fix="bring the file back, or take DriftProbe out of trainer.callbacks",
            )
        with safe_open(path, "pt") as file:
            for name, tensor in own.items():
                before = file.get_tensor(name).double()
                moved[_group(name)] += float((full_tensor(tensor).cpu().double() - before).square().sum())
                base[_group(name)] += float(before.square().sum())


def _squares(tensor: torch.Tensor) -> float:
    return float(full_tensor(tensor.detach()).double().square().sum())


def _group(name: str) -> str:
    """`layer_3` for whatever belongs to a block; else the last part of the module's name."""
    if found := _LAYER.search(f".{name}."):
        return f"layer_{found.group(1)}"
    parts = [part for part in name.split(".") if part not in ("weight", "bias", "base_layer")]
    return parts[-1]


def _order(group: str) -> tuple[bool, int, str]:
    number = group.removeprefix("layer_")
    return (not number.isdigit(), int(number) if number.isdigit() else 0, group)
