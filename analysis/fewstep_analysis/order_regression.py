"""An order from errors: slopes, their intervals, the range that can be trusted, and a verdict in words.

The method. Let E_l be the error at level l (2^l steps) over n paths. Each path's share in log2 E_l (its
influence, the delta method) is kept on all levels, so that a slope's standard error knows that the same
paths were used on all of them: their errors are strongly correlated and cancel in the slope. That is what
a bootstrap over paths gives in the limit, at the cost of one pass.

Sampling error is not all. Coarse levels bend (terms of higher order still count) and fine ones flatten (the
reference's own error). So
- levels whose error is less than 8 times the reference's own are left out (its share in a slope is then
  below 0.02);
- from the finest slope backwards, levels are kept while their slopes agree with the finer ones within
  0.05 and twice the standard error of the difference; coarser ones are the pre-asymptotic range;
- a second fit, log2 E = c - p l + a sqrt(h) over all usable levels, asks whether there is a bend. Where a is
  more than two standard errors from nought, the interval is stretched to that fit's p, the slope where the
  bend has run out. Otherwise it is the slope's 1.96 standard errors.

Limits. The interval does not cover a bend that sampling hides; `bent`, the second fit's own interval, does,
and the verdict consults both before it speaks against a card. A bend that is slower than sqrt(h), or that
starts below the finest level, is not seen by either. The interval
is Gaussian: where a handful of paths carries the mean square (`paths_that_count` small) it is too narrow,
and the verdict says so. Slopes of differences between levels show the rate at which a solver converges, not
to what: compare with another solver's limit for that (a reference that is a solver does).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Z95 = 1.96
FLOOR_FACTOR = 8.0
AGREE = 0.05
NEAR = 0.1  # what a verdict forgives: far less than the half that tells orders apart
LOG2 = math.log(2)
TOO_WIDE = (
    0.2  # a half-width of sampling at which neighbouring half orders can no longer be told apart with ease
)
TOO_BENT = 0.35  # a half-width with the bend's share
CARRIED = 30


class Logs(NamedTuple):
    """log2 of the error (L,), each path's influence on it (n, L), and which levels may be believed."""

    log: Tensor
    influence: Tensor
    usable: list[bool]


def strong_logs(errors: Tensor, floor: float = 0.0) -> Logs:
    """Of (n, L) errors; levels near the floor (the reference's own RMSE) are not usable."""
    square = errors.square()
    mean = square.mean(0)
    usable = (mean.sqrt() > FLOOR_FACTOR * floor).tolist()
    tiny = torch.finfo(errors.dtype).tiny
    return Logs(
        0.5 * torch.log2(mean.clamp(min=tiny)), (square / mean.clamp(min=tiny) - 1) / (2 * LOG2), usable
    )


def weak_logs(differences: Tensor, floor: float = 0.0) -> Logs:
    """Of (n, L) signed differences of a test function; levels whose mean drowns in noise are not usable."""
    mean = differences.mean(0)
    error = differences.std(0) / math.sqrt(len(differences))
    usable = ((mean.abs() > 4 * error) & (mean.abs() > FLOOR_FACTOR * floor)).tolist()
    safe = torch.where(mean == 0, torch.finfo(differences.dtype).tiny, mean)
    return Logs(torch.log2(safe.abs()), (differences / safe - 1) / LOG2, usable)


def fit(logs: Logs, levels: Sequence[int]) -> dict[str, Any]:
    """The fields of an estimate that are about slopes."""
    x = torch.tensor(levels, dtype=torch.float64)
    local = -logs.log.diff() / x.diff()
    moves = -logs.influence.diff(dim=1) / x.diff()
    spread = Z95 * standard_error(moves)
    first, last = trusted(logs.usable, local, moves)
    centred = x[first : last + 1] - x[first : last + 1].mean()
    weights = -centred / centred.square().sum()
    order = float(logs.log[first : last + 1] @ weights)
    move = logs.influence[:, first : last + 1] @ weights
    sampling = Z95 * float(standard_error(move))
    low, high = order - sampling, order + sampling
    bent, half, significant = bent_fit(logs, x, *run(logs.usable))
    if significant:
        # a fit of three parameters may run far out on few levels; more than one order is no news
        low, high = min(low, max(bent, order - 1)), max(high, min(bent, order + 1))
    band = Z95 * standard_error(logs.influence)
    return {
        "order": order, "low": low, "high": high,
        "sampling": sampling, "bent": [bent - half, bent + half],
        "used": [int(v) for v in levels[first : last + 1]],
        "usable": list(logs.usable), "local": local.tolist(),
        "local_low": (local - spread).tolist(), "local_high": (local + spread).tolist(),
        "error": (2**logs.log).tolist(), "error_low": (2 ** (logs.log - band)).tolist(),
        "error_high": (2 ** (logs.log + band)).tolist(),
    }  # fmt: skip


