"""Files: written atomically, read without trust. Nothing in a file can run code."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from . import _validation
from .errors import InputError

if TYPE_CHECKING:
    from .plan import Plan

STUDENT_FORMAT = "fewstep-student-1"
# what Python may raise on a file whose metadata or shapes are not as expected
DAMAGE = (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, RecursionError)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A temporary file that replaces `path` in one operation when it is complete, even if power fails."""
    from safetensors import SafetensorError

    place = _validation.check_path(path)
    part = Path(f"{place}.{os.getpid()}.part")
    try:
        with suppress(OSError):  # the caller may create the folder
            part.touch()
        mode = part.stat().st_mode if part.exists() else None
        yield part
        if mode is not None:  # safetensors makes files that only their owner can read
            part.chmod(mode)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(place)
    except (OSError, SafetensorError) as error:
        raise InputError(f"path: {place} cannot be written ({error}).") from error
    finally:
        with suppress(OSError):
            part.unlink()


def make_folder(path: str | Path | None) -> Path | None:
    """Create a folder for data and checkpoints; None stays None."""
    if path is None:
        return None
    folder = _validation.check_path(path, "folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"folder: {folder} cannot be created ({error}).") from error
    return folder


def write(path: str | Path, meta: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write what `read` reads: safetensors with JSON metadata, or JSON alone where the name ends in .json."""
    from safetensors.torch import save_file

    with atomic_write(path) as part:
        if Path(path).suffix == ".json":
            part.write_text(_json_text(meta, tensors))
        else:
            save_file({k: v.contiguous() for k, v in tensors.items()}, str(part), {"fewstep": json.dumps(meta)})


def read(path: str | Path, expected: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of a file in one of the expected formats."""
    from safetensors import SafetensorError, safe_open

    _validation.check_path(path)
    try:
        if Path(path).suffix == ".json":
            meta = json.loads(Path(path).read_text())
            tensors = {k: torch.from_numpy(np.array(v, np.float64)) for k, v in meta.pop("columns").items()}
        else:
            with safe_open(str(path), framework="pt") as file:
                meta = json.loads((file.metadata() or {}).get("fewstep", "{}"))
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - not a dict
    except OSError as error:
        missing, folder = not Path(path).exists(), Path(path).is_dir()
        reason = "does not exist" if missing else "is a folder" if folder else f"cannot be read ({error})"
        raise InputError(f"path: {path} {reason}; expected a file written by .save().") from error
    except (SafetensorError, *DAMAGE) as error:
        reason = f"is damaged or not a file of this library ({error})"
        raise InputError(f"path: {path} {reason}; expected a file of .save().") from error
    found = meta.get("format") if isinstance(meta, dict) else meta
    if not isinstance(meta, dict) or found not in expected:
        cure = "Save it again with this version of fewstep." if found else "It was not written by fewstep."
        raise InputError(f"path: {path} has format {found!r}, expected {' or '.join(map(repr, expected))}. {cure}")
    return meta, tensors


def _json_text(meta: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Metadata, then the columns with one row per line; float64 is kept exactly, and null stands for nan."""
    columns = []
    for name, column in tensors.items():
        rows = ",\n   ".join(json.dumps(row).replace("NaN", "null") for row in column.tolist())
        columns.append(f"  {json.dumps(name)}: [\n   {rows}\n  ]")
    return json.dumps(meta, indent=1)[:-2] + ',\n "columns": {\n' + ",\n".join(columns) + "\n }\n}\n"


def write_student(path: str | Path, kind: str, network: nn.Module, meta: dict[str, Any], plan: Plan | None) -> None:
    """Write a student: its kind, its network's name, configuration and weights, and its plan if any."""
    tensors = {f"network.{k}": v for k, v in network.state_dict().items()}
    config = getattr(network, "config", None)
    meta = meta | {"format": STUDENT_FORMAT, "kind": kind, "network": type(network).__name__, "config": config}
    if plan is not None:
        tensors |= {f"plan.{k}": v for k, v in plan.tensors().items()}
        meta["plan"] = plan.meta()
    write(path, meta, tensors)
