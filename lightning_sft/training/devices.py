"""What is known of devices: memory and peak speed of GPUs by name, and what this machine has."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import torch

from lightning_sft.errors import SFTError


@dataclass(frozen=True, slots=True)
class Device:
    """One device that a rank may run on.

    Args:
        name: How it is shown and named on the command line.
        memory: Its bytes.
        kind: `cpu` or `cuda`.
        peak: FLOP/s of dense bfloat16 products at most; None where that isn't known.
        driver_name: What part of the driver's name for it tells it from others.
    """

    name: str
    memory: int
    kind: str = "cuda"
    peak: float | None = None
    driver_name: str = ""


def _gpu(name: str, mebibytes: int, teraflops: float, driver_name: str) -> Device:
    return Device(name, mebibytes << 20, "cuda", teraflops * 1e12, driver_name)


GPUS = (
    _gpu("b200-180gb", 183_359, 2250, "B200"),
    _gpu("gh200-96gb", 97_871, 989, "GH200"),
    _gpu("h200-nvl-141gb", 143_771, 835, "H200 NVL"),
    _gpu("h200-141gb", 143_771, 989, "H200"),
    _gpu("h100-nvl-94gb", 95_830, 835, "H100 NVL"),
    _gpu("h100-pcie-80gb", 81_559, 756, "H100 PCIe"),
    _gpu("h100-80gb", 81_559, 989, "H100"),
    _gpu("a100-80gb", 81_920, 312, "A100"),
    _gpu("a100-40gb", 40_960, 312, "A100"),
    _gpu("l40s-48gb", 46_068, 362, "L40S"),
    _gpu("l40-48gb", 46_068, 181, "L40"),
    _gpu("l4-24gb", 23_034, 121, "L4"),
    _gpu("a10g-24gb", 23_028, 70, "A10G"),
    _gpu("a10-24gb", 23_028, 125, "A10"),
    _gpu("a40-48gb", 46_068, 150, "A40"),
    _gpu("rtx-a6000-48gb", 49_140, 155, "RTX A6000"),
    _gpu("rtx-4090-24gb", 24_564, 165, "RTX 4090"),
    _gpu("rtx-3090-24gb", 24_576, 71, "RTX 3090"),
    _gpu("mi300x-192gb", 196_592, 1307, "MI300X"),
    _gpu("mi250x-64gb", 65_520, 383 / 2, "MI250X"),
)
"""MiB as the driver shows them, dense bfloat16 TFLOP/s from NVIDIA's and AMD's data sheets (of a MI250X one of its
two dies, which is one device); the first whose `driver_name` occurs in the driver's name counts."""


def peak_flops(device: torch.device) -> float | None:
    """What a device can do at most, in bfloat16 FLOP/s; None where that isn't known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower()
    return next((gpu.peak for gpu in GPUS if gpu.driver_name.lower() in name), None)


def named(name: str) -> Device:
    """The GPU of that name, with or without the memory in it: `h100-80gb`, `rtx-4090`.

    Raises:
        SFTError: There is none in the table.
    """
    asked = re.sub(r"[\s_]+", "-", name.strip().lower())
    for gpu in GPUS:
        if asked in (gpu.name, gpu.name.rpartition("-")[0]):
            return gpu
    known = [gpu.name for gpu in GPUS]
    close = get_close_matches(asked, known, n=1)
    raise SFTError(
        f"no GPU is known by the name {name.strip()!r}",
        where="--gpu",
        fix=(f"did you mean {close[0]}? " if close else "")
        + f"known: {', '.join(known)}; for any other give its memory, as in --device-memory 24GiB",
    )


def of_size(size: str) -> Device:
    """A GPU of which only the memory is known.

    Raises:
        SFTError: `size` isn't a size, such as 24GiB or 80GB.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])(i?)B?\s*", size, re.IGNORECASE)
    if found is None or not float(found[1]):
        raise SFTError(f"{size!r} is no size", where="--device-memory", fix="give one such as 24GiB or 80GB")
    base = 1024 if found[3] else 1000
    return Device(size.strip(), int(float(found[1]) * base ** (" KMGT".index(found[2].upper()))))


def this_machine(accelerator: str) -> Device:
    """What a rank gets here, as `trainer.accelerator` chooses it."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        device = torch.device("cuda", 0)
        memory = torch.cuda.get_device_properties(device).total_memory
        return Device("this machine's GPU", memory, "cuda", peak_flops(device))
    return Device("this machine", _memory(), "cpu")


def _memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its control group's."""
    import psutil

    memory = int(psutil.virtual_memory().total)
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        path = Path(limit)
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            memory = min(memory, int(text))
    return memory
