"""Guidance: closed forms on Gaussian data, evaluations counted, and CFG++ against its formulas."""

import itertools
import math

import pytest
import torch

import fewstep as fs

SCHEDULE = fs.VPLinear()
MEAN, VARIANCE = torch.tensor([1.5, -0.5, 0.25], dtype=torch.float64), 0.3
CLASS = torch.ones(5, 1, dtype=torch.float64)
KINDS = {"epsilon": fs.from_epsilon, "v": fs.from_v, "sample": fs.from_sample, "flow": fs.from_flow}


def posterior(x, sigma, c):
    """E[x0 | x] for x0 ~ N(c MEAN, VARIANCE), x = x0 + sigma n."""
    return (VARIANCE * x + sigma**2 * c * MEAN) / (VARIANCE + sigma**2)


class Network:
    """The exact network of N(c MEAN, VARIANCE) in one of the predictions; counts the rows that it evaluates."""

    def __init__(self, kind, schedule=SCHEDULE):
        self.kind, self.schedule, self.rows = kind, schedule, []

    def __call__(self, x_t, t, c):
        self.rows.append(len(x_t))
        sigma = self.schedule.sigma(t.double()).reshape(-1, 1)
        alpha = self.schedule.alpha(sigma)
        x = x_t / alpha
        x0 = posterior(x, sigma, c)
        eps = (x - x0) / sigma
        return {"epsilon": eps, "v": alpha * (eps - sigma * x0), "sample": x0, "flow": eps - x0}[self.kind]


def guided(kind="epsilon", scale=2.0, **options):
    schedule = fs.FlowMatching() if kind == "flow" else SCHEDULE
    network = Network(kind, schedule)
    denoiser = KINDS[kind](fs.classifier_free_guidance(network, CLASS, 0 * CLASS, scale, **options), schedule)
    return network, fs.DiffusionModel(denoiser, schedule)


