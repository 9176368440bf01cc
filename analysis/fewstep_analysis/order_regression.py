"""An order of convergence from errors: slopes, intervals, the refinements that can be trusted, a verdict.

Method. Let E_l be the error at refinement l (2^l steps) over n paths. The influence of each path on log2 E_l (delta
method) is kept at all refinements, so the standard error of a slope accounts for the strong correlation of errors
along the same paths, which cancels in the slope. A bootstrap over paths gives the same in the limit, at a higher
cost.

Sampling error is not the only error. Coarse refinements bend (terms of higher order still count) and fine ones
flatten (error of the reference). Therefore
- refinements whose error is less than 8 times that of the reference are excluded (its contribution to a slope is
  then below 0.02);
- from the finest slope backwards, refinements are kept while their slopes agree with the finer ones within 0.05 plus
  twice the standard error of the difference; coarser ones are the pre-asymptotic range;
- a second fit, log2 E = c - p l + a sqrt(h) over all usable refinements, tests for a bend. Where a is more than two
  standard errors from zero, the interval is extended to the p of that fit, the slope when the bend has vanished.
  Otherwise the interval is the slope plus or minus 1.96 standard errors.

Limits. The interval does not cover a bend that is hidden by sampling error; `bent`, the interval of the second fit,
does, and the verdict uses both before it contradicts a declared order. Neither sees a bend that is slower than
sqrt(h) or that begins below the finest refinement. The interval is Gaussian: where a few paths carry the mean square
(`paths_that_count` is small) it is too narrow, and the verdict states it. Differences of consecutive refinements show
the rate at which a solver converges, not its limit; a reference solver shows both.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Z95 = 1.96
FLOOR_FACTOR = 8.0
AGREE = 0.05
NEAR = 0.1  # tolerance of a verdict, far below the 0.5 between orders
LOG2 = math.log(2)
TOO_WIDE = 0.2  # sampling half-width at which neighbouring half orders become hard to distinguish
TOO_BENT = 0.35  # half-width including the bend
CARRIED = 30


class Logs(NamedTuple):
    """log2 of the error (L,), the influence of each path on it (n, L), and which refinements are usable."""

    log: Tensor
    influence: Tensor
    usable: list[bool]


def strong_logs(errors: Tensor, floor: float = 0.0) -> Logs:
    """Logs of (n, L) errors; refinements near the floor (the RMSE of the reference) are not usable."""
    square = errors.square()
    mean = square.mean(0)
    safe = mean.clamp(min=torch.finfo(errors.dtype).tiny)
    usable = (mean.sqrt() > FLOOR_FACTOR * floor).tolist()
    return Logs(0.5 * torch.log2(safe), (square / safe - 1) / (2 * LOG2), usable)


def weak_logs(differences: Tensor, floor: float = 0.0) -> Logs:
    """Logs of (n, L) signed differences of a test function.

    Refinements whose mean is not four standard errors from zero are not usable.
    """
    mean = differences.mean(0)
    error = differences.std(0) / math.sqrt(len(differences))
    usable = ((mean.abs() > 4 * error) & (mean.abs() > FLOOR_FACTOR * floor)).tolist()
    safe = torch.where(mean == 0, torch.finfo(differences.dtype).tiny, mean)
    return Logs(torch.log2(safe.abs()), (differences / safe - 1) / LOG2, usable)


def fit(logs: Logs, levels: Sequence[int]) -> dict[str, Any]:
    """The fields of an `OrderEstimate` that describe slopes."""
    x = torch.tensor(levels, dtype=torch.float64)
    local = -logs.log.diff() / x.diff()
    moves = -logs.influence.diff(dim=1) / x.diff()
    spread = Z95 * _standard_error(moves)
    first, last = _trusted(logs.usable, local, moves)
    centred = x[first : last + 1] - x[first : last + 1].mean()
    weights = -centred / centred.square().sum()
    order = float(logs.log[first : last + 1] @ weights)
    sampling = Z95 * float(_standard_error(logs.influence[:, first : last + 1] @ weights))
    low, high = order - sampling, order + sampling
    bent, half, significant = _bent_fit(logs, x, *_usable_run(logs.usable))
    if significant:
        # the fit of three parameters is ill-conditioned on few refinements: cap its effect at one order
        low, high = min(low, max(bent, order - 1)), max(high, min(bent, order + 1))
    band = Z95 * _standard_error(logs.influence)
    return {
        "order": order, "low": low, "high": high,
        "sampling": sampling, "bent": [bent - half, bent + half],
        "used": [int(v) for v in levels[first : last + 1]],
        "usable": list(logs.usable), "local": local.tolist(),
        "local_low": (local - spread).tolist(), "local_high": (local + spread).tolist(),
        "error": (2**logs.log).tolist(), "error_low": (2 ** (logs.log - band)).tolist(),
        "error_high": (2 ** (logs.log + band)).tolist(),
    }  # fmt: skip


def _standard_error(influence: Tensor) -> Tensor:
    """The standard error of a mean of influences, over the first axis."""
    return influence.square().mean(0).div(len(influence)).sqrt()


def _bent_fit(logs: Logs, x: Tensor, first: int, last: int) -> tuple[float, float, bool]:
    """The slope without a bend like sqrt(h), its half-width, and whether the bend is significant."""
    if last - first < 2:
        return float("nan"), float("nan"), False
    levels = x[first : last + 1]
    design = torch.stack([torch.ones_like(levels), -levels, 2 ** (-0.5 * (levels - levels[0]))], 1)
    solve = torch.linalg.pinv(design)
    _, order, bend = solve @ logs.log[first : last + 1]
    spread = _standard_error(logs.influence[:, first : last + 1] @ solve.mT)
    return float(order), Z95 * float(spread[1]), abs(float(bend)) > 2 * float(spread[2])


def _usable_run(usable: Sequence[bool]) -> tuple[int, int]:
    """First and last index of the longest usable run, the finest in a tie; all indices if there is none."""
    best, first = (0, -1), 0
    for i, ok in enumerate([*usable, False]):
        if not ok:
            if i - first >= best[1] - best[0] + 1 and i > first:
                best = (first, i - 1)
            first = i + 1
    return best if best[1] > best[0] else (0, len(usable) - 1)


def _trusted(usable: Sequence[bool], local: Tensor, moves: Tensor) -> tuple[int, int]:
    """First and last index to fit: the finest usable slope, and coarser ones while the slopes agree."""
    start, last = _usable_run(usable)
    first = last - 1
    while first > start:
        tail, finer = local[first:last].mean(), moves[:, first:last].mean(1)
        slack = AGREE + 2 * float(_standard_error(moves[:, first - 1] - finer))
        if abs(float(local[first - 1] - tail)) > slack:
            break
        first -= 1
    return first, last


def verdict(found: dict[str, Any], declared: float | None, t1: float, n: int, carried: float) -> str:
    """Return the conclusion that the numbers support, as text.

    Args:
        found: the result of `fit` with `kind` and `levels`.
        declared: the order that the solver declares, if any.
        t1: the length of the time interval.
        n: the number of paths.
        carried: how many paths carry the RMSE (`OrderEstimate.paths_that_count`).
    """
    levels, usable, notes = found["levels"], found["usable"], []
    first, last = _usable_run(usable)
    if last < len(levels) - 1 or not any(usable):
        cause = "reference floor reached" if found["kind"] == "strong" else "bias lost in sampling noise"
        notes.append(f"{cause} below h = {t1 / 2 ** levels[last if any(usable) else 0]:.3g}")
    if sum(usable[first : last + 1]) < 3:
        return "cannot tell: " + "; ".join([*notes, "fewer than three levels can be used"])
    if not math.isfinite(found["order"]):
        return "cannot tell: " + "; ".join([*notes, "errors that are not finite"])
    if found["used"][0] > levels[0]:
        notes.append(f"pre-asymptotic above h = {t1 / 2 ** found['used'][0]:.3g}")
    if carried < CARRIED:
        notes.insert(0, f"{carried:.0f} of {n} paths carry the RMSE, read the median")
    conclusion, half = _compare(found, declared), found["sampling"]
    if half > TOO_WIDE:
        needed = 1.2 * n * (half / TOO_WIDE) ** 2
        conclusion = "too few paths" + (f": about {int(needed)} are needed" if math.isfinite(needed) else "")
    elif found["high"] - found["low"] > 2 * TOO_BENT:
        between = f"between {found['low']:.2f} and {found['high']:.2f}"
        conclusion = f"cannot tell: still bending, {between}; use finer levels"
    return "; ".join([conclusion, *notes])


def _compare(found: dict[str, Any], declared: float | None) -> str:
    low, high = found["low"] - NEAR, found["high"] + NEAR
    nearest = round(2 * found["order"]) / 2
    if declared is not None and low <= declared <= high:
        return f"consistent with order {declared:.1f}"
    measured = f"order {found['order']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"
    if low <= nearest <= high:
        measured = f"consistent with order {nearest:.1f}"
    if declared is None:
        return measured
    if found["bent"][0] <= declared <= found["bent"][1]:
        return f"{measured}; a bend towards the declared {declared:.1f} is not excluded, use more paths"
    return f"{measured}, not with the declared {declared:.1f}"
