"""The numbers of the installed diffusers schedulers: same model, grid and start noise, in float32."""

import inspect

import pytest
import torch

import fewstep as fs
from fewstep import compat
from fewstep.executor import run
from fewstep.resolve import evaluator_of
from fewstep_analysis.diffusion_problems import Mixture

df = pytest.importorskip("diffusers")
# diffusers 0.42 meets numpy 2 and its own configuration with warnings that are not ours to fix
pytestmark = pytest.mark.filterwarnings("ignore")

STEPS = (5, 10, 20, 50)
CONVERT = {"epsilon": fs.from_epsilon, "v_prediction": fs.from_v, "sample": fs.from_sample}
SPACINGS = {
    "linspace": dict(timestep_spacing="linspace"), "leading": dict(timestep_spacing="leading"),
    "trailing": dict(timestep_spacing="trailing"), "karras": dict(use_karras_sigmas=True),
    "logsnr": dict(use_lu_lambdas=True), "exponential": dict(use_exponential_sigmas=True),
}  # fmt: skip
# labels of exponential grids are cut off, those of the others rounded
ROUNDING = {"exponential": "down"}


def mixture():
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(5, 3, generator=generator, dtype=torch.float64) * 0.6
    stds = torch.tensor([0.3, 0.4, 0.5, 0.35, 0.45], dtype=torch.float64)
    return Mixture(means, stds, torch.full((5,), 0.2, dtype=torch.float64))


DATA, SHAPE = mixture(), (64, 3)
NOISE = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


def network(schedule, kind):
    """A closed form that finds the level of its label in a table, as a time embedding does."""
    table = schedule.sigma(torch.arange(schedule.labels, dtype=torch.float64)).float()

    def model(X, t):
        sigma = table[torch.as_tensor(t, dtype=torch.float32).reshape(-1)[0].round().long()]
        alpha = (1 + sigma**2).rsqrt()
        D = DATA.denoiser(X / alpha, sigma)
        eps = (X / alpha - D) / sigma
        return {"epsilon": eps, "sample": D, "v_prediction": alpha * (eps - sigma * D)}[kind]

    return model


def theirs(scheduler, model, **step):
    x = NOISE * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(model(scheduler.scale_model_input(x, t), t), t, x, **step).prev_sample
    return x


def gap(scheduler, solver, kind, spacing, n):
    """Relative distance of the two samples on the scheduler's own sigmas."""
    scheduler.set_timesteps(n)
    schedule = fs.DiscreteVP(scheduler.alphas_cumprod)
    model = network(schedule, kind)
    want = theirs(scheduler, model)
    sigmas, start = scheduler.sigmas.double(), NOISE * scheduler.init_noise_sigma
    if "Heun" in type(scheduler).__name__:
        sigmas = torch.unique_consecutive(sigmas)
    if "Discrete" in type(scheduler).__name__:  # their state is x, ours starts from alpha x
        start = start * schedule.alpha(sigmas[:1]).float()
    # Euler and Heun hand on fractions, and the network rounds
    rounding = "nearest" if "Discrete" in type(scheduler).__name__ else ROUNDING.get(spacing, "nearest")
    denoiser = CONVERT[kind](model, schedule, rounding=rounding)
    got = fs.sample(fs.DiffusionModel(denoiser, schedule), solver, noise=start, sigmas=sigmas)
    assert got.isfinite().all()
    if not want.isfinite().all():  # "dpmsolver" on 15 steps and more with sigma_min twice
        return 0.0
    return float((got - want).norm() / want.norm())


def multistep(order, solver_type):
    return (lambda **o: df.DPMSolverMultistepScheduler(solver_order=order, solver_type=solver_type, **o),
            compat.DiffusersDPM(fs.DPMSolverPP(order, True, solver_type)))  # fmt: skip


def singlestep(order, solver_type):
    return (lambda **o: df.DPMSolverSinglestepScheduler(solver_order=order, solver_type=solver_type, **o),
            compat.DiffusersDPM(fs.DPMSolverPP(order, False, solver_type)))  # fmt: skip


def noise_multistep(order, solver_type):
    make = lambda **o: df.DPMSolverMultistepScheduler(  # noqa: E731
        algorithm_type="dpmsolver", final_sigmas_type="sigma_min", solver_order=order,
        solver_type=solver_type, **o)  # fmt: skip
    return make, compat.DiffusersDPM(fs.DPMSolver(order, True, solver_type))


