"""Measured orders: right solvers are confirmed, wrong ones are caught, and the verdict states why."""

import json

import pytest
import torch
from peak_memory import numbers_of

import fewstep as fs
from fewstep_analysis import (
    Record,
    problems,
    solver_table,
    strong_order,
    strong_orders,
    weak_order,
    weak_orders,
)
from fewstep_analysis.monte_carlo import Stored
from fewstep_analysis.order_regression import fit, strong_logs, verdict, weak_logs

EQUATIONS = {(p.sde.noise_type, p.sde.sde_type): (p, able) for p, able in solver_table.cases()}
LEVELS, PATHS = range(4, 9), 3000


def finest(estimate):
    """The mean of the two finest local slopes."""
    return sum(estimate.local[-2:]) / 2


def test_declared_orders_are_confirmed():
    """Finest local slopes within 0.12 of the card (four standard errors), and a verdict that agrees.

    The orders of all solvers are measured by the conformance suite.
    """
    solvers = [fs.EulerMaruyama(), fs.Milstein(), fs.SRID2()]
    for e in strong_orders(solvers, problems.sine(), levels=LEVELS, paths=PATHS, reference="levels"):
        assert abs(finest(e) - e.declared) < 0.12, (e.solver, e.local)
        assert e.verdict.startswith(f"consistent with order {e.declared}"), e.verdict


@pytest.mark.parametrize("equation", EQUATIONS, ids="-".join)
def test_all_solvers_of_an_equation_have_one_limit(equation):
    """Differences of refinements show the rate, not the limit: at 2^7 steps all agree within their errors."""
    problem, able = EQUATIONS[equation]
    noise = problem.sde.noise_type
    shape = problem.sde.noise_shape(problem.y0, problem.sde.diffusion(torch.zeros(()), problem.y0))
    path = fs.AreaPath(fs.BrownianPath((100, *shape), seed=5, levy="K", dtype=torch.float64), 2**8)
    y0, grid = problem.y0.expand(100, *problem.y0.shape), torch.linspace(0, 1, 2**7 + 1, dtype=torch.float64)
    noise_path = Stored(list(path.increments(grid)))
    with torch.no_grad():
        ends = [fs.solve(problem.sde, s, y0, grid, path=noise_path).y for s in able]
    orders = [s.card.order_for(noise) for s in able]
    best = ends[orders.index(max(orders))]
    for solver, order, y in zip(able, orders, ends, strict=True):
        gap = (y - best).square().sum(-1).mean().sqrt()
        assert gap < 0.75 ** (order < 1) * 2.0 ** (-7 * order) * 4, solver


class NoCorrection(fs.Milstein):
    """Milstein with half of its correction: a wrong coefficient."""

    def step(self, sde, t0, t1, y, increment, carry):
        right = super().step(sde, t0, t1, y, increment, carry).y
        euler = fs.EulerMaruyama().step(sde, t0, t1, y, increment, None).y
        return fs.Step(0.5 * (right + euler), carry)


class DroppedArea(fs.ShARK):
    """ShARK with H set to zero."""

    def step(self, sde, t0, t1, y, increment, carry):
        blind = fs.Increment(increment.h, increment.W, torch.zeros_like(increment.W))
        return super().step(sde, t0, t1, y, blind, carry)


class ForeignArea(fs.SRID2):
    """SRID2 with the H of another path."""

    def step(self, sde, t0, t1, y, increment, carry):
        foreign = fs.Increment(increment.h, increment.W, increment.H.flip(0))
        return super().step(sde, t0, t1, y, foreign, carry)


class NoArea(fs.LogODE):
    """LogODE with A set to zero."""

    def step(self, sde, t0, t1, y, increment, carry):
        flat = fs.Increment(increment.h, increment.W, increment.H, None, torch.zeros_like(increment.A))
        return super().step(sde, t0, t1, y, flat, carry)


class WrongWeight(fs.SlowRK):
    """SlowRK with the sign of H reversed."""

    def step(self, sde, t0, t1, y, increment, carry):
        turned = fs.Increment(increment.h, increment.W, -increment.H)
        return super().step(sde, t0, t1, y, turned, carry)


@pytest.mark.parametrize(
    ("broken", "noise"),
    [(NoCorrection, "diagonal"), (DroppedArea, "additive"), (ForeignArea, "diagonal"),
     pytest.param(NoArea, "general", marks=pytest.mark.slow), (WrongWeight, "commutative")],
)  # fmt: skip
def test_broken_solvers_are_caught(broken, noise):
    card = broken().card
    problem = problems.judge(noise, card.sde_types[0])
    estimate = strong_order(broken(), problem, levels=LEVELS, paths=PATHS, reference="levels")
    assert finest(estimate) < card.strong_order[noise] - 0.3
    assert "not with the declared" in estimate.verdict


