"""`load`: plans and learned solvers from their files. Only classes of this library are built."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import _validation
from .._serialization import DAMAGE, STUDENT_FORMAT, read
from ..errors import InputError, one_of
from ..plan import FORMATS, Plan
from .sfddm.student import SFDDM
from .sigdeg.networks import Coefficients, DenoisingMLP
from .sigdeg.student import SigSampler, SigStep
from .sigdeg.unet import SigUNet
from .training import seeded
from .unet_denoiser import UNetDenoiser

NETWORKS: dict[str, type[nn.Module]] = {c.__name__: c for c in (Coefficients, DenoisingMLP, SigUNet, UNetDenoiser)}
"""The networks that a file may name."""


def load(path: str | Path, network: nn.Module | None = None) -> Plan | SFDDM | SigSampler | SigStep:
    """A plan or a student from its file.

    Args:
        network: the architecture of a student whose network is not one of this library's.

    Raises:
        InputError: not a file of this library, or a damaged one.
    """
    _validation.check_instance(
        "network", network, (nn.Module, type(None)), "a torch.nn.Module of the saved architecture"
    )
    try:
        meta, tensors = read(path, (*FORMATS, STUDENT_FORMAT))
        if meta["format"] in FORMATS:
            return Plan.from_tensors(meta, tensors)
        student: SFDDM | SigSampler | SigStep = _student(path, meta, tensors, network)
        return student
    except InputError:
        raise
    except (*DAMAGE, ArithmeticError, RuntimeError, ImportError) as error:
        raise InputError(f"path: {path} is damaged or of another version ({error}).") from error


def _student(path: str | Path, meta: dict[str, Any], tensors: dict[str, Tensor], network: nn.Module | None) -> Any:
    kinds: dict[Any, Any] = {c.__name__: c for c in (SFDDM, SigSampler, SigStep)}
    if meta["kind"] not in kinds:
        raise one_of(f"{path}: kind", meta["kind"], kinds)
    parts: dict[str, dict[str, Tensor]] = {"network": {}, "plan": {}}
    for name, tensor in tensors.items():
        part, _, key = name.partition(".")
        parts[part][key] = tensor
    filled = _filled(path, meta, parts["network"], network)
    plan = Plan.from_tensors(meta["plan"], parts["plan"]) if parts["plan"] else None
    return kinds[meta["kind"]]._from_parts(filled, meta, plan)


def _filled(path: str | Path, meta: dict[str, Any], weights: dict[str, Tensor], network: nn.Module | None) -> nn.Module:
    """The network of a file, for inference."""
    if network is None:
        network = build_network(str(path), meta["network"], meta["config"], weights)
    check_weights(path, weights)
    try:
        # networks of this library take the dtypes of the file, such as a float64 table among float32 weights.
        # Copied: tensors mapped from a file are aligned differently, and products then round differently
        weights = {k: v.clone() for k, v in weights.items()}
        network.load_state_dict(weights, assign=type(network) in NETWORKS.values())
    except RuntimeError as error:
        raise InputError(f"network: the weights in {path} do not fit it: {error}") from error
    return network.eval().requires_grad_(False)


def check_weights(path: str | Path, weights: dict[str, Tensor]) -> None:
    """Refuse weights that are not finite or not real."""
    if bad := [k for k, v in weights.items() if v.is_complex() or not bool(v.isfinite().all())]:
        raise InputError(f"network: {path} has weights that are not finite ({bad[0]}); download it again.")


def build_network(path: str, name: str, config: Any, weights: dict[str, Tensor]) -> nn.Module:
    """A network of this library with the configuration of a file, weights not yet loaded."""
    if name not in NETWORKS or not isinstance(config, dict):
        raise InputError(
            f"network: {path} holds weights of {name!r}, which this library cannot build; pass the architecture as "
            "load(path, network=...)."
        )
    # a hostile header must not make us allocate a huge network: no size in it can exceed those of the weights in the
    # file, and each layer has at least one weight
    limit = max([len(weights), *(n for w in weights.values() if w.numel() for n in w.shape)])
    sizes = [n for n in _leaves(config) if isinstance(n, (int, float))]
    unet = config.get("unet", {})
    layers = int(unet.get("layers_per_block", 0)) * len(unet.get("down_block_types", ()))
    if any(not 0 <= n <= limit for n in sizes) or max(config.get("depth", 0), layers) > len(weights):
        raise InputError(f"network: {path} has a config that does not fit its weights: {config}.")
    with torch.device("meta"):
        expected = NETWORKS[name](**config).state_dict()
    if {k: v.shape for k, v in expected.items()} != {k: v.shape for k, v in weights.items()}:
        raise InputError(f"network: the weights in {path} do not have the shapes of its config.")
    return seeded(0, lambda: NETWORKS[name](**config))


def _leaves(value: Any) -> list[Any]:
    """The numbers and strings of nested JSON."""
    if not isinstance(value, (dict, list)):
        return [value]
    return [leaf for inner in (value.values() if isinstance(value, dict) else value) for leaf in _leaves(inner)]
