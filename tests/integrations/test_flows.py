"""Flow models, x = (1 - sigma) x0 + sigma n, in the k-diffusion integration: the law of each solver, and detection."""

import math
from types import SimpleNamespace

import pytest
import torch
from flow_cases import DETERMINISTIC, FLOW, STOCHASTIC, V0, describe
from k_diffusion_cases import name

import fewstep as fs
from fewstep.integrations import k_diffusion as kd
from fewstep.testing import _variance


def model(x, sigma, **extra_args):
    """Exact for data N(0, 1/4); sigma is (batch,)."""
    s = sigma.reshape(-1, *[1] * (x.dim() - 1))
    return (1 - s) * V0 / ((1 - s) ** 2 * V0 + s * s) * x


def recursion(solver, steps):
    """The exact variance of the samples of a solver, by its own coefficients."""
    levels = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    if not solver.card.levy:  # the ODE of a flow in its own x
        one = torch.ones(1, dtype=torch.float64)
        return float(_variance(solver.plan(levels), one, lambda x, s: (1 - s) * V0 / ((1 - s) ** 2 * V0 + s * s) * x))
    plan = solver.plan(FLOW.sigma(levels.clamp(max=FLOW.t_max)), FLOW)
    return float(_variance(plan, plan.sigmas[:1], lambda x, s: V0 / (V0 + s * s) * x))


NOISE_STEPS = [
    fs.Ancestral(fs.DPMSolver(2)), fs.Ancestral(fs.DPMSolver(3)), fs.PNDM("plms"), fs.PNDM(), fs.DEIS(3), fs.IPNDM(4),
    fs.UniPC(3, prediction="noise"), fs.GradientEstimation(), fs.DPMSolver(2), fs.DPMSolver(2, r=1.0), fs.DPMSolver(3),
]  # fmt: skip


@pytest.mark.parametrize("solver", NOISE_STEPS, ids=describe)
def test_the_first_step_of_a_flow_does_not_multiply_changes_of_the_estimate(solver):
    """By algebra: the variance of samples after 5 steps in x / (1 - t), the first from sigma = 1e6."""
    levels = FLOW.sigma(torch.linspace(1, 0, 6, dtype=torch.float64).clamp(max=FLOW.t_max))
    plan = solver.plan(levels, FLOW)
    variance = float(_variance(plan, plan.sigmas[:1], lambda x, s: V0 / (V0 + s * s) * x))
    assert 0.5 * V0 < variance < 1.5 * V0


@pytest.mark.parametrize("solver", [*STOCHASTIC, *NOISE_STEPS], ids=describe)
def test_inputs_of_the_network_have_the_size_of_their_level(solver):
    """In `fewstep.sample` from t = 1 - 1e-6, to the time 1e-4 and 0: also the stages of steps over a large factor."""
    sizes = []

    def D(x, s):
        sizes.append(x.square().mean() / (V0 + s**2))
        return V0 / (V0 + s**2) * x

    levels = FLOW.sigma(torch.tensor([1, 0.8, 0.6, 0.4, 0.2, 1e-4, 0], dtype=torch.float64).clamp(max=FLOW.t_max))
    fs.sample(fs.DiffusionModel(D, FLOW), solver, shape=(16, 64), sigmas=levels, seed=1, dtype=torch.float64)
    assert 0.1 < min(sizes) < max(sizes) < 40


@pytest.mark.parametrize("solver", [fs.ShARK(), fs.SEA(), fs.SRA1(), fs.SOSRA()], ids=describe)
@pytest.mark.parametrize("steps", [10, 15, 20, 30])
def test_steps_of_diffusers_flows_keep_the_variance(solver, steps):
    """By algebra: its grids end with a step over a factor of 30 to 100 in sigma before that to 0."""
    t = torch.linspace(1, 1e-3, steps, dtype=torch.float64)
    levels = torch.cat([FLOW.sigma((3 * t / (1 + 2 * t)).clamp(max=FLOW.t_max)), t.new_zeros(1)])
    plan = solver.plan(levels, FLOW)
    assert 0.5 * V0 < float(_variance(plan, plan.sigmas[:1], lambda x, s: V0 / (V0 + s * s) * x)) < 1.2 * V0


