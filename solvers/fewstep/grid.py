"""Time grids as 1-D float64 tensors: decreasing sigmas for diffusion, checked times for SDEs."""

import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _validation
from ._tracing import decode, encode, while_tracing
from .errors import InputError
from .schedule import FlowMatching, Schedule, check_schedule

SIGMA_SPACINGS = ("logsnr", "karras", "exponential", "kl_optimal", "linear_quadratic")
TIME_SPACINGS = ("uniform", "quadratic", "beta", "linspace", "leading", "trailing")
FINALS = ("x0", "sigma_min")
MOST = 10**6  # steps: a plan is a table in memory with a row per step

Spacing = str | Tensor | Sequence[float]
"""A name in `spacing_names`, or decreasing levels above 0 that are interpolated; a last level of 0 means sigma_min."""


def sigma_grid(
    schedule: Schedule, steps: int, spacing: Spacing = "logsnr", final: str = "x0", rho: float | None = None, *,
    timesteps: Tensor | None = None, offset: int = 0,
) -> Tensor:  # fmt: skip
    """(steps + 1,) decreasing noise levels from the schedule's largest.

    Args:
        schedule: the forward process; the grid starts at its `sigma_max`, or at the first of `timesteps`.
        steps: number of intervals.
        spacing: in sigma: `"logsnr"` is even in log sigma; `"karras"` even in sigma^(1/rho), rho = 7
            (arXiv 2206.00364, Eq. 5); `"exponential"` has log sigma even in u^rho, rho = 1; `"kl_optimal"` is even
            in arctan(sigma) (arXiv 2404.14507, Theorem 3.1); `"linear_quadratic"` takes half of the steps evenly
            from sigma_max to 0.975 sigma_max and the others quadratically, for flows in t = sigma / (1 + sigma).
            In time: `"uniform"` and `"quadratic"` are even in t and in sqrt(t); `"beta"` has the quantiles of
            Beta(0.6, 0.6) (arXiv 2407.12173), rounded to labels where these differ; `"linspace"`, `"leading"` and
            `"trailing"` are the rules of arXiv 2305.08891, Table 2, on integer labels where the schedule
            has them and on [t_min, t_max] otherwise. `"leading"` starts below the largest sigma.
            Published for a network: `"ays-sd15"`, `"ays-sdxl"`, `"ays-svd"` (arXiv 2404.14507), `"gits-0.80"` to
            `"gits-1.50"` in steps of 0.05 (Stable Diffusion 1.5, arXiv 2405.11326), `"oss-flux"`, `"oss-wan"`,
            `"oss-chroma"` (arXiv 2503.21774). Or (n,) decreasing levels, such as `fit_grid` returns. Published
            grids and levels are interpolated at other step counts: their logarithm is linear between nodes.
        final: `"x0"` ends at sigma = 0: the last step is the denoiser's own estimate, and `steps` is the
            number of evaluations of a one-evaluation solver. `"sigma_min"` ends at the smallest sigma.
        rho: the exponent of `"karras"` and `"exponential"`, above 0; other spacings ignore it.
        timesteps: (steps,) decreasing model times of the evaluations; overrides spacing.
        offset: added to the labels of `"leading"` (diffusers' steps_offset).
    """
    if torch.compiler.is_dynamo_compiling():  # not in `_levels_text`
        levels = decode(_levels_text(schedule, steps, spacing, final, rho, timesteps, offset))
        return torch.tensor(levels, dtype=torch.float64)
    check_schedule(schedule)
    steps = _validation.check_int("steps", steps, 1, MOST)
    spacing = check_spacing("spacing", spacing)
    _validation.check_choice("final", final, FINALS)
    offset = _validation.check_int("offset", offset, 0)
    if rho is not None and not _validation.check_float("rho", rho) > 0:
        raise InputError(f"rho: got {rho!r}, expected a number above 0.")
    count = steps if final == "x0" else steps + 1
    first, last = torch.tensor([[schedule.sigma_max], [schedule.sigma_min]], dtype=torch.float64)
    if timesteps is not None:
        nodes = schedule.sigma(_check_timesteps(timesteps, steps))
        if not bool((nodes.isfinite() & (nodes > 0)).all()):
            span = " to ".join(f"{float(t):.4g}" for t in schedule.time(torch.cat([first, last]).flatten()))
            raise InputError(f"timesteps: got {short(timesteps)}; expected model times of this schedule, {span}.")
        ends = last if final == "sigma_min" and nodes[-1] > last * (1 + 1e-9) else last[:0]
    elif not isinstance(spacing, str) or spacing in ("beta", "linear_quadratic", *published()):
        nodes, ends = _spaced(schedule, steps, count, spacing), (last if final == "sigma_min" else last[:0])
    elif spacing in ("linspace", "leading", "trailing"):
        # a trailing grid stops above sigma_min; the others reach it by themselves
        reaches = final == "sigma_min" and spacing != "trailing"
        nodes = schedule.sigma(_table_2(schedule, count if reaches else steps, spacing, offset))
        nodes, ends = (nodes[:-1] if reaches else nodes), (last if final == "sigma_min" else last[:0])
    else:
        nodes, ends = _between(schedule, count, spacing, rho, first, last), last[:0]
        nodes[0] = first[0]
    return torch.cat([nodes, first.new_zeros(1) if final == "x0" else ends])


