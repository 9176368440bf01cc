"""`distill_sigdeg_step`: a `SigStep` fitted to a teacher's finer steps from the states of fine paths.

Two stages. Gradient descent on the mean square of single steps' errors shapes the hidden layers, whose outputs are
features of the state. The last layer is linear in its weights, so least squares over many fresh steps solve for it.
The remaining error of c_1 is what the features cannot express, about 1e-4 of c_1 in one dimension; gradient descent
alone leaves up to a tenth.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import _validation
from ..._serialization import make_folder
from ...brownian import FreshIncrements, Increment
from ...brownian.random_normals import key_of, node_seed
from ...errors import InputError, named
from ...grid import MOST
from ...problem import SDE
from ...sde.srid2 import SRID2
from ...solve import answering, solve, states, stepwise
from ...solver import StochasticSolver
from ..training import (
    LEAST,
    Minibatch,
    Report,
    Stopwatch,
    TeacherOptions,
    TrainingOptions,
    digest,
    fit,
    held_out,
    seeded,
)
from .networks import Coefficients, spread
from .student import TERMS, SigStep, integrals

TEACHER = TeacherOptions(SRID2(), substeps=16, trajectories=4096)
TRAINING = TrainingOptions(batch_size=512, learning_rate=3e-3)
SIZES = tuple(4.0**-k for k in range(5))  # of the steps in gradient descent, in coarse steps
SOLVED = tuple(4.0**-k for k in range(7))  # and in least squares
ROUNDS, ROWS = 32, 512  # of least squares: batches of each size, and states in each
LOCAL = 8  # the teacher's steps in each step
FRESH = 1 << 33  # nodes of the seed that gradient descent has not drawn from


@named
def distill_sigdeg_step(
    sde: SDE, *, steps: int, y0: Tensor, t0: float = 0.0, t1: float = 1.0, network: nn.Module | None = None,
    teacher_options: TeacherOptions = TEACHER, training: TrainingOptions = TRAINING, folder: str | Path | None = None,
    seed: int = 0, progress: bool = False,
) -> tuple[SigStep, Report]:  # fmt: skip
    """Fit a step with learned iterated integrals to an SDE, from evaluations of its drift and diffusion.

    Args:
        sde: with diagonal noise, in Itô's calculus.
        steps: coarse steps from t0 to t1; the shortest steps of the fit are 4096 times shorter.
        y0: (*batch, d) states that the trajectories start from, drawn with replacement. Use float64: in float32
            rounding limits the order at fine steps.
        t0, t1: the first and the last time of the trajectories, t0 < t1.
        network: `(t, y) -> (*y.shape, 5)`, trained in place and owned by the student; by default a small
            `Coefficients`, whose last layer is solved for by least squares.
        teacher_options: an SDE solver (default `SRID2()`; its order limits that of the student), its substeps per
            coarse step (16) and the trajectories (4096).
        training: by default 300 iterations (1500 with a network) of 512 states, learning rate 3e-3.
        folder: for checkpoints. The same call resumes an interrupted one, bitwise.
        seed: of the teacher's noise and of training.
        progress: show a progress bar on a terminal, in a pipe a line every 30 seconds.

    Returns:
        the student and a `Report`.

    Raises:
        InputError: another noise type or calculus, or arguments out of range.
    """
    made = TEACHER.updated("teacher_options", teacher_options)
    training = replace(TRAINING, iterations=300 if network is None else 1500).updated("training", training)
    teacher, substeps, count = _checked(sde, y0, t0, t1, steps, made)
    seed = _validation.check_seed(seed)
    watch, place, generator = Stopwatch(), make_folder(folder), torch.Generator().manual_seed(seed)
    start = y0.reshape(-1, y0.shape[-1])
    start = start[torch.randint(len(start), (count,), generator=generator)]
    paths = _paths(sde, teacher, start, torch.linspace(t0, t1, steps + 1, dtype=torch.float64), substeps, seed)
    default = seeded(seed, lambda: Coefficients(y0.shape[-1], TERMS, scaled=True).to(y0))
    default.rescale(paths.times, paths.states)
    student = SigStep(default if network is None else network)
    watch.lap("teacher")
    kept, held = (paths.pick(index) for index in held_out(count))
    units = y0.new_tensor([spread(x) for x in paths.states.unbind(-1)])
    task = _Task(sde, student, teacher, kept, (t1 - t0) / steps, units)
    before, data = held.rmse(sde, student), digest({"times": paths.times, "ends": paths.states[-1, :64]})
    losses, history = fit(
        student.network.train(), task.loss, kept.states.shape[1], training, seed=seed, progress=progress,
        held_out_loss=lambda: held.rmse(sde, student), checkpoint=place and place / "step.training",
        metadata={"steps": steps, "teacher": type(teacher).__name__, "data": data},
    )  # fmt: skip
    watch.lap("training")
    if isinstance(student.network, Coefficients):
        _solve_last_layer(task, student.network, seed)
        watch.lap("least squares")
    spent, after = steps * substeps * teacher.card.evaluations, held.rmse(sde, student)
    return student, Report(spent, count, before, after, losses, watch.seconds, history)


def _checked(sde: Any, y0: Any, t0: Any, t1: Any, steps: Any, made: Any) -> tuple[StochasticSolver, int, int]:
    """The teacher, its substeps and the number of trajectories."""
    _validation.check_instance("sde", sde, SDE, "fewstep.SDE")
    if sde.noise_type != "diagonal" or sde.sde_type != "ito":
        raise InputError(
            f"sde: got {sde.noise_type!r} {sde.sde_type!r}, expected 'diagonal' 'ito' noise: the learned step has the "
            "iterated integrals of one channel per component."
        )
    steps = _validation.check_int("steps", steps, 1, MOST)
    _validation.check_state("y0", y0, "a finite floating-point tensor (*batch, d)")
    if not y0.numel():
        raise InputError(f"y0: got {_validation.describe(y0)}, expected at least one state.")
    if not _validation.check_float("t0", t0) < _validation.check_float("t1", t1):
        raise InputError(f"t0, t1: got {t0!r} and {t1!r}, expected t0 < t1.")
    if not isinstance(made.solver, StochasticSolver):
        raise InputError(f"teacher_options.solver: got {made.solver}, expected an SDE solver such as fs.SRID2().")
    return made.solver, made.substeps, _validation.check_int("trajectories", made.trajectories, LEAST)


@dataclass(frozen=True)
class _Paths:
    """Fine paths. times: (n + 1,); states: (n + 1, paths, d); increments: over coarse steps, W and H (paths, d)."""

    times: Tensor
    states: Tensor
    increments: list[Increment]

    def pick(self, index: Tensor) -> _Paths:
        fields = [Increment(i.h, i.W[index], i.H if i.H is None else i.H[index]) for i in self.increments]
        return _Paths(self.times, self.states[:, index], fields)

    @torch.no_grad()
    def rmse(self, sde: SDE, solver: StochasticSolver) -> float:
        """Root mean square distance of a solver's final states, driven by the same noise."""
        every = (len(self.times) - 1) // len(self.increments)
        y = self.states[0]
        problem = _answering(stepwise(sde, y.dtype), self.times[0], y)
        *_, y = states(problem, solver, y, self.times[::every], lambda: self.increments)
        return float((y - self.states[-1]).square().mean().sqrt())


