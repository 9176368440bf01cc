"""The conformance suite: the contract that every solver of this library keeps, for your own solvers as well.

    from fewstep.testing import check_solver
    check_solver(MySolver())

A card is measured, not trusted: evaluations are counted and orders are estimated on built-in problems.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from . import _validation
from .brownian.area_path import path_for
from .brownian.increment import LEVY_ORDER, Path
from .executor import evaluation_of, run
from .grid import FINALS, sigma_grid
from .plan import Plan
from .problem import ODE, SDE, UnderdampedLangevin
from .schedule import DiscreteVP, VPLinear
from .solve import solve
from .solver import Card, DiffusionSolver, Solver, StochasticSolver

F64 = torch.float64
Denoiser = Callable[[Tensor, float], Tensor]
PATHS = 4096
REFINEMENTS = (2, 4, 8, 16)
SPAN = 0.125
TOLERANCE = 0.25  # half the distance between two orders of SDE solvers


class ConformanceError(AssertionError):
    """A solver breaks the contract or its card; the message names the solver, the case and the rule."""


def check_solver(solver: StochasticSolver | DiffusionSolver) -> None:
    """Check that a solver keeps the contract and that its card is true.

    SDE solvers, for every noise type and calculus of the card: y's dtype and shape are kept; the step writes to none of
    its arguments, is reproducible, needs no more of the increment than `levy`, and lets gradients reach y0; drift
    evaluations are counted. The strong order is the mean of the two finest local slopes of E|difference| between 2, 4,
    8 and 16 steps over [0, 1/8] along 4,096 paths, where the noise depends on time; the deterministic order is that
    slope on an ODE, over [0, 1/2] from order 5. Weak orders are not measured: see `fewstep_analysis.weak_order`.

    Diffusion solvers, on grids of 1 to 12 steps: plans are reproducible, keep dtypes, and are exact where the estimate
    of x0 never changes; evaluations per step are counted. The deterministic order is measured on an exact score with
    all normals zero. The grid starts with tiny steps, so multistep methods, whose first steps have lower order, start
    from exact values. The variance of Gaussian samples is computed, not estimated, and must be that of the data.

    Measured orders may differ by 0.25 from the card's (and exceed it with `lower_bound`). The standard error of a
    strong slope is about 0.02 and its bias at these steps at most 0.15, which is five standard errors from the
    threshold: the verdict on one order is wrong with a probability below 1e-6. Seeds are fixed, and with them the
    verdict.

    Raises:
        InputError: not a solver.
        ConformanceError: the first rule that is broken.
    """
    kinds = (StochasticSolver, DiffusionSolver)
    _validation.check_instance("solver", solver, kinds, "a solver such as EulerMaruyama() or DDIM(), not its class")
    name = repr(solver)
    _within(name, _check_card, solver)
    if isinstance(solver, StochasticSolver):
        for sde, case in cases(solver):
            for dtype in (torch.float32, torch.float64):
                _within(f"{name}, {case}, {dtype}", _check_solve, solver, sde, dtype)
            _within(f"{name}, {case}", _check_step, solver, sde)
            if sde.noise_type != "none":
                _within(f"{name}, {case}", _check_strong_order, solver, sde)
        if (order := solver.card.deterministic_order) is not None:
            _within(f"{name}, without noise", _check_ode, solver, order)
    if isinstance(solver, DiffusionSolver):
        for steps, final in product((1, 2, 3, 4, 12), FINALS):
            _within(f"{name}, steps={steps}, final={final!r}", _check_plan, solver, steps, final)
        _within(f"{name}, Gaussian data", _check_sampler, solver)


def _within(case: str, check: Callable[..., None], *args: Any) -> None:
    """Run a check; whatever the solver raises there becomes an error that names the case."""
    try:
        check(case, *args)
    except ConformanceError:
        raise
    except Exception as error:
        raise ConformanceError(f"{case}: {type(error).__name__}: {error}") from error


def _require(kept: bool, message: str) -> None:
    if not kept:
        raise ConformanceError(message)


def _check_card(name: str, solver: Solver) -> None:
    """The facts that a loop or a table needs; `Card` itself rejects unknown words."""
    card = getattr(solver, "card", None)
    if not isinstance(card, Card):
        raise ConformanceError(f"{name}: it has no card; write card = fewstep.Card(...) in the class")
    strong, weak, steps = card.strong_order, card.weak_order, isinstance(solver, StochasticSolver)
    named = re.search(r"Eq|Algorithm|Table|after|Section|Def", card.reference)
    for kept, broken in (
        (card.summary, "summary is empty"),
        (named, "reference names no equation, algorithm or table"),
        (set(weak) <= set(strong), "weak_order has other noise types than strong_order"),
        (all(weak[k] >= strong.get(k, 0) for k in weak), "a weak order is below the strong one"),
        (strong or not steps or card.deterministic_order, "strong_order is empty"),
        (card.sde_types or not steps, "sde_types is empty"),
    ):
        _require(bool(kept), f"{name}, card: {broken}")


def _check_order(case: str, card: Card, kind: str, declared: float, slope: float) -> None:
    within = declared - TOLERANCE < slope and (card.lower_bound or slope < declared + TOLERANCE)
    _require(within, f"{case}: measured {kind} order {slope:.2f}, the card states {declared:g}")


def _check_evaluations(case: str, card: Card, spent: float) -> None:
    message = f"{case}: measured {spent:g} evaluations per step, the card states {card.evaluations}"
    _require(spent == card.evaluations, message)


# ---------------------------------------------------------------- SDE solvers


def cases(solver: StochasticSolver) -> Iterator[tuple[SDE, str]]:
    """An SDE for each noise type and calculus that the card lists, with its name."""
    for noise, calculus in product(solver.card.strong_order, solver.card.sde_types):
        langevin = replace(LANGEVIN, sde_type=calculus)
        sde = langevin if noise == "underdamped" else SDE(_drift, DIFFUSIONS[noise], noise, calculus)
        yield sde, f"{noise} noise, {calculus}"
    if not solver.card.strong_order:
        yield ODE(_drift), "ODE"


def _drift(t: Tensor, y: Tensor) -> Tensor:
    # not 2 * y: in nested forward derivatives a product with a number takes most of the time
    return torch.cos(y.flip(-1) + 2 * t) - torch.sin(y + y)


def _columns(y: Tensor, *columns: Tensor) -> Tensor:
    return torch.stack([column.expand_as(y) for column in columns], -1)


# noise dominates, depends on time and does not commute with the drift: all of it is needed to see orders
DIFFUSIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "additive": lambda t, y: (1 + torch.sin(3 * t)) * torch.ones_like(y),
    "diagonal": lambda t, y: 0.9 + 0.5 * torch.cos(1.5 * y + 3 * t),
    "scalar": lambda t, y: _columns(y, 0.7 + 0.5 * torch.sin(y + y.flip(-1) + 3 * t)),
    # both columns are multiples of one vector field
    "commutative": lambda t, y: _columns(
        y, *(c * (0.8 + 0.5 * torch.sin(y.sum(-1, keepdim=True) + 3 * t)) for c in (0.8, 0.6))
    ),
    "general": lambda t, y: _columns(y, 0.8 + 0.6 * torch.sin(2 * y.flip(-1) + 3 * t), torch.cos(2 * y)),
}


LANGEVIN = UnderdampedLangevin(lambda t, x: torch.cos(x + 2 * t) - torch.sin(x + x), 2.0)


def own_path(solver: StochasticSolver, y: Tensor, sde: SDE, steps: int = 8, t1: float = 1.0) -> Path:
    """A path over [0, t1] for states like y with just what the solver's card asks for."""
    shape = sde.noise_shape(y, sde.diffusion(y.new_zeros(()), y))
    return path_for([solver.card.levy], shape, (0.0, t1), 4 * steps, seed=1, dtype=y.dtype)


