"""Sig-DEG for diffusion models: students, losses, labels, input validation, resuming a killed run."""

import io
import os
import random
import shutil
import signal
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from mixture_cases import EDM, GRID, MIXTURE, shifted
from tqdm import tqdm

import fewstep as fs
from fewstep import _serialization
from fewstep.errors import InputError
from fewstep.learned import training, trajectories
from fewstep.learned.sigdeg.distill import KnotMatching
from fewstep.learned.sigdeg.networks import DenoisingMLP, graded
from fewstep.learned.training import Minibatch, fit, seeded


def make(count=32, problem=MIXTURE, **options):
    options = {"event_shape": (1,), "substeps": 4, "levy": "H"} | options
    return fs.make_trajectories(problem, GRID, count=count, **options)


def train(iterations, problem=MIXTURE, learning_rate=None, batch_size=None, patience=None, every=None, **options):
    training = fs.TrainingOptions(
        iterations, batch_size, learning_rate, early_stopping_patience=patience, checkpoint_every=every
    )
    return fs.distill_sigdeg(problem, training=training, **options)


@pytest.fixture(scope="module")
def denoiser():
    """A model whose denoiser is a network trained on the mixture for a short time."""
    network = seeded(0, lambda: DenoisingMLP((1,), width=32, depth=1))
    generator = torch.Generator().manual_seed(0)
    x0 = (2.0 * torch.randint(2, (4096, 1), generator=generator) - 1) + 0.3 * torch.randn(4096, 1, generator=generator)

    def loss(some):
        x, s = x0[some.index], torch.exp(torch.randn(len(some.index), generator=some.generator))
        noisy = x + s[:, None] * torch.randn(x.shape, generator=some.generator)
        return (network(noisy, s) - x).square().mean()

    fit(network, loss, len(x0), fs.TrainingOptions(200, 256, 3e-3), seed=0, progress=False)
    return fs.DiffusionModel(network, EDM)


@pytest.mark.parametrize(("head", "forcing"), [
    ("direct", 0.0), ("graded", 1.0), pytest.param("direct", 1.0, marks=pytest.mark.slow),
    pytest.param("graded", 0.0, marks=pytest.mark.slow),
])  # fmt: skip
def test_student_improves_on_its_parent_and_survives_its_file(head, forcing, denoiser, tmp_path):
    data = make(1024, problem=denoiser)
    student, report = train(150, denoiser, 3e-3, data=data, head=head, forcing=forcing)
    assert report.student_rmse < 0.9 * report.parent_rmse
    assert len(report.knots["student"]) == 4
    assert report.knots["student"][-1] == report.student_rmse
    student.save(tmp_path / "s.safetensors")
    back = fs.load(tmp_path / "s.safetensors")
    a, b = (fs.sample(denoiser, s, shape=(8, 1), seed=2) for s in (student, back))
    assert torch.equal(a, b)


def task_of(parent, head, data, forcing=0.0):
    """A task whose student has random weights, so that the result depends on every input."""
    torch.manual_seed(0)
    network = DenoisingMLP((1,), width=8, depth=1, letters=2, skip=False, head=head)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.3)
    student = fs.SigSampler(parent.plan(GRID), network.requires_grad_(False), "H", residual=True)
    index = torch.arange(len(data))
    return KnotMatching(MIXTURE, student, data, index, index, forcing, torch.device("cpu"))


@pytest.mark.parametrize("head", ["direct", "graded"])
@pytest.mark.parametrize("parent", [fs.EulerMaruyama(), fs.SEA()], ids=str)
def test_forced_step_equals_the_unrolled_one_from_the_same_state(parent, head):
    """With the student's own states in place of the knots, each forced step leads to the next one."""
    data = make(64, levy="K")
    task, some = task_of(parent, head, data), data.pick(torch.arange(64))
    own = replace(some, knots=torch.cat([some.knots[:1], task.states(some)]))
    for k in range(4):
        torch.testing.assert_close(task.step(own, k), own.knots[k + 1], rtol=1e-4, atol=1e-4)


