"""Splitting an interval: the exact conditional law of (W, H, K) on two parts given the whole.

In units of the whole interval's length L every quantity scales as sqrt(L), so one matrix M(x) for the split ratio x says
it all: with Z of independent standard normals, one for each of W, H, K,

    (W_l, H_l, K_l, W_r, H_r, K_r) = M(x) (W, H, K, sqrt(L) Z).

Means and covariances of the left part: B, section 2.4 (Foster, Strange & Binghamton-free form of arXiv 2405.06464,
Theorem 3.7); the right part follows by solving Chen's relation.
"""

from __future__ import annotations

import math
from functools import lru_cache

from torch import Tensor

Row = tuple[float, ...]


@lru_cache(maxsize=4096)
def bridge_matrix(levels: int, x: float) -> tuple[Row, ...]:
    """M(x): 2*levels rows of 2*levels float64 coefficients; levels is 1 (W), 2 (W,H) or 3 (W,H,K), 0 < x < 1.

    The shorter part is conditioned directly and the longer one solved for, so that both keep full relative precision
    at any ratio. For the right part that means reading time backwards, under which only H changes sign.
    """
    if x > 0.5:
        mirrored = bridge_matrix(levels, 1.0 - x)
        sign = (1.0, -1.0, 1.0)[:levels] + (1.0,) * levels
        out = (1.0, -1.0, 1.0)[:levels]
        rows = [tuple(out[i % levels] * s * c for s, c in zip(sign, r, strict=True)) for i, r in enumerate(mirrored)]
        return tuple(rows[levels:] + rows[:levels])
    return _clean(_left_then_right(levels, x))


def _left_then_right(levels: int, x: float) -> list[list[float]]:
    y = 1.0 - x
    mean = _mean(x, y)
    noise = _factor(_covariance(levels, x, y))
    left = [mean[i][:levels] + noise[i] for i in range(levels)]
    columns = []
    for j in range(2 * levels):
        whole = [1.0 if i == j else 0.0 for i in range(levels)]
        columns.append(_complement(whole, [row[j] for row in left], x, y))
    right = [[column[i] for column in columns] for i in range(levels)]
    return left + right


def _mean(x: float, y: float) -> list[list[float]]:
    """E[(W, H, K) of the left part | whole], rows by columns W, H, K."""
    return [
        [x, 6 * x * y, 60 * x * y * (y - x)],
        [0.0, x * x, 30 * x * x * y],
        [0.0, 0.0, x**3],
    ]


def _covariance(levels: int, x: float, y: float) -> list[list[float]]:
    """Cov[(W, H, K) of the left part | whole] at L = 1. Knowing less adds the variance of what is not known."""
    d = x - y
    cov = [
        [x * y * (d**4 + 4 * x * x * y * y), -(x**3) * y * (x * x - 3 * x * y + 6 * y * y) / 2, 0.0],
        [0.0, x / 12 * (1 - x**3 * (x * x + 2 * x * y + 16 * y * y)), -y * x**5 / 24],
        [0.0, 0.0, x / 720 * (1 - x**5)],
    ]
    cov[0][2] = x**4 * y * d / 12
    mean = _mean(x, y)
    for unknown, variance in ((2, 1 / 720), (1, 1 / 12)):
        if levels <= unknown:
            for i in range(levels):
                for j in range(i, levels):
                    cov[i][j] += mean[i][unknown] * mean[j][unknown] * variance
    return [[cov[min(i, j)][max(i, j)] for j in range(levels)] for i in range(levels)]


def _factor(cov: list[list[float]]) -> list[list[float]]:
    """The lower Cholesky factor of a small positive definite matrix."""
    n = len(cov)
    low = [[0.0] * n for _ in range(n)]
    for i in range(n):
        for j in range(i + 1):
            rest = cov[i][j] - sum(low[i][k] * low[j][k] for k in range(j))
            low[i][j] = math.sqrt(rest) if i == j else rest / low[j][j]
    return low


def _complement(whole: list[float], left: list[float], x: float, y: float) -> list[float]:
    """The right part that Chen's relation (B, 2.3) joins with ``left`` to ``whole``; lengths x + y = 1."""
    w, w1 = whole[0], left[0]
    w2 = w - w1
    right = [w2]
    if len(whole) > 1:
        h1 = left[1]
        h2 = (whole[1] - x * (h1 - w2 / 2)) / y - w1 / 2
        right.append(h2)
        if len(whole) > 2:
            rest = x * x * left[2] + x * y / 2 * (h1 - h2) + (x - y) / 12 * (x * w2 - y * w1)
            right.append((whole[2] - rest) / (y * y))
    return right


def _clean(rows: list[list[float]]) -> tuple[Row, ...]:
    """Zeroes that rounding left at 1e-17 become zeroes, which cost nothing to add."""
    out = []
    for row in rows:
        size = max(abs(c) for c in row)
        out.append(tuple(c if abs(c) > 1e-16 * size else 0.0 for c in row))
    return tuple(out)


def split(
    values: list[Tensor], z: list[Tensor], x: float, root: float | Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """The left and right part of an interval, given ``values`` = [W, H, K][:levels] of the whole.

    ``z``: as many tensors of independent N(0, 1), consumed. ``root``: sqrt(L), a float or a tensor that broadcasts.
    All of one shape, dtype and device. Every product is rounded before it is added, so that the result is the same to the
    bit however many intervals are split in one call.
    """
    for noise in z:
        noise.mul_(root)
    if x == 0.5 and len(values) < 3:
        return _halve(values, z)
    inputs = [*values, *z]
    parts = [_combine(row, inputs) for row in bridge_matrix(len(values), x)]
    return parts[: len(values)], parts[len(values) :]


def _halve(values: list[Tensor], z: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Equal parts for W and (W, H): what is even in time, plus or minus what is odd. M(1/2) with fewer operations."""
    even = values[0] * 0.5
    if len(values) == 1:
        odd = z[0].mul_(0.5)
        return [even + odd], [even.sub_(odd)]
    first, second = z
    odd = values[1] * 1.5
    odd.add_(first.mul_(0.25))
    W_l, W_r = even + odd, even.sub_(odd)
    even = values[1] * 0.25
    even.sub_(first.mul_(0.5))
    second.mul_(1 / math.sqrt(48))
    return [W_l, even + second], [W_r, even.sub_(second)]


def _combine(row: Row, inputs: list[Tensor]) -> Tensor:
    out: Tensor | None = None
    for c, value in zip(row, inputs, strict=True):
        if c != 0.0:
            term = value * c
            out = term if out is None else out.add_(term)
    assert out is not None
    return out
