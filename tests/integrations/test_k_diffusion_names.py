"""The samplers of k-diffusion and ComfyUI by name, and the formulas of those that k-diffusion does not have."""

import math

import pytest
import torch
from k_diffusion_cases import karras, model, start

import fewstep as fs
from fewstep import compat
from fewstep.catalog import with_options
from fewstep.integrations import k_diffusion as kd
from fewstep.testing import _variance

V0 = 0.25


@pytest.mark.parametrize("name", [n for n in kd.SAMPLERS if n != "lcm"])  # it is for consistency networks
def test_every_name_samples_gaussian_data(name):
    """By algebra: the variance of the samples goes to that of the data, from both sides of it."""
    solver, start = kd.SAMPLERS[name], torch.tensor([15.0, 14.0]).double()
    for n, worst in ((30, 0.35), (240, 0.06)):
        plan = solver.plan(karras(n))
        var = _variance(plan, start, lambda x, s: V0 / (V0 + s * s) * x)
        off = var[0] / V0 - 1
        assert abs(off) < worst * (4 if name == "heunpp2" else 1), (n, off)


def test_names_are_accepted_where_solvers_are():
    x, sigmas = start(), karras(6)
    expected = kd.sampler(fs.Ancestral())(model, x, sigmas, seed=1)
    for name in ("dpmpp_2s_ancestral", "sample_dpmpp_2s_ancestral", "DPMPP_2S_ancestral", "Ancestral"):
        assert torch.equal(kd.sampler(name)(model, x, sigmas, seed=1), expected)
    assert kd.sampler("dpmpp_2m_sde_gpu").solver is kd.SAMPLERS["dpmpp_2m_sde"]
    assert repr(kd.sampler("unipc:3").solver) == "UniPC(order=3)"
    with pytest.raises(fs.InputError, match="solver: got 'dpmpp_2m_sd'.*dpmpp_2m_sde"):
        kd.sampler("dpmpp_2m_sd")


def test_names_take_options_in_brackets():
    named = {
        "dpmpp_2m_sde(eta=0.5)": fs.DPMSolverSDE(2, 0.5), "dpmpp_2m_sde_heun(order=3)": fs.DPMSolverSDE(3, 1.0, "heun"),
        "sample_ipndm_v(2)": fs.IPNDM(2, True), "UniPC(order=3, variant=bh1)": fs.UniPC(3, "bh1"),
        "Euler (churn=4)": fs.EDMEuler(4.0), "dpm_2_ancestral(eta=0.5)": fs.Ancestral(fs.DPMSolver(2), 0.5),
        "dpmpp_3m_sde_gpu(eta=0.5)": compat.OfficialDPM(fs.DPMSolverSDE(3, 0.5, "heun")),
    }  # fmt: skip
    for text, solver in named.items():
        assert repr(kd.sampler(text).solver) == repr(solver)
    pp = kd.sampler("dpmpp_2m_cfg_pp(order=3)")
    assert (repr(pp.solver), pp.cfg_pp, pp.history) == ("DPMSolverPP(order=3)", True, "unconditional")
    for text in ("euler(eta=1)", "dpmpp_2m(order=9)", "unipc(s_noise=1)"):
        with pytest.raises(fs.InputError, match=r"^(solver|order): got"):
            kd.sampler(text)


@pytest.mark.parametrize(
    "text", ["dpmpp_2m(order=3", "dpmpp_2m)", "dpmpp_2m(order=3) trailing", "dpmpp_2m(order=3)(order=1)", "UniPC(3"]
)
def test_brackets_of_options_are_closed_once_at_the_end(text):
    with pytest.raises(fs.InputError, match=r"^solver: got .*, expected a name, or a name with options in brackets"):
        kd.sampler(text)


def test_errors_list_the_options_that_a_solver_takes():
    with pytest.raises(fs.InputError, match="DPMSolverSDE takes order=2, eta=1.0"):
        kd.sampler("dpmpp_3m_sde(gamma=1)")
    with pytest.raises(fs.InputError, match=r"OfficialDPM takes solver\.$"):
        with_options(kd.SAMPLERS["dpmpp_3m_sde"], "gamma=1")


def test_s_noise_scales_all_noise():
    """On a denoiser that is 0 the state is linear in the noise."""
    x, sigmas, zero = torch.zeros(8, 3, dtype=torch.float64), karras(6)[:-1], lambda x, sigma: 0 * x
    for name in ("euler_ancestral", "dpmpp_sde", "er_sde", "seeds_3", "sa_solver", "euler(churn=4)", "shark"):
        one, half = (kd.sampler(name, s_noise=s)(zero, x, sigmas, seed=1) for s in (1.0, 0.5))
        assert one.abs().min() > 0
        torch.testing.assert_close(half, one / 2)


