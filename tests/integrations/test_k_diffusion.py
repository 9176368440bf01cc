"""The k-diffusion integration: the images of `fs.sample`, callbacks, ComfyUI's list, model wrappers.

ComfyUI cannot be installed here; a stand-in with the structure of the parts in use replaces it.
"""

import math
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from k_diffusion_cases import (
    BATCH,
    CHURNED,
    DETERMINISTIC,
    MIXTURE,
    PROBLEM,
    STOCHASTIC,
    karras,
    model,
    name,
    network,
    path,
    start,
)

import fewstep as fs
from fewstep import compat
from fewstep.integrations import k_diffusion as kd
from fewstep_analysis.diffusion_problems import ring, two_bumps

# ---------------------------------------------------------------- the same image as fs.sample


@pytest.mark.parametrize("zero", [True, False], ids=["to0", "above0"])
@pytest.mark.parametrize("solver", DETERMINISTIC + STOCHASTIC, ids=name)
def test_sampler_gives_the_image_of_sample(solver, zero):
    x, sigmas = start(), karras(9, zero, dtype=torch.float32).double()
    theirs = fs.sample(PROBLEM, solver, noise=x, sigmas=sigmas, path=path(x))
    mine = kd.sampler(solver)(model, x, sigmas, disable=True, noise_sampler=path(x))
    assert mine.shape == x.shape
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    single = kd.sampler(solver)(model, x.float(), sigmas.float(), {}, None, True, noise_sampler=path(x.float()))
    torch.testing.assert_close(single.double(), theirs, rtol=1e-4, atol=1e-4)


def test_sampler_accepts_plans_and_solvers_that_need_a_schedule():
    x, sigmas = start(), karras(6)
    plan = fs.UniPC(3).plan(sigmas)
    f = kd.sampler(plan)
    assert torch.equal(f(model, x, f.sigmas, disable=True), kd.sampler(fs.UniPC(3))(model, x, sigmas))
    schedule = fs.DiscreteVP.named("linear")
    problem = fs.DiffusionModel(MIXTURE.denoiser, schedule)
    solver = compat.DiffusersDDIM()
    sigmas = fs.sigma_grid(schedule, 10, "leading")
    x = start(sigma=float(sigmas[0]))
    theirs = fs.sample(problem, solver, noise=x * schedule.alpha(sigmas[0]), sigmas=sigmas)
    torch.testing.assert_close(kd.sampler(solver, schedule=schedule)(model, x, sigmas), theirs)
    with pytest.raises(fs.InputError, match="schedule: got None"):
        kd.sampler(solver)(model, x, sigmas)


def test_fitted_table_checks_its_grid_and_its_model():
    x, sigmas = start(64), karras(5)
    student, _ = fs.distill_dode(PROBLEM, fs.DDIM(), noise=x, sigmas=sigmas)
    f = kd.sampler(student, schedule=PROBLEM.schedule)
    theirs = fs.sample(PROBLEM, student, noise=x)
    torch.testing.assert_close(f(model, x, f.sigmas, disable=True), theirs, rtol=1e-9, atol=1e-9)

    def conditioned(x, sigma, c):
        """Conditioning has the batch's size, which the fingerprint's evaluations must have too."""
        return MIXTURE.denoiser(x, sigma) + 0 * c

    c = torch.ones(64, 1)
    torch.testing.assert_close(f(conditioned, x, f.sigmas, {"c": c}), theirs, rtol=1e-9, atol=1e-9)
    # without a schedule it is read from the model, as in as_denoiser
    wrapper = kd.as_wrapper(PROBLEM)
    torch.testing.assert_close(kd.sampler(student)(wrapper, x, f.sigmas), theirs, rtol=1e-9, atol=1e-9)
    assert kd.sampler(student)(model, x, f.sigmas).shape == x.shape  # the grid's ends are the schedule's
    other, _ = fs.distill_dode(
        fs.DiffusionModel(MIXTURE.denoiser, fs.EDM(0.01, 20.0)), fs.DDIM(), noise=x, sigmas=sigmas
    )
    with pytest.raises(fs.InputError, match=r"fitted to EDM\(sigma_min=0.01.*sampler\(student, schedule="):
        kd.sampler(other)(model, x, f.sigmas)
    with pytest.raises(fs.InputError, match="answers differently"):
        f(lambda x, sigma: 0.5 * x, x, f.sigmas)
    with pytest.raises(fs.InputError, match=r"sigmas: got .* carries its own grid, \[15, .*, 0\]"):
        f(model, x, karras(6))
    # without its fit it is not checked
    torch.testing.assert_close(kd.sampler(replace(student, fit=None))(model, x, f.sigmas), theirs, rtol=1e-9, atol=1e-9)


