"""Sig-DEG: a few-step student from a fine teacher on the same Brownian path (arXiv 2508.16939)."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from ... import _validation
from ...brownian.increment import LEVY_ORDER
from ...errors import InputError, named, one_of
from ...grid import MOST
from ...problem import SDE, DiffusionModel
from ...solver import DiffusionSolver, StochasticSolver
from ..labelled_model import Labelled
from ..training import AVERAGE, EVERY, PATIENCE, Report, check_options
from ..trajectories import Trajectories
from .networks import HEADS
from .sampler_training import distill_denoising
from .step_training import distill_sde
from .student import SigSampler, SigStep

# what an option says already
IDLE = {
    "data": ("event_shape", "labels", "steps", "sigmas", "spacing", "teacher", "teacher_steps",
             "trajectories"),
    "network": ("head", "feedback"),
}  # fmt: skip


@overload
def distill_sigdeg(
    problem: SDE, *, steps: int, y0: Tensor, t0: float = ..., t1: float = ...,
    teacher_steps: int | None = ..., teacher: StochasticSolver | None = ...,
    network: nn.Module | None = ..., trajectories: int | None = ..., iterations: int | None = ...,
    batch: int | None = ..., rate: float | None = ..., average: float = ..., patience: int = ...,
    every: int = ..., folder: str | Path | None = ..., seed: int = ..., progress: bool = ...,
) -> tuple[SigStep, Report]: ...  # fmt: skip
@overload
def distill_sigdeg(
    problem: DiffusionModel | Labelled, *, steps: int | None = ..., teacher_steps: int | None = ...,
    teacher: DiffusionSolver | None = ..., network: nn.Module | None = ..., trajectories: int | None = ...,
    iterations: int | None = ..., batch: int | None = ..., rate: float | None = ..., average: float = ...,
    patience: int = ..., every: int = ..., folder: str | Path | None = ..., seed: int = ...,
    progress: bool = ..., event_shape: tuple[int, ...] | None = ..., levy: str | None = ...,
    head: str | None = ..., feedback: bool = ..., spacing: str | None = ..., sigmas: Tensor | None = ...,
    parent: DiffusionSolver | None = ..., labels: Tensor | None = ..., data: Trajectories | None = ...,
    forcing: float = ..., autocast: bool = ..., device: torch.device | str = ...,
) -> tuple[SigSampler, Report]: ...  # fmt: skip
@named
def distill_sigdeg(
    problem: SDE | DiffusionModel | Labelled, *, steps: int | None = None, teacher_steps: int | None = None,
    teacher: Any = None, network: nn.Module | None = None, trajectories: int | None = None,
    iterations: int | None = None, batch: int | None = None, rate: float | None = None,
    average: float = AVERAGE, patience: int = PATIENCE, every: int = EVERY,
    folder: str | Path | None = None, seed: int = 0, progress: bool = False,
    event_shape: tuple[int, ...] | None = None, levy: str | None = None, head: str | None = None,
    feedback: bool = False, spacing: str | None = None, sigmas: Tensor | None = None,
    parent: DiffusionSolver | None = None, labels: Tensor | None = None, data: Trajectories | None = None,
    forcing: float = 0.0, autocast: bool = False, device: torch.device | str = "cpu",
    y0: Tensor | None = None, t0: float = 0.0, t1: float = 1.0,
) -> tuple[Any, Report]:  # fmt: skip
    """Distil a diffusion model's sampler, or an SDE's step, into a few signature-driven steps.

    The student sees, for each coarse interval, the exact partial signature that the fine teacher was
    driven by, and is trained by the mean squared distance to the teacher at every coarse knot: from the
    teacher's knots (forcing), unrolled from the start, or one after the other. A knot's error counts over
    the knot's variance, times the data's share in it.

    Args:
        problem: `DiffusionModel` (or, with labels, a function `labels -> DiffusionModel`) for a `SigSampler`; `SDE`
            (diagonal noise, Itô) for a `SigStep`.
        steps: coarse intervals (not needed beside sigmas or data).
        teacher_steps: fine steps in all, a multiple of steps; by default 300 for `DiffusionModel`, 16 a coarse
            step for `SDE`.
        teacher: the fine solver; by default `EulerMaruyama()` in the clock tau = 1/sigma^2 (a stochastic
            diffusion solver), `SRID2()` (an SDE solver; what a step learns is no better than its own).
        network: trained in place and owned by the student. For `DiffusionModel`: `(x, sigma, sigma_next, xi)
            -> x0`; by default the denoiser itself, widened, where it is a `DenoisingMLP`, else a small
            network added to it; `SigUNet` widens a U-Net of diffusers. For `SDE`: `(t, y) -> (*y.shape, 5)`.
        trajectories: of teacher data; one in eight is held out. By default 8192 for `DiffusionModel`, 4096 for
            `SDE`.
        iterations, batch, rate: of training; by default 2500, 256 and 1e-3 for `DiffusionModel`, 300 (with a
            network of yours 1500), 512 and 3e-3 for `SDE`.
        every: iterations between checkpoints, and between looks.
        average: the largest weight of the old in the moving average of the weights.
        patience: stop after so many looks at the held-out distance without a better one; 0, the default,
            for never. A look is made every `every` iterations.
        folder: teacher data and checkpoints are kept here, and the same call goes on where a killed one
            was, to the same bits.
        seed: of the teacher's noise and of training.
        progress: bars on a terminal.
        event_shape, levy, head, feedback, spacing, sigmas, parent: (DiffusionModel) shape of a sample; "W", "H"
            (default) or "K"; "direct" (default) or "graded", and whether it is told its last value (of the
            default network); the grid, even in log SNR by default; the step that is corrected,
            `EulerMaruyama()`.
        labels: (DiffusionModel) (trajectories, ...) classes.
        data: (DiffusionModel) `Trajectories` made before, in place of event_shape, labels, grid and teacher.
        forcing: (DiffusionModel) the share of iterations, at the beginning, that start each step from the
            teacher's knot: they cost a `steps`-th of an unrolled one, on as many samples.
        autocast: (DiffusionModel) train in bfloat16 where torch's autocast does.
        device: (DiffusionModel) where teacher and training run.
        y0, t0, t1: (SDE) (*batch, d) states that trajectories start from, drawn with replacement; times.

    Returns:
        the student and a `Report`.

    Under torch.distributed each process makes its share of the teacher data (with a folder that all
    see) and takes its part of every minibatch; all end with the same student.
    """
    options = locals()
    del options["problem"]
    if isinstance(problem, SDE):
        return distill_sde(problem, **_checked(distill_sde, options))
    if isinstance(problem, DiffusionModel) or callable(problem):
        return distill_denoising(problem, **_checked(distill_denoising, options))
    raise InputError(
        f"problem: got {type(problem).__name__}, expected fewstep.DiffusionModel or fewstep.SDE."
    )


def _checked(function: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """Those options that the function takes, once it is known that none is idle, missing or out of range."""
    door, takes = signature(distill_sigdeg).parameters, signature(function).parameters
    said = {k: v for k, v in options.items() if v is not None and v is not door[k].default}
    for name, value in said.items():
        if name not in takes and value != door[name].default:
            raise one_of("option", name, [k for k in takes if k in door])
    for name, parameter in takes.items():
        if parameter.default is parameter.empty and options.get(name, 0) is None:
            raise InputError(f"{name}: got nothing; distill_sigdeg needs {name}= for this problem.")
    for name, words in (("levy", LEVY_ORDER), ("head", HEADS)):
        if name in said:
            _validation.check_choice(name, said[name], words)
    for given, idle in IDLE.items():
        both = [name for name in idle if given in said and name in said]
        if both:
            raise InputError(f"{both[0]}: got {said[both[0]]!r} beside {given}=, which says it; drop one.")
    count = said.get("trajectories", 16)
    if _validation.check_int("trajectories", count) < 16:
        raise InputError(f"trajectories: got {count!r}, expected at least 16: two are held out.")
    _validation.check_float("forcing", options["forcing"], 0, 1, "a share from 0 to 1")
    _validation.check_seed(options["seed"])
    _validation.check_device(said.get("device", "cpu"))
    for name in ("steps", "teacher_steps"):
        if name in said:
            _validation.check_int(name, said[name], 1, MOST)
    check_options(said)
    return {k: v for k, v in options.items() if k in takes and v is not None}
