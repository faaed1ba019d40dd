"""The embedded tiny base model, its data, and the seeded scripts that made them.

`model.base: tiny` is the model; `tiny:train`, `tiny:held_out`, `tiny:replay`, `tiny:general` and `tiny:facts` are
data paths, and so are `tiny:tickets` and `tiny:tickets_held_out`; `--config tiny:quickstart` is the quickstart.
Everything here is synthetic: written by `corpus.py` and `instructions.py` about the world of `world.py`, and by
`tickets.py`; trained by `build.py`.
"""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent
MODEL = "tiny"
DATA = ("train", "held_out", "replay", "general", "facts", "tickets", "tickets_held_out")


def model_path(name: str) -> str:
    """The folder of the embedded model if `name` is its name, else `name`."""
    return str(HERE / MODEL) if name == MODEL else name


def data_path(path: str) -> Path | None:
    """The file of an embedded data set (`tiny:train`); None if `path` doesn't name one."""
    prefix, colon, name = path.partition(":")
    return HERE / "data" / f"{name}.jsonl" if prefix == MODEL and colon and name in DATA else None


def config_path(argument: str) -> str:
    """The quickstart's config file if `argument` is `tiny:quickstart`, else `argument`."""
    flag, equals, value = argument.rpartition("=")
    return f"{flag}{equals}{HERE / 'quickstart.yaml'}" if value == f"{MODEL}:quickstart" else argument
