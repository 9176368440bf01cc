"""Signature-driven students: equal to their parent at first, better after training, saved and loaded."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fewstep as fs
from fewstep.learned.sigdeg.networks import Coefficients, DenoisingMLP
from fewstep.learned.sigdeg.student import TERMS, integrals

SINE = fs.SDE(lambda t, y: -2 * torch.sin(y), lambda t, y: 0.8 + 0.6 * torch.cos(y))
EDM = fs.EDM(0.05, 10.0)


def mixture(x, sigma):
    """The exact denoiser of two Gaussians at -1 and 1, standard deviation 0.3."""
    s, v = sigma * sigma, 0.09
    return (x * v + torch.tanh(x / (v + s)) * s) / (v + s)


MIXTURE = fs.DiffusionModel(mixture, EDM)


def test_iterated_integrals_follow_their_formulas():
    path = fs.BrownianPath((5, 2), levy="H", seed=1, dtype=torch.float64)
    inc = path.increment(0.0, 0.25)
    I11, I10, I01, I00, I111 = integrals(inc).unbind(-1)
    torch.testing.assert_close(I10 + I01, inc.h * inc.W)
    torch.testing.assert_close(I11, (inc.W**2 - inc.h) / 2)
    torch.testing.assert_close(I111, (inc.W**3 - 3 * inc.h * inc.W) / 6)
    assert torch.equal(I00, torch.full_like(I00, inc.h**2 / 2))


def test_step_is_initialised_to_its_parent():
    y0, grid = torch.linspace(-1, 1, 12).reshape(6, 2), torch.linspace(0, 1, 9)
    student = fs.SigStep(Coefficients(2, TERMS))
    path = fs.BrownianPath((6, 2), levy="H")
    a, b = (fs.solve(SINE, s, y0, grid, path=path).y for s in (student, fs.EulerMaruyama()))
    assert torch.equal(a, b)


@pytest.mark.parametrize("levy", ["W", "H", "K"])
def test_sampler_is_initialised_to_its_parent(levy):
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
def test_default_correction_is_initialised_to_zero(head):
    network = DenoisingMLP((1,), 128, 2, 2, skip=False, head=head)
    x, s = torch.randn(5, 1, generator=torch.Generator().manual_seed(0)), torch.tensor(2.0)
    assert not network(x, s, s / 2, torch.ones(5, 2, 1)).any()


def distil(iterations=100):
    return fs.distill_sigdeg(
        MIXTURE, steps=4, teacher_steps=32, event_shape=(1,), teacher_options=fs.TeacherOptions(trajectories=2048),
        training=fs.TrainingOptions(iterations, learning_rate=2e-3), seed=0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def mixture_student():
    return distil()


def test_distillation_improves_the_sampler(mixture_student):
    student, report = mixture_student
    assert student.residual  # a user's denoiser is kept and corrected
    # paths that change the mode have the largest errors
    assert report.student_rmse < 0.75 * report.parent_rmse
    assert report.losses[-1] < report.losses[0]
    assert set(report.seconds) == {"teacher", "training"}
    # on other noise both modes have the same weight
    x = fs.sample(MIXTURE, student, shape=(4000, 1), seed=9)
    assert not x.requires_grad
    assert abs(float((x > 0).float().mean()) - 0.5) < 5 * 0.5 / 4000**0.5
    assert abs(float(x.abs().mean()) - 1.0) < 0.15


def test_distillation_is_reproducible_and_leaves_the_global_generator_unchanged():
    state = torch.random.get_rng_state()
    (one, report), (two, again) = distil(5), distil(5)
    assert torch.equal(state, torch.random.get_rng_state())
    assert report.losses == again.losses
    for a, b in zip(one.network.parameters(), two.network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_repr_of_students(mixture_student, sine_student):
    assert repr(mixture_student[0]) == "<SigSampler(EulerMaruyama): 4 evaluations, DenoisingMLP with levy='H'>"
    assert repr(sine_student[0]) == "SigStep(Coefficients, parent=EulerMaruyama())"


def test_sampler_survives_its_file(mixture_student, tmp_path):
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
    return fs.distill_sigdeg_step(
        SINE, steps=16, y0=y0, seed=0,
        teacher_options=fs.TeacherOptions(trajectories=256), training=fs.TrainingOptions(25, 256),
    )  # fmt: skip


def test_step_learns_the_coefficient_of_the_iterated_integral(sine_student, tmp_path):
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
    "substeps": (dict(steps=4, teacher_steps=30), "multiple of steps"),
    "two substeps": (
        dict(steps=4, teacher_steps=8, teacher_options=fs.TeacherOptions(substeps=2)),
        "drop one",
    ),
    "problem": (dict(problem="digits", steps=4), "expected fewstep.DiffusionModel"),
    "sde": (dict(problem=SINE, steps=4), "distill_sigdeg_step"),
    "typo": (dict(steps=2, spacin="logsnr"), "Did you mean 'spacing'"),
    "no shape": (dict(steps=2, event_shape=None), "event_shape: got None"),
    "no grid": (dict(), "steps=... or sigmas"),
    "levy": (dict(steps=2, levy="A"), "levy: got 'A'"),
    "few": (dict(steps=2, teacher_options=fs.TeacherOptions(trajectories=1)), "at least 16"),
    "two grids": (dict(steps=4, sigmas=torch.tensor([10.0, 1.0, 0.1])), "drop one"),
    "to zero": (dict(sigmas=torch.tensor([9.0, 1.0, 0.0])), "ends in 0"),
    "options": (dict(steps=2, teacher_options=fs.ShARK()), "expected fewstep.TeacherOptions"),
}
BAD_STEP = {
    "noise": (dict(sde=fs.SDE(SINE.drift, SINE.diffusion, "general")), "diagonal"),
    "sde": (dict(sde=MIXTURE), "sde: got DiffusionModel"),
    "y0": (dict(y0=[1.0]), "y0: got"),
    "times": (dict(t0=1.0), "t0 < t1"),
    "option": (dict(forcing=0.5), "option: got 'forcing', expected one of .*'y0'"),
    "teacher": (dict(teacher_options=fs.TeacherOptions(fs.DDIM())), "teacher_options.solver: got DDIM"),
    "few": (dict(teacher_options=fs.TeacherOptions(trajectories=1)), "at least 16"),
}


@pytest.mark.parametrize("case", BAD)
def test_invalid_input_is_rejected(case):
    options, match = BAD[case]
    with pytest.raises(fs.InputError, match=match):
        fs.distill_sigdeg(**dict(problem=MIXTURE, event_shape=(1,)) | options)


@pytest.mark.parametrize("case", BAD_STEP)
def test_invalid_input_to_the_step_is_rejected(case):
    options, match = BAD_STEP[case]
    with pytest.raises(fs.InputError, match=match):
        fs.distill_sigdeg_step(**dict(sde=SINE, steps=4, y0=torch.ones(1)) | options)


def test_students_reject_other_shapes_and_dtypes(mixture_student, sine_student):
    with pytest.raises(fs.InputError, match=r"events of shape \(3,\).*made for \(1,\)"):
        fs.sample(MIXTURE, mixture_student[0], shape=(2, 3))
    with pytest.raises(fs.InputError, match="float64.*network is in torch.float32"):
        fs.sample(MIXTURE, mixture_student[0], shape=(2, 1), dtype=torch.float64)
    for y0, words in ((torch.ones(2, 3, dtype=torch.float64), "events"), (torch.ones(2, 1), "float32")):
        with pytest.raises(fs.InputError, match=words):
            fs.solve(SINE, sine_student[0], y0, torch.linspace(0, 1, 3))


def test_student_file_cannot_name_code(mixture_student, tmp_path):
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
