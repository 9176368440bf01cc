"""Comparison with k-diffusion itself: the same model, grid and noise give the same numbers.

Skipped where its wheel or torchdiffeq is missing: pip install --no-deps k-diffusion==0.1.1 torchdiffeq
"""

import math
from types import SimpleNamespace

import pytest
import torch
from k_diffusion_cases import karras, model, network, start

import fewstep as fs
import peers_k_diffusion
from fewstep.compat import OfficialDPM
from fewstep.integrations import k_diffusion as kd


@pytest.fixture(scope="module")
def theirs():
    """k_diffusion.sampling and .external."""
    if not peers_k_diffusion.installed():
        pytest.skip("k-diffusion or torchdiffeq is not installed")
    with peers_k_diffusion.modules() as (sampling, external):
        yield SimpleNamespace(sampling=sampling, external=external)


SAME = {
    "euler": (fs.EDMEuler(), {}), "heun": (fs.EDMHeun(), {}), "dpm_2": (fs.DPMSolver(2), {}),
    "dpmpp_2m": (fs.DPMSolverPP(2), {}),
    "lms": (kd.SAMPLERS["lms"], {}), "dpm_2_ancestral": (kd.SAMPLERS["dpm_2_ancestral"], {}),
    "dpmpp_2s_ancestral": (kd.SAMPLERS["dpmpp_2s_ancestral"], {}),
    "dpmpp_2s_ancestral eta": (fs.Ancestral(eta=0.5), {"eta": 0.5}),
    "dpmpp_sde": (kd.SAMPLERS["dpmpp_sde"], {}),
    "euler_ancestral": (fs.DDIM(1.0), {}),
    "dpmpp_2m_sde": (fs.DPMSolverSDE(2), {}),
    "dpmpp_2m_sde heun": (fs.DPMSolverSDE(2, solver_type="heun"), {"solver_type": "heun"}),
    "dpmpp_2m_sde eta": (fs.DPMSolverSDE(2, eta=0.5), {"eta": 0.5}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", SAME)
def test_results_equal_those_of_k_diffusion(theirs, case, dtype):
    """State and callbacks, with the same noise sampler: to 1e-5 in float32, 1e-12 in float64."""
    solver, options = SAME[case]
    function = getattr(theirs.sampling, "sample_" + case.split()[0])
    sigmas = theirs.sampling.get_sigmas_karras(12, 0.03, 15.0).to(dtype)
    x, (ours, reference) = start(64, float(sigmas[0]), dtype), ([], [])
    # the parts of a step agree on one path in the clock 1/sigma^2 only
    clock = kd.snr if "dpmpp_sde" in case else None
    noise = {"noise_sampler": kd.BrownianNoiseSampler(x, sigmas[-2], sigmas[0], seed=5, transform=clock)}
    noisy = noise if "sde" in case or "ancestral" in case else {}
    a = kd.sampler(solver)(model, x, sigmas, callback=ours.append, disable=True, **noise)
    b = function(model, x, sigmas, callback=reference.append, disable=True, **options, **noisy)
    # the object moves levels inside a step by 2^-24 of the clock
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-5 if clock else 1e-12}[dtype]
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    for mine, other in zip(ours, reference, strict=True):
        assert mine["i"] == other["i"]
        for key in ("x", "sigma", "sigma_hat", "denoised"):
            torch.testing.assert_close(mine[key], other[key], rtol=tolerance, atol=15 * tolerance)


def test_3m_sde_is_the_official_form_above_zero(theirs):
    """Its third-order term lacks a factor 2; before a last level of 0 it does not lower the order."""
    x, sigmas = start(64), karras(12, zero=False)
    noise = kd.BrownianNoiseSampler(x, 0.03, 15.0, seed=5)
    solver = OfficialDPM(fs.DPMSolverSDE(3, solver_type="heun"))
    a = kd.sampler(solver)(model, x, sigmas, noise_sampler=noise)
    b = theirs.sampling.sample_dpmpp_3m_sde(model, x, sigmas, disable=True, noise_sampler=noise)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings(
    "ignore:Should have t"
)  # torchsde warns about float32 ends, with k-diffusion's own samplers too
def test_sampler_accepts_the_noise_tree_of_k_diffusion(theirs):
    sigmas = theirs.sampling.get_sigmas_karras(12, 0.03, 15.0)
    x = start(64, float(sigmas[0]), torch.float32)
    tree = theirs.sampling.BrownianTreeNoiseSampler(x, sigmas[-2], sigmas[0], seed=3)
    a = kd.sampler(fs.DPMSolverSDE(2))(model, x, sigmas, noise_sampler=tree)
    b = theirs.sampling.sample_dpmpp_2m_sde(model, x, sigmas, disable=True, noise_sampler=tree)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_sampler_of_k_diffusion_accepts_the_noise_of_this_library(theirs):
    """sample_dpmpp_2m_sde on one path: the distance to 256 steps falls at about order 1."""
    x = start(100)

    def run(n):
        noise = kd.BrownianNoiseSampler(x, 0.03, 15.0, seed=1)
        return theirs.sampling.sample_dpmpp_2m_sde(model, x, karras(n, False), disable=True, noise_sampler=noise)

    fine = run(257)
    errors = [(run(n) - fine).square().mean().sqrt() for n in (9, 17, 33, 65)]
    slopes = [math.log2(a / b) for a, b in zip(errors[:-1], errors[1:], strict=True)]
    assert sum(slopes) / 3 > 0.8, (errors, slopes)


def test_wrapper_of_k_diffusion_equals_from_epsilon(theirs):
    """DiscreteEpsDDPMDenoiser on a noise network, against from_epsilon on the same table."""
    schedule = fs.DiscreteVP.named("linear")
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)

    def epsilon(x_t, t, **extra_args):
        sigma = schedule.sigma(t.double()).to(x_t)
        x = x_t / schedule.alpha(sigma)[:, None]
        return network(schedule)(x, sigma)

    wrapper = theirs.external.DiscreteEpsDDPMDenoiser(epsilon, torch.cumprod(1 - betas, 0), quantize=False)
    sigmas = fs.sigma_grid(schedule, 12)
    x = start(64, float(sigmas[0]))
    own = fs.DiffusionModel(fs.from_epsilon(epsilon, schedule), schedule)
    ours = fs.sample(own, fs.DPMSolverPP(2), noise=x * schedule.alpha(sigmas[0]), sigmas=sigmas)
    problem = kd.as_denoiser(wrapper)
    torch.testing.assert_close(problem.schedule.sigma_max, schedule.sigma_max, rtol=1e-6, atol=0)
    for got in (
        fs.sample(problem, fs.DPMSolverPP(2), noise=x, sigmas=sigmas),
        kd.sampler(fs.DPMSolverPP(2))(wrapper, x, sigmas),
        theirs.sampling.sample_dpmpp_2m(wrapper, x, sigmas, disable=True),
        theirs.sampling.sample_dpmpp_2m(kd.as_wrapper(own), x, sigmas, disable=True),
    ):
        torch.testing.assert_close(got, ours, rtol=1e-6, atol=1e-6)
    v = theirs.external.VDenoiser(lambda x, t: x)
    assert kd.as_denoiser(v, sigma_min=0.01, sigma_max=80.0).schedule == fs.EDM(0.01, 80.0)
