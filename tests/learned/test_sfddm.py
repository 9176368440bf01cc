"""SFDDM: the student's process, what its losses can reach, files, input validation."""

import copy
import re
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fewstep as fs
from fewstep.errors import InputError
from fewstep.learned.sfddm.process import SPACINGS, StudentProcess, subsequence
from fewstep.learned.sigdeg.networks import DenoisingMLP
from fewstep.learned.training import fit, seeded

T = 64
TABLE = fs.DiscreteVP.named(steps=T, beta_end=0.3)


def data(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (2.0 * torch.randint(2, (n, 2), generator=g) - 1) + 0.2 * torch.randn(n, 2, generator=g)


@pytest.fixture(scope="module")
def teacher():
    """A denoiser trained on the mixture."""
    network, x0 = seeded(0, lambda: DenoisingMLP((2,), width=64, depth=2, data_std=1.0)), data(8192)

    def loss(some):
        s = TABLE.log_sigmas[torch.randint(T, (len(some.index),), generator=some.generator)].exp().float()
        noise = torch.randn(len(some.index), 2, generator=some.generator)
        x = x0[some.index]
        weight = (s.square() + 1) / s.square().clamp(min=1e-2)
        return (weight[:, None] * (network(x + s[:, None] * noise, s) - x).square()).mean()

    fit(network, loss, len(x0), fs.TrainingOptions(400, 256, 3e-3), seed=0, progress=False)
    return network


# ---------------------------------------------------------------- the process

increasing = st.sets(st.integers(0, T - 1), min_size=1, max_size=T).map(lambda s: torch.tensor(sorted(s)))


@settings(deadline=None, max_examples=50)
@given(increasing)
def test_marginals_equal_the_teachers_by_algebra(phi):
    """The product of alpha' telescopes to abar at phi."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        process = StudentProcess(TABLE, phi)
    abar = 1 / (1 + torch.exp(2 * TABLE.log_sigmas))
    torch.testing.assert_close(process.alphas.cumprod(0), abar[phi], rtol=1e-12, atol=0)
    torch.testing.assert_close(process.sigma(torch.arange(len(phi)).double())[: len(phi)] if len(phi) > 1 else
                               process.log_sigmas.exp(), TABLE.log_sigmas[phi].exp())  # fmt: skip


def test_marginals_equal_the_teachers_by_simulation():
    """10^5 chains of q' against the moments of q, each within 5 standard errors (level 2e-5 in all)."""
    process, n = StudentProcess(TABLE, torch.tensor([3, 20, 33, 63])), 100_000
    g, x0 = torch.Generator().manual_seed(0), 0.7
    x = torch.full((n,), x0, dtype=torch.float64)
    for k in range(4):
        z = torch.randn(n, generator=g, dtype=torch.float64)
        x = process.alphas[k].sqrt() * x + process.betas[k].sqrt() * z
        abar = process.abar[k]
        spread = (1 - abar).sqrt()
        assert abs(x.mean() - abar.sqrt() * x0) < 5 * spread / n**0.5
        assert abs(x.var() / (1 - abar) - 1) < 5 * (2 / n) ** 0.5


@settings(deadline=None, max_examples=60)
@given(st.integers(1, T), st.sampled_from(SPACINGS))
def test_subsequences_are_increasing_labels_of_the_right_number(steps, spacing):
    phi = subsequence(TABLE, steps, spacing)
    assert len(phi) == steps
    assert (phi.diff() > 0).all()
    assert 0 <= phi[0] <= phi[-1] < T
    if spacing != "uniform":
        assert phi[-1] == T - 1


def test_last_level_with_signal_warns():
    with pytest.warns(UserWarning, match="of x0 is left"):
        StudentProcess(TABLE, subsequence(TABLE, 4, "uniform"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        StudentProcess(TABLE, subsequence(TABLE, 4))


@pytest.mark.parametrize("phi", [[3, 2], [0, 64], [-1, 3], [1.0, 2.0], []])
def test_invalid_phi_is_rejected(phi):
    with pytest.raises(InputError, match="phi: got"):
        StudentProcess(TABLE, torch.tensor(phi))


# ---------------------------------------------------------------- the fold


def fold(teacher, substeps=None, **options):
    names = ("iterations", "learning_rate", "batch_size", "ema_decay")
    given = {"iterations": 1, "learning_rate": 1e-30} | {k: v for k, v in options.items() if k in names}
    options = {
        "steps": 8, "data": data(512), "training": fs.TrainingOptions(**given),
        "teacher_options": fs.TeacherOptions(substeps=substeps),
    } | {k: v for k, v in options.items() if k not in names}  # fmt: skip
    return fs.distill_sfddm(schedule=TABLE, teacher=teacher, **options)


def test_teacher_on_phi_has_zero_published_loss_and_is_the_same_sampler(teacher):
    student, report = fold(teacher)
    assert report.losses == [0.0]
    grid = student.process.grid()
    a = fs.sample(fs.DiffusionModel(teacher, TABLE), fs.DDIM(), shape=(64, 2), sigmas=grid, seed=3)
    b = fs.sample(fs.DiffusionModel(teacher, TABLE), student, shape=(64, 2), seed=3)
    assert torch.equal(a, b)
    assert report.student_rmse == report.parent_rmse
    noise = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    run = lambda solver, **grid: fs.sample(fs.DiffusionModel(teacher, TABLE), solver, noise=noise, **grid)  # noqa: E731
    gap = run(fs.DDIM(), sigmas=grid) - run(fs.DPMSolverPP(2), steps=40)
    assert report.parent_rmse == pytest.approx(float(gap.square().mean().sqrt()), rel=1e-5)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("loss", ["l1", pytest.param("mse", marks=SLOW), pytest.param("kl", marks=SLOW)])
def test_random_student_reaches_the_teacher_but_not_further(teacher, loss):
    options = dict(iterations=250, learning_rate=4e-3, batch_size=256, ema_decay=0.98)
    _, report = fold(teacher, start="random", loss=loss, **options)
    assert report.losses[-1] < 0.3 * report.losses[0]
    assert report.student_rmse > 0.8 * report.parent_rmse


@pytest.mark.parametrize("loss", ["end", pytest.param("l1", marks=SLOW), pytest.param("mse", marks=SLOW)])
def test_displacement_is_closer_to_the_ode_than_the_teacher_on_phi(teacher, loss):
    options = dict(iterations=150, learning_rate=4e-3, batch_size=256, ema_decay=0.95)
    _, report = fold(teacher, steps=4, target="displacement", loss=loss, substeps=6, **options)
    assert report.student_rmse < report.parent_rmse / 1.5


@pytest.mark.parametrize("loss", ["kl", "end"])
def test_single_level_has_unit_weight(teacher, loss):
    assert fold(teacher, steps=1, loss=loss)[1].losses == [0.0]


def test_displacement_of_one_substep_is_the_published_target(teacher):
    _, report = fold(teacher, target="displacement", substeps=1)
    assert report.losses[0] < 1e-5


@pytest.mark.parametrize("patience", [0, 3])
def test_dropout_is_off_in_training(patience):
    """Also after a held-out evaluation, which switches the network to evaluation mode and back."""
    teacher = seeded(0, lambda: DenoisingMLP((2,), width=32, depth=2, data_std=1.0, dropout=0.5))
    for block in teacher.blocks:
        torch.nn.init.normal_(block.second.weight)  # initialised to zero, where dropout has no effect
    torch.nn.init.normal_(teacher.leave.weight)
    options = fs.TrainingOptions(3, 16, 1e-30, early_stopping_patience=patience, checkpoint_every=1)
    _, report = fs.distill_sfddm(teacher=teacher, schedule=TABLE, steps=8, data=data(64), training=options)
    assert report.losses == [0.0] * 3


def test_resume_rejects_other_levels_substeps_and_teachers(teacher, tmp_path):
    options = dict(target="displacement", folder=tmp_path)
    other = copy.deepcopy(teacher)
    other.leave.bias.data += 1
    fold(teacher, substeps=2, **options)
    for network, change in (
        (teacher, dict(substeps=3)),
        (teacher, dict(substeps=2, spacing="logsnr")),
        (other, dict(substeps=2)),
    ):
        with pytest.raises(InputError, match="checkpoint"):
            fold(network, **change, **options)


def test_student_survives_its_file_and_every_solver_accepts_its_process(teacher, tmp_path):
    student, _ = fold(teacher, iterations=5, learning_rate=1e-3)
    student.save(tmp_path / "s.safetensors")
    back = fs.load(tmp_path / "s.safetensors")
    assert re.fullmatch(r"<SFDDM\(DDIM\(eta=0\)\): \d+ evaluations, DenoisingMLP>", repr(back))
    problem = fs.DiffusionModel(teacher, TABLE)
    a, b = (fs.sample(problem, s, shape=(8, 2), seed=2) for s in (student, back))
    assert torch.equal(a, b)
    assert torch.equal(back.process.phi, student.process.phi)
    for solver in (fs.DDIM(), fs.DPMSolverPP(2), fs.UniPC(3), fs.ShARK(), fs.DDPM()):
        x = fs.sample(back.problem(), solver, shape=(8, 2), steps=8, seed=0)
        assert x.isfinite().all()


def test_without_data_it_learns_from_the_teachers_samples(teacher):
    _, report = fs.distill_sfddm(
        teacher=teacher, schedule=TABLE, steps=8, event_shape=(2,), training=fs.TrainingOptions(1),
        teacher_options=fs.TeacherOptions(trajectories=128),
    )  # fmt: skip
    assert report.trajectories == 128


class OneLevel(torch.nn.Linear):
    """Written for a 0-d sigma: it broadcasts the sigma of two samples over two components."""

    def forward(self, x, sigma):
        return super().forward(x) / (1 + sigma)


def test_unknown_network_has_no_features_by_default():
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = torch.nn.Linear(2, 2)

        def forward(self, x, sigma):
            return self.body(x)

    assert fold(Plain())[1].losses == [0.0]
    with pytest.raises(InputError, match="named_modules"):
        fold(Plain(), features="head")


class ByLabel(torch.nn.Module):
    """A denoiser whose data are the labels."""

    labelled = True
    seen: list = []  # of the class: the fit works on a copy

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, sigma, labels=None):
        self.seen.append(labels.tolist())
        return self.scale * labels[:, None].to(x).expand_as(x)


def test_samples_of_a_labelled_teacher_are_made_with_their_labels():
    net, labels = ByLabel(), torch.arange(300) % 3
    fs.distill_sfddm(
        teacher=net, schedule=TABLE, steps=4, labels=labels, event_shape=(2,), features=None,
        teacher_options=fs.TeacherOptions(trajectories=300), training=fs.TrainingOptions(1, 8),
    )  # fmt: skip
    assert labels[:256].tolist() in net.seen  # in chunks of 256
    assert labels[256:].tolist() in net.seen


BAD = {
    "target": (dict(target="x"), "target: got 'x'"),
    "loss": (dict(loss="x"), "loss: got 'x'"),
    "start": (dict(start="x"), "start: got 'x'"),
    "steps": (dict(steps=65), "steps: got 65"),
    "both": (dict(phi=torch.arange(3)), "expected one"),
    "data": (dict(data=torch.ones(3)), "data: got"),
    "nan": (dict(data=torch.full((3, 2), float("nan"))), "data: got"),
    "nothing": (dict(data=None), "event_shape"),
    "loader": (dict(data=[]), "data: got list"),
    "features": (dict(features="nowhere"), "features: got 'nowhere'"),
    "typo": (dict(spacings="trailing"), "Did you mean 'spacing'"),
    "options": (dict(training={"iterations": 3}), r"training: got dict, expected fewstep.TrainingOptions"),
    "labels": (dict(labels=torch.ones(3)), "labels: got 3"),
    "labels to make": (
        dict(labels=torch.ones(3), data=None, event_shape=(2,)),
        "labels: got 3 for 1024",
    ),
    "substeps": (dict(substeps=0), "substeps: got 0"),
    "idle substeps": (dict(substeps=4), "substeps: got 4 for the published"),
    "function": (dict(teacher=lambda x, sigma: x), "teacher: got function"),
    "one level": (dict(teacher=OneLevel(2, 2)), "each sample with a level of its own"),
    "x0 of another shape": (dict(teacher=torch.nn.Bilinear(2, 1, 3)), r"teacher: fails for x \(3, 2\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_invalid_input_is_rejected(case, teacher):
    options, match = BAD[case]
    with pytest.raises(InputError, match=match):
        fold(**{"teacher": teacher, **options})


def test_continuous_schedule_is_rejected_with_the_cure(teacher):
    with pytest.raises(InputError, match="DiscreteVP"):
        fs.distill_sfddm(teacher=teacher, schedule=fs.VPLinear(), steps=4, data=data(16))
