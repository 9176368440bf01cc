"""Splitting an interval: the exact conditional law of (W, H, K) on two parts given the whole.

In units of the whole interval's length L every quantity scales as sqrt(L), so one matrix M(x) for
the split ratio x says it all: with Z of independent standard normals, one for each of W, H, K,

    (W_l, H_l, K_l, W_r, H_r, K_r) = M(x) (W, H, K, sqrt(L) Z).

Means and covariances of the left part are those of B, section 2.4 (arXiv 2405.06464, Theorem 3.7);
the right part follows by solving Chen's relation.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

Row = tuple[float, ...]


@lru_cache(maxsize=4096)
def bridge_matrix(levels: int, x: float, y: float) -> tuple[Row, ...]:
    """M(x): 2*levels rows of 2*levels coefficients; levels is 1 (W), 2 (W, H) or 3 (W, H, K).

    x and y = 1 - x are the parts' shares of the length, both given lest the shorter be rounded. The
    shorter part is conditioned directly and the longer one solved for, so that both keep full
    relative precision. For the right part that is reading time backwards: only H changes sign.
    """
    if x <= y:
        return _clean(_left_then_right(levels, x, y))
    flip = (1.0, -1.0, 1.0)[:levels]
    signs = flip + (1.0,) * levels
    mirrored = [
        tuple(flip[i % levels] * sign * c for sign, c in zip(signs, row, strict=True))
        for i, row in enumerate(bridge_matrix(levels, y, x))
    ]
    return tuple(mirrored[levels:] + mirrored[:levels])


def _left_then_right(levels: int, x: float, y: float) -> list[list[float]]:
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
    """Cov[(W, H, K) of the left part | whole] at L = 1; what is not known adds its variance."""
    d = x - y
    WW = x * y * (d**4 + 4 * x * x * y * y)
    WH = -(x**3) * y * (x * x - 3 * x * y + 6 * y * y) / 2
    HH = x / 12 * (1 - x**3 * (x * x + 2 * x * y + 16 * y * y))
    cov = [
        [WW, WH, x**4 * y * d / 12],
        [WH, HH, -y * x**5 / 24],
        [x**4 * y * d / 12, -y * x**5 / 24, x / 720 * (1 - x**5)],
    ]
    mean = _mean(x, y)
    for unknown, variance in ((2, 1 / 720), (1, 1 / 12)):
        if levels <= unknown:
            for i in range(levels):
                for j in range(levels):
                    cov[i][j] += mean[i][unknown] * mean[j][unknown] * variance
    return [row[:levels] for row in cov[:levels]]


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
    """The right part that Chen's relation (B, 2.3) joins with `left` to `whole`; x + y = 1."""
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
    values: list[Tensor],
    z: list[Tensor],
    x: float,
    y: float,
    root: float | Tensor,
    consume: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """The left and right part of an interval, given `values` = [W, H, K][:levels] of the whole.

    Args:
        values, z: tensors of one shape, dtype and device; z holds independent N(0, 1), is consumed.
        x, y: lengths of the left and right part over that of the whole.
        root: sqrt(L), a float or a tensor that broadcasts.
        consume: the parts may be written over `values`.
    """
    if x == 0.5 and isinstance(root, float) and len(values) < 3:
        return _halve(values, z, root, consume)
    inputs = [*values, *(noise.mul_(root) for noise in z)]
    parts = [_combine(row, inputs) for row in bridge_matrix(len(values), x, y)]
    return parts[: len(values)], parts[len(values) :]


def _halve(
    values: list[Tensor], z: list[Tensor], root: float, consume: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """M(1/2) for W and (W, H) : what is even in time, plus or minus what is odd."""
    own = values if consume else [None] * len(values)
    if len(values) == 1:
        W_l = torch.add(z[0].mul_(root / 2), values[0], alpha=0.5)
        return [W_l], [torch.sub(values[0], W_l, out=own[0])]
    W, H = values
    first, second = z[0].mul_(root / 4), z[1].mul_(root / math.sqrt(48))
    W_l = torch.add(first, H, alpha=1.5).add_(W, alpha=0.5)
    W_r = torch.sub(W, W_l, out=own[0])
    even = first.mul_(-0.5).add_(H, alpha=0.25)
    return [W_l, even + second], [W_r, torch.sub(even, second, out=own[1])]


def _combine(row: Row, inputs: list[Tensor]) -> Tensor:
    out: Tensor | None = None
    for c, value in zip(row, inputs, strict=True):
        if c != 0.0:
            out = value * c if out is None else out.add_(value, alpha=c)
    assert out is not None
    return out
