"""torchsde's `sdeint` with this library's solvers, and each library's Brownian paths in the other."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import _validation
from ..adaptive import Adaptive
from ..brownian import AreaPath, BrownianPath, Increment
from ..brownian.area_path import path_for
from ..brownian.increment import check_device_of
from ..brownian.time_scale import EXACT, rounding
from ..catalog import solver_named, solvers, spelling
from ..errors import InputError, one_of, warn
from ..problem import SDE
from ..sde.reversible_heun import ReversibleHeun
from ..solve import solve, warn_of_bias
from ..solver import ReversibleSolver, StochasticSolver
from .torchsde_problem import problem_of


class TorchsdePath:
    """A `torchsde.BrownianInterval` as a path of this library: the W and H of the same Brownian motion.

    H = U/h - W/2 where U is torchsde's integral of W - W(t0). Its areas `A` are not passed on: in torchsde 0.2.6 they
    have the wrong variance and are not those of the path.

    Args:
        interval: made with `levy_area_approximation="space-time"` for H, or "none" for W alone; also a `BrownianTree`,
            or another Brownian motion that is called as torchsde's are.
    """

    def __init__(self, interval: Any) -> None:
        if not hasattr(interval, "levy_area_approximation"):
            raise InputError(f"interval: got {type(interval).__name__}, expected a torchsde.BrownianInterval.")
        self.interval = interval
        self.levy = "W" if interval.levy_area_approximation == "none" else "H"
        self.shape: tuple[int, ...] = tuple(interval.shape)
        self.dtype: torch.dtype = interval.dtype
        self.device: torch.device = interval.device
        # only used by an early check of the times: third-party Brownian motions may not expose their ends
        inner = getattr(interval, "_interval", interval)
        self.t0: float = float(getattr(inner, "_start", -math.inf))
        self.t1: float = float(getattr(inner, "_end", math.inf))

    def increment(self, t0: float, t1: float) -> Increment:
        """The increment over [t0, t1]."""
        t0, t1 = _validation.check_float("t0", t0), _validation.check_float("t1", t1)
        if self.levy == "W":
            return Increment(t1 - t0, self.interval(t0, t1))
        return Increment.from_U(t1 - t0, *self.interval(t0, t1, return_U=True))

    def increments(self, grid: Tensor) -> Iterator[Increment]:
        """The increments over the intervals of a grid (n,)."""
        times = self.snapped(_validation.check_times("grid", grid), rounding(grid)).tolist()
        return map(self.increment, times[:-1], times[1:])

    def snapped(self, times: Tensor, rounding: float) -> Tensor:
        """Clamp times that rounding moved just outside the path."""
        near = times.clamp(self.t0, self.t1)
        return torch.where((times - near).abs() <= rounding * times.abs(), near, times)


class BrownianView:
    """A path of this library as a torchsde Brownian motion: `torchsde.sdeint(..., bm=BrownianView(path))`.

    It returns U = h (W/2 + H) if the path has H, and A if it is an `AreaPath`; torchsde's solvers read which from
    `levy_area_approximation` ("none", "space-time", "foster"). A query costs as much as `BrownianPath.increment`.

    Args:
        path: a `BrownianPath` or an `AreaPath`. torchsde expects the shape (batch, m).

    Raises:
        InputError: a path without random access; in a call, times outside the path, or a U or A that the path lacks.
    """

    def __init__(self, path: BrownianPath | AreaPath) -> None:
        if not all(hasattr(path, name) for name in ("increment", "shape", "dtype", "t0", "t1")):
            raise InputError(
                f"path: got {type(path).__name__}, expected a BrownianPath or an AreaPath, which can be "
                "queried over any interval. Pass a torchsde Brownian motion to torchsde directly."
            )
        import torchsde  # imported here because sdeint does not need it

        torchsde.BaseBrownian.register(BrownianView)
        self.path = path
        self.shape: torch.Size = torch.Size(path.shape)
        self.dtype: torch.dtype = path.dtype
        self.device: torch.device = path.device
        known = "none" if path.levy == "W" else "space-time"
        # torchsde's log_ode requires "foster" or "davie"; the area that it then gets is the path's own
        self.levy_area_approximation = "foster" if getattr(path, "area", False) else known

    def size(self) -> torch.Size:
        """The shape of W."""
        return self.shape

    def __call__(self, ta: Any, tb: Any = None, return_U: bool = False, return_A: bool = False) -> Any:
        """W over [ta, tb] ([t0, ta] without tb), or a tuple of W and the requested U and A."""
        return_U, return_A = (_validation.check_flag(*v) for v in (("return_U", return_U), ("return_A", return_A)))
        if return_U and self.path.levy == "W":
            raise InputError("return_U: got a path with levy='W'. Make the path with levy='H'.")
        if return_A and not getattr(self.path, "area", False):
            raise InputError(
                f"return_A: got a {type(self.path).__name__}, which has no space-space area. Wrap the path: "
                "BrownianView(AreaPath(path, cells=...)), with path levy='H'."
            )
        start, end = map(self._clamped, (self.path.t0, ta) if tb is None else (ta, tb))
        if start == end:
            W = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
            increment = Increment(1.0, W, W, A=W.unsqueeze(-1) * W.unsqueeze(-2))  # zero for any length
        else:
            increment = self.path.increment(start, end)
        found = (increment.W, *([increment.U] if return_U else []), *([increment.A] if return_A else []))
        return found if len(found) > 1 else increment.W

    def _clamped(self, time: float | Tensor) -> float | Tensor:
        """Clamp a time that float32 rounding moved just outside the path; one inside keeps its dtype for the path."""
        t, slack = _validation.check_float("ta, tb", time), 2.0**-20 * (self.path.t1 - self.path.t0)
        near = min(max(t, self.path.t0), self.path.t1)
        return near if t != near and abs(t - near) <= slack else time


MOST = 10**8  # steps: their times are stored

# torchsde's method names that are not names of solvers here
METHODS = {"euler": "euler_maruyama", "srk": "srid2"}

# the calculus of torchsde's methods that have one
CALCULI = {"euler": "ito", "srk": "ito"} | dict.fromkeys(
    ("euler_heun", "heun", "midpoint", "log_ode", "reversible_heun"), "stratonovich"
)

ADJOINT = "adjoint_reversible_heun"


def sdeint(
    sde: Any, y0: Tensor, ts: Any, bm: Any = None, method: str | StochasticSolver | None = None,
    dt: float = 1e-3, adaptive: bool = False, rtol: float = 1e-5, atol: float = 1e-4, dt_min: float = 1e-5,
    options: Mapping[str, Any] | None = None, names: Mapping[str, str] | None = None, logqp: bool = False,
    extra: bool = False, extra_solver_state: Any = None, seed: int | None = None, **unused_kwargs: Any,
) -> Any:  # fmt: skip
    """torchsde's `sdeint` with this library's solvers and paths; gradients flow by backpropagation.

    Steps of dt start at each of ts, and the last one before the next of ts is shortened to end on it; torchsde steps
    past it and interpolates. If gradients are kept, memory grows with the number of steps: see `sdeint_adjoint`.

    Args:
        sde: an object as for torchsde: noise_type, sde_type, and f and g, or f_and_g, or g_prod and f_and_g_prod. A
            solver that needs f and g calls f_and_g once for each.
        y0: (batch, d).
        ts: (n,) increasing times, n >= 2, preferably in float64.
        bm: a torchsde Brownian motion or a path of this library; by default a `BrownianPath` of `seed`.
        method: a solver, its name (`"shark"`, `"srid2"`), or torchsde's name for it; by default, as in torchsde, SRID2
            (Itô; SRA1 for additive, EulerMaruyama for general noise) or Midpoint.
        dt: the step size, with `adaptive` that of the first step.
        adaptive, rtol, atol, dt_min: steps of `fewstep.Adaptive(rtol, atol, min_step=dt_min)`, which hit ts and accept
            any error at dt_min. Otherwise rtol, atol and dt_min are ignored.
        options: None, or {"grad_free": True} with "milstein" for `DerivativeFreeMilstein`.
        names: the sde's own names for "drift", "diffusion", "prior_drift", "drift_and_diffusion", "diffusion_prod" and
            "drift_and_diffusion_prod".
        logqp: return the log-ratio between the sde and one with the drift h too: 1/2 int |g^-1 (f - h)|^2 dt over each
            interval of ts.
        extra: return the solver's own state at the end too: (f, g, z) of `"reversible_heun"`, () of the others.
        extra_solver_state: such a state of an earlier call, to go on from.
        seed: of the path; by default drawn from torch's global generator, which `torch.manual_seed` fixes.
        unused_kwargs: raise a warning, as in torchsde.

    Returns:
        (n, batch, d) the states at ts; with logqp a tuple of them and (n - 1, batch); with extra also a tuple of
        tensors.

    Raises:
        InputError: an unknown method, an unsupported argument, and whatever `fewstep.solve` rejects.
    """
    _warn_of_unused("sdeint", unused_kwargs)
    call = _Call(
        sde,
        y0,
        ts,
        bm,
        method,
        dt,
        options,
        names,
        logqp,
        extra,
        extra_solver_state,
        seed,
        _control(adaptive, dt, rtol, atol, dt_min),
    )
    return call.run(lambda solver: "direct")


def sdeint_adjoint(
    sde: Any, y0: Tensor, ts: Any, bm: Any = None, method: str | StochasticSolver | None = None,
    adjoint_method: str | None = None, dt: float = 1e-3, adaptive: bool = False, adjoint_adaptive: bool = False,
    rtol: float = 1e-5, adjoint_rtol: float = 1e-5, atol: float = 1e-4, adjoint_atol: float = 1e-4,
    dt_min: float = 1e-5, options: Mapping[str, Any] | None = None, adjoint_options: Mapping[str, Any] | None = None,
    adjoint_params: Any = None, names: Mapping[str, str] | None = None, logqp: bool = False, extra: bool = False,
    extra_solver_state: Any = None, seed: int | None = None, **unused_kwargs: Any,
) -> Any:  # fmt: skip
    """torchsde's `sdeint_adjoint`: the numbers of `sdeint`, and gradients in less memory than backpropagation.

    torchsde solves an adjoint SDE, whose gradients have the error of its steps unless the method is reversible Heun.
    These gradients are exact, those of `sdeint` itself, for every method: the steps of `"reversible_heun"` (and of a
    `Reversible` solver) are undone, in memory that does not grow with their number; those of the others are computed
    again from about sqrt(n) kept states (`gradient="checkpoint"` of `fewstep.solve`). Adaptive steps are kept, as by
    `sdeint`.

    Args:
        sde, y0, ts, bm, method: as in `sdeint`, and so all arguments that are not listed here.
        adjoint_method: of torchsde's adjoint SDE, as are the other arguments that begin with adjoint; no such equation
            is solved. The name of the method must be torchsde's or a solver's.
        adjoint_params: tensors that should get gradients; all that f and g depend on get them.
        unused_kwargs: raise a warning, as in torchsde.

    Returns:
        as `sdeint`.

    Raises:
        InputError: as `sdeint`; `"adjoint_reversible_heun"` for a method that cannot be undone.
    """
    _warn_of_unused("sdeint_adjoint", unused_kwargs)
    _validation.check_instance("adjoint_options", adjoint_options, (Mapping, type(None)), "a dict or None")

    def gradient(solver: StochasticSolver) -> str:
        undone = isinstance(solver, ReversibleSolver)
        if adjoint_method == ADJOINT and not undone:
            raise InputError(
                f"adjoint_method: got {ADJOINT!r} for {type(solver).__name__}, expected it with method="
                "'reversible_heun'. Omit it: the gradients of every method are exact."
            )
        return "reversible" if undone else "checkpoint"

    _validation.check_instance("adjoint_method", adjoint_method, (str, type(None)), "a name such as 'midpoint'")
    call = _Call(
        sde,
        y0,
        ts,
        bm,
        method,
        dt,
        options,
        names,
        logqp,
        extra,
        extra_solver_state,
        seed,
        _control(adaptive, dt, rtol, atol, dt_min),
    )
    if adjoint_method is not None and adjoint_method not in (ADJOINT, *METHODS):
        _named(adjoint_method, adjoint_method, "adjoint_method")
    return call.run(gradient)


def _warn_of_unused(name: str, unused: Mapping[str, Any]) -> None:
    if unused:
        warn(f"{name}: unexpected arguments {dict(unused)} are ignored.")


def _control(adaptive: Any, dt: Any, rtol: Any, atol: Any, dt_min: Any) -> Adaptive | None:
    """torchsde's adaptive steps; None for fixed ones."""
    if not _validation.check_flag("adaptive", adaptive):
        return None
    return Adaptive(rtol, atol, first=float(_validation.check_float("dt", dt)), min_step=dt_min, force=True)


