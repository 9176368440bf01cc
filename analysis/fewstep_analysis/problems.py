"""Test problems: SDEs with known solutions, or whose noise dominates so that orders can be measured."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep import SDE, UnderdampedLangevin, _validation
from fewstep.problem import CONSTANT, SDE_TYPES

F64 = torch.float64


@dataclass(frozen=True)
class TestProblem:
    """An SDE with its initial value, end time and known solution, for measurements.

    Attributes:
        name: as on the command line.
        sde: the equation.
        y0: (*event) the initial value of one path.
        t1: the end; time starts at 0.
        exact: `(y0, t, W_t) -> y_t` where there is a closed form along the path. Such problems are insensitive to a
            wrong space-time area.
        mean: `(y0, t) -> E y_t` where it is known.
    """

    __test__ = False  # not a test class for pytest

    name: str
    sde: SDE
    y0: Tensor
    t1: float = 1.0
    exact: Callable[[Tensor, float, Tensor], Tensor] | None = None
    mean: Callable[[Tensor, float], Tensor] | None = None


def _state(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def geometric_brownian_motion(mu: float = 0.5, sigma: float = 0.7) -> TestProblem:
    """dy = mu y dt + sigma y dW; y_t = y_0 exp((mu - sigma^2/2) t + sigma W_t)."""
    return TestProblem(
        "geometric_brownian_motion", SDE(lambda t, y: mu * y, lambda t, y: sigma * y), _state(1.0),
        exact=lambda y0, t, W: y0 * torch.exp((mu - sigma**2 / 2) * t + sigma * W),
        mean=lambda y0, t: y0 * math.exp(mu * t),
    )  # fmt: skip


def sine(a: float = 2.0, b: float = 0.8, c: float = 0.6) -> TestProblem:
    """dy = -a sin y dt + (b + c cos y) dW: non-linear, [f, g] != 0, noise from 0.2 to 1.4; no closed form."""
    return TestProblem("sine", SDE(lambda t, y: -a * torch.sin(y), lambda t, y: b + c * torch.cos(y)), _state(0.4))


def additive_sine() -> TestProblem:
    """dy = sin y dt + dW: additive noise and [f, g] != 0."""
    sde = SDE(lambda t, y: torch.sin(y), lambda t, y: torch.ones_like(y), noise_type="additive")
    return TestProblem("additive_sine", sde, _state(0.4))


def additive_in_time() -> TestProblem:
    """dy = sin(y + t) dt + (1 + t^2) dW: additive noise that depends on time."""
    sde = SDE(lambda t, y: torch.sin(y + t), lambda t, y: (1 + t * t) * torch.ones_like(y), noise_type="additive")
    return TestProblem("additive_in_time", sde, _state(0.4))


def ornstein_uhlenbeck(theta: float = 1.0, sigma: float = 0.8) -> TestProblem:
    """dy = -theta y dt + sigma dW: linear, and sensitive to a wrong space-time area."""
    sde = SDE(lambda t, y: -theta * y, lambda t, y: torch.full_like(y, sigma), noise_type="additive")
    return TestProblem("ornstein_uhlenbeck", sde, _state(1.0), mean=lambda y0, t: y0 * math.exp(-theta * t))


def hyperbolic_sine() -> TestProblem:
    """dy = (y/2 + sqrt(1 + y^2)) dt + sqrt(1 + y^2) dW; y_t = sinh(arsinh y_0 + t + W_t)."""
    sde = SDE(lambda t, y: 0.5 * y + (1 + y * y).sqrt(), lambda t, y: (1 + y * y).sqrt())
    return TestProblem(
        "hyperbolic_sine", sde, _state(0.0), t1=0.5, exact=lambda y0, t, W: torch.sinh(torch.asinh(y0) + t + W)
    )


def igbm(a: float = 0.1, b: float = 0.04, sigma: float = 0.6) -> TestProblem:
    """dy = a (b - y) dt + sigma y dW, inhomogeneous geometric Brownian motion: [f, g] != 0."""
    sde = SDE(lambda t, y: a * (b - y), lambda t, y: sigma * y)
    return TestProblem("igbm", sde, _state(0.06), t1=5.0, mean=lambda y0, t: b + (y0 - b) * math.exp(-a * t))


def double_well(sigma: float = 0.7) -> TestProblem:
    """dy = (y - y^3) dt + sigma dW: two basins; paths that change basins dominate the RMSE."""
    sde = SDE(lambda t, y: y - y**3, lambda t, y: torch.full_like(y, sigma), noise_type="additive")
    return TestProblem("double_well", sde, _state(0.0), t1=2.0)


def fitzhugh_nagumo(sigma: float = 0.3) -> TestProblem:
    """dv = 3 (v - v^3/3 - w) dt, dw = (v + 0.7 - 0.8 w)/3 dt + sigma dW: excitable, noise on w only."""

    def drift(t: Tensor, y: Tensor) -> Tensor:
        v, w = y.unbind(-1)
        return torch.stack([3 * (v - v**3 / 3 - w), (v + 0.7 - 0.8 * w) / 3], -1)

    sde = SDE(drift, lambda t, y: y.new_tensor([0.0, sigma]), noise_type="additive")
    return TestProblem("fitzhugh_nagumo", sde, _state(-1.0, -0.5), t1=2.0)


def underdamped_langevin(friction: float = 1.0, sigma: float = 1.4) -> TestProblem:
    """dq = p dt, dp = (-q - sin 2q - friction p) dt + sigma dW: noise on the momentum only."""
    sde = UnderdampedLangevin(lambda t, x: -x - torch.sin(2 * x), friction, sigma**2 / (2 * friction))
    return TestProblem("underdamped_langevin", sde, _state(1.0, 0.0))


def scalar_pair() -> TestProblem:
    """Two components, one channel: dy = (-sin y_1, cos y_0) dt + (0.6 + 0.3 cos y_1, 0.5 sin y_0) dW."""
    sde = SDE(
        lambda t, y: torch.stack([-torch.sin(y[..., 1]), torch.cos(y[..., 0])], -1),
        lambda t, y: torch.stack([0.6 + 0.3 * torch.cos(y[..., 1]), 0.5 * torch.sin(y[..., 0])], -1).unsqueeze(-1),
        noise_type="scalar",
    )
    return TestProblem("scalar_pair", sde, _state(0.4, 0.9))


def commutative_pair() -> TestProblem:
    """Two components u, two channels along M(y) = (0.7 + 0.4 sin(y_0 + y_1)) (1, 0.5): they commute."""

    def diffusion(t: Tensor, y: Tensor) -> Tensor:
        size = (0.7 + 0.4 * torch.sin(y.sum(-1)))[..., None, None]
        # both columns are multiples of one vector field: their bracket is zero
        return size * y.new_tensor([[0.8, 0.6], [0.4, 0.3]])

    sde = SDE(
        lambda t, y: torch.stack([-torch.sin(2 * y[..., 1]), torch.cos(y[..., 0])], -1),
        diffusion,
        noise_type="commutative",
    )
    return TestProblem("commutative_pair", sde, _state(0.4, 0.9))


def noncommutative_pair() -> TestProblem:
    """Two components and channels whose vector fields do not commute: order 1 needs the Lévy area."""

    def diffusion(t: Tensor, y: Tensor) -> Tensor:
        a, b = y.unbind(-1)
        entries = [0.8 + 0 * a, 0.6 * torch.sin(b), 0.5 * torch.cos(a), 0.7 + 0 * a]
        return torch.stack(entries, -1).reshape(*y.shape, 2)

    sde = SDE(lambda t, y: -torch.sin(y), diffusion, noise_type="general")
    return TestProblem("noncommutative_pair", sde, _state(0.4, 0.9))


def heston(kappa: float = 2.0, theta: float = 0.25, xi: float = 0.3, rho: float = -0.6) -> TestProblem:
    """Log-price and variance: dx = -v/2 dt + sqrt(v) dB, dv = kappa (theta - v) dt + xi sqrt(v) dZ, corr rho.

    2 kappa theta / xi^2 = 11: the variance stays away from zero, where the root is not Lipschitz.
    """

    def drift(t: Tensor, y: Tensor) -> Tensor:
        v = y[..., 1]
        return torch.stack([-0.5 * v, kappa * (theta - v)], -1)

    def diffusion(t: Tensor, y: Tensor) -> Tensor:
        root = y[..., 1].clamp(min=1e-8).sqrt()[..., None, None]
        return root * y.new_tensor([[1.0, 0.0], [xi * rho, xi * math.sqrt(1 - rho * rho)]])

    def mean(y0: Tensor, t: float) -> Tensor:
        x, excess, decay = y0[..., 0], y0[..., 1] - theta, math.exp(-kappa * t)
        return torch.stack([x - 0.5 * (theta * t + excess * (1 - decay) / kappa), theta + excess * decay], -1)

    return TestProblem("heston", SDE(drift, diffusion, noise_type="general"), _state(0.0, 0.25), mean=mean)


def torchsde_diagonal(d: int = 3) -> TestProblem:
    """dy_i = mu_i y_i dt + sigma_i y_i dW_i: torchsde's diagonal example, with fixed parameters."""
    mu, sigma = torch.linspace(0.2, 0.6, d, dtype=F64), torch.linspace(0.3, 0.7, d, dtype=F64)
    return TestProblem(
        "torchsde_diagonal", SDE(lambda t, y: mu.to(y) * y, lambda t, y: sigma.to(y) * y), torch.ones(d, dtype=F64),
        exact=lambda y0, t, W: y0 * torch.exp((mu - sigma**2 / 2).to(W) * t + sigma.to(W) * W),
        mean=lambda y0, t: y0 * torch.exp(mu * t),
    )  # fmt: skip