def test_gradient_estimation_by_its_formula():
    x, levels, last = start(), karras(6).tolist(), None
    for s, t in zip(levels[:-1], levels[1:], strict=True):
        d = (x - model(x, x.new_full((len(x),), s))) / s
        x = x + (t - s) * (d if last is None or t == 0 else 2 * d - last)
        last = d
    torch.testing.assert_close(kd.sampler("gradient_estimation")(model, start(), karras(6)), x, rtol=1e-9, atol=1e-9)


def same(a, b, **tolerance):
    """Whether two solvers give the same samples on one path."""
    x, sigmas = start(), karras(7)
    noise = kd.BrownianNoiseSampler(x, 0.03, 15.0, seed=2, transform=kd.snr)
    ends = [kd.sampler(s)(model, x, sigmas, noise_sampler=noise) for s in (a, b)]
    torch.testing.assert_close(*ends, **(tolerance or dict(rtol=1e-9, atol=1e-9)))


IDENTITIES = {
    "Euler ancestral": (fs.Ancestral(fs.DDIM(), 0.7), fs.DDIM(0.7)),
    "no ancestral noise": (fs.Ancestral(fs.DPMSolver(3), 0.0), fs.DPMSolver(3)),
    "no restart": (fs.Restart(fs.UniPC(2), ()), fs.UniPC(2)),
    "intervals outside the grid": (fs.Restart(intervals=((0.01, 1.0, 3, 1), (1.0, 20.0, 3, 1))), fs.EDMHeun()),
    "one stage": (fs.DPMSolverSDE(1, multistep=False), fs.DDIM(1.0)),
    "singlestep without noise": (fs.DPMSolverSDE(3, 0.0, multistep=False), fs.DPMSolverPP(3, multistep=False)),
    "r of the default": (fs.DPMSolver(2, r=0.5), fs.DPMSolver(2)),
}


@pytest.mark.parametrize("case", IDENTITIES)
def test_identities(case):
    same(*IDENTITIES[case])


def at(x, s):
    """A nonlinear denoiser."""
    return torch.tanh(x / (1 + s))


def end_of(plan, x):
    problem = fs.DiffusionModel(at, fs.EDM(0.01, 80.0))
    return fs.sample(problem, plan, noise=x)


X = torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None]


def test_exponential_heun_by_its_formula():
    """x_E = DDIM to t, then D + phi_2(-h) h-weighted (D_E - D): phi_2 = (e^-h - 1 + h) / h."""
    s, t = 3.0, 1.0
    h, D = math.log(s / t), at(X, s)
    euler = t / s * X + (1 - t / s) * D
    expected = euler + (math.exp(-h) - 1 + h) / h * (at(euler, t) - D)
    plan = kd.SAMPLERS["exp_heun_2_x0"].plan(torch.tensor([s, t]))
    torch.testing.assert_close(end_of(plan, X), expected, rtol=1e-12, atol=1e-12)


def test_heunpp2_by_its_formula():
    levels, x = [4.0, 2.0, 1.0, 0.4, 0.1], X
    for i, (s, t) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        later = levels[i + 1 : min(i + 3, len(levels) - 1)]
        w = [u / ((1 + len(later)) * levels[0]) for u in later]
        y, u, slopes = x, s, []
        for v in [*later, None]:
            slopes.append((y - at(y, u)) / u)
            if v is not None:
                y, u = y + (v - u) * slopes[-1], v
        x = x + (t - s) * sum(a * d for a, d in zip([1 - sum(w), *w], slopes, strict=True))
    plan = compat.HeunPP2().plan(torch.tensor(levels, dtype=torch.float64))
    torch.testing.assert_close(end_of(plan, X), x, rtol=1e-12, atol=1e-12)


def test_er_sde_integrates_a_quadratic_estimate_exactly():
    """For D = 1 + sigma + sigma^2, against the trapezoidal rule on 10^5 intervals in log sigma."""
    grid = torch.tensor([9.0, 5.0, 3.0, 2.0, 1.2]).double()
    phi = lambda s: s * (torch.exp(s**0.3) + 10)  # noqa: E731
    D = lambda s: 1 + s + s * s  # noqa: E731
    plan = fs.ERSDE(3).plan(grid)
    x, evaluations = torch.zeros(1, dtype=torch.float64), []
    for i, row in enumerate(plan.rows):
        s, t = grid[i], grid[i + 1]
        evaluations.insert(0, D(s))
        got = row.update.scale * x + sum(w * evaluations[j] for w, j in row.update.evaluations)
        if i >= 2:
            sigma = torch.logspace(math.log10(s), math.log10(t), 100001, dtype=torch.float64)
            integral = torch.trapezoid(D(sigma), 1 / phi(sigma))
            torch.testing.assert_close(got, phi(t) / phi(s) * x + phi(t) * integral, rtol=1e-8, atol=0)
        noise = float(plan.update_noise[i].sum())
        assert noise == pytest.approx(float((t**2 - (s * phi(t) / phi(s)) ** 2).sqrt()))
        x = got