class _Call:
    """A checked call of `sdeint`: the problem, the solver, the grid and the path."""

    def __init__(
        self, sde: Any, y0: Any, ts: Any, bm: Any, method: Any, dt: Any, options: Any, names: Any, logqp: Any,
        extra: Any, state: Any, seed: int | None, control: Adaptive | None,
    ) -> None:  # fmt: skip
        for name, value in (("options", options), ("names", names)):
            _validation.check_instance(name, value, (Mapping, type(None)), "a dict or None")
        others = [name for name in options or () if name != "grad_free"]
        if others:
            raise one_of("options", others[0], ["grad_free"])
        # finite: in solve
        _validation.check_state("y0", y0, "a finite floating-point tensor (batch, d)", finite=False)
        if not _validation.check_float("dt", dt) > 0:
            raise InputError(f"dt: got {dt!r}, expected a positive step size.")
        self.logqp, self.extra = (_validation.check_flag(*v) for v in (("logqp", logqp), ("extra", extra)))
        times = _validation.check_times("ts", ts)
        path: Any = None if bm is None else _given_path(bm)
        if path is not None:
            check_device_of("bm", path, y0.device)
        if hasattr(path, "snapped"):
            times = path.snapped(times, rounding(ts))
        self.y0 = torch.cat([y0, torch.zeros_like(y0[..., :1])], -1) if self.logqp else y0
        self.problem: SDE = problem_of(sde, names or {}, bm, self.logqp)
        self.solver = _solver(method, self.problem, bool(options and options.get("grad_free")))
        self._check_calculus(method, control)
        self.carry = _carry(self.solver, state)
        self.control: Adaptive | None = control
        alone = (times, list(range(len(times))))
        grid, self.indices = _steps(times, float(dt), rounding(ts)) if control is None else alone
        self.path = _own_path(self.problem, self.solver, self.y0, grid, seed) if path is None else path
        # solve gives drift and diffusion the times of a list in y0's dtype
        self.grid: Any = grid if _validation.times_dtype(ts) == torch.float64 else grid.tolist()

    def _check_calculus(self, method: Any, control: Adaptive | None) -> None:
        """Raise an error for the name of a method of the other calculus."""
        calculus = self.problem.sde_type
        if not isinstance(method, str) or CALCULI.get(method, calculus) == calculus:
            return
        if control is not None:
            warn_of_bias(self.problem, self.solver)  # it would hold for the calculus of the method too
        raise InputError(
            f"method: got {method!r} for a {calculus!r} SDE, expected one of this calculus, as in torchsde. A solver "
            "as an object, such as fewstep.Heun(), solves additive noise in either."
        )

    def run(self, gradient: Callable[[StochasticSolver], str]) -> Any:
        """What `sdeint` returns."""
        options: dict[str, Any] = {"path": self.path, "save": self.indices, "carry": self.carry}
        how = gradient(self.solver) if self.control is None else "direct"
        sol = solve(self.problem, self.solver, self.y0, self.grid, gradient=how, steps=self.control, **options)
        assert sol.ys is not None
        out: list[Any] = [sol.ys[..., :-1], sol.ys[..., -1].diff(dim=0)] if self.logqp else [sol.ys]
        if self.extra:
            out.append(_extra(self.solver, sol.carry))
        return tuple(out) if len(out) > 1 else out[0]


