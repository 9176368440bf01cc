"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import checks
from .errors import InputError


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A place to write a file that then appears whole or not at all, after a failure of power too."""
    from safetensors import SafetensorError

    place = checks.place(path)
    part = Path(f"{place}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(place)
    except (OSError, SafetensorError) as error:
        raise InputError(f"path: {place} cannot be written ({error}).") from error
    finally:
        part.unlink(missing_ok=True)


def make_folder(path: str | Path | None) -> Path | None:
    """A folder for data and checkpoints, if one is asked for and can be."""
    if path is None:
        return None
    folder = checks.place(path, "folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"folder: {folder} cannot be made ({error}).") from error
    return folder