def test_losses_are_the_weighted_mean_squares():
    """Unrolled by hand; forced, as the mean over draws of the steps: within 5 standard errors, level 6e-7."""
    data, index = make(256), torch.arange(256)
    task, some = task_of(fs.EulerMaruyama(), "direct", data), data.pick(index)
    variance = some.knots[-1].double().var()  # of one coordinate: the mean over directions is its own
    weights = (variance / (variance + data.sigmas[1:].square())).square() / variance
    torch.testing.assert_close(task.weights, weights)

    def loss(task, i):
        return float(task.loss(Minibatch(index, i, 0.0, torch.Generator().manual_seed(i))))

    gaps = (task.states(some) - some.knots[1:]).square().flatten(1).mean(1).double()
    assert loss(task, 0) == pytest.approx(float((gaps * weights).mean()), rel=1e-4)
    forced = replace(task, forcing=1.0)
    drawn = torch.tensor([loss(forced, i) for i in range(100)], dtype=torch.float64)
    steps = torch.stack([task.step(some, k) - some.knots[k + 1] for k in range(4)])
    want = float((steps.square().flatten(1).mean(1).double() * weights).mean())
    assert abs(drawn.mean() - want) < 5 * drawn.std() / 100**0.5


def test_graded_terms_vanish_with_the_step():
    terms, xi = torch.ones(2, 3, 1), torch.ones(2, 2, 1)
    values = [graded(terms, xi, torch.tensor(1.0), torch.tensor(1 / (1 + h))) for h in (1e-3, 1e-5)]
    assert abs(float(values[0][0] / values[1][0]) / 10 - 1) < 0.05  # as h^(1/2)


def test_graded_student_keeps_its_parents_order():
    """Random coefficients: the difference to the parent falls as h at least, along one path."""
    torch.manual_seed(0)
    network = DenoisingMLP((1,), width=16, depth=1, letters=2, skip=False, head="graded")
    torch.nn.init.normal_(network.signature.weight, std=0.3)
    path = fs.BrownianPath((500, 1), t0=0.01, t1=400.0, levy="H", clock="log", seed=3)
    noise, gaps = 10 * torch.randn(500, 1), []
    for steps in (128, 256, 512):
        plan = fs.EulerMaruyama().plan(fs.sigma_grid(EDM, steps, final="sigma_min"))
        student = fs.SigSampler(plan, network, "H", residual=True)
        with torch.no_grad():
            a, b = (fs.sample(MIXTURE, s, noise=noise, path=path) for s in (student, plan))
        gaps.append(float((a - b).abs().median()))  # few paths flip the mode, and would be all of a mean
    slopes = torch.tensor(gaps).log2().diff().neg()
    assert (slopes > 0.8).all(), slopes


class Labelled(torch.nn.Module):
    """A class-conditional network: the label shifts its input and output."""

    labelled = True

    def __init__(self):
        super().__init__()
        self.body = seeded(0, lambda: DenoisingMLP((1,), width=16, depth=1, letters=2))

    def forward(self, x, sigma, sigma_next, xi, labels):
        m = labels.reshape(-1, 1).float()
        return self.body(x - m, sigma, sigma_next, xi) + m


class Wide(torch.nn.Linear):
    """Returns three numbers where one is expected."""

    def __init__(self):
        super().__init__(1, 3)

    def forward(self, x, sigma, sigma_next, xi):
        return super().forward(x)


def test_class_conditional_student_receives_its_labels():
    labels = torch.arange(64) % 3 * 10
    data = make(64, problem=shifted, labels=labels)
    student, _ = train(30, shifted, data=data, network=Labelled(), forcing=0.5)
    few = torch.tensor([20, 0, 10])
    x = fs.sample(MIXTURE, student.at(few), shape=(3, 1), seed=0)
    assert ((x.squeeze() - few).abs() < 4).all()
    with pytest.raises(InputError, match=r"student.at\(labels\)"):
        fs.sample(MIXTURE, student, shape=(3, 1), seed=0)
    plain, _ = train(1, data=make(16))
    with pytest.raises(InputError, match="takes none"):
        plain.at(few)
    # a model of labels whose correction receives none
    student, _ = train(2, shifted, data=data)
    assert ((fs.sample(shifted(few), student, shape=(3, 1)).squeeze() - few).abs() < 4).all()


