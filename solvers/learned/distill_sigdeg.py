"""Sig-DEG: a few-step student from a fine teacher on the same Brownian path (arXiv 2508.16939)."""

from __future__ import annotations

import inspect
from typing import Any, overload

from torch import Tensor

from .. import checks
from ..brownian.increment import LEVELS
from ..errors import InputError, one_of
from ..grid import MOST
from ..problem import SDE, Denoising
from .networks import HEADS
from .sig_step import SigSampler, SigStep
from .sigdeg_denoising import distill_denoising
from .sigdeg_sde import distill_sde
from .training import OPTIONS, Report, check_options

# what an option says already
IDLE = {
    "data": ("event_shape", "labels", "steps", "sigmas", "spacing", "teacher", "teacher_steps",
             "trajectories"),
    "network": ("head", "feedback"),
}  # fmt: skip


@overload
def distill_sigdeg(problem: SDE, *, steps: int, y0: Tensor, **options: Any) -> tuple[SigStep, Report]: ...
@overload
def distill_sigdeg(problem: Any, **options: Any) -> tuple[SigSampler, Report]: ...
def distill_sigdeg(problem: Any, **options: Any) -> tuple[Any, Report]:
    """Distil a diffusion model's sampler, or an SDE's step, into a few signature-driven steps.

    The student sees, for each coarse interval, the exact partial signature that the fine teacher was
    driven by, and is trained by the mean squared distance to the teacher at every coarse knot: from the
    teacher's knots (forcing), unrolled from the start, or one after the other. A knot's error counts over
    the knot's variance, times the data's share in it.

    Args:
        problem: `Denoising` (or, with labels, a function `labels -> Denoising`) for a `SigSampler`; `SDE`
            (diagonal noise, Itô) for a `SigStep`.
        steps: coarse intervals (not needed beside sigmas or data).
        teacher_steps: fine steps in all, a multiple of steps.
        teacher: the fine solver; by default `EulerMaruyama()` in the clock tau = 1/sigma^2 (a stochastic
            diffusion solver), `SRID2()` (an SDE solver; what a step learns is no better than its own).
        network: trained in place and owned by the student. For `Denoising`: `(x, sigma, sigma_next, xi)
            -> x0`; by default the denoiser itself, widened, where it is a `DenoisingMLP`, else a small
            network added to it; `SigUNet` widens a U-Net of diffusers. For `SDE`: `(t, y) -> (*y.shape, 5)`.
        trajectories: of teacher data; one in eight is held out.
        iterations, batch, rate: of training; 2500, 256 and 1e-3 for `Denoising`, 300, 512 and 3e-3 for
            `SDE`. A checkpoint is written, and a look may be made, `every` 250 iterations.
        average: the largest weight of the old in the moving average of the weights, 0.99.
        patience: stop after so many looks at the held-out distance without a better one; 0, the default,
            for never. A look is made every `every` iterations.
        folder: teacher data and checkpoints are kept here, and the same call goes on where a killed one
            was, to the same bits.
        seed: of the teacher's noise and of training.
        progress: bars on a terminal.
        event_shape, levy, head, feedback, spacing, sigmas, parent: (Denoising) shape of a sample; "W", "H"
            (default) or "K"; "direct" (default) or "graded", and whether it is told its last value (of the
            default network); the grid, even in log SNR by default; the step that is corrected,
            `EulerMaruyama()`.
        labels: (Denoising) (trajectories, ...) classes.
        data: (Denoising) `Trajectories` made before, in place of event_shape, labels, grid and teacher.
        forcing: (Denoising) the share of iterations, at the beginning, that start each step from the
            teacher's knot: they cost a `steps`-th of an unrolled one, on as many samples.
        autocast: (Denoising) train in bfloat16 where torch's autocast does.
        device: (Denoising) where teacher and training run.
        y0, t0, t1: (SDE) (*batch, d) states that trajectories start from, drawn with replacement; times.

    Returns:
        the student and a `Report`.

    Under torch.distributed each process makes its share of the teacher data (with a folder that all
    see) and takes its part of every minibatch; all end with the same student.
    """
    if isinstance(problem, SDE):
        return distill_sde(problem, **_checked(distill_sde, options))
    if isinstance(problem, Denoising) or callable(problem):
        return distill_denoising(problem, **_checked(distill_denoising, options))
    raise InputError(f"problem: got {type(problem).__name__}, wanted fewstep.Denoising or fewstep.SDE.")


def _checked(function: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The options, once it is known that none is unknown, missing or out of range."""
    known = inspect.signature(function).parameters.values()
    named = {p.name: p for p in known if p.kind is p.KEYWORD_ONLY}
    for name in options:
        if name not in named and name not in OPTIONS:
            raise one_of("option", name, [*named, *OPTIONS])
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in options:
            raise InputError(f"{name}: got nothing; distill_sigdeg needs {name}= for this problem.")
    for name, words in (("levy", LEVELS), ("head", HEADS)):
        if options.get(name) is not None:
            checks.word(name, options[name], words)
    for given, idle in IDLE.items():
        both = [name for name in idle if options.get(given) is not None and name in options]
        if both:
            raise InputError(f"{both[0]}: got {options[both[0]]!r} beside {given}=, which says it; drop one.")
    count = options.get("trajectories", 16)
    if checks.whole("trajectories", count) < 16:
        raise InputError(f"trajectories: got {count!r}, wanted at least 16: two are held out.")
    checks.real("forcing", options.get("forcing", 0), 0, 1, "a share from 0 to 1")
    checks.seed(options.get("seed", 0))
    checks.device(options.get("device", "cpu"))
    for name in ("steps", "teacher_steps"):
        if options.get(name) is not None:
            checks.whole(name, options[name], 1, MOST)
    check_options(options)
    return options
