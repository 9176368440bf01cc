"""Plans and learned solvers from their files: only what this library knows is built, and nothing is run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._serialization import DAMAGE, read
from ..errors import InputError, one_of
from ..plan import FORMAT as PLAN_FORMAT
from ..plan import Plan
from .dode.student import DODE
from .dode.student import FORMAT as DODE_FORMAT
from .sfddm.student import SFDDM
from .sigdeg.networks import Coefficients, DenoisingMLP
from .sigdeg.student import SigSampler, SigStep
from .sigdeg.unet import SigUNet
from .store import FORMAT
from .training import seeded
from .unet_denoiser import UNetDenoiser

NETWORKS: dict[str, type[nn.Module]] = {
    c.__name__: c for c in (Coefficients, DenoisingMLP, SigUNet, UNetDenoiser)
}


def load(path: str | Path, network: nn.Module | None = None) -> Plan | DODE | SFDDM | SigSampler | SigStep:
    """A plan or a student from its file.

    Args:
        network: the architecture of a student whose network is not one of this library's.

    Raises:
        InputError: not a file of this library, or not whole.
    """
    try:
        return _student(path, *read(path, (PLAN_FORMAT, DODE_FORMAT, FORMAT)), network)
    except InputError:
        raise
    except (*DAMAGE, ArithmeticError, RuntimeError, ImportError) as error:
        raise InputError(f"path: {path} is damaged or of another version ({error}).") from error


def _student(
    path: str | Path, meta: dict[str, Any], tensors: dict[str, Tensor], network: nn.Module | None
) -> Plan | DODE | SFDDM | SigSampler | SigStep:
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
        expected = {k: v.shape for k, v in NETWORKS[name](**config).state_dict().items()}
    if expected != {k: v.shape for k, v in weights.items()}:
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