def _check_solve(case: str, solver: StochasticSolver, sde: SDE, dtype: torch.dtype) -> None:
    y0 = torch.linspace(0.1, 1, 24, dtype=dtype).reshape(4, 3, 2)
    path, kept = own_path(solver, y0, sde), y0.clone()
    coarse, fine = (solve(sde, solver, y0, torch.linspace(0, 1, n + 1, dtype=F64), path=path) for n in (3, 4))
    _check_evaluations(case, solver.card, fine.nfe - coarse.nfe)
    _require(coarse.y.dtype == dtype, f"{case}: the state returned has dtype {coarse.y.dtype}")
    _require(coarse.y.shape == y0.shape, f"{case}: the state returned has shape {tuple(coarse.y.shape)}")
    _require(torch.equal(y0, kept), f"{case}: y0 was written to")


def _check_step(case: str, solver: StochasticSolver, sde: SDE) -> None:
    y, levy = torch.linspace(0.1, 1, 12, dtype=F64).reshape(3, 4).requires_grad_(), solver.card.levy
    t0, t1 = y.new_tensor(0.25), y.new_tensor(0.5)
    increment = own_path(solver, y.detach(), sde).increment(0.25, 0.5)
    bare = replace(increment, H=None) if levy == "A" else increment
    tensors = [v for v in (y, bare.W, bare.H, bare.K, bare.A) if v is not None]
    kept, carry = [v.clone() for v in tensors], solver.init(sde, t0, y)
    try:
        first = solver.step(sde, t0, t1, y, bare, carry).y
    except (AssertionError, TypeError, AttributeError) as error:
        raise ConformanceError(f"{case}: the step needs more than levy={levy!r}: {error}") from error
    same = all(torch.equal(a, b) for a, b in zip(kept, tensors, strict=True))
    _require(same, f"{case}: the step wrote to one of its arguments")
    second = solver.step(sde, t0, t1, y, bare, solver.init(sde, t0, y)).y
    _require(torch.equal(first, second), f"{case}: the same step twice differs, so it keeps state")
    gradient = torch.autograd.grad(first.sum(), y)[0]
    _require(bool(gradient.isfinite().all() and (gradient != 0).all()), f"{case}: no gradient reaches y0")


