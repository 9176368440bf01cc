"""Teacher trajectories of Sig-DEG: the law of signatures, coarsening, labels, folders, input validation."""

import pytest
import torch
from mixture_cases import EDM, GRID, MIXTURE, shifted

import fewstep as fs
from fewstep.errors import InputError
from fewstep.learned.sigdeg.distill import along


def make(count=32, problem=MIXTURE, **options):
    options = {"event_shape": (1,), "substeps": 4, "levy": "K"} | options
    return fs.make_trajectories(problem, GRID, count=count, **options)


@pytest.mark.parametrize("teacher", [fs.EulerMaruyama(), fs.SEA(), fs.ShARK(), fs.SRA1()], ids=str)
def test_teacher_is_the_fine_sampler_on_its_signatures(teacher):
    """With one substep the coarse signatures are the teacher's own: its plan on them gives its knots."""
    data = make(substeps=1, teacher=teacher)
    some, plan = data.pick(torch.arange(32)), teacher.plan(GRID)
    states = along(MIXTURE, plan, some)
    ends = states[plan.nfe // 4 - 1 :: plan.nfe // 4]
    torch.testing.assert_close(ends, some.knots[1:], rtol=1e-5, atol=1e-5)


def test_signatures_are_standard_normals_at_every_coarseness():
    """Covariances of 20,000 draws within 5 standard errors of the unit matrix: level 1e-5 for all of them."""
    data = make(20_000, substeps=3)
    for some in (data, data.coarsen(2), data.coarsen(4)):
        xi = some.pick(torch.arange(20_000)).xi.squeeze(-1)
        for z in xi:
            assert (torch.cov(z.T) - torch.eye(3)).abs().max() < 5 * 2**0.5 / 20_000**0.5
    assert len(some.sigmas) == 2


def test_coarsening_keeps_knots_and_joins_increments():
    data = make(substeps=2)
    few, all_ = (d.pick(torch.arange(32)) for d in (data.coarsen(2), data))
    assert torch.equal(few.knots, all_.knots[::2])
    h = (GRID**-2).diff().tolist()
    W = all_.xi[0, :, 0] * h[0] ** 0.5 + all_.xi[1, :, 0] * h[1] ** 0.5
    torch.testing.assert_close(few.xi[0, :, 0], W / (h[0] + h[1]) ** 0.5)


def test_coarsen_accepts_chosen_levels():
    data, index = make(substeps=2), torch.arange(32)
    some, twice, full = (d.pick(index) for d in (data.coarsen([0, 1, 4]), data.coarsen(2), data))
    assert torch.equal(some.knots, full.knots[[0, 1, 4]])
    torch.testing.assert_close(some.xi[0], full.xi[0])
    again = data.coarsen([0, 2, 3, 4]).coarsen([0, 1, 3])  # indices of the levels that are left
    assert torch.equal(again.sigmas, data.coarsen(2).sigmas)
    torch.testing.assert_close(again.pick(index).xi, twice.xi)


@pytest.mark.parametrize("keep", [0, 3, [0, 2], [1, 4], [0, 3, 2, 4], [0, 2, 2, 4], [], 2.5])
def test_coarsen_rejects_invalid_levels(keep):
    with pytest.raises(fs.InputError, match="keep: got"):
        make(substeps=2).coarsen(keep)


def test_pick_selects_by_index_over_blocks():
    data = make(600)
    some, index = data.pick(torch.arange(600)), torch.tensor([599, 3, 300, 3])
    assert len(data.blocks) == 3
    assert torch.equal(data.pick(index).knots, some.knots[:, index])
    assert torch.equal(data.pick(index).xi, some.xi[:, index])


def test_trajectory_does_not_depend_on_the_count():
    few, many = make(300), make(600)
    index = torch.tensor([0, 255, 256, 299])
    assert torch.equal(few.pick(index).knots, many.pick(index).knots)
    assert torch.equal(few.pick(index).xi, many.pick(index).xi)
    for bad in ([-1], [300], []):
        with pytest.raises(InputError, match="index: got"):
            few.pick(torch.tensor(bad, dtype=torch.long))


def test_labels_belong_to_their_trajectories():
    labels = torch.arange(32) % 3 * 10
    data = make(problem=shifted, labels=labels)
    some = data.pick(torch.tensor([5, 1]))
    assert some.labels.tolist() == [20, 10]
    assert ((some.knots[-1].squeeze() - some.labels).abs() < 3).all()


def test_folder_gives_the_same_data_and_rejects_other_calls(tmp_path):
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
    labelled = dict(folder=tmp_path / "labelled", problem=shifted)
    make(300, **labelled, labels=torch.arange(300) % 2)
    with pytest.raises(InputError, match="another labels"):
        make(300, **labelled, labels=torch.arange(300) // 2 % 2)
    (tmp_path / "trajectories.json").rename(tmp_path / "away.json")
    with pytest.raises(InputError, match="describes them"):
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
    "class": (dict(teacher=fs.ShARK), r"teacher: got .*expected a solver such as fs.EulerMaruyama\(\)"),
    "word": (dict(teacher="ShARK"), "teacher: got 'ShARK'"),
    "labels": (dict(labels=torch.arange(32)), "labels: got labels for a DiffusionModel"),
    "seed": (dict(seed=None), "seed: got None"),
    "event": (dict(event_shape=4), "shape: got 4"),
}


@pytest.mark.parametrize(("options", "match"), BAD.values(), ids=BAD)
def test_invalid_input_is_rejected(options, match):
    with pytest.raises(InputError, match=match):
        make(**options)


def test_non_finite_teacher_is_named():
    with pytest.raises(fs.NonFiniteError, match="teacher EulerMaruyama"):
        make(problem=fs.DiffusionModel(lambda x, s: x / 0, EDM))


def test_grid_that_ends_at_zero_is_rejected():
    with pytest.raises(InputError, match="ends in 0"):
        fs.make_trajectories(MIXTURE, fs.sigma_grid(EDM, 4), count=32, event_shape=(1,), substeps=2)
