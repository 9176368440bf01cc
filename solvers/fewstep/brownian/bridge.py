"""Splitting an interval: the exact conditional law of (W, H, K) on its two parts.

With the interval's length L as the unit every quantity scales as sqrt(L), so one matrix M(x) per
split ratio x describes the law. With one standard normal in Z for each of W, H, K,

    (W_l, H_l, K_l, W_r, H_r, K_r) = M(x) (W, H, K, sqrt(L) Z).

Means and covariances of the left part are from arXiv 2405.06464 (B below), Theorem 3.7; the right
part follows by solving Chen's relation.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

VARIANCES = (1.0, 1 / 12, 1 / 720)  # of W, H and K over an interval of length one


@lru_cache(maxsize=4096)
def bridge_matrix(letters: int, x: float, y: float) -> list[list[float]]:
    """M(x): 2*letters rows of 2*letters coefficients; letters is 1 (W), 2 (W, H) or 3 (W, H, K).

    x and y = 1 - x are the parts' shares of the length; both are given because 1 - x may round. The
    shorter part is conditioned directly and the longer one solved for, so both keep full relative
    precision. If the right part is shorter, time is reversed: only H changes sign.
    """
    n = letters
    if x > y:
        flip = (1.0, -1.0, 1.0)[:n]
        signs = (*flip, *[1.0] * n)
        M = bridge_matrix(n, y, x)
        return [[flip[i % n] * s * c for s, c in zip(signs, M[i], strict=True)] for i in (*range(n, 2 * n), *range(n))]
    # E[(W, H, K) of the left part | those of both], and the covariance of the rest
    mean = [[x, 6 * x * y, 60 * x * y * (y - x)], [0.0, x * x, 30 * x * x * y], [0.0, 0.0, x**3]]
    d = x - y
    WW, WK = x * y * (d**4 + 4 * x * x * y * y), x**4 * y * d / 12
    WH, HK = -(x**3) * y * (x * x - 3 * x * y + 6 * y * y) / 2, -y * x**5 / 24
    HH, KK = x / 12 * (1 - x**3 * (x * x + 2 * x * y + 16 * y * y)), x / 720 * (1 - x**5)
    cov = [[WW, WH, WK], [WH, HH, HK], [WK, HK, KK]]
    for u in range(2, n - 1, -1):  # letters that are not known add variance
        cov = [[cov[i][j] + mean[i][u] * mean[j][u] * VARIANCES[u] for j in range(n)] for i in range(n)]
    low = [[0.0] * n for _ in range(n)]  # the Cholesky factor; LAPACK's rounding differs between machines
    for i in range(n):
        for j in range(i + 1):
            rest = cov[i][j] - sum(low[i][k] * low[j][k] for k in range(j))
            low[i][j] = math.sqrt(rest) if i == j else rest / low[j][j]
    left = [mean[i][:n] + low[i] for i in range(n)]
    full = [[float(i == j) for j in range(2 * n)] for i in range(n)]
    # the right part by Chen's relation (B, section 2.3): f of the interval, w, h, k left, v and h2 right
    right = [[f - w for f, w in zip(full[0], left[0])]]
    if n > 1:
        right.append([(f - x * (h - v / 2)) / y - w / 2 for f, w, h, v in zip(full[1], *left[:2], right[0])])
    if n > 2:
        right.append([
            (f - (x * x * k + x * y / 2 * (h - h2) + d / 12 * (x * v - y * w))) / (y * y)
            for f, w, h, k, v, h2 in zip(full[2], *left, *right)
        ])  # fmt: skip
    # coefficients of rounding size become zeros, which are skipped when the matrix is applied
    sizes = [1e-16 * max(map(abs, row)) for row in left + right]
    return [[c if abs(c) > size else 0.0 for c in row] for row, size in zip(left + right, sizes)]


def noise_scales(letters: int, x: float, root: float) -> tuple[float, ...]:
    """The factors of the standard normals of a cut at share x, where the square root of the length is `root`."""
    if x == 0.5 and letters < 3:
        return (root / 2,) if letters == 1 else (root / 4, root / math.sqrt(48))
    return (root,) * letters


def split(
    values: list[Tensor], z: Sequence[Tensor], x: float, y: float, consume: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Draw the left and right part of an interval, given its `values` = [W, H, K][:letters].

    Args:
        values, z: tensors of one shape, dtype and device; z holds independent N(0, 1) times `noise_scales`, and is
            overwritten.
        x, y: the parts' shares of the length.
        consume: the parts may overwrite `values`.
    """
    if x == 0.5 and len(values) < 3:
        return _halve(values, z, consume)
    inputs = [*values, *z]
    parts = [_combine(row, inputs) for row in bridge_matrix(len(values), x, y)]
    return parts[: len(values)], parts[len(values) :]


def _halve(values: list[Tensor], z: Sequence[Tensor], consume: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Apply M(1/2) for W or (W, H): the part even in time plus or minus the odd part."""
    own = values if consume else [None, None]
    if len(values) == 1:
        W_l = torch.add(z[0], values[0], alpha=0.5)
        return [W_l], [torch.sub(values[0], W_l, out=own[0])]
    (W, H), (first, second) = values, z
    W_l = torch.add(first, H, alpha=1.5).add_(W, alpha=0.5)
    W_r = torch.sub(W, W_l, out=own[0])
    even = first.mul_(-0.5).add_(H, alpha=0.25)
    return [W_l, even + second], [W_r, torch.sub(even, second, out=own[1])]


def _combine(row: list[float], inputs: list[Tensor]) -> Tensor:
    out: Tensor | None = None
    for c, value in zip(row, inputs, strict=True):
        if c != 0.0:
            out = value * c if out is None else out.add_(value, alpha=c)
    assert out is not None
    return out
