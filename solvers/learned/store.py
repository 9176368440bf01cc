"""Learned solvers on disk: safetensors for numbers, JSON for words; a file cannot run code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import checks
from ..errors import InputError, one_of
from ..files import whole as whole
from ..plan import FORMAT as PLAN_FORMAT
from ..plan import Plan
from .networks import Coefficients, DenoisingMLP
from .sig_unet import SigUNet
from .training import seeded
from .unet_denoiser import UNetDenoiser

if TYPE_CHECKING:
    from .dode import DODE
    from .sfddm import SFDDM
    from .sig_step import SigSampler, SigStep

NETWORKS: dict[str, type[nn.Module]] = {
    c.__name__: c for c in (Coefficients, DenoisingMLP, SigUNet, UNetDenoiser)
}
FORMAT = "fewstep-student-1"
DODE_FORMAT = "fewstep-dode-1"
# what a file whose words or shapes are not as they should be can make Python raise
DAMAGE = (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError, RecursionError)


def write(path: str | Path, kind: str, network: nn.Module, meta: dict[str, Any], plan: Plan | None) -> None:
    """A student: its kind, its network's name, config and weights, and its plan where it has one."""
    from safetensors.torch import save_file

    tensors = {f"network.{k}": v.contiguous() for k, v in network.state_dict().items()}
    meta = meta | {
        "format": FORMAT, "kind": kind, "network": type(network).__name__,
        "config": getattr(network, "config", None),
    }  # fmt: skip
    if plan is not None:
        tensors |= {f"plan.{k}": v for k, v in plan.tensors().items()}
        meta["plan"] = {"name": plan.name, "prediction": plan.prediction}
    with whole(path) as part:
        save_file(tensors, str(part), {"fewstep": json.dumps(meta)})


def load(path: str | Path, network: nn.Module | None = None) -> Plan | DODE | SFDDM | SigSampler | SigStep:
    """A plan or a student from its file.

    Args:
        network: the architecture of a student whose network is not one of this library's.

    Raises:
        InputError: not a file of this library, or not whole.
    """
    try:
        return _student(path, *read(path), network)
    except InputError:
        raise
    except (*DAMAGE, ArithmeticError, RuntimeError, ImportError) as error:
        raise InputError(f"path: {path} is damaged or of another version ({error}).") from error


def _student(
    path: str | Path, meta: dict[str, Any], tensors: dict[str, Tensor], network: nn.Module | None
) -> Plan | DODE | SFDDM | SigSampler | SigStep:
    from .dode import DODE
    from .sfddm import SFDDM
    from .sig_step import SigSampler, SigStep

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


def read(
    path: str | Path, wanted: tuple[str, ...] = (PLAN_FORMAT, DODE_FORMAT, FORMAT)
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors of a file of this library, in one of the formats wanted."""
    from safetensors import SafetensorError, safe_open

    checks.place(path)
    try:
        if Path(path).suffix == ".json":
            meta, tensors = _read_json(path)
        else:
            with safe_open(str(path), framework="pt") as file:
                meta = json.loads((file.metadata() or {}).get("fewstep", "{}"))
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 - not a dict
    except FileNotFoundError as error:
        raise InputError(f"path: {path} does not exist.") from error
    except (SafetensorError, OSError, *DAMAGE) as error:
        raise InputError(
            f"path: {path} is not a whole file of this library ({error}); wanted one that .save() wrote."
        ) from error
    if not isinstance(meta, dict) or meta.get("format") not in wanted:
        came = meta.get("format") if isinstance(meta, dict) else meta
        raise InputError(
            f"path: {path} has format {came!r}, wanted {' or '.join(map(repr, wanted))}. Save it again "
            "with this version of fewstep."
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


def _fill(
    path: str | Path, meta: dict[str, Any], tensors: dict[str, Tensor], network: nn.Module | None
) -> nn.Module:
    weights = {k.removeprefix("network."): v for k, v in tensors.items() if k.startswith("network.")}
    if network is None:
        network = build(str(path), meta["network"], meta["config"], weights)
    finite(path, weights)
    try:
        # one of ours takes the file's dtypes: a table in float64 among weights in float32. A copy, since what
        # is mapped from a file lies where products are rounded otherwise
        weights = {k: v.clone() for k, v in weights.items()}
        network.load_state_dict(weights, assign=type(network) in NETWORKS.values())
    except RuntimeError as error:
        raise InputError(f"network: the weights in {path} do not fit it: {error}") from error
    return network.eval().requires_grad_(False)


def finite(path: str | Path, weights: dict[str, Tensor]) -> None:
    """Refuse weights that are not, or not real."""
    if bad := [k for k, v in weights.items() if v.is_complex() or not bool(v.isfinite().all())]:
        raise InputError(f"network: {path} has weights that are no finite numbers ({bad[0]}); fetch it anew.")


def build(path: str, name: str, config: Any, weights: dict[str, Tensor]) -> nn.Module:
    """One of this library's networks, its weights yet to be filled in."""
    if name not in NETWORKS or not isinstance(config, dict):
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
        wanted = {k: v.shape for k, v in NETWORKS[name](**config).state_dict().items()}
    if wanted != {k: v.shape for k, v in weights.items()}:
        raise InputError(f"network: the weights in {path} do not have the shapes of its config.")
    return seeded(0, lambda: NETWORKS[name](**config))


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
