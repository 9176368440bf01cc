"""Sig-DEG for diffusion models: teacher data, heads, labels, what a killed run leaves behind."""

import io
import os
import random
import shutil
import signal
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from tqdm import trange

import fewstep as fs
from fewstep.errors import InputError
from fewstep.learned import training, trajectories
from fewstep.learned.sigdeg.networks import DenoisingMLP, graded
from fewstep.learned.training import fit, seeded
from fewstep.learned.trajectories import make_trajectories

EDM = fs.EDM(0.05, 10.0)


def mixture(x, sigma):
    """The exact denoiser of two Gaussians at -1 and 1, standard deviation 0.3."""
    s, v = sigma * sigma, 0.09
    return (x * v + torch.tanh(x / (v + s)) * s) / (v + s)


MIXTURE = fs.DiffusionModel(mixture, EDM)
GRID = fs.sigma_grid(EDM, 4, final="sigma_min")


def shifted(labels):
    """The mixture moved to the label, one a sample."""
    m = labels.reshape(-1, 1).float()
    return fs.DiffusionModel(lambda x, s: mixture(x - m, s) + m, EDM)


def make(count=32, problem=MIXTURE, **options):
    options = {"event_shape": (1,), "substeps": 4, "levy": "K"} | options
    return make_trajectories(problem, GRID, count=count, **options)


# ---------------------------------------------------------------- teacher data


