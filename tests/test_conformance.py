"""The conformance suite: every solver passes it in every kind of configuration, each broken one is caught."""

from dataclasses import replace
from functools import partial

import pytest
import torch

import fewstep as fs
from fewstep import compat
from fewstep.testing import ConformanceError, check_solver

EVERYWHERE = (0.0, float("inf"))
# at least two in addition to the default for every solver that has options
CONFIGURATIONS = [
    fs.DDIM(eta=0.7), fs.DDIM(eta=1.0),
    fs.DDPM("fixed_large"),
    fs.DEIS(1), fs.DEIS(4), fs.DEIS(3, "rho"), fs.DEIS(3, "t"),
    fs.DPMSolver(1), fs.DPMSolver(3), fs.DPMSolver(3, solver_type="heun"), fs.DPMSolver(2, multistep=True),
    fs.DPMSolver(3, multistep=True),
    fs.DPMSolverPP(1), fs.DPMSolverPP(3), fs.DPMSolverPP(2, False), fs.DPMSolverPP(3, False),
    fs.DPMSolverPP(3, False, "heun"),
    fs.DPMSolverSDE(1), fs.DPMSolverSDE(3), fs.DPMSolverSDE(2, 0.5, "heun"), fs.DPMSolverSDE(3, 0.0),
    fs.DPMSolverSDE(2, multistep=False), fs.DPMSolverSDE(3, multistep=False),
    fs.DPMSolverSDE(2, 0.5, "heun", False, 1.0), fs.DPMSolverPP(2, False, "heun", 1.0), fs.DPMSolver(2, r=0.3),
    fs.ERSDE(1), fs.ERSDE(2),
    fs.GradientEstimation(1.0), fs.GradientEstimation(1.5),
    fs.Ancestral(fs.DPMSolver(2)), fs.Ancestral(fs.EDMHeun(), 0.5), fs.Ancestral(fs.DPMSolver(2), 0.0),
    fs.Ancestral(fs.UniPC(), 0.0),
    fs.Restart(intervals=((0.2, 0.8, 3, 2), (0.4, 0.9, 3, 1))), fs.Restart(fs.DPMSolverPP(2), ()),
    fs.EDMEuler(churn=10.0), fs.EDMEuler(churn=10.0, churn_max=0.5),
    fs.EDMHeun(churn=10.0), fs.EDMHeun(churn=1.0, churn_min=0.3),
    fs.IPNDM(1), fs.IPNDM(2), fs.IPNDM(3, variable=True), fs.IPNDM(4, variable=True),
    fs.PNDM("plms"),
    fs.SASolver(1), fs.SASolver(2, 0), fs.SASolver(3, 4, tau=0), fs.SASolver(4, 0, tau=0), fs.SASolver(3, 2),
    fs.SASolver(2, 3, 0.5, EVERYWHERE), fs.SASolver(3, 4, pece=True), fs.SASolver(2, 2, tau=0, pece=True),
    fs.SEEDS(1), fs.SEEDS(2),
    fs.TCD(0.0), fs.TCD(1.0),
    fs.UniPC(1), fs.UniPC(3), fs.UniPC(3, "bh1"), fs.UniPC(3, prediction="noise"),
    fs.UniPC(2, corrector=False), fs.UniPC(3, predictor=False), fs.UniPC(2, corrector={0, 1}),
    compat.DiffusersDPM(fs.DPMSolver(3, True)), compat.DiffusersDPM(fs.DPMSolverPP(2)),
    compat.DiffusersDPM(fs.DPMSolverPP(2), compat.Ending(euler=True)), compat.DiffusersDPM(fs.UniPC(3)),
    compat.DiffusersDPM(fs.DEIS(2)), compat.OfficialDPM(fs.DPMSolverPP(3)), compat.HeunPP2(),
    fs.SKROCK(1), fs.SKROCK(20), fs.ExponentialEuler(-1.5), fs.ExponentialEuler(0.7),
    fs.TruncatedEuler(5.0, 2), fs.TruncatedEuler(growth=5),
]  # fmt: skip


@pytest.mark.parametrize("solver", [*fs.solvers().values(), *CONFIGURATIONS], ids=repr)
def test_every_solver_keeps_the_contract_and_its_card(solver):
    check_solver(solver)


def with_card(solver, **facts):
    solver.card = replace(solver.card, **facts)
    return solver


