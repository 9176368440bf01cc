"""`log_likelihood`: closed forms on Gaussian data, a mixture's density, order in steps, honest standard errors."""

import math

import pytest
import torch

import fewstep as fs
from fewstep_analysis.diffusion_problems import by_name

F64 = torch.float64
SCHEDULES = [fs.VPLinear(), fs.VE(), fs.EDM(0.02, 40.0), fs.FlowMatching(), fs.DiscreteVP.named("linear")]
SMOOTH = by_name("smooth")


def ends(schedule):
    sigmas = torch.tensor([schedule.sigma_min, schedule.sigma_max], dtype=F64)
    return *sigmas, float(schedule.alpha(sigmas[:1]))


def gaussian(variance, schedule):
    return fs.DiffusionModel(lambda x, s: x * variance.to(x) / (variance.to(x) + s * s), schedule)


def flow_density(x0, variance, schedule):
    """The density at x0 of what the exact flow makes of N(0, sigma_max^2)."""
    low, high, alpha = ends(schedule)
    ratio = (variance + high**2) / (variance + low**2)
    end = x0 / alpha * ratio.sqrt()
    normal = -0.5 * (end / high).square() - math.log(float(high)) - 0.5 * math.log(2 * math.pi)
    return (normal + 0.5 * ratio.log() - math.log(alpha)).flatten(1).sum(1)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_gaussian_data_have_their_density_and_order_four(schedule):
    variance = torch.tensor([0.3, 0.05, 1.0], dtype=F64)
    x0 = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=F64) * variance.sqrt()
    want = flow_density(x0, variance, schedule)
    errors = []
    for steps in (30, 60):
        found = fs.log_likelihood(gaussian(variance, schedule), x0, steps=steps)
        assert torch.equal(found.error, torch.zeros(6, dtype=F64))  # three elements, four probes: exact
        errors.append(float((found.value - want).abs().max()))
    assert errors[1] < 2e-3
    assert 3.5 < math.log2(errors[0] / errors[1]) < 5.5


def test_a_mixture_in_the_plane_has_its_exact_density():
    m, (low, _, alpha) = SMOOTH.mixture, ends(SMOOTH.schedule)
    x0 = m.sample(64)
    v = m.stds**2 + low**2
    distance = (x0[:, None] / alpha - m.means).square().sum(-1)
    want = torch.logsumexp(m.weights.log() - distance / 2 / v - (2 * math.pi * v).log(), 1) - 2 * math.log(alpha)
    found = fs.log_likelihood(SMOOTH.problem, x0)
    prior = float((m.weights @ m.means).norm() + 1) * 4 / SMOOTH.schedule.sigma_max  # |mean| |n| / sigma_max
    assert float((found.value - want).abs().max()) < prior + 1e-3
    torch.testing.assert_close(found.bits_per_dim, -found.value / (2 * math.log(2)))


def test_probes_estimate_the_trace_with_the_error_that_is_stated():
    """A denoiser with a full Jacobian: 400 samples, estimates off by their errors in law (mean: 5 sigma)."""
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(24, 24, generator=generator, dtype=F64))[0]
    v = torch.linspace(0.05, 1, 24, dtype=F64)
    schedule = fs.EDM(0.02, 40.0)
    model = fs.DiffusionModel(lambda x, s: ((x @ q) * v / (v + s * s)) @ q.T, schedule)
    x0 = (torch.randn(400, 24, generator=generator, dtype=F64) * v.sqrt()) @ q.T
    want = flow_density(x0 @ q, v, schedule)
    found = fs.log_likelihood(model, x0, probes=16, seed=3)
    z = (found.value - want) / found.error
    assert abs(float(z.mean())) < 5 / math.sqrt(400)
    assert 0.8 < float(z.std()) < 1.3  # of Student's t with 15 degrees of freedom: 1.07
    fewer = fs.log_likelihood(model, x0, probes=4, seed=3)
    assert 1.6 < float(fewer.error.square().mean() / found.error.square().mean()) ** 0.5 < 2.4
    again = fs.log_likelihood(model, x0, probes=4, seed=3, batch=150)
    torch.testing.assert_close(again.value, fewer.value)
    assert not torch.equal(fs.log_likelihood(model, x0, probes=4, seed=4).value, fewer.value)


def test_networks_in_float32_and_events_of_any_shape():
    variance = torch.full((1, 4, 4), 0.3)
    schedule = fs.VPLinear()
    x0 = 0.5 * torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    net = torch.nn.Conv2d(1, 1, 1, bias=False)
    torch.nn.init.ones_(net.weight)
    inner = gaussian(variance, schedule).denoiser
    model = fs.DiffusionModel(lambda x, s: net(inner(x, s)), schedule)
    with torch.no_grad():
        found = fs.log_likelihood(model, x0)
    assert found.value.dtype == F64
    assert not found.value.requires_grad
    torch.testing.assert_close(found.value, flow_density(x0.double(), variance.double(), schedule), rtol=0, atol=1e-3)


def test_a_denoiser_without_a_derivative_is_refused():
    model = fs.DiffusionModel(lambda x, s: x.detach() / (1 + s * s), fs.EDM())
    with pytest.raises(fs.InputError, match="derivative"):
        fs.log_likelihood(model, torch.ones(2, 3))
