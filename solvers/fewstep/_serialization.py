"""Files: written whole or not at all, read without trust."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import _validation
from .errors import InputError, one_of

if TYPE_CHECKING:
    from .learned.dode.student import DODE
    from .learned.sfddm.student import SFDDM
    from .learned.sigdeg.student import SigSampler, SigStep
    from .plan import Plan

STUDENT_FORMAT = "fewstep-student-1"

# what a file whose words or shapes are not as they should be can make Python raise
DAMAGE = (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, RecursionError)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
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


def write_student(
    path: str | Path, kind: str, network: nn.Module, meta: dict[str, Any], plan: Plan | None
) -> None:
    """A student: its kind, its network's name, config and weights, and its plan where it has one."""
    from safetensors.torch import save_file

    tensors = {f"network.{k}": v.contiguous() for k, v in network.state_dict().items()}
    meta = meta | {
        "format": STUDENT_FORMAT, "kind": kind, "network": type(network).__name__,
        "config": getattr(network, "config", None),
    }  # fmt: skip
    if plan is not None:
        tensors |= {f"plan.{k}": v for k, v in plan.tensors().items()}
        meta["plan"] = {"name": plan.name, "prediction": plan.prediction}
    with atomic_write(path) as part:
        save_file(tensors, str(part), {"fewstep": json.dumps(meta)})


def load(path: str | Path, network: nn.Module | None = None) -> Plan | DODE | SFDDM | SigSampler | SigStep:
    """A plan or a student from its file.

    Args:
        network: the architecture of a student whose network is not one of this library's.

    Raises:
        InputError: not a file of this library, or not whole.
    """
    from .learned.dode.student import FORMAT as DODE_FORMAT
    from .plan import FORMAT as PLAN_FORMAT

    try:
        return _student(path, *read(path, (PLAN_FORMAT, DODE_FORMAT, STUDENT_FORMAT)), network)
    except InputError:
        raise
    except (*DAMAGE, ArithmeticError, RuntimeError, ImportError) as error:
        raise InputError(f"path: {path} is damaged or of another version ({error}).") from error


def _student(
    path: str | Path, meta: dict[str, Any], tensors: dict[str, Tensor], network: nn.Module | None
) -> Plan | DODE | SFDDM | SigSampler | SigStep:
    from .learned.dode.student import DODE
    from .learned.dode.student import FORMAT as DODE_FORMAT
    from .learned.sfddm.student import SFDDM
    from .learned.sigdeg.student import SigSampler, SigStep
    from .plan import FORMAT as PLAN_FORMAT
    from .plan import Plan

    if meta["format"] == PLAN_FORMAT:
        return Plan.from_tensors(meta, tensors)
    if meta["format"] == DODE_FORMAT:
        return DODE.from_parts(meta, tensors)
    kinds: dict[str, Any] = {c.__name__: c for c in (SFDDM, SigSampler, SigStep)}
    if meta["kind"] not in [*kinds]:
        raise one_of(f"{path}: kind", meta["kind"], kinds)
    network = _fill(path, meta, tensors, network)
    plan = {k.removeprefix("plan."): v for k, v in tensors.items() if k.startswith("plan.")}
    table = Plan.from_tensors(meta["plan"], plan) if plan else None
    made: SFDDM | SigSampler | SigStep = kinds[meta["kind"]]._from_parts(network, meta, table)
    return made


def _networks() -> dict[str, type[nn.Module]]:
    """The networks that a file may name."""
    from .learned.sigdeg.networks import Coefficients, DenoisingMLP
    from .learned.sigdeg.unet import SigUNet
    from .learned.unet_denoiser import UNetDenoiser

    return {c.__name__: c for c in (Coefficients, DenoisingMLP, SigUNet, UNetDenoiser)}


def _fill(
    path: str | Path, meta: dict[str, Any], tensors: dict[str, Tensor], network: nn.Module | None
) -> nn.Module:
    weights = {k.removeprefix("network."): v for k, v in tensors.items() if k.startswith("network.")}
    if network is None:
        network = build_network(str(path), meta["network"], meta["config"], weights)
    check_weights(path, weights)
    try:
        # one of ours takes the file's dtypes: a table in float64 among weights in float32. A copy, since what
        # is mapped from a file lies where products are rounded otherwise
        weights = {k: v.clone() for k, v in weights.items()}
        network.load_state_dict(weights, assign=type(network) in _networks().values())
    except RuntimeError as error:
        raise InputError(f"network: the weights in {path} do not fit it: {error}") from error
    return network.eval().requires_grad_(False)


def check_weights(path: str | Path, weights: dict[str, Tensor]) -> None:
    """Refuse weights that are not, or not real."""
    if bad := [k for k, v in weights.items() if v.is_complex() or not bool(v.isfinite().all())]:
        raise InputError(f"network: {path} has weights that are no finite numbers ({bad[0]}); fetch it anew.")


def build_network(path: str, name: str, config: Any, weights: dict[str, Tensor]) -> nn.Module:
    """One of this library's networks, its weights yet to be filled in."""
    from .learned.training import seeded

    known = _networks()
    if name not in known or not isinstance(config, dict):
        raise InputError(
            f"network: {path} holds weights of {name!r}, which this library cannot build; pass the "
            "architecture as load(path, network=...)."
        )
    # a hostile header must not make us build a giant: no size in it can exceed those of its weights, and
    # each layer has a weight at least
    limit = max([len(weights), *(n for w in weights.values() if w.numel() for n in w.shape)])
    sizes = [n for n in _leaves(config) if isinstance(n, (int, float))]
    layers = max(config.get("depth", 0), _layers(config.get("unet", {})))
    if any(not 0 <= n <= limit for n in sizes) or layers > len(weights):
        raise InputError(f"network: {path} has a config that does not fit its weights: {config}.")
    with torch.device("meta"):
        expected = {k: v.shape for k, v in known[name](**config).state_dict().items()}
    if expected != {k: v.shape for k, v in weights.items()}:
        raise InputError(f"network: the weights in {path} do not have the shapes of its config.")
    return seeded(0, lambda: known[name](**config))


def _layers(unet: dict[str, Any]) -> int:
    """Of a U-Net's configuration."""
    return int(unet.get("layers_per_block", 0)) * len(unet.get("down_block_types", ()))


def _leaves(value: Any) -> Iterator[Any]:
    """The numbers and words of nested JSON."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    if inner is None:
        yield value
    else:
        for v in inner:
            yield from _leaves(v)
