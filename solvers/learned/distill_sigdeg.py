"""Sig-DEG: a few-step student from a fine teacher on the same Brownian path (arXiv 2508.16939)."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from torch import Tensor, nn

from ..brownian import FreshIncrements, Increment
from ..brownian.increment import LEVELS
from ..classical.derivative_free_milstein import DerivativeFreeMilstein
from ..classical.euler_maruyama import EulerMaruyama
from ..errors import InputError, one_of
from ..grid import check_sigmas, sigma_grid
from ..problem import SDE, Denoising
from ..sample import run
from ..solve import solve
from ..solver import DiffusionSolver, StochasticSolver
from .networks import Coefficients, DenoisingMLP
from .sig_step import TERMS, SigSampler, SigStep
from .training import Report, Stopwatch, distil, seeded

STEPS_AT_ONCE = 4  # of an SDE's steps, in one iteration: they are independent given the teacher


@overload
def distill_sigdeg(
    problem: Denoising, *, event_shape: tuple[int, ...], steps: int | None = None, **options: Any
) -> tuple[SigSampler, Report]: ...
@overload
def distill_sigdeg(problem: SDE, *, steps: int, y0: Tensor, **options: Any) -> tuple[SigStep, Report]: ...
def distill_sigdeg(problem: Any, **options: Any) -> tuple[Any, Report]:
    """Distil a diffusion model's sampler, or an SDE's step, into a few signature-driven steps.

    The student sees, for each coarse interval, the exact partial signature that the fine teacher was
    driven by, and is trained by the mean squared distance to the teacher at every coarse knot: unrolled
    from the start for `Denoising`, step by step from the teacher's knots for `SDE`.

    Args:
        problem: `Denoising` for a `SigSampler`, `SDE` (diagonal noise, Itô) for a `SigStep`.
        steps: coarse intervals (not needed beside sigmas).
        teacher_steps: fine steps in all, a multiple of steps.
        network: trained in place and owned by the student. For `Denoising`: `(x, sigma, sigma_next, xi)
            -> x0`; by default the denoiser itself, widened, where it is a `DenoisingMLP`, else a small
            network added to it. For `SDE`: `(t, y) -> (*y.shape, 4)`.
        trajectories, iterations, batch, rate: of teacher data and training.
        seed: of the teacher's noise and of training.
        progress: bars on a terminal.
        event_shape, levy, spacing, sigmas: (Denoising) shape of a sample; "W", "H" or "K"; the grid.
        y0, t0, t1: (SDE) (*batch, d) states that trajectories start from, drawn with replacement; times.

    Returns:
        the student and a `Report`.
    """
    if isinstance(problem, Denoising):
        return _distill_denoising(problem, **_checked(_distill_denoising, options))
    if isinstance(problem, SDE):
        return _distill_sde(problem, **_checked(_distill_sde, options))
    raise InputError(f"problem: got {type(problem).__name__}, wanted fewstep.Denoising or fewstep.SDE.")


def _checked(function: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The options, once it is known that none is unknown, missing or out of range."""
    known = inspect.signature(function).parameters.values()
    named = {p.name: p for p in known if p.kind is p.KEYWORD_ONLY}
    for name in options:
        if name not in named and name not in ("iterations", "batch", "rate"):
            raise one_of("option", name, [*named, "iterations", "batch", "rate"])
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in options:
            raise InputError(f"{name}: got nothing; distill_sigdeg needs {name}= for this problem.")
    if options.get("levy", "H") not in LEVELS:
        raise one_of("levy", options["levy"], LEVELS)
    if options.get("trajectories", 16) < 16:
        raise InputError(
            f"trajectories: got {options['trajectories']}, wanted at least 16: two are held out."
        )
    return options


@dataclass(frozen=True)
class _Trajectories:
    """Teacher data. knots: (steps + 1, N, *event); increments: coarse, fields (N, *event)."""

    knots: Tensor
    increments: list[Increment]

    def __len__(self) -> int:
        return self.knots.shape[1]

    def pick(self, index: Tensor) -> _Trajectories:
        fields = [
            replace(i, W=i.W[index], H=None if i.H is None else i.H[index],
                    K=None if i.K is None else i.K[index])
            for i in self.increments
        ]  # fmt: skip
        return _Trajectories(self.knots[:, index], fields)

    @classmethod
    def cat(cls, parts: list[_Trajectories]) -> _Trajectories:
        joined = []
        for same in zip(*(p.increments for p in parts), strict=True):
            letters = {k: torch.cat([getattr(i, k) for i in same]) for k in "WHK"[: LEVELS[same[0].levy]]}
            joined.append(replace(same[0], **letters))
        return cls(torch.cat([p.knots for p in parts], 1), joined)


def _substeps(steps: int, teacher_steps: int) -> int:
    if steps < 1 or teacher_steps < steps or teacher_steps % steps:
        raise InputError(f"teacher_steps: got {teacher_steps} for {steps} steps, wanted a multiple of steps.")
    return teacher_steps // steps