@pytest.mark.parametrize(
    ("counts", "batch"), [((10,), 16), pytest.param((5, 10, 30), 128, marks=pytest.mark.slow)], ids=["few", "many"]
)
@pytest.mark.parametrize("solver", STOCHASTIC + DETERMINISTIC, ids=describe)
def test_samples_have_the_variance_of_the_solvers_own_recursion(solver, counts, batch):
    """5 standard errors of 2^13 or 2^16 samples (false alarms: 6e-7 each); in the limit the variance of the data."""
    for steps in counts:
        x = torch.randn(batch, 512, generator=torch.Generator().manual_seed(steps))
        out = kd.sampler(solver, flow=True)(model, x, torch.linspace(1, 0, steps + 1), seed=5, disable=True)
        exact = recursion(solver, steps)
        assert abs(out.double().square().mean() / exact - 1) < 5 * math.sqrt(2 / x.numel()), (steps, exact)
    worst = 0.05 if isinstance(solver, fs.Restart) else 0.02  # the steps of its restarts do not become more
    assert abs(recursion(solver, 400) / V0 - 1) < worst


def wrapped(**attributes):
    """A model behind two wrappers."""
    f = lambda x, sigma, **extra_args: model(x, sigma)  # noqa: E731
    f.inner_model = SimpleNamespace(inner_model=SimpleNamespace(**attributes))
    return f


class CONST:
    pass


class ModelSampling(CONST):
    pass


class EPS:
    pass


LEVELS = torch.linspace(1, 0, 8)
MARKED = {
    "ComfyUI's flow": (wrapped(model_sampling=ModelSampling()), True),
    "ComfyUI's epsilon": (wrapped(model_sampling=EPS()), False),
    "Forge's flow": (wrapped(predictor=SimpleNamespace(prediction_type="const")), True),
    "Forge's epsilon": (wrapped(predictor=SimpleNamespace(prediction_type="epsilon")), False),
    "a table of sigmas": (wrapped(sigmas=torch.tensor([0.03, 1.0, 14.6])), False),
}


@pytest.mark.parametrize("case", MARKED)
def test_flow_is_read_from_the_model(case):
    given, flow = MARKED[case]
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for solver in (fs.EulerMaruyama(), fs.ShARK()):
        out = kd.sampler(solver)(given, x, LEVELS, seed=1)
        assert torch.equal(out, kd.sampler(solver, flow=flow)(model, x, LEVELS, seed=1))
        assert not torch.equal(out, kd.sampler(solver, flow=not flow)(given, x, LEVELS, seed=1))
    problem = kd.as_denoiser(given, **({} if flow else dict(sigma_min=0.1, sigma_max=5.0)))
    assert isinstance(problem.schedule, fs.FlowMatching) == flow


def test_plain_function_with_levels_of_a_flow_is_a_question():
    x = torch.randn(4, 3)
    for solver in (fs.EulerMaruyama(), fs.ShARK(), fs.EDMEuler(churn=4)):
        with pytest.raises(fs.InputError, match=r"Is it a flow model, .*flow=True\); flow=False"):
            kd.sampler(solver)(model, x, LEVELS)
        kd.sampler(solver)(model, x, LEVELS * 2)
        kd.sampler(solver, flow=False)(model, x, LEVELS)
    kd.sampler(fs.UniPC(3))(model, x, LEVELS)  # one ODE for both
    with pytest.raises(fs.InputError, match=r"sigmas: got \[2, .*of a flow model, at most 1"):
        kd.sampler(fs.ShARK(), flow=True)(model, x, LEVELS * 2)
    with pytest.raises(fs.InputError, match=r"sigmas: got \[1, 1, 0.5, 0\]; .* above 1 - 1e-6"):
        kd.sampler(fs.ShARK(), flow=True)(model, x, [1.0, 1 - 1e-9, 0.5, 0.0])
    with pytest.raises(fs.InputError, match="schedule: got EDM.* with flow=True"):
        kd.sampler(fs.ShARK(), schedule=fs.EDM(), flow=True)
    with pytest.raises(fs.InputError, match="schedule: got EDM.* for a flow model"):
        kd.sampler(fs.ShARK(), schedule=fs.EDM())(MARKED["Forge's flow"][0], x, LEVELS)


