"""Methods known under several names, and stochastic samplers along one path."""

import math

import pytest
import torch

import fewstep as fs
from fewstep.plan_builder import PlanBuilder
from fewstep_analysis.diffusion_problems import ring, two_bumps

SDE = dict(shape=(500, 1), seed=1, dtype=torch.float64)


def same(a, b, **options):
    problem = two_bumps().problem
    kw = dict(shape=(16, 1), steps=9, seed=4, dtype=torch.float64) | options
    torch.testing.assert_close(fs.sample(problem, a, **kw), fs.sample(problem, b, **kw), rtol=1e-11, atol=1e-11)


EVERYWHERE = (0.0, math.inf)


@pytest.mark.parametrize("final", ["x0", "sigma_min"])
@pytest.mark.parametrize("spacing", ["logsnr", "karras"])
def test_equal_methods_give_equal_samples(final, spacing):
    grid = dict(final=final, spacing=spacing)
    for other in (
        fs.DPMSolver(1), fs.DPMSolverPP(1), fs.EDMEuler(), fs.IPNDM(1), fs.DEIS(1), fs.DEIS(1, "t"),
        fs.SASolver(1, 0, tau=0), fs.UniPC(1, corrector=False), fs.DPMSolverSDE(1, eta=0),
    ):  # fmt: skip
        same(fs.DDIM(), other, **grid)
    for other in (
        fs.DPMSolverSDE(1), fs.EulerMaruyama(), fs.DDPM(), fs.SASolver(1, 0, between=EVERYWHERE),
    ):  # fmt: skip
        same(fs.DDIM(1.0), other, **grid)
    same(fs.SASolver(2, 0, between=EVERYWHERE), fs.DPMSolverSDE(2, solver_type="heun"), **grid)
    same(fs.DPMSolverPP(2, solver_type="heun"), fs.SASolver(2, 0, tau=0), **grid)
    same(fs.DPMSolverPP(2), fs.DPMSolverSDE(2, eta=0), **grid)
    same(fs.DPMSolverPP(2), fs.UniPC(2, corrector=False), **grid)
    same(fs.DEIS(2), fs.DPMSolver(2, True, "heun"), **grid)
    same(fs.DEIS(3, "rho"), fs.IPNDM(3, True), **grid) if final == "sigma_min" else None


def test_third_order_multistep_methods_agree():
    """3M with twice D2 is exponential Adams-Bashforth, data and noise and stochastic."""
    grid = dict(final="sigma_min", spacing="karras")
    same(fs.DPMSolverPP(3, solver_type="heun"), fs.SASolver(3, 0, tau=0), **grid)
    same(fs.DPMSolverSDE(3, solver_type="heun"), fs.SASolver(3, 0, between=EVERYWHERE), **grid)
    same(fs.DPMSolver(3, True, "heun"), fs.DEIS(3), **grid)


@pytest.mark.parametrize("final", ["x0", "sigma_min"])
def test_2m_is_ddim_with_kappa(final):
    """DDIM on D + kappa (D - D_previous), kappa = h / (2 h_previous), is DPM-Solver++(2M)."""
    sigmas = fs.sigma_grid(two_bumps().schedule, 8, "karras", final)
    builder, previous, h_previous = PlanBuilder("kappa", sigmas), None, None
    for s, t in zip(sigmas.tolist()[:-1], sigmas.tolist()[1:]):
        D = builder.evaluate(builder.x, s)
        h = math.log(s / t) if t > 0 else 0.0
        kappa = h / (2 * h_previous) if previous is not None else 0.0
        O = D + kappa * (D - previous) if previous is not None else D
        builder.advance(t / s * builder.x + (1 - t / s) * O)
        previous, h_previous = D, h
    a, b = builder.finish(), fs.DPMSolverPP(2).plan(sigmas)
    for key in ("stage_x", "stage_eval", "update_x", "update_eval"):
        torch.testing.assert_close(getattr(a, key), getattr(b, key), rtol=1e-13, atol=1e-13)


def test_ipndm_is_ddim_with_half_kappa():
    sigmas = fs.sigma_grid(two_bumps().schedule, 6)
    plan = fs.IPNDM(2).plan(sigmas)
    torch.testing.assert_close(plan.update_eval[1:, 1], -plan.update_eval[1:, 0] / 3)  # weights 1 + 1/2 and -1/2


def test_plan_on_sigmas_hardly_depends_on_the_schedule():
    """DEIS in t between two nearly equal schedules."""
    problem = ring()
    sigmas = fs.sigma_grid(problem.schedule, 7)
    a = fs.DEIS(3, "t").plan(sigmas, problem.schedule)
    b = fs.DEIS(3, "t").plan(sigmas, fs.VPLinear(0.1, 20.0))
    gap = (a.update_eval - b.update_eval).abs().max()
    assert gap < 0.05 * b.update_eval.abs().max()  # DDPM's table is VPLinear, nearly


STOCHASTIC = {
    "DPMSolverSDE 1": fs.DPMSolverSDE(1), "DPMSolverSDE 2": fs.DPMSolverSDE(2),
    "DPMSolverSDE 3": fs.DPMSolverSDE(3), "DDPM": fs.DDPM(), "SEEDS 1": fs.SEEDS(1),
    "SEEDS 2": fs.SEEDS(2), "SEEDS 3": fs.SEEDS(3),
    "SASolver": fs.SASolver(3, 0, between=EVERYWHERE), "SASolver corrected": fs.SASolver(between=EVERYWHERE),
}  # fmt: skip


FAST = ("DPMSolverSDE 2", "DDPM", "SASolver")
NAMES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in STOCHASTIC]


@pytest.mark.parametrize("name", NAMES)
def test_strong_order_along_one_path(name):
    """The same seed at 32 to 256 steps: the samples converge with order 1 (that of W alone)."""
    problem = two_bumps().problem
    xs = [fs.sample(problem, STOCHASTIC[name], steps=n, final="sigma_min", **SDE) for n in (32, 64, 128, 256)]
    gaps = [float((a - b).square().mean().sqrt()) for a, b in zip(xs[:-1], xs[1:])]
    local = [math.log2(a / b) for a, b in zip(gaps[:-1], gaps[1:])]
    assert local[-1] > 0.85, local


@pytest.mark.parametrize("name", NAMES)
def test_stochastic_samplers_have_the_law_of_the_data(name):
    """Mean and variance of 10,000 samples at 100 steps against the mixture's own."""
    problem = two_bumps()
    x = fs.sample(problem.problem, STOCHASTIC[name], shape=(10000, 1), steps=100, seed=3,
                  dtype=torch.float64, final="sigma_min")  # fmt: skip
    truth = problem.mixture.sample(400000) + 0.1 * torch.randn(
        400000, 1, generator=torch.Generator().manual_seed(5), dtype=torch.float64
    )
    assert abs(float(x.mean() - truth.mean())) < 5 * float(truth.std()) / 100
    assert abs(float(x.var() / truth.var()) - 1) < 0.08


def test_eta_of_ddim_above_that_of_ddpm_is_refused():
    with pytest.raises(fs.InputError, match=r"^eta: got 1\.5"):
        fs.DDIM(eta=1.5)
