"""Distances between two sets of samples: RMSE, W1, sliced W2, MMD and energy distance."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from . import _validation
from .errors import InputError

PAIRS = 1 << 22  # distances in memory at a time
SUBSET = 512  # samples from which a bandwidth is computed


def rmse(a: Tensor, b: Tensor) -> float:
    """Root mean square of |a_i - b_i| over paired samples, (n, *event) each."""
    a, b = _flat(a, b)
    if len(a) != len(b):
        raise InputError(f"b: got {len(b)} samples, expected {len(a)}, one for each of a.")
    return float((a - b).square().sum(1).mean().sqrt())


def w1(a: Tensor, b: Tensor) -> float:
    """1-Wasserstein distance of samples of one number each, (n, 1) and (m, 1) or (n,) and (m,).

    Args:
        a, b: floating point, n and m samples. For n != m the quantile functions are compared at max(n, m) points.
    """
    a, b = _flat(a, b)
    if a.shape[1] != 1:
        raise InputError(f"a: got {a.shape[1]} numbers per sample, expected 1. Use sliced_w2.")
    p, q = _quantiles(a, b)
    return float((p - q).abs().mean())


def sliced_w2(a: Tensor, b: Tensor, *, projections: int = 1024, seed: int = 0) -> float:
    """Sliced 2-Wasserstein distance: root mean square of the W2 distances in random directions.

    Two finite samples of one distribution are not at distance 0: report that floor as well.

    Args:
        a, b: (n, *event) and (m, *event). For n != m the quantile functions are compared at max(n, m) points.
        projections, seed: number and seed of the directions.
    """
    a, b = _flat(a, b)
    projections = _validation.check_int("projections", projections, 1, 10**6)
    seed = _validation.check_seed(seed)
    projections = projections if a.shape[1] > 1 else 1
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(a.shape[1], projections, generator=generator, dtype=torch.float64)
    directions = (directions / directions.norm(dim=0)).to(a.device)
    p, q = _quantiles(a @ directions, b @ directions)
    return float((p - q).square().mean().sqrt())


def mmd(a: Tensor, b: Tensor, *, bandwidth: float | None = None) -> float:
    """Maximum mean discrepancy with the kernel exp(-|x - y|^2 / (2 bandwidth^2)).

    The root of the unbiased estimate of its square, or 0 if that is negative, as half of the time for equal laws.

    Args:
        a, b: (n, *event) and (m, *event), at least two samples each.
        bandwidth: by default `median_distance` of the first samples of both. Pass one, such as that of the data, to
            compare several samples with each other.
    """
    a, b = _flat(a, b, least=2)
    if bandwidth is None:
        bandwidth = median_distance(torch.cat([a[:SUBSET], b[:SUBSET]]), 2 * SUBSET)
    if not _validation.check_float("bandwidth", bandwidth) > 0:
        raise InputError(f"bandwidth: got {bandwidth!r}, expected a number above 0.")

    def kernel(distance: Tensor) -> Tensor:
        return distance.square_().mul_(-0.5 / bandwidth**2).exp_()

    n, m = len(a), len(b)
    within_a = (_pair_sum(a, a, kernel) - n) / (n * (n - 1))  # the kernel of a sample with itself is 1
    within_b = (_pair_sum(b, b, kernel) - m) / (m * (m - 1))
    return math.sqrt(max(within_a + within_b - 2 * _pair_sum(a, b, kernel) / (n * m), 0.0))


def median_distance(x: Tensor, count: int = SUBSET) -> float:
    """The median distance between the first `count` samples: a bandwidth for `mmd`."""
    _validation.check_no_graph("x", _validation.check_state("x", x))
    count = _validation.check_int("count", count, 2)
    return float(torch.pdist(x[:count].reshape(len(x[:count]), -1).double()).median())


def energy_distance(a: Tensor, b: Tensor) -> float:
    """The root of the unbiased estimate of 2 E|X - Y| - E|X - X'| - E|Y - Y'|, or 0 if that is negative.

    scipy's, for one dimension, is biased upwards. Costs n log n in one dimension, all pairs in more.

    Args:
        a, b: (n, *event) and (m, *event), floating point, at least two samples each. The result is in the unit of the
            samples to the power 1/2.
    """
    a, b = _flat(a, b, least=2)
    n, m = len(a), len(b)
    if a.shape[1] == 1:
        within_a, within_b, both = (_sorted_sum(v.flatten()) for v in (a, b, torch.cat([a, b])))
        across = (both - within_a - within_b) / 2
    else:
        within_a, within_b, across = (_pair_sum(*v, lambda d: d) for v in ((a, a), (b, b), (a, b)))
    square = 2 * across / (n * m) - within_a / (n * (n - 1)) - within_b / (m * (m - 1))
    return math.sqrt(max(square, 0.0))


def _flat(a: Tensor, b: Tensor, least: int = 1) -> tuple[Tensor, Tensor]:
    """Both as (samples, numbers) in float64."""
    a, b = _validation.check_state("a", a), _validation.check_state("b", b)
    for name, samples in (("a", a), ("b", b)):
        _validation.check_no_graph(name, samples)
    if a.device != b.device:
        raise InputError(f"b: got samples on {b.device}, expected {a.device} as a. Move them with b.to(a.device).")
    if a.shape[1:] != b.shape[1:]:
        raise InputError(f"b: got events of shape {tuple(b.shape[1:])}, expected {tuple(a.shape[1:])} as in a.")
    if min(len(a), len(b)) < least:
        raise InputError(f"a, b: got {len(a)} and {len(b)} samples, expected at least {least} of each.")
    return a.reshape(len(a), -1).double(), b.reshape(len(b), -1).double()


def _quantiles(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted columns of both, at max(n, m) points."""
    p, q = a.sort(0).values, b.sort(0).values
    if len(p) != len(q):
        n = max(len(p), len(q))
        middle = (torch.arange(n, dtype=torch.float64, device=p.device) + 0.5) / n
        p, q = (v[(middle * len(v)).long()] for v in (p, q))
    return p, q


def _pair_sum(a: Tensor, b: Tensor, of: Callable[[Tensor], Tensor]) -> float:
    """The sum over all pairs of a function of their distance, in blocks of rows."""
    exact = "donot_use_mm_for_euclid_dist"  # the other mode is inaccurate for small distances
    rows = torch.split(a, max(1, PAIRS // len(b)))
    return float(sum(of(torch.cdist(r, b, compute_mode=exact)).sum() for r in rows))


def _sorted_sum(x: Tensor) -> float:
    """The sum of |x_i - x_j| over all ordered pairs of numbers."""
    rank = torch.arange(len(x), dtype=x.dtype, device=x.device)
    return float(2 * ((2 * rank - len(x) + 1) * x.sort().values).sum())
