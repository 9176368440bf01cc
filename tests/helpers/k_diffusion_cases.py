"""Models, grids and solvers for the tests of the k-diffusion integration and of its peers."""

import torch

import fewstep as fs
from fewstep_analysis.diffusion_problems import ring, smooth

MIXTURE = smooth().mixture
PROBLEM = fs.DiffusionModel(MIXTURE.denoiser, fs.EDM(0.03, 15.0))
BATCH = 16


def model(x, sigma, **extra_args):
    """A k-diffusion model: sigma has the batch's shape."""
    assert sigma.shape == (len(x),)
    assert sigma.dtype == x.dtype
    return MIXTURE.denoiser(x, sigma)


def bell(x, sigma, **extra_args):
    """The denoiser of data N(0, 1/4), elementwise: no sum depends on the batch."""
    return x * 0.25 / (0.25 + sigma[0] ** 2)


def karras(n, zero=True, low=0.03, high=15.0, dtype=torch.float64):
    sigmas = torch.linspace(high ** (1 / 7), low ** (1 / 7), n, dtype=torch.float64) ** 7
    sigmas[0], sigmas[-1] = high, low
    return (torch.cat([sigmas, sigmas.new_zeros(1)]) if zero else sigmas).to(dtype)


def start(batch=BATCH, sigma=15.0, dtype=torch.float64, seed=0, event=(2,)):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *event, generator=generator, dtype=torch.float64).mul(sigma).to(dtype)


def path(x, levy="K", seed=3):
    return fs.BrownianPath(x.shape, 16.0**-2, 0.02**-2, seed, levy, dtype=x.dtype, clock="log")


DETERMINISTIC = [
    fs.DDIM(), fs.EDMEuler(), fs.EDMHeun(), fs.DPMSolver(2), fs.DPMSolver(3), fs.DPMSolverPP(1),
    fs.DPMSolverPP(2), fs.DPMSolverPP(3), fs.DPMSolverPP(2, multistep=False),
    fs.DPMSolverPP(3, multistep=False), fs.DEIS(), fs.IPNDM(),
    fs.PNDM("plms"), fs.UniPC(2), fs.UniPC(3),
]  # fmt: skip
STOCHASTIC = [
    fs.EulerMaruyama(), fs.DDIM(1.0), fs.DDIM(0.5), fs.DDPM(), fs.DPMSolverSDE(2), fs.SASolver(), fs.SEEDS(3),
    fs.SRA1(), fs.SEA(), fs.SOSRA(), fs.ShARK(),
]  # fmt: skip
CHURNED = [fs.EDMEuler(churn=4), fs.EDMHeun(churn=4)]


def name(value):
    return type(value).__name__ + str(getattr(value, "order", ""))


def network(schedule):
    return lambda x, sigma: (x - ring().mixture.denoiser(x, sigma)) / sigma[:, None]