class Network(torch.nn.Module):
    """A SigSampler's network: the exact denoiser plus a small function of the path."""

    def forward(self, x, sigma, sigma_next, xi):
        return MIXTURE.denoiser(x, sigma) + 0.01 * xi.sum(1)


def test_sig_sampler_uses_its_own_network():
    x, sigmas = start(), karras(6, zero=False)
    student = fs.SigSampler(fs.EulerMaruyama().plan(sigmas), Network(), levy="H")
    f = kd.sampler(student)
    theirs = fs.sample(PROBLEM, student, noise=x, path=path(x, "H"))
    mine = f(lambda *a: 1 / 0, x, f.sigmas, noise_sampler=path(x, "H"))
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    with pytest.raises(fs.InputError, match="needs W and H"):
        f(model, x, sigmas, noise_sampler=lambda s, t: torch.randn_like(x))
    with pytest.raises(fs.InputError, match="levy='W'"):
        f(model, x, sigmas, noise_sampler=path(x, "W"))


# ---------------------------------------------------------------- what the caller sees


@pytest.mark.parametrize("solver", DETERMINISTIC + STOCHASTIC + CHURNED, ids=name)
@pytest.mark.parametrize("zero", [True, False], ids=["to0", "above0"])
def test_callback_is_called_as_in_k_diffusion(solver, zero):
    """Once per step, in order, with the model's input and output."""
    x, sigmas, calls = start(), karras(6, zero), []
    kd.sampler(solver)(model, x, sigmas, callback=calls.append)
    n = len(sigmas) - 1
    assert [d["i"] for d in calls] == list(range(n))
    for i, d in enumerate(calls):
        assert set(d) == {"x", "i", "sigma", "sigma_hat", "denoised"}
        assert torch.equal(d["sigma"], sigmas[i])
        if solver in CHURNED:
            assert d["sigma_hat"] > sigmas[i]
        else:
            assert torch.equal(d["sigma_hat"], sigmas[i])
        again = model(d["x"], d["sigma_hat"].expand(BATCH))
        torch.testing.assert_close(d["denoised"], again, rtol=1e-9, atol=1e-9)
    if not (solver in CHURNED or name(solver) in ("SEA", "ShARK")):  # their stages add noise to x
        assert torch.equal(calls[0]["x"], x)


def test_callback_of_irregular_plan_reports_levels():
    """A table in which two evaluations move the state within one interval."""
    builder = fs.PlanBuilder("odd", torch.tensor([4.0, 1.0, 0.0]).double())
    for s, t in ((4.0, 2.0), (2.0, 1.0), (1.0, 0.0)):
        D = builder.evaluate(builder.x, s)
        builder.advance(t / s * builder.x + (1 - t / s) * D)
    calls = []
    f = kd.sampler(builder.finish())
    f(model, start(sigma=4.0), f.sigmas, callback=calls.append)
    assert [d["i"] for d in calls] == [0, 0, 1]
    assert [float(d["sigma_hat"]) for d in calls] == [4, 2, 1]


def test_levels_of_a_list_keep_float64_in_callbacks():
    calls, levels = [], [9.1, 3.3, 0.7, 0.1]
    kd.sampler(fs.DDIM())(model, start(sigma=9.1), levels, callback=calls.append)
    assert [float(d["sigma"]) for d in calls] == levels[:-1]


@pytest.mark.parametrize("solver", [fs.DDIM(), fs.UniPC(3), fs.EDMHeun()], ids=name)
def test_gradients_flow_to_x_alone_and_are_refused_for_levels(solver):
    """A graph only where x requires grad: the parameters of networks always do."""
    sigmas = karras(5)
    weight = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    net = lambda x, s, **more: weight * torch.tanh(x)  # noqa: E731
    assert not kd.sampler(solver)(net, start(), sigmas).requires_grad
    x = start().requires_grad_()
    mine = torch.autograd.grad(kd.sampler(solver)(net, x, sigmas).sum(), (x, weight))
    problem = fs.DiffusionModel(lambda x, s: weight * torch.tanh(x), PROBLEM.schedule)
    theirs = torch.autograd.grad(fs.sample(problem, solver, noise=x, sigmas=sigmas).sum(), (x, weight))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        assert not kd.sampler(solver)(net, x, sigmas.clone().requires_grad_()).requires_grad
    with pytest.raises(fs.InputError, match="sigmas: got a tensor that requires grad"):
        kd.sampler(solver)(net, x, sigmas.clone().requires_grad_())


