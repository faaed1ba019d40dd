"""Folders that are written whole, or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lightning_sft.errors import SFTError


def free(folder: Path) -> Path:
    """The folder, if something can be written there.

    Raises:
        SFTError: It holds something, is a file or below one, or can't be looked at.
    """
    fix = "choose another with --output"
    try:
        for place in (folder, *folder.parents):
            if place.is_file():
                raise SFTError("this is a file, not a folder", where=str(place), fix=fix)
        if folder.exists() and any(folder.iterdir()):
            raise SFTError("the folder is not empty", where=str(folder), fix=f"{fix}, or empty it")
    except OSError as error:
        raise SFTError(f"the folder can't be read: {error.strerror}", where=str(folder), fix=fix) from error
    return folder


def write_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """Write to one side and rename, so that `folder` is there only when it is whole, and else nothing is.

    Raises:
        SFTError: It can't be written.
    """
    from safetensors import SafetensorError

    folder = folder.absolute()
    partial = folder.with_name(f"{folder.name}.partial")
    missing = [place for place in folder.parents if not place.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        write(partial)
        if folder.is_dir():
            folder.rmdir()
        partial.rename(folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):
            for place in missing:
                place.rmdir()
        if isinstance(error, OSError | SafetensorError):
            raise SFTError(
                f"it can't be written: {error}",
                where=str(folder),
                fix="check the room on the disk and the rights to write there",
            ) from error
        raise
