"""`sample`: from noise to data with any diffusion solver, plan or student."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import _validation
from ._tracing import apart, while_tracing
from .brownian.increment import Path
from .denoiser import evaluation_names
from .errors import InputError, NonFiniteError, named
from .executor import Draw, Normals, Pair, Steered, keeps, run
from .grid import Spacing
from .noise_op import traced_normals, traced_start
from .plan import Plan
from .plan_noise import at_least_float32, generators, seeded_normals, unit_normals
from .problem import DiffusionModel
from .resolve import AnySolver, evaluator_of, resolve, steered_evaluator_of
from .schedule import Schedule


@named
def sample(
    problem: DiffusionModel, solver: AnySolver, *, shape: tuple[int, ...] | None = None, steps: int | None = None,
    sigmas: Tensor | None = None, timesteps: Tensor | None = None, spacing: Spacing = "logsnr", final: str = "x0",
    seed: int = 0, seeds: Sequence[int] | None = None, noise: Tensor | None = None, path: Path | None = None,
    dtype: torch.dtype | None = None, device: torch.device | str = "cpu",
    callback: Callable[[int, Tensor, Tensor], None] | None = None, cfg_pp: bool = False,
) -> Tensor:  # fmt: skip
    """Draw samples of a diffusion model.

    Gradients flow where the model's parameters or `noise` require them, and all evaluations are then kept:
    otherwise sample under `torch.no_grad()`.

    Args:
        problem: the model.
        solver: a diffusion solver, a plan made earlier, or a student of this library's distillation.
        shape: (*batch, *event) of the samples; not needed with `noise`.
        steps: the number of intervals of the grid.
        sigmas: (n,) decreasing noise levels; overrides steps, spacing and final. A plan or a student carries
            its own grid and takes neither steps nor sigmas nor timesteps. A deterministic solver with `noise`, the
            state at the first level, also takes increasing levels above 0 (inversion).
        timesteps: (n,) the model times of the evaluations, decreasing; overrides steps and spacing.
        spacing, final: of the grid of `steps`, see `fewstep.sigma_grid`; not with a plan or a student.
        seed: fixes the initial state and the Brownian path. One seed is one path: samples at different
            step counts, and of every stochastic solver, are coupled and have one limit.
        seeds: one per sample (shape[0]), instead of seed. A sample then depends on its own seed, not on the
            size or order of the batch (up to rounding inside a batched network).
        noise: (*batch, *event) the initial state itself, alpha x0 + sigma_t n at the first level.
        path: increments in the clock tau = 1/sigma^2, instead of the path of the seed. It must cover
            1/sigma_first^2 to the plan's last tau.
        dtype, device: of the samples where `noise` does not determine them.
        callback: called as `(row, x, D)` after each evaluation, x in variance-exploding coordinates.
        cfg_pp: take the steps of CFG++ (arXiv 2406.08070): to the x0 of a model with `classifier_free_guidance`, along
            the noise of its unconditional half; scales are then of the size of 0.6. Each step of the solver is applied
            to a state moved by the difference of the guided and the unconditional x0. Not for solvers with correctors.

    Returns:
        (*batch, *event): x0, or the state alpha x at the last level where that is not 0.

    Raises:
        InputError: neither shape nor noise, neither steps nor sigmas, a grid in addition to a plan, a solver
            that has no plan, a path that lacks Lévy data the plan needs, a model whose output has not x's shape
            and device or is more precise than x.
        NonFiniteError: the samples are not finite; its message names the evaluation and the model or the solver.
    """
    expected = "fewstep.DiffusionModel(from_epsilon(network, schedule), schedule), or denoising(pipe) for diffusers"
    _validation.check_instance("problem", problem, DiffusionModel, expected + "; call a function of labels with them")
    grid: dict[str, Any] = {"steps": steps, "sigmas": sigmas, "timesteps": timesteps}
    plan, source = resolve(solver, problem.schedule, spacing=spacing, final=final, keep=True, **grid)
    own = _validation.check_seed(seed) if seeds is None else _validation.check_seeds(seeds)
    x = _start(problem, plan, shape, own, noise, dtype, device)
    if not isinstance(own, int):
        _validation.check_seeds(own, len(x))
    if callback is not None:
        _validation.check_callable("callback", callback, "a function (row, x, D)")
    steers = _validation.check_flag("cfg_pp", cfg_pp)
    evaluate: Steered
    if steers:
        evaluate = steered_evaluator_of(problem, source, x)
    else:
        evaluate = evaluator_of(problem, source, x, own=keeps(plan) or callback is not None)

    def draw() -> Draw:
        if torch.compiler.is_compiling():
            return traced_normals(plan, x, own, path, problem.schedule)
        return partial(apart, apart(partial(seeded_normals, plan, x, own, path, schedule=problem.schedule)))

    end = run(plan, x, evaluate, draw(), callback)
    if not _validation.all_finite(x, end):
        _validation.check_state("noise", x if noise is None else noise)
        raise locate(plan, x, evaluate, draw())
    alpha = _alpha(problem.schedule, plan.ends[1])
    return end if alpha == 1 else end * alpha


@while_tracing
def _alpha(schedule: Schedule, sigma: float) -> float:
    """alpha at a level, 1 at the level 0."""
    return float(schedule.alpha(torch.tensor([sigma], dtype=torch.float64))) if sigma > 0 else 1.0


def _start(
    problem: DiffusionModel, plan: Plan, shape: tuple[int, ...] | None, seed: int | list[int], noise: Tensor | None,
    dtype: torch.dtype | None, device: torch.device | str,
) -> Tensor:  # fmt: skip
    """The state at the first level, x0 + sigma n, in float32 at least."""
    dtype, device = _validation.check_dtype(dtype), _validation.check_device(device)
    if noise is None:
        if plan.ends[0] < plan.ends[1]:
            raise InputError(
                "noise: got None with increasing sigmas; expected the state at the first level, alpha x0 + sigma_t n. "
                "Flip the grid with sigmas.flip(0) to go from noise to data."
            )
        if not isinstance(shape, (tuple, list, torch.Size)) or not shape:
            raise InputError(f"shape: got {shape!r}; expected (batch, ...), or the initial state as noise=...")
        dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        shape = _validation.check_shape(shape)
        if torch.compiler.is_compiling():
            return traced_start(shape, seed, dtype, device) * plan.ends[0]
        return apart(unit_normals, shape, generators(seed, device), dtype, device) * plan.ends[0]
    _validation.check_state("noise", noise, "finite floating point (batch, ...)", _validation.at_once(noise))
    if shape is not None and _validation.check_shape(shape) != tuple(noise.shape):
        raise InputError(f"shape: got {shape} in addition to noise of shape {tuple(noise.shape)}; drop one.")
    return at_least_float32(noise) / _alpha(problem.schedule, plan.ends[0])


@torch.no_grad()
def locate(plan: Plan, x: Tensor, evaluate: Steered, draw: Draw) -> NonFiniteError:
    """Repeat a failed run on the same noise, checking each evaluation and its input."""
    names = evaluation_names(plan.sigma)

    def checked(i: int, at: Tensor, normals: tuple[Normals, ...]) -> Tensor | Pair:
        cure = "Its earlier steps overflow: take more steps or another solver, and check the noise or path."
        _check_finite(at, i, f"{plan.name} produced a non-finite input of the model{names[i]}", cure)
        out = evaluate(i, at, normals)
        cure = (
            f"The input is finite, at most {float(at.abs().max()):.3g} in size: check the model there. float16 "
            "overflows at 65504; bfloat16 does not."
        )
        found = out if torch.is_tensor(out) else out.guided + out.unconditional
        _check_finite(found, i, f"{plan.name} got a non-finite output of the model{names[i]}", cure)
        return out

    try:
        end = run(plan, x, checked, draw)
        _check_finite(end, plan.nfe - 1, f"{plan.name} produced a non-finite final state", "Check the noise or path.")
    except NonFiniteError as error:
        return error
    message = f"{plan.name} produced non-finite samples, but not when repeated: model or noise change between calls."
    return NonFiniteError(message, step=plan.nfe - 1, paths=0)


def _check_finite(x: Tensor, step: int, what: str, cure: str) -> None:
    """Raise a `NonFiniteError` for samples that are not finite."""
    paths = int((~x.isfinite()).reshape(len(x), -1).any(1).sum())
    if paths:
        raise NonFiniteError(f"{what} for {paths} of {len(x)} samples. {cure}", step=step, paths=paths)