def test_closed_forms_cannot_detect_a_wrong_area():
    """Why order 1.5 is judged where [f, g] != 0."""
    blind = strong_order(ForeignArea(), problems.geometric_brownian_motion(), levels=range(3, 7), paths=1000,
                         reference="exact")  # fmt: skip
    assert blind.order > 1.3


def test_orders_against_torchsde_paths():
    """Finest local slopes 0.5 and 1.0, within 0.1, on torchsde's path."""
    estimates = strong_orders([fs.EulerMaruyama(), fs.Milstein()], problems.sine(), levels=range(4, 9), paths=2000)
    for estimate, order in zip(estimates, (0.5, 1.0), strict=True):
        assert estimate.reference == "torchsde"
        assert abs(finest(estimate) - order) < 0.1, estimate.local


def test_closed_form_torchsde_and_solver_references_agree():
    """RMSEs over 3,000 different paths each agree within four standard errors of their ratio."""
    gbm = problems.geometric_brownian_motion()
    found = [strong_order(fs.Milstein(), gbm, levels=range(3, 6), paths=3000, reference=r)
             for r in ("exact", "torchsde", fs.SRID2())]  # fmt: skip
    assert found[1].reference_error < found[1].rmse[-1] / 100
    for other in found[1:]:
        torch.testing.assert_close(torch.tensor(found[0].rmse), torch.tensor(other.rmse), rtol=0.25, atol=0)
    # the same paths: only the error of SRID2 remains
    torch.testing.assert_close(torch.tensor(found[0].rmse), torch.tensor(found[2].rmse), rtol=0.03, atol=0)


WEAK = [
    (fs.EulerMaruyama, "geometric_brownian_motion", "mean", "exact", range(2, 6), 1.0),
    (fs.Milstein, "geometric_brownian_motion", "square", "exact", range(3, 7), 1.0),
    (fs.EulerMaruyama, "sine", "square", "levels", range(3, 7), 1.0),
    (fs.SRID2, "hyperbolic_sine", "cosine", "exact", range(2, 6), 1.5),
    (fs.SlowRK, "scalar_pair_stratonovich", "mean", "levels", range(1, 5), 2.0),
    (fs.KloedenPlaten15, "scalar_pair", "square", "levels", range(2, 6), 2.0),
    (fs.SEA, "additive_sine", "mean", "levels", range(2, 6), 1.0),
    (fs.ShARK, "additive_sine", "square", "levels", range(2, 6), 2.0),
    (fs.SRA1, "additive_sine", "square", "levels", range(2, 6), 2.0),
    (fs.SOSRA, "additive_sine", "square", "levels", range(2, 6), 2.0),
]  # fmt: skip


@pytest.mark.parametrize(("solver", "problem", "test", "reference", "levels", "order"), WEAK)
def test_weak_orders(solver, problem, test, reference, levels, order):
    estimate = weak_order(solver(), problems.by_name(problem), test, reference=reference, levels=levels, paths=40000)
    assert estimate.low - 0.1 < order < estimate.high + 0.1, (estimate.local, estimate.verdict)
    assert estimate.high - estimate.low < 0.7
    assert estimate.declared <= order


def test_common_noise_beats_separate_means():
    """The interval of the bias from differences along paths is 30 times narrower than from a mean alone."""
    gbm = problems.geometric_brownian_motion()
    e = weak_order(fs.Milstein(), gbm, "mean", levels=range(3, 6), paths=4000, reference="exact")
    half = (e.error_high[-1] - e.error_low[-1]) / 2
    true = float(gbm.mean(gbm.y0, 1.0))
    alone = 1.96 * true * (torch.tensor(0.49).exp() - 1).sqrt().item() / 4000**0.5
    assert half < alone / 30


def made_up(errors, floor=0.0):
    levels = list(range(3, 3 + errors.shape[1]))
    return fit(strong_logs(errors, floor), levels) | {"levels": levels, "kind": "strong"}


H = 2.0 ** -torch.arange(3, 8, dtype=torch.float64)


