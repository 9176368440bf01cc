"""Time grids as 1-D float64 tensors: decreasing sigmas for diffusion, checked times for SDEs."""

import torch
from torch import Tensor

from . import _validation
from .errors import InputError
from .schedule import Schedule

SIGMA_SPACINGS = ("logsnr", "karras", "exponential")
FINALS = ("x0", "sigma_min")
TIME_SPACINGS = ("uniform", "quadratic", "linspace", "leading", "trailing")
MOST = 10**6  # steps: a plan is a table in memory with a row per step


def sigma_grid(
    schedule: Schedule, steps: int, spacing: str = "logsnr", final: str = "x0", rho: float | None = None, *,
    timesteps: Tensor | None = None, offset: int = 0,
) -> Tensor:  # fmt: skip
    """(steps + 1,) decreasing noise levels from the schedule's largest.

    Args:
        schedule: the forward process; the grid starts at its `sigma_max`, or at the first of `timesteps`.
        steps: number of intervals.
        spacing: in sigma: `"logsnr"` is even in log sigma; `"karras"` even in sigma^(1/rho), rho = 7
            (arXiv 2206.00364, Eq. 5); `"exponential"` has log sigma even in u^rho, rho = 1. In time:
            `"uniform"` and `"quadratic"` are even in t and in sqrt(t); `"linspace"`, `"leading"` and
            `"trailing"` are the rules of arXiv 2305.08891, Table 2, on integer labels where the schedule
            has them and on [t_min, t_max] otherwise. `"leading"` starts below the largest sigma.
        final: `"x0"` ends at sigma = 0: the last step is the denoiser's own estimate, and `steps` is the
            number of evaluations of a one-evaluation solver. `"sigma_min"` ends at the smallest sigma.
        rho: the exponent of `"karras"` and `"exponential"`, above 0; other spacings ignore it.
        timesteps: (steps,) decreasing model times of the evaluations; overrides spacing.
        offset: added to the labels of `"leading"` (diffusers' steps_offset).
    """
    _validation.check_instance("schedule", schedule, Schedule, "a fewstep schedule such as VPLinear() or EDM()")
    _validation.check_int("steps", steps, 1, MOST)
    _validation.check_choice("spacing", spacing, SIGMA_SPACINGS + TIME_SPACINGS)
    _validation.check_choice("final", final, FINALS)
    _validation.check_int("offset", offset, 0)
    if rho is not None and not _validation.check_float("rho", rho) > 0:
        raise InputError(f"rho: got {rho!r}, expected a number above 0.")
    count = steps if final == "x0" else steps + 1
    first, last = torch.tensor([[schedule.sigma_max], [schedule.sigma_min]], dtype=torch.float64)
    if timesteps is not None:
        nodes = schedule.sigma(_check_timesteps(timesteps, steps))
        if not bool((nodes.isfinite() & (nodes > 0)).all()):
            raise InputError(f"timesteps: got {short(timesteps)}; expected model times of this schedule.")
        ends = last if final == "sigma_min" and nodes[-1] > last * (1 + 1e-9) else last[:0]
    elif spacing in ("linspace", "leading", "trailing"):
        # a trailing grid stops above sigma_min; the others reach it by themselves
        reaches = final == "sigma_min" and spacing != "trailing"
        nodes = schedule.sigma(_table_2(schedule, count if reaches else steps, spacing, offset))
        nodes, ends = (nodes[:-1] if reaches else nodes), (last if final == "sigma_min" else last[:0])
    else:
        nodes, ends = _between(schedule, count, spacing, rho, first, last), last[:0]
        nodes[0] = first[0]
    return torch.cat([nodes, first.new_zeros(1) if final == "x0" else ends])


def _between(schedule: Schedule, count: int, spacing: str, rho: float | None, first: Tensor, last: Tensor) -> Tensor:
    """Nodes from the largest sigma to the smallest."""
    u = torch.linspace(0, 1, count, dtype=torch.float64)
    if spacing == "karras":
        r = 7.0 if rho is None else rho
        return torch.lerp(first ** (1 / r), last ** (1 / r), u).pow(r)
    if spacing in SIGMA_SPACINGS:
        u = u ** (1.0 if rho is None or spacing == "logsnr" else rho)
        return torch.exp(torch.lerp(first.log(), last.log(), u))
    power = 1 if spacing == "uniform" else 2
    start, end = (schedule.time(s) ** (1 / power) for s in (first, last))
    return schedule.sigma(torch.lerp(start, end, u) ** power)


def _table_2(schedule: Schedule, steps: int, spacing: str, offset: int) -> Tensor:
    """(steps,) decreasing model times by a rule of arXiv 2305.08891, Table 2."""
    i = torch.arange(steps, dtype=torch.float64)
    if schedule.labels is not None:
        N = schedule.labels
        if not steps <= N:
            raise InputError(f"steps: got {steps}, expected at most the {N} labels of the schedule.")
        if spacing == "linspace":
            return torch.linspace(0, N - 1, steps, dtype=torch.float64).round().flip(0)
        if spacing == "leading":
            return (i * (N // steps)).flip(0) + offset
        return (N - i * (N / steps)).round() - 1
    ends = torch.tensor([schedule.sigma_min, schedule.sigma_max], dtype=torch.float64)
    low, high = schedule.time(ends).unbind()
    if spacing == "linspace":
        return torch.lerp(high, low, torch.linspace(0, 1, steps, dtype=torch.float64))
    start = i if spacing == "trailing" else i + 1
    return high - start * (high - low) / steps


def _check_timesteps(timesteps: Tensor, steps: int) -> Tensor:
    t = _validation.check_numbers("timesteps", timesteps)
    if t.dim() != 1 or len(t) != steps or not bool((t.diff() < 0).all()):
        raise InputError(
            f"timesteps: got {short(t)}; expected ({steps},) strictly decreasing model times. "
            "Flip an increasing list with timesteps.flip(0)."
        )
    return t


def check_sigmas(sigmas: Tensor, repeat: bool = False) -> Tensor:
    """A user's grid as (n,) float64, n >= 2, decreasing, not below 0; with `repeat` the last level may stand twice."""
    s = _validation.check_numbers("sigmas", sigmas)
    if s.dim() != 1 or len(s) < 2 or not bool(s.isfinite().all()):
        raise InputError(f"sigmas: got a tensor of shape {tuple(s.shape)}; expected (n,) finite with n >= 2.")
    distinct = s[:-1] if repeat and len(s) > 2 and s[-1] == s[-2] else s
    if not bool((distinct.diff() < 0).all()) or s[-1] < 0:
        raise InputError(
            f"sigmas: got {short(s)}; expected strictly decreasing noise levels, the last >= 0. Flip an increasing "
            "grid with sigmas.flip(0)."
        )
    return s


def short(t: Tensor) -> str:
    values = [f"{v:.4g}" for v in torch.as_tensor(t).flatten().tolist()]
    return "[" + ", ".join(values if len(values) <= 6 else [*values[:3], "...", *values[-2:]]) + "]"


def refined(sigmas: Tensor, substeps: int) -> Tensor:
    """The grid with each interval cut into `substeps` parts, even in log sigma; the last level is above 0."""
    u = torch.arange(substeps, dtype=torch.float64) / substeps
    fine = torch.exp(torch.lerp(sigmas[:-1, None].log(), sigmas[1:, None].log(), u)).flatten()
    fine[::substeps] = sigmas[:-1]
    return torch.cat([fine, sigmas[-1:]])
