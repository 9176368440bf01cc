"""Every public function on a device that needs no GPU: no mix-up, and how often the host waits.

A solve or a sample reads at most two values from the device, and none per step: reads and uploads are those of half as
many steps. A training reads per checkpoint and held-out evaluation, not per iteration, except that the table of D-ODE,
whose parameters live on the CPU, gets its gradient back; it uploads its minibatches, which are drawn on the CPU.
Values agree with those of the CPU, because the fake device draws the same normals, and with those on record
(`recorded_numbers.py`). The last tests fail for a public function that no test has called on the device, unless
`EXCUSED` states why it need not be.
"""

import inspect
import re
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from fake_device import CUDA, FakeDevice, Held, MixUp, bare
from mixture_cases import GRID, MIXTURE, shifted
from public_names import public
from recorded_numbers import check_number
from torch import nn

import fewstep as fs
from fewstep import _tracing, distances
from fewstep.brownian.levy_area import METHODS
from fewstep.grid import SIGMA_SPACINGS, TIME_SPACINGS
from fewstep.integrations import dpm_solver, k_diffusion
from fewstep.learned.dode import greedy
from fewstep.learned.sigdeg.networks import DenoisingMLP
from fewstep.learned.unet_denoiser import UNetDenoiser
from fewstep_analysis import (
    diffusion_problems,
    expectation,
    problems,
    strong_order,
    teachers,
    weak_order,
    work_precision,
)

VP = fs.VPLinear()
SAMPLERS = [s for s in fs.solvers().values() if isinstance(s, fs.DiffusionSolver)]
SAMPLERS += [fs.DDIM(1.0), fs.EDMEuler(churn=4), fs.EDMHeun(churn=4), fs.UniPC(3), fs.DPMSolverPP(3, multistep=False)]
SCHEDULES = {
    name: {"DiscreteVP": lambda: fs.DiscreteVP.named("linear", 50)}.get(name, value)
    for name, value in {n: getattr(fs, n) for n in fs.__all__}.items()
    if inspect.isclass(value) and issubclass(value, fs.Schedule) and not inspect.isabstract(value)
}
DIFFUSIONS = {
    "diagonal": lambda t, y: 0.3 * y + 0.1 * t,
    "additive": lambda t, y: torch.full_like(y, 0.3) * (1 + t),
    "scalar": lambda t, y: 0.3 * y.unsqueeze(-1),
    "commutative": lambda t, y: torch.diag_embed(0.3 * y),
    "general": lambda t, y: torch.stack([0.3 * y, 0.2 * y.flip(-1).sin()], -1),
}


@pytest.fixture(autouse=True)
def _one_seed():
    """Networks' weights, and with them the numbers on record, do not depend on the tests before."""
    torch.manual_seed(0)


def host(value):
    """The value on the CPU, without a read that is counted."""
    inner = bare(value) if torch.is_tensor(value) else value
    return inner.held if isinstance(inner, Held) else torch.as_tensor(value)


def watch(run, n):
    """The result of `run(n, "cuda")`, equal to that on the CPU and on record, and how often the host waited."""
    expected = host(run(n, "cpu"))
    check_number(expected)
    with FakeDevice() as device:
        result = run(n, "cuda")
    torch.testing.assert_close(host(result), expected, rtol=1e-4, atol=1e-5)
    return result, device


def check_steps(run, n=2, reads=2):
    """The result is on the device, and the host waits as often for n steps as for 2 n."""
    result, many = watch(run, 2 * n)
    with FakeDevice() as few:
        run(n, "cuda")
    assert isinstance(result, Held)
    assert len(many.reads) <= reads, many.reads
    assert Counter(few.reads) == Counter(many.reads)
    assert Counter(few.uploads) == Counter(many.uploads)
    return many


def y0(device):
    return torch.full((3, 2), 0.5, device=device)


def sde(noise, calculus="ito"):
    if noise == "none":
        return fs.ODE(lambda t, y: -y * t)
    if noise == "underdamped":
        return fs.UnderdampedLangevin(lambda t, x: -x + 0.1 * t, 2.0)
    return fs.SDE(lambda t, y: -y + 0.1 * t, DIFFUSIONS[noise], noise, calculus)


SOLVES = [
    pytest.param(noise, solver, calculus, id=f"{noise}-{name}-{calculus}")
    for noise in ("none", "underdamped", *DIFFUSIONS)
    for name, solver in fs.solvers(noise).items()
    for calculus in solver.card.sde_types[: 1 if noise in fs.problem.CONSTANT else 2]
    if noise != "underdamped" or noise in solver.card.strong_order
]


@pytest.mark.parametrize(("noise", "solver", "calculus"), SOLVES)
def test_a_solve_waits_for_no_step(noise, solver, calculus):
    problem = sde(noise, calculus)
    waits = check_steps(lambda n, device: fs.solve(problem, solver, y0(device), torch.linspace(0, 1, n + 1)).y, n=1)
    assert len(waits.reads + waits.uploads) <= 2, waits.uploads


ADAPTIVE = {
    "Bosh3": ("none", fs.Bosh3()), "Dopri5": ("none", fs.Dopri5()), "Tsit5": ("none", fs.Tsit5()),
    "doubling": ("diagonal", fs.Milstein()), "SRA1": ("additive", fs.SRA1()), "SRID2": ("diagonal", fs.SRID2()),
    "SPaRK": ("diagonal", fs.SPaRK()), "SlowRK": ("diagonal", fs.SlowRK()),
}  # fmt: skip


@pytest.mark.parametrize("case", ADAPTIVE)
def test_adaptive_steps_wait_once_for_each_attempt(case):
    noise, solver = ADAPTIVE[case]
    problem, taken = sde(noise, solver.card.sde_types[0]), []

    def run(n, device):
        sol = fs.solve(problem, solver, y0(device), [0.0, 1.0], ts=[0.5], dense=True, steps=fs.Adaptive(0.01, 0.01))
        taken.append(sol.accepted + sol.rejected)
        return torch.stack([sol.y, sol(0.3)])

    waits = watch(run, 1)[1]
    assert len(waits.reads) <= taken[-1] + 4, waits.reads


def test_an_event_waits_once_for_each_step():
    """And a failed solve on a device keeps its partial solution."""

    def run(n, device):
        sol = fs.solve(
            sde("none"), fs.RK4(), y0(device), torch.linspace(0, 2, 8 * n + 1), event=lambda t, y: y[..., 0] - 0.2
        )
        with pytest.raises(fs.StepSizeError) as error:
            fs.solve(sde("none"), fs.Tsit5(), y0(device), [0.0, 1.0], steps=fs.Adaptive(max_steps=2))
        return torch.cat([sol.y, sol.event_t[:, None].to(sol.y), error.value.solution.y], 1)

    watch(run, 2)