# ---------------------------------------------------------------- diffusion models


def _distill_denoising(
    problem: Denoising,
    *,
    event_shape: tuple[int, ...],
    steps: int | None = None,
    teacher_steps: int = 300,
    levy: str = "H",
    spacing: str = "logsnr",
    sigmas: Tensor | None = None,
    parent: DiffusionSolver | None = None,
    network: nn.Module | None = None,
    trajectories: int = 8192,
    seed: int = 0,
    progress: bool = False,
    **training: Any,
) -> tuple[SigSampler, Report]:
    grid = _coarse_grid(problem, steps, spacing, sigmas)
    substeps = _substeps(len(grid) - 1, teacher_steps)
    network, residual = _default_network(problem, event_shape, levy, network, seed)
    student = SigSampler((parent or EulerMaruyama()).plan(grid), network, levy, residual)
    watch = Stopwatch()
    data = _teacher_data(problem, grid, substeps, levy, event_shape, trajectories, seed, progress)
    watch.lap("teacher")
    # teacher and student share each knot's noise: they differ by b x0, so errors are taken in units of x0
    scale = student.plan.b[:, 0].square().to(data.knots.dtype)

    def unrolled(some: _Trajectories) -> Tensor:
        states = _student_states(student, problem, some)
        return ((states - some.knots[1:]).square().flatten(1).mean(1) / scale).mean()

    @torch.no_grad()
    def rmse(some: _Trajectories) -> float:
        gap = _student_states(student, problem, some)[-1] - some.knots[-1]
        return float(gap.square().mean().sqrt())

    return student, distil(
        network, data, unrolled, rmse, teacher_evaluations=teacher_steps, watch=watch, seed=seed,
        progress=progress, **training,
    )  # fmt: skip


def _coarse_grid(problem: Denoising, steps: int | None, spacing: str, sigmas: Tensor | None) -> Tensor:
    if sigmas is None:
        if steps is None:
            raise InputError("steps: got None; wanted steps=... or sigmas=... for the coarse grid.")
        return sigma_grid(problem.schedule, steps, spacing, "sigma_min")
    grid = check_sigmas(sigmas)
    if steps not in (None, len(grid) - 1):
        raise InputError(f"steps: got {steps} beside sigmas of {len(grid) - 1} intervals; drop one of them.")
    if grid[-1] == 0:
        raise InputError(
            "sigmas: got a grid that ends in 0, wanted one that ends above: the signature of the last "
            "interval of tau = 1/sigma^2 must be finite. End at the schedule's sigma_min."
        )
    return grid


def _default_network(
    problem: Denoising, event: tuple[int, ...], levy: str, network: nn.Module | None, seed: int
) -> tuple[nn.Module, bool]:
    """The network, and whether it is added to the denoiser."""
    if network is not None:
        return network, False
    letters = "WHK".index(levy) + 1
    if isinstance(problem.denoiser, DenoisingMLP):
        denoiser = problem.denoiser
        return seeded(seed, lambda: denoiser.with_signature(letters)), False
    return seeded(seed, lambda: DenoisingMLP(event, 128, 2, letters, skip=False)), True


def _teacher_data(
    problem: Denoising, grid: Tensor, substeps: int, levy: str, event: tuple[int, ...], count: int,
    seed: int, progress: bool, block: int = 1024,
) -> _Trajectories:  # fmt: skip
    """Fine Euler-Maruyama in the clock tau = 1/sigma^2, with exact (W, H) joined to the coarse grid."""
    from tqdm import tqdm

    u = torch.arange(substeps, dtype=torch.float64) / substeps
    fine = torch.exp(torch.lerp(grid[:-1, None].log(), grid[1:, None].log(), u)).flatten()
    plan = EulerMaruyama().plan(torch.cat([fine, grid[-1:]]))
    parts: list[_Trajectories] = []
    starts = range(0, count, block)
    with torch.no_grad():
        for i in tqdm(starts, desc="teacher", disable=None if progress else True, leave=False):
            shape = (min(block, count - i), *event)
            parts.append(
                _teacher_block(problem, plan, float(grid[0]), substeps, levy, shape, 1_000_003 * seed + i)
            )
    return _Trajectories.cat(parts)


def _teacher_block(
    problem: Denoising,
    plan: Any,
    sigma: float,
    substeps: int,
    levy: str,
    shape: tuple[int, ...],
    seed: int,
) -> _Trajectories:
    source = FreshIncrements(shape, levy=levy, seed=2 * seed + 1)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2 * seed)) * sigma
    knots, increments, joined = [x], list[Increment](), list[Increment]()
    levels = plan.sigma.float().unbind()

    def draw(tau0: float, tau1: float) -> tuple[Tensor, ...]:
        increment = source.increment(tau0, tau1)
        joined.append(joined.pop().join(increment) if joined else increment)
        return increment.coordinates()

    def keep(row: int, x: Tensor, D: Tensor) -> None:
        if (row + 1) % substeps == 0:
            knots.append(x)
            increments.append(joined.pop())

    run(plan, x, lambda i, x, z: problem.denoiser(x, levels[i]), draw, keep)
    return _Trajectories(torch.stack(knots), increments)


