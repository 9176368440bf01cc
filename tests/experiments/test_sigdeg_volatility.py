"""The rough volatility study: its coding of paths, its student at birth, its verdicts, and a tiny run."""

import dataclasses

import pytest
import torch

import fewstep as fs
from experiments import names
from experiments import sigdeg_volatility as study
from fewstep.learned.sigdeg.networks import DenoisingMLP
from fewstep_analysis.records import Record

MODEL = study.SETS["rough"]


def test_events_are_of_unit_size_and_decode_to_their_paths():
    paths = study.exact(MODEL, 2000, seed=3)
    coding = study.Coding.of(paths)
    events = coding.encode(paths)
    assert events.shape == (2000, *study.EVENT)
    assert events.dtype == torch.float32
    assert events.std((0, 2)).tolist() == pytest.approx([1, 1], abs=0.01)
    for found, truth in zip(coding.decode(events), (paths.log_price, paths.variance), strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-6)


def test_the_student_is_born_equal_to_its_parent():
    torch.manual_seed(0)
    teacher = DenoisingMLP(study.EVENT, 32, 1)
    torch.nn.init.normal_(teacher.leave.weight)
    problem = fs.DiffusionModel(teacher, study.SCHEDULE)
    student, _ = fs.distill_sigdeg(
        problem, event_shape=study.EVENT, sigmas=study.grid(), teacher_steps=10, levy=study.LEVY,
        network=study.Stepwise(teacher, 3, study.grid()[:-1]), trajectories=16, iterations=1, rate=0.0,
    )  # fmt: skip
    parent = fs.EulerMaruyama().plan(study.grid())
    torch.testing.assert_close(study.draw(problem, student, 8, 1), study.draw(problem, parent, 8, 1))


def test_the_teachers_grid_holds_the_students():
    coarse, fine = study.grid(), study.grid(20)
    assert len(fine) == 201
    assert torch.equal(fine[::20], coarse)


@pytest.mark.parametrize(
    ("student", "teacher", "verdict"),
    [(1.2, 1.0, "met"), (1.3, 1.0, "missed"), (0.4, 0.3, "within noise"), (0.6, 0.3, "missed")],
)
def test_verdicts(student, teacher, verdict):
    errors = {
        k: {"price": {"error": e, "noise": 0.5}}
        for k, e in ((study.STUDENT, student), (study.TEACHER, teacher), (study.EXACT, 0.2))
    }
    assert study.judge(errors, "price") == verdict


def test_a_tiny_run(tmp_path, monkeypatch):
    assert "sigdeg-volatility" in names()
    tiny = dataclasses.replace(study.SMOKE, iterations=2, distillation=2, trajectories=16, paths=200)
    monkeypatch.setattr(study, "SMOKE", tiny)
    (text,) = study.run(tmp_path, budget="smoke", seed=1)
    found = Record.load(tmp_path / "records" / "sigdeg-volatility.json").data["sets"]
    assert set(found) == set(study.SETS)
    for one in found.values():
        assert set(one["ratio"]) == set(one["verdict"]) == set(study.NAMES)
        # untrained, ten steps are no match for exact paths
        assert (
            one["errors"][study.UNTRAINED]["variance"]["error"]
            > one["errors"][study.EXACT]["variance"]["error"]
        )
    assert text.count("| price |") == 2
    assert (tmp_path / "figures" / "sigdeg-volatility.svg").stat().st_size > 0
