"""The one executor of plans, and `sample`: from noise to data with any diffusion solver."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from . import checks
from .brownian import BrownianPath, Increment
from .brownian.increment import LEVELS
from .brownian.normals import key_of
from .denoiser import on_levels
from .errors import InputError
from .grid import check_sigmas, sigma_grid
from .plan import Combination, Plan
from .problem import Denoising
from .solver import DiffusionSolver, ScheduledSolver, Solver

Evaluate = Callable[[int, Tensor, "deque[tuple[Tensor, ...]]"], Tensor]


class NoiseSource(Protocol):
    """What a plan asks of a path: increments in the clock tau = 1/sigma^2."""

    levy: str

    def increment(self, t0: float, t1: float, /) -> Increment: ...


class Student(Protocol):
    """A learned solver: a plan and the network that stands in for the denoiser on it."""

    plan: Plan

    def evaluator(self, problem: Denoising | None, like: Tensor) -> Evaluate: ...


def run(
    plan: Plan, x: Tensor, evaluate: Evaluate, noise: Callable[[float, float], tuple[Tensor, ...]],
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:  # fmt: skip
    """Walk the rows of a plan.

    Args:
        x: (*batch, *event) the state at the first level, x0 + sigma n; not written to.
        evaluate: `(row, input, normals) -> what plan.prediction names` (D, or (input - D)/sigma);
            normals are those of the opened intervals, newest first.
        noise: `(tau0, tau1) -> unit normals` of an interval, one for each letter.
        callback: told `(row, x, D)` after each row.
    """
    history: deque[Tensor] = deque(maxlen=plan.b.shape[1])
    normals: deque[tuple[Tensor, ...]] = deque(maxlen=plan.m.shape[1])
    for i, (sigma, interval, look, go) in enumerate(plan.rows):
        if interval is not None:
            normals.appendleft(noise(*interval))
        at = combine(look, x, history, normals)
        history.appendleft(evaluate(i, at, normals))
        x = combine(go, x, history, normals)
        if callback is not None:
            D = history[0] if plan.prediction == "data" else at - sigma * history[0]
            callback(i, x, D)
    return x


def combine(
    terms: Combination, x: Tensor, history: Sequence[Tensor], normals: Sequence[tuple[Tensor, ...]] = ()
) -> Tensor:
    """The linear combination as a multiplication and additions into its own fresh memory."""
    scale, past, random = terms
    if scale == 0 and past:  # the state may be as large as sigma_max: it must not leave rounding
        (w, j), *past = past  # type: ignore[assignment]
        if w == 1 and not past and not random:
            return history[j]
        out = torch.mul(history[j], w)
    elif scale == 1:
        if past:
            (w, j), *past = past  # type: ignore[assignment]
            out = torch.add(x, history[j], alpha=w)
        elif random:
            (w, j, k), *random = random  # type: ignore[assignment]
            out = torch.add(x, normals[j][k], alpha=w)
        else:
            return x
    else:
        out = torch.mul(x, scale)
    for w, j in past:
        out.add_(history[j], alpha=w)
    for w, j, k in random:
        out.add_(normals[j][k], alpha=w)
    return out


def sample(
    problem: Denoising,
    solver: Solver | Plan | Student,
    *,
    shape: tuple[int, ...] | None = None,
    steps: int | None = None,
    sigmas: Tensor | None = None,
    timesteps: Tensor | None = None,
    spacing: str = "logsnr",
    final: str = "x0",
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    noise: Tensor | None = None,
    path: NoiseSource | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Draw samples of a diffusion model.

    Gradients flow where the model's parameters or `noise` ask for them, and all evaluations are then kept:
    sample under `torch.no_grad()`.

    Args:
        problem: the model.
        solver: a diffusion solver, a plan made earlier, or a student of this library's distillation.
        shape: (*batch, *event) of the samples; not needed with `noise`.
        steps: intervals of the grid; or give `sigmas` (n,), decreasing, which overrides steps,
            spacing and final, or `timesteps`, the model times of the evaluations, which overrides steps
            and spacing. A plan or a student carries its own grid and takes none of them.
        spacing, final: see `fewstep.sigma_grid`.
        seed: fixes the initial state and the Brownian path. One seed is one path: samples of different
            step counts, and of every stochastic solver, belong together and have one limit.
        seeds: one for each sample (shape[0]), in place of seed. A sample then depends on its own seed,
            not on the batch's size or order (to the rounding of the network's own batching).
        noise: (*batch, *event) the initial state itself, alpha x0 + sigma_t n at the first level.
        path: increments in the clock tau = 1/sigma^2, in place of the path of the seed. It must reach
            from 1/sigma_first^2 to the plan's last tau.
        dtype, device: of the samples where `noise` does not fix them.
        callback: told `(row, x, D)` after each evaluation, x in variance-exploding coordinates.

    Returns:
        (*batch, *event): x0, or the state alpha x at the last level where that is not 0.

    Raises:
        InputError: neither shape nor noise, neither steps nor sigmas, a grid beside a plan, a solver
            that has no plan, a path that lacks Lévy data the plan needs.
    """
    if not isinstance(problem, Denoising):
        raise InputError(
            f"problem: got {checks.came(problem)}, wanted fewstep.Denoising(from_epsilon(network, schedule), "
            "schedule), or denoising(pipe) for diffusers; a function of labels is called with them first."
        )
    if timesteps is not None and sigmas is None:
        steps = checks.numbers("timesteps", timesteps).numel()
        if not steps:
            raise InputError("timesteps: got none, wanted the model times of the evaluations, decreasing.")
        sigmas = sigma_grid(problem.schedule, steps, spacing, final, timesteps=timesteps)
    plan, student = _resolve(problem, solver, steps, sigmas, spacing, final)
    own = checks.seed(seed) if seeds is None else each_seed(seeds)
    x = _start(problem, plan, shape, own, noise, dtype, device)
    if not isinstance(own, int) and len(own) != len(x):
        raise InputError(f"seeds: got {len(own)}, wanted one for each of the {len(x)} samples.")
    if callback is not None:
        checks.function("callback", callback, "a function (row, x, D)")
    draw = _normals(problem, plan, x, own, path)
    evaluate = student.evaluator(problem, x) if student else evaluator_of(problem, plan, x)
    x = run(plan, x, evaluate, draw, callback)
    alpha = problem.schedule.alpha(plan.sigmas[-1:]).item() if plan.sigmas[-1] > 0 else 1.0
    return x if alpha == 1 else x * alpha


