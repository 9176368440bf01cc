"""Noise for k-diffusion samplers: determined by each sample's seed, and additive over intervals."""

import math

import pytest
import torch
from k_diffusion_cases import BATCH, CHURNED, MIXTURE, PROBLEM, STOCHASTIC, bell, karras, model, name, start

import fewstep as fs
from fewstep.integrations import k_diffusion as kd

X = start(4)


@pytest.mark.parametrize("solver", STOCHASTIC + CHURNED, ids=name)
def test_sample_depends_on_its_seed_only(solver):
    """Bitwise: alone, in a batch, in another order; sample j of seed s is sample 0 of seed s + j."""
    f, sigmas, x = (
        kd.sampler(solver),
        karras(5, dtype=torch.float32),
        start(7, dtype=torch.float32, event=(5,)),
    )
    batch = f(bell, x, sigmas, seed=11)
    for j in (0, 3, 6):
        assert torch.equal(f(bell, x[j : j + 1], sigmas, seed=11 + j)[0], batch[j])
    order = torch.tensor([4, 0, 6, 2])
    assert torch.equal(f(bell, x[order], sigmas, seed=(11 + order).tolist()), batch[order])
    assert not torch.equal(f(bell, x, sigmas, seed=12), batch)


def test_seed_is_taken_from_argument_then_extra_args_then_torch():
    x, sigmas, f = start(), karras(5), kd.sampler(fs.EulerMaruyama())
    seen = []

    def conditioned(x, sigma, seed=None, **rest):
        seen.append((seed, rest))
        return MIXTURE.denoiser(x, sigma)

    comfy = {"model_options": {}, "seed": 7, "denoise_mask": None}
    a = f(conditioned, x, sigmas, extra_args=comfy)
    assert seen == [(7, {"model_options": {}, "denoise_mask": None})] * 5
    assert comfy["seed"] == 7
    assert torch.equal(a, f(model, x, sigmas, seed=7))
    assert torch.equal(a, f(model, x, sigmas, extra_args={"seed": 8}, seed=range(7, 7 + BATCH)))
    torch.manual_seed(1)
    first, second = f(model, x, sigmas), f(model, x, sigmas, {"seed": None})
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(f(model, x, sigmas), first)