def lognormal(n, seed=0):
    return torch.exp(torch.randn(n, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def test_slopes_of_exact_power_laws_are_exact():
    """Errors c_path h^p with lognormal c: the slope is exact and the interval has no width."""
    s = made_up(lognormal(100) * H**0.75)
    for value in (s["order"], s["low"], s["high"], *s["local"]):
        assert abs(value - 0.75) < 1e-12


def test_intervals_agree_with_a_bootstrap():
    """The delta method's half-width is that of 1,000 resamplings of the paths, within 15 %."""
    noise = torch.randn(3000, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    errors = noise.abs() * H**0.5
    s = made_up(errors)
    x = torch.arange(5, dtype=torch.float64) - 2
    generator = torch.Generator().manual_seed(2)
    draws = (torch.randint(3000, (3000,), generator=generator) for _ in range(1000))
    slopes = torch.stack([-(0.5 * torch.log2(errors[d].square().mean(0)) @ x) / 10 for d in draws])
    assert abs(1.96 * slopes.std() / s["sampling"] - 1) < 0.15


@pytest.mark.parametrize("bend", [-0.3, 0.0, 1.5])
def test_bent_errors_are_not_misjudged(bend):
    """Errors c h^p (1 + bend sqrt(h)) with sampling noise. Of 100 seeds: with few paths, at least 95 verdicts
    do not contradict p; with many, at least 90 intervals cover it (to the 0.05 of the method)."""
    fair = covered = 0
    for seed in range(100):
        noise = torch.randn(30000, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        errors = noise * H * (1 + bend * H.sqrt())
        fair += "not with" not in verdict(made_up(errors[:500]), 1.0, 1.0, 500, 400.0)
        many = made_up(errors)
        covered += many["low"] - 0.05 <= 1.0 <= many["high"] + 0.05
    assert fair >= 95
    assert covered >= 90


def test_levels_near_the_reference_floor_are_excluded():
    noise = torch.randn(2000, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    own = 0.004 * torch.randn(2000, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    s = made_up((noise * H + own).abs(), floor=0.004)
    assert s["used"][-1] == 4
    assert "cannot tell: reference floor reached below h = 0.0625" in verdict(s, 1.0, 1.0, 2000, 500.0)
    longer = made_up((noise * H**0.5 + own).abs(), floor=0.004)
    assert "consistent with order 0.5" in verdict(longer, 0.5, 1.0, 2000, 500.0)


def test_verdict_reports_too_few_paths():
    noise = torch.randn(6, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    s = made_up(noise.abs() * H)
    assert "too few paths: about" in verdict(s, 1.0, 1.0, 6, 40.0)
    heavy = verdict(made_up(lognormal(4000) * H), 1.0, 1.0, 4000, 7.0)
    assert heavy == "consistent with order 1.0; 7 of 4000 paths carry the RMSE, read the median"


def test_pre_asymptotic_levels_are_excluded():
    s = made_up(lognormal(2000) * H * (1 + 300 * H**3))
    assert s["used"][0] > 3
    assert "pre-asymptotic above h" in verdict(s, 1.0, 1.0, 2000, 400.0)


def test_bias_below_sampling_noise_is_excluded():
    noise = torch.randn(4000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logs = weak_logs(2.0 ** -torch.arange(2, 6, dtype=torch.float64) * torch.tensor([1, 1, 1, 0]) + 0.5 * noise)
    assert logs.usable == [True, True, True, False]


def test_results_do_not_depend_on_block():
    options = dict(levels=range(2, 5), paths=500, reference="levels")
    for solver, problem in ((fs.ShARK(), "additive_sine"), (fs.LogODE(), "noncommutative_pair")):
        a, b = (strong_order(solver, problems.by_name(problem), block=n, **options) for n in (None, 37))
        for x, y in zip(a.rmse + a.local + [a.low], b.rmse + b.local + [b.low], strict=True):
            assert abs(x - y) <= 1e-12 * abs(x)


def test_float32_agrees_until_rounding():
    options = dict(levels=range(2, 6), paths=1000, reference="levels")
    a, b = (strong_order(fs.Milstein(), problems.sine(), dtype=d, **options)
            for d in (torch.float64, torch.float32))  # fmt: skip
    assert b.dtype == "float32"
    torch.testing.assert_close(torch.tensor(a.rmse), torch.tensor(b.rmse), rtol=1e-3, atol=0)


MEMORY = """
import torch, fewstep as fs
from fewstep_analysis import problems
from fewstep_analysis import strong_order
torch.set_num_threads(1)
strong_order(fs.EulerMaruyama(), problems.sine(), levels=range(2, 5), paths=64, reference="levels")
e = strong_order(fs.EulerMaruyama(), problems.sine(), levels=range({a}, {b}), paths={n}, reference="levels")
print(peak() / 2**30, sum(2**l for l in range({a}, {b} + 1)) * {n})
"""


@pytest.mark.parametrize(("a", "b", "n"), [(4, 8, 10_000), pytest.param(4, 9, 100_000, marks=pytest.mark.slow)])
def test_many_path_steps_fit_in_one_gib(a, b, n):
    """The complete process, torch included; the slow case has 10^8 path-steps."""
    gib, path_steps = numbers_of(MEMORY.format(a=a, b=b, n=n))
    assert path_steps > (1e8 if n == 100_000 else 4e6)
    assert gib < 1.0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_orders():
    options = dict(levels=range(3, 7), paths=2000, reference="levels")
    a, b = (strong_order(fs.Milstein(), problems.sine(), device=d, **options) for d in ("cpu", "cuda"))
    torch.testing.assert_close(torch.tensor(a.rmse), torch.tensor(b.rmse), rtol=1e-4, atol=0)


def test_estimate_of_user_sde_is_plotted_and_saved(tmp_path):
    sde = fs.SDE(lambda t, y: -y, lambda t, y: 0.5 + 0.2 * torch.sin(y))
    r = strong_order(fs.Milstein(), sde, y0=torch.full((1,), 0.4), t0=0.0, t1=1.0, levels=range(3, 7),
                     paths=200, reference="levels")  # fmt: skip
    assert r.low <= r.order <= r.high
    assert len(r.local) == 3
    for ending in ("svg", "png"):
        assert r.plot(tmp_path / f"em.{ending}").stat().st_size > 1000
    record = Record.load(r.save(tmp_path / "em.json"))
    assert record.data["rmse"] == r.rmse
    assert {"torch", "numpy", "fewstep", "python"} <= set(record.made["versions"])
    (tmp_path / "other.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(fs.InputError, match="not a record"):
        Record.load(tmp_path / "other.json")


GBM = problems.geometric_brownian_motion()
PAIR = problems.noncommutative_pair()
BAD = {
    "two levels": (dict(levels=[4, 5]), "levels: got .4, 5., expected at least three"),
    "negative level": (dict(levels=[-1, 4, 5]), "levels: got -1, expected an integer"),
    "reference": (dict(reference="torchsd"), "Did you mean 'torchsde'"),
    "coarse reference": (
        dict(levels=range(4, 9), reference_level=9), "reference_level: got 9, expected at least 11",
    ),
    "coarser than the finest": (
        dict(levels=range(4, 9), reference=fs.SRID2(), reference_level=7), "reference_level: got 7",
    ),
    "weak reference": (dict(solver=fs.SRID2(), reference=fs.EulerMaruyama()), "cannot judge order 1.5"),
    "reference of the other calculus": (dict(reference=fs.SlowRK()), "SlowRK for a 'ito' SDE"),
    "torchsde for general noise": (
        dict(solver=fs.EulerMaruyama(), problem=PAIR), "euler has strong order 0.5 for 'general'",
    ),
    "torchsde has no area": (dict(solver=fs.LogODE(), problem=PAIR), "needs the path's A"),
    "no closed form": (dict(problem=problems.sine(), reference="exact"), "no closed form"),
    "no y0": (dict(problem=GBM.sde), "y0, t1"),
    "a y0 for each path": (dict(y0=torch.ones(64, 1), paths=64), "expected one state"),
    "image for torchsde": (dict(problem=GBM.sde, y0=torch.ones(2, 2), t1=1.0), r"must be \(d,\)"),
    "cannot": (dict(solver=fs.ShARK()), "ShARK for 'diagonal'"),
    "no object": (dict(solver=fs.Milstein), "such as EulerMaruyama"),
    "one path": (dict(paths=1), "paths: got 1"),
    "empty block": (dict(block=0), "block: got 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_rejected_before_any_work(case, monkeypatch):
    changes, words = BAD[case]
    monkeypatch.setattr("fewstep_analysis.convergence.sweep", lambda *a: pytest.fail("work was done"))
    with pytest.raises(fs.InputError, match=words):
        strong_order(**(dict(solver=fs.Milstein(), problem=GBM) | changes))


def test_unknown_names_are_rejected():
    with pytest.raises(fs.InputError, match="Did you mean 'square'"):
        weak_orders([fs.Milstein()], GBM, "squares")
    with pytest.raises(fs.InputError, match="Did you mean 'heston'"):
        problems.by_name("hesten")