def _resolve(
    problem: Denoising,
    solver: Any,
    steps: int | None,
    sigmas: Tensor | None,
    spacing: str,
    final: str,
) -> tuple[Plan, Student | None]:
    if isinstance(solver, DiffusionSolver):
        if sigmas is None:
            if steps is None:
                raise InputError("steps: got None; wanted steps=... or sigmas=... for the grid.")
            sigmas = sigma_grid(problem.schedule, steps, spacing, final)
        sigmas = check_sigmas(sigmas, repeat=getattr(solver, "form", "") == "diffusers")
        if isinstance(solver, ScheduledSolver):
            return solver.plan(sigmas, problem.schedule), None
        return solver.plan(sigmas), None
    plan = solver if isinstance(solver, Plan) else getattr(solver, "plan", None)
    if not isinstance(plan, Plan):
        raise InputError(
            f"solver: got {checks.came(solver)}, which has no plan; wanted a diffusion solver, a Plan "
            "or a student. SDE solvers sample where their card lists additive noise."
        )
    if steps is not None or sigmas is not None:
        raise InputError(
            f"steps/sigmas: got a grid beside {plan.name!r}, which carries its own of {plan.nfe} "
            "evaluations. Leave the grid out, or make a plan for the other grid."
        )
    return plan, None if isinstance(solver, Plan) else solver


def _start(
    problem: Denoising, plan: Plan, shape: tuple[int, ...] | None, seed: int | list[int],
    noise: Tensor | None, dtype: torch.dtype | None, device: torch.device | str,
) -> Tensor:  # fmt: skip
    """The state at the first level, x0 + sigma n, in float32 at least."""
    half = (torch.float16, torch.bfloat16)  # the trajectory outlives many small steps: they would not
    dtype, device = checks.floating(dtype), checks.device(device)
    if noise is None:
        if not isinstance(shape, (tuple, list, torch.Size)) or not shape:
            raise InputError(f"shape: got {shape!r}; wanted (batch, ...), or the initial state as noise=...")
        dtype = dtype or torch.get_default_dtype()
        dtype = torch.float32 if dtype in half else dtype
        unit = unit_normals(checks.sizes(shape), generators(seed, device), dtype, device)
        return unit * plan.sigmas[0].item()
    checks.state("noise", noise, "finite floating point (batch, ...)")
    if shape is not None and checks.sizes(shape) != tuple(noise.shape):
        raise InputError(f"shape: got {shape} beside noise of shape {tuple(noise.shape)}; drop one.")
    return (noise.float() if noise.dtype in half else noise) / problem.schedule.alpha(plan.sigmas[:1]).item()


Generators = torch.Generator | list[torch.Generator]


def each_seed(seeds: Any) -> list[int]:
    """A user's seeds, one a sample, as whole numbers."""
    given = seeds.tolist() if torch.is_tensor(seeds) else seeds
    given = checks.sequence("seeds", given, "whole numbers, one for each sample")
    return [checks.seed(s, "seeds") for s in given]


def generators(seed: int | list[int], device: torch.device | str) -> Generators:
    """One generator, or one for each sample."""
    if isinstance(seed, int):
        return torch.Generator(device).manual_seed(seed)
    return [torch.Generator(device).manual_seed(s) for s in seed]


