"""torchsde's Brownian paths as paths of this library, and `sdeint` with torchsde's signature."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..brownian import AreaPath, BrownianPath, Increment
from ..errors import InputError, one_of
from ..problem import SDE
from ..solve import solve
from ..solver import StochasticSolver


class TorchsdePath:
    """A `torchsde.BrownianInterval` behind this library's interface, for W and H of the very same path.

    H = U/h - W/2 where U is torchsde's integral of W - W(t0). Its areas `A` are not offered: in
    torchsde 0.2.6 they have the wrong variance and are not those of the path.

    Args:
        interval: made with `levy_area_approximation="space-time"` for H, or "none" for W alone.
    """

    def __init__(self, interval: Any) -> None:
        approximation = getattr(interval, "levy_area_approximation", None)
        if approximation is None:
            raise InputError(f"interval: got {type(interval).__name__}, wanted a torchsde.BrownianInterval.")
        self.interval = interval
        self.levy = "W" if approximation == "none" else "H"
        self.shape = tuple(interval.shape)
        self.dtype, self.device = interval.dtype, interval.device
        # the object keeps its ends to itself; they are only wanted for a check before work starts
        self.t0, self.t1 = float(interval._start), float(interval._end)

    def increment(self, t0: float, t1: float) -> Increment:
        """The increment of [t0, t1]."""
        if self.levy == "W":
            return Increment(t1 - t0, self.interval(t0, t1))
        W, U = self.interval(t0, t1, return_U=True)
        return Increment(t1 - t0, W, U / (t1 - t0) - W / 2)

    def increments(self, grid: Tensor) -> Iterator[Increment]:
        """The increments between neighbouring times of a grid."""
        times = torch.as_tensor(grid).tolist()
        return map(self.increment, times[:-1], times[1:])


# torchsde's words for methods that have another name here
THEIR_NAMES = {
    "euler": "EulerMaruyama", "milstein": "Milstein", "srk": "SRID2", "euler_heun": "EulerHeun",
    "heun": "Heun", "midpoint": "Midpoint", "reversible_heun": "ReversibleHeun", "log_ode": "LogODE",
}  # fmt: skip


def sdeint(
    sde: Any, y0: Tensor, ts: Any, bm: Any = None, method: str | StochasticSolver | None = None,
    dt: float = 1e-3, adaptive: bool = False, options: Mapping[str, Any] | None = None,
    names: Mapping[str, str] | None = None, seed: int = 0,
) -> Tensor:  # fmt: skip
    """torchsde's `sdeint` with this library's solvers and paths; gradients flow by backpropagation.

    Steps of dt start anew at each of ts, the last before it shortened to meet it.

    Args:
        sde: torchsde's kind of object, with f and g (or as `names` calls them), noise_type and sde_type.
        y0: (batch, d).
        ts: (n,) increasing times.
        bm: a torchsde Brownian motion or a path of ours; without it a `BrownianPath` of `seed`.
        method: a solver, its name (`"shark"`, `"srid2"`), or torchsde's word for it; by default SRID2
            (Itô) or Midpoint (Stratonovich), as torchsde.
        dt: the step. `adaptive` steps are not offered; `options` must be empty.

    Returns:
        (n, batch, d) the states at ts.

    Raises:
        InputError: an unknown method, adaptive steps, and all that `fewstep.solve` refuses.
    """
    if adaptive or options:
        raise InputError(
            f"adaptive, options: got {adaptive!r}, {options!r}; wanted none. Choose a fixed dt, or torchsde."
        )
    if not 0 < dt < math.inf:
        raise InputError(f"dt: got {dt!r}, wanted a positive step.")
    problem = SDE.from_torchsde(_renamed(sde, names or {}))
    solver = _solver(method, problem)
    times = torch.as_tensor(ts).detach().to("cpu", torch.float64)
    grid, wanted = _steps(times, dt)
    if bm is None:
        shape = problem.noise_shape(y0, problem.diffusion(times[0].to(y0), y0))
        levy = {"A": "H", "": "W"}.get(solver.card.levy, solver.card.levy)
        bm = BrownianPath(
            shape, float(times[0]), float(times[-1]), seed, levy, y0.dtype, y0.device, knots=grid
        )
        if solver.card.levy == "A":
            bm = AreaPath(bm, max(64, 2 ** math.ceil(math.log2(2 * len(grid)))))
    elif not hasattr(bm, "increments"):
        bm = TorchsdePath(bm)
    states = solve(problem, solver, y0, grid, path=bm, save="all").ys
    assert states is not None
    return states[wanted]


def _steps(ts: Tensor, dt: float) -> tuple[Tensor, Tensor]:
    """The grid of all steps, and the places of ts in it."""
    grid, wanted = [ts[:1]], [0]
    for a, b in zip(ts[:-1].tolist(), ts[1:].tolist()):
        count = max(1, math.ceil((b - a) / dt - 1e-6))
        inner = a + dt * torch.arange(1, count, dtype=torch.float64)
        grid += [inner, torch.tensor([b], dtype=torch.float64)]
        wanted.append(wanted[-1] + count)
    return torch.cat(grid), torch.tensor(wanted)


def _solver(method: str | StochasticSolver | None, sde: SDE) -> StochasticSolver:
    if isinstance(method, StochasticSolver):
        return method
    import fewstep

    word = method or ("srk" if sde.sde_type == "ito" else "midpoint")
    able = {
        n.lower(): c for n, c in fewstep.solvers().items()
        if issubclass(c, StochasticSolver) and "__init__" not in vars(c)
    }  # fmt: skip
    found = able.get(THEIR_NAMES.get(word, word).replace("_", "").lower())
    if found is None:
        raise one_of("method", word, [*THEIR_NAMES, *able])
    return found()


class _Renamed:
    """An SDE object whose drift and diffusion go by other names."""

    def __init__(self, sde: Any, names: Mapping[str, str]) -> None:
        self.f, self.g = getattr(sde, names.get("drift", "f")), getattr(sde, names.get("diffusion", "g"))
        self.noise_type, self.sde_type = sde.noise_type, sde.sde_type


def _renamed(sde: Any, names: Mapping[str, str]) -> Any:
    return _Renamed(sde, names) if names else sde
