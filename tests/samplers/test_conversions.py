"""Schedules, grids, and what networks predict."""

import math

import pytest
import torch

import fewstep as fs
from fewstep import compat
from fewstep.executor import run
from fewstep.resolve import evaluator_of
from fewstep_analysis.diffusion_problems import two_bumps

SCHEDULES = {
    "VPLinear": fs.VPLinear(), "VP constant": fs.VPLinear(5.0, 5.0),
    "VPScaledLinear": fs.VPScaledLinear(), "VPCosine": fs.VPCosine(),
    "VPSigmoid": fs.VPSigmoid(), "SubVP": fs.SubVP(), "VE": fs.VE(), "EDM": fs.EDM(),
    "FlowMatching": fs.FlowMatching(), "FlowMatching shifted": fs.FlowMatching(3.0),
    "linear": fs.DiscreteVP.named("linear"), "cosine": fs.DiscreteVP.named("squaredcos_cap_v2"),
    "scaled_linear": fs.DiscreteVP.named("scaled_linear", 1000, 0.00085, 0.012),
    "zero SNR": fs.DiscreteVP.named("scaled_linear", 1000, 0.00085, 0.012, zero_snr=True),
}  # fmt: skip
MIXTURE = two_bumps().mixture


@pytest.mark.parametrize(("kind", "options"), [
    (fs.VPLinear, {"t_min": 1.0, "t_max": 0.5}), (fs.VPLinear, {"b0": -1.0}), (fs.VPCosine, {"t_max": 1.5}),
    (fs.FlowMatching, {"shift": -1.0}), (fs.FlowMatching, {"t_max": 1.0}), (fs.VE, {"sigma_min": 0.0}),
])  # fmt: skip
def test_schedules_whose_noise_does_not_grow_are_rejected(kind, options):
    with pytest.raises(fs.InputError, match="sigma"):
        kind(**options)


@pytest.mark.parametrize("name", SCHEDULES)
def test_time_is_the_exact_inverse_of_sigma(name):
    schedule = SCHEDULES[name]
    low, high = math.log(schedule.sigma_min), math.log(schedule.sigma_max)
    sigma = torch.exp(torch.linspace(low, high, 400, dtype=torch.float64))
    assert (sigma.diff() > 0).all()
    back = schedule.sigma(schedule.time(sigma))
    torch.testing.assert_close(back, sigma, rtol=1e-9, atol=0)
    assert (schedule.time(sigma).diff() > 0).all()
    alpha = schedule.alpha(sigma)
    sigma_t = alpha * sigma
    law = {"SubVP": lambda: sigma_t - (1 - alpha**2), "FlowMatching": lambda: alpha + sigma_t - 1,
           "FlowMatching shifted": lambda: alpha + sigma_t - 1, "VE": lambda: alpha - 1,
           "EDM": lambda: alpha - 1}.get(name, lambda: alpha**2 + sigma_t**2 - 1)()  # fmt: skip
    assert law.abs().max() < 1e-12


def test_continuous_and_discrete_processes_agree():
    """DDPM's table is VPLinear on (i + 1)/N up to O(1/N); likewise latent diffusion's."""
    t = torch.arange(100, 1000, 100, dtype=torch.float64)
    for table, smooth in (("linear", "VPLinear"), ("scaled_linear", "VPScaledLinear")):
        a, b = SCHEDULES[table].sigma(t), SCHEDULES[smooth].sigma((t + 1) / 1000)
        torch.testing.assert_close(a, b, rtol=0.03, atol=0)


def test_zero_terminal_snr():
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    out = fs.zero_terminal_snr(abar)
    assert out[0] == pytest.approx(float(abar[0]))
    assert out[-1] == out[-2] / 4 < 2.0**-24  # this table comes closer to zero than the usual stand-in
    scaled = SCHEDULES["zero SNR"]
    assert scaled.sigma_max == pytest.approx((2.0**24 - 1) ** 0.5)
    assert (out.diff() < 0).all()
    with pytest.raises(fs.InputError, match="zero_terminal_snr"):
        fs.DiscreteVP(torch.tensor([0.9, 0.5, 0.0]))


SPACINGS = ["logsnr", "karras", "exponential", "uniform", "quadratic", "linspace", "leading", "trailing"]