WRONG_CARDS = {
    "order 3 for 2": (partial(fs.DPMSolverPP, 2), dict(deterministic_order=3)),
    "order 1 for 2": (fs.EDMHeun, dict(deterministic_order=1)),
    "order 2 for 3": (partial(fs.DPMSolver, 3), dict(deterministic_order=2)),
    "order 4 for 3": (partial(fs.UniPC, 3, corrector=False), dict(deterministic_order=4)),
    "order 3 for 4": (partial(fs.DEIS, 4), dict(deterministic_order=3)),
    "order 4 for 2 on uneven steps": (fs.IPNDM, dict(deterministic_order=4)),
    "drift order 2 for 3": (partial(fs.DPMSolverSDE, 3), dict(deterministic_order=2)),
    "drift order 4 for 3": (fs.SEEDS, dict(deterministic_order=4)),
    "ODE order 2 for 1": (fs.EulerHeun, dict(deterministic_order=2)),
    "ODE order 1 for 2": (fs.Heun, dict(deterministic_order=1)),
    "strong order 1 for 0.5": (fs.EulerMaruyama, dict(strong_order={"general": 1.0})),
    "strong order 0.5 for 1": (fs.Midpoint, dict(strong_order={"scalar": 0.5})),
    "strong order 1 for 1.5": (fs.SRID2, dict(strong_order={"diagonal": 1.0})),
    "strong order 1.5 for 1": (fs.SEA, dict(strong_order={"additive": 1.5}, weak_order={"additive": 2.0})),
    "1 evaluation for 3": (partial(fs.DPMSolverPP, 3, False), dict(evaluations=1)),
    "2 evaluations for 1": (fs.UniPC, dict(evaluations=2)),
    "3 drift evaluations for 2": (fs.ShARK, dict(evaluations=3)),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_CARDS)
def test_wrong_cards_are_caught(wrong):
    make, facts = WRONG_CARDS[wrong]
    fact = next(iter(facts))
    kind = r"measured \d evaluations" if fact == "evaluations" else f"measured {fact.replace('_', ' ')}"
    facts = facts if fact != "strong_order" else {"weak_order": {}} | facts
    with pytest.raises(ConformanceError, match=kind):
        check_solver(with_card(make(), **facts))


def test_lower_bounds_may_be_exceeded_but_not_missed():
    check_solver(with_card(fs.EDMHeun(), deterministic_order=1, lower_bound=True))
    with pytest.raises(ConformanceError, match="measured deterministic order"):
        check_solver(with_card(fs.EDMHeun(), deterministic_order=3, lower_bound=True))


class Stateful(fs.EulerMaruyama):
    """Keeps state: its second step differs."""

    seen = 0

    def step(self, *args):
        self.seen += 1
        return fs.Step(super().step(*args).y * (1 + 1e-9 * self.seen))


class NeedsH(fs.EulerMaruyama):
    """Uses H, which the card does not list."""

    def step(self, sde, t0, t1, y, increment, carry):
        return fs.Step(y + sde.drift(t0, y) * increment.h + 0 * y * increment.H.sum())


class TwoEvaluations(fs.EulerMaruyama):
    """Evaluates the drift twice and declares one."""

    def step(self, sde, t0, t1, y, increment, carry):
        sde.drift(t0, y)
        return super().step(sde, t0, t1, y, increment, carry)


class InPlace(fs.EulerMaruyama):
    """Writes to the increment."""

    def step(self, sde, t0, t1, y, increment, carry):
        new = super().step(sde, t0, t1, y, increment, carry)
        increment.W.zero_()
        return new


class ReturnsDouble(fs.EulerMaruyama):
    """Returns float64."""

    def step(self, *args):
        return fs.Step(super().step(*args).y.double())


class WeakBelowStrong(fs.EulerMaruyama):
    card = replace(fs.EulerMaruyama.card, weak_order={"diagonal": 0.25})


class OtherSignature(fs.EulerMaruyama):
    def step(self, sde, t0, t1, y):
        return fs.Step(y)


class FrozenNoise(fs.SlowRK):
    """Evaluates the diffusion at the start of the step where the method has other times."""

    def step(self, sde, t0, t1, y, increment, carry):
        return super().step(replace(sde, diffusion=lambda t, y: sde.diffusion(t0, y)), t0, t1, y, increment, carry)


class WrongSign(fs.SlowRK):
    """Uses -H for H."""

    def step(self, sde, t0, t1, y, increment, carry):
        return super().step(sde, t0, t1, y, fs.Increment(increment.h, increment.W, -increment.H), carry)


class NoArea(fs.LogODE):
    """Drops the space-space area."""

    def step(self, sde, t0, t1, y, increment, carry):
        return super().step(sde, t0, t1, y, replace(increment, A=0 * increment.A), carry)


class NoCard(fs.DDPM):
    card = None


class StatefulPlan(fs.EDMEuler):
    """Keeps state: its second plan differs."""

    seen = 0

    def plan(self, sigmas, schedule=None):
        self.seen += 1
        found = super().plan(sigmas)
        return replace(found, update_eval=found.update_eval * (1 + 1e-9 * self.seen))