def _student_states(student: SigSampler, problem: Denoising, data: _Trajectories) -> Tensor:
    """(steps, N, *event) the student's states along the teacher's increments."""
    states: list[Tensor] = []
    supply = iter(data.increments)
    run(
        student.plan, data.knots[0], student.evaluator(problem, data.knots[0]),
        lambda *_: next(supply).coordinates(), lambda i, x, D: states.append(x),
    )  # fmt: skip
    return torch.stack(states)


# ---------------------------------------------------------------- SDEs


def _distill_sde(
    sde: SDE,
    *,
    steps: int,
    y0: Tensor,
    t0: float = 0.0,
    t1: float = 1.0,
    teacher_steps: int | None = None,
    teacher: StochasticSolver | None = None,
    network: nn.Module | None = None,
    trajectories: int = 4096,
    seed: int = 0,
    progress: bool = False,
    **training: Any,
) -> tuple[SigStep, Report]:
    if sde.noise_type != "diagonal" or sde.sde_type != "ito":
        raise InputError(
            f"problem: got {sde.noise_type!r} {sde.sde_type!r}, wanted 'diagonal' 'ito' noise: the learned "
            "step holds the iterated integrals of one channel a component."
        )
    teacher_steps = 16 * steps if teacher_steps is None else teacher_steps
    substeps = _substeps(steps, teacher_steps)
    student = SigStep(network or seeded(seed, lambda: Coefficients(y0.shape[-1], TERMS)).to(y0))
    watch, generator = Stopwatch(), torch.Generator().manual_seed(seed)
    start = y0.reshape(-1, y0.shape[-1])
    start = start[torch.randint(len(start), (trajectories,), generator=generator)]
    times = torch.linspace(t0, t1, steps + 1, dtype=torch.float64)
    data = _sde_teacher(sde, teacher or DerivativeFreeMilstein(), start, times, substeps, seed)
    watch.lap("teacher")
    ts = times.to(y0).unbind()
    return student, distil(
        student.network, data, lambda some: _one_step_loss(sde, student, some, ts, generator),
        lambda some: _path_rmse(sde, student, some, ts), teacher_evaluations=teacher_steps,
        watch=watch, seed=seed, progress=progress,
        **{"iterations": 800, "batch": 512, "rate": 3e-3} | training,
    )  # fmt: skip


def _one_step_loss(
    sde: SDE, student: SigStep, data: _Trajectories, ts: Sequence[Tensor], generator: torch.Generator
) -> Tensor:
    """Some steps from the teacher's own knots, the residual in units of the parent's local error h."""
    total = torch.zeros((), dtype=data.knots.dtype)
    chosen = torch.randint(len(ts) - 1, (STEPS_AT_ONCE,), generator=generator).tolist()
    for k in chosen:
        increment = data.increments[k]
        new, _ = student.step(sde, ts[k], ts[k + 1], data.knots[k], increment, None)
        total = total + ((new - data.knots[k + 1]) / increment.h).square().mean()
    return total / len(chosen)


def _sde_teacher(
    sde: SDE, teacher: StochasticSolver, start: Tensor, times: Tensor, substeps: int, seed: int
) -> _Trajectories:
    """The teacher on a grid substeps times finer, with exact fine (W, H) joined to the coarse steps."""
    u = torch.arange(substeps, dtype=torch.float64) / substeps
    fine = torch.lerp(times[:-1, None], times[1:, None], u).flatten()
    source = FreshIncrements(tuple(start.shape), levy="H", seed=seed, dtype=start.dtype)
    kept = _Keeping(source, substeps)
    with torch.no_grad():
        ys = solve(sde, teacher, start, torch.cat([fine, times[-1:]]), path=kept, save="all").ys
    assert ys is not None
    return _Trajectories(ys[::substeps], kept.coarse)


class _Keeping:
    """A source of increments that keeps their joins over blocks of the grid."""

    def __init__(self, source: FreshIncrements, substeps: int) -> None:
        self.source, self.substeps, self.levy = source, substeps, source.levy
        self.coarse: list[Increment] = []

    def increments(self, grid: Tensor) -> Iterator[Increment]:
        self.coarse.clear()
        for k, increment in enumerate(self.source.increments(grid)):
            if k % self.substeps:
                self.coarse.append(self.coarse.pop().join(increment))
            else:
                self.coarse.append(increment)
            yield increment


def _path_rmse(sde: SDE, solver: StochasticSolver, data: _Trajectories, ts: Sequence[Tensor]) -> float:
    y, carry = data.knots[0], solver.init(sde, ts[0], data.knots[0])
    with torch.no_grad():
        for k, increment in enumerate(data.increments):
            y, carry = solver.step(sde, ts[k], ts[k + 1], y, increment, carry)
    return float((y - data.knots[-1]).square().mean().sqrt())