@torch.no_grad()
def _slope(solver: StochasticSolver, sde: SDE, y0: Tensor, times: int = 1) -> float:
    """The mean of the two finest local slopes of E|difference| of consecutive refinements.

    With `times`, over that many times the span in that many times the steps, for high orders: in shorter steps their
    differences are rounding.
    """
    path = None if sde.noise_type == "none" else own_path(solver, y0, sde, REFINEMENTS[-1], SPAN)
    grids = [torch.linspace(0, times * SPAN, times * n + 1, dtype=F64) for n in REFINEMENTS]
    ends = [solve(sde, solver, y0, grid, path=path).y for grid in grids]
    gaps = [float((a - b).abs().mean()) for a, b in zip(ends[:-1], ends[1:])]
    return math.log2(gaps[-3] / gaps[-1]) / 2


def _check_strong_order(case: str, solver: StochasticSolver, sde: SDE) -> None:
    y0 = torch.linspace(-3, 3, 2 * PATHS, dtype=F64).reshape(2, PATHS).T
    _check_order(case, solver.card, "strong", solver.card.strong_order[sde.noise_type], _slope(solver, sde, y0))


def _check_ode(case: str, solver: StochasticSolver, order: float) -> None:
    """Check on a Riccati equation that a small step follows the drift, and measure the deterministic order."""
    ode, h = ODE(lambda t, y: torch.sin(3 * t) - y * y), 2.0**-12
    y0 = torch.tensor([[-0.3, 0.2], [0.5, 1.5]], dtype=F64)
    y1 = solve(ode, solver, y0, torch.tensor([0.0, h], dtype=F64)).y
    wrong = float(((y1 - y0) / h + y0 * y0).abs().max())
    _require(wrong < 10 * h, f"{case}: the change over a small step is not drift times h")
    slope = _slope(solver, ode, y0) if order < 5 else _slope(solver, ODE(_drift), y0, 4)
    _check_order(case, solver.card, "deterministic", order, slope)


# ---------------------------------------------------------------- diffusion solvers