def _carry(solver: StochasticSolver, state: Any) -> Any:
    """The carry of a solver from torchsde's extra state, (f, g, z) of reversible Heun."""
    count = len(state) if isinstance(state, (tuple, list)) else None
    if state is None or (count == 0 and not isinstance(solver, ReversibleSolver)):
        return None
    expected = 3 if isinstance(solver, ReversibleHeun) else 1 if isinstance(solver, ReversibleSolver) else 0
    if count != expected or not all(torch.is_tensor(x) for x in state):
        raise InputError(
            f"extra_solver_state: got {_validation.describe(state)}, expected a tuple of {expected} tensors for "
            f"{type(solver).__name__}, as extra=True returns it."
        )
    return (state[2], *state[:2]) if expected == 3 else tuple(state)


def _extra(solver: StochasticSolver, carry: Any) -> tuple[Tensor, ...]:
    """torchsde's extra state of a solver's carry."""
    if isinstance(solver, ReversibleHeun):
        return (*carry[1:], carry[0])
    return tuple(carry) if isinstance(solver, ReversibleSolver) else ()


def _steps(ts: Tensor, dt: float, rounding: float) -> tuple[Tensor, list[int]]:
    """The grid of all steps, and the indices of ts in it."""
    grid, indices = [ts[:1]], [0]
    size = float(ts.abs().max())
    if dt < 2 * EXACT * size or float(ts[-1] - ts[0]) / dt > MOST:
        raise InputError(
            f"dt: got {dt!r} for ts from {float(ts[0])!r} to {float(ts[-1])!r}, expected at most {MOST} steps and a dt "
            "above the resolution of float64 there. Use a larger dt, or shift the origin of time."
        )
    slack = min(max(1e-6, rounding * size / dt), 0.01)  # no step as short as the rounding of ts
    for a, b in zip(ts[:-1].tolist(), ts[1:].tolist()):
        count = max(1, math.ceil((b - a) / dt - slack))
        inner = a + dt * torch.arange(1, count, dtype=torch.float64)
        grid += [inner, torch.tensor([b], dtype=torch.float64)]
        indices.append(indices[-1] + count)
    return torch.cat(grid), indices


