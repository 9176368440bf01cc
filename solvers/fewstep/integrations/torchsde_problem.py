"""torchsde's SDE objects as problems of this library, with the log-ratio of its latent SDEs."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, one_of
from ..problem import SDE, Field

# torchsde's keys of `names`, and the methods that they rename
THEIR_METHODS = {
    "drift": "f", "diffusion": "g", "prior_drift": "h", "diffusion_prod": "g_prod",
    "drift_and_diffusion": "f_and_g", "drift_and_diffusion_prod": "f_and_g_prod",
}  # fmt: skip

SMALLEST = 1e-7  # of |g| in the division by it, as in torchsde


def problem_of(sde: Any, names: Mapping[str, str], bm: Any, logqp: bool = False) -> SDE:
    """A torchsde object as an SDE, with f and g from whichever of torchsde's methods it has."""
    for key, name in names.items():
        if key not in THEIR_METHODS:
            raise one_of("names", key, THEIR_METHODS)
        if not hasattr(sde, name):
            raise InputError(f"names: got {key!r}: {name!r}, expected a method that {type(sde).__name__} has.")
    f, g, prior, prod, both, all_prod = (getattr(sde, names.get(key, own), None) for key, own in THEIR_METHODS.items())
    if both is not None:
        f, g = f or (lambda t, y: both(t, y)[0]), g or (lambda t, y: both(t, y)[1])
    if f is None and all_prod is not None:
        f = lambda t, y: all_prod(t, y, y.new_zeros(*y.shape[:-1], _channels(sde, bm, y)))[0]  # noqa: E731
    if g is None and prod is not None:
        g = _matrix_of(prod, sde, bm)
    elif g is None and all_prod is not None:
        g = _matrix_of(lambda t, y, v: all_prod(t, y, v)[1], sde, bm)
    found: dict[str, Any] = {"f": f, "g": g} | {k: getattr(sde, k, None) for k in ("noise_type", "sde_type")}
    if missing := [name for name, value in found.items() if value is None]:
        raise InputError(
            f"sde: got {type(sde).__name__} without {', '.join(missing)}; expected a torchsde SDE with methods f and g "
            "(or f_and_g, g_prod, f_and_g_prod) and attributes noise_type, sde_type. Derive it from torchsde.SDEIto or "
            "torchsde.SDEStratonovich, or pass names={'drift': ...}."
        )
    problem = SDE(*found.values())
    if not logqp:
        return problem
    if prior is None:
        raise InputError(
            f"logqp: got {type(sde).__name__} without a prior drift h, expected one as method h, or "
            "names={'prior_drift': ...}."
        )
    return with_log_ratio(problem, prior)


def with_log_ratio(sde: SDE, prior: Field) -> SDE:
    r"""The problem with its log-ratio against the drift `prior` as one more component, without noise of its own.

    .. math:: d\ell = \tfrac12 |u|^2\,dt, \quad g\,u = f - h,

    whose expectation is the KL divergence between the laws of the paths (Girsanov). For diagonal noise W has one more
    channel, which is not used, as in torchsde.
    """

    def drift(t: Tensor, y: Tensor) -> Tensor:
        y = y[..., :-1]
        f, g = sde.drift(t, y), sde.diffusion(t, y)
        gap = f - prior(t, y)
        if g.dim() > y.dim():
            u = (torch.linalg.pinv(g) @ gap.unsqueeze(-1)).squeeze(-1)
        else:
            u = gap / torch.where(g.abs() > SMALLEST, g, SMALLEST * g.sign())
        return torch.cat([f, 0.5 * u.square().sum(-1, keepdim=True)], -1)

    def diffusion(t: Tensor, y: Tensor) -> Tensor:
        g = sde.diffusion(t, y[..., :-1])
        along = y.dim() - g.dim() - 1  # the axis of components: -1, or -2 before that of channels
        return torch.cat([g, torch.zeros_like(g.narrow(along, 0, 1))], along)

    return SDE(drift, diffusion, sde.noise_type, sde.sde_type)


def _matrix_of(prod: Callable[..., Tensor], sde: Any, bm: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """g from its products with vectors: one call for diagonal noise, else one call per channel."""

    def g(t: Tensor, y: Tensor) -> Tensor:
        if sde.noise_type == "diagonal":
            return prod(t, y, torch.ones_like(y))
        units = torch.eye(_channels(sde, bm, y), dtype=y.dtype, device=y.device)
        return torch.stack([prod(t, y, e.expand(*y.shape[:-1], -1)) for e in units], -1)

    return g


def _channels(sde: Any, bm: Any, y: Tensor) -> int:
    if sde.noise_type in ("diagonal", "scalar"):
        return y.shape[-1] if sde.noise_type == "diagonal" else 1
    if bm is None:
        raise InputError(
            f"bm: got None for an sde with {sde.noise_type!r} noise that only has products with g, which do "
            "not give the number of channels. Pass bm, or define g or f_and_g."
        )
    return int(bm.shape[-1])
