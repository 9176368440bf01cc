"""Sources of the unit normals of a plan: a Brownian path, and fresh normals for noise not on the path."""

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._tracing import new_generator
from .brownian import BrownianPath
from .brownian.increment import Increment, Path, check_path
from .brownian.random_normals import key_of, wrapped
from .brownian.time_scale import EDGE
from .errors import InputError
from .executor import Draw, Normals
from .plan import Plan
from .schedule import Schedule

Generators = torch.Generator | list[torch.Generator] | None
# Added to a seed for normals that belong to no path (churn): far from the seeds of other samples.
CHURN_OFFSET = 1 << 40


class PlanIncrements:
    """A path as a plan asks it: over the intervals of its rows, in one pass that continues with each call.

    An earlier interval than the last one starts the pass again.

    Args:
        path: in the clock tau = 1/sigma^2.
        near: take the nearest times that cost few cuts of a `BrownianPath`; its unit normals have the same law.

    Raises:
        InputError: a path that lacks Lévy data, has another shape or device, or does not cover the plan's intervals.
    """

    def __init__(self, plan: Plan, x: Tensor, path: Path, argument: str = "path", near: bool = False) -> None:
        used = plan.noise[plan.on_path]
        ends = (float(used.min()), float(used.max())) if len(used) else (math.inf, -math.inf)
        cure = "Make it in the clock tau = 1/sigma^2 at least from the first to the second of these, with clock='log'."
        same: dict[str, Any] = {"device": x.device, "method": "increment", "argument": argument, "cure": cure}
        check_path(path, plan.name, plan.levy, tuple(x.shape), ends, **same)
        self.path: Path = path
        self.levy: str = path.levy
        self.near: bool = near
        # an interval may begin a rounding before the end of the one before
        ordered = used.flatten().sort().values
        apart = ordered.diff(prepend=ordered.new_tensor([-math.inf])) > 1e-12 * ordered
        self.times: Tensor = ordered[apart]
        place = dict(zip(ordered.tolist(), (apart.cumsum(0) - 1).tolist()))
        self.index: dict[tuple[float, float], int] = {(tau0, tau1): place[tau0] for tau0, tau1 in used.tolist()}
        self.position: int = len(self.times)  # behind all of them: the first call starts
        self.drawn: Iterator[Increment]

    def increment(self, tau0: float, tau1: float) -> Increment:
        """The increment of an interval of the plan."""
        if not hasattr(self.path, "increments"):  # a replay, which has no times between
            return self.path.increment(tau0, tau1)
        index = self.index[tau0, tau1]
        if index < self.position:
            path: Any = self.path
            self.position = 0
            self.drawn = iter((path.nearby if self.near else path.increments)(self.times))
        skipped = index - self.position
        self.position = index + 1
        return next(itertools.islice(self.drawn, skipped, None))

    def increments(self, grid: Tensor) -> Iterator[Increment]:
        """The increments of adjacent intervals of the plan."""
        return itertools.starmap(self.increment, itertools.pairwise(grid.tolist()))


def plan_normals(plan: Plan, x: Tensor, path: PlanIncrements | None, fresh: Callable[[int], Normals]) -> Draw:
    """The source of a plan's unit normals, `(tau0, tau1) -> normals`, one per letter of the plan.

    Args:
        path: None where every interval gets fresh normals.
        fresh: `letters -> unit normals`, for churn, which belongs to no path, and where there is no path.
    """
    letters = plan.stage_noise.shape[-1]

    def draw(tau0: float, tau1: float) -> Normals:
        if path is None or tau0 == tau1:
            return fresh(letters)
        return tuple(z.to(x.dtype) for z in path.increment(tau0, tau1).coordinates()[:letters])

    return draw


def seeded_normals(
    plan: Plan, x: Tensor, seed: int | list[int], path: Path | None = None, *, schedule: Schedule
) -> Draw:
    """The normals of a seed, or of one seed per sample: those of `path`, by default of the seed's own path.

    With a portable path, normals off the path are the same on every device too.
    """
    used = PlanIncrements(plan, x, path) if path is not None else None
    if path is None and plan.on_path.any():
        used = own_path(plan, x, schedule, seed + 1 if isinstance(seed, int) else [s + 1 for s in seed])
    # hashed: torch's CPU generator keeps 32 bits of a seed, and a distant seed may be that of the start
    apart = [key_of(s + CHURN_OFFSET) >> 1 for s in ([seed] if isinstance(seed, int) else seed)]
    at = "cpu" if getattr(path, "portable", False) else x.device
    source = generators(apart[0] if isinstance(seed, int) else apart, at) if plan.levy else None
    return plan_normals(plan, x, used, partial(fresh_normals, x, source))


def fresh_normals(x: Tensor, source: Generators, letters: int) -> Normals:
    """Standard normals like x, one tensor per letter, in float32 at least."""
    drawn = [unit_normals(tuple(x.shape), source, x.dtype, x.device) for _ in range(letters)]
    return tuple(at_least_float32(z) for z in drawn)


def unit_normals(shape: tuple[int, ...], source: Generators, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Standard normals (batch, *event), drawn on the generator's device; entry j from source[j] of a list."""
    if isinstance(source, list):
        if len(source) != shape[0]:
            raise InputError(f"seeds: got {len(source)}, expected one for each of the {shape[0]} samples.")
        return torch.cat([unit_normals((1, *shape[1:]), one, dtype, device) for one in source])
    at = device if source is None else source.device
    return torch.randn(shape, generator=source, dtype=dtype, device=at).to(device)


def at_least_float32(x: Tensor) -> Tensor:
    """x in the precision of a trajectory: half precision does not survive many small steps."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def generators(seed: int | list[int], device: torch.device | str) -> torch.Generator | list[torch.Generator]:
    """One generator, or one per sample."""
    if isinstance(seed, int):
        return new_generator(device).manual_seed(seed)
    return [new_generator(device).manual_seed(s) for s in seed]


def own_path(plan: Plan, x: Tensor, schedule: Schedule, seed: int | list[int]) -> PlanIncrements:
    """The increments of the Brownian path of a seed, or of one seed per sample, in tau = 1/sigma^2.

    The path spans the schedule, and its Lévy data depend on the plan only where they must: all solvers, step counts and
    spacings of a seed share one path.
    """
    first, last, top = float(plan.sigmas[0]), float(plan.noise.nan_to_num(0).max()), schedule.sigma_max
    # paths of other levy are other paths, hence W and H always
    many: dict[str, Any] = {"seeds": [wrapped(s) for s in seed]} if isinstance(seed, list) else {"seed": wrapped(seed)}
    path = BrownianPath(
        tuple(x.shape), t0=(top if first <= top * (1 + EDGE) else first) ** -2, t1=max(last, schedule.sigma_min**-2),
        levy="K" if plan.levy == "K" else "H", dtype=x.dtype, device=x.device, clock="log", **many,
    )  # fmt: skip
    return PlanIncrements(plan, x, path, near=True)
