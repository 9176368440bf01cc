"""Deterministic solvers with noise between their steps: ancestral steps, and restarts at a higher level."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .. import _validation
from ..errors import InputError
from ..grid import check_sigmas
from ..plan import Plan
from ..plan_builder import NO_PATH, STEEP, joined
from ..schedule import Schedule
from ..solver import Card, DiffusionSolver
from .dpm import DPMSolverPP
from .edm import EDMHeun
from .ipndm import IPNDM

MIDPOINT = DPMSolverPP(2, multistep=False)
HEUN = EDMHeun()


class _WithNoise(DiffusionSolver):
    """What both share: the deterministic solver of the steps."""

    def __init__(self, solver: DiffusionSolver) -> None:
        _validation.check_instance("solver", solver, DiffusionSolver, "a diffusion solver such as EDMHeun()")
        if solver.card.levy:
            raise InputError(f"solver: got {solver!r}, which draws noise itself; expected a deterministic solver.")
        self.solver = solver


class Ancestral(_WithNoise):
    r"""Deterministic steps to below each level, and noise back up to it.

    .. math:: x_t = \Psi(x_s;\, s \to d) + v\,z, \qquad v = \eta\,\frac ts\sqrt{s^2-t^2},\ d = \sqrt{t^2-v^2}

    with $\Psi$ one step of the solver and z the normal of the path in 1/sigma^2. `Ancestral(DDIM(), eta)` is
    `DDIM(eta)`; k-diffusion's `dpm_2_ancestral` is `Ancestral(DPMSolver(2))` and its `dpmpp_2s_ancestral` the default.

    Order 1 of the drift: the step sees the levels from s to d, not to t. As many evaluations as the solver has.
    `DPMSolverSDE(2, multistep=False)` has order 2 at the same cost.

    Args:
        solver: a deterministic solver of one-step form; multistep solvers lose their history at each level.
        eta: the share of the ancestral noise, in [0, 1]; 0 is the solver itself.
    """

    def __init__(self, solver: DiffusionSolver = MIDPOINT, eta: float = 1.0) -> None:
        super().__init__(solver)
        self.eta: float = _validation.check_float("eta", eta, 0, 1, "a number in [0, 1]")
        self.card: Card = Card(
            summary="steps of a deterministic solver to below each level, and noise back up to it",
            reference="k-diffusion's ancestral samplers, after Song, Meng & Ermon 2021 (arXiv 2010.02502), Eq. (16)",
            levy="W" if self.eta else "",
            deterministic_order=1 if self.eta else solver.card.deterministic_order,
            evaluations=solver.card.evaluations,
        )

    def plan(self, sigmas: Tensor, schedule: Schedule | None = None) -> Plan:
        grid, parts = check_sigmas(sigmas, rising=self.eta == 0), []
        if not self.eta:
            return self.solver.plan(grid, schedule)
        for s, t in pairwise(grid.tolist()):
            v = self.eta * t / s * math.sqrt(max(s * s - t * t, 0.0))
            down = math.sqrt(max(t * t - v * v, 0.0))
            levels = grid.new_tensor([s, down])
            step = self.solver.plan(levels, schedule)
            if step.prediction == "noise" and s > STEEP * t > 0:  # the first step of a flow
                step = IPNDM(1).plan(levels)
            parts.append((step, (s**-2, t**-2) if v else None, v))
        return joined(f"Ancestral({type(self.solver).__name__}, eta={self.eta:g})", grid, parts)


class Restart(_WithNoise):
    r"""A deterministic solver that goes back up by fresh noise and repeats a part of the way.

    .. math:: x_{\text{high}} = x_{\text{low}} + \sqrt{\text{high}^2 - \text{low}^2}\;z

    at the grid's level next to `low`, then `steps` steps on a Karras grid from `high` down to it, `times` times. The
    noise contracts errors that the deterministic steps have made. It belongs to no path.

    The cost is that of the grid plus, for each interval, that of times x steps more steps. Best where the network's
    own error dominates, at 30 evaluations and more; the law is that of the data at any number of restarts.

    Args:
        solver: a deterministic solver.
        intervals: (low, high, steps, times) for each interval; those outside of a grid are left out.
        rho: of the Karras grid.
    """

    def __init__(
        self, solver: DiffusionSolver = HEUN,
        intervals: Sequence[tuple[float, float, int, int]] = ((0.1, 2.0, 8, 1),), rho: float = 7.0,
    ) -> None:  # fmt: skip
        super().__init__(solver)
        found = []
        _validation.check_instance("intervals", intervals, (tuple, list), "a tuple of (low, high, steps, times)")
        for one in intervals:
            if not isinstance(one, (tuple, list)) or len(one) != 4:
                raise InputError(f"intervals: got {one!r}, expected (low, high, steps, times), as (0.1, 2.0, 8, 1).")
            low, high = (_validation.check_float("intervals", v) for v in one[:2])
            if not 0 < low < high:
                raise InputError(f"intervals: got {one!r}, expected levels 0 < low < high.")
            found.append((low, high, *(_validation.check_int("intervals", v) for v in one[2:])))
        self.intervals: tuple[tuple[float, float, int, int], ...] = tuple(found)  # type: ignore[arg-type]
        self.rho: float = _validation.check_float("rho", rho)
        if not self.rho > 0:
            raise InputError(f"rho: got {rho!r}, expected a number above 0.")
        self.card: Card = Card(
            summary="a deterministic solver that goes back up by fresh noise and repeats a part of the way",
            reference="Xu et al. 2023 (arXiv 2306.14878), Algorithm 2",
            levy="W",
            evaluations=solver.card.evaluations,
        )

    def plan(self, sigmas: Tensor, schedule: Schedule | None = None) -> Plan:
        grid = check_sigmas(sigmas)
        parts: list[tuple[Plan, tuple[float, float] | None, float]] = []
        begin, place = 0, self._places(grid)
        for at in sorted(place):
            parts.append((self.solver.plan(grid[begin : at + 1], schedule), None, 0.0))
            low = float(grid[at])
            for high, steps, times in place[at]:
                u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
                again = (high ** (1 / self.rho) * (1 - u) + low ** (1 / self.rho) * u).pow(self.rho)
                again[0], again[-1] = high, low
                repeated = self.solver.plan(again, schedule)
                for _ in range(times):
                    parts[-1] = (parts[-1][0], NO_PATH, math.sqrt(high**2 - low**2))
                    parts.append((repeated, None, 0.0))
            begin = at
        if begin < len(grid) - 1:
            parts.append((self.solver.plan(grid[begin:], schedule), None, 0.0))
        return joined(f"Restart({type(self.solver).__name__})", grid, parts)

    def _places(self, grid: Tensor) -> dict[int, list[tuple[float, int, int]]]:
        """The entry of the grid next to the low end of each interval that the grid contains."""
        inner = grid[1:][grid[1:] > 0]
        place: dict[int, list[tuple[float, int, int]]] = {}
        for low, high, *counts in self.intervals:
            if len(inner) and inner[-1] <= low and high <= grid[0]:
                at = 1 + int((inner.log() - math.log(low)).abs().argmin())
                if grid[at] < high:
                    place.setdefault(at, []).append((high, *counts))  # type: ignore[arg-type]
        return place