@pytest.mark.parametrize("solver", [fs.UniPC(2), fs.DPMSolverPP(2), fs.EulerMaruyama(), fs.ShARK()], ids=name)
@pytest.mark.parametrize("end", [0.0, 0.1])
def test_with_a_schedule_it_is_fewstep_sample(solver, end):
    """The same levels, path and state as `fs.sample` of the model as a problem."""
    levels = torch.linspace(0.99, end, 9, dtype=torch.float64)
    sigmas = levels / (1 - levels)
    x = torch.randn(16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    path = fs.BrownianPath((16, 3), 99.0**-2 * (1 - 1e-9), 1e4, 3, "H", dtype=x.dtype, clock="log")
    problem = kd.as_denoiser(model, flow=True)
    theirs = fs.sample(problem, solver, noise=x, sigmas=sigmas, path=path)
    f = kd.sampler(solver, schedule=fs.FlowMatching())
    torch.testing.assert_close(f(model, x, levels, noise_sampler=path), theirs, rtol=1e-9, atol=1e-9)


def test_model_and_callback_see_the_callers_levels():
    """Also 1, at which sigma / (1 - sigma) is infinite; x is the flow's."""
    seen, calls, asked = [], [], []

    def watched(x, sigma):
        seen.append((x, sigma[0].clone()))
        return model(x, sigma)

    def noise(s, t):
        asked.append((float(s), float(t)))
        return torch.zeros(4, 3)

    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    levels = torch.tensor([1.0, 0.75, 0.3, 0.1, 0.0])
    kd.sampler(fs.DDIM(1.0), flow=True)(watched, x, levels, callback=calls.append, noise_sampler=noise)
    assert torch.equal(torch.stack([s for _, s in seen]), levels[:-1])
    torch.testing.assert_close(seen[0][0], x, rtol=1e-6, atol=0)
    for (at, level), call in zip(seen, calls, strict=True):
        assert torch.equal(call["sigma"], level)
        assert torch.equal(call["sigma_hat"], level)
        torch.testing.assert_close(call["x"], at)
        torch.testing.assert_close(call["denoised"], model(at, level[None]))
    torch.testing.assert_close(torch.tensor(asked), torch.stack([levels[:-2], levels[1:-1]], 1), rtol=2e-6, atol=0)


@pytest.mark.parametrize("solver", [fs.DPMSolverSDE(2), fs.EDMEuler(churn=4)], ids=name)
def test_noise_of_another_size_keeps_the_law(solver):
    """ComfyUI's `noise_scale`: x = (1 - sigma) x0 + sigma c n; 5 standard errors of 2^11 samples around the data."""
    c = 7.5

    def scaled(x, sigma, **extra_args):
        s = sigma[0]
        return (1 - s) * V0 / ((1 - s) ** 2 * V0 + (c * s) ** 2) * x

    sampling = ModelSampling()
    sampling.noise_scale = c
    scaled.inner_model = SimpleNamespace(inner_model=SimpleNamespace(model_sampling=sampling))
    x = c * torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
    s = torch.linspace(1, 0, 81)
    grid = torch.cat([(s / (c + (1 - c) * s))[:-1], s[-1:]])  # even in the time of a flow of unit noise
    out = kd.sampler(solver)(scaled, x, grid, seed=1, disable=True)
    assert abs(out.var() / V0 - 1) < 5 * math.sqrt(2 / x.numel()) + 0.1
    problem = kd.as_denoiser(scaled)
    assert abs(fs.sample(problem, fs.UniPC(3), shape=(16, 512), steps=20).var() / V0 - 1) < 0.08


def test_flow_noise_of_one_seed_is_one_path_for_every_start():
    """A run from a lower level continues the full run."""
    x, levels, seen = torch.randn(4, 3, dtype=torch.float64), torch.linspace(1, 0, 9), []
    f = kd.sampler(fs.EulerMaruyama(), flow=True)
    full = f(model, x, levels, seed=5, callback=lambda d: seen.append(d["x"]))
    torch.testing.assert_close(f(model, seen[4], levels[4:], seed=5), full, rtol=1e-9, atol=1e-9)


def test_plans_and_fitted_tables_on_flows():
    """They carry levels of x / (1 - sigma); `sigmas` of the sampler are those of the flow."""
    problem = kd.as_denoiser(model, flow=True)
    levels = torch.tensor([0.99, 0.7, 0.4, 0.1, 0.0], dtype=torch.float64)
    x = torch.randn(64, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table, _ = fs.distill_dode(problem, fs.DDIM(), noise=x, sigmas=levels / (1 - levels))
    f = kd.sampler(table)
    torch.testing.assert_close(f.sigmas.double(), levels)
    torch.testing.assert_close(f(model, x, f.sigmas), fs.sample(problem, table, noise=x), rtol=1e-5, atol=1e-5)
    plan = fs.EulerMaruyama().plan(levels / (1 - levels))
    known = MARKED["ComfyUI's flow"][0]
    f = kd.sampler(plan, flow=True)
    theirs = kd.sampler(fs.EulerMaruyama())(known, x, levels, seed=1)
    torch.testing.assert_close(f(model, x, f.sigmas, seed=1), theirs, rtol=1e-5, atol=1e-5)
    with pytest.raises(fs.InputError, match=r"got a flow model; .*flow=True"):
        kd.sampler(plan)(known, x, plan.sigmas)
    direct = fs.UniPC(2).plan(levels)  # of the flow's own x, as without a plan
    assert torch.equal(kd.sampler(direct)(known, x, levels), kd.sampler(fs.UniPC(2))(known, x, levels))


@pytest.mark.parametrize("solver", DETERMINISTIC, ids=name)
def test_increasing_levels_lead_back_to_the_noise(solver):
    """There and back again: the distance falls with the order, on flows and on x0 + sigma n."""
    x = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    order = min(solver.card.deterministic_order, 2)
    for flow, low, high in ((True, 0.05, 0.95), (False, 0.1, 8.0)):
        D = model if flow else lambda x, s: V0 / (V0 + s[0] ** 2) * x
        f, errors = kd.sampler(solver, flow=flow), []
        for n in (32, 128):
            up = torch.logspace(math.log10(low), math.log10(high), n + 1, dtype=torch.float64)
            errors.append((f(D, f(D, x, up), up.flip(0)) - x).abs().max())
        assert errors[1] < 1e-9 or math.log(errors[0] / errors[1], 4) > order - 0.4, errors
        problem = fs.DiffusionModel(lambda x, s: V0 / (V0 + s**2) * x, fs.EDM(0.1, 8.0))
        if not flow:
            torch.testing.assert_close(fs.sample(problem, solver, noise=x, sigmas=up), f(D, x, up))


def test_increasing_levels_need_a_start_above_zero_and_no_noise():
    x, up = torch.randn(4, 3), torch.tensor([0.0, 0.5, 2.0])
    with pytest.raises(fs.InputError, match=r"sigmas: got \[0, 0.5, 2\]; an increasing grid starts above 0"):
        kd.sampler(fs.UniPC(2))(model, x, up)
    for solver in (fs.ShARK(), fs.DDIM(0.5), fs.EDMHeun(churn=1), fs.DPMSolverSDE(2)):
        with pytest.raises(fs.InputError, match="expected strictly decreasing"):
            kd.sampler(solver)(model, x, up[1:])
        with pytest.raises(fs.InputError, match="expected strictly decreasing"):
            solver.plan(up[1:])
    problem = fs.DiffusionModel(lambda x, s: x / (1 + s**2), fs.EDM())
    with pytest.raises(fs.InputError, match="noise: got None with increasing sigmas"):
        fs.sample(problem, fs.UniPC(2), shape=(4, 3), sigmas=up[1:])
    calls = []
    kd.sampler(fs.EDMHeun())(model, x, up[1:], callback=calls.append)
    assert [d["i"] for d in calls] == [0]


@pytest.mark.parametrize("count", [0, 1])
def test_no_step_returns_x(count):
    """ComfyUI's SplitSigmas at the last step; k-diffusion's loops do nothing."""
    x = torch.randn(4, 3)
    for solver in (fs.UniPC(3), fs.ShARK(), fs.UniPC(2).plan(torch.tensor([4.0, 1.0, 0.0]))):
        assert torch.equal(kd.sampler(solver)(model, x, torch.ones(count)), x)
