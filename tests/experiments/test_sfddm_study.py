"""The studies of SFDDM: their runs, their costs, and what goes on where it was stopped."""

import math
import warnings

import pytest
import torch

import fewstep as fs
from experiments import names, sfddm_digits, sfddm_mnist, sfddm_tools
from experiments.sfddm_tools import COPIED, DISPLACED, HALVED, PLAIN, PUBLISHED
from fewstep_analysis import Record, teachers


def test_the_study_of_digits_runs_on_a_smoke_budget(tmp_path, monkeypatch):
    lines = sfddm_digits.run(tmp_path, budget="smoke")
    data = Record.load(tmp_path / "records" / "sfddm-digits.json").data
    rows = {(r["way"], r["steps"]): r for r in data["rows"]}
    assert {(way, n) for n in (16, 4) for way in (PLAIN, PUBLISHED, DISPLACED, HALVED)} <= set(rows)
    # the teacher's weights have no loss to leave, dropout or not, and sample as the teacher does
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
    for name in ("sfddm-digits.svg", "sfddm-digits.png"):
        assert (tmp_path / "figures" / name).exists()
    assert (
        lines == sfddm_digits.markdown(Record.load(tmp_path / "records" / "sfddm-digits.json")).splitlines()
    )

    def never(**_):
        raise AssertionError("what lies finished is not trained again")

    monkeypatch.setattr(fs, "distill_sfddm", never)
    again = sfddm_digits.study("smoke", 0, tmp_path / "work" / "sfddm-digits-smoke-0").data
    assert again["rows"] == data["rows"]


def test_both_are_studies_of_the_command():
    assert {"sfddm-digits", "sfddm-mnist"} <= set(names())
    assert "sfddm-tools" not in names()


def test_the_table_is_the_teachers_range_even_in_log_sigma_and_its_last_level_is_no_ones_fault():
    table = sfddm_digits.table()
    assert (len(table.log_sigmas), table.sigma_min) == (1024, pytest.approx(teachers.DIGITS.sigma_min))
    assert table.sigma_max == pytest.approx(teachers.DIGITS.sigma_max)
    torch.testing.assert_close(table.log_sigmas.diff(), table.log_sigmas.diff()[0].expand(1023))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the teacher's own samples begin there too
        sfddm_tools.on_phi(teachers.digits().denoiser, table, 4)


def test_targets_are_made_of_64_steps_or_more():
    assert [sfddm_digits.substeps(n) for n in (128, 64, 16, 8, 4, 3)] == [4, 4, 4, 8, 16, 22]


def test_a_stopped_training_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    problem, table = teachers.digits(), sfddm_digits.table()
    options = dict(data=torch.rand(32, 1, 8, 8), iterations=4, batch=8, every=2, seed=1, substeps=2)
    whole = sfddm_tools.distil(DISPLACED, problem.denoiser, table, 4, tmp_path / "a", **options)
    save = fs.SFDDM.save

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(fs.SFDDM, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        sfddm_tools.distil(DISPLACED, problem.denoiser, table, 4, tmp_path / "b", **options)
    assert sfddm_tools._done(tmp_path / "b" / "sfddm-4.training") == 4
    monkeypatch.setattr(fs.SFDDM, "save", save)
    again = sfddm_tools.distil(DISPLACED, problem.denoiser, table, 4, tmp_path / "b", **options)
    for a, b in zip(whole.student.network.parameters(), again.student.network.parameters(), strict=True):
        assert torch.equal(a, b)
    assert again.evaluations == whole.evaluations == 4 * 8 * 3


def test_an_arc_keeps_the_length_of_noise_and_the_ends():
    a, b = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0)).unbind()
    arc = sfddm_tools.slerp(a, b, 5)
    assert arc.shape == (5, 1, 28, 28)
    torch.testing.assert_close(arc[0], a)
    torch.testing.assert_close(arc[-1], b)
    unit = sfddm_tools.slerp(a / a.norm(), b / b.norm(), 5).flatten(1)
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(5))
    torch.testing.assert_close((unit[1:] * unit[:-1]).sum(1), (unit[0] @ unit[1]).expand(4))


def test_pictures_survive_a_record_to_the_grey_level():
    x = 2.2 * torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)) - 1.1
    back = sfddm_tools.unpacked(sfddm_tools.packed(x))
    assert (back - x.clamp(-1, 1)).abs().max() <= 1 / 255 + 1e-6


@pytest.mark.slow
def test_the_study_of_mnist_runs_with_any_network(tmp_path, monkeypatch):
    """A small U-Net with weights of chance in the teacher's place, and noise for data."""
    pytest.importorskip("diffusers")
    from fewstep_analysis import datasets, mnist_teacher

    torch.manual_seed(0)
    net = mnist_teacher.unet([16, 16, 16], 1, 8, 8).eval().requires_grad_(False)
    monkeypatch.setattr(mnist_teacher, "network", lambda *a: net)
    real, labels = torch.rand(64, 1, 28, 28) * 2 - 1, torch.arange(64) % 10
    monkeypatch.setattr(datasets, "mnist", lambda *a: (real, labels, real, labels))
    one = sfddm_mnist.train("halving-16", tmp_path, budget="smoke")
    assert (tmp_path / "work" / "sfddm-mnist-smoke-0" / "halving-32" / "training.json").exists()
    assert len(one.student.process.phi) == 16
    lines = sfddm_mnist.run(tmp_path, budget="smoke")
    data = Record.load(tmp_path / "records" / "sfddm-mnist.json").data
    rows = {(r["way"], r["steps"]): r for r in data["rows"]}
    assert rows[HALVED, 8]["evaluations"] == 3 * 2 * 3
    assert rows[DISPLACED, 8]["evaluations"] == 2 * 7
    assert rows["fine", 0]["rmse"] == 0
    assert rows[PLAIN, 4]["to_plain"] == 0 < rows[DISPLACED, 4]["to_plain"]
    assert math.isclose(data["gains"]["4"], rows[PLAIN, 4]["frechet"] / rows[DISPLACED, 4]["frechet"])
    assert [r["steps"] for r in data["folds"]] == [8]
    for name in ("sfddm-mnist.svg", "sfddm-mnist.png", "sfddm-mnist-arc.png"):
        assert (tmp_path / "figures" / name).exists()
    assert any("one fold takes" in line for line in lines)
    with pytest.raises(fs.InputError, match="Did you mean 'halving-16'"):
        sfddm_mnist.train("halving-17", tmp_path, budget="smoke")