def start(problem, n=5):
    own = torch.Generator().manual_seed(3)
    return torch.randn(n, 3, generator=own, dtype=torch.float64) * problem.schedule.sigma_max


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sigma", [0.05, 1.0, 20.0])
def test_scale_per_sample_and_per_level_is_the_posterior_mean_of_the_shifted_class(kind, sigma):
    # the mean of the posterior is affine in c, hence guidance by w is the exact posterior mean of the class w
    x = 2 * torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    level = torch.tensor(sigma, dtype=torch.float64)
    each = torch.tensor([0.0, 0.5, 1.0, 3.0, 7.5], dtype=torch.float64)
    for scale, weight in (
        (3.0, 3.0),
        (each, each.unsqueeze(1)),
        (lambda s: 1 + 2 * s / (1 + s), 1 + 2 * level / (1 + level)),
    ):
        _, problem = guided(kind, scale)
        torch.testing.assert_close(problem.denoiser(x, level), posterior(x, level, weight), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", [fs.DDIM(), fs.DEIS(), fs.DPMSolverPP(2, multistep=False)], ids=repr)
def test_sampling_with_a_scale_per_sample_is_sampling_of_each(solver):
    scales = [0.0, 0.5, 1.0, 3.0, 7.5]
    _, together = guided("v", torch.tensor(scales, dtype=torch.float64))
    x = start(together)
    images = fs.sample(together, solver, noise=x, steps=6)
    for j, scale in enumerate(scales):
        _, one = guided("v", scale)
        torch.testing.assert_close(images[j], fs.sample(one, solver, noise=x, steps=6)[j], rtol=1e-9, atol=1e-9)


def test_interval_makes_no_unconditional_evaluation_outside():
    network, problem = guided(scale=4.0, interval=(0.5, 5.0))
    levels = torch.cat([fs.sigma_grid(SCHEDULE, 12)])
    inside = [0.5 <= s <= 5.0 for s in levels[:-1].tolist()]
    assert 0 < sum(inside) < 12
    x = start(problem)
    images = fs.sample(problem, fs.DDIM(), noise=x, sigmas=levels)
    assert network.rows == [10 if g else 5 for g in inside]
    _, same = guided(scale=lambda s: torch.where((s >= 0.5) & (s <= 5), 4.0, 1.0))
    torch.testing.assert_close(images, fs.sample(same, fs.DDIM(), noise=x, sigmas=levels))
    network, two = guided(scale=4.0, interval=[(0.5, 5.0), (20.0, math.inf)])
    fs.sample(two, fs.DDIM(), noise=x, sigmas=levels)
    assert network.rows == [10 if 0.5 <= s <= 5.0 or s >= 20 else 5 for s in levels[:-1].tolist()]
    level = torch.tensor(7.0, dtype=torch.float64)  # where the level is a tensor, the scale outside is 1
    torch.testing.assert_close(problem.denoiser(x, level), posterior(x, level, 1.0))


def test_scales_of_one_and_zero_evaluate_one_half():
    for scale, rows in ((1.0, 5), (0.0, 5), (2.0, 10)):
        network, problem = guided(scale=scale)
        fs.sample(problem, fs.DDIM(), noise=start(problem), steps=3)
        assert network.rows == [rows] * 3


@pytest.mark.parametrize("kind", ["epsilon", "v"])
def test_rescaled_output_has_the_size_that_the_paper_states(kind):
    x, t = (
        torch.randn(5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64),
        torch.full((5,), 0.4, dtype=torch.float64),
    )
    network = Network(kind)
    plain = fs.classifier_free_guidance(network, CLASS, 0 * CLASS, 6.0)(x, t)
    c = network(x, t, CLASS)
    for phi in (0.7, 1.0):
        got = fs.classifier_free_guidance(network, CLASS, 0 * CLASS, 6.0, rescale=phi)(x, t)
        rescaled = plain * (c.std(1, keepdim=True) / plain.std(1, keepdim=True))
        torch.testing.assert_close(got, phi * rescaled + (1 - phi) * plain)


@pytest.mark.parametrize("kind", KINDS)
def test_apg_keeps_the_orthogonal_part(kind):
    x, level = (
        2 * torch.randn(5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64),
        torch.tensor(1.5, dtype=torch.float64),
    )
    D, other = posterior(x, level, 1.0), posterior(x, level, 0.0)
    for parallel, norm in ((0.0, None), (0.3, 0.4), (1.0, 0.2)):
        _, problem = guided(kind, 5.0, parallel=parallel, norm=norm)
        change = D - other
        if norm is not None:
            change = change * torch.clamp(norm / change.norm(dim=1, keepdim=True), max=1)
        unit = D / D.norm(dim=1, keepdim=True)
        along = (change * unit).sum(1, keepdim=True) * unit
        expected = D + 4 * (change - along + parallel * along)
        torch.testing.assert_close(problem.denoiser(x, level), expected, rtol=1e-8, atol=1e-8)
        for prediction in (fs.DDIM(), fs.DEIS(1)):  # of x0, and of the noise
            sigmas = torch.tensor([1.5, 0.5], dtype=torch.float64)
            alpha = problem.schedule.alpha(sigmas)
            end = fs.sample(problem, prediction, noise=x * alpha[0], sigmas=sigmas) / alpha[1]
            torch.testing.assert_close(end, expected + (x - expected) / 3, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("solver", [fs.DDIM(), fs.EDMEuler(), fs.DEIS(1)], ids=repr)
def test_cfg_pp_steps_to_the_guided_estimate_along_the_unconditional_noise(solver):
    _, problem = guided("v", 0.6)
    x = start(problem)
    levels = fs.sigma_grid(SCHEDULE, 7)
    y = x / SCHEDULE.alpha(levels[:1])
    for s, t in itertools.pairwise(levels):
        y = posterior(y, s, 0.6) + t / s * (y - posterior(y, s, 0.0))
    got = fs.sample(problem, solver, noise=x, sigmas=levels, cfg_pp=True)
    torch.testing.assert_close(got, y, rtol=1e-8, atol=1e-8)
    assert (got - fs.sample(problem, solver, noise=x, sigmas=levels)).abs().max() > 0.01


def test_cfg_pp_with_scale_zero_is_the_unconditional_sampler_and_outside_the_interval_the_conditional_one():
    for solver in (fs.DDIM(eta=0.7), fs.DPMSolverPP(3), fs.EDMHeun(), fs.DEIS(3), fs.Ancestral(fs.DPMSolver(2))):
        _, none = guided(scale=0.0)
        _, ordinary = guided(scale=0.0)
        x = start(none)
        kw = dict(noise=x, steps=6, seed=2)
        torch.testing.assert_close(fs.sample(none, solver, cfg_pp=True, **kw), fs.sample(ordinary, solver, **kw))
        network, outside = guided(scale=0.6, interval=(1e6, 2e6))
        _, conditional = guided(scale=1.0)
        torch.testing.assert_close(fs.sample(outside, solver, cfg_pp=True, **kw), fs.sample(conditional, solver, **kw))
        assert set(network.rows) == {5}


def test_a_vmap_and_a_compiled_program_give_the_same():
    _, problem = guided(
        "v", torch.tensor([0.5] * 5, dtype=torch.float64), interval=(0.1, 30.0), rescale=0.5, parallel=0.2
    )
    x = torch.stack([start(problem), 0.5 * start(problem)])
    solver = fs.DPMSolverPP(2)
    for cfg_pp in (False, True):

        def run(noise, cfg_pp=cfg_pp):
            return fs.sample(problem, solver, noise=noise, steps=4, cfg_pp=cfg_pp)

        expected = torch.stack([run(x[0]), run(x[1])])
        torch.testing.assert_close(torch.func.vmap(run)(x), expected)
        compiled = torch.compile(run, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x[0]), expected[0])


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        (dict(interval=(5.0, 1.0)), "interval"), (dict(interval=[]), "interval"),
        (dict(interval=(1, 2, 3)), "interval"),
        (dict(rescale=2.0), "rescale"), (dict(norm=-1.0), "norm"), (dict(scale=torch.ones(4)), "scale"),
        (dict(scale="7"), "scale"), (dict(parallel=math.nan), "parallel"),
    ],
)  # fmt: skip
def test_options_are_checked(change, argument):
    with pytest.raises(fs.InputError, match=f"^{argument}: got"):
        guided(**change)


