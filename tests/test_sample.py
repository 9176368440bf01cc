"""Diffusion sampling: orders on an exact score, identities between solvers, one path for all step counts."""

import gc
import itertools
import math
import warnings

import pytest
import torch

import fewstep as fs
from fewstep.integrations.k_diffusion import BrownianNoiseSampler

VARIANCE = torch.tensor([0.04, 0.25, 1.0], dtype=torch.float64)
EDM = fs.EDM(0.01, 20.0)
NOISE = torch.randn(8, 3, generator=torch.Generator().manual_seed(7))


def gaussian(schedule=EDM):
    """Data N(0, diag(VARIANCE)): the denoiser and the flow are linear and known."""
    return fs.DiffusionModel(lambda x, s: x * VARIANCE.to(x) / (VARIANCE.to(x) + s * s), schedule)


def flow(noise, s, t):
    return noise * torch.sqrt((VARIANCE + t * t) / (VARIANCE + s * s))


ORDERS = [
    (fs.DDIM(), 1), (fs.DPMSolverPP(1), 1), (fs.DPMSolverPP(2), 2), (fs.DPMSolverPP(2, False), 2),
    (fs.EDMHeun(), 2), (fs.UniPC(1), 2), (fs.UniPC(2), 3), (fs.UniPC(3), 4),
]  # fmt: skip