@pytest.mark.parametrize("teacher", [fs.EulerMaruyama(), fs.SEA(), fs.ShARK(), fs.SRA1()], ids=str)
def test_the_teacher_is_the_fine_sampler_on_the_signatures_it_leaves(teacher):
    """With one substep the coarse signatures are the teacher's own: its plan on them gives its knots."""
    data = make(substeps=1, teacher=teacher)
    some, plan = data.pick(torch.arange(32)), teacher.plan(GRID)
    supply, states = iter(some.xi), []
    from fewstep.sample import evaluator_of, run

    x = some.knots[0]
    run(plan, x, evaluator_of(MIXTURE, plan, x), lambda *_: next(supply).unbind(1)[: plan.stage_noise.shape[-1]],
        lambda i, x, D: states.append(x))  # fmt: skip
    ends = states[plan.nfe // 4 - 1 :: plan.nfe // 4]
    torch.testing.assert_close(torch.stack(ends), some.knots[1:], rtol=1e-5, atol=1e-5)


def test_signatures_are_standard_normals_at_every_coarseness():
    """Covariances of 20,000 draws within 5 standard errors of the unit matrix: level 1e-5 for all of them."""
    data = make(20_000, substeps=3)
    for some in (data, data.coarsen(2), data.coarsen(4)):
        xi = some.pick(torch.arange(20_000)).xi.squeeze(-1)
        for z in xi:
            assert (torch.cov(z.T) - torch.eye(3)).abs().max() < 5 * 2**0.5 / 20_000**0.5
    assert len(some.sigmas) == 2


def test_coarsening_keeps_knots_and_joins_as_the_path_would():
    data = make(substeps=2)
    few, all_ = (d.pick(torch.arange(32)) for d in (data.coarsen(2), data))
    assert torch.equal(few.knots, all_.knots[::2])
    h = (GRID**-2).diff().tolist()
    W = all_.xi[0, :, 0] * h[0] ** 0.5 + all_.xi[1, :, 0] * h[1] ** 0.5
    torch.testing.assert_close(few.xi[0, :, 0], W / (h[0] + h[1]) ** 0.5)


def test_levels_that_stay_may_be_chosen_one_by_one():
    data, index = make(substeps=2), torch.arange(32)
    some, twice, whole = (d.pick(index) for d in (data.coarsen([0, 1, 4]), data.coarsen(2), data))
    assert torch.equal(some.knots, whole.knots[[0, 1, 4]])
    torch.testing.assert_close(some.xi[0], whole.xi[0])
    again = data.coarsen([0, 2, 3, 4]).coarsen([0, 1, 3])  # numbers are those of the levels still there
    assert torch.equal(again.sigmas, data.coarsen(2).sigmas)
    torch.testing.assert_close(again.pick(index).xi, twice.xi)


@pytest.mark.parametrize("keep", [0, 3, [0, 2], [1, 4], [0, 3, 2, 4], [0, 2, 2, 4], [], 2.5])
def test_levels_that_cannot_stay_are_refused(keep):
    with pytest.raises(fs.InputError, match="keep: got"):
        make(substeps=2).coarsen(keep)


def test_picking_is_by_number_over_blocks():
    data = make(600)
    some, index = data.pick(torch.arange(600)), torch.tensor([599, 3, 300, 3])
    assert len(data.blocks) == 3
    assert torch.equal(data.pick(index).knots, some.knots[:, index])
    assert torch.equal(data.pick(index).xi, some.xi[:, index])


def test_a_trajectory_does_not_depend_on_how_many_were_asked_for():
    few, many = make(300), make(600)
    index = torch.tensor([0, 255, 256, 299])
    assert torch.equal(few.pick(index).knots, many.pick(index).knots)
    assert torch.equal(few.pick(index).xi, many.pick(index).xi)
    for bad in ([-1], [300], []):
        with pytest.raises(InputError, match="index: got"):
            few.pick(torch.tensor(bad, dtype=torch.long))


def test_labels_go_with_their_trajectories():
    labels = torch.arange(32) % 3 * 10
    data = make(problem=shifted, labels=labels)
    some = data.pick(torch.tensor([5, 1]))
    assert some.labels.tolist() == [20, 10]
    assert ((some.knots[-1].squeeze() - some.labels).abs() < 3).all()


def test_a_folder_gives_the_same_and_is_refused_to_others(tmp_path):
    data, again = make(300), make(300, folder=tmp_path)
    assert all(torch.equal(a[k], b[k]) for a, b in zip(data.blocks, again.blocks) for k in a)
    (tmp_path / "block-00001.safetensors").unlink()
    third = make(300, folder=tmp_path)
    assert all(torch.equal(a[k], b[k]) for a, b in zip(data.blocks, third.blocks) for k in a)
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"}
    for other in (dict(seed=1), dict(levy="H"), dict(substeps=5), dict(problem=shifted(torch.ones(1)))):
        with pytest.raises(InputError, match="holds trajectories of another"):
            make(300, folder=tmp_path, **other)
    block = tmp_path / "block-00000.safetensors"
    block.write_bytes(block.read_bytes()[:500])
    with pytest.raises(InputError, match="delete it"):
        make(300, folder=tmp_path)
    block.unlink()
    told = dict(folder=tmp_path / "told", problem=shifted)
    make(300, **told, labels=torch.arange(300) % 2)
    with pytest.raises(InputError, match="another labels"):
        make(300, **told, labels=torch.arange(300) // 2 % 2)
    (tmp_path / "trajectories.json").rename(tmp_path / "away.json")
    with pytest.raises(InputError, match="says whose they are"):
        make(300, folder=tmp_path)
    (tmp_path / "trajectories.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        make(300, folder=tmp_path)


BAD = {
    "count": (dict(count=0), "count: got 0"),
    "substeps": (dict(substeps=1.5), "substeps: got 1.5"),
    "levy": (dict(levy="A"), "levy: got 'A'"),
    "too little": (dict(levy="W", teacher=fs.ShARK()), "needs 'H'"),
    "deterministic": (dict(teacher=fs.DDIM()), "expected a stochastic solver"),
    "churn": (dict(teacher=fs.EDMEuler(churn=10.0)), "expected a stochastic solver"),
    "class": (dict(teacher=fs.ShARK), r"expected a solver such as fs.EulerMaruyama\(\)"),
    "word": (dict(teacher="ShARK"), "teacher: got 'ShARK'"),
    "labels": (dict(labels=torch.arange(32)), "labels: got some"),
    "seed": (dict(seed=None), "seed: got None"),
    "event": (dict(event_shape=4), "shape: got 4"),
}


@pytest.mark.parametrize(("options", "match"), BAD.values(), ids=BAD)
def test_bad_input_to_the_teacher(options, match):
    with pytest.raises(InputError, match=match):
        make(**options)


def test_a_teacher_that_is_not_finite_is_named():
    with pytest.raises(fs.NonFiniteError, match="teacher EulerMaruyama"):
        make(problem=fs.DiffusionModel(lambda x, s: x / 0, EDM))


def test_a_grid_to_nought_is_refused():
    with pytest.raises(InputError, match="ends in 0"):
        make_trajectories(MIXTURE, fs.sigma_grid(EDM, 4), count=32, event_shape=(1,), substeps=2)


# ---------------------------------------------------------------- students


@pytest.mark.parametrize("head", ["direct", "graded"])
@pytest.mark.parametrize("forcing", [0.0, 1.0])
@pytest.mark.parametrize("feedback", [False, True])
def test_every_kind_of_student_comes_nearer_and_survives_its_file(head, forcing, feedback, tmp_path):
    network = seeded(0, lambda: DenoisingMLP((1,), width=32, depth=1))
    teacher = seeded(1, lambda: fit_small(network))
    data = make(1024, problem=teacher)
    options = dict(head=head, forcing=forcing, feedback=feedback, levy="H")
    student, report = fs.distill_sigdeg(teacher, data=data, iterations=150, rate=3e-3, **options)
    assert report.student_rmse < 0.9 * report.parent_rmse
    assert len(report.knots["student"]) == 4
    assert report.knots["student"][-1] == report.student_rmse
    student.save(tmp_path / "s.safetensors")
    back = fs.load(tmp_path / "s.safetensors")
    a, b = (fs.sample(teacher, s, shape=(8, 1), seed=2) for s in (student, back))
    assert torch.equal(a, b)


def fit_small(network):
    """A denoiser that has seen a little of the mixture."""
    generator = torch.Generator().manual_seed(0)
    x0 = (2.0 * torch.randint(2, (4096, 1), generator=generator) - 1) + 0.3 * torch.randn(
        4096, 1, generator=generator
    )

    def loss(some):
        x, s = x0[some.index], torch.exp(torch.randn(len(some.index), generator=some.generator))
        noisy = x + s[:, None] * torch.randn(x.shape, generator=some.generator)
        return (network(noisy, s) - x).square().mean()

    fit(network, loss, len(x0), iterations=200, batch=256, rate=3e-3, seed=0, progress=False)
    return fs.DiffusionModel(network.requires_grad_(False), EDM)


def task_of(parent, head, feedback, data):
    """A task whose student has random weights, so that every input counts."""
    from fewstep.learned.sigdeg.sampler_training import _Task, _weights

    torch.manual_seed(0)
    network = DenoisingMLP((1,), width=8, depth=1, letters=2, skip=False, head=head, feedback=feedback)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.3)
    student = fs.SigSampler(parent.plan(GRID), network.requires_grad_(False), "H", residual=True)
    return _Task(MIXTURE, student, data, 0.0, False, torch.device("cpu"), _weights(data))


@pytest.mark.parametrize("head", ["direct", "graded"])
@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("parent", [fs.EulerMaruyama(), fs.SEA()], ids=str)
def test_a_forced_step_is_the_unrolled_one_from_the_same_state(parent, head, feedback):
    """The student's own states in the knots' place: each forced step leads to the next of them."""
    data = make(64)
    task, some = task_of(parent, head, feedback, data), data.pick(torch.arange(64))
    own = replace(some, knots=torch.cat([some.knots[:1], task._states(some)]))
    for k in range(4):
        torch.testing.assert_close(task._step(own, k), own.knots[k + 1], rtol=1e-4, atol=1e-4)


def test_the_losses_are_the_weighted_mean_squares():
    """Unrolled by hand; forced, as the mean over draws of the steps: within 5 standard errors, level 6e-7."""
    from fewstep.learned.training import Minibatch

    data, index = make(256), torch.arange(256)
    task, some = task_of(fs.EulerMaruyama(), "direct", False, data), data.pick(index)
    variance = some.knots[-1].double().var()  # of one coordinate: the directions' mean is its own
    weights = (variance / (variance + data.sigmas[1:].square())).square() / variance
    torch.testing.assert_close(task.weights, weights)

    def loss(task, i):
        return float(task.loss(index, Minibatch(index, i, 0.0, torch.Generator().manual_seed(i))))

    gaps = (task._states(some) - some.knots[1:]).square().flatten(1).mean(1).double()
    assert loss(task, 0) == pytest.approx(float((gaps * weights).mean()), rel=1e-4)
    forced = replace(task, forcing=1.0)
    drawn = torch.tensor([loss(forced, i) for i in range(200)], dtype=torch.float64)
    steps = torch.stack([task._step(some, k) - some.knots[k + 1] for k in range(4)])
    want = float((steps.square().flatten(1).mean(1).double() * weights).mean())
    assert abs(drawn.mean() - want) < 5 * drawn.std() / 200**0.5


def test_graded_terms_vanish_with_the_step():
    terms, xi = torch.ones(2, 3, 1), torch.ones(2, 2, 1)
    whole = [graded(terms, xi, torch.tensor(1.0), torch.tensor(1 / (1 + h))) for h in (1e-3, 1e-5)]
    assert abs(float(whole[0][0] / whole[1][0]) / 10 - 1) < 0.05  # as h^(1/2)


def test_a_graded_student_keeps_its_parents_order():
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


class Told(torch.nn.Module):
    """A class-conditional network: the label shifts what it sees."""

    labelled = True

    def __init__(self):
        super().__init__()
        self.body = seeded(0, lambda: DenoisingMLP((1,), width=16, depth=1, letters=2))

    def forward(self, x, sigma, sigma_next, xi, labels):
        m = labels.reshape(-1, 1).float()
        return self.body(x - m, sigma, sigma_next, xi) + m


class Wide(torch.nn.Linear):
    """Gives three numbers where one is expected."""

    def __init__(self):
        super().__init__(1, 3)

    def forward(self, x, sigma, sigma_next, xi):
        return super().forward(x)


def test_a_class_conditional_student_is_told_its_labels():
    labels = torch.arange(64) % 3 * 10
    data = make(64, problem=shifted, labels=labels, levy="H")
    student, _ = fs.distill_sigdeg(shifted, data=data, network=Told(), iterations=30, forcing=0.5)
    few = torch.tensor([20, 0, 10])
    x = fs.sample(MIXTURE, student.at(few), shape=(3, 1), seed=0)
    assert ((x.squeeze() - few).abs() < 4).all()
    with pytest.raises(InputError, match=r"student.at\(labels\)"):
        fs.sample(MIXTURE, student, shape=(3, 1), seed=0)
    plain, _ = fs.distill_sigdeg(MIXTURE, data=make(16, levy="H"), iterations=1)
    with pytest.raises(InputError, match="takes none"):
        plain.at(few)
    # a model of labels whose correction is told none
    student, _ = fs.distill_sigdeg(shifted, data=data, iterations=2)
    assert ((fs.sample(shifted(few), student, shape=(3, 1)).squeeze() - few).abs() < 4).all()


@pytest.mark.parametrize(("network", "match"), {
    "shape": (lambda x, *_: x[:, :1].repeat(1, 3), "network: got function"),
    "letters": (DenoisingMLP((1,), letters=3), "3 letters of the signature, levy asks for 2"),
    "broadcast": (Wide(), r"network: gave \(\d+, 3\) for"),
}.values())  # fmt: skip
def test_a_network_that_does_not_fit_is_refused(network, match):
    with pytest.raises(InputError, match=match):
        fs.distill_sigdeg(MIXTURE, data=make(16, levy="H"), network=network, iterations=1)


def test_a_model_of_labels_is_called_before_it_is_sampled():
    with pytest.raises(InputError, match="a function of labels is called"):
        fs.sample(shifted, fs.EulerMaruyama(), shape=(3, 1), steps=4)


def test_patience_stops_and_keeps_the_best():
    data = make(256, levy="H")
    options = dict(iterations=400, every=10, patience=2, rate=1.0)  # a rate that only does harm
    _, report = fs.distill_sigdeg(MIXTURE, data=data, **options)
    looks = [v for _, v in report.looks]
    assert len(looks) < 40
    assert report.student_rmse == min(looks)
    assert looks[-1] > min(looks)
    assert looks[-2] > min(looks)


# ---------------------------------------------------------------- killed and resumed


def distil(folder):
    return fs.distill_sigdeg(
        MIXTURE, steps=3, teacher_steps=60, event_shape=(1,), trajectories=4 * 256, iterations=60, batch=64,
        every=5, patience=50, forcing=0.5, folder=folder,
    )  # fmt: skip


def dies_at(event, folder):
    """Kill this process at its n-th event: a block begun, an iteration done, a file written or placed."""
    left = [event]

    def happens():
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    block, step, whole = trajectories._Maker.block, training.Training.step, training.atomic_write

    def counted(function):
        def wrapped(*args):
            happens()
            return function(*args)

        return wrapped

    @contextmanager
    def placed(path):
        with whole(path) as part:
            yield part
            happens()  # written, and not yet in its place
        happens()

    trajectories._Maker.block, training.Training.step = counted(block), counted(step)
    training.atomic_write = trajectories.atomic_write = placed
    distil(folder)


def test_killed_at_twenty_random_moments_it_ends_with_the_same_bits(tmp_path):
    """kill -9 during data and during training; the moments are drawn anew each time and shown if it fails."""
    want, report = distil(tmp_path / "whole")
    moments, folder, stages, died = random.Random(), tmp_path / "killed", [], []
    for attempt in range(60):
        if len(died) == 20:
            break
        # ten times in the data of an empty folder, then on and on through the training
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
        else:  # it came to its end: begin again
            shutil.rmtree(folder)
    assert len(died) == 20, died
    assert {True, False} == set(stages), died
    got, again = distil(folder)
    for k, v in want.network.state_dict().items():
        assert torch.equal(v, got.network.state_dict()[k]), (k, died)
    assert (again.losses, again.looks, again.knots) == (report.losses, report.looks, report.knots), died


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    data = make(32, levy="H")
    options = dict(iterations=4, every=2, batch=8, folder=tmp_path)
    fs.distill_sigdeg(MIXTURE, data=data, **options)
    with pytest.raises(InputError, match="of a training with another batch"):
        fs.distill_sigdeg(MIXTURE, data=data, **options | {"batch": 9})
    for other in (dict(forcing=0.5), dict(levy="W"), dict(feedback=True), dict(data=make(32, seed=1))):
        with pytest.raises(InputError, match="of a training with another"):
            fs.distill_sigdeg(MIXTURE, **dict(data=data) | options | other)
    at = tmp_path / "student-4.training"
    at.write_bytes(at.read_bytes()[:300])
    with pytest.raises(InputError, match="Delete it to begin again"):
        fs.distill_sigdeg(MIXTURE, data=data, **options)


class Dropping(torch.nn.Module):
    """A network of a user's, with dropout and running statistics."""

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


def test_dropout_and_running_statistics_go_on_from_a_checkpoint_too(tmp_path):
    data, state = make(64, levy="H"), torch.random.get_rng_state()

    def go(folder):
        torch.manual_seed(5)
        network = Dropping()
        torch.random.set_rng_state(state)
        options = dict(iterations=6, every=2, batch=8, patience=9, folder=folder)
        return fs.distill_sigdeg(MIXTURE, data=data, network=network, **options)[0].network.state_dict()

    class Stop(Exception):
        pass

    want, write = go(None), training.Training.write

    def stops(self, path):
        write(self, path)
        if self.done == 4:
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Training, "write", stops)
        with pytest.raises(Stop):
            go(tmp_path)
    got = go(tmp_path)
    assert all(torch.equal(v, got[k]) for k, v in want.items())
    assert torch.equal(state, torch.random.get_rng_state())


IDLE = {
    "steps": (dict(steps=4), "steps: got 4 beside data="),
    "shape": (dict(event_shape=(1,)), "event_shape"),
    "head": (dict(network=Dropping(), head="direct"), "head: got 'direct' beside network="),
    "more letters": (dict(levy="K"), "levy: got 'K'"),
    "forcing": (dict(forcing=2), "forcing: got 2"),
    "rate": (dict(rate=-1), "rate: got -1"),
    "average": (dict(average=1.0), "average: got 1.0"),
    "data": (dict(data=torch.ones(3)), "data: got Tensor"),
    "few": (dict(data=make(8)), "data: got 8 trajectories"),
    "event": (dict(network=DenoisingMLP((2,), letters=2)), "was made for"),
    "labels": (dict(problem=shifted), "data: got none with labels"),
    "parent": (dict(data=make(32, levy="W"), parent=fs.SEA()), "needs more than the 'W'"),
}


@pytest.mark.parametrize(("options", "match"), IDLE.values(), ids=IDLE)
def test_bad_input_beside_data(options, match):
    options = dict(problem=MIXTURE, data=make(32, levy="H"), iterations=1) | options
    with pytest.raises(InputError, match=match):
        fs.distill_sigdeg(**options)


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(InputError, match="folder: "):
        fs.distill_sigdeg(MIXTURE, data=make(32, levy="H"), iterations=1, folder=tmp_path / "f")


def test_one_of_several_processes_looks_only_where_all_do(monkeypatch):
    """A look is a collective call; the bar that asks for one stands on the first process's terminal alone."""
    looks, network = [], torch.nn.Linear(1, 1)
    monkeypatch.setattr(training, "rank_and_world", lambda: (0, 2))
    monkeypatch.setattr(training, "_progress", lambda done, total, show: trange(total, file=io.StringIO()))

    def go(patience):
        fit(network, lambda some: network.weight.square().sum(), 8, iterations=2, batch=4, rate=1e-3, every=1,
            seed=0, patience=patience, look=lambda: looks.append(0) or 1.0, split=False,
            progress=True)  # fmt: skip

    go(patience=0)
    assert not looks
    go(patience=1)
    assert looks