CASES = [(name, SPACINGS[i % 8], ("x0", "sigma_min", "sigma_min")[i % 3]) for i, name in enumerate(SCHEDULES)]
CASES += [("linear", spacing, final) for spacing in SPACINGS for final in ("x0", "sigma_min")]


@pytest.mark.parametrize(("name", "spacing", "final"), CASES)
def test_grids_decrease_on_every_schedule(name, spacing, final):
    schedule = SCHEDULES[name]
    grid = fs.sigma_grid(schedule, 6, spacing, final)
    assert len(grid) == 7
    assert (grid.diff() < 0).all()
    assert grid.isfinite().all()
    last = 0.0 if final == "x0" else schedule.sigma_min
    assert float(grid[-1]) == pytest.approx(last, rel=1e-6)
    if spacing != "leading":
        assert float(grid[0]) == pytest.approx(schedule.sigma_max, rel=1e-6)


def test_label_grids_equal_table_2():
    schedule = SCHEDULES["linear"]
    expected = {"linspace": [999, 749, 500, 250, 0], "leading": [800, 600, 400, 200, 0],
                "trailing": [999, 799, 599, 399, 199]}  # fmt: skip
    for spacing, labels in expected.items():
        times = schedule.time(fs.sigma_grid(schedule, 5, spacing)[:-1])
        assert times.round().tolist() == labels
        torch.testing.assert_close(times, times.round(), atol=1e-8, rtol=0)
    shifted = fs.sigma_grid(schedule, 5, "leading", offset=1)[:-1]
    assert schedule.time(shifted).round().tolist() == [801, 601, 401, 201, 1]


def test_custom_timesteps_override_spacing():
    schedule = SCHEDULES["linear"]
    problem = fs.DiffusionModel(MIXTURE.denoiser, schedule)
    times = [999.0, 850.0, 736.0, 645.0, 455.0, 233.0]  # a searched grid
    grid = torch.cat([schedule.sigma(torch.tensor(times, dtype=torch.float64)), torch.zeros(1)])
    kw = dict(shape=(8, 1), seed=0)
    a = fs.sample(problem, fs.UniPC(), timesteps=times, spacing="karras", **kw)
    assert torch.equal(a, fs.sample(problem, fs.UniPC(), sigmas=grid, **kw))
    with pytest.raises(fs.InputError, match="Reverse"):
        fs.sample(problem, fs.UniPC(), timesteps=times[::-1], **kw)


def predictors(schedule):
    """One exact denoiser as a network of each prediction."""

    def parts(X, t):
        sigma = schedule.sigma(schedule.time(inverse(schedule, t[:1].double())))
        alpha = schedule.alpha(sigma)
        D = MIXTURE.denoiser((X / alpha).double(), sigma)
        eps = (X / alpha - D) / sigma
        return alpha, alpha * sigma, D, eps

    def of(f):
        return lambda X, t: f(*parts(X, t)).to(X.dtype)

    return {
        "epsilon": fs.from_epsilon(of(lambda a, s, D, e: e), schedule),
        "v": fs.from_v(of(lambda a, s, D, e: a * e - s * D), schedule),
        "score": fs.from_score(of(lambda a, s, D, e: -e / s), schedule),
        "sample": fs.from_sample(of(lambda a, s, D, e: D), schedule),
        "flow": fs.from_flow(of(lambda a, s, D, e: e - D), schedule),
    }


def inverse(schedule, label):
    """sigma of a label."""
    if isinstance(schedule, fs.FlowMatching):
        return label / (1 - label)
    return schedule.sigma(label)


@pytest.mark.parametrize("name", [n for n in SCHEDULES if n not in ("zero SNR", "cosine")])
def test_every_prediction_gives_the_same_denoiser(name):
    schedule = SCHEDULES[name]
    x = torch.randn(5, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for level in (0.05, 0.7, 12.0):
        sigma = torch.tensor(level, dtype=torch.float64)
        want = MIXTURE.denoiser(x * (1 + sigma), sigma)
        for kind, denoiser in predictors(schedule).items():
            got = denoiser(x * (1 + sigma), sigma)
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7, msg=kind)
            for prediction in ("data", "noise"):
                table = denoiser.on(sigma.reshape(1), x, prediction)(0, x * (1 + sigma))
                other = want if prediction == "data" else (x * (1 + sigma) - want) / sigma
                torch.testing.assert_close(table, other, rtol=1e-6, atol=1e-6, msg=kind)