@pytest.mark.parametrize("solver", [fs.UniPC(3), fs.ShARK()], ids=name)
def test_results_that_are_not_finite_name_the_evaluation(solver):
    levels = torch.tensor([8.0, 4.0, 2.0, 0.0])
    first = torch.arange(len(start()))[:, None] == 0
    net = lambda x, s, **more: torch.where(first & (s[0] < 5), math.nan, 0.3 * x)  # noqa: E731
    with pytest.raises(fs.NonFiniteError, match=r"output of the model at evaluation 1 .* for 1 of ") as error:
        kd.sampler(solver)(net, start(sigma=8.0), levels)
    assert error.value.step == 1
    huge, overflows = torch.full((1, 3), 3e38), torch.tensor([8.0, 4.0, 0.5])
    with pytest.raises(fs.NonFiniteError, match="final state"):
        kd.sampler(fs.DPMSolverPP(2))(lambda x, s: huge * (1 if s > 5 else -1), huge / 1e9, overflows)


def test_progress_counts_steps(monkeypatch):
    x, bars, progress = start(), [], kd.progress
    monkeypatch.setattr(kd, "progress", lambda *args, **options: bars.append(progress(*args, **options)) or bars[-1])
    for solver in (fs.EDMHeun(), fs.UniPC(2)):
        kd.sampler(solver)(model, x, karras(7), disable=False)
        assert (bars[-1].n, bars[-1].total) == (7, 7)
        kd.sampler(solver)(model, x, karras(7), disable=True)
        assert bars[-1].disable


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_only_the_model_sees_half_precision(dtype):
    """The model is exact, so only the rounding of the state could accumulate over 60 steps."""
    seen = set()

    def half(x, sigma, **extra_args):
        seen.add((x.dtype, sigma.dtype))
        return torch.full_like(x, 0.75)

    x = start(dtype=dtype)
    for solver in (fs.UniPC(3), fs.EulerMaruyama()):
        out = kd.sampler(solver)(half, x, karras(60, zero=False, dtype=torch.float32), seed=0)
        wide = kd.sampler(solver)(half, x.double(), karras(60, zero=False), seed=0)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), wide, rtol=0.6 * torch.finfo(dtype).eps, atol=1e-5)
    assert seen == {(dtype, dtype), (torch.float64, torch.float64)}


def cut(x, sigma):
    return model(x, sigma)[1:]


