"""The public conformance suite: every solver here passes it, and each kind of broken one is caught."""

from dataclasses import replace

import pytest

import fewstep as fs
from fewstep.testing import ConformanceError, check_solver

LEARNED = {"SigStep"}  # needs its network
OPTIONS = [
    fs.DDIM(eta=1.0), fs.DPMSolver(3), fs.DPMSolver(2, multistep=True), fs.DPMSolverPP(3),
    fs.DPMSolverPP(3, multistep=False), fs.DPMSolverPP(3, form="official"), fs.DPMSolverSDE(2),
    fs.DEIS(3, "t"), fs.DEIS(4, "rho"), fs.EDMHeun(churn=10.0), fs.IPNDM(2), fs.PNDM("plms"),
    fs.SASolver(2, 0), fs.UniPC(3, "bh1"), fs.UniPC(3, prediction="noise"), fs.UniPC(2, corrector=False),
]  # fmt: skip
SOLVERS = [c() for n, c in fs.solvers().items() if n not in LEARNED] + OPTIONS


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_every_solver_keeps_its_card(solver):
    """Evaluations, dtype, shape, purity, what it needs of the noise; plans, and a fixed point of theirs."""
    check_solver(solver)


class Forgetful(fs.EulerMaruyama):
    """Keeps state: its second step is another."""

    seen = 0

    def step(self, *args):
        self.seen += 1
        return super().step(*args)[0] * (1 + 1e-9 * self.seen), None


class Greedy(fs.EulerMaruyama):
    """Takes H without saying so."""

    def step(self, sde, t0, t1, y, increment, carry):
        return y + sde.drift(t0, y) * increment.h + 0 * y * increment.H.sum(), carry


class Twice(fs.EulerMaruyama):
    """Evaluates drift twice and declares one."""

    def step(self, sde, t0, t1, y, increment, carry):
        sde.drift(t0, y)
        return super().step(sde, t0, t1, y, increment, carry)


class InPlace(fs.EulerMaruyama):
    """Writes to the increment."""

    def step(self, sde, t0, t1, y, increment, carry):
        new = super().step(sde, t0, t1, y, increment, carry)
        increment.W.zero_()
        return new


class Double(fs.EulerMaruyama):
    """Comes back in float64."""

    def step(self, *args):
        return super().step(*args)[0].double(), None


class Overtaken(fs.EulerMaruyama):
    card = replace(fs.EulerMaruyama.card, weak_order={"diagonal": 0.25})


class Absent(fs.EulerMaruyama):
    """Has a step of another signature."""

    def step(self, sde, t0, t1, y):
        return y


class Bare(fs.EDMEuler):
    card = None


class Restless(fs.EDMEuler):
    """Keeps state: its second plan is another."""

    seen = 0

    def plan(self, sigmas):
        self.seen += 1
        found = super().plan(sigmas)
        return replace(found, b=found.b * (1 + 1e-9 * self.seen))


class Late(fs.EDMEuler):
    """Leaves a little of the state where the whole estimate belongs."""

    def plan(self, sigmas):
        found = super().plan(sigmas)
        return replace(found, b=found.b * (1 - 1e-3))


class Loud(fs.EulerMaruyama):
    """Takes three times the estimate, where the grid does not end at 0."""

    def plan(self, sigmas):
        found = super().plan(sigmas)
        return replace(found, b=3 * found.b) if sigmas[-1] > 0 else found


class Wandering(fs.DPMSolverSDE):
    """Looks at another part of the path each time."""

    seen = 0

    def plan(self, sigmas):
        self.seen += 1
        found = super().plan(sigmas)
        return replace(found, noise=found.noise * (1 + 1e-9 * self.seen))


class Scribbling(fs.EDMEuler):
    """Writes to the grid."""

    def plan(self, sigmas):
        found = super().plan(sigmas)
        sigmas[0] *= 1.001
        return found


class Logarithmic(fs.EDMEuler):
    """Does not know the end of the grid, sigma = 0."""

    def plan(self, sigmas):
        if not sigmas.log().isfinite().all():
            raise ZeroDivisionError("log of 0")
        return super().plan(sigmas)


BROKEN = {
    Forgetful: "differ", Greedy: "more than levy='W'|NoneType",
    Twice: "16 drift evaluations in 8 steps, the card says 8",
    InPlace: "two solves|wrote", Double: "came back as torch.float64", Overtaken: "weak order is below",
    Absent: "diagonal noise.*TypeError", Bare: "no card", Restless: "two plans", Late: "never changes",
    Scribbling: "wrote to the grid", Logarithmic: "steps=1, final='x0': ZeroDivisionError: log of 0",
    Loud: "final='sigma_min': where the estimate", Wandering: "two plans",
}  # fmt: skip


@pytest.mark.parametrize("broken", BROKEN)
def test_the_conformance_suite_catches(broken):
    with pytest.raises(ConformanceError, match=BROKEN[broken]):
        check_solver(broken())


WRONG = {
    "summary": None, "reference": 3, "levy": "Q", "sde_types": "ito", "strong_order": 0.5,
    "weak_order": {"diagonl": 1.0}, "deterministic_order": "two", "evaluations": 0,
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_card_refuses_what_no_loop_understands(name):
    with pytest.raises(fs.InputError, match=name):
        fs.Card(**{"summary": "a solver", "reference": "Eq. (1)", name: WRONG[name]})
