"""Rough Bergomi paths without discretisation error in the variance, and statistics to judge them by.

The model, after Bayer, Friz & Gatheral, Pricing under rough volatility (Quantitative Finance 2016):

    dS/S = sqrt(v) (rho dW + sqrt(1 - rho^2) dW'),  v_t = xi_0 exp(eta V_t - eta^2 t^(2H) / 2),
    V_t = sqrt(2H) int_0^t (t - u)^(H - 1/2) dW_u   (Wtilde in the paper; E V_t^2 = t^(2H)).

The covariances below are derived from these integrals; the tests compare them with quadrature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.brownian.random_normals import key_of, node_seed

F64 = torch.float64
GROUP = 256  # paths drawn and multiplied together: part of the identity of the paths
STREAM = int.from_bytes(b"rBergomi", "big")  # makes other noise of the same seed independent
NUMBERS = 1 << 22  # size of temporaries of `statistics`, in float64 numbers
LEVELS = 1000  # quantiles kept of a marginal law
ORDERS = (0.5, 1.0, 1.5, 2.0, 3.0)  # of the moments, as in Gatheral, Jaisson & Rosenbaum, Section 2


@dataclass(frozen=True)
class RoughBergomi:
    """Paths on a uniform grid.

    Attributes:
        times: (steps + 1,) float64, in years from 0 to the horizon.
        variance: (paths, steps + 1) v_t, a year's variance; exact in law on the grid.
        log_price: (paths, steps + 1) log S_t, from 0.
        W: (paths, steps) the increments of the Brownian motion that drives the variance.
    """

    times: Tensor
    variance: Tensor
    log_price: Tensor
    W: Tensor


def rough_bergomi(
    paths: int,
    steps: int,
    *,
    hurst: float = 0.1,
    eta: float = 1.9,
    rho: float = -0.9,
    variance: float = 0.04,
    horizon: float = 1.0,
    seed: int = 0,
    first: int = 0,
    dtype: torch.dtype = torch.float32,
) -> RoughBergomi:
    """Paths number first, ..., first + paths - 1 of the model, computed in float64.

    (W, V) has its exact joint law on the grid, by Cholesky: steps^3 once, then steps^2 per path. The price is
    log-Euler on the same grid, log S += sqrt(v) dB - v h / 2 with v at the left end, so that S is a
    martingale at any step.

    Args:
        paths, steps: numbers of them.
        hurst: H in (0, 1/2]; at 1/2 V is W.
        eta: volatility of volatility, at least 0, in year^-H.
        rho: correlation of the two motions, in [-1, 1].
        variance: xi_0 = E v_t, above 0, a year's.
        horizon: T in years, above 0.
        seed, first: path i is a function of (seed, i), bitwise, so blocks can be made separately.
        dtype: of the three fields of paths, float32 or float64.
    """
    times = torch.linspace(0, horizon, steps + 1, dtype=F64)
    out = RoughBergomi(times, *(torch.empty(paths, steps + n, dtype=dtype) for n in (1, 1, 0)))
    key = key_of(key_of(seed) + STREAM)
    for group in range(first // GROUP, (first + paths - 1) // GROUP + 1):
        # always a complete group: the shape of a product decides how it is rounded
        generator = torch.Generator().manual_seed(node_seed(key, group))
        Z = torch.randn(3, GROUP, steps, generator=generator, dtype=F64)
        W, V = _volterra(Z[0], Z[1], hurst, horizon)
        v = variance * torch.exp(eta * V - eta**2 / 2 * times ** (2 * hurst))
        h, left = horizon / steps, v[:, :-1]
        B = rho * W + math.sqrt((1 - rho**2) * h) * Z[2]
        x = torch.zeros_like(v)
        torch.cumsum(left.sqrt() * B - left * (h / 2), 1, out=x[:, 1:])
        i = group * GROUP - first
        mine, there = slice(max(0, -i), min(GROUP, paths - i)), slice(max(0, i), min(paths, i + GROUP))
        out.variance[there], out.log_price[there], out.W[there] = v[mine], x[mine], W[mine]
    return out


def volterra_covariance(s: Tensor, t: Tensor, hurst: float) -> Tensor:
    """E V_s V_t for float64 times that broadcast, at least 0.

    2H int_0^s ((s-u)(t-u))^(H-1/2) du for s <= t; with u = s (1-x), Euler's integral of 2F1 and Pfaff's
    transformation it is 2H / (H+1/2) t^(2H) r^(H+1/2) 2F1(1/2-H, 1; H+3/2; r), r = s/t (DLMF 15.6.1, 15.8.1).
    """
    from scipy.special import hyp2f1

    high = torch.maximum(s, t)
    r = torch.where(high > 0, torch.minimum(s, t) / high, 0.0)
    F = torch.as_tensor(hyp2f1(0.5 - hurst, 1.0, hurst + 1.5, r.numpy()), dtype=F64)
    return 2 * hurst / (hurst + 0.5) * high ** (2 * hurst) * r ** (hurst + 0.5) * F


def brownian_covariance(s: Tensor, t: Tensor, hurst: float) -> Tensor:
    """E W_s V_t = sqrt(2H) / (H+1/2) (t^(H+1/2) - (t - min(s,t))^(H+1/2)), for times that broadcast."""
    power = hurst + 0.5
    return math.sqrt(2 * hurst) / power * (t**power - (t - torch.minimum(s, t)) ** power)


def _volterra(Z: Tensor, Y: Tensor, hurst: float, horizon: float) -> tuple[Tensor, Tensor]:
    """dW (n, steps) and V (n, steps + 1) from standard normals (n, steps); V_(Tt) is T^H V_t in law."""
    B, L = factors(Z.shape[1], hurst)
    V = torch.nn.functional.pad(Z @ B.mT + Y @ L.mT, (1, 0))
    return Z * math.sqrt(horizon / Z.shape[1]), V * horizon**hurst


@lru_cache(maxsize=1)  # for data made block by block
def factors(steps: int, hurst: float) -> tuple[Tensor, Tensor]:
    """(B, L), each (steps, steps): on [0, 1], (dW / sqrt(h), V) = (Z, B Z + L Y) for standard normal Z, Y.

    The Cholesky factor of the joint covariance, by blocks. The rest of V's covariance without the part of dW,
    L L', is well conditioned (the kernel's singularity is in it) unless H is close to 1/2.
    """
    t = torch.linspace(0, 1, steps + 1, dtype=F64)
    B = brownian_covariance(t, t[1:, None], hurst).diff(dim=1) * math.sqrt(steps)
    rest = volterra_covariance(t[1:], t[1:, None], hurst) - B @ B.mT
    L, failed = torch.linalg.cholesky_ex(rest)
    if failed:  # H near 1/2, where V is W and nothing but rounding is left
        size, axes = torch.linalg.eigh(rest)
        L = axes * size.clamp(min=0).sqrt()
    return B, L


class Statistic(NamedTuple):
    """Estimates at some lags, orders or levels (k,), each with its standard error; all float64."""

    at: Tensor
    value: Tensor
    error: Tensor


def statistics(
    log_price: Tensor,
    variance: Tensor | None = None,
    *,
    lags: Sequence[int] | None = None,
    groups: int = 50,
) -> dict[str, Statistic]:
    """The stylised facts of paths, for `compare`; r are the log-returns of the steps.

    - "price", "variance", "return": quantiles at 1000 levels of log S_T - log S_0, of log v_T, of all r.
    - "returns", "absolute", "squared": autocorrelation of r, |r|, r^2 at each lag.
    - "leverage": correlation of r with r^2 a lag later.
    - "cross", "cross_log": correlation of r with the increment of v, of log v, of the step a lag later;
      from lag 0, the same step.
    - "roughness": H_q, the slope of log E|log v_(t+D) - log v_t|^q against q log D over the lags D, for
      q = 0.5 ... 3 (Gatheral, Jaisson & Rosenbaum, Volatility is rough, Section 2).

    Correlations are of all pairs, over paths and times together, since v is not stationary. r has the mean
    -v h/2, and so a leverage of the order of sqrt(v h) even at rho = 0. At eta near 2 the fourth moments
    behind "squared", "leverage" and "cross" depend on few paths: their errors are then too small, and
    "absolute" and "cross_log" are more informative.

    Args:
        log_price: (paths, steps + 1).
        variance: (paths, steps + 1) above 0, or None to leave out what needs it.
        lags: in steps, by default the powers of two up to a quarter of steps.
        groups: parts of the (independent) paths behind the standard errors: the jackknife that leaves out
            one part, and for quantiles Woodruff's (JASA 1952) interval.

    The correlation of constants is nan. Memory: about ten copies of `log_price` in float64.
    """
    lags = lags or [2**i for i in range(((log_price.shape[1] - 1) // 4).bit_length())]
    parts, found = _grouped(log_price, groups), {}
    r = [p.diff(dim=1) for p in parts]
    found["price"] = _quantiles([p[:, -1] - p[:, 0] for p in parts])
    found["return"] = _quantiles([p.flatten() for p in r])
    for name, of in _KINDS.items():
        found[name] = _correlations([(of(p), of(p)) for p in r], lags)
    found["leverage"] = _correlations([(p, p.square()) for p in r], lags)
    if variance is None:
        return found
    v = _grouped(variance, groups)
    log_v = [p.log() for p in v]
    found["variance"] = _quantiles([p[:, -1] for p in log_v])
    for name, increments in (("cross", v), ("cross_log", log_v)):
        pairs = [(a, b.diff(dim=1)) for a, b in zip(r, increments, strict=True)]
        found[name] = _correlations(pairs, [0, *lags])
    found["roughness"] = _roughness(log_v, lags)
    return found


_KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "returns": lambda r: r, "absolute": torch.abs, "squared": torch.square
}  # fmt: skip


class Difference(NamedTuple):
    """How far two estimates are apart, and how far two samples of one law would be expected to be."""

    error: float
    noise: float


def compare(a: Mapping[str, Statistic], b: Mapping[str, Statistic]) -> dict[str, Difference]:
    """For each statistic that both have, the root mean square difference over lags or orders.

    For the three marginal laws it is W1, the mean difference of the quantiles: tails beyond the outermost
    levels (a half in a thousand) do not count.
    """
    found = {}
    for name in [n for n in a if n in b]:
        x, y = a[name], b[name]
        assert torch.equal(x.at, y.at), f"{name}: estimates at other lags"
        gap, spread = (x.value - y.value).abs(), (x.error.square() + y.error.square()).sqrt()
        if name in ("price", "return", "variance"):
            # the mean of |N(0, 1)|
            found[name] = Difference(float(gap.mean()), float(spread.mean()) * math.sqrt(2 / math.pi))
        else:
            found[name] = Difference(float(gap.square().mean().sqrt()), float(spread.square().mean().sqrt()))
    return found


def _grouped(x: Tensor, groups: int) -> list[Tensor]:
    """Equal parts of the paths, float64; up to groups - 1 paths at the end are left out."""
    n = len(x) // groups
    return list(x.detach().cpu()[: n * groups].to(F64).split(n))


def _quantiles(parts: list[Tensor]) -> Statistic:
    """At the middles of LEVELS equal parts; the error is that of the empirical distribution, turned over."""
    level = (torch.arange(LEVELS, dtype=F64) + 0.5) / LEVELS
    pool, n = torch.cat(parts).sort().values, sum(len(p) for p in parts)

    def at(p: Tensor) -> Tensor:
        return pool[(p * n).long().clamp(0, n - 1)]

    value = at(level)
    below = torch.stack([torch.searchsorted(p.sort().values, value, right=True) / len(p) for p in parts])
    spread = below.to(F64).std(0) / math.sqrt(len(parts))
    return Statistic(level, value, (at(level + spread) - at(level - spread)) / 2)


def _correlations(pairs: list[tuple[Tensor, Tensor]], lags: Sequence[int]) -> Statistic:
    """Of x_t with y_(t+lag), for x, y (paths, steps) in parts."""
    # a correlation does not feel shift and scale, its rounding does
    mean = [torch.stack([p[i].mean() for p in pairs]).mean() for i in (0, 1)]
    scale = [torch.stack([p[i].square().mean() for p in pairs]).mean().sqrt() for i in (0, 1)]
    moments = torch.empty(len(pairs), 5, len(lags), dtype=F64)
    for moment, pair in zip(moments, pairs, strict=True):
        for j, lag in enumerate(lags):
            moment[:, j] = _products(*(_scaled(p, m, s) for p, m, s in zip(pair, mean, scale)), lag)
    return _jackknife(moments, _pearson, lags)


def _scaled(x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    return (x - mean) / scale if scale > 0 else x - mean


def _products(x: Tensor, y: Tensor, lag: int) -> Tensor:
    """(5,) the means of x, y, x^2, y^2, xy over all pairs at that lag."""
    total, steps = torch.zeros(5, dtype=F64), x.shape[1]
    for a, b in zip(*(p.split(max(1, NUMBERS // steps)) for p in (x, y)), strict=True):
        a, b = a[:, : steps - lag], b[:, lag:]
        total += torch.stack([a.sum(), b.sum(), a.square().sum(), b.square().sum(), (a * b).sum()])
    return total / (len(x) * (steps - lag))


def _pearson(m: Tensor) -> Tensor:
    """(..., k) correlations from (..., 5, k) moments."""
    x, y, xx, yy, xy = m.unbind(-2)
    # what rounding leaves of a constant's variance is not a variance
    size = [torch.where(s - c * c > 1e-12 * s, s - c * c, math.nan) for s, c in ((xx, x), (yy, y))]
    return (xy - x * y) / (size[0] * size[1]).sqrt()


def _roughness(parts: list[Tensor], lags: Sequence[int]) -> Statistic:
    """H_q for each order, from (paths, steps + 1) log variances.

    All lags D see the same starts t, from the largest lag on: near 0 the increments of V are smaller by a
    factor that depends on t/D, which would bend the line.
    """
    q, top = torch.tensor(ORDERS, dtype=F64), max(lags)
    moments = torch.empty(len(parts), len(lags), len(ORDERS), dtype=F64)
    for i, part in enumerate(parts):
        start = part[:, top : part.shape[1] - top]
        for j, lag in enumerate(lags):
            size = (part[:, top + lag : part.shape[1] - top + lag] - start).abs()
            moments[i, j] = torch.stack([size.pow(order).mean() for order in ORDERS])
    x = torch.tensor(lags, dtype=F64).log()
    weights = (x - x.mean()) / (x - x.mean()).square().sum()
    return _jackknife(moments, lambda m: (weights[:, None] * m.log()).sum(-2) / q, ORDERS)


def _jackknife(moments: Tensor, of: Callable[[Tensor], Tensor], at: Sequence[float]) -> Statistic:
    """A smooth function of means (groups, ...) of equal parts, and the error from leaving out one of them."""
    n, full = len(moments), moments.mean(0)
    without = of((n * full - moments) / (n - 1))
    error = (without - without.mean(0)).square().sum(0).mul((n - 1) / n).sqrt()
    return Statistic(torch.tensor(at, dtype=F64), of(full), error)
