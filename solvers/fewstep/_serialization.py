"""Files: written whole or not at all, read without trust."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _validation
from .errors import InputError

# what a file whose words or shapes are not as they should be can make Python raise
DAMAGE = (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, RecursionError)


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A place to write a file that then appears whole or not at all, after a failure of power too."""
    from safetensors import SafetensorError

    place = _validation.check_path(path)
    part = Path(f"{place}.{os.getpid()}.part")
    try:
        with suppress(OSError):  # the folder may be made within
            part.touch()
        mode = part.stat().st_mode if part.exists() else None
        yield part
        if mode is not None:  # safetensors' files are their owner's alone
            part.chmod(mode)
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
    folder = _validation.check_path(path, "folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"folder: {folder} cannot be made ({error}).") from error
    return folder


def read(path: str | Path, expected: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of a file of this library, in one of the formats expected."""
    from safetensors import SafetensorError, safe_open

    _validation.check_path(path)
    try:
        if Path(path).suffix == ".json":
            meta, tensors = _read_json(path)
        else:
            with safe_open(str(path), framework="pt") as file:
                meta = json.loads((file.metadata() or {}).get("fewstep", "{}"))
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError as error:
        raise InputError(f"path: {path} does not exist.") from error
    except OSError as error:
        said = "is a folder" if Path(path).is_dir() else f"cannot be read ({error})"
        raise InputError(f"path: {path} {said}; expected a file that .save() wrote.") from error
    except (SafetensorError, *DAMAGE) as error:
        raise InputError(
            f"path: {path} is not a whole file of this library ({error}); expected one that .save() wrote."
        ) from error
    if not isinstance(meta, dict) or meta.get("format") not in expected:
        came = meta.get("format") if isinstance(meta, dict) else meta
        cure = "Save it again with this version of fewstep." if came else "It was not written by fewstep."
        raise InputError(
            f"path: {path} has format {came!r}, expected {' or '.join(map(repr, expected))}. {cure}"
        )
    return meta, tensors


def json_text(meta: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """A table for people: its words, then its columns, a row a line; float64 survives it."""
    words = json.dumps(meta, indent=1)[:-2]
    columns = []
    for name, column in tensors.items():
        rows = ",\n   ".join(json.dumps(_finite(row)) for row in column.tolist())
        columns.append(f"  {json.dumps(name)}: [\n   {rows}\n  ]")
    return words + ',\n "columns": {\n' + ",\n".join(columns) + "\n }\n}\n"


def _finite(value: Any) -> Any:
    """nan, which JSON does not know, as null."""
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if value != value else value


def _read_json(path: str | Path) -> tuple[Any, dict[str, Tensor]]:
    """The inverse of `json_text`."""

    def numbers(value: Any) -> Any:
        if isinstance(value, list):
            return [numbers(v) for v in value]
        return float("nan") if value is None else float(value)

    meta = json.loads(Path(path).read_text())
    columns = meta.pop("columns")
    return meta, {k: torch.tensor(numbers(v), dtype=torch.float64) for k, v in columns.items()}