class LeavesState(fs.EDMEuler):
    """Leaves a little of the state where only the estimate of x0 belongs."""

    def plan(self, sigmas, schedule=None):
        found = super().plan(sigmas)
        return replace(found, update_eval=found.update_eval * (1 - 1e-3))


class OtherEnd(fs.EulerMaruyama):
    """Takes three times the estimate on grids that do not end at 0."""

    def plan(self, sigmas, schedule=None):
        found = super().plan(sigmas)
        return replace(found, update_eval=3 * found.update_eval) if sigmas[-1] > 0 else found


class OtherPath(fs.DPMSolverSDE):
    """Uses another part of the path each time."""

    seen = 0

    def plan(self, sigmas, schedule=None):
        self.seen += 1
        found = super().plan(sigmas)
        return replace(found, noise=found.noise * (1 + 1e-9 * self.seen))


class TooMuchNoise(fs.DPMSolverSDE):
    """Adds noise of 1.1 times the size."""

    def plan(self, sigmas, schedule=None):
        found = super().plan(sigmas)
        return replace(found, update_noise=1.1 * found.update_noise)


class WritesToGrid(fs.EDMEuler):
    def plan(self, sigmas, schedule=None):
        found = super().plan(sigmas)
        sigmas[0] *= 1.001
        return found


class RejectsZero(fs.EDMEuler):
    """Cannot end at sigma = 0."""

    def plan(self, sigmas, schedule=None):
        if not sigmas.log().isfinite().all():
            raise ZeroDivisionError("log of 0")
        return super().plan(sigmas)


BROKEN = {
    Stateful: "differ", NeedsH: "more than levy='W'|NoneType",
    TwoEvaluations: "measured 2 evaluations per step, the card states 1",
    InPlace: "wrote", ReturnsDouble: "got torch.float64",
    WeakBelowStrong: "weak order is below", OtherSignature: "diagonal noise.*TypeError",
    FrozenNoise: "measured strong order", WrongSign: "measured strong order",
    NoArea: "measured strong order", NoCard: "no card", StatefulPlan: "two plans",
    LeavesState: "never changes", WritesToGrid: "wrote to the grid",
    RejectsZero: "steps=1, final='x0': ZeroDivisionError: log of 0",
    OtherEnd: "final='sigma_min': where the estimate", OtherPath: "two plans", TooMuchNoise: "variance",
}  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN)
def test_broken_solvers_are_caught(broken):
    with pytest.raises(ConformanceError, match=BROKEN[broken]):
        check_solver(broken())


STRATONOVICH = [n for n, s in fs.solvers("diagonal").items() if s.card.sde_types == ("stratonovich",)]


@pytest.mark.parametrize("name", STRATONOVICH)
def test_stratonovich_noise_is_centred_in_time(name):
    """For dy = (1 + t) dW the step is (1 + t_middle) W, minus h H on a path with H.

    Order 1.0 does not need it: a diffusion at t0 instead of t1 has the same order and a larger error.
    """
    sde = fs.SDE(lambda t, y: 0 * y, lambda t, y: (1 + t) * torch.ones_like(y), sde_type="stratonovich")
    solver, y = fs.solvers()[name], torch.zeros(1, 2, dtype=torch.float64)
    t0, t1 = y.new_tensor(0.25), y.new_tensor(0.75)
    increment = fs.Increment(0.5, y.new_tensor([[0.3, -0.7]]), y.new_tensor([[0.1, 0.2]]))
    got = solver.step(sde, t0, t1, y, increment, solver.init(sde, t0, y)).y
    expected = 1.5 * increment.W - (0.5 * increment.H if solver.card.levy == "H" else 0)
    torch.testing.assert_close(got, expected)


WRONG = {
    "summary": None, "reference": 3, "levy": "Q", "sde_types": "ito", "strong_order": 0.5,
    "weak_order": {"diagonl": 1.0}, "deterministic_order": "two", "evaluations": 0, "lower_bound": "no",
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_cards_reject_invalid_values(name):
    with pytest.raises(fs.InputError, match=name):
        fs.Card(**{"summary": "a solver", "reference": "Eq. (1)", name: WRONG[name]})


def test_repr_of_configured_solvers_rebuilds_them():
    for solver in CONFIGURATIONS:
        if type(solver).__module__.startswith("fewstep.samplers"):
            again = eval(repr(solver), {**vars(fs), **{type(solver).__name__: type(solver)}, "inf": EVERYWHERE[1]})
            assert repr(again) == repr(solver)
            assert again.card == solver.card
