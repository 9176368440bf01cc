"""Learned steps: born equal to their parent, better after training, whole on disk."""

import inspect
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fewstep as fs
from fewstep.learned.sigdeg.networks import Coefficients, DenoisingMLP
from fewstep.learned.sigdeg.student import TERMS, integrals
from fewstep_analysis import strong_order, strong_orders, weak_order, weak_orders

SINE = fs.SDE(lambda t, y: -2 * torch.sin(y), lambda t, y: 0.8 + 0.6 * torch.cos(y))
EDM = fs.EDM(0.05, 10.0)


def mixture(x, sigma):
    """The exact denoiser of two Gaussians at -1 and 1, standard deviation 0.3."""
    s, v = sigma * sigma, 0.09
    weight = torch.tanh(x / (v + s))
    return (x * v + weight * s) / (v + s)


MIXTURE = fs.DiffusionModel(mixture, EDM)


def test_iterated_integrals_scale_as_they_must():
    path = fs.BrownianPath((5, 2), levy="H", seed=1, dtype=torch.float64)
    inc = path.increment(0.0, 0.25)
    I11, I10, I01, I00, I111 = integrals(inc).unbind(-1)
    torch.testing.assert_close(I10 + I01, inc.h * inc.W)
    torch.testing.assert_close(I11, (inc.W**2 - inc.h) / 2)
    torch.testing.assert_close(I111, (inc.W**3 - 3 * inc.h * inc.W) / 6)
    assert torch.equal(I00, torch.full_like(I00, inc.h**2 / 2))


def test_a_step_is_born_equal_to_its_parent():
    y0, grid = torch.linspace(-1, 1, 12).reshape(6, 2), torch.linspace(0, 1, 9)
    student = fs.SigStep(Coefficients(2, TERMS))
    path = fs.BrownianPath((6, 2), levy="H")
    a, b = (fs.solve(SINE, s, y0, grid, path=path).y for s in (student, fs.EulerMaruyama()))
    assert torch.equal(a, b)


