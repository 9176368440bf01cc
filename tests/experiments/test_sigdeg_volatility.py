"""The rough volatility experiment: its coding of paths, its untrained student, verdicts, a small run."""

import pytest
import torch

import fewstep as fs
import sigdeg_volatility as experiment
from fewstep.learned.sigdeg.networks import DenoisingMLP


def test_events_have_unit_size_and_decode_to_their_paths():
    paths = experiment.exact(experiment.SETS["rough"], 2000, seed=3)
    coding = experiment.Coding.of(paths)
    events = coding.encode(paths)
    assert events.shape == (2000, *experiment.EVENT)
    assert events.dtype == torch.float32
    assert events.std((0, 2)).tolist() == pytest.approx([1, 1], abs=0.01)
    for found, truth in zip(coding.decode(events), (paths.log_price, paths.variance), strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-6)


def test_untrained_student_reproduces_its_parent():
    torch.manual_seed(0)
    teacher, levels = DenoisingMLP(experiment.EVENT, 32, 1), experiment.grid()
    torch.nn.init.normal_(teacher.leave.weight)
    problem = fs.DiffusionModel(teacher, experiment.SCHEDULE)
    student, _ = fs.distill_sigdeg(
        problem, event_shape=experiment.EVENT, sigmas=levels, levy=experiment.LEVY,
        network=experiment.Stepwise(teacher, 3, levels[:-1]),
        training=fs.TrainingOptions(1, learning_rate=0.0),
        teacher_options=fs.TeacherOptions(substeps=1, trajectories=16),
    )  # fmt: skip
    ours, parent = (experiment.draw_samples(problem, s, 8, 1) for s in (student, fs.EulerMaruyama().plan(levels)))
    torch.testing.assert_close(ours, parent)


def test_teacher_grid_contains_student_grid():
    assert torch.equal(experiment.grid(20)[::20], experiment.grid())


@pytest.mark.parametrize(
    ("student", "teacher", "verdict"),
    [(1.2, 1.0, "met"), (1.3, 1.0, "missed"), (0.4, 0.3, "within noise"), (0.6, 0.3, "missed")],
)
def test_verdicts(student, teacher, verdict):
    errors = {
        k: {"price": {"error": e, "noise": 0.5}}
        for k, e in ((experiment.STUDENT, student), (experiment.TEACHER, teacher), (experiment.EXACT, 0.2))
    }
    assert experiment.verdict(errors, "price") == verdict


@pytest.mark.slow
def test_small_run(run):
    records = run(experiment, iterations=2, distillation=2, trajectories=16, paths=200)
    found = records["sigdeg-volatility"].data["sets"]
    assert set(found) == set(experiment.SETS)
    for one in found.values():
        assert set(one["ratio"]) == set(one["verdict"]) == set(experiment.STATISTICS)
        # ten untrained steps are much farther off than exact paths
        errors = [one["errors"][k]["variance"]["error"] for k in (experiment.UNTRAINED, experiment.EXACT)]
        assert errors[0] > errors[1]