@pytest.mark.parametrize("gradient", ["direct", "checkpoint", "reversible"])
@pytest.mark.parametrize("solver", [fs.ReversibleHeun(), fs.Reversible()], ids=repr)
def test_gradients_wait_for_no_step(solver, gradient):
    """Of an ODE: the fake device makes no tensors, such as noise, within a backward pass."""

    def run(n, device):
        y = y0(device).requires_grad_()
        out = fs.solve(sde("none"), solver, y, torch.linspace(0, 1, n + 1), gradient=gradient).y
        return torch.autograd.grad(out.square().sum(), y)[0]

    check_steps(run, n=20)


PATHS = {
    "torch": lambda device: fs.BrownianPath((3, 2), levy="H", device=device),
    "seeds": lambda device: fs.BrownianPath((3, 2), levy="H", seeds=[1, 2, 3], device=device),
    "counter": lambda device: fs.BrownianPath((3, 2), levy="H", generator="counter", device=device),
    "counters": lambda device: fs.BrownianPath((3, 2), levy="H", seeds=[1, 2, 3], generator="counter", device=device),
    "K": lambda device: fs.BrownianPath((3, 2), levy="K", dtype=torch.float32, device=device),
    "areas": lambda device: fs.AreaPath(fs.BrownianPath((3, 2), levy="H", device=device), 8),
    "drawn areas": lambda device: fs.AreaPath(fs.BrownianPath((3, 2), levy="H", device=device), 8, "foster"),
    "fresh": lambda device: fs.FreshIncrements((3, 2), "K", device=device, area=True),
}


@pytest.mark.parametrize("path", PATHS)
def test_a_path_waits_for_no_step(path):
    solver = fs.GeneralMilstein() if "areas" in path else fs.Heun()
    problem = sde("general") if "areas" in path else sde("diagonal", "stratonovich")

    def run(n, device):
        return fs.solve(problem, solver, y0(device), torch.linspace(0, 1, n + 1), path=PATHS[path](device)).y

    check_steps(run, n=1)


def test_a_grid_on_the_device_is_read_once():
    check_steps(lambda n, device: fs.solve(sde("none"), fs.RK4(), y0(device), torch.linspace(0, 1, n + 1).to(device)).y)
    check_steps(lambda n, device: fs.solve(sde("scalar"), fs.Milstein(), y0(device), torch.linspace(0, 1, n + 1).to(device)).y)  # fmt: skip  # noqa: E501
    model = fs.DiffusionModel(lambda x, s: x / (1 + s * s), VP)
    check_steps(lambda n, device: fs.sample(model, fs.DDIM(), noise=y0(device), sigmas=fs.sigma_grid(VP, n).to(device)))


def test_a_portable_path_uploads_its_normals_and_reads_nothing():
    path = fs.BrownianPath((3, 2), portable=True)
    with FakeDevice() as device:
        moved = fs.BrownianPath((3, 2), portable=True, device="cuda")
        found = [host(i.W) for i in moved.increments([0.0, 0.25, 1.0])]
    torch.testing.assert_close(found, [i.W for i in path.increments([0.0, 0.25, 1.0])])
    assert device.uploads
    assert not device.reads