def unit_normals(
    shape: tuple[int, ...], source: Generators, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """Standard normals (batch, *event); entry j from source[j] alone where there are several."""
    if isinstance(source, torch.Generator):
        return torch.randn(shape, generator=source, dtype=dtype, device=device)
    if len(source) != shape[0]:
        raise InputError(f"seeds: got {len(source)}, wanted one for each of the {shape[0]} samples.")
    return torch.cat([unit_normals((1, *shape[1:]), one, dtype, device) for one in source])


def _normals(
    problem: Denoising, plan: Plan, x: Tensor, seed: int | list[int], path: NoiseSource | None
) -> Callable[[float, float], tuple[Tensor, ...]]:
    """The source of unit normals: the path of the seed unless another is given, and fresh ones off it."""
    letters = plan.m.shape[-1]
    if plan.levy and path is None:
        path = path_of(plan, x, float(problem.schedule.sigma_min), _shifted(seed, 1))
    elif path is not None:
        _check_path(path, plan, x)
    off_path: Generators | None = None

    def draw(tau0: float, tau1: float) -> tuple[Tensor, ...]:
        nonlocal off_path
        if tau0 == tau1:
            off_path = off_path or generators(_apart(seed), x.device)
            return tuple(unit_normals(tuple(x.shape), off_path, x.dtype, x.device) for _ in range(letters))
        assert path is not None
        return path.increment(tau0, tau1).coordinates()[:letters]

    return draw


def _apart(seed: int | list[int]) -> int | list[int]:
    """For churn. Hashed: torch's CPU generator keeps 32 bits of a seed, and a far one may be the start's."""
    return key_of(seed + CHURN) >> 1 if isinstance(seed, int) else [key_of(s + CHURN) >> 1 for s in seed]


CHURN = 1 << 40


def _shifted(seed: int | list[int], by: int) -> int | list[int]:
    return seed + by if isinstance(seed, int) else [s + by for s in seed]


def path_of(plan: Plan, x: Tensor, sigma_min: float, seed: int | list[int]) -> BrownianPath:
    """The Brownian path of a seed (or of one a sample) that a plan's noise comes from.

    Its end and its letters depend on the plan only where they must: all solvers of a seed share one path.
    """
    end = max(float(plan.noise.nan_to_num(0).max()), sigma_min**-2)
    # paths of other levy are other paths, hence W and H always
    many: dict[str, Any] = {"seeds": seed} if isinstance(seed, list) else {"seed": seed}
    return BrownianPath(
        tuple(x.shape), t0=float(plan.sigmas[0]) ** -2, t1=end, levy="K" if plan.levy == "K" else "H",
        dtype=x.dtype, device=x.device, clock="log", **many,
    )  # fmt: skip


def _check_path(path: Any, plan: Plan, x: Tensor) -> None:
    """Refuse a path that lacks letters, has another shape or does not reach over the plan's intervals."""
    if not hasattr(path, "increment") or getattr(path, "levy", None) not in LEVELS:
        raise InputError(f"path: got {checks.came(path)}, wanted a BrownianPath in the clock 1/sigma^2.")
    if LEVELS[path.levy] < plan.m.shape[-1]:
        raise InputError(
            f"path: got levy={path.levy!r}; {plan.name} needs {plan.levy!r}. Make the path with "
            f"levy={plan.levy!r}."
        )
    if tuple(getattr(path, "shape", x.shape)) != tuple(x.shape):
        raise InputError(f"path: got shape {tuple(path.shape)}, wanted {tuple(x.shape)} as the samples have.")
    used = plan.noise[plan.noise[:, 1] > plan.noise[:, 0]]
    if len(used) and hasattr(path, "t0"):
        first, last = float(used.min()), float(used.max())
        slack = 1 + 1e-9
        if path.t0 > first * slack or path.t1 * slack < last:
            raise InputError(
                f"path: got [{path.t0:g}, {path.t1:g}]; {plan.name} needs [{first:g}, {last:g}] in the clock "
                "tau = 1/sigma^2. Make the path from 1/sigma_first^2 to 1/sigma_last^2 with clock='log'."
            )


def evaluator_of(problem: Denoising, plan: Plan, like: Tensor) -> Evaluate:
    """The model at a plan's levels, as `run` calls it; its first answer is looked at."""
    predict = on_levels(problem.denoiser, plan.sigma, like, plan.prediction)

    def evaluate(i: int, x: Tensor, normals: Any) -> Tensor:
        out = predict(i, x)
        if i == 0 and not (
            torch.is_tensor(out) and (out.shape, out.dtype, out.device) == (x.shape, x.dtype, x.device)
        ):
            raise InputError(
                f"denoiser: got {checks.came(out)}, wanted x's {x.dtype} of shape {tuple(x.shape)}. Return "
                "the estimate of x0 for each element of x, in x's dtype."
            )
        return out

    return evaluate
