"""Where the unit normals of a plan come from: the Brownian path of a seed, or a given path."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _validation
from .brownian import BrownianPath
from .brownian.increment import LEVY_ORDER, Path
from .brownian.random_normals import key_of
from .errors import InputError
from .executor import Draw
from .plan import Plan

Generators = torch.Generator | list[torch.Generator]


def each_seed(seeds: Any) -> list[int]:
    """A user's seeds, one a sample, as whole numbers."""
    given = seeds.tolist() if torch.is_tensor(seeds) else seeds
    given = _validation.check_sequence("seeds", given, "whole numbers, one for each sample")
    return [_validation.check_seed(s, "seeds") for s in given]


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
        raise InputError(f"seeds: got {len(source)}, expected one for each of the {shape[0]} samples.")
    return torch.cat([unit_normals((1, *shape[1:]), one, dtype, device) for one in source])


def plan_normals(
    plan: Plan, x: Tensor, seed: int | list[int], path: Path | None = None, *, sigma_min: float
) -> Draw:
    """The source of a plan's unit normals: a path in tau = 1/sigma^2, and fresh normals for churn.

    Args:
        x: (*batch, *event) the samples: shape, dtype and device of the normals.
        seed: of the path and of the normals off it; or one per sample.
        path: used instead of the path of the seed.
        sigma_min: the smallest level of the schedule, to which the path of the seed reaches.

    Raises:
        InputError: a path that lacks Lévy data, has another shape or does not cover the plan's intervals.
    """
    letters = plan.stage_noise.shape[-1]
    if plan.levy and path is None:
        path = path_of(plan, x, sigma_min, _shifted(seed, 1))
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
    if not hasattr(path, "increment") or getattr(path, "levy", None) not in LEVY_ORDER:
        raise InputError(
            f"path: got {_validation.describe(path)}, expected a BrownianPath in the clock 1/sigma^2."
        )
    if LEVY_ORDER[path.levy] < plan.stage_noise.shape[-1]:
        raise InputError(
            f"path: got levy={path.levy!r}; {plan.name} needs {plan.levy!r}. Make the path with "
            f"levy={plan.levy!r}."
        )
    if tuple(getattr(path, "shape", x.shape)) != tuple(x.shape):
        raise InputError(
            f"path: got shape {tuple(path.shape)}, expected {tuple(x.shape)} as the samples have."
        )
    used = plan.noise[plan.noise[:, 1] > plan.noise[:, 0]]
    if len(used) and hasattr(path, "t0"):
        first, last = float(used.min()), float(used.max())
        slack = 1 + 1e-9
        if path.t0 > first * slack or path.t1 * slack < last:
            raise InputError(
                f"path: got [{path.t0:g}, {path.t1:g}]; {plan.name} needs [{first:g}, {last:g}] in the clock "
                "tau = 1/sigma^2. Make the path from 1/sigma_first^2 to 1/sigma_last^2 with clock='log'."
            )
