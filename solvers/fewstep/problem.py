"""The problems: stochastic and ordinary differential equations, and diffusion models."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import _validation
from ._tracing import holds, transformed
from .errors import InputError
from .schedule import Schedule, check_schedule

Field = Callable[[Tensor, Tensor], Tensor]
Denoiser = Callable[[Tensor, Tensor], Tensor]

NOISE_TYPES = ("none", "diagonal", "additive", "scalar", "commutative", "general", "underdamped")
CONSTANT = ("none", "additive", "underdamped")  # the noise types whose g does not depend on y
MATRICES = ("scalar", "commutative", "general", "underdamped")  # the noise types whose g must have a channel axis
SDE_TYPES = ("ito", "stratonovich")


def zero_diffusion(t: Tensor, y: Tensor) -> Tensor:
    """The diffusion of an ODE: a (1, 1) matrix of zeros, which broadcasts in every step formula."""
    return y.new_zeros(1, 1)


@dataclass(frozen=True)
class SDE:
    r"""A stochastic differential equation $dy = f(t, y)\,dt + g(t, y)\,dW$, in torchsde's terms.

    Args:
        drift: `(t, y) -> (*batch, *event)`; `t` is a 0-d tensor on y's device, in the more precise dtype of
            y's and the grid's.
        diffusion: `(t, y) -> g`. Either g has y's shape (each component has its own Brownian channel)
            or one more axis, `(*batch, d, m)`, and is multiplied by m channels.
        noise_type: `"diagonal"` (g elementwise, g_i depends on y_i alone), `"additive"` (g does not depend on y;
            elementwise or matrix), `"scalar"` (`(*batch, d, 1)`, one channel), `"general"` (`(*batch, d, m)`),
            `"commutative"` (the same, with columns that commute as vector fields, D g_i g_j = D g_j g_i, so that
            solvers need no space-space area; torchsde has no such type), `"underdamped"` (additive, in the form of
            `UnderdampedLangevin`), or `"none"` (an ODE, see `ODE`).
        sde_type: `"ito"` or `"stratonovich"`.
        derivative: for diagonal noise, `(t, y) -> dg_i/dy_i` of g's shape, which `Milstein` then uses. By default it
            differentiates the diffusion in reverse mode, where what the diffusion detaches counts as a constant.
        langevin: friction and size of the noise of `UnderdampedLangevin`, which makes such problems; None for others.

    Raises:
        InputError: an unknown noise type or calculus, a drift or diffusion that is not callable, a derivative for
            noise that is not diagonal, underdamped noise without its `langevin`.
    """

    drift: Field
    diffusion: Field = None  # type: ignore[assignment]
    noise_type: str = "diagonal"
    sde_type: str = "ito"
    derivative: Field | None = None
    langevin: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.diffusion is None:
            cure = "Use fewstep.ODE(drift) for an equation without noise"
            if _methods(self.drift):
                cure = "Use SDE.from_module(module) for an object that has both as methods"
            raise InputError(f"diffusion: got None, expected a function (t, y) -> tensor. {cure}.")
        for name in ("drift", "diffusion"):
            _validation.check_callable(name, getattr(self, name), "a function (t, y) -> tensor")
        _validation.check_choice("noise_type", self.noise_type, NOISE_TYPES)
        _validation.check_choice("sde_type", self.sde_type, SDE_TYPES)
        if self.derivative is not None:
            _validation.check_callable("derivative", self.derivative, "a function (t, y) -> tensor")
            if self.noise_type != "diagonal":
                raise InputError(
                    f"derivative: got one for {self.noise_type!r} noise, expected one only for 'diagonal' noise. "
                    "Omit it: solvers that need derivatives compute them."
                )
        if (self.langevin is None) == (self.noise_type == "underdamped"):
            raise InputError(
                f"langevin: got {_validation.describe(self.langevin)} for {self.noise_type!r} noise, expected none. "
                "fewstep.UnderdampedLangevin(force, friction, temperature) makes problems with underdamped noise."
            )
        if self.noise_type == "none" and self.diffusion is not zero_diffusion:
            raise InputError("noise_type: got 'none' with a diffusion. Use fewstep.ODE(drift).")

    @classmethod
    def from_torchsde(cls, sde: Any) -> SDE:
        """Convert an SDE object written for torchsde, with `f`, `g`, `noise_type` and `sde_type`."""
        missing = [n for n in ("f", "g", "noise_type", "sde_type") if not hasattr(sde, n)]
        if missing:
            raise InputError(
                f"sde: got {type(sde).__name__} without {', '.join(missing)}, expected a torchsde SDE. Derive it from "
                "torchsde.SDEIto or torchsde.SDEStratonovich, or build fewstep.SDE(drift, diffusion) directly."
            )
        return cls(sde.f, sde.g, sde.noise_type, sde.sde_type)

    @classmethod
    def from_module(cls, module: Any, noise_type: str | None = None, sde_type: str | None = None) -> SDE:
        """Convert an object, such as an `nn.Module`, whose methods are drift and diffusion.

        Args:
            module: has the methods `drift` and `diffusion`, or `f` and `g` as in torchsde, each `(t, y) -> tensor`.
            noise_type, sde_type: by default the module's attributes of these names, else "diagonal" and "ito".

        Raises:
            InputError: neither pair of methods, an unknown noise type or calculus.
        """
        pair = _methods(module)
        if pair is None:
            raise InputError(
                f"module: got {_validation.describe(module)}, expected an object with the methods drift and diffusion, "
                "or f and g, each (t, y) -> tensor. Build fewstep.SDE(drift, diffusion) from two functions."
            )
        noise_type = getattr(module, "noise_type", "diagonal") if noise_type is None else noise_type
        sde_type = getattr(module, "sde_type", "ito") if sde_type is None else sde_type
        return cls(*pair, noise_type, sde_type)

    def to_stratonovich(self) -> SDE:
        r"""The same process as a Stratonovich equation: its drift is less by $\tfrac12 \sum_j D g_j\, g_j$.

        The derivatives are exact, in forward mode (`torch.func.jvp`), one per channel and evaluation of the drift; for
        diagonal noise one in all, or `derivative`. Additive noise needs none: only `sde_type` changes. The noise type
        stays. `to_ito` of the result is this equation with its own drift again.
        """
        return _converted(self, "stratonovich")

    def to_ito(self) -> SDE:
        r"""The same process as an Itô equation: its drift is more by $\tfrac12 \sum_j D g_j\, g_j$.

        See `to_stratonovich`.
        """
        return _converted(self, "ito")

    def correlated(self, correlation: Any = None, *, factor: Any = None) -> SDE:
        r"""The equation with correlated channels: $g\,dB$ with $E[dB\,dB^T] = R\,dt$ in place of $g\,dW$.

        The diffusion becomes g L with $L L^T = R$, so that its channels are independent again. Diagonal noise becomes
        commutative (its columns still commute), underdamped noise additive, other types stay.

        Args:
            correlation: (m, m) the matrix R: symmetric, with ones on its diagonal, positive semidefinite; on y's
                device. L is its Cholesky factor, or one of its eigenvectors where R is singular.
            factor: (m, k) your own L instead, for k independent channels; its rows have norm one.

        Raises:
            InputError: both or neither, a matrix that is not one, an equation with fewer than two channels.
        """
        if self.noise_type in ("none", "scalar"):
            raise InputError(f"correlated: got {self.noise_type!r} noise, expected noise of two channels or more.")
        if (correlation is None) == (factor is None):
            raise InputError("correlation: expected either a correlation matrix (m, m) or factor= (m, k).")
        name, given = ("correlation", correlation) if factor is None else ("factor", factor)
        matrix = _validation.check_reals(name, given)
        if matrix.dim() != 2:
            raise InputError(f"{name}: got shape {tuple(matrix.shape)}, expected a matrix.")
        L = _factor(matrix) if factor is None else matrix
        rows = L.detach().square().sum(1)
        if not _near(rows, torch.ones_like(rows)):
            raise InputError(f"factor: got rows with the squared norms {rows.tolist()!s:.80}, expected ones.")
        inner = self.diffusion

        def diffusion(t: Tensor, y: Tensor) -> Tensor:
            g = inner(t, y)
            if g.dim() <= y.dim():
                g = g.expand(y.shape)
                _check_channels(name, L, g.shape[-1])
                return g.unsqueeze(-1) * L.to(g.dtype)
            _check_channels(name, L, g.shape[-1])
            return g @ L.to(g.dtype)

        kind = {"diagonal": "commutative", "underdamped": "additive"}.get(self.noise_type, self.noise_type)
        return SDE(self.drift, diffusion, kind, self.sde_type)

    def noise_shape(self, y: Tensor, g: Tensor) -> tuple[int, ...]:
        """Return the shape of W: y's own, or y's with the last axis replaced by the m channels of g.

        Raises:
            InputError: the shape of g does not fit y and the noise type.
        """
        matrix = g.dim() == y.dim() + 1
        expected = (*y.shape, g.shape[-1]) if matrix else tuple(y.shape)
        fits = g.dim() <= len(expected) and all(have in (1, want) for have, want in zip(g.shape[::-1], expected[::-1]))
        cure = "Return one value (or one row of channels) for each component of y."
        if self.noise_type in MATRICES and not matrix:
            fits, expected = False, (*y.shape, "m")
            cure = "Add the channel axis, or declare noise_type='diagonal'."
        elif self.noise_type == "diagonal" and matrix:
            fits, expected = False, tuple(y.shape)
            cure = "Declare noise_type='general' for a matrix."
        elif self.noise_type == "scalar" and g.shape[-1] != 1:
            fits, expected = False, (*y.shape, 1)
        if not fits:
            raise InputError(
                f"diffusion: got shape {tuple(g.shape)} for {self.noise_type!r} noise and y of shape "
                f"{tuple(y.shape)}, expected {expected}. {cure}"
            )
        return (*y.shape[:-1], g.shape[-1]) if matrix else tuple(y.shape)


def _methods(module: Any) -> tuple[Field, Field] | None:
    """The drift and diffusion that an object has as methods; None for a class or an object without them."""
    pairs = [] if isinstance(module, type) else [("drift", "diffusion"), ("f", "g")]
    found = [[getattr(module, name, None) for name in pair] for pair in pairs]
    return next(((f, g) for f, g in found if callable(f) and callable(g)), None)


class _Corrected:
    """A drift plus `sign` times half of sum_j D g_j g_j."""

    def __init__(self, sde: SDE, sign: float) -> None:
        self.sde: SDE = sde
        self.sign: float = sign

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return self.sde.drift(t, y) + 0.5 * self.sign * _correction(self.sde, t, y)


def _converted(sde: SDE, calculus: str) -> SDE:
    drift = sde.drift
    if sde.noise_type in CONSTANT or sde.sde_type == calculus:
        return replace(sde, sde_type=calculus)
    if isinstance(drift, _Corrected) and drift.sde.sde_type == calculus and drift.sde.diffusion is sde.diffusion:
        return drift.sde
    return replace(sde, drift=_Corrected(sde, -1.0 if calculus == "stratonovich" else 1.0), sde_type=calculus)


def _correction(sde: SDE, t: Tensor, y: Tensor) -> Tensor:
    """sum_j D g_j g_j at (t, y), by derivatives in forward mode."""
    g = sde.diffusion(t, y)
    if sde.derivative is not None:
        return sde.derivative(t, y) * g
    if g.dim() <= y.dim():
        columns: list[tuple[Field, Tensor]] = [(sde.diffusion, g)]
    else:
        columns = [(partial(_column, sde.diffusion, j), along) for j, along in enumerate(g.unbind(-1))]
    total = torch.zeros_like(y)
    for column, along in columns:
        # forward-mode AD needs memory of its own for each number
        tangent = along.to(y.dtype).expand_as(y).contiguous()
        try:
            total = total + torch.func.jvp(partial(column, t), (y.contiguous(),), (tangent,))[1]
        except RuntimeError as error:
            raise InputError(
                f"diffusion: got a function that torch.func cannot transform ({str(error).splitlines()[0]:.90}), which "
                "to_ito and to_stratonovich need. Compute its value by torch's operations, or write the drift yourself."
            ) from error
    return total


def _column(diffusion: Field, j: int, t: Tensor, y: Tensor) -> Tensor:
    return diffusion(t, y)[..., j]


def _factor(R: Tensor) -> Tensor:
    """A matrix L with L L' = R, for a correlation matrix; raises InputError for another matrix."""
    known = R.detach()
    square = R.shape[0] == R.shape[1]
    if not (square and _near(known, known.mT) and _near(known.diagonal(), torch.ones_like(known.diagonal()))):
        raise InputError(
            f"correlation: got {known.tolist()!s:.100}, expected a symmetric matrix with ones on its diagonal. "
            "Scale the columns of the diffusion by standard deviations."
        )
    found = torch.linalg.cholesky_ex(R)
    if holds(found.info == 0):
        L: Tensor = found.L
        return L
    values, vectors = torch.linalg.eigh(R)
    if not holds((values > -1e-5).all()):
        raise InputError(f"correlation: got the least eigenvalue {float(values.min()):.3g}, expected none below 0.")
    root: Tensor = vectors * values.clamp(min=0).sqrt()
    return root