@while_tracing
def _levels_text(*args: Any) -> str:
    *first, timesteps, offset = args
    return encode(sigma_grid(*first, timesteps=timesteps, offset=offset).tolist())


def _between(schedule: Schedule, count: int, spacing: str, rho: float | None, first: Tensor, last: Tensor) -> Tensor:
    """Nodes from the largest sigma to the smallest."""
    u = torch.linspace(0, 1, count, dtype=torch.float64)
    if spacing == "karras":
        r = 7.0 if rho is None else rho
        return torch.lerp(first ** (1 / r), last ** (1 / r), u).pow(r)
    if spacing == "kl_optimal":
        return torch.tan(torch.lerp(first.atan(), last.atan(), u))
    if spacing in SIGMA_SPACINGS:
        u = u ** (1.0 if rho is None or spacing == "logsnr" else rho)
        return torch.exp(torch.lerp(first.log(), last.log(), u))
    power = 1 if spacing == "uniform" else 2
    start, end = (schedule.time(s) ** (1 / power) for s in (first, last))
    return schedule.sigma(torch.lerp(start, end, u) ** power)


def _spaced(schedule: Schedule, steps: int, count: int, spacing: str | Tensor) -> Tensor:
    """(steps,) levels by a rule or a table that counts the end of the grid as a node."""
    top, bottom = schedule.sigma_max, schedule.sigma_min
    low, high = (v / (1 + v) for v in (bottom, top))  # flows: sigma = t / (1 - t)
    i = torch.arange(count, dtype=torch.float64)
    flow = spacing == "linear_quadratic" and isinstance(schedule, FlowMatching)
    if spacing == "beta":
        start, end = schedule.time(torch.tensor([top, bottom], dtype=torch.float64)).unbind()
        t = end + _beta_quantiles(1 - i / steps) * (start - end)
        labels = t.round()
        nodes = schedule.sigma(labels if schedule.labels is not None and bool((labels.diff() < 0).all()) else t)
    elif spacing == "linear_quadratic":
        half, threshold = max(steps // 2, 1), 0.025
        bend = (half - threshold * steps) / half / max(steps - half, 1) ** 2
        level = 1 - threshold * i / half - bend * (i - half).clamp(min=0).square()
        nodes = level * (high if flow else top)
    else:
        clock, tables = published()[spacing] if isinstance(spacing, str) else ("sigma", [spacing])
        table = next((t for t in tables if len(t) == steps + 1), tables[-1])
        flow = clock == "flow"
        # the ends may be beyond this schedule's, by the digits of a table or its infinite level of a flow
        first, last = table[:1].clamp(max=high if flow else top), table[-1:].clamp(min=low if flow else bottom)
        nodes = interpolated(torch.cat([first, table[1:-1], last]), steps + 1)
    nodes = nodes[:steps] / (1 - nodes[:steps]) if flow else nodes[:steps]
    if not (bool((nodes.diff() < 0).all()) and bottom < nodes[-1] <= nodes[0] <= top * (1 + 1e-9)):
        raise InputError(
            f"spacing: got {repr(spacing) if isinstance(spacing, str) else 'a tensor'}, whose levels on {steps} steps "
            f"are {short(nodes)}; expected decreasing ones between the schedule's {bottom:.4g} and {top:.4g}. Choose "
            "a grid that was made for this kind of model."
        )
    return nodes


def interpolated(levels: Tensor, count: int) -> Tensor:
    """(count,) levels from the first to the last, their logarithm piecewise linear in the index."""
    at = torch.linspace(0, len(levels) - 1, count, dtype=torch.float64)
    low = at.floor().clamp(max=len(levels) - 2).long()
    logs = levels.log()
    return torch.exp(torch.lerp(logs[low], logs[low + 1], at - low))


def _beta_quantiles(p: Tensor, a: float = 0.6) -> Tensor:
    """The quantiles of the symmetric Beta(a, a), by Newton's method on the series of its distribution function."""
    k = torch.arange(60, dtype=torch.float64)
    ratios = torch.cat([k.new_ones(1), ((2 * a + k) / (a + 1 + k)).cumprod(0)])
    density = math.exp(math.lgamma(2 * a) - 2 * math.lgamma(a))
    tail = torch.minimum(p, 1 - p)
    x = (tail * a / density).pow(1 / a).clamp(max=0.5)
    for _ in range(8):  # the function is concave below 1/2: it converges from below
        below = (x * (1 - x)) ** a / a * (ratios * x[:, None] ** torch.arange(61)).sum(1)
        x = x - (below - tail / density) * (x * (1 - x)) ** (1 - a)
    return torch.where(p > 0.5, 1 - x, x)


@cache
def published() -> dict[str, tuple[str, list[Tensor]]]:
    """Published grids by name: the clock of their levels, and a grid for each number of steps that was published."""
    found: dict[str, tuple[str, list[Tensor]]] = {}
    for family in json.loads(Path(__file__).with_name("published_grids.json").read_text()).values():
        for name, grids in family["grids"].items():
            tables = [torch.tensor(grid, dtype=torch.float64) for grid in grids]
            if "levels" in family:  # the grids are indices into them
                tables = [torch.tensor(family["levels"], dtype=torch.float64)[t.long()] for t in tables]
            found[name] = family["clock"], tables
    return found


def spacing_names() -> list[str]:
    """The names that `sigma_grid` knows."""
    return [*SIGMA_SPACINGS, *TIME_SPACINGS, *published()]


def check_spacing(argument: str, spacing: Any) -> str | Tensor:
    """A name of a spacing, or a user's levels (n,) in float64."""
    if spacing is None or isinstance(spacing, str):
        return _validation.check_choice(argument, spacing, spacing_names())
    return check_sigmas(spacing, argument=argument)


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
            f"timesteps: got {short(t)}; expected ({steps},) strictly decreasing model times. Reverse increasing ones."
        )
    return t


def check_sigmas(sigmas: Any, repeat: bool = False, argument: str = "sigmas", *, rising: bool = False) -> Tensor:
    """A user's grid as (n,) float64, n >= 2, decreasing, not below 0.

    With `repeat` the last level may stand twice; with `rising` the levels may increase instead, from above 0.
    """
    s = _validation.check_numbers(argument, sigmas)
    if s.dim() != 1 or len(s) < 2 or not bool(s.isfinite().all()):
        raise InputError(f"{argument}: got {short(s)} of shape {tuple(s.shape)}; expected (n,) finite numbers, n >= 2.")
    distinct = s[:-1] if repeat and len(s) > 2 and s[-1] == s[-2] else s
    if rising and bool((s.diff() > 0).all()) and s[0] >= 0:
        if s[0] == 0:
            raise InputError(
                f"{argument}: got {short(s)}; an increasing grid starts above 0. Begin with, for instance, 1e-4."
            )
        return s
    if not bool((distinct.diff() < 0).all()) or s[-1] < 0:
        raise InputError(
            f"{argument}: got {short(s)}; expected strictly decreasing noise levels, the last >= 0. Reverse increasing "
            "ones, and drop repeated ones."
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