def _check_plan(case: str, solver: DiffusionSolver, steps: int, final: str) -> None:
    """Check a plan on the constant denoiser D = c: x - c must scale with sigma, and x = c must stay fixed."""
    schedule = DiscreteVP.named("linear")
    sigmas = sigma_grid(schedule, steps, final=final)
    kept = sigmas.clone()
    plan, again = solver.plan(sigmas, schedule), solver.plan(sigmas, schedule).tensors()
    _require(torch.equal(sigmas, kept), f"{case}: it wrote to the grid")
    same = all(torch.equal(v.nan_to_num(-1), again[k].nan_to_num(-1)) for k, v in plan.tensors().items())
    _require(same, f"{case}: two plans on one grid differ, so it keeps state")
    needs, has = (LEVY_ORDER.get(levy, 0) for levy in (plan.levy, solver.card.levy))
    _require(needs <= has, f"{case}: the plan needs levy={plan.levy!r}, the card states {solver.card.levy!r}")
    first, last = sigmas[[0, -1]]
    # stochastic plans have another drift: there only x = c is known
    apart = torch.linspace(-2, 2, 5, dtype=F64) * (0 if plan.levy else first)
    for dtype in (torch.float32, F64):
        x = _run(plan, (0.5 + apart).to(dtype), lambda x, sigma: torch.full_like(x, 0.5))
        _require(x.dtype == dtype, f"{case}: the state of {dtype} was returned as {x.dtype}")
    # in float64: one step over all levels cancels most digits
    error = float((x - 0.5 - apart * last / first).abs().max())
    _require(error < 1e-6, f"{case}: where the estimate of x0 never changes it ends {error:g} off")


def _run(plan: Plan, x: Tensor, denoiser: Denoiser, draw: Callable[[], Tensor] | None = None) -> Tensor:
    """The final state of a plan, its normals zero unless drawn."""
    letters = plan.stage_noise.shape[-1]

    def evaluate(i: int, x: Tensor, normals: object) -> Tensor:
        sigma = plan.rows[i].sigma
        return evaluation_of(plan.prediction, x, sigma, denoiser(x, sigma))

    return run(plan, x, evaluate, lambda *_: tuple(draw() if draw else 0 * x for _ in range(letters)))


def _graded(steps: int) -> Tensor:
    """Uneven levels from 1 to 0.1; the first interval is cut into steps that double from a tiny one."""
    k = torch.arange(steps + 1, dtype=F64) / steps
    u = k * (1 + 0.25 * torch.sin(math.pi * k) ** 2)
    tiny = u[1] * 2.0 ** -torch.arange(2 * round(math.log2(steps)), 0, -1, dtype=F64)
    return 10.0 ** -torch.cat([u[:1], tiny, u[1:]])


def _two_bumps(x: Tensor, sigma: float) -> Tensor:
    """The exact denoiser of two Gaussians of variance 0.02 at -0.2 and 0.2."""
    total = 0.02 + sigma**2
    return (0.02 * x + 0.2 * sigma**2 * torch.tanh(0.2 * x / total)) / total


def _check_sampler(case: str, solver: DiffusionSolver) -> None:
    card, n = solver.card, 64
    coarse, fine = (solver.plan(_graded(k), VPLinear()) for k in (n, 2 * n))
    _check_evaluations(case, card, (fine.nfe - coarse.nfe) / (len(fine.sigmas) - len(coarse.sigmas)))
    if (order := card.deterministic_order) is not None:
        start = torch.linspace(-2, 2, 16, dtype=F64)
        ends = [_run(plan, start, _two_bumps) for plan in (coarse, fine)]
        slope = math.inf
        for k in (4 * n, 8 * n):  # the last only where the slope has not settled
            if abs(slope - order) > 0.1:
                ends.append(_run(solver.plan(_graded(k), VPLinear()), start, _two_bumps))
                slope = math.log2((ends[-3] - ends[-2]).norm() / (ends[-2] - ends[-1]).norm())
        _check_order(case, card, "deterministic", order, slope)
    if card.consistency:  # the law depends on the distilled network
        return
    v = torch.tensor([0.02, 0.1, 0.5], dtype=F64)
    off = _variance(coarse, (v + 1).sqrt(), lambda x, sigma: v / (v + sigma**2) * x) / (v + 0.01) - 1
    worst = float(off.abs().max())
    _require(worst < 0.1, f"{case}: the variance of the samples of Gaussian data is {worst:.0%} off")


def _variance(plan: Plan, std: Tensor, denoiser: Denoiser) -> Tensor:
    """The exact variance of samples where everything is linear: the sum of squares over all normals."""
    count = int((~plan.noise[:, 0].isnan()).sum()) * plan.stage_noise.shape[-1]
    basis = iter(torch.eye(count + 1, dtype=std.dtype)[1:, :, None].expand(-1, -1, len(std)))
    x = torch.zeros(count + 1, len(std), dtype=std.dtype)
    x[0] = std
    return _run(plan, x, denoiser, lambda: next(basis)).square().sum(0)