def _near(a: Tensor, b: Tensor) -> bool:
    return holds(((a - b).abs() < 1e-5).all())


def _check_channels(name: str, L: Tensor, channels: int) -> None:
    if L.shape[0] != channels:
        raise InputError(f"{name}: got {L.shape[0]} rows for {channels} channels, expected as many.")


def ODE(drift: Field) -> SDE:
    r"""An ordinary differential equation $dy = f(t, y)\,dt$, as an SDE with `noise_type="none"`.

    Every SDE solver whose card has a `deterministic_order` solves it with that order.

    Args:
        drift: `(t, y) -> (*batch, *event)`.
    """
    return SDE(drift, zero_diffusion, noise_type="none")


def UnderdampedLangevin(force: Field, friction: float = 1.0, temperature: float = 1.0) -> SDE:
    r"""Underdamped Langevin dynamics $dx = v\,dt$, $dv = (F(t, x) - \gamma v)\,dt + \sqrt{2 \gamma T}\,dW$.

    The state y holds the positions x, then the velocities v, along its last axis: y = torch.cat([x, v], -1). Where
    F is minus the gradient of a potential U the law tends to a density proportional to exp(-(U(x) + |v|^2 / 2) / T). It
    is an `SDE` with `noise_type="underdamped"`: `QUICSORT`, `ShOULD` and `ALIGN` are for it, and all solvers of
    additive noise solve it.

    Args:
        force: `(t, x) -> (*batch, d)`, F per unit of mass.
        friction: gamma, at least 0.
        temperature: T, at least 0.

    Raises:
        InputError: a force that is not callable, a negative friction or temperature.
    """
    _validation.check_callable("force", force, "a function (t, x) -> tensor")
    expected = "a finite number of at least 0"
    gamma = _validation.check_float("friction", friction, 0, expected=expected)
    sigma = math.sqrt(2 * gamma * _validation.check_float("temperature", temperature, 0, expected=expected))

    def drift(t: Tensor, y: Tensor) -> Tensor:
        x, v = y.chunk(2, -1)
        return torch.cat([v, force(t, x) - gamma * v], -1)

    def diffusion(t: Tensor, y: Tensor) -> Tensor:
        d = y.shape[-1] // 2
        if 2 * d != y.shape[-1]:
            raise InputError(f"y: got a last axis of {y.shape[-1]}, expected positions and as many velocities.")
        g = torch.diag_embed(y.new_full((d,), sigma))
        return torch.cat([torch.zeros_like(g), g]).expand(*y.shape, d)

    return SDE(drift, diffusion, noise_type="underdamped", langevin=(gamma, sigma))


