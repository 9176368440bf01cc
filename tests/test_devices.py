"""Everything the library does on a device, run on one that needs no GPU: no mix-up, and how often the host waits.

A solve or a sample reads at most two values from the device, and none per step: reads and uploads are those of half as
many steps. A training reads per checkpoint and held-out evaluation, not per iteration, except that the table of D-ODE,
whose parameters live on the CPU, gets its gradient back; it uploads its minibatches, which are drawn on the CPU.
Values agree with those of the CPU, because the fake device draws the same normals.
"""

from collections import Counter

import pytest
import torch
from fake_device import CUDA, FakeDevice, Held, MixUp, bare
from mixture_cases import GRID, MIXTURE, shifted
from torch import nn

import fewstep as fs
from fewstep import distances
from fewstep.brownian.levy_area import METHODS
from fewstep.integrations import k_diffusion
from fewstep.learned.sigdeg.networks import DenoisingMLP
from fewstep_analysis import problems, strong_order

VP = fs.VPLinear()
SAMPLERS = [s for s in fs.solvers().values() if isinstance(s, fs.DiffusionSolver)]
SAMPLERS += [fs.DDIM(1.0), fs.EDMEuler(churn=4), fs.EDMHeun(churn=4), fs.UniPC(3), fs.DPMSolverPP(3, multistep=False)]
SCHEDULES = [
    VP, fs.SubVP(), fs.VPScaledLinear(), fs.VPCosine(), fs.VPSigmoid(), fs.VE(), fs.EDM(), fs.FlowMatching(shift=3.0),
    fs.DiscreteVP(torch.linspace(0.999, 0.01, 50, dtype=torch.float64)),
]  # fmt: skip
DIFFUSIONS = {
    "diagonal": lambda t, y: 0.3 * y + 0.1 * t,
    "additive": lambda t, y: torch.full_like(y, 0.3) * (1 + t),
    "scalar": lambda t, y: 0.3 * y.unsqueeze(-1),
    "commutative": lambda t, y: torch.diag_embed(0.3 * y),
    "general": lambda t, y: torch.stack([0.3 * y, 0.2 * y.flip(-1).sin()], -1),
}


def host(value):
    """The value on the CPU, without a read that is counted."""
    inner = bare(value) if torch.is_tensor(value) else value
    return inner.held if isinstance(inner, Held) else torch.as_tensor(value)


def watch(run, n):
    """The result of `run(n, "cuda")`, equal to that on the CPU, and how often the host waited."""
    with FakeDevice() as device:
        result = run(n, "cuda")
    found = host(result)
    torch.testing.assert_close(found, host(run(n, "cpu")), rtol=1e-4, atol=1e-5)
    return result, device


def check_steps(run, n=2, reads=2):
    """The result is on the device, and the host waits as often for n steps as for 2 n."""
    (_, few), (result, many) = watch(run, n), watch(run, 2 * n)
    assert isinstance(result, Held)
    assert len(many.reads) <= reads, many.reads
    assert Counter(few.reads) == Counter(many.reads)
    assert Counter(few.uploads) == Counter(many.uploads)


def y0(device):
    return torch.full((3, 2), 0.5, device=device)


def sde(noise, calculus="ito"):
    if noise == "none":
        return fs.ODE(lambda t, y: -y * t)
    return fs.SDE(lambda t, y: -y + 0.1 * t, DIFFUSIONS[noise], noise, calculus)


SOLVES = [
    pytest.param(noise, solver, calculus, id=f"{noise}-{name}-{calculus}")
    for noise in ("none", *DIFFUSIONS)
    for name, solver in fs.solvers(noise).items()
    for calculus in solver.card.sde_types[: 1 if noise in ("none", "additive") else 2]
]


@pytest.mark.parametrize(("noise", "solver", "calculus"), SOLVES)
def test_a_solve_waits_for_no_step(noise, solver, calculus):
    problem = sde(noise, calculus)
    check_steps(lambda n, device: fs.solve(problem, solver, y0(device), torch.linspace(0, 1, n + 1)).y)


