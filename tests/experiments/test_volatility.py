"""Rough Bergomi paths and their statistics. Bounds are multiples of standard errors; seeds were not selected.

A Gaussian exceeds 4 with probability 6e-5, Student's t with 49 degrees of freedom (the errors of 50 groups)
exceeds 5 with probability 8e-6.
"""

import math

import pytest
import scipy.stats
import torch
from scipy.integrate import quad

import volatility
from volatility import (  # fmt: skip
    brownian_covariance,
    compare,
    factors,
    rough_bergomi,
    statistics,
    volterra_covariance,
)

F64 = torch.float64
HURST = [0.02, 0.1, 0.3, 0.49, 0.5]


def near(sample, truth):
    """Whether the means over the first axis are the truth, to 4 standard errors (more for many means)."""
    error = sample.std(0) / math.sqrt(len(sample))
    bound = scipy.stats.norm.isf(scipy.stats.norm.sf(4) / error.numel())
    return bool(((sample.mean(0) - truth).abs() <= bound * error).all())


def number(x):
    return torch.tensor(x, dtype=F64)


@pytest.mark.parametrize("hurst", HURST)
@pytest.mark.parametrize(("s", "t"), [(0.001, 1.0), (0.3, 0.7), (0.5, 0.5), (1.9, 2.0), (0.0, 1.0)])
def test_covariances_equal_their_integrals(hurst, s, t):
    # z = (s - u)^p takes the singularity at u = s out: both kernels have it where s = t
    p, a = (2 * hurst, 0.0) if s == t else (hurst + 0.5, hurst - 0.5)
    truth = quad(lambda z: 2 * hurst / p * (t - s + z ** (1 / p)) ** a, 0, s**p, epsabs=1e-13, limit=500)[0]
    found = volterra_covariance(number(s), number(t), hurst)
    assert float(found) == pytest.approx(truth, rel=1e-9, abs=1e-12)
    assert found == volterra_covariance(number(t), number(s), hurst)
    # of W_s with V_t, z = (t - u)^p
    p = hurst + 0.5
    truth = quad(lambda z: math.sqrt(2 * hurst) / p, (t - s) ** p, t**p)[0]
    found = brownian_covariance(number(s), number(t), hurst)
    assert float(found) == pytest.approx(truth, rel=1e-9, abs=1e-12)
    if 0 < s < t:  # and as it stands
        truth = quad(lambda u: math.sqrt(2 * hurst) * (t - u) ** (hurst - 0.5), 0, s)[0]
        assert float(found) == pytest.approx(truth, rel=1e-9)
    late, full = (brownian_covariance(number(u), number(t), hurst) for u in (t + 1, t))
    assert late == full  # what W does after t is not in V_t


@pytest.mark.parametrize("hurst", HURST)
def test_factors_give_the_joint_covariance(hurst):
    n = 40
    t = torch.linspace(0, 1, n + 1, dtype=F64)
    B, L = factors(n, hurst)
    torch.testing.assert_close(B @ B.mT + L @ L.mT, volterra_covariance(t[1:], t[1:, None], hurst), rtol=0, atol=1e-14)
    # the sum of the increments' covariances is that of W
    W = B.cumsum(1) / math.sqrt(n)
    torch.testing.assert_close(W, brownian_covariance(t[1:], t[1:, None], hurst), rtol=0, atol=1e-13)
    assert B.triu(1).abs().max() == 0  # V does not look ahead


@pytest.fixture(scope="module")
def exact():
    """With eta = 1, at which sample means of v and S are nearly Gaussian."""
    return rough_bergomi(20_000, 64, eta=1.0, horizon=0.5, dtype=F64)


def test_log_v_is_gaussian_with_stated_moments(exact):
    t, V = exact.times, exact.variance.div(0.04).log() + exact.times**0.2 / 2
    assert near(V[:, 1:], 0.0)
    assert near(V[:, 1:].square(), t[1:] ** 0.2)
    s, u = 20, 50
    assert near(V[:, s] * V[:, u], volterra_covariance(t[s], t[u], 0.1))
    assert near(exact.W.sum(1) * V[:, u], brownian_covariance(t[-1], t[u], 0.1))
    assert near(V[:, 1:].pow(4), 3 * t[1:] ** 0.4)
    assert near(exact.variance, 0.04)
    assert torch.equal(exact.variance[:, 0], torch.full((20_000,), 0.04, dtype=F64))


