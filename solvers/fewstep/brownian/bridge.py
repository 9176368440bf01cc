"""Splitting an interval: the exact conditional law of (W, H, K) on its two parts.

With the interval's length L as the unit every quantity scales as sqrt(L), so one matrix M(x) per
split ratio x describes the law. With one standard normal in Z for each of W, H, K,

    (W_l, H_l, K_l, W_r, H_r, K_r) = M(x) (W, H, K, sqrt(L) Z).

Means and covariances of the left part are from arXiv 2405.06464 (B below), Theorem 3.7; the right
part follows by solving Chen's relation.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

Row = tuple[float, ...]


@lru_cache(maxsize=4096)
def bridge_matrix(letters: int, x: float, y: float) -> tuple[Row, ...]:
    """M(x): 2*letters rows of 2*letters coefficients; letters is 1 (W), 2 (W, H) or 3 (W, H, K).

    x and y = 1 - x are the parts' shares of the length; both are given because 1 - x may round. The
    shorter part is conditioned directly and the longer one solved for, so both keep full relative
    precision. If the right part is shorter, time is reversed: only H changes sign.
    """
    if x <= y:
        return _clean(_left_then_right(letters, x, y))
    flip = (1.0, -1.0, 1.0)[:letters]
    signs = flip + (1.0,) * letters
    mirrored = [
        tuple(flip[i % letters] * sign * c for sign, c in zip(signs, row, strict=True))
        for i, row in enumerate(bridge_matrix(letters, y, x))
    ]
    return tuple(mirrored[letters:] + mirrored[:letters])


def _left_then_right(letters: int, x: float, y: float) -> list[list[float]]:
    mean = _mean(x, y)
    noise = _factor(_covariance(letters, x, y))
    left = [mean[i][:letters] + noise[i] for i in range(letters)]
    columns = []
    for j in range(2 * letters):
        full = [1.0 if i == j else 0.0 for i in range(letters)]
        columns.append(_complement(full, [row[j] for row in left], x, y))
    right = [[column[i] for column in columns] for i in range(letters)]
    return left + right


def _mean(x: float, y: float) -> list[list[float]]:
    """E[(W, H, K) of the left part | W, H, K of both], a 3 x 3 matrix."""
    return [
        [x, 6 * x * y, 60 * x * y * (y - x)],
        [0.0, x * x, 30 * x * x * y],
        [0.0, 0.0, x**3],
    ]


def _covariance(letters: int, x: float, y: float) -> list[list[float]]:
    """Cov[(W, H, K) of the left part | the known letters of both] at L = 1; unknown letters add variance."""
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
        if letters <= unknown:
            for i in range(letters):
                for j in range(letters):
                    cov[i][j] += mean[i][unknown] * mean[j][unknown] * variance
    return [row[:letters] for row in cov[:letters]]


def _factor(cov: list[list[float]]) -> list[list[float]]:
    """The lower Cholesky factor of a positive definite matrix."""
    n = len(cov)
    low = [[0.0] * n for _ in range(n)]
    for i in range(n):
        for j in range(i + 1):
            rest = cov[i][j] - sum(low[i][k] * low[j][k] for k in range(j))
            low[i][j] = math.sqrt(rest) if i == j else rest / low[j][j]
    return low


def _complement(full: list[float], left: list[float], x: float, y: float) -> list[float]:
    """The right part, from Chen's relation (B, section 2.3) for `left` and `full`; x + y = 1."""
    w, w1 = full[0], left[0]
    w2 = w - w1
    right = [w2]
    if len(full) > 1:
        h1 = left[1]
        h2 = (full[1] - x * (h1 - w2 / 2)) / y - w1 / 2
        right.append(h2)
        if len(full) > 2:
            rest = x * x * left[2] + x * y / 2 * (h1 - h2) + (x - y) / 12 * (x * w2 - y * w1)
            right.append((full[2] - rest) / (y * y))
    return right


def _clean(rows: list[list[float]]) -> tuple[Row, ...]:
    """Set coefficients of rounding size to zero; zeros are skipped when the matrix is applied."""
    sizes = [max(map(abs, row)) for row in rows]
    return tuple(tuple(c if abs(c) > 1e-16 * size else 0.0 for c in row) for row, size in zip(rows, sizes))


def split(
    values: list[Tensor],
    z: list[Tensor],
    x: float,
    y: float,
    root: float | Tensor,
    consume: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """Draw the left and right part of an interval, given its `values` = [W, H, K][:letters].

    Args:
        values, z: tensors of one shape, dtype and device; z holds independent N(0, 1) and is overwritten.
        x, y: the parts' shares of the length.
        root: sqrt(L), a float or a tensor that broadcasts.
        consume: the parts may overwrite `values`.
    """
    if x == 0.5 and isinstance(root, float) and len(values) < 3:
        return _halve(values, z, root, consume)
    inputs = [*values, *(noise.mul_(root) for noise in z)]
    parts = [_combine(row, inputs) for row in bridge_matrix(len(values), x, y)]
    return parts[: len(values)], parts[len(values) :]


def _halve(values: list[Tensor], z: list[Tensor], root: float, consume: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Apply M(1/2) for W or (W, H): the part even in time plus or minus the odd part."""
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