CAPTURED = {
    "solve": lambda n, device: fs.solve(sde("none"), fs.RK4(), y0(device), torch.linspace(0, 1, n + 1)).y,
    "sample": lambda n, device: fs.sample(MIXTURE, fs.UniPC(), noise=y0(device), steps=n),
    "labels": lambda n, device: fs.sample(
        fs.DiffusionModel(fs.from_epsilon(lambda x, t: x * t.unsqueeze(1).sin(), VP), VP), fs.DDIM(), noise=y0(device),
        steps=n,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CAPTURED)
def test_what_a_cuda_graph_captures_waits_for_nothing(name, monkeypatch):
    monkeypatch.setattr(_tracing, "_captured", lambda device: device.type == "cuda")
    _, device = watch(CAPTURED[name], 4)
    assert not device.reads + device.uploads


@pytest.mark.parametrize("draw", [
    lambda: fs.solve(sde("diagonal"), fs.Milstein(), y0("cuda"), [0.0, 1.0]),
    lambda: fs.BrownianPath((3, 2), device="cuda").increment(0.0, 1.0),
    lambda: fs.sample(MIXTURE, fs.DDIM(), shape=(3, 2), steps=4, device="cuda"),
    lambda: fs.sample(MIXTURE, fs.EulerMaruyama(), noise=y0("cuda"), steps=4),
])  # fmt: skip
def test_a_cuda_graph_captures_no_noise_of_a_seed(draw, monkeypatch):
    monkeypatch.setattr(_tracing, "_captured", lambda device: device.type == "cuda")
    with FakeDevice(), pytest.raises(fs.InputError, match="seed: got noise of a seed in the capture of a CUDA graph"):
        draw()


def test_parts_of_increments_stay_on_the_device():
    def run(n, device):
        increment = PATHS["areas"](device).increment(0.0, 0.5)
        again = fs.Increment.from_coordinates(increment.h, *increment.coordinates())
        return again.join(again.reversed().reversed()).to(torch.float32).H

    check_steps(run, reads=0)
    with FakeDevice() as device:
        assert isinstance(fs.FreshIncrements((2, 1)).increment(0.0, 1.0).to(device="cuda").W, Held)
        assert len(device.uploads) == 1
        assert not device.reads


def test_a_failed_solve_names_its_step_on_the_device():
    problem = fs.ODE(lambda t, y: torch.where(t < 0.5, -y, y / 0))
    messages = []
    for device in ("cpu", "cuda"):
        with FakeDevice(), pytest.raises(fs.NonFiniteError) as error:
            fs.solve(problem, fs.EulerMaruyama(), y0(device), [k / 4 for k in range(5)])
        messages.append(str(error.value))
    assert messages[0] == messages[1]
    assert "step 2" in messages[0]


@pytest.mark.parametrize("method", METHODS)
def test_areas_stay_on_the_device(method):
    options = {} if method in ("davie", "foster") else {"terms": 2}

    def run(n, device):
        increment = fs.FreshIncrements((4, 3), "W" if method == "wiktorsson" else "H", device=device).increment(
            0.0, 1.0
        )
        return fs.levy_area(increment, method, seed=3, **options)

    check_steps(run, reads=0)


@pytest.mark.parametrize("solver", SAMPLERS, ids=repr)
def test_a_sampler_waits_for_no_step(solver):
    model = fs.DiffusionModel(lambda x, s: x / (1 + s * s), VP)

    def run(n, device):
        fresh = fs.FreshIncrements((3, 2), "K", device=device)
        return fs.sample(model, solver, noise=y0(device), steps=n, path=fresh)

    check_steps(run)


@pytest.mark.parametrize("given", ["seed", pytest.param("seeds", marks=pytest.mark.slow)])
def test_a_seed_waits_for_no_step(given):
    model = fs.DiffusionModel(lambda x, s: x / (1 + s * s), VP)
    options = {"seed": 1} if given == "seed" else {"seeds": [1, 2]}
    run = lambda n, device: fs.sample(model, fs.DDPM(), shape=(2, 1), steps=n, device=device, **options)  # noqa: E731
    check_steps(run)


def network(x, t):
    return x * 0.5 + 0.01 * t.reshape(-1, 1)


CONVERSIONS = {
    **{
        f.__name__: lambda device, f=f: f(network, VP)
        for f in (fs.from_epsilon, fs.from_v, fs.from_score, fs.from_sample, fs.from_flow)
    },
    "rounded": lambda device: fs.from_epsilon(network, VP, rounding="nearest"),
    "from_edm": lambda device: fs.from_edm(
        lambda x, s, c: x / (1 + s.reshape(-1, 1) ** 2) + c[:, :2], class_labels=torch.eye(3)
    ),
    "clip": lambda device: fs.clip(fs.from_epsilon(network, VP)),
    "thresholding": lambda device: fs.dynamic_thresholding(fs.from_epsilon(network, VP)),
    "guidance": lambda device: fs.from_epsilon(
        fs.classifier_free_guidance(lambda x, t, c: network(x, t) + c, y0(device), -y0(device)), VP
    ),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_conversion_waits_for_no_step(name):
    def run(n, device):
        model = fs.DiffusionModel(CONVERSIONS[name](device), fs.EDM() if name == "from_edm" else VP)
        return fs.sample(model, fs.DPMSolverPP(2), noise=y0(device), steps=n)

    check_steps(run)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_answer_on_the_device(name):
    def run(n, device):
        schedule = SCHEDULES[name]()
        model = fs.DiffusionModel(fs.from_epsilon(network, schedule), schedule)
        return fs.sample(model, fs.DEIS(), noise=y0(device), steps=n)

    check_steps(run)
    for method in ("alpha", "label", "time", "sigma"):
        at = lambda n, device: getattr(SCHEDULES[name](), method)(levels(device))  # noqa: B023, E731
        result, device = watch(at, 1)
        assert isinstance(result, Held)
        assert not device.reads


def levels(device):
    return torch.tensor([0.2, 0.5], dtype=torch.float64, device=device)


@pytest.mark.parametrize("name", SCHEDULES)
def test_grids_are_made_on_the_cpu_and_read_given_times_once(name):
    schedule = SCHEDULES[name]()
    with FakeDevice() as device:
        for spacing in SIGMA_SPACINGS + TIME_SPACINGS:
            for final in ("x0", "sigma_min"):
                grid = fs.sigma_grid(schedule, 4, spacing, final)
                assert not isinstance(grid, Held)
        assert not device.reads + device.uploads
        times = schedule.time(fs.sigma_grid(schedule, 4)[:-1])
        grid = fs.sigma_grid(schedule, 4, timesteps=times.to("cuda"))
    torch.testing.assert_close(grid, fs.sigma_grid(schedule, 4, timesteps=times), rtol=0, atol=0)
    assert len(device.reads) == 1


def test_tables_on_the_device_are_read_once():
    def run(n, device):
        table = fs.DiscreteVP(fs.zero_terminal_snr(torch.linspace(0.999, 0.01, 50, dtype=torch.float64, device=device)))
        return fs.sample(fs.DiffusionModel(fs.from_v(network, table), table), fs.UniPC(2), noise=y0(device), steps=n)

    check_steps(run)


def test_a_prediction_is_checked_with_one_read():
    like = lambda device: torch.zeros(64, 2, device=device)  # noqa: E731
    right = fs.from_epsilon(lambda x, t: x, VP)
    _, device = watch(lambda n, device: torch.tensor(fs.check_prediction(right, VP, like(device)) is None), 1)
    assert len(device.reads) <= 2


def test_a_plan_of_the_device_is_a_file_of_the_cpu(tmp_path):
    model = fs.DiffusionModel(lambda x, s: x / (1 + s * s), VP)

    def run(n, device):
        fs.DDPM().plan(fs.sigma_grid(VP, n).to(device)).tail(0).save(tmp_path / "plan.safetensors")
        return fs.sample(model, fs.load(tmp_path / "plan.safetensors"), noise=y0(device))

    watch(run, 3)


# refusals


def test_paths_and_states_on_different_devices_are_refused():
    paths = {name: p for name, p in PATHS.items() if name != "seeds"}
    model = fs.DiffusionModel(lambda x, s: x / (1 + s * s), VP)
    with FakeDevice():
        for name, path in paths.items():
            problem, solver = (
                (sde("general"), fs.GeneralMilstein()) if "areas" in name else (sde("diagonal"), fs.SRID2())
            )
            for here, there in (("cpu", "cuda"), ("cuda", "cpu")):
                with pytest.raises(fs.InputError, match=f"^path: got a path on {here}.*device='{there}"):
                    fs.solve(problem, solver, y0(there), [0.0, 1.0], path=path(here))
        for here, there in (("cpu", "cuda"), ("cuda", "cpu")):
            own = fs.FreshIncrements((3, 2), device=here)
            with pytest.raises(fs.InputError, match=f"^path: got a path on {here}"):
                fs.sample(model, fs.DDPM(), noise=y0(there), steps=2, path=own)
            with pytest.raises(fs.InputError, match="^b: got samples on"):
                distances.rmse(y0(here), y0(there))


def test_parts_on_different_devices_are_refused():
    guided = fs.classifier_free_guidance(lambda x, t, c: x + c, y0("cpu"), y0("cpu"), 2.0)
    increment = fs.FreshIncrements((4, 3), "H").increment(0.0, 1.0)
    with FakeDevice():
        for run, words in (
            (lambda: guided(y0("cuda"), torch.ones(3, device="cuda")), "^condition: got a tensor on cpu"),
            (lambda: increment.join(increment.to(device="cuda")), "^later: got W on cuda"),
            (lambda: fs.levy_area(increment.to(device="cuda"), seed=torch.Generator()), "^seed: got a generator on"),
        ):
            with pytest.raises(fs.InputError, match=words):
                run()


def test_timesteps_on_the_device_are_read_once():
    model = fs.DiffusionModel(fs.from_epsilon(network, fs.DiscreteVP.named()), fs.DiscreteVP.named())
    times = lambda n, device: torch.linspace(999, 0, n + 1, device=device)  # noqa: E731
    check_steps(lambda n, device: fs.sample(model, fs.DDIM(), noise=y0(device), timesteps=times(n, device)))


def test_a_state_that_is_not_finite_is_refused_on_a_device_too():
    model = fs.DiffusionModel(lambda x, s: x / (1 + s * s), VP)
    with FakeDevice():
        bad = y0("cuda") / 0
        with pytest.raises(fs.InputError, match="^y0: got 6 values that are not finite"):
            fs.solve(fs.ODE(lambda t, y: -y), fs.RK4(), bad, [0.0, 1.0])
        with pytest.raises(fs.InputError, match="^noise: got 6 values that are not finite"):
            fs.sample(model, fs.DDIM(), noise=bad, steps=2)


# integrations


def k_model(x, sigma):
    return x / (1 + sigma.reshape(-1, 1) ** 2)


@pytest.mark.parametrize(
    "solver", [fs.DDIM(), fs.DDIM(1.0), fs.EDMHeun(churn=4), fs.UniPC(3), fs.DPMSolver(2)], ids=repr
)
def test_the_k_diffusion_sampler_waits_for_no_step(solver):
    sampler = k_diffusion.sampler(solver, schedule=fs.EDM(0.05, 10.0))
    grid = lambda n, device: torch.cat([torch.linspace(10, 0.1, n), torch.zeros(1)]).to(device)  # noqa: E731
    options = {"disable": True, "callback": lambda _: None, "seed": 3}
    check_steps(lambda n, device: sampler(k_model, y0(device), grid(n, device), **options))


def test_the_k_diffusion_sampler_of_a_flow_waits_for_no_step():
    grid = lambda n, device: torch.linspace(1, 0, n + 1).to(device)  # noqa: E731
    noise = lambda a, b: torch.zeros(3, 2, device=a.device) + (a - b)  # noqa: E731
    options = {"disable": True, "callback": lambda _: None, "noise_sampler": noise}
    for solver in (fs.DDIM(1.0), fs.UniPC(2)):
        sampler = k_diffusion.sampler(solver, flow=True)
        check_steps(lambda n, device: sampler(k_model, y0(device), grid(n, device), **options))  # noqa: B023
    model = k_diffusion.as_denoiser(k_model, flow=True)
    check_steps(lambda n, device: fs.sample(model, fs.DDIM(), noise=y0(device), steps=n))


def test_k_diffusions_noise_reads_its_levels_once():
    def run(n, device):
        noise, levels = k_diffusion.BrownianNoiseSampler(y0(device), 0.1, 10.0, 3), torch.tensor([10.0, 1.0, 0.1])
        a, b, c = levels.to(device)
        return noise(a, b) + noise(b, c)

    assert len(watch(run, 1)[1].reads) == 2  # one per call
    sampler = k_diffusion.sampler(fs.DDIM(1.0), schedule=fs.EDM(0.05, 10.0))
    foreign = lambda a, b: torch.zeros_like(a) + torch.ones(3, 2, device=a.device)  # noqa: E731
    grid = lambda n: torch.cat([torch.linspace(10, 0.1, n), torch.zeros(1)])  # noqa: E731
    check_steps(lambda n, device: sampler(k_model, y0(device), grid(n), disable=True, noise_sampler=foreign))


def test_k_diffusions_models_and_noise_samplers_are_problems_and_paths():
    def run(n, device):
        model, noise = k_diffusion.as_denoiser(k_model, sigma_min=0.1, sigma_max=10.0), 10 * y0(device)
        path = k_diffusion.BrownianNoiseSampler(noise, 0.1, 10.0, 3, transform=k_diffusion.snr)
        return fs.sample(model, fs.DDIM(1.0), noise=noise, steps=n, final="sigma_min", path=path)

    check_steps(run, n=1)
    with FakeDevice():
        path, grid = k_diffusion.BrownianNoiseSampler(y0("cuda"), 0.1, 10.0, transform=k_diffusion.snr), [0.01, 1.0]
        assert all(isinstance(i.W, Held) for i in path.increments(torch.tensor(grid)))
        foreign = k_diffusion.BrownianNoiseSampler(y0("cpu"), 0.05, 10.0, transform=k_diffusion.snr)
        with pytest.raises(fs.InputError, match="^noise_sampler: got a path on cpu"):
            k_diffusion.sampler(fs.DDIM(1.0))(k_model, y0("cuda"), torch.tensor([9.0, 1.0, 0.1]), noise_sampler=foreign)


def test_a_problem_as_k_diffusions_model_reads_once_whether_its_levels_are_equal():
    problem = fs.DiffusionModel(lambda x, s: x / (1 + s * s), fs.EDM(0.05, 10.0))
    _, device = watch(lambda n, device: k_diffusion.as_wrapper(problem)(y0(device), torch.ones(3, device=device)), 1)
    assert len(device.reads) == 1
    comfy = SimpleNamespace(k_diffusion=SimpleNamespace(sampling=SimpleNamespace()))
    comfy.samplers = SimpleNamespace(KSampler=SimpleNamespace(SAMPLERS=[]))
    sigmas = torch.tensor([10.0, 1.0, 0.1, 0.0])
    watch(lambda n, device: k_diffusion.register("own", fs.DDIM(), comfy)(k_model, y0(device), sigmas), 1)


TABLE = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)


class NoiseSchedule:
    """DPM-Solver's NoiseScheduleVP with beta from 0.1 to 20, or with a table on the CPU."""

    T, total_N = 1.0, 1000

    def __init__(self, table=None):
        self.vp, self.times = VP, torch.arange(1, 1001) / 1000
        self.logs = None if table is None else 0.5 * table.log().float()

    def marginal_log_mean_coeff(self, t):
        if self.logs is None:
            return -0.5 * self.vp.integral(t)
        times, logs = self.times.to(t), self.logs.to(t)
        i = torch.searchsorted(times, t.contiguous()).clamp(1, 999)
        return logs[i - 1] + (t - times[i - 1]) * (logs[i] - logs[i - 1]) / (times[i] - times[i - 1])

    def marginal_alpha(self, t):
        return self.marginal_log_mean_coeff(t).exp()

    def marginal_std(self, t):
        return (1 - self.marginal_alpha(t).square()).sqrt()

    def marginal_lambda(self, t):
        return (self.marginal_alpha(t) / self.marginal_std(t)).log()

    def inverse_lambda(self, value):
        if self.logs is None:
            return self.vp.time(torch.exp(-value))
        lambdas = self.marginal_lambda(self.times).flip(0).to(value)
        i = torch.searchsorted(lambdas, value.contiguous()).clamp(1, 999)
        times = self.times.flip(0).to(value)
        return times[i - 1] + (value - lambdas[i - 1]) * (times[i] - times[i - 1]) / (lambdas[i] - lambdas[i - 1])


@pytest.mark.parametrize("table", [None, TABLE], ids=["linear", "discrete"])
def test_dpm_solvers_networks_wait_for_no_step(table):
    def run(n, device):
        return fs.sample(
            dpm_solver.from_model_fn(network, NoiseSchedule(table)), fs.UniPC(2), noise=y0(device), steps=n
        )

    check_steps(run)


VE_NETWORK = {"sigma_min": 0.05, "sigma_max": 10.0}
SCHEDULERS = {  # the class of diffusers, its options, the solver and its own options
    "multistep": ("DDIM", {}, fs.DPMSolverPP(2), {}),
    "stochastic": ("DDIM", {}, fs.DPMSolverSDE(2), {}),
    "corrected": ("DDIM", {}, fs.UniPC(3), {}),
    "thresholding": ("DDIM", {}, fs.DPMSolverPP(2), {"thresholding": True}),
    "karras": ("DDIM", {}, fs.UniPC(3), {"use_karras_sigmas": True}),
    "exact": ("DDIM", {}, fs.DEIS(3), {"exact": True}),
    "clipped": ("DDIM", {"clip_sample": True}, fs.DDIM(1.0), {}),
    "x itself": ("EulerDiscrete", {}, fs.EDMHeun(churn=1.0), {}),
    "flow": ("FlowMatchEulerDiscrete", {"shift": 3.0}, fs.EDMEuler(), {}),
    "EDM": ("EDMEuler", VE_NETWORK, fs.DPMSolverPP(2), {}),
    "EDM, stochastic": ("EDMEuler", VE_NETWORK, fs.DPMSolverSDE(2), {"noise": "path"}),
    "path": ("DDIM", {}, fs.DPMSolverSDE(2), {"noise": "path"}),
}


@pytest.mark.filterwarnings("ignore")  # of diffusers, and of numpy for a tensor's method under any mode
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if "noise" in own else ()) for n, (*_, own) in SCHEDULERS.items()]
)
def test_the_scheduler_reads_its_first_timestep_alone(name):
    df = pytest.importorskip("diffusers")
    from fewstep.integrations.diffusers import FewStepScheduler

    kind, options, solver, own = SCHEDULERS[name]
    config = getattr(df, f"{kind}Scheduler")(**options).config

    def run(n, device):
        scheduler = FewStepScheduler.from_config(config, solver=solver, **own)
        scheduler.set_timesteps(n, device=device)
        x, generator = torch.linspace(-1, 1, 12, device=device).reshape(3, 1, 2, 2), torch.Generator(device)
        x, generator = x * scheduler.init_noise_sigma, generator.manual_seed(1)
        for t in scheduler.timesteps:
            x = scheduler.step(0.3 * scheduler.scale_model_input(x, t), t, x, generator=generator).prev_sample
        return x

    # the seed of a path is drawn on the device
    check_steps(run, n=2 if own else 4, reads=2 if own.get("noise") else 1)


