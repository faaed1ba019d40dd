"""Which run `--ckpt_path` continues.

`last` is the newest unfinished run of the same configuration under `runs/`, or the one in
`trainer.default_root_dir`; `auto` is the same, and a fresh start where there is none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_sft import recorded_paths
from lightning_sft.errors import SFTError
from lightning_sft.run_folder import CHECKPOINTS, CONFIG, ENDING, LAST, MODEL, RUNS
from lightning_sft.training.models import load_checkpoint
from lightning_sft.training.resuming import has_ended

LAST_RUN, LAST_RUN_OR_NEW = "last", "auto"

_SAME_RUN = ("ckpt_path", "weights_only", "trainer.default_root_dir", "checkpoints", "config", "evaluators")
"""Keys with which a configuration is still the same one, and what is below them."""


@dataclass(frozen=True)
class Resume:
    """Where to go on.

    Args:
        checkpoint: The checkpoint.
        folder: The folder of the run that it is of, if it is continued there; None for a new run.
    """

    checkpoint: Path
    folder: Path | None


def evaluated(given: str, root: str | None) -> Path:
    """The checkpoint that `validate` and `test` mean; `last` is that of the run in `root`.

    Raises:
        SFTError: There is none.
    """
    if given == LAST_RUN and root is None:
        raise SFTError(
            "which run's last checkpoint?",
            where=f"--ckpt_path {given}",
            fix="add --trainer.default_root_dir RUN",
        )
    return _existing(last_of(Path(str(root))) if given == LAST_RUN else Path(given))


def continued(given: str, root: str | None, config: Mapping[str, Any], *, any_seed: bool) -> Resume | None:
    """The checkpoint that `fit` goes on from, and whether in its folder; None is a fresh start (`auto` only).

    Args:
        given: `last`, `auto` or a checkpoint's path.
        root: `trainer.default_root_dir`.
        config: The run's configuration.
        any_seed: The seed is drawn (`seed_everything: true`), so one that was drawn before will do.

    Raises:
        SFTError: There is no such checkpoint, or the run is finished.
    """
    if given not in (LAST_RUN, LAST_RUN_OR_NEW):
        checkpoint = _existing(Path(given))
        run = checkpoint.resolve().parent.parent
        if root is None or run != Path(root).resolve():
            return Resume(checkpoint, None)
        _refuse_finished(Path(root), f"--ckpt_path {given}")
        return Resume(checkpoint, Path(root))
    if root is not None:
        folder = Path(root)
        _refuse_finished(folder, f"--ckpt_path {given}")
    else:
        found = newest(config, any_seed=any_seed)
        if found is None and given == LAST_RUN:
            raise _none_found(config, any_seed)
        if found is None:
            return None
        folder = found
    if last_of(folder).is_file():
        return Resume(last_of(folder), folder)
    if given == LAST_RUN_OR_NEW:
        return None
    raise SFTError(
        f"the run in {folder} has no checkpoint"
        if (folder / CONFIG).is_file()
        else f"there is no run in {folder}",
        where="--ckpt_path last",
        fix="--ckpt_path auto starts anew where there is none",
    )


def last_of(folder: Path) -> Path:
    """The path of a run's last checkpoint."""
    return folder / CHECKPOINTS / LAST


def newest(config: Mapping[str, Any], *, any_seed: bool = False) -> Path | None:
    """The unfinished run under `runs/` with this configuration whose last checkpoint is the newest."""
    wanted = flat(config, any_seed)
    same = [
        folder
        for folder, other in _runs()
        if last_of(folder).is_file() and flat(other, any_seed) == wanted and not is_finished(folder)
    ]
    return max(same, key=lambda folder: last_of(folder).stat().st_mtime_ns, default=None)


def is_finished(folder: Path) -> bool:
    """Whether the run came to its end. A model alone may have been exported from a checkpoint on the way."""
    if not (folder / MODEL).is_dir() or (folder / ENDING).exists():
        return False
    return not last_of(folder).is_file() or has_ended(load_checkpoint(last_of(folder), weights_only=True))


def _runs() -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """The runs, with their configurations."""
    import yaml

    for path in sorted(RUNS.glob(f"*/{CONFIG}")):
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError):
            continue
        if isinstance(config, dict):
            yield path.parent, recorded_paths.absolute(config)  # those of older versions have them as given


def flat(config: Mapping[str, Any], any_seed: bool, prefix: str = "") -> dict[str, str]:
    """The options that make the configuration what it is, by their dotted keys."""
    found: dict[str, str] = {}
    left_out = {*_SAME_RUN, "seed_everything"} if any_seed else {*_SAME_RUN}
    for name, value in config.items():
        key = f"{prefix}{name}"
        if key in left_out:
            continue
        if isinstance(value, Mapping) and value:
            found |= flat(value, any_seed, f"{key}.")
        else:
            found[key] = repr(value)
    return found


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise SFTError(
            "no such checkpoint", where=f"--ckpt_path {path}", fix=f"runs keep theirs in {CHECKPOINTS}/"
        )
    return path


def _refuse_finished(folder: Path, where: str) -> None:
    if is_finished(folder):
        raise SFTError(
            f"the run in {folder} is finished",
            where=where,
            fix=f"to train on, start a new run from it: --ckpt_path {last_of(folder)} with another "
            "--trainer.default_root_dir and more trainer.max_epochs or max_steps",
        )


def _none_found(config: Mapping[str, Any], any_seed: bool) -> SFTError:
    """Say what was looked for, and what the nearest run differs in."""
    looked = f"no unfinished run of this configuration under {RUNS.resolve()}"
    fix = "start it without --ckpt_path; --ckpt_path auto does so by itself"
    where = "--ckpt_path last"
    wanted = flat(config, any_seed)
    others = []
    for folder, other in _runs():
        found = flat(other, any_seed)
        different = sorted(key for key in found | wanted if found.get(key) != wanted.get(key))
        others.append((len(different), folder, found, different))
    others.sort(key=lambda each: each[0])
    for _, folder, found, different in others:
        if is_finished(folder):
            continue
        if not different:
            what = f"{looked} has a checkpoint: {folder} was stopped before its first"
            return SFTError(what, where=where, fix=fix)
        lines = [
            f"\n    {key}: {found.get(key, 'not there')} -> {wanted.get(key, 'not there')}"
            for key in different[:5]
        ]
        more = "\n    ..." if len(different) > 5 else ""
        return SFTError(
            f"{looked}; the nearest, {folder}, differs in{''.join(lines)}{more}",
            where=where,
            fix=f"{fix}; --trainer.default_root_dir {folder} continues that one if the difference doesn't matter",
        )
    return SFTError(looked, where=where, fix=fix)
