"""What is solved: a stochastic differential equation, an ordinary one, or a diffusion model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from . import _validation
from .errors import InputError
from .schedule import Schedule

Field = Callable[[Tensor, Tensor], Tensor]
Denoiser = Callable[[Tensor, Tensor], Tensor]

NOISE_TYPES = ("diagonal", "additive", "scalar", "commutative", "general")
MATRICES = ("scalar", "commutative", "general")  # the noise types whose g must have a channel axis
SDE_TYPES = ("ito", "stratonovich")


@dataclass(frozen=True)
class SDE:
    """dy = drift(t, y) dt + diffusion(t, y) dW, in torchsde's words.

    Args:
        drift: `(t, y) -> (*batch, *event)`; `t` is a 0-d tensor of y's dtype and device.
        diffusion: `(t, y) -> g`. Either g has y's shape (each component its own Brownian channel)
            or one axis more, `(*batch, d, m)`, and is multiplied into m channels.
        noise_type: `"diagonal"` (g elementwise, g_i depends on y_i alone), `"additive"` (g does not
            depend on y; elementwise or matrix), `"scalar"` (`(*batch, d, 1)`, one channel),
            `"general"` (`(*batch, d, m)`), `"commutative"` (the same, its columns' vector fields
            commuting: D g_i g_j = D g_j g_i, which spares solvers the space-space area; a word of
            ours, torchsde has none for it). The first three commute as well.
        sde_type: `"ito"` or `"stratonovich"`.

    Raises:
        InputError: an unknown noise type or calculus, what is no function.
    """

    drift: Field
    diffusion: Field
    noise_type: str = "diagonal"
    sde_type: str = "ito"

    def __post_init__(self) -> None:
        for name, field in (("drift", self.drift), ("diffusion", self.diffusion)):
            _validation.check_callable(name, field, "a function (t, y) -> tensor")
        _validation.check_choice("noise_type", self.noise_type, NOISE_TYPES)
        _validation.check_choice("sde_type", self.sde_type, SDE_TYPES)

    @classmethod
    def from_torchsde(cls, sde: Any) -> SDE:
        """An SDE object written for torchsde (`f`, `g`, `noise_type`, `sde_type`), as it stands."""
        missing = [n for n in ("f", "g", "noise_type", "sde_type") if not hasattr(sde, n)]
        if missing:
            raise InputError(
                f"sde: got {type(sde).__name__} without {', '.join(missing)}; expected a torchsde SDE "
                "with methods f, g and attributes noise_type, sde_type. Derive it from torchsde.SDEIto "
                "or torchsde.SDEStratonovich, or build fewstep.SDE(drift, diffusion) directly."
            )
        return cls(sde.f, sde.g, sde.noise_type, sde.sde_type)

    def noise_shape(self, y: Tensor, g: Tensor) -> tuple[int, ...]:
        """Shape of the Brownian increment: y's own, or its last axis replaced by the m channels of g."""
        matrix = g.dim() == y.dim() + 1
        if self.noise_type in MATRICES and not matrix:
            raise InputError(
                f"diffusion: got shape {tuple(g.shape)} for {self.noise_type!r} noise and y of shape "
                f"{tuple(y.shape)}; expected (*batch, d, m) = {(*y.shape, 'm')}. Add the channel axis, "
                "or declare noise_type='diagonal'."
            )
        if self.noise_type == "diagonal" and matrix:
            raise InputError(
                f"diffusion: got shape {tuple(g.shape)} for 'diagonal' noise and y of shape "
                f"{tuple(y.shape)}; expected y's own shape. Declare noise_type='general' for a matrix."
            )
        expected = (*y.shape, g.shape[-1]) if matrix else tuple(y.shape)
        fits = g.dim() <= len(expected) and all(
            have in (1, want) for have, want in zip(g.shape[::-1], expected[::-1])
        )
        if not fits or (self.noise_type == "scalar" and g.shape[-1] != 1):
            last = 1 if self.noise_type == "scalar" else "m"
            raise InputError(
                f"diffusion: got shape {tuple(g.shape)} for y of shape {tuple(y.shape)}; expected "
                f"{(*y.shape, last) if matrix else tuple(y.shape)} for {self.noise_type!r} noise. "
                "Return one value (or one row of channels) for each component of y."
            )
        return (*y.shape[:-1], g.shape[-1]) if matrix else tuple(y.shape)


def ODE(drift: Field) -> SDE:
    """dy = drift(t, y) dt: the SDE whose noise is nought, so that every SDE solver is an ODE solver too.

    The card's `deterministic_order` is then the order that counts.
    """
    return SDE(drift, lambda t, y: y.new_zeros(()), noise_type="additive")


def diffuse(g: Tensor, dW: Tensor) -> Tensor:
    """g dW: elementwise where the shapes agree, a matrix-vector product where g has a channel axis."""
    if g.dim() == dW.dim() + 1:
        return (g @ dW.unsqueeze(-1)).squeeze(-1)
    return g * dW


@dataclass(frozen=True)
class DiffusionModel:
    """A diffusion model in the library's one convention, with the forward process it was trained on.

    Args:
        denoiser: `(x, sigma) -> x0`, the posterior mean of the data given x = x0 + sigma n
            (variance-exploding coordinates). x is (*batch, *event); sigma a 0-d tensor like x.
            `from_epsilon` and its kin turn other predictions into it.
        schedule: the forward process; it says where sigma starts and ends.

    Raises:
        InputError: what is no function, or no schedule.
    """

    denoiser: Denoiser
    schedule: Schedule

    def __post_init__(self) -> None:
        _validation.check_callable("denoiser", self.denoiser, "a function (x, sigma) -> x0")
        _validation.check_instance(
            "schedule", self.schedule, Schedule, "a fewstep schedule such as VPLinear() or EDM()"
        )