@pytest.mark.parametrize(("solver", "order"), ORDERS, ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("spacing", ["logsnr", "karras"])
def test_deterministic_orders_on_an_exact_score(solver, order, spacing):
    """Local slopes at 160 and 320 steps within 0.15 of the order (Karras's grid: at sigma_min 0.1)."""
    schedule = fs.EDM(0.1, 20.0)
    noise = torch.randn(64, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 20
    exact = flow(noise, 20.0, 0.1)
    errors = [
        (fs.sample(gaussian(schedule), solver, noise=noise, steps=n, spacing=spacing, final="sigma_min")
         - exact).square().mean().sqrt() for n in (80, 160, 320)
    ]  # fmt: skip
    local = [math.log2(a / b) for a, b in zip(errors[:-1], errors[1:], strict=True)]
    assert abs(local[-1] - order) < 0.15, local


def test_default_final_is_the_last_denoiser_output():
    """final="x0" is a step to sigma = 0: x0 itself, with `steps` evaluations in all."""
    for solver in (fs.DDIM(), fs.DPMSolverPP(2), fs.UniPC(3), fs.EulerMaruyama()):
        seen = []
        x0 = fs.sample(gaussian(), solver, shape=(4, 3), steps=6,
                       callback=lambda i, x, D, seen=seen: seen.append(D))  # fmt: skip
        assert len(seen) == 6
        assert torch.equal(x0, seen[-1])


def same(a, b, **kw):
    shape = dict(shape=(16, 3), steps=9, seed=4, dtype=torch.float64) | kw
    torch.testing.assert_close(
        fs.sample(gaussian(), a, **shape), fs.sample(gaussian(), b, **shape), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("final", ["x0", "sigma_min"])
def test_equivalent_solvers_give_equal_samples(final):
    same(fs.DDIM(), fs.DPMSolverPP(1), final=final)
    same(fs.DDIM(1.0), fs.EulerMaruyama(), final=final)
    same(fs.EDMHeun(churn=0), fs.EDMHeun(churn=5, churn_min=1e6, churn_max=1e7), final=final)


@pytest.mark.parametrize(("solver", "order"), [(fs.EulerMaruyama(), 1), (fs.DDIM(1.0), 1), (fs.ShARK(), 1.5)])
def test_one_seed_is_one_path_at_every_step_count(solver, order):
    """Strong convergence when only the step count changes: additive unit noise in the clock 1/sigma^2."""
    kw = dict(shape=(500, 3), seed=1, dtype=torch.float64)
    xs = [fs.sample(gaussian(), solver, steps=n, final="sigma_min", **kw) for n in (32, 64, 128, 256)]
    gaps = [(a - b).square().mean().sqrt() for a, b in zip(xs[:-1], xs[1:], strict=True)]
    local = [math.log2(a / b) for a, b in zip(gaps[:-1], gaps[1:], strict=True)]
    assert local[-1] > order - 0.15, local


@pytest.mark.parametrize("solver", [fs.EulerMaruyama(), fs.ShARK(), fs.EDMHeun(churn=10)])
def test_stochastic_samplers_have_the_right_law(solver):
    """Mean and variance of 20,000 samples; |z| < 5 for six statistics (level 4e-6) plus the step bias."""
    n = 20000
    x = fs.sample(gaussian(), solver, shape=(n, 3), steps=128, seed=5, dtype=torch.float64, final="sigma_min")
    variance = VARIANCE + EDM.sigma_min**2
    assert (x.mean(0).abs() < 5 * (variance / n).sqrt()).all()
    assert ((x.var(0) / variance - 1).abs() < 5 * math.sqrt(2 / n) + 0.05).all()


def test_half_precision_noise_gives_a_float32_trajectory():
    noise = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).half() * 20
    x = fs.sample(gaussian(), fs.DDIM(), noise=noise, steps=5)
    assert x.dtype == torch.float32


def test_epsilon_models_follow_the_exact_flow_on_every_schedule():
    """The same Gaussian data behind three schedules: sample, and compare with the exact flow."""
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    for schedule in (fs.VPLinear(), fs.VE(0.01, 50.0), fs.DiscreteVP(abar)):

        def epsilon(x_t, t, schedule=schedule):
            assert t.shape == (len(x_t),)
            sigma = schedule.sigma(t[:1].double())
            alpha = schedule.alpha(sigma)
            x = x_t / alpha
            return (x - x * VARIANCE / (VARIANCE + sigma**2)) / sigma

        problem = fs.DiffusionModel(fs.from_epsilon(epsilon, schedule), schedule)
        noise = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        big = torch.tensor(schedule.sigma_max, dtype=torch.float64)
        small = torch.tensor(schedule.sigma_min, dtype=torch.float64)
        got = fs.sample(problem, fs.UniPC(3), noise=noise, steps=80, final="sigma_min")
        exact = flow(noise / schedule.alpha(big), big, small) * schedule.alpha(small)
        torch.testing.assert_close(got, exact, rtol=2e-4, atol=2e-4)


SCHEDULES = {
    "vp": fs.VPLinear(), "ve": fs.VE(), "edm": fs.EDM(),
    "discrete": fs.DiscreteVP(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULES)
def test_time_is_the_inverse_of_sigma(name):
    schedule = SCHEDULES[name]
    sigma = torch.logspace(math.log10(schedule.sigma_min), math.log10(schedule.sigma_max), 400,
                           dtype=torch.float64)  # fmt: skip
    torch.testing.assert_close(schedule.sigma(schedule.time(sigma)), sigma, rtol=1e-10, atol=0)
    alpha = schedule.alpha(sigma)
    if name in ("vp", "discrete"):
        torch.testing.assert_close(alpha**2 * (1 + sigma**2), torch.ones_like(sigma))


@pytest.mark.parametrize("spacing", ["logsnr", "karras", "uniform", "quadratic"])
@pytest.mark.parametrize("final", ["x0", "sigma_min"])
def test_grids_decrease_between_the_ends_of_the_schedule(spacing, final):
    grid = fs.sigma_grid(fs.VPLinear(), 7, spacing, final)
    assert grid.shape == (8,)
    assert grid.dtype == torch.float64
    assert (grid.diff() < 0).all()
    assert grid[0] == fs.VPLinear().sigma_max
    assert grid[-1] == 0 if final == "x0" else abs(grid[-1] / fs.VPLinear().sigma_min - 1) < 1e-9


BAD = {
    "no shape": (dict(solver=fs.DDIM(), steps=5), "shape"),
    "no steps": (dict(solver=fs.DDIM(), shape=(2, 3)), "steps"),
    "zero steps": (dict(solver=fs.DDIM(), shape=(2, 3), steps=0), "steps: got 0"),
    "spacing": (dict(solver=fs.DDIM(), shape=(2, 3), steps=5, spacing="karas"), "Did you mean 'karras'"),
    "final": (dict(solver=fs.DDIM(), shape=(2, 3), steps=5, final="zero"), "final"),
    "rising sigmas": (dict(solver=fs.DDIM(), shape=(2, 3), sigmas=[1.0, 2.0]), "flip"),
    "no plan": (dict(solver=fs.Milstein(), shape=(2, 3), steps=5), "Milstein, which has no plan"),
    "grid twice": (
        dict(solver=fs.DDIM().plan(torch.tensor([2.0, 1.0])), shape=(2, 3), steps=5), "carries its own",
    ),
    "integer noise": (dict(solver=fs.DDIM(), noise=torch.ones(2, 3).long(), steps=5), "floating"),
    "no tuple": (dict(solver=fs.DDIM(), shape=5, steps=5), "shape: got 5"),
    "shape and noise": (dict(solver=fs.DDIM(), shape=(6, 3), noise=torch.ones(5, 3), steps=5), "drop one"),
    "short path": (
        dict(solver=fs.ShARK(), shape=(2, 3), steps=5, path=fs.BrownianPath((2, 3), levy="H")), "clock tau",
    ),
    "path shape": (
        dict(solver=fs.EulerMaruyama(), shape=(2, 3), steps=5,
             path=fs.BrownianPath((2, 2), t0=1e-3, t1=1e4, clock="log")), r"got shape \(2, 2\)",
    ),
    "poor path": (
        dict(solver=fs.ShARK(), shape=(2, 3), steps=5,
             path=fs.BrownianPath((2, 3), t0=1e-3, t1=1e4, clock="log")), "levy='W'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_raises_a_clear_error(case):
    call, words = BAD[case]
    with pytest.raises(fs.InputError, match=words):
        fs.sample(gaussian(), **call)


SAMPLERS = {n: s for n, s in fs.solvers().items() if isinstance(s, fs.DiffusionSolver)}
VP = fs.VPLinear()
WRONG = {
    "mean": lambda x: x.mean(-1, keepdim=True), "float64": lambda x: x.double(), "number": lambda x: 0.0,
    "rows": lambda x: x[:2], "None": lambda x: None, "tuple": lambda x: (x,), "integers": lambda x: x.long(),
    "axis": lambda x: x[None], "sparse": lambda x: x.to_sparse(), "float8": lambda x: x.to(torch.float8_e4m3fn),
    "nested": lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
}  # fmt: skip
CONVERSIONS = {
    "denoiser": lambda f: lambda x, s: f(x), "epsilon": lambda f: fs.from_epsilon(lambda x, t: f(x), VP),
    "sample": lambda f: fs.from_sample(lambda x, t: f(x), VP), "edm": lambda f: fs.from_edm(lambda x, s: f(x)),
    "clip": lambda f: fs.clip(lambda x, s: f(x)), "thresholding": lambda f: fs.dynamic_thresholding(lambda x, s: f(x)),
}  # fmt: skip


def from_call(start, later):
    """A network x -> 0.3 x whose answers from call number `start` on are those of `later`."""
    count = itertools.count()
    return lambda x: 0.3 * x if next(count) < start else later(x)


@pytest.mark.parametrize("solver", [fs.DDIM(), fs.UniPC(3), fs.DPMSolver(2)], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize("kind", CONVERSIONS)
def test_each_answer_of_a_model_is_checked(kind, start, solver):
    for wrong in WRONG.values():
        problem = fs.DiffusionModel(CONVERSIONS[kind](from_call(start, wrong)), VP)
        words = (
            rf"(denoiser|model): got .* at evaluation {start} \(sigma = .*expected x's torch.float32 of shape \(5, 3\)"
        )
        with pytest.raises(fs.InputError, match=words):
            fs.sample(problem, solver, shape=(5, 3), steps=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["denoiser", "epsilon", "clip"])
def test_answers_of_lower_precision_become_float32(kind, dtype):
    """Half precision from the first answer or from a later one, and under autocast: the state stays in float32."""
    kw = dict(shape=(5, 3), steps=6, seed=1, sigmas=fs.sigma_grid(fs.EDM(0.1, 10.0), 6))
    want = fs.sample(fs.DiffusionModel(CONVERSIONS[kind](lambda x: 0.3 * x), VP), fs.UniPC(), **kw)
    for start in (0, 3):
        half = from_call(start, lambda x: (0.3 * x).to(dtype))
        got = fs.sample(fs.DiffusionModel(CONVERSIONS[kind](half), VP), fs.UniPC(), **kw)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=0.1, atol=0.1)
    layer = torch.nn.Linear(3, 3, bias=False).requires_grad_(False)
    with torch.autocast("cpu", dtype):
        assert layer(want).dtype == dtype
        assert fs.sample(fs.DiffusionModel(CONVERSIONS[kind](layer), VP), fs.UniPC(), **kw).dtype == torch.float32


@pytest.mark.parametrize("name", SAMPLERS)
def test_networks_that_reuse_their_memory_give_the_numbers_of_fresh_memory(name):
    """One output buffer (CUDA graphs, TensorRT), two in turn, or that of the input."""
    buffers, turns = torch.zeros(2, 4, 3), itertools.cycle([0, 1])
    reuse = [lambda v: buffers[0].copy_(v), lambda v: buffers[next(turns)].copy_(v)[:]]
    plan, noise = SAMPLERS[name].plan(fs.sigma_grid(VP, 4, "uniform"), VP), NOISE[:4]
    path = fs.BrownianPath((4, 3), 1e-5, 1e5, levy="H", clock="log") if plan.on_path.any() else None
    for kind, f in (
        ("denoiser", torch.tanh),
        ("denoiser", lambda x: x),
        ("epsilon", torch.tanh),
        ("sample", torch.tanh),
    ):
        made = []
        for held in (torch.clone, *reuse):
            problem, seen = fs.DiffusionModel(CONVERSIONS[kind](lambda x, f=f, held=held: held(f(x))), VP), []
            x = fs.sample(problem, plan, noise=noise, path=path, callback=lambda i, x, D, seen=seen: seen.append(D))
            buffers.zero_()
            made.append(torch.stack([x, *seen]))
        assert torch.equal(made[0], made[1])
        assert torch.equal(made[0], made[2])


class Learned(fs.EDM):
    """A schedule whose label depends on a parameter."""

    def label(self, sigma):
        return sigma * torch.ones((), dtype=sigma.dtype, requires_grad=True)


def guided(scale):
    return fs.classifier_free_guidance(lambda x, t, c: 0.3 * x, torch.zeros(2, 1), torch.zeros(2, 1), scale)


@pytest.mark.parametrize("argument", ["scale", "schedule", "x0"])
def test_gradients_that_would_be_lost_are_refused(argument):
    """Scales and labels of a run are constants, and a likelihood has no graph; without gradients all are accepted."""
    weight = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    network = guided(lambda s: weight * s) if argument == "scale" else lambda x, t: 0.3 * x
    problem = fs.DiffusionModel(fs.from_epsilon(network, Learned() if argument == "schedule" else EDM), EDM)
    x = torch.ones(2, 3, requires_grad=True)
    call = {"x0": lambda: fs.log_likelihood(problem, x, steps=2).value}.get(
        argument, lambda: fs.sample(problem, fs.UniPC(), shape=(2, 3), steps=3)
    )
    with pytest.raises(fs.InputError, match=f"{argument}: got a tensor that requires grad"):
        call()
    with torch.no_grad():
        assert call().isfinite().all()


def test_the_samples_are_not_the_callers_noise():
    for solver in SAMPLERS.values():
        noise = torch.ones(2, 3)
        x = fs.sample(fs.DiffusionModel(lambda x, s: x, EDM), solver, noise=noise, steps=2)
        assert x.untyped_storage().data_ptr() != noise.untyped_storage().data_ptr()
        assert torch.equal(noise, torch.ones(2, 3))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("solver", [fs.UniPC(), fs.ShARK(), fs.EDMHeun(churn=10)], ids=lambda s: type(s).__name__)
def test_non_finite_samples_name_the_evaluation_and_the_part(solver, value):
    """One bad sample of three from evaluation 3 on; the error tells the model's output from the solver's steps."""
    bad = torch.tensor([[0.0], [0.0], [value]])
    problem = lambda f: fs.DiffusionModel(f, VP)  # noqa: E731
    grid = fs.sigma_grid(VP, 5)
    plan = solver.plan(grid)
    level = float(plan.sigma[3])
    words = rf"output of the model at evaluation 3 \(sigma = {level:.4g}\) for 1 of 3 samples"
    with pytest.raises(fs.NonFiniteError, match=words) as error:
        fs.sample(problem(lambda x, s: 0.3 * x + (bad if s < level * 1.001 else 0)), plan, shape=(3, 2))
    assert (error.value.step, error.value.paths) == (3, 1)


def test_overflow_of_the_steps_is_not_attributed_to_the_model():
    """Finite outputs whose difference is beyond float32."""
    huge, sign = torch.tensor([[1.0], [1.0], [3e38]]), itertools.cycle([1, -1])
    problem = fs.DiffusionModel(lambda x, s: huge * next(sign) + 0 * x, VP)
    with pytest.raises(fs.NonFiniteError, match="input of the model at evaluation 2 .* for 1 of 3 samples") as error:
        fs.sample(problem, fs.DPMSolverPP(2), shape=(3, 2), steps=4)
    assert (error.value.step, error.value.paths) == (2, 1)
    once = itertools.chain([1, 1, math.nan], itertools.repeat(1))
    with pytest.raises(fs.NonFiniteError, match="but not when repeated"):
        fs.sample(fs.DiffusionModel(lambda x, s: x * next(once), VP), fs.DDIM(), shape=(3, 2), steps=3)


def test_correct_networks_that_are_slightly_off_pass_check_prediction():
    """0.5 % at sigma = 152 is an x0 of 0.76 n; judged in units of the network's output it is 0.005."""
    like = torch.zeros(200, 3)
    exact = fs.from_epsilon(lambda x, t: 1.005 * x, VP)
    for denoiser in (exact, fs.clip(exact), fs.dynamic_thresholding(exact)):
        fs.check_prediction(denoiser, VP, like)
    for off in (0.7, 1.3, math.nan):
        with pytest.raises(fs.InputError, match="Convert with another"):
            fs.check_prediction(fs.from_epsilon(lambda x, t, off=off: off * x, VP), VP, like)


@pytest.mark.parametrize("schedule", [fs.EDM, fs.VE])
def test_empty_ranges_of_sigma_are_rejected(schedule):
    with pytest.raises(fs.InputError, match="sigma_min, sigma_max: got 10.*0.1"):
        schedule(10.0, 0.1)


def test_stochastic_solvers_of_one_seed_have_one_limit():
    """Euler-Maruyama and ShARK, which need W and W, H, follow the same path of the seed."""
    kw = dict(shape=(300, 3), seed=2, dtype=torch.float64, final="sigma_min")
    gaps = []
    for n in (64, 256):
        a, b = (fs.sample(gaussian(), s, steps=n, **kw) for s in (fs.EulerMaruyama(), fs.ShARK()))
        gaps.append((a - b).square().mean().sqrt())
    assert gaps[1] < 0.4 * gaps[0]


@pytest.mark.parametrize("seeds", [dict(seed=0), dict(seeds=list(range(4000)))])
def test_churn_is_independent_of_the_start(seeds):
    """The first input of a churned step is the start plus independent noise; |r| < 5/sqrt(3 n), 6e-7."""
    inputs, n = [], 4000

    def spy(x, sigma):
        inputs.append(x.double().flatten())
        return gaussian().denoiser(x, sigma)

    for churn in (0, 20):
        fs.sample(fs.DiffusionModel(spy, EDM), fs.EDMEuler(churn=churn), shape=(n, 3), steps=2, **seeds)
    start, raised = inputs[0], inputs[2]
    assert abs(torch.corrcoef(torch.stack([start, raised - start]))[0, 1]) < 5 / math.sqrt(3 * n)


SEEDED = {
    "solve": lambda s: (
        fs.solve(fs.SDE(lambda t, y: -y, lambda t, y: y), fs.Milstein(), torch.ones(2), [0, 1], seed=s).y
    ),
    "sample": lambda s: fs.sample(gaussian(), fs.ShARK(), shape=(2, 3), steps=2, seed=s),
    "sample, each": lambda s: fs.sample(gaussian(), fs.ShARK(), shape=(2, 3), steps=2, seeds=[s, 0]),
    "path": lambda s: fs.BrownianPath((2,), seed=s).increment(0, 1).W,
    "path, each": lambda s: fs.BrownianPath((2,), seeds=[s, 0]).increment(0, 1).W,
    "fresh": lambda s: fs.FreshIncrements((2,), seed=s).increment(0, 1).W,
    "k-diffusion": lambda s: BrownianNoiseSampler(torch.ones(2), 0.1, 1.0, s)(1.0, 0.5),
    "k-diffusion, each": lambda s: BrownianNoiseSampler(torch.ones(2), 0.1, 1.0, [s, 0])(1.0, 0.5),
}


@pytest.mark.parametrize("name", SEEDED)
def test_all_functions_accept_the_seeds_of_torch(name):
    for seed in (-(2**63), 2**64 - 1):
        assert SEEDED[name](seed).isfinite().all()
    for seed in (-(2**63) - 1, 2**64, 1.0, True):
        with pytest.raises(fs.InputError, match="^seeds?: got"):
            SEEDED[name](seed)


@pytest.mark.parametrize("schedule", [EDM, VP], ids=["edm", "vp"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_seeds_warns_on_grids_where_it_is_unstable(schedule, order):
    """Standard deviations of unit data; that of the solver it names is near 1 in as few steps."""
    kw = dict(shape=(1000, 3), seed=0)
    problem = fs.DiffusionModel(lambda x, s: x / (1 + s * s), schedule)
    grid = torch.tensor([40.0 * math.exp(-1.2 * k) for k in range(8)] + [0.0])
    with pytest.warns(UserWarning, match=r"SEEDS is unstable on this grid: its longest step is 1.2.*DPMSolverSDE\(\)"):
        assert fs.sample(problem, fs.SEEDS(order), sigmas=grid, **kw).std() > 1.2
    assert fs.sample(problem, fs.DPMSolverSDE(), sigmas=grid, **kw).std() < 1.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert 0.9 < fs.sample(problem, fs.SEEDS(order), steps=25, **kw).std() < 1.2


def test_thresholding_accepts_empty_batches():
    model = fs.dynamic_thresholding(lambda x, s: x)
    for shape in ((0, 3), (2, 0)):
        assert model(torch.ones(shape), torch.tensor(1.0)).shape == shape
    assert fs.sample(fs.DiffusionModel(model, EDM), fs.UniPC(), shape=(0, 3), steps=3).shape == (0, 3)


def live(shape):
    """The number of tensors of a shape that are in memory; views count with what they are views of."""
    found = {}
    for thing in gc.get_objects():
        if type(thing) is torch.Tensor and thing.shape[-len(shape) :] == shape:
            found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes() // (4 * math.prod(shape))
    return sum(found.values())


@pytest.mark.parametrize("solver", [fs.DDPM(), fs.ShARK(), fs.DPMSolverSDE(2)], ids=repr)
def test_noise_of_a_sample_takes_the_memory_of_at_most_48_states(solver):
    shape = 2, 131, 129  # not so small that cells are cut several at a time
    problem = fs.DiffusionModel(lambda x, sigma: x / (1 + sigma**2), fs.VPLinear())
    most = []
    for path in (None, fs.FreshIncrements(shape, "H", seed=0)):  # the second keeps no interval
        counts = []
        count = lambda *_: counts.append(live(shape))  # noqa: B023, E731
        fs.sample(problem, solver, shape=shape, steps=12, path=path, callback=count)
        most.append(max(counts))
    assert most[0] - most[1] <= 48


@pytest.mark.parametrize("spacing", ["leading", "trailing", "karras"])
def test_samples_of_a_seed_converge_to_one_limit_in_every_spacing(spacing):
    problem = fs.DiffusionModel(lambda x, sigma: x / (1 + sigma**2), fs.VPLinear())
    draw = lambda seed, steps, spacing: fs.sample(  # noqa: E731
        problem, fs.ShARK(), noise=noise, steps=steps, spacing=spacing, seed=seed
    )
    noise = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    fine = draw(1, 200, "logsnr")
    assert (draw(1, 100, spacing) - fine).square().mean().sqrt() < 0.1
    assert (draw(2, 100, spacing) - fine).square().mean().sqrt() > 0.5


def test_plans_that_sample_keeps_belong_to_no_caller_and_to_no_mode():
    """A plan kept from inference mode serves a later gradient, and no table of a user shares its memory."""
    model, x = fs.DiffusionModel(lambda x, s: x * w / (1 + s * s), fs.EDM()), torch.ones(16, 3, dtype=torch.float64)
    w = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    with torch.inference_mode():
        first = fs.sample(model, fs.UniPC(2), noise=x, steps=5)
    fs.sample(model, fs.UniPC(2), noise=x, steps=5).sum().backward()
    assert w.grad.isfinite()
    table, _ = fs.distill_dode(fs.DiffusionModel(lambda x, s: 0 * x, fs.EDM()), fs.UniPC(2), steps=5, noise=x)
    table.sigma.mul_(0.5)
    torch.testing.assert_close(fs.sample(model, fs.UniPC(2), noise=x, steps=5).detach(), first.clone())