def diffuse(g: Tensor, dW: Tensor) -> Tensor:
    """Return g dW: elementwise, or a matrix-vector product where g has a channel axis."""
    if g.dim() == dW.dim() + 1:
        return (g @ dW.unsqueeze(-1)).squeeze(-1)
    return g * dW


def plus(x: Tensor, weight: float | Tensor, term: Tensor) -> Tensor:
    """Return x + weight * term, where a weight with a graph is a 0-d tensor."""
    if isinstance(weight, (int, float)):
        return torch.add(x, term, alpha=weight)
    # rounds as the sum above does
    return torch.addcmul(x, term, weight) if torch.compiler.is_compiling() else x + weight * term


def added(total: Tensor, term: Tensor, weight: float = 1.0) -> Tensor:
    """total + weight * term in the memory of total, which the caller owns, unless torch transforms the code.

    In a vmap total may lack the axis of the samples that term has.
    """
    if torch.compiler.is_compiling() or transformed():
        return torch.add(total, term, alpha=weight)
    return total.add_(term, alpha=weight)


@dataclass(frozen=True)
class DiffusionModel:
    """A diffusion model in the library's one convention, with the forward process it was trained on.

    Args:
        denoiser: `(x, sigma) -> x0`, the posterior mean of the data given x = x0 + sigma n
            (variance-exploding coordinates). x is (*batch, *event), sigma a 0-d tensor like x.
            `from_epsilon` and related functions convert other predictions.
        schedule: the forward process, which defines where sigma starts and ends.

    Raises:
        InputError: a denoiser that is not callable, or no schedule.
    """

    denoiser: Denoiser
    schedule: Schedule

    def __post_init__(self) -> None:
        _validation.check_callable("denoiser", self.denoiser, "a function (x, sigma) -> x0")
        check_schedule(self.schedule)