def test_one_level_per_sample_is_accepted():
    schedule = fs.VPLinear()
    x = torch.randn(4, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.1, 1.0, 5.0, 0.3], dtype=torch.float64)

    def model(X, t):
        s = schedule.sigma(t)[:, None]
        return s * X  # any function of each sample's own time

    denoiser = fs.from_v(model, schedule)
    each = torch.cat([denoiser(x[i : i + 1], sigma[i]) for i in range(4)])
    torch.testing.assert_close(denoiser(x, sigma), each)


def test_edm_networks_receive_sigma():
    seen = []

    def net(x, sigma):
        seen.append(sigma)
        return MIXTURE.denoiser(x, sigma[0])

    schedule = fs.EDM(0.1, 10.0)
    kw = dict(shape=(6, 1), steps=5, seed=0, dtype=torch.float64)
    got = fs.sample(fs.DiffusionModel(fs.from_edm(net), schedule), fs.UniPC(), **kw)
    torch.testing.assert_close(got, fs.sample(fs.DiffusionModel(MIXTURE.denoiser, schedule), fs.UniPC(), **kw))
    assert seen[0].shape == (6,)
    assert float(seen[0][0]) == pytest.approx(10.0)


@pytest.mark.parametrize("solver", [fs.DDIM(), fs.DEIS()], ids=["data", "noise"])
def test_guidance_clipping_and_thresholding(solver):
    schedule = fs.VPLinear()

    def model(x, t, c):
        return 0.3 * x + c

    condition, empty = torch.full((3, 1), 0.5), torch.zeros(3, 1)
    guided = fs.classifier_free_guidance(model, condition, empty, scale=4.0)
    x = torch.randn(3, 1, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(guided(x, torch.ones(3)), 0.3 * x + 4 * 0.5)
    raw = fs.from_sample(guided, schedule)
    kw = dict(shape=(3, 1), steps=6, seed=1)
    x0 = fs.sample(fs.DiffusionModel(fs.clip(raw), schedule), solver, **kw)
    assert x0.abs().max() <= 1 + 1e-5
    by_hand = fs.DiffusionModel(lambda x, s: raw(x, s).clamp(-1, 1), schedule)
    torch.testing.assert_close(x0, fs.sample(by_hand, solver, **kw))
    thresholded = fs.dynamic_thresholding(raw, 0.9, most=2.0)
    assert fs.sample(fs.DiffusionModel(thresholded, schedule), solver, **kw).abs().max() <= 1 + 1e-5
    wide = torch.tensor([[4.0, -1.0, 0.5]])
    thresholded = fs.dynamic_thresholding(lambda x, s: x, 1.0, most=3.0)(wide, torch.ones(()))
    torch.testing.assert_close(thresholded, torch.tensor([[1.0, -1 / 3, 0.5 / 3]]))


def test_check_prediction_rejects_wrong_conversions():
    schedule = SCHEDULES["linear"]
    right = predictors(schedule)
    like = torch.zeros(200, 1, dtype=torch.float64)
    for denoiser in right.values():
        fs.check_prediction(denoiser, schedule, like)
    wrong = [
        fs.from_epsilon(right["sample"].model, schedule), fs.from_sample(right["epsilon"].model, schedule),
        fs.from_epsilon(right["v"].model, schedule), fs.from_v(right["epsilon"].model, schedule),
        fs.from_epsilon(right["score"].model, schedule),
        fs.from_epsilon(lambda x, t: 0 * x, schedule),
    ]  # fmt: skip
    for denoiser in wrong:
        with pytest.raises(fs.InputError, match="Convert with another"):
            fs.check_prediction(denoiser, schedule, like)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_only_inside_the_network(dtype):
    schedule, seen = fs.VPLinear(), []

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(0.9, dtype=dtype))

        def forward(self, x, t):
            seen.append((x.dtype, t.dtype))
            return self.weight * x

    problem = fs.DiffusionModel(fs.from_epsilon(Net(), schedule), schedule)
    states = []
    with torch.no_grad():
        x = fs.sample(problem, fs.DPMSolverPP(2), noise=torch.randn(4, 2).to(dtype), steps=4,
                      callback=lambda i, x, D: states.append((x.dtype, D.dtype)))  # fmt: skip
    assert x.dtype == torch.float32
    assert set(seen) == {(dtype, torch.float32)}
    assert set(states) == {(torch.float32, torch.float32)}