@pytest.mark.parametrize("levy", ["W", "H", "K"])
def test_a_sampler_is_born_equal_to_its_parent(levy):
    grid = fs.sigma_grid(EDM, 5, final="sigma_min")
    network = DenoisingMLP((2,), width=16, depth=1)
    torch.nn.init.normal_(network.leave.weight, generator=torch.Generator().manual_seed(0))
    problem = fs.DiffusionModel(network, EDM)
    plan = fs.EulerMaruyama().plan(grid)
    student = fs.SigSampler(plan, network.with_signature("WHK".index(levy) + 1), levy)
    path = fs.BrownianPath((7, 2), t0=0.01, t1=400.0, levy="K", clock="log", seed=3)
    noise = 10 * torch.randn(7, 2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        a, b = (fs.sample(problem, s, noise=noise, path=path) for s in (student, plan))
    assert torch.equal(a, b)


@pytest.mark.parametrize("head", ["direct", "graded"])
def test_the_default_correction_of_a_users_denoiser_is_born_nought(head):
    from fewstep.learned.sigdeg.sampler_training import _network
    from fewstep.learned.trajectories import make_trajectories

    data = make_trajectories(MIXTURE, torch.tensor([2.0, 1.0]), count=16, event_shape=(1,), substeps=2)
    network, residual = _network(MIXTURE, data, "H", None, head, False, 0)
    assert residual
    x, s = torch.randn(5, 1, generator=torch.Generator().manual_seed(0)), torch.tensor(2.0)
    assert not network(x, s, s / 2, torch.ones(5, 2, 1)).any()


@pytest.fixture(scope="module")
def mixture_student():
    return fs.distill_sigdeg(
        MIXTURE,
        steps=4,
        teacher_steps=64,
        event_shape=(1,),
        trajectories=2048,
        iterations=300,
        seed=0,
    )


def test_distillation_brings_the_sampler_to_its_teacher(mixture_student):
    student, report = mixture_student
    assert student.residual  # a denoiser of the user's own is kept, and corrected
    # paths that flip the mode weigh most: 0.61 to 0.66 over draws of the trajectories
    assert report.student_rmse < 0.75 * report.parent_rmse
    assert report.losses[-1] < report.losses[0]
    assert set(report.seconds) == {"teacher", "training"}
    # fresh features, other noise: the modes are there and weigh the same
    x = fs.sample(MIXTURE, student, shape=(4000, 1), seed=9)
    assert not x.requires_grad
    assert abs(float((x > 0).float().mean()) - 0.5) < 5 * 0.5 / 4000**0.5
    assert abs(float(x.abs().mean()) - 1.0) < 0.15


def test_distillation_is_reproducible_and_leaves_global_randomness_alone(mixture_student):
    state = torch.random.get_rng_state()
    again, report = fs.distill_sigdeg(
        MIXTURE,
        steps=4,
        teacher_steps=64,
        event_shape=(1,),
        trajectories=2048,
        iterations=300,
        seed=0,
    )
    assert torch.equal(state, torch.random.get_rng_state())
    assert report.losses == mixture_student[1].losses
    for a, b in zip(again.network.parameters(), mixture_student[0].network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_students_say_what_they_are_in_a_line(mixture_student, sine_student):
    assert repr(mixture_student[0]) == "<SigSampler(EulerMaruyama): 4 evaluations, DenoisingMLP told 'H'>"
    assert repr(sine_student[0]) == "SigStep(Coefficients, parent=EulerMaruyama())"


DOORS = [
    fs.distill_dode, fs.distill_sfddm, fs.distill_sigdeg, fs.regrid, fs.from_epsilon, fs.from_flow,
    fs.from_sample, fs.from_score, fs.from_v, strong_order, strong_orders, weak_order, weak_orders,
]  # fmt: skip


@pytest.mark.parametrize("door", DOORS, ids=lambda f: f.__qualname__)
def test_a_doors_signature_names_every_option(door):
    assert all(p.kind is not p.VAR_KEYWORD for p in inspect.signature(door).parameters.values())


def test_an_option_of_the_other_kind_of_problem_is_refused():
    with pytest.raises(fs.InputError, match="option: got 'forcing', expected one of .*'y0'"):
        fs.distill_sigdeg(SINE, steps=4, y0=torch.ones(1), forcing=0.5)
    with pytest.raises(fs.InputError, match="option: got 't1', expected one of .*'forcing'"):
        fs.distill_sigdeg(MIXTURE, steps=2, event_shape=(1,), t1=2.0)


def test_the_sampler_survives_its_file(mixture_student, tmp_path):
    student, _ = mixture_student
    student.save(tmp_path / "few.safetensors")
    back = fs.load(tmp_path / "few.safetensors")
    with torch.no_grad():
        a, b = (fs.sample(MIXTURE, s, shape=(8, 1), seed=2) for s in (student, back))
    assert torch.equal(a, b)
    assert back.plan.name == student.plan.name


@pytest.fixture(scope="module")
def sine_student():
    y0 = torch.linspace(-2, 2, 64, dtype=torch.float64).unsqueeze(1)
    return fs.distill_sigdeg(SINE, steps=32, y0=y0, trajectories=1024, iterations=200, seed=0)


def test_the_step_learns_the_iterated_integral_it_never_saw(sine_student, tmp_path):
    student, report = sine_student
    assert report.student_rmse < 0.4 * report.parent_rmse
    y = torch.linspace(-1, 1, 9, dtype=torch.float64).unsqueeze(1)
    with torch.no_grad():
        learned = student.network(torch.tensor(0.5, dtype=torch.float64), y)[..., 0]
    exact = (0.8 + 0.6 * torch.cos(y)) * (-0.6 * torch.sin(y))  # g g'
    assert (learned - exact).abs().mean() < 0.1
    student.save(tmp_path / "step.safetensors")
    back = fs.load(tmp_path / "step.safetensors")
    grid, start = torch.linspace(0, 1, 9), torch.zeros(4, 1, dtype=torch.float64)
    assert torch.equal(fs.solve(SINE, student, start, grid).y, fs.solve(SINE, back, start, grid).y)


BAD = {
    "substeps": (dict(problem=MIXTURE, steps=4, teacher_steps=30, event_shape=(1,)), "multiple of steps"),
    "noise": (dict(problem=fs.SDE(SINE.drift, SINE.diffusion, "general"), steps=4, y0=torch.ones(1)), "diag"),
    "problem": (dict(problem="digits", steps=4), "DiffusionModel or fewstep.SDE"),
    "typo": (dict(problem=MIXTURE, steps=2, event_shape=(1,), iteration=5), "Did you mean 'iterations'"),
    "no shape": (dict(problem=MIXTURE, steps=2), "event_shape: got nothing"),
    "no y0": (dict(problem=SINE, steps=2), "y0: got nothing"),
    "no grid": (dict(problem=MIXTURE, event_shape=(1,)), "steps=... or sigmas"),
    "levy": (dict(problem=MIXTURE, steps=2, event_shape=(1,), levy="A"), "levy: got 'A'"),
    "few": (dict(problem=MIXTURE, steps=2, event_shape=(1,), trajectories=1), "at least 16"),
    "two grids": (
        dict(problem=MIXTURE, steps=4, event_shape=(1,), sigmas=torch.tensor([10.0, 1.0, 0.1])), "drop one",
    ),
    "to nought": (dict(problem=MIXTURE, event_shape=(1,), sigmas=torch.tensor([9.0, 1.0, 0.0])), "ends in 0"),
    "iterations": (
        dict(problem=MIXTURE, steps=2, teacher_steps=4, event_shape=(1,), trajectories=16, iterations=0),
        "iterations",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    call, words = BAD[case]
    with pytest.raises(fs.InputError, match=words):
        fs.distill_sigdeg(**call)


def test_students_refuse_states_they_were_not_made_for(mixture_student, sine_student):
    with pytest.raises(fs.InputError, match=r"events of shape \(3,\).*made for \(1,\)"):
        fs.sample(MIXTURE, mixture_student[0], shape=(2, 3))
    with pytest.raises(fs.InputError, match="float64.*network is in torch.float32"):
        fs.sample(MIXTURE, mixture_student[0], shape=(2, 1), dtype=torch.float64)
    for y0, words in ((torch.ones(2, 3, dtype=torch.float64), "events"), (torch.ones(2, 1), "float32")):
        with pytest.raises(fs.InputError, match=words):
            fs.solve(SINE, sine_student[0], y0, torch.linspace(0, 1, 3))


def test_a_student_file_cannot_name_anything_to_run(mixture_student, tmp_path):
    file = tmp_path / "few.safetensors"
    hostile = [
        {"network": "os.system"}, {"kind": "eval"}, {"config": 7}, {"config": {"event": [10**9]}},
        {"config": {"event": [1], "depth": 10**9}}, {"plan": None}, {"levy": "Z"},
    ]  # fmt: skip
    for change in hostile:
        mixture_student[0].save(file)
        weights = load_file(file)
        with safe_open(file, framework="pt") as f:
            meta = json.loads(f.metadata()["fewstep"])
        save_file(weights, file, {"fewstep": json.dumps(meta | change)})
        with pytest.raises(fs.InputError):
            fs.load(file)