@pytest.mark.filterwarnings("ignore")
def test_the_scheduler_starts_anywhere_and_adds_noise_with_one_read(tmp_path):
    df = pytest.importorskip("diffusers")
    from fewstep.integrations.diffusers import FewStepScheduler

    saved = FewStepScheduler(solver=fs.DDIM().plan(fs.sigma_grid(fs.DiscreteVP.named(), 6)))
    x = lambda device: torch.linspace(-1, 1, 12, device=device).reshape(3, 1, 2, 2)  # noqa: E731

    def begun(n, device):
        saved.save_pretrained(tmp_path)
        scheduler = FewStepScheduler.from_pretrained(tmp_path)
        scheduler.set_timesteps(device=device)
        scheduler.set_begin_index(6 - n)
        y = scheduler.add_noise(x(device), -x(device), scheduler.timesteps[6 - n : 7 - n])
        for t in scheduler.timesteps[6 - n :]:
            y = scheduler.step(0.3 * y, t, y).prev_sample
        return y

    check_steps(begun, reads=1)
    for config in (df.DDIMScheduler().config, df.FlowMatchEulerDiscreteScheduler().config):
        for name in ("add_noise", "get_velocity", "scale_noise"):

            def weighted(n, device):
                scheduler, t = FewStepScheduler.from_config(config), torch.tensor([1, 500, 998], device=device)  # noqa: B023
                scheduler.set_timesteps(4, device=device)
                arguments = (t, -x(device)) if name == "scale_noise" else (-x(device), t)  # noqa: B023
                return getattr(scheduler, name)(x(device), *arguments)  # noqa: B023

            assert len(watch(weighted, 1)[1].reads) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_pipeline_is_a_problem_on_its_device_and_a_table_is_fitted_there():
    df = pytest.importorskip("diffusers")
    from fewstep.integrations.diffusers import Idle, denoising, distill_dode

    torch.manual_seed(0)
    unet = df.UNet2DModel(
        sample_size=4, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(4,), norm_num_groups=2,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
    ).eval().requires_grad_(False)  # fmt: skip
    state, images = unet.state_dict(), lambda device: torch.linspace(-1, 1, 32, device=device).reshape(2, 1, 4, 4)

    def on(device):
        made = df.UNet2DModel.from_config(unet.config).eval().requires_grad_(False)
        made.load_state_dict(state)
        return SimpleNamespace(unet=made.to(device), scheduler=df.DDIMScheduler())

    check_steps(lambda n, device: fs.sample(denoising(on(device)), fs.DDIM(), noise=images(device), steps=n))

    def fitted(n, device):
        scheduler, report = distill_dode(on(device), fs.DDIM(), samples=16, steps=2 * n, teacher_substeps=2)
        scheduler.set_timesteps(device=device)
        return float(report.student_rmse < 1)  # the error itself is rounding of a float32 network

    assert sum(growth(fitted).values()) == 2  # two rows more
    assert isinstance(watch(lambda n, device: Idle(on(device).unet)(images(device), 1).sample, 1)[0], Held)
    schedule = fs.DiscreteVP.named()

    def widened(n, device):
        network, levels = fs.SigUNet.of(on(device).unet, schedule, letters=1), torch.tensor([2.0, 1.0], device=device)
        return network(images(device), *levels, images(device).unsqueeze(1))

    def denoised(n, device):
        return UNetDenoiser.of(on(device).unet, schedule).to(device)(images(device), torch.tensor(1.0, device=device))

    with torch.no_grad():
        assert isinstance(watch(widened, 1)[0], Held)
        assert isinstance(watch(denoised, 1)[0], Held)


