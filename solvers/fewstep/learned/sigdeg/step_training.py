"""Sig-DEG for SDEs: a `SigStep` fitted to a teacher's finer steps from the states of fine paths.

Two stages. Descent on the mean square of single steps' errors makes features of the state, the network's
body. The head is linear in its weights, and so least squares over many fresh steps finish it. What is left
of c_1's error is what the features cannot say, in one dimension some 1e-4 of c_1; descent alone leaves up to
a tenth.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import _validation
from ..._serialization import make_folder
from ...brownian import FreshIncrements, Increment
from ...brownian.random_normals import key_of, node_seed
from ...errors import InputError
from ...problem import SDE
from ...sde.srid2 import SRID2
from ...solve import solve
from ...solver import StochasticSolver
from ..training import Minibatch, Report, Stopwatch, digest, fit, held_out, seeded
from ..trajectories import substeps_of
from .networks import Coefficients, spread
from .student import TERMS, SigStep, integrals

SIZES = tuple(4.0**-k for k in range(5))  # of the steps that descent sees, in coarse steps
SOLVED = tuple(4.0**-k for k in range(7))  # and least squares
ROUNDS, ROWS = 32, 512  # of least squares: batches of each size, and states in each
LOCAL = 8  # teacher's steps in each step
FRESH = 1 << 33  # nodes of the seed that descent has not drawn from


def distill_sde(
    sde: SDE, *, steps: int, y0: Tensor, t0: float, t1: float, teacher_steps: int | None = None,
    teacher: StochasticSolver | None = None, network: nn.Module | None = None, trajectories: int = 4096,
    folder: str | Path | None = None, seed: int, progress: bool, iterations: int | None = None,
    batch: int = 512, rate: float = 3e-3, average: float, patience: int, every: int,
) -> tuple[SigStep, Report]:  # fmt: skip
    """See `distill_sigdeg`, which has the other defaults."""
    _check(sde, y0, t0, t1, teacher)
    teacher_steps = 16 * steps if teacher_steps is None else teacher_steps
    substeps = substeps_of(steps, teacher_steps)
    make_folder(folder)
    watch, generator = Stopwatch(), torch.Generator().manual_seed(seed)
    start = y0.reshape(-1, y0.shape[-1])
    start = start[torch.randint(len(start), (trajectories,), generator=generator)]
    fine = teacher or SRID2()
    paths = _paths(sde, fine, start, torch.linspace(t0, t1, steps + 1, dtype=torch.float64), substeps, seed)
    student = SigStep(_network(paths, seed) if network is None else network)
    watch.lap("teacher")
    kept, rest = held_out(trajectories)
    held = paths.pick(rest)
    before = held.rmse(sde, student)
    units = y0.new_tensor([spread(x) for x in paths.states.unbind(-1)])
    task = _Local(sde, student, fine, paths.pick(kept), (t1 - t0) / steps, units)
    losses, looks = fit(
        student.network.train(), task.loss, len(kept), seed=seed, progress=progress,
        look=lambda: held.rmse(sde, student), batch=batch, rate=rate, average=average, patience=patience,
        iterations=(1500 if network else 300) if iterations is None else iterations, every=every,
        checkpoint=Path(folder) / "step.training" if folder else None,
        words={"steps": steps, "teacher": type(fine).__name__, "data": paths.digest()},
    )  # fmt: skip
    student.network.eval().requires_grad_(False)  # to train on, ask for gradients again
    watch.lap("training")
    if isinstance(student.network, Coefficients):
        _solve_head(task, student.network, seed)
        watch.lap("least squares")
    spent, after = teacher_steps * fine.card.evaluations, held.rmse(sde, student)
    return student, Report(spent, trajectories, before, after, losses, watch.seconds, looks)


def _check(sde: SDE, y0: Any, t0: Any, t1: Any, teacher: Any) -> None:
    if sde.noise_type != "diagonal" or sde.sde_type != "ito":
        raise InputError(
            f"problem: got {sde.noise_type!r} {sde.sde_type!r}, expected 'diagonal' 'ito' noise: the learned "
            "step holds the iterated integrals of one channel a component."
        )
    _validation.check_state("y0", y0, "a finite floating-point tensor (*batch, d)")
    if not y0.numel():
        raise InputError(f"y0: got {_validation.describe(y0)}, expected at least one state.")
    if not _validation.check_float("t0", t0) < _validation.check_float("t1", t1):
        raise InputError(f"t0, t1: got {t0!r} and {t1!r}, expected t0 < t1.")
    _validation.check_instance(
        "teacher", teacher, (StochasticSolver, type(None)), "an SDE solver such as fs.SRID2()"
    )


@dataclass(frozen=True)
class _Paths:
    """Fine paths. times: (n + 1,); states: (n + 1, paths, d); increments: coarse, fields (paths, d)."""

    times: Tensor
    states: Tensor
    increments: list[Increment]

    @property
    def every(self) -> int:
        """Fine steps in a coarse one."""
        return (len(self.times) - 1) // len(self.increments)

    def pick(self, index: Tensor) -> _Paths:
        fields = [Increment(i.h, i.W[index], i.H if i.H is None else i.H[index]) for i in self.increments]
        return _Paths(self.times, self.states[:, index], fields)

    def digest(self) -> str:
        """A name for these numbers."""
        return digest({"times": self.times, "ends": self.states[-1, :64]})

    def rmse(self, sde: SDE, solver: StochasticSolver) -> float:
        """Distance of a solver's final states along the same noise."""
        ts = self.times[:: self.every].to(self.states).unbind()
        y, carry = self.states[0], solver.init(sde, ts[0], self.states[0])
        with torch.no_grad():
            for k, increment in enumerate(self.increments):
                y, carry, _ = solver.step(sde, ts[k], ts[k + 1], y, increment, carry)
        return float((y - self.states[-1]).square().mean().sqrt())


