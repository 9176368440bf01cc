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
from .errors import InputError, one_of

if TYPE_CHECKING:
    from .learned.sfddm.student import SFDDM
    from .learned.sigdeg.student import SigSampler, SigStep
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
        part.unlink(missing_ok=True)


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
            columns = {k: v.contiguous() for k, v in tensors.items()}
            save_file(columns, str(part), {"fewstep": json.dumps(meta)})


def read(path: str | Path, expected: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of a file in one of the expected formats."""
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
        reason = "is a folder" if Path(path).is_dir() else f"cannot be read ({error})"
        raise InputError(f"path: {path} {reason}; expected a file written by .save().") from error
    except (SafetensorError, *DAMAGE) as error:
        raise InputError(
            f"path: {path} is damaged or not a file of this library ({error}); expected a file of .save()."
        ) from error
    found = meta.get("format") if isinstance(meta, dict) else meta
    if not isinstance(meta, dict) or found not in expected:
        cure = "Save it again with this version of fewstep." if found else "It was not written by fewstep."
        raise InputError(
            f"path: {path} has format {found!r}, expected {' or '.join(map(repr, expected))}. {cure}"
        )
    return meta, tensors


def _json_text(meta: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """Metadata, then the columns with one row per line; float64 is kept exactly, and null stands for nan."""
    columns = []
    for name, column in tensors.items():
        rows = ",\n   ".join(json.dumps(row).replace("NaN", "null") for row in column.tolist())
        columns.append(f"  {json.dumps(name)}: [\n   {rows}\n  ]")
    return json.dumps(meta, indent=1)[:-2] + ',\n "columns": {\n' + ",\n".join(columns) + "\n }\n}\n"


def _read_json(path: str | Path) -> tuple[Any, dict[str, Tensor]]:
    """The inverse of `_json_text`."""
    meta = json.loads(Path(path).read_text())
    columns = meta.pop("columns")
    return meta, {k: torch.from_numpy(np.array(v, dtype=np.float64)) for k, v in columns.items()}


def write_student(
    path: str | Path, kind: str, network: nn.Module, meta: dict[str, Any], plan: Plan | None
) -> None:
    """Write a student: its kind, its network's name, configuration and weights, and its plan if any."""
    tensors = {f"network.{k}": v for k, v in network.state_dict().items()}
    meta = meta | {
        "format": STUDENT_FORMAT, "kind": kind, "network": type(network).__name__,
        "config": getattr(network, "config", None),
    }  # fmt: skip
    if plan is not None:
        tensors |= {f"plan.{k}": v for k, v in plan.tensors().items()}
        meta["plan"] = plan.meta()
    write(path, meta, tensors)


def load(path: str | Path, network: nn.Module | None = None) -> Plan | SFDDM | SigSampler | SigStep:
    """A plan or a student from its file.

    Args:
        network: the architecture of a student whose network is not one of this library's.

    Raises:
        InputError: not a file of this library, or a damaged one.
    """
    from .plan import FORMATS, Plan

    try:
        meta, tensors = read(path, (*FORMATS, STUDENT_FORMAT))
        return Plan.from_tensors(meta, tensors) if meta["format"] in FORMATS else _student(
            path, meta, tensors, network
        )  # fmt: skip
    except InputError:
        raise
    except (*DAMAGE, ArithmeticError, RuntimeError, ImportError) as error:
        raise InputError(f"path: {path} is damaged or of another version ({error}).") from error


def _student(
    path: str | Path, meta: dict[str, Any], tensors: dict[str, Tensor], network: nn.Module | None
) -> SFDDM | SigSampler | SigStep:
    from .learned.sfddm.student import SFDDM
    from .learned.sigdeg.student import SigSampler, SigStep
    from .plan import Plan

    kinds: dict[str, Any] = {c.__name__: c for c in (SFDDM, SigSampler, SigStep)}
    if meta["kind"] not in [*kinds]:
        raise one_of(f"{path}: kind", meta["kind"], kinds)
    parts: dict[str, dict[str, Tensor]] = {"network": {}, "plan": {}}
    for name, tensor in tensors.items():
        part, _, key = name.partition(".")
        parts[part][key] = tensor
    filled = _filled(path, meta, parts["network"], network)
    plan = Plan.from_tensors(meta["plan"], parts["plan"]) if parts["plan"] else None
    made: SFDDM | SigSampler | SigStep = kinds[meta["kind"]]._from_parts(filled, meta, plan)
    return made


def _networks() -> dict[str, type[nn.Module]]:
    """The networks that a file may name."""
    from .learned.sigdeg.networks import Coefficients, DenoisingMLP
    from .learned.sigdeg.unet import SigUNet
    from .learned.unet_denoiser import UNetDenoiser

    return {c.__name__: c for c in (Coefficients, DenoisingMLP, SigUNet, UNetDenoiser)}


def _filled(
    path: str | Path, meta: dict[str, Any], weights: dict[str, Tensor], network: nn.Module | None
) -> nn.Module:
    """The network of a file, for inference."""
    if network is None:
        network = build_network(str(path), meta["network"], meta["config"], weights)
    check_weights(path, weights)
    try:
        # networks of this library take the dtypes of the file, such as a float64 table among float32 weights.
        # Copied: tensors mapped from a file are aligned differently, and products then round differently
        weights = {k: v.clone() for k, v in weights.items()}
        network.load_state_dict(weights, assign=type(network) in _networks().values())
    except RuntimeError as error:
        raise InputError(f"network: the weights in {path} do not fit it: {error}") from error
    return network.eval().requires_grad_(False)


def check_weights(path: str | Path, weights: dict[str, Tensor]) -> None:
    """Refuse weights that are not finite or not real."""
    if bad := [k for k, v in weights.items() if v.is_complex() or not bool(v.isfinite().all())]:
        raise InputError(f"network: {path} has weights that are not finite ({bad[0]}); download it again.")


def build_network(path: str, name: str, config: Any, weights: dict[str, Tensor]) -> nn.Module:
    """A network of this library with the configuration of a file, weights not yet loaded."""
    from .learned.training import seeded

    known = _networks()
    if name not in known or not isinstance(config, dict):
        raise InputError(
            f"network: {path} holds weights of {name!r}, which this library cannot build; pass the "
            "architecture as load(path, network=...)."
        )
    # a hostile header must not make us allocate a huge network: no size in it can exceed those of the
    # weights in the file, and each layer has at least one weight
    limit = max([len(weights), *(n for w in weights.values() if w.numel() for n in w.shape)])
    sizes = [n for n in _leaves(config) if isinstance(n, (int, float))]
    unet = config.get("unet", {})
    layers = int(unet.get("layers_per_block", 0)) * len(unet.get("down_block_types", ()))
    if any(not 0 <= n <= limit for n in sizes) or max(config.get("depth", 0), layers) > len(weights):
        raise InputError(f"network: {path} has a config that does not fit its weights: {config}.")
    with torch.device("meta"):
        expected = {k: v.shape for k, v in known[name](**config).state_dict().items()}
    if expected != {k: v.shape for k, v in weights.items()}:
        raise InputError(f"network: the weights in {path} do not have the shapes of its config.")
    return seeded(0, lambda: known[name](**config))


def _leaves(value: Any) -> Iterator[Any]:
    """The numbers and strings of nested JSON."""
    if isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _leaves(inner)
    else:
        yield value