def test_torchsde_waits_for_no_step():
    torchsde = pytest.importorskip("torchsde")
    from fewstep.integrations.torchsde import BrownianView, TorchsdePath, sdeint, sdeint_adjoint

    class Their(torchsde.SDEIto):
        def __init__(self):
            super().__init__("diagonal")

        def f(self, t, y):
            return -y

        def g(self, t, y):
            return 0.3 * y

    times, given = torch.tensor([0.0, 0.5, 1.0]), lambda device: fs.BrownianPath((3, 2), levy="H", device=device)
    for integrate in (sdeint, sdeint_adjoint):
        check_steps(lambda n, device, run=integrate: run(Their(), y0(device), times, dt=0.5 / n, method="srk", seed=1))
    check_steps(
        lambda n, device: sdeint(Their(), y0(device), times.to(device), dt=0.5 / n, bm=BrownianView(given(device)))
    )
    for made in (fs.SDE.from_torchsde, fs.SDE.from_module):
        check_steps(lambda n, device, made=made: fs.solve(made(Their()), fs.Milstein(), y0(device), times).y, reads=1)
    areas = lambda device: BrownianView(fs.AreaPath(given(device), 8))  # noqa: E731
    check_steps(lambda n, device: sdeint(Their(), y0(device), times, dt=0.5 / n, bm=areas(device)))
    watch(lambda n, device: areas(device)(0.0, 0.5, return_A=True)[1].expand(*areas(device).size(), 2), 1)
    watch(lambda n, device: torchsde.sdeint(Their(), y0(device), times, dt=0.5, bm=BrownianView(given(device))), 1)
    interval = lambda device: torchsde.BrownianInterval(  # noqa: E731
        0.0, 1.0, (3, 2), entropy=1, device=device, levy_area_approximation="space-time"
    )
    watch(lambda n, device: fs.solve(sde("diagonal"), fs.SRID2(), y0(device), times, path=TorchsdePath(interval(device))).y, 1)  # fmt: skip  # noqa: E501
    with FakeDevice():
        for here, there in (("cpu", "cuda"), ("cuda", "cpu")):
            with pytest.raises(fs.InputError, match=f"^path: got a path on {here}"):
                fs.solve(sde("diagonal"), fs.SRID2(), y0(there), times, path=TorchsdePath(interval(here)))
            for motion in (interval(here), BrownianView(given(here))):
                with pytest.raises(fs.InputError, match=f"^bm: got a path on {here}"):
                    sdeint(Their(), y0(there), times, dt=0.5, method="srk", bm=motion)