def _own_path(problem: SDE, solver: StochasticSolver, y0: Tensor, grid: Tensor, seed: int | None) -> Any:
    seed = int(torch.randint(2**31 - 1, ())) if seed is None else seed
    shape = problem.noise_shape(y0, problem.diffusion(grid[0].to(y0), y0))
    cells, ends = max(64, 2 ** math.ceil(math.log2(2 * len(grid)))), (float(grid[0]), float(grid[-1]))
    options = {"seed": seed, "dtype": y0.dtype, "device": y0.device, "knots": grid}
    return path_for([solver.card.levy], shape, ends, cells, **options)


def _given_path(bm: Any) -> Any:
    if hasattr(bm, "increments"):
        return bm
    if not hasattr(bm, "levy_area_approximation"):
        raise InputError(f"bm: got {_validation.describe(bm)}, expected a torchsde.BrownianInterval or a BrownianPath.")
    return bm.path if isinstance(bm, BrownianView) else TorchsdePath(bm)


def _solver(method: Any, sde: SDE, grad_free: bool) -> StochasticSolver:
    """The solver for a name, torchsde's or ours; some of torchsde's mean another scheme per noise type."""
    if isinstance(method, StochasticSolver):
        return method
    expected = "a name such as 'srk' or a solver such as Milstein()"
    _validation.check_instance("method", method, (str, type(None)), expected)
    few = sde.noise_type in ("diagonal", "additive", "scalar")
    name = method or ("midpoint" if sde.sde_type == "stratonovich" else "srk" if few else "euler")
    ours = METHODS.get(name, name)
    if name == "srk" and sde.noise_type == "additive":
        ours = "sra1"
    elif name == "milstein" and grad_free:
        ours = "derivative_free_milstein"
    elif name == "log_ode" and few:
        ours = "midpoint"  # the log-ODE step without brackets
    return _named(name, ours)


def _named(name: str, ours: str, argument: str = "method") -> StochasticSolver:
    """The solver of our name, for a user's name."""
    with contextlib.suppress(InputError):
        solver = solver_named(ours)
        if isinstance(solver, StochasticSolver):
            return solver
    able = [spelling(n) for n, s in solvers().items() if isinstance(s, StochasticSolver)]
    raise one_of(argument, name, [*METHODS, *able])