def unipc(order, variant, final):
    make = lambda **o: df.UniPCMultistepScheduler(  # noqa: E731
        solver_order=order, solver_type=variant, final_sigmas_type=final, **o)  # fmt: skip
    return make, compat.DiffusersDPM(fs.UniPC(order, variant))


PAIRS = {f"2M-family {p} {t}": multistep(p, t) for p in (1, 2, 3) for t in ("midpoint", "heun")}
PAIRS |= {f"singlestep {p} {t}": singlestep(p, t) for p in (1, 2, 3) for t in ("midpoint", "heun")}
PAIRS |= {f"dpmsolver {p} {t}": noise_multistep(p, t) for p in (1, 2, 3) for t in ("midpoint", "heun")}
PAIRS |= {
    f"DEIS {p}": (lambda p=p, **o: df.DEISMultistepScheduler(solver_order=p, **o),
                  compat.DiffusersDPM(fs.DEIS(p))) for p in (1, 2, 3)
}  # fmt: skip
PAIRS |= {
    f"UniPC {p} {v} {final}": unipc(p, v, final)
    for p in (1, 2, 3) for v, final in (("bh2", "zero"), ("bh1", "sigma_min"), ("bh2", "sigma_min"))
}  # fmt: skip
PAIRS |= {
    "Euler": (lambda **o: df.EulerDiscreteScheduler(beta_start=1e-4, beta_end=0.02, **o), fs.EDMEuler()),
    "Heun": (lambda **o: df.HeunDiscreteScheduler(beta_start=1e-4, beta_end=0.02, **o), fs.EDMHeun()),
}  # fmt: skip


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", PAIRS)
def test_numbers_equal_diffusers(name, spacing):
    """1e-5 relative, for three prediction types at two step counts, and four of the noise.

    Twice that for third order on 5 Karras steps in epsilon: the jump from 0.49 to 0.01 multiplies the
    rounding of x - 157 eps, which neither side can have below 1e-5 in float32.
    """
    make, solver = PAIRS[name]
    flags = SPACINGS[spacing]
    try:
        if not set(flags) <= set(inspect.signature(type(make()).__init__).parameters):
            pytest.skip("diffusers does not offer this spacing here")
    except ValueError as error:
        pytest.skip(str(error))
    gaps = {}
    for kind in CONVERT:
        for n in STEPS if kind == "epsilon" else STEPS[:2]:
            gaps[kind, n] = gap(make(prediction_type=kind, **flags), solver, kind, spacing, n)
    hard = gaps.pop(("epsilon", 5)) if spacing == "karras" and "3" in name else 0.0
    assert max(gaps.values()) < 1e-5, gaps
    assert sum(v > 0 for v in gaps.values()) >= 4  # diffusers' was finite often enough
    assert hard < 2e-5


def labelled(scheduler, n, kind, solver, zs=(), zero=True, **step):
    """For schedulers with labels only: the same on the sigmas of their labels, with given noise."""
    schedule = fs.DiscreteVP(scheduler.alphas_cumprod)
    model = network(schedule, kind)
    scheduler.set_timesteps(n)
    want = theirs(scheduler, model, **step)
    labels = getattr(scheduler, "_timesteps", scheduler.timesteps.tolist())
    times = torch.tensor(sorted({int(t) for t in labels}, reverse=True), dtype=torch.float64)
    last = torch.tensor([0.0 if zero else schedule.sigma_min], dtype=torch.float64)
    sigmas = torch.cat([schedule.sigma(times), last])
    plan = solver.plan(sigmas, schedule)
    supply, x = iter(zs), NOISE / schedule.alpha(sigmas[:1]).float()
    problem = fs.DiffusionModel(CONVERT[kind](model, schedule, rounding="nearest"), schedule)
    got = run(plan, x, evaluator_of(problem, plan, x), lambda *_: (next(supply),))
    if not zero:
        got = got * schedule.alpha(last).float()
    return float((got - want).norm() / want.norm())


LABELLED = ("linspace", "leading", "trailing")