# learned solvers

MIXED = lambda n, device, seed=0: torch.randn(n, 2, generator=torch.Generator().manual_seed(seed)).to(device) * 10  # noqa: E731


def growth(run, few=1, many=2):
    """The reads that the larger of two runs has in addition, by line."""
    (_, a), (_, b) = watch(run, few), watch(run, many)
    return Counter(b.reads) - Counter(a.reads)


def check_training(run):
    """Reads do not grow with the iterations."""
    assert not growth(run)


def fitted_table(device, **options):
    noise = MIXED(16, device)
    return fs.distill_dode(MIXTURE, fs.DDIM(), noise=noise, teacher_substeps=1, **options)[1].student_rmse


def check_terms_and_batches():
    assert not growth(lambda n, device: fitted_table(device, steps=2, terms=n))
    assert not growth(lambda n, device: fitted_table(device, steps=2, batch=16 // n))


def test_dode_reads_once_per_row():
    assert sum(growth(lambda n, device: fitted_table(device, steps=n + 1)).values()) == 1  # one row more
    check_terms_and_batches()


@pytest.mark.slow
def test_dode_regrids_on_a_device():
    table, _ = fs.distill_dode(MIXTURE, fs.DDIM(), noise=MIXED(16, "cpu"), steps=3)
    watch(
        lambda n, device: fs.regrid(table, MIXTURE, fs.DDIM(), noise=MIXED(16, device, 1), steps=4)[1].student_rmse, 1
    )
    watch(lambda n, device: fs.sample(MIXTURE, table, noise=MIXED(4, device)), 1)
    labels = torch.arange(16) % 3
    watch(lambda n, device: fs.distill_dode(shifted, fs.DDIM(), noise=MIXED(16, device), labels=labels, steps=2)[1].r2[0], 1)  # fmt: skip  # noqa: E501


@pytest.mark.slow
def test_tables_and_grids_are_fitted_on_a_device():
    """Reads are those of the losses that a fit compares, as many for several batches as for one."""

    def table(n, device):
        options = {"starts": 1, "start": fs.DDIM(), "teacher_steps": 4, "iterations": 1, "batch": 16 // n}
        return fs.fit_table(MIXTURE, nfe=2, noise=MIXED(16, device), **options)[0].sigma

    def grid(n, device):
        return fs.fit_grid(MIXTURE, 2, noise=MIXED(16, device), nodes=6, sweeps=1, batch=16 // n)

    assert not growth(table)
    assert not growth(grid)


def test_data_are_inverted_and_densities_computed_on_a_device():
    check_steps(lambda n, device: fs.invert(MIXTURE, fs.DDIM(), MIXED(4, device), steps=n, corrections=1), reads=6)
    result = watch(lambda n, device: fs.log_likelihood(MIXTURE, MIXED(4, device), steps=n).value, 2)[0]
    assert isinstance(result, Held)
    assert float(fs.LogLikelihood(torch.ones(1), torch.zeros(1), 2).bits_per_dim) < 0


def test_samplers_are_compared_on_a_device(tmp_path):
    """Reads are those of the errors, as many for long samplers as for short ones."""
    made = []

    def run(n, device):
        options = {"solvers": ["ddim"], "spacings": ["karras"], "batch": 4, "tol": 1e6}
        made.append(fs.compare(MIXTURE, 2 * n, noise=MIXED(8, device), **options))
        return made[-1].rows[0].errors.rmse

    result = watch(run, 2)[1]
    with FakeDevice() as few:
        run(1, "cuda")
        assert (made[-1].solver, made[-1].grid.shape) == (made[-1].rows[0].solver, made[-1].plan.sigmas.shape)
        made[-1].save(tmp_path / "best.json")
        assert made[-1].plot(tmp_path / "best.svg").exists()
        assert made[-1].table() == str(made[-1])
    assert len(few.reads) == len(result.reads)


def test_trajectories_are_read_once_per_block():
    def run(n, device):
        options = {"count": 4, "event_shape": (2,), "device": device}
        return fs.make_trajectories(MIXTURE, GRID, substeps=n, **options).blocks[0]["knots"]

    assert not growth(run)
    assert len(watch(run, 1)[1].reads) == 1
    with FakeDevice():
        made = fs.make_trajectories(MIXTURE, GRID, substeps=1, count=4, event_shape=(2,), device="cuda").coarsen(2)
        assert isinstance(made.pick(torch.arange(2)).to("cuda").knots, Held)


class Labelled(nn.Module):
    """A student's network that takes labels."""

    labelled, letters = True, 2

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, sigma, sigma_next, xi, labels):
        return self.inner(x, sigma, sigma_next, xi) + labels.unsqueeze(1)


def test_a_student_samples_on_the_device_of_the_noise():
    def run(n, device):
        torch.manual_seed(0)
        network = Labelled(DenoisingMLP((2,), 8, 1).with_signature(2))
        plan = fs.EulerMaruyama().plan(fs.sigma_grid(MIXTURE.schedule, n, final="sigma_min"))
        student = fs.SigSampler(plan, network.requires_grad_(False)).at(torch.arange(3))
        return fs.sample(MIXTURE, student, noise=y0(device), path=snr_path(device))

    def snr_path(device):
        return fs.BrownianPath((3, 2), 0.01, 400.0, levy="H", device=device, clock="log")

    check_steps(run)


@pytest.mark.slow
@pytest.mark.parametrize("forcing", [0.0, 1.0])
def test_sigdeg_trains_on_a_device(forcing, tmp_path):
    def run(n, device):
        training = fs.TrainingOptions(iterations=3 * n, batch_size=8)
        made = fs.TeacherOptions(trajectories=16)
        student, report = fs.distill_sigdeg(
            shifted, steps=2, teacher_steps=4, event_shape=(2,), labels=torch.arange(16) % 3, forcing=forcing,
            teacher_options=made, training=training, device=device,
        )  # fmt: skip
        student.save(tmp_path / "student.safetensors")
        fs.sample(
            shifted(torch.arange(2).to(device)), fs.load(tmp_path / "student.safetensors"), noise=MIXED(2, device)
        )
        return report.student_rmse

    check_training(run)


def test_the_learned_step_draws_on_the_states_device():
    """The teacher's noise, that of gradient descent and that of least squares; see the slow test for all of a fit."""
    from fewstep.learned.sigdeg.distill_step import _Keeping, _Paths, _Task
    from fewstep.learned.sigdeg.networks import Coefficients

    def residual(n, device):
        y = torch.full((5, 2), 0.5, device=device)
        student = fs.SigStep(Coefficients(2, 5).to(y))
        times = torch.linspace(0, 1, 3, dtype=torch.float64)
        paths = _Paths(times, y.expand(3, 5, 2), [])
        task = _Task(sde("diagonal"), student, fs.SRID2(), paths, 0.5, y.new_ones(2))
        return task.residual(1, torch.arange(4), 0.25, seed=3).value

    result, device = watch(residual, 1)
    assert isinstance(result, Held)
    assert not device.reads
    with FakeDevice():
        assert _Keeping(y0("cuda"), 2, 0).device == CUDA


class Terms(nn.Module):
    """A network of the learned step's five terms, that of a user."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 5)
        nn.init.zeros_(self.inner.weight)

    def forward(self, t, y):
        return self.inner(torch.stack([y, t.expand_as(y)], -1))


@pytest.mark.slow
@pytest.mark.parametrize("own", [False, True])
def test_the_learned_step_is_fitted_on_a_device(own, tmp_path, monkeypatch):
    monkeypatch.setattr("fewstep.learned.sigdeg.distill_step.ROUNDS", 4)

    def run(n, device):
        y = torch.full((1, 1), 0.5, device=device)
        training = fs.TrainingOptions(iterations=2 * n, batch_size=8, checkpoint_every=10)
        made = fs.TeacherOptions(trajectories=16, substeps=2)
        torch.manual_seed(0)
        student, report = fs.distill_sigdeg_step(
            sde("diagonal"), steps=2, y0=y, teacher_options=made, training=training,
            network=Terms().to(device) if own else None,
        )  # fmt: skip
        if own:
            assert isinstance(
                fs.solve(sde("diagonal"), student, y, [0.0, 0.5, 1.0]).y, Held if device == "cuda" else torch.Tensor
            )
            return report.student_rmse
        student.save(tmp_path / "step.safetensors")
        fs.solve(sde("diagonal"), fs.load(tmp_path / "step.safetensors"), y, [0.0, 0.5, 1.0])
        return report.student_rmse

    check_training(run)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "loss"), [("published", "l1"), ("published", "kl"), ("displacement", "end")])
def test_sfddm_trains_on_a_device(target, loss, tmp_path):
    schedule, data = fs.DiscreteVP(torch.linspace(0.999, 0.01, 20, dtype=torch.float64)), MIXED(20, "cpu") / 10
    teacher = DenoisingMLP((2,), 16, 1)

    def run(n, device):
        student, report = fs.distill_sfddm(
            teacher=teacher, schedule=schedule, steps=4, data=data.to(device), target=target, loss=loss, device=device,
            training=fs.TrainingOptions(iterations=2 * n, batch_size=8), folder=tmp_path / f"{n} {device}",
        )  # fmt: skip
        student.save(tmp_path / "student.safetensors")
        loaded = fs.load(tmp_path / "student.safetensors")
        fs.sample(loaded.problem(), loaded, noise=MIXED(2, device))
        return report.student_rmse

    found = growth(run)
    assert not [line for line in found if "_serialization" not in line]  # checkpoints hold the history


# measuring


def test_distances_on_a_device():
    a, b = (
        lambda device, f=f: f(torch.linspace(-1, 1, 20, device=device).reshape(10, 2)) for f in (torch.sin, torch.exp)
    )
    for name in ("rmse", "sliced_w2", "mmd", "energy_distance"):
        watch(lambda n, device: getattr(distances, name)(a(device), b(device)), 1)  # noqa: B023
    watch(lambda n, device: distances.w1(a(device)[:, 0], b(device)[:7, 0]), 1)
    watch(lambda n, device: distances.median_distance(a(device)), 1)


@pytest.mark.parametrize(
    "reference", ["exact", *(pytest.param(r, marks=pytest.mark.slow) for r in ("levels", "torchsde", fs.SRID2()))]
)
def test_orders_are_measured_on_a_device(reference):
    if reference == "torchsde":
        pytest.importorskip("torchsde")
    problem = problems.geometric_brownian_motion()
    options = {"levels": range(3), "paths": 16, "reference": reference, "reference_level": 5}
    options = {k: v for k, v in options.items() if k != "reference_level" or reference not in ("levels", "exact")}
    watch(lambda n, device: strong_order(fs.Milstein(), problem, device=device, **options).order, 1)
    watch(lambda n, device: weak_order(fs.EulerMaruyama(), problem, device=device, **options).order, 1)


def test_converted_and_correlated_equations_wait_for_no_step():
    made = sde("general", "stratonovich")
    euler, heun, grid = fs.EulerMaruyama(), fs.Heun(), lambda n: torch.linspace(0, 1, n + 1)
    check_steps(lambda n, device: fs.solve(made.to_ito(), euler, y0(device), grid(n)).y)
    check_steps(lambda n, device: fs.solve(sde("general").to_stratonovich(), heun, y0(device), grid(n)).y)

    def correlated(n, device):
        matrix = torch.tensor([[1.0, 0.5], [0.5, 1.0]], device=device)
        return fs.solve(sde("diagonal").correlated(matrix), fs.Milstein(), y0(device), grid(n)).y

    check_steps(correlated, reads=6)


def test_expectations_are_estimated_on_a_device():
    problem = problems.sine()

    def value(n, device):
        y0 = problem.y0.float().to(device)
        report = expectation(problem.sde, fs.EulerMaruyama(), y0, (0, 1), lambda y: y[:, 0], tolerance=1.0, finest=2)
        return torch.tensor(report.value)

    watch(value, 1)


@pytest.mark.slow
def test_work_is_measured_on_a_device():
    pytest.importorskip("torchsde")
    options = {"solvers": [fs.SRID2()], "levels": [1, 2], "paths": 8, "repeats": 1}

    def errors(n, device):
        series = work_precision("sine", device=device, **options).data["series"]
        return torch.tensor([one["error"] for one in series], dtype=torch.float64)

    found, _ = watch(errors, 1)
    assert len(found) == 4  # and torchsde's


@pytest.mark.parametrize("name", problems.PROBLEMS)
def test_problems_are_solved_on_a_device(name):
    def run(n, device):
        problem = problems.by_name(name)
        assert problems.judge(problem.sde.noise_type, "stratonovich").sde.noise_type == problem.sde.noise_type
        problem = problems.in_calculus(problem, "stratonovich")
        y = problem.y0.to(device).expand(4, *problem.y0.shape)
        return fs.solve(problem.sde, fs.Heun(), y, [k / n for k in range(n + 1)]).y

    assert len(watch(run, 3)[1].reads) == 1


@pytest.mark.parametrize("name", diffusion_problems.PROBLEMS)
def test_diffusion_problems_are_sampled_on_a_device(name):
    made = diffusion_problems.by_name(name)

    def run(n, device):
        problem = diffusion_problems.by_name(name)
        noise = problem.noise(4).to(device) * problem.schedule.alpha(torch.tensor(problem.schedule.sigma_max))
        return fs.sample(problem.problem, fs.DDIM(), noise=noise, steps=n)

    watch(run, 2)
    sigmas = fs.sigma_grid(made.schedule, 2)
    watch(lambda n, device: made.mixture.flow(made.noise(4).to(device), sigmas, substeps=2)[-1], 1)
    assert not watch(lambda n, device: made.mixture.sample(4), 1)[1].reads


@pytest.mark.parametrize("name", ["digits", pytest.param("mnist", marks=pytest.mark.slow)])
def test_teachers_are_sampled_on_a_device(name):
    if name == "mnist":
        pytest.importorskip("diffusers")

    def run(n, device):
        made = (
            teachers.digits(device) if name == "digits" else teachers.mnist(3, net=teachers.mnist_network().to(device))
        )
        size = 8 if name == "digits" else 28
        noise = torch.linspace(-1, 1, size**2, device=device).reshape(1, 1, size, size)
        return fs.sample(made, fs.DDIM(), noise=noise, steps=n)

    check_steps(run)


# the tool


def test_the_tool_catches_mix_ups_and_keeps_gradients():
    with FakeDevice():
        x, here = torch.ones(3, device="cuda"), torch.ones(3)
        mixed = [
            lambda: x + here, lambda: here[x.long()], lambda: x.numpy(), lambda: torch.stack([x[0], here[0]]),
            lambda: here.add_(x), lambda: torch.randn(2, generator=torch.Generator(), device="cuda"),
            lambda: x.normal_(generator=torch.Generator()), lambda: nn.Linear(3, 1)(x),
        ]  # fmt: skip
        for operation in mixed:
            with pytest.raises(MixUp):
                operation()
        assert (x * here[0]).device == x.to("cuda", torch.float64).device == torch.zeros(1).to(x).device == CUDA
        weight = here.clone().requires_grad_()
        (weight.to("cuda") * x * weight[0]).sum().cpu().backward()
        torch.testing.assert_close(weight.grad, torch.tensor([4.0, 1.0, 1.0]))
        net = nn.Linear(3, 1).to("cuda")
        net(x).sum().backward()
        assert net.weight.grad.device == CUDA
    assert torch.ones(1).device.type == "cpu"
    with pytest.raises((RuntimeError, AssertionError)):
        torch.ones(1, device="cuda:7")


def test_the_tool_names_the_line_of_a_planted_read():
    def drift(t, y):
        return -y if y.sum() > 0 else y

    with FakeDevice() as device:
        fs.solve(fs.ODE(drift), fs.EulerMaruyama(), y0("cuda"), [0.0, 0.5, 1.0])
        clean = FakeDevice()
        with clean:
            x = y0("cuda")
            reads = [lambda: x.sum().item(), lambda: bool(x[0, 0]), x.tolist, x.cpu, x.nonzero, lambda: x[x > 0],
                     lambda: torch.equal(x, x), lambda: f"{x[0, 0]:.2f}", lambda: x.new_zeros(1).cpu()]  # fmt: skip
            for k, read in enumerate(reads, 1):
                read()
                assert len(clean.reads) == k
            assert not clean.uploads
    assert len([r for r in device.reads if "/solve.py" in r or "/problem.py" in r]) >= 3  # two steps and the probe
    assert all(":" in r for r in device.reads)
    with FakeDevice() as device:
        torch.ones(3).to("cuda")
        torch.tensor([1.0], device="cuda")
        torch.zeros(3, device="cuda")[torch.tensor([0])]
    assert len(device.uploads) == 3


def planted(monkeypatch, function, right, wrong):
    """Put a fault into a function of the library."""
    source, module = inspect.getsource(function), sys.modules[function.__module__]
    assert right in source
    scope = {}
    exec(compile(source.replace(right, wrong), inspect.getfile(function), "exec"), vars(module) | {}, scope)
    made = scope[function.__name__]
    monkeypatch.setattr(module, function.__name__, type(function)(made.__code__, vars(module)))


FAULTS = {
    "a read per entry of D-ODE's equations": (
        greedy._products, "+= u @ v", "+= float(u @ v)", check_terms_and_batches,
    ),
    "D-ODE's equations on the CPU": (
        greedy._products, "dtype=torch.float64, device=device", "dtype=torch.float64", check_terms_and_batches,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(name, monkeypatch):
    function, right, wrong, check = FAULTS[name]
    planted(monkeypatch, function, right, wrong)
    with pytest.raises((AssertionError, MixUp)):
        check()


# completeness

# run by slow tests
SLOW = (
    r"^fewstep\.learned\.", r"diffusers\.pipeline\.", r"teachers\.mnist", r"work_precision$",
    r"DiscreteVP\.of_table$", r"Plan\.renamed$",
)  # fmt: skip
EXCUSED = {
    r"Record\.|OrderEstimate\.|Expectation\.|\.order_figure$": "numbers and files",
    r"StochasticSolver\.step_with_error$": "of no solver",
    r"testing\.check_solver$": "measures cards on the CPU; the solvers run here by themselves",
    r"datasets\.digits$": "data from a file",
    r"ExponentialEuler\.options$": "its argument as it was given",
    r"teachers\.(save|write_half|mnist_features|MNISTFeatures.*)$": "files, and layers of torch alone",
}


def not_run(request, slow):
    """The public functions that no test has called on the device, if all of these tests are in the session."""
    tests = {v for k, v in globals().items() if k.startswith("test_")}
    found = {item.function for item in request.session.items}
    due = {t for t in tests if slow or not any(m.name == "slow" for m in getattr(t, "pytestmark", []))}
    if due - found:
        pytest.skip("some tests of this file are not in this session")
    return sorted(name for code, name in public().items() if code not in FakeDevice.entered)


def matching(names, patterns):
    return [n for n in names if any(re.search(p, n) for p in patterns)]


def test_every_public_function_ran_on_the_device(request):
    pytest.importorskip("diffusers")  # whose tests above run the rest
    missing = not_run(request, slow=False)
    uncovered = set(missing) - set(matching(missing, (*SLOW, *EXCUSED)))
    assert not uncovered, "\n".join(sorted(uncovered))
    names = list(public().values())
    assert all(matching(names, [pattern]) for pattern in EXCUSED)


@pytest.mark.slow
def test_every_public_function_ran_in_all_tests(request):
    missing = not_run(request, slow=True)
    assert missing == matching(missing, EXCUSED)
