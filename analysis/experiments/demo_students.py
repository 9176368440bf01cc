"""The students that `fewstep demo` is shipped with: 5 steps for the digits teacher's 300, and a step of an SDE.

Both are trained for longer than `fewstep demo --train` does. The weights are written to the folder of the
checkpoints, in half precision (the sampler) and in float64 (the step); copy them to
analysis/fewstep_analysis/weights. On fresh noise the student is compared with its teacher in single and in half
precision, and with the teacher's sampler at the student's levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

import fewstep as fs
from base import Experiment, Job, Record, Records, Row, single_threaded, table
from fewstep.distances import sliced_w2
from fewstep.learned.sigdeg.distill import along
from fewstep.learned.table.report import Errors
from fewstep.learned.trajectories import Batch
from fewstep_analysis import demo_students, problems, teachers
from fewstep_analysis.records import provenance

NAME = "demo-students"


@dataclass(frozen=True)
class Budget:
    """The sampler's training, the step's, and the fresh trajectories of the comparison."""

    trajectories: int
    iterations: int
    patience: int
    step_trajectories: int
    step_iterations: int
    fresh: int


BUDGETS = {
    "smoke": Budget(256, 4, 0, 256, 4, 256),
    "paper": Budget(24576, 8000, 12, 8192, 1200, 4096),
}


def measure(budget: Budget, job: Job) -> dict[str, Record]:
    """Train both students, write them, and compare the sampler with its teacher."""
    single_threaded()
    job.work.mkdir(parents=True, exist_ok=True)
    problem, made = teachers.digits(job.device), provenance(job.device)
    notes = {"made by": "analysis/experiments/demo_students.py", "seed": job.seed, "commit": made["commit"]}
    training = fs.TrainingOptions(
        budget.iterations, ema_decay=0.999, early_stopping_patience=budget.patience, checkpoint_every=250
    )
    student, report = demo_students.train_sampler(
        problem, trajectories=budget.trajectories, training=training, seed=job.seed, folder=job.work,
        device=job.device, notes=notes,
    )  # fmt: skip
    file = demo_students.save_half(student, job.work / demo_students.FILES["digits"])
    half = demo_students.sampler(file)
    step, step_report = demo_students.train_step(
        problems.sine().sde, trajectories=budget.step_trajectories,
        training=fs.TrainingOptions(budget.step_iterations), seed=job.seed,
    )  # fmt: skip
    step.save(job.work / demo_students.FILES["step"])
    samplers = {"untrained, the student's levels": student.plan, "student": student, "student, half precision": half}
    data = {
        "budget": vars(budget), "levels": student.plan.sigmas.tolist(), "bytes": file.stat().st_size,
        "rows": compared(problem, samplers, budget.fresh, job), "sampler": vars(report), "step": vars(step_report),
    }  # fmt: skip
    return {NAME: Record(NAME, data, job.seed, made)}


@torch.no_grad()
def compared(problem: fs.DiffusionModel, samplers: dict[str, Any], count: int, job: Job) -> list[Row]:
    """Distances to the teacher's ends on trajectories that were not trained on, and between the laws."""
    grid = fs.sigma_grid(problem.schedule, demo_students.FINE, final="sigma_min")
    data = fs.make_trajectories(
        problem, grid, count=count, event_shape=demo_students.EVENT, seed=job.seed + 1, levy="K",
        substeps=demo_students.TEACHER_STEPS // demo_students.FINE, device=job.device,
    ).coarsen(demo_students.KEPT)  # fmt: skip
    some: Batch = data.pick(torch.arange(len(data))).to(job.device)
    teacher, half = some.knots[-1], count // 2
    rows = []
    for name, solver in samplers.items():
        ends = along(problem, solver, some)[-1]
        errors = Errors.of((ends - teacher).double().square().flatten(1).mean(1).cpu())
        rows.append({
            "sampler": name, "rmse": errors.rmse, "rmse_se": errors.rmse_se,
            "sliced_w2": sliced_w2(ends[:half], teacher[half:]),
            "variance_ratio": float(ends.double().var(0).sum() / teacher.double().var(0).sum()),
        })  # fmt: skip
    floor = {"sampler": "teacher, other noise", "sliced_w2": sliced_w2(teacher[:half], teacher[half:])}
    return [*rows, floor]


def tables(records: Records) -> dict[str, str]:
    """The comparison of the shipped sampler with its teacher."""
    rows = []
    for r in records[NAME].data["rows"]:
        distance = f"{r['rmse']:.4f} ± {r['rmse_se']:.4f}" if "rmse" in r else None
        ratio = f"{r['variance_ratio']:.3f}" if "rmse" in r else None
        rows.append([r["sampler"], distance, f"{r['sliced_w2']:.4f}", ratio])
    head = ["sampler", "RMSE to the teacher, same noise", "sliced W2 to the teacher, other noise", "variance ratio"]
    return {NAME: table(head, rows)}


EXPERIMENT = Experiment(NAME, __doc__ or "", 20, BUDGETS, measure, tables)

if __name__ == "__main__":
    EXPERIMENT.main()
