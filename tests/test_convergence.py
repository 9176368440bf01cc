"""The convergence laboratory: it confirms what is right, catches what is wrong, and says what it did."""

import json

import fewstep as fs
import pytest
import torch
from fewstep.analysis import Record, problems, strong_order, strong_orders
from fewstep.analysis.convergence import slopes

PAIRS = [(n, noise) for n, c in fs.solvers().items() if issubclass(c, fs.StochasticSolver)
         and "__init__" not in vars(c) for noise in c.card.strong_order]  # fmt: skip


def finest(estimate):
    """The mean of the two finest local slopes."""
    return sum(estimate.local[-2:]) / 2


@pytest.mark.parametrize(("name", "noise"), PAIRS)
def test_declared_orders_are_measured(name, noise):
    """Mean of the two finest local slopes within 0.12 of the card.

    Its standard error is below 0.025 for these problems, levels and 3,000 paths (six seeds), so that a
    right solver fails with a probability of less than 1e-5 and one whose order is off by 0.5 passes
    with less than 1e-9.
    """
    solver = fs.solvers()[name]()
    estimate = strong_order(
        solver, problems.JUDGES[noise](), levels=range(4, 9), paths=3000, reference="levels"
    )
    assert abs(finest(estimate) - solver.card.strong_order[noise]) < 0.12, estimate.local


class NoCorrection(fs.Milstein):
    """Milstein with half of its correction: a wrong coefficient."""

    def step(self, sde, t0, t1, y, increment, carry):
        right, _ = super().step(sde, t0, t1, y, increment, carry)
        euler, _ = fs.EulerMaruyama().step(sde, t0, t1, y, increment, None)
        return 0.5 * (right + euler), carry


class DroppedArea(fs.ShARK):
    """ShARK with H set to nought."""

    def step(self, sde, t0, t1, y, increment, carry):
        blind = fs.Increment(increment.h, increment.W, torch.zeros_like(increment.W))
        return super().step(sde, t0, t1, y, blind, carry)


class ForeignArea(fs.ShARK):
    """ShARK with an H of the right law that is not the path's own."""

    def step(self, sde, t0, t1, y, increment, carry):
        return super().step(
            sde, t0, t1, y, fs.Increment(increment.h, increment.W, increment.H.flip(0)), carry
        )


@pytest.mark.parametrize(
    ("broken", "noise"),
    [(NoCorrection, "diagonal"), (DroppedArea, "additive"), (ForeignArea, "additive")],
)
def test_broken_solvers_are_caught(broken, noise):
    estimate = strong_order(
        broken(), problems.JUDGES[noise](), levels=range(4, 9), paths=3000, reference="levels"
    )
    assert finest(estimate) < broken.card.strong_order[noise] - 0.3


@pytest.mark.parametrize("problem", ["geometric_brownian_motion", "sine"])
def test_orders_against_torchsde_paths(problem):
    """The headline: finest local slopes 0.5 and 1.0, within 0.1, on torchsde's own path."""
    estimates = strong_orders([fs.EulerMaruyama(), fs.Milstein()], problems.by_name(problem),
                              levels=range(4, 9), paths=2000, reference="torchsde")  # fmt: skip
    for estimate, order in zip(estimates, (0.5, 1.0), strict=True):
        assert abs(finest(estimate) - order) < 0.1, estimate.local


def test_closed_form_and_torchsde_reference_agree():
    gbm = problems.geometric_brownian_motion()
    a, b = (strong_order(fs.Milstein(), gbm, levels=range(3, 7), paths=500, reference=r)
            for r in ("exact", "torchsde"))  # fmt: skip
    torch.testing.assert_close(torch.tensor(a.rmse), torch.tensor(b.rmse), rtol=2e-2, atol=0)


def test_slopes_of_made_up_errors():
    """Errors c_path h^p with lognormal c: the slope is exact, the interval has no width."""
    h = 2.0 ** -torch.arange(3, 8, dtype=torch.float64)
    c = torch.exp(torch.randn(100, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    s = slopes(c * h**0.75, list(range(3, 8)), seed=0)
    for value in (s["order"], s["low"], s["high"], *s["local"]):
        assert abs(value - 0.75) < 1e-12
    assert s["median"] == (c * h**0.75).median(0).values.tolist()


def test_a_users_sde_plot_and_record(tmp_path):
    sde = fs.SDE(lambda t, y: -y, lambda t, y: 0.5 + 0.2 * torch.sin(y))
    r = strong_order(fs.Milstein(), sde, y0=torch.full((1,), 0.4), t0=0.0, t1=1.0, levels=range(3, 7),
                     paths=200, reference="levels")  # fmt: skip
    assert r.low <= r.order <= r.high
    assert len(r.local) == 3
    for ending in ("svg", "png"):
        assert r.plot(tmp_path / f"em.{ending}").stat().st_size > 1000
    record = Record.load(r.save(tmp_path / "em.json"))
    assert record.data["rmse"] == r.rmse
    assert {"torch", "torchsde", "fewstep", "python"} <= set(record.made["versions"])
    (tmp_path / "other.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(fs.InputError, match="not a record"):
        Record.load(tmp_path / "other.json")


GBM = problems.geometric_brownian_motion()
BAD = {
    "two levels": (dict(levels=[4, 5]), "levels: got .4, 5., wanted at least three"),
    "reference": (dict(reference="torchsd"), "Did you mean 'torchsde'"),
    "no closed form": (dict(problem=problems.sine(), reference="exact"), "no closed form"),
    "no y0": (dict(problem=GBM.sde), "y0, t1"),
    "image for torchsde": (dict(problem=GBM.sde, y0=torch.ones(2, 2), t1=1.0), r"must be \(d,\)"),
    "cannot": (dict(solver=fs.ShARK()), "ShARK for 'diagonal'"),
    "no object": (dict(solver=fs.Milstein), "such as EulerMaruyama"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    changes, words = BAD[case]
    with pytest.raises(fs.InputError, match=words):
        strong_order(**(dict(solver=fs.Milstein(), problem=GBM) | changes))
