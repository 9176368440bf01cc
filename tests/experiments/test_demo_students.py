"""The training of the demo's students at smoke budget."""

import pytest
import torch

import demo_students as recipe
import fewstep as fs
from fewstep_analysis import demo_students, problems, teachers


@pytest.mark.slow
def test_recipe_writes_the_students_that_the_demo_loads(run, tmp_path):
    record = run(recipe, trajectories=64, fresh=64)["demo-students"]
    (work,) = (tmp_path / "work").iterdir()
    student = demo_students.sampler(work / demo_students.FILES["digits"])
    assert next(student.network.parameters()).dtype == torch.float32
    assert record.data["levels"] == student.plan.sigmas.tolist() == demo_students.levels().tolist()
    assert student.plan.fit.notes["commit"] == record.made["commit"]
    with torch.no_grad():
        assert fs.sample(teachers.digits(), student, shape=(2, 1, 8, 8), seed=0).isfinite().all()
    step = demo_students.step(work / demo_students.FILES["step"])
    y0 = torch.full((4, 1), 0.4, dtype=torch.float64)
    assert fs.solve(problems.sine().sde, step, y0, torch.linspace(0, 1, 9), seed=0).y.isfinite().all()