def torchsde_scalar(p: float = 0.7) -> TestProblem:
    """dy = -p^2 sin y cos^3 y dt + p cos^2 y dW; y_t = atan(p W_t + tan y_0): torchsde's scalar example."""
    sde = SDE(
        lambda t, y: -p * p * torch.sin(y) * torch.cos(y) ** 3,
        lambda t, y: (p * torch.cos(y) ** 2).unsqueeze(-1),
        noise_type="scalar",
    )
    return TestProblem("torchsde_scalar", sde, _state(0.3), exact=lambda y0, t, W: torch.atan(p * W + torch.tan(y0)))


def torchsde_additive(a: float = 0.5, b: float = 0.8) -> TestProblem:
    """dy = (b/s - y/(2 s^2)) dt + a b/s dW, s = sqrt(1 + t): torchsde's additive example.

    y_t = (y_0 + b (t + a W_t)) / sqrt(1 + t).
    """
    sde = SDE(
        lambda t, y: b / (1 + t).sqrt() - y / (2 * (1 + t)),
        lambda t, y: a * b / (1 + t).sqrt() * torch.ones_like(y),
        noise_type="additive",
    )
    return TestProblem(
        "torchsde_additive", sde, _state(1.0),
        exact=lambda y0, t, W: (y0 + b * (t + a * W)) / math.sqrt(1 + t),
        mean=lambda y0, t: (y0 + b * t) / math.sqrt(1 + t),
    )  # fmt: skip