X, SIGMAS = start(4), karras(4)
NOISE = kd.BrownianNoiseSampler
BAD = {
    "solver": (dict(solver=fs.Milstein()), "solver: got Milstein"),
    "option": (dict(eta=1.0), r"eta: got 1.0; expected only seed and noise_sampler.*DDIM\(eta=1.0\)"),
    "x": (dict(x=[1.0]), "x: got list"),
    "integers": (dict(x=torch.ones(4, 2, dtype=torch.int64)), "x: got torch.int64"),
    "empty": (dict(x=X[:0]), r"x: got an empty batch"),
    "increasing": (dict(sigmas=SIGMAS.flip(0)), "strictly decreasing"),
    "repeated end": (dict(sigmas=torch.cat([SIGMAS, SIGMAS[-1:]])), "strictly decreasing"),
    "repeated": (dict(sigmas=SIGMAS[[0, 1, 1, 2]]), "strictly decreasing"),
    "negative": (dict(sigmas=SIGMAS - 1), ">= 0"),
    "nan": (dict(sigmas=SIGMAS * math.nan), "finite"),
    "matrix": (dict(sigmas=SIGMAS[None]), r"expected \(n,\)"),
    "seed": (dict(seed=1.5), "seed: got 1.5, expected a"),
    "seeds": (dict(seed=[1, 2]), "seed: got 2, expected one for each of the 4"),
    "denoised": (dict(model=cut), r"model: got .* shape \(3, 2\) at sigma"),
    "tuple": (dict(model=lambda x, sigma: (x,)), "model: got tuple"),
    "noise shape": (dict(noise_sampler=lambda s, t: X[0]), r"noise_sampler: got \(2,\)"),
    "noise object": (dict(noise_sampler=3), "noise_sampler: got int"),
    "foreign H": (dict(solver=fs.ShARK(), noise_sampler=lambda s, t: X), "ShARK needs W and H"),
    "other clock": (dict(solver=fs.ShARK(), noise_sampler=NOISE(X, 0.03, 15)), "transform=snr"),
    "path shape": (dict(noise_sampler=NOISE(X[:2], 0.03, 15, transform=kd.snr)), r"\(2, 2\)"),
    "range": (dict(noise_sampler=NOISE(X, 0.1, 15, transform=kd.snr)), r"\[0.1, 15\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_raises_a_clear_error(case):
    changes, words = BAD[case]
    given = dict(model=model, x=X, sigmas=SIGMAS) | {k: v for k, v in changes.items() if k != "solver"}
    with pytest.raises(fs.InputError, match=words):
        kd.sampler(changes.get("solver", fs.EulerMaruyama()))(**given)


# ---------------------------------------------------------------- ComfyUI (a stand-in)


def stand_in():
    """The parts of `comfy` in use: SAMPLERS is SAMPLER_NAMES, KSAMPLER_NAMES another list."""
    comfy, samplers, k, sampling = (
        ModuleType(n) for n in ("comfy", "comfy.samplers", "comfy.k_diffusion", "comfy.k_diffusion.sampling")
    )
    sampling.sample_euler = lambda model, x, sigmas, **rest: x
    samplers.KSAMPLER_NAMES = ["euler"]
    samplers.SAMPLER_NAMES = [*samplers.KSAMPLER_NAMES, "ddim", "uni_pc"]
    discarding = {"dpm_2", "uni_pc"}
    samplers.KSampler = SimpleNamespace(SAMPLERS=samplers.SAMPLER_NAMES, DISCARD_PENULTIMATE_SIGMA_SAMPLERS=discarding)
    comfy.samplers, comfy.k_diffusion, k.sampling, comfy.__path__, k.__path__ = samplers, k, sampling, [], []

    def ksampler(sampler_name, model, noise, sigmas, extra_args, callback):
        """As KSAMPLER.sample calls the function of that name."""
        function = getattr(sampling, f"sample_{sampler_name}")
        calls = lambda d: callback(d["i"], d["denoised"], d["x"], len(sigmas) - 1)  # noqa: E731
        return function(model, noise, sigmas, extra_args=extra_args, callback=calls, disable=True)

    samplers.ksampler = ksampler
    return comfy


def test_registered_solver_runs_by_name_in_comfyui(monkeypatch):
    comfy = stand_in()
    for module in (comfy, comfy.samplers, comfy.k_diffusion, comfy.k_diffusion.sampling):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    f = kd.register("fewstep_unipc", fs.UniPC(3))
    kd.register("fewstep_unipc", f)
    assert kd.register("fewstep_unipc", fs.UniPC(2), comfy) is comfy.k_diffusion.sampling.sample_fewstep_unipc
    assert comfy.samplers.KSAMPLER_NAMES == ["euler", "fewstep_unipc"]
    assert comfy.samplers.KSampler.SAMPLERS == ["euler", "ddim", "uni_pc", "fewstep_unipc"]
    x, sigmas, steps = start(), karras(6), []
    extra = {"model_options": {}, "seed": 7, "denoise_mask": None}
    calls = lambda i, D, x, n: steps.append((i, n))  # noqa: E731
    out = comfy.samplers.ksampler("fewstep_unipc", model, x, sigmas, extra, calls)
    assert torch.equal(out, kd.sampler(fs.UniPC(2))(model, x, sigmas))
    assert steps == [(i, 6) for i in range(6)]
    for taken in ("euler", "ddim"):
        with pytest.raises(fs.InputError, match="a sampler of ComfyUI's own"):
            kd.register(taken, fs.UniPC(3), comfy)
    with pytest.raises(fs.InputError, match="name: got 'my sampler'"):
        kd.register("my sampler", fs.UniPC(3), comfy)


def test_register_tells_comfyui_which_grids_lose_their_penultimate_level():
    comfy = stand_in()
    names = comfy.samplers.KSampler.DISCARD_PENULTIMATE_SIGMA_SAMPLERS
    for solver in (fs.UniPC(3), fs.DPMSolver(2)):
        kd.register("fewstep_a", solver, comfy)
        assert names == {"dpm_2", "uni_pc", "fewstep_a"}
        kd.register("fewstep_a", fs.DPMSolverPP(2), comfy)
        assert names == {"dpm_2", "uni_pc"}
    kd.register("fewstep_a", kd.sampler(fs.UniPC(3)), comfy, discard_penultimate=False)
    assert names == {"dpm_2", "uni_pc"}
    kd.register("fewstep_a", fs.ShARK(), comfy, discard_penultimate=True)
    assert "fewstep_a" in names


def test_register_without_comfyui_raises_a_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "comfy", None)
    with pytest.raises(fs.InputError, match=r"ComfyUI cannot be imported here .*custom_nodes"):
        kd.register("fewstep_unipc", fs.UniPC(3))


# ---------------------------------------------------------------- model wrappers


class CompVisLike(torch.nn.Module):
    """Like k-diffusion's wrappers of noise networks: a table of sigmas, its ends, x - sigma eps."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule = schedule
        self.register_buffer("sigmas", schedule.sigma(torch.arange(1000, dtype=torch.float64)).float())

    sigma_min = property(lambda self: self.sigmas[0])
    sigma_max = property(lambda self: self.sigmas[-1])

    def forward(self, x, sigma, shift=0.0):
        return x - sigma[:, None] * network(self.schedule)(x, sigma) + shift


def test_as_denoiser_reads_the_range_of_a_wrapper():
    schedule = fs.DiscreteVP.named("linear")
    problem = kd.as_denoiser(CompVisLike(schedule))
    assert problem.schedule.sigma_max == pytest.approx(schedule.sigma_max, rel=1e-6)
    assert problem.schedule.sigma_min == pytest.approx(schedule.sigma_min, rel=1e-6)
    sigmas = fs.sigma_grid(schedule, 10)
    own = fs.DiffusionModel(ring().mixture.denoiser, schedule)
    x = start(sigma=float(sigmas[0]))
    theirs = fs.sample(own, fs.UniPC(3), noise=x * schedule.alpha(sigmas[0]), sigmas=sigmas)
    mine = fs.sample(problem, fs.UniPC(3), noise=x, sigmas=sigmas)
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    D = kd.as_denoiser(CompVisLike(schedule), extra_args={"shift": 1.0}).denoiser
    one = torch.tensor(1.0).double()
    torch.testing.assert_close(D(x, one) - problem.denoiser(x, one), torch.ones_like(x))
    torch.testing.assert_close(D(x, one.expand(BATCH)), D(x, one))
    # distilled on the problem, sampled through the wrapper itself
    student, _ = fs.distill_dode(problem, fs.DDIM(), noise=start(64, 157.0), steps=5)
    f = kd.sampler(student)
    x = start(sigma=float(f.sigmas[0]))
    torch.testing.assert_close(f(CompVisLike(schedule), x, f.sigmas), fs.sample(problem, student, noise=x))


def test_as_denoiser_rejects_missing_and_infinite_ranges():
    table = SimpleNamespace(sigmas=torch.tensor([0.0, 0.5, 3.0]))
    wrapper = type("Net", (), {"__call__": lambda self, x, sigma: x})
    net = wrapper()
    vars(net).update(vars(table))
    assert kd.as_denoiser(net).schedule == fs.EDM(0.5, 3.0)
    assert kd.as_denoiser(net, sigma_max=9.0).schedule == fs.EDM(0.5, 9.0)
    net.sigma_min, net.sigma_max = 0.0, math.inf  # EDM's own networks
    for bad in (dict(wrapper=net), dict(wrapper=wrapper(), sigma_max=1.0), dict(wrapper=model)):
        with pytest.raises(fs.InputError, match=r"sigma_min, sigma_max: got .*as_denoiser\(wrapper, sigma_min"):
            kd.as_denoiser(**bad)
    with pytest.raises(fs.InputError, match="CompVisDenoiser"):
        kd.as_denoiser(lambda x, s: x[..., :1], sigma_min=0.1, sigma_max=2.0).denoiser(X, torch.tensor(1.0))


def test_as_denoiser_calls_half_networks_in_half():
    def half(x, sigma):
        assert x.dtype == sigma.dtype == torch.bfloat16
        return x / (1 + sigma[:, None] ** 2)

    problem = kd.as_denoiser(half, sigma_min=0.1, sigma_max=5.0, dtype=torch.bfloat16)
    assert fs.sample(problem, fs.DDIM(), shape=(4, 2), steps=4).dtype == torch.float32


def test_as_wrapper_is_the_inverse_of_as_denoiser():
    bumps = two_bumps().problem
    wrapper = kd.as_wrapper(bumps)
    assert (wrapper.sigma_min, wrapper.sigma_max) == (0.1, 10.0)
    x = start(event=(1,))
    levels = torch.linspace(0.1, 5, BATCH).double()
    torch.testing.assert_close(wrapper(x, levels, seed=3), bumps.denoiser(x, levels))
    torch.testing.assert_close(wrapper(x, levels[:1].expand(BATCH)), bumps.denoiser(x, levels[0]))
    back = kd.as_denoiser(wrapper)
    assert back.schedule == bumps.schedule
    a, b = (fs.sample(p, fs.UniPC(2), shape=(8, 1), steps=6) for p in (bumps, back))
    torch.testing.assert_close(a, b)