def standard_error(influence: Tensor) -> Tensor:
    """Of a mean of influences, over the first axis."""
    return influence.square().mean(0).div(len(influence)).sqrt()


def bent_fit(logs: Logs, x: Tensor, first: int, last: int) -> tuple[float, float, bool]:
    """The slope when a bend like sqrt(h) has run out, its half-width, and whether there is such a bend."""
    if last - first < 2:
        return float("nan"), float("nan"), False
    levels = x[first : last + 1]
    design = torch.stack([torch.ones_like(levels), -levels, 2 ** (-0.5 * (levels - levels[0]))], 1)
    solve = torch.linalg.pinv(design)
    _, order, bend = solve @ logs.log[first : last + 1]
    spread = standard_error(logs.influence[:, first : last + 1] @ solve.mT)
    return float(order), Z95 * float(spread[1]), abs(float(bend)) > 2 * float(spread[2])


def run(usable: Sequence[bool]) -> tuple[int, int]:
    """First and last of the longest run of usable levels, the finest of equals; all where none is."""
    best, first = (0, -1), 0
    for i, ok in enumerate([*usable, False]):
        if not ok:
            if i - first >= best[1] - best[0] + 1 and i > first:
                best = (first, i - 1)
            first = i + 1
    return best if best[1] > best[0] else (0, len(usable) - 1)


def trusted(usable: Sequence[bool], local: Tensor, moves: Tensor) -> tuple[int, int]:
    """First and last level to fit: of the usable ones the finest slope, and backwards while slopes agree."""
    start, last = run(usable)
    first = last - 1
    while first > start:
        tail, finer = local[first:last].mean(), moves[:, first:last].mean(1)
        slack = AGREE + 2 * float(standard_error(moves[:, first - 1] - finer))
        if abs(float(local[first - 1] - tail)) > slack:
            break
        first -= 1
    return first, last


def verdict(found: dict[str, Any], declared: float | None, t1: float, n: int, carried: float) -> str:
    """What the numbers allow to say, in plain words."""
    levels, usable, notes = found["levels"], found["usable"], []
    first, last = run(usable)
    if last < len(levels) - 1 or not any(usable):
        cause = "reference floor reached" if found["kind"] == "strong" else "bias lost in sampling noise"
        notes.append(f"{cause} below h = {t1 / 2 ** levels[last if any(usable) else 0]:.3g}")
    if sum(usable[first : last + 1]) < 3:
        return "cannot tell: " + "; ".join([*notes, "fewer than three levels can be used"])
    if found["used"][0] > levels[0]:
        notes.append(f"pre-asymptotic above h = {t1 / 2 ** found['used'][0]:.3g}")
    if carried < CARRIED:
        notes.insert(0, f"{carried:.0f} of {n} paths carry the RMSE, read the median")
    said, half = _consistent(found, declared), found["sampling"]
    if half > TOO_WIDE:
        said = f"too few paths to tell: about {int(1.2 * n * (half / TOO_WIDE) ** 2)} would do"
    elif found["high"] - found["low"] > 2 * TOO_BENT:
        between = f"between {found['low']:.2f} and {found['high']:.2f}"
        said = f"cannot tell: still bending, {between}; take finer levels"
    return "; ".join([said, *notes])


def _consistent(found: dict[str, Any], declared: float | None) -> str:
    low, high = found["low"] - NEAR, found["high"] + NEAR
    nearest = round(2 * found["order"]) / 2
    if declared is not None and low <= declared <= high:
        return f"consistent with order {declared:.1f}"
    said = f"order {found['order']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"
    if low <= nearest <= high:
        said = f"consistent with order {nearest:.1f}"
    if declared is None:
        return said
    if found["bent"][0] <= declared <= found["bent"][1]:
        return f"{said}; a bend towards the declared {declared:.1f} is not excluded, take more paths"
    return f"{said}, not with the declared {declared:.1f}"
