"""LCM and TCD: diffusers' numbers on the same noise, and the law of the data for networks that are distilled."""

import pytest
import torch

import fewstep as fs
from fewstep.compat import DiffusersLCM
from fewstep.executor import run
from fewstep.integrations.k_diffusion import sampler

df = pytest.importorskip("diffusers")
LATENT = fs.DiscreteVP.named("scaled_linear", 1000, 0.00085, 0.012)
VARIANCE = torch.tensor([0.04, 0.3, 1.0], dtype=torch.float64)
SHAPE = (16, 3)


def mean(x, sigma):
    """The posterior mean of Gaussian data."""
    return VARIANCE.to(x) / (VARIANCE.to(x) + sigma**2) * x


def end(x, sigma):
    """The end of the probability-flow ODE of Gaussian data: what a consistency-distilled network returns."""
    return (VARIANCE.to(x) / (VARIANCE.to(x) + sigma**2)).sqrt() * x


def normals(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda *_: (torch.randn(SHAPE, generator=generator, dtype=torch.float64),)


def stock(scheduler, steps, monkeypatch, **options):
    """The last sample, the labels, and the levels of diffusers' scheduler in float64."""
    module, draw = __import__(type(scheduler).__module__, fromlist=["x"]), normals(1)
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: draw()[0])
    scheduler.set_timesteps(steps)
    (x,) = normals(0)()
    for t in scheduler.timesteps:
        if hasattr(scheduler, "sigmas"):
            s = scheduler.sigmas[int((scheduler.timesteps == t).nonzero())].double()
            alpha, sigma, velocity = (1 - s).clamp(min=1e-7), s / (1 - s).clamp(min=1e-7), True
        else:
            abar = scheduler.alphas_cumprod[t].double()
            alpha, sigma, velocity = abar.sqrt(), ((1 - abar) / abar).sqrt(), False
        noise = (x / alpha - mean(x / alpha, sigma)) / sigma
        out = noise - mean(x / alpha, sigma) if velocity else noise
        x = scheduler.step(out, t, x, **options).prev_sample
    return x, scheduler.timesteps


def ours(solver, schedule, sigmas):
    plan = solver.plan(sigmas, schedule)
    (x,) = normals(0)()
    x = run(plan, x / schedule.alpha(sigmas[:1]), lambda i, at, _: mean(at, plan.sigma[i]), normals(1))
    return x * (schedule.alpha(sigmas[-1:]) if sigmas[-1] > 0 else 1)


