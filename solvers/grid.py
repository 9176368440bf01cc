"""Time grids as 1-D float64 tensors: decreasing sigmas for diffusion, checked times for SDEs."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import InputError, one_of
from .schedule import Schedule

SPACINGS = ("logsnr", "karras", "uniform", "quadratic")


def sigma_grid(
    schedule: Schedule, steps: int, spacing: str = "logsnr", final: str = "x0", rho: float = 7.0
) -> Tensor:
    """(steps + 1,) decreasing sigmas from the schedule's largest.

    Args:
        spacing: `"logsnr"` even in log sigma; `"karras"` even in sigma^(1/rho) (arXiv 2206.00364,
            Eq. 5); `"uniform"` and `"quadratic"` even in t and in sqrt(t).
        final: `"x0"` ends at sigma = 0, so that the last step is the denoiser's own estimate and
            `steps` is the number of evaluations of a one-evaluation solver; `"sigma_min"` ends at the
            schedule's smallest sigma.
    """
    if not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps: got {steps!r}, wanted a whole number of at least 1.")
    if spacing not in SPACINGS:
        raise one_of("spacing", spacing, SPACINGS)
    if final not in ("x0", "sigma_min"):
        raise one_of("final", final, ("x0", "sigma_min"))
    first, last = torch.tensor([[schedule.sigma_max], [schedule.sigma_min]], dtype=torch.float64)
    u = torch.linspace(0, 1, steps if final == "x0" else steps + 1, dtype=torch.float64)
    if spacing == "logsnr":
        nodes = torch.exp(torch.lerp(first.log(), last.log(), u))
    elif spacing == "karras":
        nodes = torch.lerp(first ** (1 / rho), last ** (1 / rho), u) ** rho
    else:
        power = 1 if spacing == "uniform" else 2
        start, end = (schedule.time(s) ** (1 / power) for s in (first, last))
        nodes = schedule.sigma(torch.lerp(start, end, u) ** power)
    if final == "x0":
        nodes = torch.cat([nodes, nodes.new_zeros(1)])
    nodes[0] = first[0]
    return nodes


def check_sigmas(sigmas: Tensor) -> Tensor:
    """A user's grid as (n,) float64 on the CPU: finite, at least two, decreasing, last >= 0."""
    s = torch.as_tensor(sigmas).detach().to("cpu", torch.float64)
    if s.dim() != 1 or len(s) < 2 or not bool(s.isfinite().all()):
        raise InputError(f"sigmas: got a tensor of shape {tuple(s.shape)}; wanted (n,) finite with n >= 2.")
    if not bool((s.diff() < 0).all()) or s[-1] < 0:
        raise InputError(
            f"sigmas: got {_short(s)}; wanted strictly decreasing noise levels, the last >= 0. "
            "Flip an increasing grid with sigmas.flip(0)."
        )
    return s


def check_times(grid: Tensor) -> Tensor:
    """A time grid for `solve` as (n,) float64 on the CPU: finite, at least two, strictly increasing."""
    if not torch.is_tensor(grid):
        raise InputError(f"grid: got {type(grid).__name__}; wanted a 1-D tensor of times.")
    if not grid.is_floating_point():
        raise InputError(f"grid: got dtype {grid.dtype}; wanted floating point. Use grid.double().")
    t = grid.detach().to("cpu", torch.float64)
    if t.dim() != 1 or len(t) < 2:
        raise InputError(
            f"grid: got shape {tuple(t.shape)}; wanted (n,) with at least two times, for instance "
            "torch.linspace(0, 1, 65)."
        )
    if not bool(t.isfinite().all()) or not bool((t.diff() > 0).all()):
        raise InputError(
            f"grid: got {_short(t)}; wanted finite, strictly increasing times. Sort the grid and drop "
            "repeated points."
        )
    return t


def _short(t: Tensor) -> str:
    values = [f"{v:.4g}" for v in t.tolist()]
    return "[" + ", ".join(values if len(values) <= 6 else [*values[:3], "...", *values[-2:]]) + "]"