def test_bad_options_raise_a_clear_error():
    for make, words in (
        (lambda: fs.from_epsilon(None, fs.VPLinear(), rounding="up"), "rounding"),
        (lambda: fs.DPMSolverPP(4), "order"), (lambda: fs.DPMSolverPP(solver_type="mid"), "solver_type"),
        (lambda: fs.DEIS(5), "order"), (lambda: fs.DEIS(variable="tau"), "variable"),
        (lambda: compat.DiffusersDPM(fs.DEIS(4)), "order 3"),
        (lambda: fs.IPNDM(5), "order"), (lambda: fs.PNDM("x"), "warm_up"),
        (lambda: fs.DDPM("x"), "variance"), (lambda: fs.SEEDS(4), "order"),
        (lambda: fs.SASolver(5), "order"), (lambda: fs.SASolver(tau=-1), "tau"),
        (lambda: fs.UniPC(4), "order"), (lambda: fs.UniPC(variant="bh3"), "variant"),
        (lambda: fs.UniPC(prediction="x"), "prediction"),
        (lambda: fs.DPMSolverSDE(eta=-1), "eta"), (lambda: fs.DiscreteVP.named("x"), "name"),
        (lambda: fs.PNDM().plan(torch.tensor([2.0, 1.0])), "schedule: got None"),
        (lambda: fs.DEIS(variable="t").plan(torch.tensor([2.0, 1.0])), "schedule: got None"),
        (lambda: compat.DiffusersDDIM().plan(torch.tensor([2.0, 1.0]), fs.VPLinear()), "labels"),
        (lambda: fs.sigma_grid(SCHEDULES["linear"], 2000, "trailing"), "at most"),
    ):  # fmt: skip
        with pytest.raises(fs.InputError, match=words):
            make()


SOLVERS = [
    fs.DDIM(), fs.DPMSolverPP(3), fs.DPMSolverPP(3, False), fs.DEIS(3), fs.UniPC(3), fs.PNDM(), fs.EDMHeun(),
    fs.SASolver(tau=0), fs.SEEDS(2),
]  # fmt: skip


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_no_step_reads_a_tensor_back(solver):
    """Between the first row and the last: no item(), no copy to Python, not even in conversions."""
    schedule = SCHEDULES["linear"]
    problem = fs.DiffusionModel(fs.from_epsilon(lambda x, t: 0.1 * x, schedule), schedule)
    sigmas = fs.sigma_grid(schedule, 10)
    plan = solver.plan(sigmas, schedule)
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    evaluate = evaluator_of(problem, plan, x)
    z = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    assert plan.rows
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(plan, x, evaluate, lambda *_: (z,))
    names = {e.key for e in profile.key_averages()}
    assert not names & {"aten::_local_scalar_dense", "aten::item", "aten::nonzero"}


def test_compiled_run_equals_eager_run():
    """The loop over a plan is one graph, with the plan's numbers as constants."""
    plan = fs.DPMSolverPP(2).plan(fs.sigma_grid(fs.EDM(0.1, 10.0), 4))
    loop = torch.compile(lambda x: run(plan, x, lambda i, x, z: 0.5 * x, lambda *_: ()), fullgraph=True,
                         backend="eager")  # fmt: skip
    torch._dynamo.reset()
    x = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert plan.rows
    torch.testing.assert_close(loop(x), run(plan, x, lambda i, x, z: 0.5 * x, lambda *_: ()))


def test_diffusers_ddim_plans_grids_that_reach_the_last_level_early():
    """Where a label is below the stride, diffusers steps to the last level before the grid ends."""
    schedule = fs.DiscreteVP.named("linear")
    plan = compat.DiffusersDDIM().plan(fs.sigma_grid(schedule, 12), schedule)
    assert (plan.update_x == 0).sum() > 1