def test_w_is_brownian_motion_and_s_a_martingale(exact):
    h = 0.5 / 64
    assert near(exact.W, 0.0)
    assert near(exact.W.square(), h)
    assert near(exact.W[:, 1:] * exact.W[:, :-1], 0.0)
    S = exact.log_price.exp()
    assert near(S[:, 1:], 1.0)
    # increments are orthogonal to the past: against v before the step, and against S
    gain = S.diff(dim=1)
    assert near(gain * exact.variance[:, :-1], 0.0)
    # the price's own noise, (r + v h/2) / sqrt(v), is dB: variance h, correlation rho with dW
    left = exact.variance[:, :-1]
    B = (exact.log_price.diff(dim=1) + left * h / 2) / left.sqrt()
    assert near(B.square(), h)
    assert near(B * exact.W, -0.9 * h)


def test_paths_do_not_depend_on_blocks():
    """Across the border of two groups, and for a start inside one."""
    full = rough_bergomi(300, 12)
    parts = [rough_bergomi(n, 12, first=k) for k, n in ((0, 130), (130, 127), (257, 43))]
    for name in ("variance", "log_price", "W"):
        assert torch.equal(getattr(full, name), torch.cat([getattr(p, name) for p in parts]))
        assert torch.equal(getattr(full, name), getattr(rough_bergomi(300, 12), name))
        assert getattr(full, name).dtype == torch.float32
        assert not torch.equal(getattr(full, name), getattr(rough_bergomi(300, 12, seed=1), name))
    assert full.variance.shape == full.log_price.shape == (300, 13)
    assert full.W.shape == (300, 12)
    wide = rough_bergomi(300, 12, dtype=F64)
    assert torch.equal(wide.log_price.float(), full.log_price)


def test_global_random_state_is_unchanged():
    before = torch.get_rng_state()
    rough_bergomi(10, 8)
    assert torch.equal(before, torch.get_rng_state())


def test_horizon_scales_and_limits():
    """With time in units of T: eta grows by T^H and xi_0 by T."""
    a = rough_bergomi(50, 16, horizon=2.0, dtype=F64)
    b = rough_bergomi(50, 16, eta=1.9 * 2**0.1, variance=0.08, dtype=F64)
    torch.testing.assert_close(a.log_price, b.log_price)
    torch.testing.assert_close(2 * a.variance, b.variance)
    flat = rough_bergomi(50, 16, eta=0.0, rho=1.0, dtype=F64)
    torch.testing.assert_close(flat.log_price[:, -1], 0.2 * flat.W.sum(1) - 0.02)
    # at a half V is W
    classical = rough_bergomi(50, 16, hurst=0.5, eta=1.0, dtype=F64)
    W = classical.W.cumsum(1)
    expected = 0.04 * torch.exp(W - classical.times[1:] / 2)
    torch.testing.assert_close(classical.variance[:, 1:], expected, rtol=1e-6, atol=0)


def test_roughness_of_exact_paths_is_hurst():
    for hurst, steps in ((0.1, 64), (0.3, 256)):
        p = rough_bergomi(2000, steps, hurst=hurst, dtype=F64)
        found = statistics(p.log_price, p.variance)["roughness"]
        # the share of the drift and of the start, worked out for q = 2, is below 0.0004 and 0.006
        assert ((found.value - hurst).abs() < (0.0004 if hurst == 0.1 else 0.006) + 5 * found.error).all()
        assert (found.error < 0.003).all()


def test_independent_returns_are_within_their_band():
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(2000, 64, generator=generator, dtype=F64)
    found = statistics(torch.nn.functional.pad(steps.cumsum(1), (1, 0)))
    ratios = []
    for name in ("returns", "absolute", "squared", "leverage"):
        lags, value, error = found[name]
        band = 1 / (2000 * (64 - lags)).sqrt()
        assert (value.abs() < 4 * band).all(), name
        ratios.append(error / band)
    # 20 squared errors of 49 degrees of freedom: their mean has the standard error sqrt(2 / 980)
    assert float(torch.cat(ratios).square().mean()) == pytest.approx(1, abs=4 * math.sqrt(2 / 980))
    # the errors of normal quantiles, sqrt(p (1 - p) / n) / density
    for name, scale, n in (("return", 1.0, 128_000), ("price", 8.0, 2000)):
        p, value, error = found[name]
        z = math.sqrt(2) * torch.erfinv(2 * p - 1)
        truth = (p * (1 - p) / n).sqrt() * math.sqrt(2 * math.pi) * (z.square() / 2).exp() * scale
        assert ((value - scale * z).abs() < 5 * truth)[20:-20].all()
        assert float((error / truth)[20:-20].mean()) == pytest.approx(1, abs=0.15)