PATHS = {
    "torch": lambda device: fs.BrownianPath((3, 2), levy="H", device=device),
    "seeds": lambda device: fs.BrownianPath((3, 2), levy="H", seeds=[1, 2, 3], device=device),
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

    check_steps(run)


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


@pytest.mark.parametrize("given", ["seed", "seeds"])
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


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_schedules_answer_on_the_device(schedule):
    model = fs.DiffusionModel(fs.from_epsilon(network, schedule), schedule)
    check_steps(lambda n, device: fs.sample(model, fs.DEIS(), noise=y0(device), steps=n))
    for name in ("alpha", "label"):
        at = lambda n, device: getattr(schedule, name)(torch.tensor([0.2, 0.5], dtype=torch.float64, device=device))  # noqa: B023, E731
        assert isinstance(watch(at, 1)[0], Held)


def test_a_table_of_levels_on_the_device_is_a_schedule():
    def run(n, device):
        table = fs.DiscreteVP(torch.linspace(0.999, 0.01, 50, dtype=torch.float64, device=device))
        return fs.sample(fs.DiffusionModel(fs.from_v(network, table), table), fs.UniPC(2), noise=y0(device), steps=n)

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


@pytest.mark.parametrize("solver", [fs.DDIM(), fs.EDMHeun(churn=4), fs.UniPC(3), fs.DPMSolver(2)], ids=repr)
def test_the_k_diffusion_sampler_waits_for_no_step(solver):
    sampler = k_diffusion.sampler(solver, schedule=fs.EDM(0.05, 10.0))
    grid = lambda n, device: torch.cat([torch.linspace(10, 0.1, n), torch.zeros(1)]).to(device)  # noqa: E731
    check_steps(lambda n, device: sampler(k_model, y0(device), grid(n, device), disable=True, callback=lambda _: None))


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


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # numpy, of a tensor's method under any mode
@pytest.mark.parametrize("options", [{}, {"thresholding": True}, {"use_karras_sigmas": True}], ids=str)
@pytest.mark.parametrize("solver", [fs.DPMSolverPP(2), fs.DPMSolverSDE(2), fs.UniPC(3)], ids=repr)
def test_the_scheduler_reads_its_first_timestep_alone(solver, options):
    pytest.importorskip("diffusers")
    from fewstep.integrations.diffusers import FewStepScheduler

    def run(n, device):
        scheduler = FewStepScheduler(solver=solver, **options)
        scheduler.set_timesteps(n, device=device)
        x, generator = (
            torch.linspace(-1, 1, 12, device=device).reshape(3, 1, 2, 2),
            torch.Generator(device).manual_seed(1),
        )
        for t in scheduler.timesteps:
            x = scheduler.step(0.3 * scheduler.scale_model_input(x, t), t, x, generator=generator).prev_sample
        return x

    check_steps(run, n=3, reads=1)


def test_torchsde_waits_for_no_step():
    torchsde = pytest.importorskip("torchsde")
    from fewstep.integrations.torchsde import BrownianView, TorchsdePath, sdeint

    class Their(torchsde.SDEIto):
        def __init__(self):
            super().__init__("diagonal")

        def f(self, t, y):
            return -y

        def g(self, t, y):
            return 0.3 * y

    times, given = torch.tensor([0.0, 0.5, 1.0]), lambda device: fs.BrownianPath((3, 2), levy="H", device=device)
    check_steps(lambda n, device: sdeint(Their(), y0(device), times, dt=0.5 / n, method="srk", seed=1))
    check_steps(lambda n, device: sdeint(Their(), y0(device), times, dt=0.5 / n, bm=BrownianView(given(device))))
    interval = lambda device: torchsde.BrownianInterval(  # noqa: E731
        0.0, 1.0, (3, 2), entropy=1, device=device, levy_area_approximation="space-time"
    )
    watch(lambda n, device: fs.solve(sde("diagonal"), fs.SRID2(), y0(device), times, path=TorchsdePath(interval(device))).y, 1)  # fmt: skip  # noqa: E501
    with FakeDevice(), pytest.raises(fs.InputError, match="^path: got a path on cpu"):
        fs.solve(sde("diagonal"), fs.SRID2(), y0("cuda"), times, path=TorchsdePath(interval("cpu")))


# learned solvers

MIXED = lambda n, device, seed=0: torch.randn(n, 2, generator=torch.Generator().manual_seed(seed)).to(device) * 10  # noqa: E731


def growth(run, few=1, many=2):
    """The reads that the larger of two runs has in addition, by line."""
    (_, a), (_, b) = watch(run, few), watch(run, many)
    return Counter(b.reads) - Counter(a.reads)


def check_training(run):
    """Reads do not grow with the iterations."""
    assert not growth(run)


def test_dode_reads_once_per_row():
    def rows(n, device):
        return fs.distill_dode(MIXTURE, fs.DDIM(), noise=MIXED(16, device), steps=2 * n, terms=2)[1].student_rmse

    def terms(n, device):
        return fs.distill_dode(MIXTURE, fs.DDIM(), noise=MIXED(16, device), steps=3, terms=n)[1].student_rmse

    def batches(n, device):
        return fs.distill_dode(MIXTURE, fs.DDIM(), noise=MIXED(16, device), steps=3, batch=16 // n)[1].student_rmse

    assert sum(growth(rows).values()) == 2  # two rows more
    assert not growth(terms)
    assert not growth(batches)


@pytest.mark.slow
@pytest.mark.parametrize("learn_grid", [False, True])
def test_dode_refines_and_regrids_on_a_device(learn_grid):
    def refined(n, device):
        training = fs.TrainingOptions(iterations=3 * n)
        options = {"refine": "global", "learn_grid": learn_grid, "training": training}
        return fs.distill_dode(MIXTURE, fs.DDIM(), noise=MIXED(16, device), steps=3, **options)[1].student_rmse

    assert sum(growth(refined).values()) == 3 * (1 + learn_grid)  # the gradient of the table, and of its levels
    table, _ = fs.distill_dode(MIXTURE, fs.DDIM(), noise=MIXED(16, "cpu"), steps=3)
    watch(
        lambda n, device: fs.regrid(table, MIXTURE, fs.DDIM(), noise=MIXED(16, device, 1), steps=4)[1].student_rmse, 1
    )
    watch(lambda n, device: fs.sample(MIXTURE, table, noise=MIXED(4, device)), 1)
    labels = torch.arange(16) % 3
    watch(lambda n, device: fs.distill_dode(shifted, fs.DDIM(), noise=MIXED(16, device), labels=labels, steps=2)[1].r2[0], 1)  # fmt: skip  # noqa: E501


def test_trajectories_are_read_once_per_block():
    def run(n, device):
        options = {"count": 4, "event_shape": (2,), "device": device}
        return fs.make_trajectories(MIXTURE, GRID, substeps=n, **options).blocks[0]["knots"]

    assert not growth(run)
    assert len(watch(run, 1)[1].reads) == 1


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


@pytest.mark.slow
def test_the_learned_step_is_fitted_on_a_device(tmp_path, monkeypatch):
    monkeypatch.setattr("fewstep.learned.sigdeg.distill_step.ROUNDS", 4)

    def run(n, device):
        y = torch.full((1, 1), 0.5, device=device)
        training = fs.TrainingOptions(iterations=2 * n, batch_size=8, checkpoint_every=10)
        made = fs.TeacherOptions(trajectories=16, substeps=2)
        student, report = fs.distill_sigdeg_step(
            sde("diagonal"), steps=2, y0=y, teacher_options=made, training=training
        )
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


def test_distances_and_orders_on_a_device():
    a, b = (
        lambda device, f=f: f(torch.linspace(-1, 1, 20, device=device).reshape(10, 2)) for f in (torch.sin, torch.exp)
    )
    for name in ("rmse", "sliced_w2", "mmd", "energy_distance"):
        watch(lambda n, device: getattr(distances, name)(a(device), b(device)), 1)  # noqa: B023
    watch(lambda n, device: distances.w1(a(device)[:, 0], b(device)[:7, 0]), 1)
    options = {"levels": range(2, 5), "paths": 32, "reference": "levels"}
    for solver in (fs.EulerMaruyama(), fs.Milstein()):
        watch(lambda n, device: strong_order(solver, problems.sine(), device=device, **options).order, 1)  # noqa: B023


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
