"""Sig-DEG for SDEs: a `SigStep` fitted to fine steps of every size from the states of fine paths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..brownian import FreshIncrements, Increment
from ..classical.derivative_free_milstein import DerivativeFreeMilstein
from ..errors import InputError
from ..problem import SDE
from ..solve import solve
from ..solver import StochasticSolver
from .networks import Coefficients
from .sig_step import TERMS, SigStep
from .training import HELD_OUT, Minibatch, Report, Stopwatch, fit, seeded
from .trajectories import substeps_of

SIZES = (1.0, 0.25, 1 / 16, 1 / 64, 1 / 256)  # of the steps it is trained on, in coarse steps
LOCAL = 8  # teacher's steps in each of them


def distill_sde(
    sde: SDE, *, steps: int, y0: Tensor, t0: float = 0.0, t1: float = 1.0, teacher_steps: int | None = None,
    teacher: StochasticSolver | None = None, network: nn.Module | None = None, trajectories: int = 4096,
    folder: str | Path | None = None, seed: int = 0, progress: bool = False, **training: Any,
) -> tuple[SigStep, Report]:  # fmt: skip
    """See `distill_sigdeg`."""
    if sde.noise_type != "diagonal" or sde.sde_type != "ito":
        raise InputError(
            f"problem: got {sde.noise_type!r} {sde.sde_type!r}, wanted 'diagonal' 'ito' noise: the learned "
            "step holds the iterated integrals of one channel a component."
        )
    teacher_steps = 16 * steps if teacher_steps is None else teacher_steps
    substeps = substeps_of(steps, teacher_steps)
    student = SigStep(network or seeded(seed, lambda: Coefficients(y0.shape[-1], TERMS)).to(y0))
    watch, generator = Stopwatch(), torch.Generator().manual_seed(seed)
    start = y0.reshape(-1, y0.shape[-1])
    start = start[torch.randint(len(start), (trajectories,), generator=generator)]
    times = torch.linspace(t0, t1, steps + 1, dtype=torch.float64)
    fine = teacher or DerivativeFreeMilstein()
    paths = _paths(sde, fine, start, times, substeps, seed)
    watch.lap("teacher")
    every = torch.arange(trajectories)
    kept, held = every[every % HELD_OUT > 0], paths.pick(every[::HELD_OUT])
    before = held.rmse(sde, student)
    task = _Local(sde, student, fine, paths.pick(kept), (t1 - t0) / steps)
    options: dict[str, Any] = {"iterations": 1500, "batch": 512, "rate": 3e-3} | training
    losses, looks = fit(
        student.network.train(), task.loss, len(kept), seed=seed, progress=progress,
        look=lambda: held.rmse(sde, student), checkpoint=folder and Path(folder) / "step.training", **options,
    )  # fmt: skip
    student.network.eval().requires_grad_(False)  # to train on, ask for gradients again
    watch.lap("training")
    after = held.rmse(sde, student)
    return student, Report(teacher_steps, trajectories, before, after, losses, watch.seconds, looks)


@dataclass(frozen=True)
class _Paths:
    """Fine paths at the coarse times. knots: (steps + 1, n, d); increments: coarse, fields (n, d)."""

    times: Tensor
    knots: Tensor
    increments: list[Increment]

    def pick(self, index: Tensor) -> _Paths:
        fields = [Increment(i.h, i.W[index], i.H if i.H is None else i.H[index]) for i in self.increments]
        return _Paths(self.times, self.knots[:, index], fields)

    def rmse(self, sde: SDE, solver: StochasticSolver) -> float:
        """Distance of a solver's final states along the same noise."""
        ts = self.times.to(self.knots).unbind()
        y, carry = self.knots[0], solver.init(sde, ts[0], self.knots[0])
        with torch.no_grad():
            for k, increment in enumerate(self.increments):
                y, carry = solver.step(sde, ts[k], ts[k + 1], y, increment, carry)
        return float((y - self.knots[-1]).square().mean().sqrt())


@dataclass(frozen=True)
class _Local:
    """Single steps from the states of the paths, against the teacher's finer ones on the same noise.

    The residual of a step of length h is taken in units of h^(3/2), the size of what the five terms cannot
    hold: as in weighted least squares, short steps then settle c_1, where long ones would bend it by O(h).
    """

    sde: SDE
    student: SigStep
    teacher: StochasticSolver
    paths: _Paths
    coarse: float

    def loss(self, batch: Minibatch) -> Tensor:
        knots, times = self.paths.knots, self.paths.times
        k = int(torch.randint(len(times) - 1, (1,), generator=batch.generator))
        seed = int(torch.randint(1 << 62, (1,), generator=batch.generator)) + int(batch.index[0])
        y, total = knots[k, batch.index], knots.new_zeros(())
        for size in SIZES:
            h, t = size * self.coarse, float(times[k])
            source = _Keeping(FreshIncrements(tuple(y.shape), "H", seed, dtype=y.dtype), LOCAL)
            fine = torch.linspace(t, t + h, LOCAL + 1, dtype=torch.float64)
            with torch.no_grad():
                target = solve(self.sde, self.teacher, y, fine, path=source).y
            seed += 1
            t0, t1 = fine[[0, -1]].to(y).unbind()
            new, _ = self.student.step(self.sde, t0, t1, y, source.coarse[0], None)
            total = total + ((new - target) / h**1.5).square().mean()
        return total / len(SIZES)


def _paths(
    sde: SDE, teacher: StochasticSolver, start: Tensor, times: Tensor, substeps: int, seed: int
) -> _Paths:
    """The teacher on a grid substeps times finer, with exact fine (W, H) joined to the coarse steps."""
    u = torch.arange(substeps, dtype=torch.float64) / substeps
    fine = torch.lerp(times[:-1, None], times[1:, None], u).flatten()
    source = FreshIncrements(tuple(start.shape), levy="H", seed=seed, dtype=start.dtype)
    kept = _Keeping(source, substeps)
    with torch.no_grad():
        ys = solve(sde, teacher, start, torch.cat([fine, times[-1:]]), path=kept, save="all").ys
    assert ys is not None
    return _Paths(times, ys[::substeps], kept.coarse)


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