def test_statistics_equal_direct_computation():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(30, 13, generator=generator, dtype=F64)
    v = torch.rand(30, 13, generator=generator, dtype=F64) + 0.1
    found, r = statistics(x, v, lags=(1, 3), groups=10), x.diff(dim=1)

    def corr(a, b):
        return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])

    pairs = {
        "returns": (r, r), "absolute": (r.abs(), r.abs()), "squared": (r**2, r**2), "leverage": (r, r**2),
        "cross": (r, v.diff(dim=1)), "cross_log": (r, v.log().diff(dim=1)),
    }  # fmt: skip
    for name, (a, b) in pairs.items():
        for lag, value in zip(found[name].at.int().tolist(), found[name].value.tolist(), strict=True):
            assert value == pytest.approx(corr(a[:, : 12 - lag], b[:, lag:]), rel=1e-10), (name, lag)
    assert found["cross"].at.tolist() == [0, 1, 3]
    one, three = ((v.log()[:, 3 + k : 10 + k] - v.log()[:, 3:10]).square().mean() for k in (1, 3))
    assert float(found["roughness"].value[3]) == pytest.approx(float((three / one).log() / math.log(3) / 2))
    middle = found["price"].value[499:501].mean()
    end = (x[:, -1] - x[:, 0]).sort().values
    assert end[14] <= middle <= end[15]


def test_leverage_comes_from_rho():
    """At a small v, where the mean of r does not count."""
    setting = {"eta": 1.0, "variance": 1e-6, "dtype": F64}
    free, held = (rough_bergomi(5000, 32, rho=rho, **setting) for rho in (0.0, -0.9))
    free, held = (statistics(p.log_price, p.variance) for p in (free, held))
    for name in ("leverage", "cross", "cross_log"):
        assert (free[name].value.abs() < 5 * free[name].error).all(), name
        assert held[name].value[0] < -10 * held[name].error[0], name
    # nothing a past return states about the next: S is a martingale
    assert (held["returns"].value.abs() < 5 * held["returns"].error).all()
    # Cov(r, d log v) of one step is rho eta E sqrt(v) E dW dV, and E sqrt(v_t) = sqrt(xi_0) exp(-t^(2H)/8)
    t, one = torch.linspace(0, 1, 33, dtype=F64), number(1 / 32)
    root = (-t[:-1].pow(0.2) / 8).exp().mean() * 1e-3
    C = volterra_covariance(t, t[:, None], 0.1)
    size = (C.diag()[1:] + C.diag()[:-1] - 2 * C.diagonal(1)).mean()
    drift = -t.pow(0.2).diff() / 2
    size = size + drift.square().mean() - drift.mean() ** 2
    truth = -0.9 * root * brownian_covariance(one, one, 0.1) / (size * 1e-6 / 32).sqrt()
    assert abs(held["cross_log"].value[0] - truth) < 5 * held["cross_log"].error[0]


@pytest.mark.slow
def test_compare_distinguishes_laws():
    def sample(seed, **change):
        p = rough_bergomi(4000, 32, **{"eta": 0.5, "seed": seed, **change})
        return statistics(p.log_price, p.variance)

    a = sample(0)
    assert all(d.error == 0 for d in compare(a, a).values())
    same = compare(a, sample(1))
    assert {*same} == {*a}
    # one number at heart where its parts are correlated: |N(0, 1)| leaves 4 once in 16,000
    assert all(d.error < 4 * d.noise for d in same.values()), same
    for change, names in (
        ({"rho": -0.2}, ("leverage", "cross", "cross_log")),
        ({"hurst": 0.3}, ("roughness", "cross_log")),  # at T = 1 v_T has one law for all H
        ({"variance": 0.09}, ("price", "return", "variance")),
    ):
        other = compare(a, sample(2, **change))
        assert all(other[n].error > 6 * other[n].noise for n in names), change
    assert "roughness" not in compare(a, {k: v for k, v in a.items() if k != "roughness"})


@pytest.mark.slow
def test_w1_of_a_shift_is_the_shift(exact):
    a = statistics(exact.log_price, exact.variance)
    b = statistics(exact.log_price, 2 * exact.variance)
    assert compare(a, b)["variance"].error == pytest.approx(math.log(2))
    assert compare(a, b)["cross_log"].error == pytest.approx(0, abs=1e-12)


def test_correlation_of_constants_is_nan():
    p = rough_bergomi(200, 16, eta=0.0)
    found = statistics(p.log_price, p.variance)
    assert found["cross_log"].value.isnan().all()
    assert found["roughness"].value.isnan().all()
    assert found["returns"].value.isfinite().all()


@pytest.mark.slow
def test_long_samples_are_summed_in_parts(exact, monkeypatch):
    full = statistics(exact.log_price[:500], exact.variance[:500])
    monkeypatch.setattr(volatility, "NUMBERS", 100)
    for name, found in statistics(exact.log_price[:500], exact.variance[:500]).items():
        torch.testing.assert_close(found.value, full[name].value, rtol=1e-9, atol=1e-12)