def neural_general(d: int = 3, m: int = 2, seed: int = 0) -> TestProblem:
    """Small random networks for drift and diffusion, as in torchsde's diagnostics: general noise."""
    generator = torch.Generator().manual_seed(seed)

    def layer(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, dtype=F64) / math.sqrt(columns)

    f1, f2, g1, g2 = layer(8, d), layer(d, 8), layer(8, d), layer(d * m, 8)

    def drift(t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(y @ f1.to(y).mT + t) @ f2.to(y).mT

    def diffusion(t: Tensor, y: Tensor) -> Tensor:
        flat = torch.sigmoid(torch.tanh(y @ g1.to(y).mT + t) @ g2.to(y).mT)
        return flat.reshape(*flat.shape[:-1], d, m)

    sde = SDE(drift, diffusion, noise_type="general", sde_type="stratonovich")
    return TestProblem("neural_general", sde, torch.full((d,), 0.1, dtype=F64))


PROBLEMS: dict[str, Callable[[], TestProblem]] = {
    f.__name__: f
    for f in (
        geometric_brownian_motion, sine, additive_sine, additive_in_time, ornstein_uhlenbeck,
        hyperbolic_sine, igbm, double_well, fitzhugh_nagumo, underdamped_langevin, scalar_pair,
        commutative_pair, noncommutative_pair, heston, torchsde_diagonal, torchsde_scalar,
        torchsde_additive, neural_general,
    )
}  # fmt: skip

# the problems on which declared orders are judged: noise dominates and [f, g] != 0
JUDGES = {
    "diagonal": sine, "additive": additive_sine, "scalar": scalar_pair, "commutative": commutative_pair,
    "general": noncommutative_pair, "underdamped": underdamped_langevin,
}  # fmt: skip


def judge(noise_type: str, sde_type: str = "ito") -> TestProblem:
    """The problem on which orders are judged for this noise type, in this calculus."""
    _validation.check_choice("noise_type", noise_type, JUDGES)
    _validation.check_choice("sde_type", sde_type, SDE_TYPES)
    return in_calculus(JUDGES[noise_type](), sde_type)


def in_calculus(problem: TestProblem, sde_type: str) -> TestProblem:
    """The same drift and diffusion in another calculus, which is another SDE: exact and mean are dropped."""
    if problem.sde.sde_type == sde_type or problem.sde.noise_type in CONSTANT:
        return problem
    name, sde = f"{problem.name}_{sde_type}", replace(problem.sde, sde_type=sde_type)
    return replace(problem, name=name, sde=sde, exact=None, mean=None)


def by_name(name: str) -> TestProblem:
    """The problem of that name with its default parameters; the suffix `_stratonovich` selects that calculus."""
    base, _, calculus = name.rpartition("_") if isinstance(name, str) else ("", "", "")
    if calculus in ("stratonovich", "ito") and base in PROBLEMS:
        return in_calculus(PROBLEMS[base](), calculus)
    _validation.check_choice("problem", name, PROBLEMS)
    return PROBLEMS[name]()