@pytest.mark.parametrize(("network", "match"), {
    "shape": (lambda x, *_: x[:, :1].repeat(1, 3), "network: got function"),
    "letters": (DenoisingMLP((1,), letters=3), "3 letters of the signature; levy=.H. has 2"),
    "broadcast": (Wide(), r"network: got .*, 3\) at evaluation 0 .*expected x's"),
}.values())  # fmt: skip
def test_incompatible_network_is_rejected(network, match):
    with pytest.raises(InputError, match=match):
        train(1, data=make(16), network=network)


def test_model_of_labels_must_be_called_before_sampling():
    with pytest.raises(InputError, match="function of labels"):
        fs.sample(shifted, fs.EulerMaruyama(), shape=(3, 1), steps=4)


def test_early_stopping_keeps_the_best_weights():
    _, report = train(400, data=make(256), every=10, patience=2, learning_rate=1.0)  # a rate that only harms
    values = [v for _, v in report.held_out]
    assert len(values) < 40
    assert report.student_rmse == min(values)
    assert min(values[-2:]) > min(values)


# ---------------------------------------------------------------- killed and resumed


def distil(folder):
    return train(
        60, batch_size=64, every=5, patience=50, steps=3, teacher_steps=60, event_shape=(1,), forcing=0.5,
        teacher_options=fs.TeacherOptions(trajectories=4 * 256), folder=folder,
    )  # fmt: skip


def dies_at(event, folder):
    """Kill this process at its n-th event: a block started, an iteration done, a file written or moved."""
    left = [event]

    def happens():
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    block, step, write = trajectories._Maker.block, training._Run.step, _serialization.atomic_write

    def counted(function):
        def wrapped(*args):
            happens()
            return function(*args)

        return wrapped

    @contextmanager
    def placed(*args):
        with write(*args) as file:
            yield file
            happens()  # written, but not moved yet
        happens()

    trajectories._Maker.block, training._Run.step = counted(block), counted(step)
    _serialization.atomic_write = placed
    distil(folder)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_run_killed_at_twenty_random_moments_ends_bitwise_equal(tmp_path):
    """kill -9 during data and during training, at moments drawn anew in each run and shown on failure."""
    want, report = distil(tmp_path / "uninterrupted")
    moments, folder, stages, died = random.Random(), tmp_path / "killed", [], []
    for attempt in range(60):
        if len(died) == 20:
            break
        # ten times while an empty folder gets its data, then throughout the training
        if attempt < 10 and folder.exists():
            shutil.rmtree(folder)
        event = moments.randint(1, 12) if attempt < 10 else moments.randint(1, 40)
        child = os.fork()
        if child == 0:
            try:
                dies_at(event, folder)
            finally:
                os._exit(0)
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            died.append(event)
            stages.append((folder / "student-3.training").exists())
        else:  # it finished: start again
            shutil.rmtree(folder)
    assert len(died) == 20, died
    assert {True, False} == set(stages), died
    got, again = distil(folder)
    for k, v in want.network.state_dict().items():
        assert torch.equal(v, got.network.state_dict()[k]), (k, died)
    assert (again.losses, again.held_out, again.knots) == (report.losses, report.held_out, report.knots), died


def test_resume_rejects_checkpoint_of_other_training(tmp_path):
    options = dict(iterations=4, data=make(32), every=2, batch_size=8, folder=tmp_path)
    train(**options)
    with pytest.raises(InputError, match="is of a training of another batch_size"):
        train(**options | {"batch_size": 9})
    for other in (dict(forcing=0.5), dict(levy="W"), dict(head="graded"), dict(data=make(32, seed=1))):
        with pytest.raises(InputError, match="is of a training of another"):
            train(**options | other)
    at = tmp_path / "student-4.training"
    at.write_bytes(at.read_bytes()[:300])
    with pytest.raises(InputError, match="Delete it to start again"):
        train(**options)