class _Residual(NamedTuple):
    """(n, d) a student's distance to the teacher in one step, in units; and what it was computed from."""

    value: Tensor
    t0: Tensor
    y: Tensor
    increment: Increment
    unit: Tensor


@dataclass(frozen=True)
class _Task:
    """Single steps from the states of the paths at all times, against the teacher's finer ones.

    The residual of a step of length h is measured in units of h^(3/2), the size of what the five terms cannot
    represent, and of the state's spread: as in weighted least squares, short steps then determine c_1, where long
    ones would bias it by O(h). The unit also contains the rounding of a difference of states.
    """

    sde: SDE
    student: SigStep
    teacher: StochasticSolver
    paths: _Paths
    coarse: float
    units: Tensor

    def loss(self, batch: Minibatch) -> Tensor:
        place = int(torch.randint(len(self.paths.times), (1,), generator=batch.generator))
        seed = int(torch.randint(1 << 62, (1,), generator=batch.generator))
        found = [self.residual(place, batch.index, size, seed + k).value for k, size in enumerate(SIZES)]
        return torch.stack([r.square().mean() for r in found]).mean()

    def residual(self, place: int, index: Tensor, size: float, seed: int) -> _Residual:
        """The residual of one step of length `size` coarse steps from fine time number `place`, on fresh noise."""
        times, y, h = self.paths.times, self.paths.states[place, index], size * self.coarse
        t = min(float(times[place]), float(times[-1]) - h)  # the SDE may be undefined after t1
        source = _Keeping(y, LOCAL, seed)
        fine = torch.linspace(t, t + h, LOCAL + 1, dtype=torch.float64)
        problem = stepwise(self.sde, y.dtype)
        with torch.no_grad():
            problem = _answering(problem, fine[0], y)
            # not `solve`, whose checks wait for the device
            *_, target = states(problem, self.teacher, y, fine, partial(source.increments, fine))
        unit = h**1.5 * self.units + 4 * torch.finfo(y.dtype).eps * y.abs()
        t0, t1 = fine[[0, -1]].unbind()
        step = self.student.step(problem, t0, t1, y, source.coarse[0], None)
        return _Residual((target - step.y) / unit, t0.to(y), y, source.coarse[0], unit)