@dataclass(frozen=True)
class _Step:
    """A step of many states y to the teacher's, (n, d), on one increment; unit: of what may be missing."""

    t0: Tensor
    t1: Tensor
    y: Tensor
    increment: Increment
    target: Tensor
    unit: Tensor


@dataclass(frozen=True)
class _Local:
    """Single steps from the states of the paths at all times, against the teacher's finer ones.

    The residual of a step of length h is taken in units of h^(3/2), the size of what the five terms cannot
    hold at most, and of the state's spread: as in weighted least squares, short steps then settle c_1, where
    long ones would bend it by O(h). To the unit is added what rounding leaves of a difference of states.
    """

    sde: SDE
    student: SigStep
    teacher: StochasticSolver
    paths: _Paths
    coarse: float
    units: Tensor

    def step(self, place: int, index: Tensor, size: float, seed: int) -> _Step:
        """One of so many coarse steps from the fine time of that place, on fresh noise."""
        times, y, h = self.paths.times, self.paths.states[place, index], size * self.coarse
        t = min(float(times[place]), float(times[-1]) - h)  # the equation may end with the paths
        source = _Keeping(FreshIncrements(tuple(y.shape), "H", seed, dtype=y.dtype), LOCAL)
        fine = torch.linspace(t, t + h, LOCAL + 1, dtype=torch.float64)
        with torch.no_grad():
            target = solve(self.sde, self.teacher, y, fine, path=source).y
        unit = h**1.5 * self.units + 4 * torch.finfo(y.dtype).eps * y.abs()
        t0, t1 = fine[[0, -1]].to(y).unbind()
        return _Step(t0, t1, y, source.coarse[0], target, unit)

    def residual(self, step: _Step) -> Tensor:
        """(n, d) what is missing to the teacher's step, in units."""
        new, _ = self.student.step(self.sde, step.t0, step.t1, step.y, step.increment, None)
        return (step.target - new) / step.unit

    def loss(self, batch: Minibatch) -> Tensor:
        place = int(torch.randint(len(self.paths.times), (1,), generator=batch.generator))
        seed = int(torch.randint(1 << 62, (1,), generator=batch.generator))
        steps = [self.step(place, batch.index, size, seed + k) for k, size in enumerate(SIZES)]
        return torch.stack([self.residual(s).square().mean() for s in steps]).mean()


