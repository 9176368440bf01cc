"""Files: written atomically, read without trust. Nothing in a file can run code."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor, nn

from . import _validation
from .errors import InputError

try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be removed
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from .plan import Plan

STUDENT_FORMAT = "fewstep-student-1"
PART = ".fewstep.part"  # ends the names of files that are being written
# what Python may raise on a file whose metadata or shapes are not as expected
DAMAGE = (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, RecursionError)


@contextmanager
def atomic_write(path: str | Path, parents: bool = False) -> Iterator[BinaryIO]:
    """A file that replaces `path` in one operation when it is complete, even if power fails.

    All files of the two packages are written through it. Threads and processes may write one path at a time: none of
    them fails, and the last one wins. A symbolic link stays, and its target is written. What killed processes left in
    the folder is removed. `parents` creates the folder.
    """
    place = _validation.check_file(path)
    try:
        place = place.resolve()
        if parents:
            place.parent.mkdir(parents=True, exist_ok=True)
        if not place.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {place.parent}")
        if place.exists() and not place.is_file():
            raise OSError("it is a folder" if place.is_dir() else "it is not a regular file")
        if place.exists() and not os.access(place, os.W_OK):
            raise PermissionError("it is read-only")
        _remove_stale(place.parent)
        with _open_part(place) as file:
            part = Path(file.name)
            try:
                if place.exists():
                    part.chmod(stat.S_IMODE(place.stat().st_mode))
                yield file
                file.flush()
                os.fsync(file.fileno())
                part.replace(place)
            finally:
                with suppress(OSError):
                    part.unlink()
    except OSError as error:
        raise InputError(f"path: {path} cannot be written ({error}).") from error


def _open_part(place: Path) -> BinaryIO:
    """A new file next to `place`, locked until it is closed; the system unlocks the files of killed processes."""
    while True:
        file = place.with_name(f"{place.stem[:40]}-{uuid4().hex}{PART}").open("xb")
        with suppress(OSError):  # some network file systems have no locks
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # removed as stale before it was locked


def _remove_stale(folder: Path) -> None:
    """Remove the files of killed processes; those in use are locked."""
    for part in folder.glob("*" + PART):
        with suppress(OSError):
            if fcntl is None:
                part.unlink()
                continue
            with part.open("rb+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                part.unlink()


def make_folder(path: str | Path | None) -> Path | None:
    """Create a folder for data and checkpoints; None stays None."""
    if path is None:
        return None
    folder = _validation.check_file(path, "folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"folder: {folder} cannot be created ({error}).") from error
    return folder


def write(path: str | Path, meta: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write what `read` reads: safetensors with JSON metadata, or JSON alone where the name ends in .json."""
    from safetensors.torch import save

    def content() -> bytes:
        if Path(path).suffix == ".json":
            return _json_text(meta, tensors).encode()
        # copies, since the tensors of a network may share memory
        copies = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
        return save(copies, {"fewstep": json.dumps(meta, allow_nan=False)})

    _write(path, content)


def write_json(path: str | Path, value: Any, parents: bool = False) -> None:
    """Write what `read_json` reads; `parents` creates the folder."""
    _write(path, lambda: json.dumps(value, indent=1, allow_nan=False).encode() + b"\n", parents)


def _write(path: str | Path, content: Callable[[], bytes], parents: bool = False) -> None:
    from safetensors import SafetensorError

    _validation.check_file(path)
    try:
        encoded = content()
    except (SafetensorError, RuntimeError, *DAMAGE) as error:
        expected = "expected dense tensors, finite numbers, strings, lists and dicts"
        raise InputError(f"path: {path} cannot hold these values ({error}); {expected}.") from error
    with atomic_write(path, parents) as file:
        file.write(encoded)


def read(path: str | Path, expected: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of a file in one of the expected formats."""
    from safetensors import safe_open

    with _reading(path) as place:
        if place.suffix == ".json":
            meta = parse_json(place.read_text("utf-8"))
            tensors = {k: _column(v) for k, v in meta.pop("columns").items()}
        else:
            with safe_open(str(path), framework="pt") as file:
                meta = parse_json((file.metadata() or {}).get("fewstep", "{}"))
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - not a dict
    found = meta.get("format") if isinstance(meta, dict) else meta
    if not isinstance(meta, dict) or found not in expected:
        cure = "Save it again with this version of fewstep." if found else "It was not written by fewstep."
        raise InputError(f"path: {path} has format {found!r}, expected {' or '.join(map(repr, expected))}. {cure}")
    return meta, tensors


def read_json(path: str | Path) -> Any:
    """The value of a JSON file."""
    with _reading(path) as place:
        return parse_json(place.read_text("utf-8"))


@contextmanager
def _reading(path: str | Path) -> Iterator[Path]:
    """One InputError for a file that cannot be read."""
    from safetensors import SafetensorError

    place = _validation.check_file(path)
    try:
        if place.exists() and not (place.is_file() or place.is_dir()):
            raise OSError("not a regular file")  # a pipe would wait for ever
        yield place
    except OSError as error:
        reason = (
            f"cannot be read ({error})" if place.is_file() else "is a folder" if place.is_dir() else "does not exist"
        )
        raise InputError(f"path: {path} {reason}; expected a file written by .save().") from error
    except (SafetensorError, *DAMAGE) as error:
        reason = f"is damaged or not a file of this library ({error})"
        raise InputError(f"path: {path} {reason}; expected a file of .save().") from error


def parse_json(text: str) -> Any:
    """The value of a JSON text; ValueError for repeated keys, NaN and Infinity, which the standard does not have."""

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not a number of JSON")

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError(f"a key is repeated among {[k for k, _ in pairs][:8]}")
        return found

    return json.loads(text, parse_constant=constant, object_pairs_hook=distinct)


def _column(values: Any) -> Tensor:
    """Nested lists of numbers as float64; null is nan."""
    found = np.array(values, dtype=object)
    if not {*map(type, found.flat)} <= {int, float, type(None)}:
        raise ValueError("a column holds something other than numbers, or rows of different lengths")
    return torch.from_numpy(found.astype(np.float64))


def _json_text(meta: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Metadata, then the columns with one row per line; float64 is kept exactly, and null stands for nan."""
    columns = []
    for name, column in tensors.items():
        rows = ",\n   ".join(json.dumps(row).replace("NaN", "null") for row in column.tolist())
        columns.append(f"  {json.dumps(name)}: [\n   {rows}\n  ]")
    return json.dumps(meta, indent=1, allow_nan=False)[:-2] + ',\n "columns": {\n' + ",\n".join(columns) + "\n }\n}\n"


def write_student(path: str | Path, kind: str, network: nn.Module, meta: dict[str, Any], plan: Plan | None) -> None:
    """Write a student: its kind, its network's name, configuration and weights, and its plan if any."""
    tensors = {f"network.{k}": v for k, v in network.state_dict().items()}
    config = getattr(network, "config", None)
    try:
        json.dumps(config, allow_nan=False)
    except DAMAGE:  # of a network that this library does not build
        config = None
    meta = meta | {"format": STUDENT_FORMAT, "kind": kind, "network": type(network).__name__, "config": config}
    if plan is not None:
        tensors |= {f"plan.{k}": v for k, v in plan.tensors().items()}
        meta["plan"] = plan.meta()
    write(path, meta, tensors)