def test_torch_generator_is_used_only_where_noise_needs_a_seed():
    x, sigmas = start(), karras(5)
    noise = lambda s, t: torch.zeros_like(x)  # noqa: E731
    own = kd.BrownianNoiseSampler(x, 0.03, 15.0, seed=1, transform=kd.snr)
    state = torch.get_rng_state()
    kd.sampler(fs.UniPC(3))(model, x, sigmas)
    kd.sampler(fs.DDIM(1.0))(model, x, sigmas, noise_sampler=noise)
    kd.sampler(fs.ShARK())(model, x, sigmas, noise_sampler=own)
    kd.sampler(fs.ShARK())(model, x, sigmas, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    a, b = (kd.BrownianNoiseSampler(x, 0.03, 15.0)(4.0, 1.0) for _ in range(2))
    assert not torch.equal(a, b)
    torch.set_rng_state(state)
    assert torch.equal(kd.BrownianNoiseSampler(x, 0.03, 15.0)(4.0, 1.0), a)
    for solver in CHURNED:
        assert not torch.equal(*(kd.sampler(solver)(model, x, sigmas) for _ in range(2)))


@pytest.fixture(scope="module")
def fine():
    """A start of 60 samples, and the images of a fine grid at seed 2."""
    x = start(60)
    even = torch.logspace(math.log10(15), math.log10(0.03), 129, dtype=torch.float64)
    even[0], even[-1] = 15.0, 0.03
    return x, kd.sampler(fs.ShARK())(model, x, even, seed=2)


@pytest.mark.parametrize(
    ("solver", "order"), [(fs.EulerMaruyama(), 1), (fs.DPMSolverSDE(2), 1), (fs.ShARK(), 1.5)], ids=name
)
def test_one_seed_converges_to_one_image(solver, order, fine):
    """The distance to a fine solution, by another solver on another kind of grid, falls with its order."""
    (x, fine), f = fine, kd.sampler(solver)
    errors = [(f(model, x, karras(n, False), seed=2) - fine).square().mean().sqrt() for n in (9, 33)]
    assert math.log2(errors[0] / errors[1]) / 2 > order - 0.3, errors
    assert (f(model, x, karras(33, False), seed=3) - fine).square().mean().sqrt() > 5 * errors[-1]


def test_run_from_a_lower_level_uses_the_same_path():
    """A grid that starts lower gets the noise that a full run had there."""
    x, sigmas, seen = start(), karras(9), []
    f = kd.sampler(fs.EulerMaruyama())
    full = f(model, x, sigmas, callback=lambda d: seen.append(d["x"]), seed=5)
    torch.testing.assert_close(f(model, seen[4], sigmas[4:], seed=5), full, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("solver", "steps"),
    [(fs.EulerMaruyama(), 100), (fs.ShARK(), 30), (CHURNED[0], 100), (CHURNED[1], 30)],
    ids=name,
)
def test_stochastic_samplers_have_the_right_law(solver, steps):
    """Mean and variance of 200 x 50 samples of N(0, 1/4) within 5 standard errors and the step bias."""
    x = start(200, event=(50,), dtype=torch.float32)
    got = kd.sampler(solver)(bell, x, karras(steps, dtype=torch.float32), seed=1)
    assert abs(got.mean()) < 5 * 0.5 / math.sqrt(got.numel())
    assert abs(got.var() / 0.25 - 1) < 5 * math.sqrt(2 / got.numel()) + 0.04


# ---------------------------------------------------------------- the noise sampler

CLOCKS = {
    "sigma": lambda s: s, "snr": kd.snr, "log": lambda s: -s.log(), "negative": lambda s: -s,
}  # fmt: skip


@pytest.mark.parametrize("clock", CLOCKS)
def test_noise_is_additive_over_intervals(clock):
    """The noise of an interval is the sqrt-weighted sum of its parts'; reversed it changes sign."""
    transform = CLOCKS[clock]
    levels = karras(8, zero=False)
    make = lambda: kd.BrownianNoiseSampler(start(), 0.03, 15.0, seed=4, transform=transform)  # noqa: E731
    a, b = make(), make()
    u = transform(levels)
    root = u.diff().abs().sqrt()
    parts = [a(s, t) for s, t in zip(levels[:-1], levels[1:], strict=True)]
    full = sum(r * z for r, z in zip(root, parts, strict=True)) / (u[-1] - u[0]).abs().sqrt()
    torch.testing.assert_close(b(levels[0], levels[-1]), full, rtol=1e-5, atol=1e-5)
    backwards = [b(t, s) for s, t in zip(levels[:-1], levels[1:], strict=True)][::-1]
    for z, minus in zip(parts, backwards[::-1], strict=True):
        assert torch.equal(z, -minus)


def test_noise_is_unit_normal_and_per_seed():
    x = torch.zeros(64, 500)
    noise = kd.BrownianNoiseSampler(x, 0.03, 15.0, seed=1)
    z = torch.stack([noise(15.0, 4.0), noise(4.0, 1.0), noise(torch.tensor(1.0), torch.tensor(0.03))])
    assert (z.flatten(1).mean(1).abs() < 5 / math.sqrt(32000)).all()
    assert ((z.flatten(1).var(1) - 1).abs() < 5 * math.sqrt(2 / 32000)).all()
    assert (torch.corrcoef(z.flatten(1)).triu(1).abs() < 5 / math.sqrt(32000)).all()
    alone = kd.BrownianNoiseSampler(x[:1], 0.03, 15.0, seed=[3])
    pair = kd.BrownianNoiseSampler(x[:2], 0.03, 15.0, seed=[9, 3])
    assert torch.equal(alone(4.0, 1.0)[0], pair(4.0, 1.0)[1])
    assert torch.equal(alone(4.0, 1.0)[0], noise(4.0, 1.0)[2])  # 1 + 2
    assert kd.BrownianNoiseSampler(x.half(), 0.03, 15.0)(4.0, 1.0).dtype == torch.float16
    # a rounding beyond the ends, as float32 logarithms give it
    assert torch.equal(alone(15.000002, 1.0), alone(15.0, 1.0))


NOISE_BAD = {
    "x": (dict(x=torch.ones(2, dtype=torch.int64)), "x: got torch.int64"),
    "range": (dict(sigma_min=15.0, sigma_max=0.03), "sigma_min, sigma_max: got 15, 0.03"),
    "seeds": (dict(seed=[1]), "seed: got 1, expected"),
    "levy": (dict(levy="A"), "levy"),
    "outside": (dict(ask=(20.0, 1.0)), r"sigma: got 20; expected a level in \[0.03, 15\]"),
    "equal": (dict(ask=(1.0, 1.0)), "no noise between equal ones"),
}  # fmt: skip


@pytest.mark.parametrize("case", NOISE_BAD)
def test_bad_noise_raises_a_clear_error(case):
    changes, words = NOISE_BAD[case]
    ask = changes.get("ask", (4.0, 1.0))
    given = dict(x=X, sigma_min=0.03, sigma_max=15.0) | {k: v for k, v in changes.items() if k != "ask"}
    with pytest.raises(fs.InputError, match=words):
        kd.BrownianNoiseSampler(**given)(*ask)


def test_snr_noise_sampler_is_a_path_for_every_solver():
    """In the clock 1/sigma^2 one object is one path for every solver, as the path of fs.sample."""
    x, sigmas = start(), karras(9)
    noise = kd.BrownianNoiseSampler(x, 0.03, 15.0, seed=2, transform=lambda s: 1 / s**2)
    for solver in (fs.ShARK(), fs.EulerMaruyama()):
        mine = kd.sampler(solver)(model, x, sigmas, noise_sampler=noise)
        theirs = fs.sample(PROBLEM, solver, noise=x, sigmas=sigmas, path=noise.path)
        # the object moves levels by 1e-7, and hence the path by the square root of that
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-2)
    z = kd.sampler(fs.EulerMaruyama())(model, x, sigmas, noise_sampler=lambda s, t: noise(s, t))
    mine = kd.sampler(fs.EulerMaruyama())(model, x, sigmas, noise_sampler=noise)
    torch.testing.assert_close(z, mine, rtol=0, atol=2e-2)


@pytest.mark.parametrize("solver", [fs.EDMEuler(churn=4), fs.EDMHeun(churn=4), fs.Restart()], ids=repr)
def test_fresh_noise_takes_no_noise_sampler(solver):
    """Churn and restarts draw noise that belongs to no interval: a caller's source would be ignored."""
    x = start()
    with pytest.raises(fs.InputError, match="noise_sampler: got function; .* belongs to no interval.*seed="):
        kd.sampler(solver)(model, x, karras(6), noise_sampler=lambda s, t: torch.zeros_like(x))
    kd.sampler(fs.EDMEuler())(model, x, karras(6), noise_sampler=lambda s, t: torch.zeros_like(x))
