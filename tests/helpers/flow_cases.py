"""Solvers for the tests of flow models, on data N(0, 1/4)."""

import math

import fewstep as fs

V0 = 0.25
FLOW = fs.FlowMatching(t_max=1 - 1e-6)
EVERY = dict(between=(0.0, math.inf))
DISTILLED = ("LCM", "TCD")  # steps for networks that were distilled for them: other networks get another law
STOCHASTIC = [
    *(s for n, s in fs.solvers().items() if isinstance(s, fs.DiffusionSolver) and s.card.levy and n not in DISTILLED),
    fs.DDIM(1.0), fs.DDIM(0.5), fs.DDPM("fixed_large"), fs.SEEDS(1), fs.SEEDS(2), fs.DPMSolverSDE(3),
    fs.DPMSolverSDE(2, eta=0.5), fs.SASolver(**EVERY), fs.SASolver(2, 0, **EVERY), fs.EDMEuler(churn=4),
    fs.EDMHeun(churn=4), fs.Ancestral(fs.DPMSolver(2), 0.5), fs.DPMSolverSDE(2, multistep=False),
    fs.DPMSolverSDE(3, multistep=False), fs.DPMSolverSDE(2, 0.5, "heun", False, 1.0), fs.SASolver(**EVERY, pece=True),
    fs.Restart(intervals=((0.1, 0.5, 3, 2), (0.8, 3.0, 3, 1))), fs.Restart(fs.DEIS(3)), fs.Ancestral(fs.DPMSolver(2)),
    fs.Ancestral(fs.DPMSolver(3)), fs.Ancestral(fs.EDMHeun()),
]  # fmt: skip
DETERMINISTIC = [
    fs.DDIM(), fs.EDMHeun(), fs.DPMSolver(2), fs.DPMSolver(3), fs.DPMSolverPP(2), fs.DPMSolverPP(3),
    fs.DPMSolverPP(3, multistep=False), fs.DEIS(), fs.IPNDM(), fs.PNDM("plms"), fs.UniPC(2), fs.UniPC(3),
]  # fmt: skip


def describe(solver):
    return repr(solver)
