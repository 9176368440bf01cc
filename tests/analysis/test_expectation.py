"""Multilevel Monte Carlo: coverage, rates, the cost law, memory and input."""

import math
import sys
from statistics import NormalDist

import pytest
import torch

import fewstep as fs
import fewstep_analysis.expectation  # noqa: F401 - the module behind the function of the same name
from fewstep_analysis import expectation

F64 = torch.float64
MU, SIGMA, STRIKE = 0.05, 0.2, 100.0
GBM = fs.SDE(lambda t, y: MU * y, lambda t, y: SIGMA * y)
Y0 = torch.tensor([100.0], dtype=F64)


def call(y):
    return math.exp(-MU) * (y[:, 0] - STRIKE).clamp(min=0)


def black_scholes():
    d = (math.log(100 / STRIKE) + MU + SIGMA**2 / 2) / SIGMA
    cdf = NormalDist().cdf
    return 100 * cdf(d) - STRIKE * math.exp(-MU) * cdf(d - SIGMA)


def priced(**changes):
    return expectation(**dict(sde=GBM, solver=fs.Milstein(), y0=Y0, span=(0, 1), payoff=call, tolerance=0.3) | changes)


def test_intervals_cover_the_price_of_a_call():
    """15 of 20 intervals of 95 % or more: intervals of just 95 % fail this with a probability of 3e-4."""
    reports = [priced(seed=seed) for seed in range(20)]
    assert all(r.reached and r.high - r.low <= 2 * 0.3 * 1.001 for r in reports)
    assert sum(r.low < black_scholes() < r.high for r in reports) >= 15
    assert len({r.value for r in reports}) == 20


@pytest.mark.parametrize(("solver", "rate"), [(fs.EulerMaruyama(), 1.0), (fs.Milstein(), 2.0), (fs.SRID2(), 3.0)])
def test_variances_fall_at_twice_the_strong_order(solver, rate):
    """Rates of a payoff without a kink, fitted to six levels of 1,024 paths: the error of each log2 is about 0.1."""
    r = priced(solver=solver, payoff=lambda y: y[:, 0], tolerance=50.0, finest=5, confidence=0.5)
    sums = [v.variance for v in r.levels[1:]]
    assert len(sums) >= 2
    assert abs(math.log2(sums[0] / sums[-1]) / (len(sums) - 1) - rate) < 0.4, sums


def test_cost_is_of_order_tolerance_to_the_minus_two():
    """A quarter of the tolerance costs 4^2 times the evaluations, within 40 %; plain Monte Carlo more than 4^2.5."""
    coarse, fine = priced(tolerance=0.2), priced(tolerance=0.05)
    assert 0.6 < fine.evaluations / coarse.evaluations / 16 < 1.4
    assert fine.plain_evaluations / coarse.plain_evaluations > 32
    assert fine.plain_evaluations > 10 * fine.evaluations


def test_both_solutions_of_a_difference_follow_one_path():
    """Euler's method is exact for constant coefficients: on common paths all differences are rounding."""
    sde = fs.SDE(lambda t, y: 0 * y + 0.3, lambda t, y: 0 * y + 2.0, "additive")
    r = priced(sde=sde, solver=fs.EulerMaruyama(), payoff=lambda y: y[:, 0] ** 2, tolerance=100.0)
    assert all(v.variance < 1e-20 < 1e3 < v.payoff_variance for v in r.levels[1:])
    assert r.low < 100.3**2 + 4 < r.high


def test_antithetic_paths_replace_areas():
    """Clark and Cameron's int W_1 dW_2 without areas: variances fall at rate 1, in antithetic pairs at rate 2."""

    def columns(t, y):
        zero, a = torch.zeros_like(y[..., 0]), y[..., 0]
        return torch.stack([torch.stack([zero + 1, zero], -1), torch.stack([zero, a], -1)], -2)

    sde, rates = fs.SDE(lambda t, y: 0 * y, columns, "general", "stratonovich"), {}
    for twin in (False, True):
        start = torch.tensor([0.5, 0.2], dtype=F64)
        r = expectation(sde, fs.Heun(), start, (0, 1), lambda y: y.cos().sum(-1), tolerance=0.02, antithetic=twin)
        rates[twin] = r.variance_rate
    assert 0.8 < rates[False] < 1.3 < 1.7 < rates[True] < 2.5, rates


def test_chunks_are_bounded_and_seeds_fix_them(monkeypatch):
    """No increment has more numbers than the budget; one seed gives one report and leaves torch's generator alone."""
    module, most = sys.modules["fewstep_analysis.expectation"], []
    drawn = module.FreshIncrements
    monkeypatch.setattr(module, "BUDGET", 1 << 14)
    monkeypatch.setattr(
        module, "FreshIncrements", lambda shape, *a, **k: most.append(shape[0]) or drawn(shape, *a, **k)
    )
    before = torch.random.get_rng_state()
    reports = [priced(seed=seed, tolerance=0.8) for seed in (1, 1, 2)]
    assert torch.equal(before, torch.random.get_rng_state())
    assert max(most) * 8 <= 1 << 14
    assert reports[0] == reports[1] != reports[2]
    assert reports[0].low < black_scholes() < reports[0].high


def test_report_is_a_table_and_a_record(tmp_path):
    r = priced(tolerance=0.5)
    lines = str(r).splitlines()
    assert lines[1].split() == ["steps", "paths", "mean", "variance", "evaluations"]
    assert len(lines) == 3 + len(r.levels)
    assert "plain Monte Carlo" in lines[-1]
    assert r.evaluations == sum(v.paths * v.evaluations for v in r.levels)
    assert r.save(tmp_path / "r.json").exists()
    float32 = priced(tolerance=0.5, y0=Y0.float())
    assert float32.low < black_scholes() < float32.high


def test_a_bias_above_the_tolerance_is_in_the_interval_and_warned_of():
    with pytest.warns(UserWarning, match="Raise finest"):
        r = priced(solver=fs.EulerMaruyama(), payoff=lambda y: y[:, 0] ** 2 / 100, tolerance=0.02, finest=2)
    assert not r.reached
    assert r.low < 100 * math.exp(2 * MU + SIGMA**2) < r.high


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(sde=fs.ODE(lambda t, y: y)), "sde: got an ODE"),
        (dict(sde=None), "sde: got"),
        (dict(solver=fs.Heun()), "solver: got Heun"),
        (dict(y0=torch.tensor([math.nan])), "y0: got"),
        (dict(y0=torch.ones(1, dtype=torch.float16)), "dtype: got"),
        (dict(span=(1, 0)), "span: got"),
        (dict(span=(0, 1, 2)), "span: got"),
        (dict(tolerance=0.0), "tolerance: got"),
        (dict(tolerance=-1), "tolerance: got"),
        (dict(confidence=1.0), "confidence: got"),
        (dict(payoff=1), "payoff: got"),
        (dict(payoff=lambda y: y), "payoff: got"),
        (dict(payoff=lambda y: (y - y)[:, 0].log() - (y - y)[:, 0].log()), "payoff: got numbers"),
        (dict(coarsest=-1), "coarsest: got"),
        (dict(coarsest=3, finest=4), "finest: got"),
        (dict(seed=0.5), "seed: got"),
        (dict(antithetic=2), "antithetic: got"),
    ],
)  # fmt: skip
def test_invalid_arguments_are_refused(changes, message):
    with pytest.raises(fs.InputError, match=message):
        priced(**changes)