def test_restarts_contract_an_error_and_cost_their_steps():
    """The state begins 20 % too large: each restart of Gaussian data removes a part of what is left at its end."""
    grid, wrong = karras(40), torch.tensor([18.0]).double()
    offs = []
    for times in (0, 1, 3):
        solver = fs.Restart(intervals=((0.1, 2.0, 12, times),) if times else ())
        plan = solver.plan(grid)
        assert plan.nfe == 2 * 40 - 1 + times * 24
        offs.append(abs(float(_variance(plan, wrong, lambda x, s: V0 / (V0 + s * s) * x)) / V0 - 1))
    assert offs[1] < 0.2 * offs[0]
    assert offs[2] < 0.03 * offs[0]


BAD = {
    "stochastic": (lambda: fs.Ancestral(fs.DDIM(1.0)), "solver: got DDIM.*draws noise itself"),
    "class": (lambda: fs.Restart(fs.EDMHeun), "solver: got EDMHeun"),
    "eta": (lambda: fs.Ancestral(eta=1.5), "eta: got 1.5"),
    "interval": (lambda: fs.Restart(intervals=((2.0, 0.1, 3, 1),)), "0 < low < high"),
    "three": (lambda: fs.Restart(intervals=((2.0, 0.1, 3),)), r"expected \(low, high, steps, times\)"),
    "rho": (lambda: fs.Restart(rho=0.0), "rho: got 0.0"),
    "r": (lambda: fs.DPMSolverPP(2, r=0.3), "r: got 0.3.* multistep=False"),
    "r of 3": (lambda: fs.DPMSolver(3, r=0.3), "r: got 0.3"),
    "order": (lambda: fs.ERSDE(4), "order: got 4"),
    "pece": (lambda: fs.SASolver(2, 0, pece=True), "pece: got True without corrector"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_raise_a_clear_error(case):
    make, words = BAD[case]
    with pytest.raises(fs.InputError, match=words):
        make()


def test_labels_of_forge_are_names():
    labels = {
        "DPM++ 2M": "dpmpp_2m", "DPM++ 2M SDE": "dpmpp_2m_sde", "DPM++ 3M SDE": "dpmpp_3m_sde",
        "DPM++ SDE": "dpmpp_sde", "DPM++ 2S a": "dpmpp_2s_ancestral", "Euler a": "euler_ancestral",
        "DPM2": "dpm_2", "DPM2 a": "dpm_2_ancestral",
        "LMS": "lms", "Heun": "heun", "k_euler_a": "euler_ancestral", "DPM++ 2M SDE Heun": "dpmpp_2m_sde_heun",
    }  # fmt: skip
    for label, name in labels.items():
        assert repr(kd.sampler(label).solver) == repr(kd.SAMPLERS[name])
    pp = kd.sampler("DPM++ 2M CFG++(order=3)")
    assert (repr(pp.solver), pp.history) == ("DPMSolverPP(order=3)", "unconditional")


def test_the_same_names_are_accepted_by_compare():
    problem = fs.DiffusionModel(lambda x, s: V0 / (V0 + s * s) * x, fs.EDM())
    names = ["dpmpp_2m", "DPM++ 2M(order=3)", "unipc:3", "heun"]
    noise = torch.randn(16, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = fs.compare(problem, nfe=8, noise=noise, solvers=names, spacings=["karras"])
    assert {repr(r.solver) for r in found.rows} == {
        "DPMSolverPP()", "DPMSolverPP(order=3)", "UniPC(order=3)", "EDMHeun()"
    }  # fmt: skip
    with pytest.raises(fs.InputError, match="solvers: got 'dpmpp_2n'.*Did you mean 'dpmpp_2m'") as error:
        fs.compare(problem, nfe=8, noise=noise, solvers=["dpmpp_2n"])
    text = str(error.value)
    for other in ("ddpm", "milstein", "dpmpp_2m_sde", "shark"):  # with noise, or of SDEs only
        assert f"'{other}'" not in text
    assert "'dpm_solver_pp'" in text