class Dropping(torch.nn.Module):
    """A user's network with dropout and running statistics."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Linear(3, 8),
            torch.nn.BatchNorm1d(8),
            torch.nn.SiLU(),
            torch.nn.Dropout(0.5),
            torch.nn.Linear(8, 1),
        )

    def forward(self, x, sigma, sigma_next, xi):
        return self.body(torch.cat([x, xi.flatten(1)], 1))


def test_dropout_and_running_statistics_resume_bitwise(tmp_path):
    data, state = make(64), torch.random.get_rng_state()

    def go(folder):
        torch.manual_seed(5)
        network = Dropping()
        torch.random.set_rng_state(state)
        options = dict(every=2, batch_size=8, patience=9, folder=folder)
        return train(6, data=data, network=network, **options)[0].network.state_dict()

    class Stop(Exception):
        pass

    want, save = go(None), training._Run.save

    def stops(self, path):
        save(self, path)
        if self.done == 4:
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training._Run, "save", stops)
        with pytest.raises(Stop):
            go(tmp_path)
    got = go(tmp_path)
    assert all(torch.equal(v, got[k]) for k, v in want.items())
    assert torch.equal(state, torch.random.get_rng_state())


BAD = {
    "steps": (dict(steps=4), "steps: got 4 in addition to data="),
    "shape": (dict(event_shape=(1,)), "event_shape"),
    "teacher": (dict(teacher_options=fs.TeacherOptions(substeps=3)), "teacher_options: got .* in addition"),
    "head": (dict(network=Dropping(), head="direct"), "head: got 'direct' in addition to network="),
    "more letters": (dict(levy="K"), "levy: got 'K'"),
    "forcing": (dict(forcing=2), "forcing: got 2"),
    "data": (dict(data=torch.ones(3)), "data: got Tensor"),
    "few": (dict(data=make(8)), "data: got 8 trajectories"),
    "event": (dict(network=DenoisingMLP((2,), letters=2)), "was made for"),
    "labels": (dict(problem=shifted), "data: got none with labels"),
    "parent": (dict(data=make(32, levy="W"), parent=fs.SEA()), "needs more than the 'W'"),
    "folder": (dict(folder=__file__), "folder: "),
}


@pytest.mark.parametrize(("options", "match"), BAD.values(), ids=BAD)
def test_arguments_that_contradict_the_data_are_rejected(options, match):
    with pytest.raises(InputError, match=match):
        train(**dict(iterations=1, data=make(32)) | options)


@pytest.mark.parametrize("option", [
    dict(iterations=0), dict(batch_size=1.5), dict(checkpoint_every=0), dict(early_stopping_patience=-1),
    dict(learning_rate=-1), dict(ema_decay=1.0), dict(weight_decay=float("nan")),
], ids=lambda d: next(iter(d)))  # fmt: skip
def test_training_options_validate_their_range(option):
    with pytest.raises(InputError, match=next(iter(option))):
        fs.TrainingOptions(**option)
    with pytest.raises(InputError, match="trajectories: got 0"):
        fs.TeacherOptions(trajectories=0)
    with pytest.raises(InputError, match="solver: got EulerMaruyama, expected a solver"):
        fs.TeacherOptions(fs.EulerMaruyama)


def test_with_several_processes_held_out_evaluations_need_patience(monkeypatch):
    """They are collective calls, and the bar that would show them is on the terminal of rank 0 alone."""
    calls = []
    monkeypatch.setattr(training, "rank_and_world", lambda: (0, 2))
    monkeypatch.setattr(training, "progress_bar", lambda items, unit, **_: tqdm(items, file=io.StringIO()))

    def go(patience):
        network = torch.nn.Linear(1, 1)
        options = fs.TrainingOptions(2, 4, 1e-3, early_stopping_patience=patience, checkpoint_every=1)
        fit(network, lambda some: network.weight.square().sum(), 8, options, seed=0, progress=True,
            held_out_loss=lambda: calls.append(0) or 1.0)  # fmt: skip

    go(patience=0)
    assert not calls
    go(patience=1)
    assert calls


@pytest.mark.parametrize("labelled", [False, True])
def test_parent_is_planned_with_the_schedule_of_the_model(labelled):
    class Parent(fs.EulerMaruyama):
        seen = None

        def plan(self, sigmas, schedule=None):
            Parent.seen = schedule
            return super().plan(sigmas, schedule)

    model = fs.DiffusionModel(lambda x, s: x / (1 + s * s), fs.VPLinear())
    fs.distill_sigdeg(
        (lambda labels: model) if labelled else model, steps=2, teacher_steps=4, event_shape=(2,), parent=Parent(),
        labels=torch.zeros(16) if labelled else None, teacher_options=fs.TeacherOptions(trajectories=16),
        training=fs.TrainingOptions(iterations=1, batch_size=4),
    )  # fmt: skip
    assert Parent.seen is model.schedule