@pytest.mark.parametrize("steps", [1, 2, 4, 7])
def test_lcm_equals_diffusers(steps, monkeypatch):
    want, labels = stock(df.LCMScheduler(), steps, monkeypatch)
    if steps == 4:
        assert labels.tolist() == [999, 759, 499, 259]
    grid = torch.cat([LATENT.sigma(labels.double()), torch.zeros(1)])
    torch.testing.assert_close(ours(DiffusersLCM(), LATENT, grid), want, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(ours(fs.LCM(), LATENT, grid), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("steps", [2, 4])
def test_tcd_equals_diffusers(steps, gamma, monkeypatch):
    want, labels = stock(df.TCDScheduler(), steps, monkeypatch, eta=gamma)
    grid = LATENT.sigma(torch.cat([labels, labels.new_zeros(1)]).double())
    torch.testing.assert_close(ours(fs.TCD(gamma), LATENT, grid), want, rtol=2e-6, atol=2e-6)


def test_flow_match_lcm_equals_diffusers(monkeypatch):
    scheduler = df.FlowMatchLCMScheduler(shift=3.0)
    want, labels = stock(scheduler, 4, monkeypatch)
    t = (labels.double() / 1000).clamp(max=1 - 1e-7)
    grid = torch.cat([t / (1 - t), torch.zeros(1)])
    got = ours(fs.LCM(), fs.FlowMatching(), grid)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def variance(plan, evaluate):
    """The variance of the samples where everything is linear: the sum of squares over all normals."""
    count = int((~plan.noise[:, 0].isnan()).sum())
    rows = iter(torch.eye(count + 1, dtype=torch.float64)[1:, :, None].expand(-1, -1, 3))
    x = torch.zeros(count + 1, 3, dtype=torch.float64)
    x[0] = (VARIANCE + plan.sigmas[0] ** 2).sqrt()
    return run(plan, x, evaluate, lambda *_: (next(rows),)).square().sum(0)


@pytest.mark.parametrize("steps", [1, 2, 4, 10, 40])
def test_law_of_a_distilled_network_is_that_of_the_data_at_any_number_of_steps(steps):
    grid = fs.sigma_grid(LATENT, steps, "trailing")
    plan = fs.LCM().plan(grid)
    law = variance(plan, lambda i, x, _: end(x, plan.sigma[i]))
    torch.testing.assert_close(law, VARIANCE, rtol=1e-12, atol=0)
    # with the posterior mean the variance is that of its own last step, at any number of steps
    less = variance(plan, lambda i, x, _: mean(x, plan.sigma[i]))
    last = grid[-2] ** 2
    assert (less < VARIANCE**2 / (VARIANCE + last) * (1 + 1e-12)).all()


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.8, 1.0])
def test_law_of_tcd_with_the_exact_trajectory(gamma):
    """A network whose DDIM step to u is the flow's: D with D + u/s (x - D) = the state of the flow at u."""
    plan = fs.TCD(gamma).plan(fs.sigma_grid(LATENT, 5, "trailing", "sigma_min"), LATENT)

    def trajectory(i, x, _):
        s, ratio = plan.sigma[i], plan.update_x[i]
        u = ratio * s
        return (((VARIANCE + u**2) / (VARIANCE + s**2)).sqrt() - ratio) / (1 - ratio) * x

    law = variance(plan, trajectory)
    torch.testing.assert_close(law, VARIANCE + LATENT.sigma_min**2, rtol=1e-12, atol=0)


def test_lcm_in_k_diffusion_is_the_estimate_plus_fresh_noise():
    sigmas, seen = torch.tensor([14.0, 5.0, 1.0, 0.0]), []
    x = 14 * torch.randn(4, 3, generator=torch.Generator().manual_seed(0))

    def model(x, sigma, **_):
        seen.append(x.clone())
        return mean(x, sigma[:, None])

    out = sampler(fs.LCM())(model, x, sigmas, disable=True, seed=3)
    noise = [(seen[k + 1] - mean(seen[k], sigmas[k])) / sigmas[k + 1] for k in range(2)]
    assert all(0.5 < float(z.std()) < 1.6 for z in noise)
    assert float((noise[0] - noise[1]).abs().max()) > 0.1
    torch.testing.assert_close(out, mean(seen[2], sigmas[2]))
    calls = []

    def noise_sampler(s, t):
        calls.append((float(s), float(t)))
        return torch.ones(4, 3)

    sampler(fs.LCM())(model, x, sigmas, disable=True, noise_sampler=noise_sampler)
    assert calls == [(14.0, 5.0), (5.0, 1.0)]
    torch.testing.assert_close(seen[4], mean(x, sigmas[0]) + 5.0)


def test_samples_depend_on_the_seed_alone():
    model = fs.DiffusionModel(end, LATENT)
    first, again = (fs.sample(model, fs.TCD(0.5), shape=(4, 3), steps=4, seeds=s) for s in ([1, 2, 3, 4], [9, 2, 8, 1]))
    torch.testing.assert_close(first[[1, 0]], again[[1, 3]])


def test_tcd_needs_a_schedule_between_its_ends():
    sigmas = torch.tensor([10.0, 1.0, 0.1])
    for gamma in (0.0, 1.0):
        assert fs.TCD(gamma).plan(sigmas).nfe == 2
    with pytest.raises(fs.InputError, match="counts in model time"):
        fs.TCD(0.3).plan(sigmas)
    with pytest.raises(fs.InputError, match="gamma: got 1.5"):
        fs.TCD(1.5)