def _answering(problem: SDE, t: Tensor, y: Tensor) -> SDE:
    """The problem whose values are checked and have memory of their own."""
    return answering(problem, problem.drift(t, y), problem.diffusion(t, y))


@torch.no_grad()
def _solve_last_layer(task: _Task, network: Coefficients, seed: int) -> None:
    """Add to the last layer the least-squares solution for the residuals of fresh steps of every size.

    For each component the normal equations of its (width + 1) TERMS weights, in float64, over ROUNDS * len(SOLVED)
    batches spread evenly over the paths' times. A function of (weights, seed).
    """
    d, places = len(network.scale) - 1, len(task.paths.times)
    A: list[Any] = [0.0] * d
    b: list[Any] = [0.0] * d
    for k in range(ROUNDS * len(SOLVED)):
        generator = torch.Generator().manual_seed(node_seed(key_of(seed), FRESH + k))
        u = (k // len(SOLVED) + float(torch.rand(1, generator=generator))) / ROUNDS
        index = torch.randint(task.paths.states.shape[1], (ROWS,), generator=generator)
        fresh = int(torch.randint(1 << 62, (1,), generator=generator))
        r = task.residual(min(int(u * places), places - 1), index, SOLVED[k % len(SOLVED)], fresh)
        phi = nn.functional.pad(network.features(r.t0, r.y), (0, 1), value=1.0).double()
        terms = (integrals(r.increment) * (network.scale[:-1] / r.unit)[..., None]).double()
        for i in range(d):
            X = (terms[:, i, :, None] * phi[:, None, :]).flatten(1)
            A[i], b[i] = A[i] + X.mT @ X, b[i] + X.mT @ r.value[:, i].double()
    # weights grow to ridge^(-1/2) where features are nearly dependent, and their rounding with them
    ridge = torch.finfo(network.head.weight.dtype).eps ** 0.75
    for i in range(d):
        size = A[i].diagonal().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
        scaled = A[i] / size / size[:, None] + ridge * torch.eye(len(size), dtype=torch.float64, device=size.device)
        more = (torch.linalg.solve(scaled, b[i] / size) / size).unflatten(0, (TERMS, -1))
        network.head.weight[i * TERMS : (i + 1) * TERMS] += more[:, :-1].to(network.head.weight)
        network.head.bias[i * TERMS : (i + 1) * TERMS] += more[:, -1].to(network.head.bias)


def _paths(sde: SDE, teacher: StochasticSolver, start: Tensor, times: Tensor, substeps: int, seed: int) -> _Paths:
    """The teacher on a grid `substeps` times finer, with exact fine (W, H) joined to the coarse steps."""
    u = torch.arange(substeps, dtype=torch.float64) / substeps
    fine = torch.cat([torch.lerp(times[:-1, None], times[1:, None], u).flatten(), times[-1:]])
    source = _Keeping(start, substeps, seed)
    with torch.no_grad():
        ys = solve(sde, teacher, start, fine.tolist(), path=source, save="all").ys
    assert ys is not None
    return _Paths(fine, ys, source.coarse)


class _Keeping(FreshIncrements):
    """Fresh increments that keep their joins over blocks of `substeps`."""

    def __init__(self, like: Tensor, substeps: int, seed: int) -> None:
        super().__init__(tuple(like.shape), "H", seed, like.dtype, like.device)
        self.substeps = substeps
        self.coarse: list[Increment] = []

    def increments(self, grid: Tensor | Sequence[float]) -> Iterator[Increment]:
        self.coarse.clear()
        for k, increment in enumerate(super().increments(grid)):
            self.coarse.append(self.coarse.pop().join(increment) if k % self.substeps else increment)
            yield increment
