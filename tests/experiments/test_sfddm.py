"""The SFDDM experiments: their runs, costs, and resuming."""

import math
import warnings
from dataclasses import replace

import pytest
import torch

import fewstep as fs
import sfddm_digits
import sfddm_mnist
import sfddm_training
from fewstep_analysis import teachers
from sfddm_training import COPIED, DISPLACED, HALVED, PLAIN, PUBLISHED


@pytest.mark.slow
def test_digits(run, monkeypatch):
    data = run(sfddm_digits)["sfddm-digits"].data
    rows = {(r["way"], r["steps"]): r for r in data["rows"]}
    assert {(way, n) for n in (16, 4) for way in (PLAIN, PUBLISHED, DISPLACED, HALVED)} <= set(rows)
    # the teacher's weights already minimise the published loss, and sample as the teacher does
    assert data["copied_loss"] == 0
    assert rows[COPIED, 16]["to_plain"] == 0
    assert rows[COPIED, 16]["sliced_w2"] == rows[PLAIN, 16]["sliced_w2"]
    # samples through networks: iterations x batch x (student + teacher), and the sum of halving's folds
    assert rows[PUBLISHED, 4]["evaluations"] == 3 * 16 * 2
    assert rows[DISPLACED, 4]["evaluations"] == 2 * 16 * (1 + 16)
    assert rows[HALVED, 32]["evaluations"] == 2 * 16 * 3
    assert rows[HALVED, 4]["evaluations"] == 4 * 2 * 16 * 3
    assert [r["steps"] for r in data["folds"]] == [4, 16]
    assert data["folds"][0]["evaluations"] == 17 / 12
    # finished students are not trained again
    monkeypatch.setattr(fs, "distill_sfddm", None)
    assert run(sfddm_digits)["sfddm-digits"].data["rows"] == data["rows"]


def test_schedule_covers_teacher_range_evenly_in_log_sigma():
    table = sfddm_digits.schedule()
    assert (len(table.log_sigmas), table.sigma_min) == (1024, pytest.approx(teachers.DIGITS.sigma_min))
    assert table.sigma_max == pytest.approx(teachers.DIGITS.sigma_max)
    torch.testing.assert_close(table.log_sigmas.diff(), table.log_sigmas.diff()[0].expand(1023))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no warning about the last level, where the teacher starts too
        sfddm_training.on_phi(teachers.digits().denoiser, table, 4)


def test_displacement_takes_at_least_64_teacher_steps():
    for steps in (2, 5, 8, 64, 128):
        assert steps * sfddm_digits.substeps(steps) >= 64
        assert sfddm_digits.substeps(steps) >= 4


def test_resumed_training_equals_uninterrupted_training(tmp_path, monkeypatch):
    denoiser, table = teachers.digits().denoiser, sfddm_digits.schedule()
    training = fs.TrainingOptions(4, 8, 1e-3, checkpoint_every=2)
    options = {"data": torch.zeros(8, 1, 8, 8), "seed": 1}

    def distil(folder):
        return sfddm_training.distil(DISPLACED, denoiser, table, 4, folder, training, 2, **options)

    full, save = distil(tmp_path / "a"), fs.SFDDM.save

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(fs.SFDDM, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        distil(tmp_path / "b")
    assert sfddm_training.finished(tmp_path / "b" / "sfddm-4.training") == 4
    monkeypatch.setattr(fs.SFDDM, "save", save)
    resumed = distil(tmp_path / "b")
    for a, b in zip(full.student.network.parameters(), resumed.student.network.parameters(), strict=True):
        assert torch.equal(a, b)
    assert resumed.evaluations == full.evaluations == 4 * 8 * 3


def test_slerp_keeps_norm_and_ends():
    a, b = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0)).unbind()
    arc = sfddm_training.slerp(a, b, 5)
    assert arc.shape == (5, 1, 28, 28)
    torch.testing.assert_close(arc[0], a)
    torch.testing.assert_close(arc[-1], b)
    unit = sfddm_training.slerp(a / a.norm(), b / b.norm(), 5).flatten(1)
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(5))
    torch.testing.assert_close((unit[1:] * unit[:-1]).sum(1), (unit[0] @ unit[1]).expand(4))


@pytest.mark.slow
def test_mnist_with_any_network(run, any_network):
    data = run(sfddm_mnist)["sfddm-mnist"].data
    rows = {(r["way"], r["steps"]): r for r in data["rows"]}
    assert rows[HALVED, 8]["evaluations"] == 3 * 2 * 3
    assert rows[DISPLACED, 8]["evaluations"] == 2 * 7
    assert rows["fine", 0]["rmse"] == 0
    assert rows[PLAIN, 4]["to_plain"] == 0 < rows[DISPLACED, 4]["to_plain"]
    assert math.isclose(data["gains"]["4"], rows[PLAIN, 4]["frechet"] / rows[DISPLACED, 4]["frechet"])
    assert [r["steps"] for r in data["folds"]] == [8]


def test_fold_of_halving_starts_from_the_one_before(tmp_path, any_network):
    from base import Job

    budget = replace(sfddm_mnist.BUDGETS["smoke"], students=("halving-32", "halving-16"))
    made = sfddm_mnist.train(budget, Job(0, "cpu", tmp_path))
    assert len(made[HALVED, 16].student.process.phi) == 16
    assert made[HALVED, 16].evaluations == 2 * made[HALVED, 32].evaluations