def test_cfg_pp_refuses_what_it_cannot_do():
    _, problem = guided()
    plain = fs.DiffusionModel(lambda x, s: x / (1 + s**2), SCHEDULE)
    for model, solver in ((plain, fs.DDIM()), (problem, fs.UniPC()), (problem, fs.Restart())):
        with pytest.raises(fs.InputError, match="^cfg_pp: got"):
            fs.sample(model, solver, noise=start(problem), steps=8, cfg_pp=True)
    with pytest.raises(fs.InputError, match="^scale: got"):
        guided(scale=lambda s: torch.ones(7))[1].denoiser(start(problem), torch.tensor(1.0))
    network, _ = guided()
    with pytest.raises(fs.InputError, match="depend on sigma"):
        fs.classifier_free_guidance(network, CLASS, 0 * CLASS, interval=(1.0, 2.0))(start(problem), CLASS[:, 0])


def test_default_scale_is_seven_and_a_half():
    x, t = torch.ones(5, 3, dtype=torch.float64), torch.full((5,), 0.4, dtype=torch.float64)
    network = Network("epsilon")
    plain, seven = (fs.classifier_free_guidance(network, CLASS, 0 * CLASS, *w) for w in ((), (7.5,)))
    assert torch.equal(plain(x, t), seven(x, t))