def _network(paths: _Paths, seed: int) -> nn.Module:
    """The default, in units of the paths'."""

    def build() -> nn.Module:
        network = Coefficients(paths.states.shape[-1], TERMS, scaled=True).to(paths.states)
        network.rescale(paths.times, paths.states)
        return network

    return seeded(seed, build)


@torch.no_grad()
def _solve_head(task: _Local, network: Coefficients, seed: int) -> None:
    """Add to the head what least squares over fresh steps of every size find missing.

    For each component the normal equations of its (width + 1) TERMS weights, in float64, over
    ROUNDS * len(SOLVED) batches that are spread evenly over the paths' times. A function of (weights, seed).
    """
    d, places = len(network.scale) - 1, len(task.paths.times)
    A: list[Any] = [0.0] * d
    b: list[Any] = [0.0] * d
    for k in range(ROUNDS * len(SOLVED)):
        generator = torch.Generator().manual_seed(node_seed(key_of(seed), FRESH + k))
        u = (k // len(SOLVED) + float(torch.rand(1, generator=generator))) / ROUNDS
        index = torch.randint(task.paths.states.shape[1], (ROWS,), generator=generator)
        fresh = int(torch.randint(1 << 62, (1,), generator=generator))
        step = task.step(min(int(u * places), places - 1), index, SOLVED[k % len(SOLVED)], fresh)
        phi = nn.functional.pad(network.features(step.t0, step.y), (0, 1), value=1.0).double()
        terms = (integrals(step.increment) * (network.scale[:-1] / step.unit)[..., None]).double()
        missing = task.residual(step).double()
        for i in range(d):
            X = (terms[:, i, :, None] * phi[:, None, :]).flatten(1)
            A[i], b[i] = A[i] + X.mT @ X, b[i] + X.mT @ missing[:, i]
    # weights grow to ridge^(-1/2) where features are nearly dependent, and their rounding with them
    ridge = torch.finfo(network.head.weight.dtype).eps ** 0.75
    for i in range(d):
        size = A[i].diagonal().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
        scaled = A[i] / size / size[:, None] + ridge * torch.eye(len(size), dtype=torch.float64)
        more = (torch.linalg.solve(scaled, b[i] / size) / size).unflatten(0, (TERMS, -1))
        network.head.weight[i * TERMS : (i + 1) * TERMS] += more[:, :-1].to(network.head.weight)
        network.head.bias[i * TERMS : (i + 1) * TERMS] += more[:, -1].to(network.head.bias)


def _paths(
    sde: SDE, teacher: StochasticSolver, start: Tensor, times: Tensor, substeps: int, seed: int
) -> _Paths:
    """The teacher on a grid substeps times finer, with exact fine (W, H) joined to the coarse steps."""
    u = torch.arange(substeps, dtype=torch.float64) / substeps
    fine = torch.lerp(times[:-1, None], times[1:, None], u).flatten()
    fine = torch.cat([fine, times[-1:]])
    source = FreshIncrements(tuple(start.shape), levy="H", seed=seed, dtype=start.dtype)
    kept = _Keeping(source, substeps)
    with torch.no_grad():
        ys = solve(sde, teacher, start, fine, path=kept, save="all").ys
    assert ys is not None
    return _Paths(fine, ys, kept.coarse)


class _Keeping:
    """A source of increments that keeps their joins over blocks of the grid."""

    def __init__(self, source: FreshIncrements, substeps: int) -> None:
        self.source, self.substeps, self.levy = source, substeps, source.levy
        self.coarse: list[Increment] = []

    def increments(self, grid: Tensor | Sequence[float]) -> Iterator[Increment]:
        self.coarse.clear()
        for k, increment in enumerate(self.source.increments(grid)):
            if k % self.substeps:
                self.coarse.append(self.coarse.pop().join(increment))
            else:
                self.coarse.append(increment)
            yield increment