@pytest.mark.parametrize("spacing", LABELLED)
@pytest.mark.parametrize("kind", CONVERT)
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_ddim_and_ddpm_equal_diffusers(spacing, kind, eta, monkeypatch):
    for n in STEPS:
        zs = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(100 + i)) for i in range(n)]
        for module in ("scheduling_ddim", "scheduling_ddpm"):
            supply = iter(zs)
            monkeypatch.setattr(f"diffusers.schedulers.{module}.randn_tensor",
                                lambda *a, supply=supply, **k: next(supply))  # fmt: skip
        ddim = df.DDIMScheduler(clip_sample=False, prediction_type=kind, **SPACINGS[spacing])
        assert labelled(ddim, n, kind, compat.DiffusersDDIM(eta), zs, eta=eta) < 1e-5
        if spacing == "trailing" and eta == 0:  # n divides 1000: their stride is the grid's
            assert labelled(ddim, n, kind, fs.DDIM()) < 1e-5
        if eta == 1:
            ddpm = df.DDPMScheduler(clip_sample=False, prediction_type=kind, **SPACINGS[spacing])
            assert labelled(ddpm, n, kind, fs.DDPM(), zs) < 1e-5


@pytest.mark.parametrize("spacing", LABELLED)
@pytest.mark.parametrize("warm_up", ["plms", "runge_kutta"])
@pytest.mark.parametrize("zero", [True, False])
def test_pndm_equals_diffusers(spacing, warm_up, zero):
    """diffusers combines noise predictions as in the paper, or v; it rejects networks of x0."""
    for n in STEPS:
        pndm = df.PNDMScheduler(skip_prk_steps=warm_up == "plms", set_alpha_to_one=zero, **SPACINGS[spacing])
        tolerance = 2e-5 if n == 5 else 1e-5  # Adams's weights, up to 59/24, on the rounding of 157 eps
        assert labelled(pndm, n, "epsilon", compat.DiffusersPNDM(warm_up), zero=zero) < tolerance
        v = df.PNDMScheduler(skip_prk_steps=warm_up == "plms", set_alpha_to_one=zero,
                             prediction_type="v_prediction", **SPACINGS[spacing])  # fmt: skip
        solver = compat.DiffusersPNDM(warm_up, "v_prediction")
        assert labelled(v, n, "v_prediction", solver, zero=zero) < tolerance
        if spacing == "leading" and zero:  # their stride is the grid's
            assert labelled(pndm, n, "epsilon", fs.PNDM(warm_up)) < tolerance


def test_ipndm_equals_diffusers():
    """diffusers' IPNDM has alpha = cos, sigma = sin, and its network predicts v.

    It starts at alpha = 0 and ignores the first v; here the network returns zero there.
    """
    for n in STEPS:
        scheduler = df.IPNDMScheduler()
        scheduler.set_timesteps(n)
        alphas = scheduler.alphas.double().clamp(min=1e-8)
        sigmas = scheduler.betas.double() / alphas

        def level(t):
            return (torch.sin(t * torch.pi / 2), torch.cos(t * torch.pi / 2).clamp(min=1e-8))

        def model(X, t):
            s, a = level(torch.as_tensor(t).reshape(-1)[:1].double())
            D = DATA.denoiser((X / a).double(), s / a)
            v = a * ((X - a * D) / s) - s * D
            return torch.where(torch.as_tensor(t).reshape(-1)[:1] < 0.9999, v, 0).float()

        class Sine(fs.VPLinear):
            def label(self, sigma):
                return torch.atan(sigma) * 2 / torch.pi

        want = theirs(scheduler, model)
        problem = fs.DiffusionModel(fs.from_v(model, Sine()), Sine())
        got = fs.sample(problem, fs.IPNDM(4), noise=NOISE.double(), sigmas=sigmas)
        assert float((got - want).norm() / want.norm()) < 1e-5


def test_differences_from_diffusers():
    """bh1 to sigma = 0 is nan there and finite here; third order differs unless asked for."""
    scheduler = df.UniPCMultistepScheduler(solver_type="bh1")
    scheduler.set_timesteps(5)
    assert not theirs(scheduler, network(fs.DiscreteVP(scheduler.alphas_cumprod), "epsilon")).isfinite().all()
    assert fs.UniPC(2, "bh1").plan(scheduler.sigmas.double()).update_eval.isfinite().all()
    make, _ = multistep(3, "midpoint")
    assert gap(make(), fs.DPMSolverPP(3), "epsilon", "linspace", 20) > 1e-4
