"""torchsde's `sdeint` with this library's solvers, and each library's Brownian paths in the other."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import _validation
from ..brownian import AreaPath, BrownianPath, Increment
from ..brownian.area_path import path_for
from ..brownian.increment import check_device_of
from ..brownian.time_scale import EXACT, rounding
from ..catalog import solver_named, solvers, spelling
from ..errors import InputError, one_of, warn
from ..problem import SDE
from ..solve import solve
from ..solver import StochasticSolver


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

# torchsde's keys of `names`, and the methods that they rename
THEIR_METHODS = {
    "drift": "f", "diffusion": "g", "prior_drift": "h", "diffusion_prod": "g_prod",
    "drift_and_diffusion": "f_and_g", "drift_and_diffusion_prod": "f_and_g_prod",
}  # fmt: skip

# arguments of torchsde that only have their defaults here
CURES = {
    "adaptive": "Choose a fixed dt.",
    "options": "The only option is milstein's grad_free.",
    "logqp": "Add the log-ratio to the state, as docs/torchsde.md shows.",
    "extra": "A solve cannot be resumed: integrate to the last time in one call.",
    "extra_solver_state": "A solve starts from y0 alone.",
}


def sdeint(
    sde: Any, y0: Tensor, ts: Any, bm: Any = None, method: str | StochasticSolver | None = None,
    dt: float = 1e-3, adaptive: bool = False, rtol: float = 1e-5, atol: float = 1e-4, dt_min: float = 1e-5,
    options: Mapping[str, Any] | None = None, names: Mapping[str, str] | None = None, logqp: bool = False,
    extra: bool = False, extra_solver_state: Any = None, seed: int | None = None, **unused_kwargs: Any,
) -> Tensor:  # fmt: skip
    """torchsde's `sdeint` with this library's solvers and paths; gradients flow by backpropagation.

    Steps of dt start at each of ts, and the last one before the next of ts is shortened to end on it; torchsde steps
    past it and interpolates. If gradients are kept, memory grows with the number of steps.

    Args:
        sde: an object as for torchsde: noise_type, sde_type, and f and g, or f_and_g, or g_prod and f_and_g_prod. A
            solver that needs f and g calls f_and_g once for each.
        y0: (batch, d).
        ts: (n,) increasing times, n >= 2, preferably in float64.
        bm: a torchsde Brownian motion or a path of this library; by default a `BrownianPath` of `seed`.
        method: a solver, its name (`"shark"`, `"srid2"`), or torchsde's name for it; by default, as in torchsde, SRID2
            (Itô; SRA1 for additive, EulerMaruyama for general noise) or Midpoint.
        dt: the step size. rtol, atol and dt_min belong to adaptive steps and are ignored.
        options: None, or {"grad_free": True} with "milstein" for `DerivativeFreeMilstein`.
        names: the sde's own names for "drift", "diffusion", "drift_and_diffusion", "diffusion_prod" and
            "drift_and_diffusion_prod".
        adaptive, logqp, extra, extra_solver_state: not supported.
        seed: of the path; by default drawn from torch's global generator, which `torch.manual_seed` fixes.
        unused_kwargs: raise a warning, as in torchsde.

    Returns:
        (n, batch, d) the states at ts.

    Raises:
        InputError: an unknown method, an unsupported argument, and whatever `fewstep.solve` rejects.
    """
    if unused_kwargs:
        warn(f"sdeint: unexpected arguments {unused_kwargs} are ignored.")
    for name, value in (("options", options), ("names", names)):
        _validation.check_instance(name, value, (Mapping, type(None)), "a dict or None")
    others = tuple(name for name in options or () if name != "grad_free")
    unsupported = (adaptive, others, logqp, extra, extra_solver_state)
    for (name, cure), value in zip(CURES.items(), unsupported, strict=True):
        if torch.is_tensor(value) or value:
            raise InputError(
                f"{name}: got {_validation.describe(value)}, expected torchsde's default, the only one that fewstep's "
                f"sdeint supports. {cure} Or call torchsde.sdeint with bm=BrownianView(path), which has the same noise."
            )
    _validation.check_state("y0", y0, "a finite floating-point tensor (batch, d)", finite=False)  # finite: in solve
    if not _validation.check_float("dt", dt) > 0:
        raise InputError(f"dt: got {dt!r}, expected a positive step size.")
    times = _validation.check_times("ts", ts)
    path: Any = None if bm is None else _given_path(bm)
    if path is not None:
        check_device_of("bm", path, y0.device)
    if hasattr(path, "snapped"):
        times = path.snapped(times, rounding(ts))
    problem = _problem(sde, names or {}, bm)
    solver = _solver(method, problem, bool(options and options.get("grad_free")))
    grid, indices = _steps(times, float(dt), rounding(ts))
    path = _own_path(problem, solver, y0, grid, seed) if path is None else path
    # solve gives drift and diffusion the times of a list in y0's dtype
    given = grid if _validation.times_dtype(ts) == torch.float64 else grid.tolist()
    states = solve(problem, solver, y0, given, path=path, save=indices).ys
    assert states is not None
    return states


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
    with contextlib.suppress(InputError):
        solver = solver_named(ours)
        if isinstance(solver, StochasticSolver):
            return solver
    able = [spelling(n) for n, s in solvers().items() if isinstance(s, StochasticSolver)]
    raise one_of("method", name, [*METHODS, *able])


def _problem(sde: Any, names: Mapping[str, str], bm: Any) -> SDE:
    """A torchsde object as an SDE, with f and g from whichever of torchsde's methods it has."""
    for key, name in names.items():
        if key not in THEIR_METHODS:
            raise one_of("names", key, THEIR_METHODS)
        if not hasattr(sde, name):
            raise InputError(f"names: got {key!r}: {name!r}, expected a method that {type(sde).__name__} has.")
    f, g, _, prod, both, all_prod = (getattr(sde, names.get(key, own), None) for key, own in THEIR_METHODS.items())
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
    return SDE(*found.values())


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
