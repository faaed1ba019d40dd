"""The files of an evaluation: plain JSON, written whole, and none of an earlier evaluation lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS, ITEMS, EARLIER = "results.json", "evaluation", "earlier"


def as_json(value: object, indent: int | None = None) -> str:
    """The value as JSON, which has no word for NaN and infinity: they are null. What it has no type for is text."""
    plain = json.loads(json.dumps(value, default=_in_json), parse_constant=lambda name: None)
    return json.dumps(plain, indent=indent, ensure_ascii=False)


def _in_json(value: Any) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    if getattr(value, "ndim", None) == 0:  # a number of NumPy or PyTorch
        return value.item()
    return str(value)


def write_evaluation(folder: Path, results: Mapping[str, object], records: Mapping[str, str]) -> Path | None:
    """Write `results.json`, and the records below `evaluation/`.

    What another evaluation wrote here is moved to `evaluation/earlier/1`, `2` and so on before, in the same layout.
    One that found the same, but for the seconds it took, is no other.

    Args:
        folder: Where.
        results: What `results.json` is to say.
        records: The files of records by their paths below `evaluation/`.

    Returns:
        Where the earlier evaluation is now; None if there was none.
    """
    files = {folder / ITEMS / name: text for name, text in records.items()}
    moved = _keep(folder) if _differs(folder, results, files) else None
    for path, text in (*files.items(), (folder / RESULTS, as_json(results, 2) + "\n")):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    return moved


def _differs(folder: Path, results: Mapping[str, object], files: Mapping[Path, str]) -> bool:
    """Whether another evaluation has been written here, or the same with other results."""
    if not (folder / RESULTS).is_file():
        return False
    try:
        old = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    except ValueError:
        return True
    if _timeless(old) != _timeless(json.loads(as_json(results))):
        return True
    return any(path.is_file() and path.read_text(encoding="utf-8") != text for path, text in files.items())


def _timeless(results: object) -> object:
    if not isinstance(results, dict) or not isinstance(results.get("evaluators"), dict):
        return results
    evaluators = {
        name: {key: each for key, each in told.items() if key != "seconds"}
        for name, told in results["evaluators"].items()
    }
    return {**results, "evaluators": evaluators}


def _keep(folder: Path) -> Path:
    """Copy what is there to a place of its own, whole, and then take the records away."""
    items = folder / ITEMS
    place = items / EARLIER
    place.mkdir(parents=True, exist_ok=True)
    numbers = [int(each.name) for each in place.iterdir() if each.name.isdecimal()]
    kept, partial = place / str(max(numbers, default=0) + 1), place / ".partial"
    shutil.rmtree(partial, ignore_errors=True)  # of one that was killed here
    records = sorted(items.glob("*/*.jsonl"))
    copies = {folder / RESULTS: partial / RESULTS} | {
        path: partial / path.relative_to(items) for path in records
    }
    for path, copy in copies.items():
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)
    partial.rename(kept)
    for path in records:
        path.unlink()
    return kept
