"""What the D-ODE studies and `fewstep distill dode` share: models by name, solvers by name, a bench."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewstep as fs
from fewstep import _validation
from fewstep.errors import one_of
from fewstep.learned.dode.distill import DODEReport
from fewstep_analysis import diffusion_problems, teachers
from fewstep_analysis.sampler_work import SOLVERS, letters, plan_of

Problem = fs.DiffusionModel | Callable[[Tensor], fs.DiffusionModel]
COUNTS = (3, 5, 8, 10, 20)
UNTRAINED, GREEDY, TERMS, GLOBAL, GRID = (
    "untrained", "greedy, 1 term", "greedy, 3 terms", "global, 3 terms", "grid and weights",
)  # fmt: skip
KINDS = (UNTRAINED, GREEDY, TERMS, GLOBAL, GRID)
SPACINGS = ("logsnr", "karras", "uniform")
PEERS: dict[str, Any] = {
    "DPM-Solver++": ("DPMSolverPP(2)", "DPMSolverPP(3)"), "UniPC": ("UniPC(2)", "UniPC(3)"),
    "DEIS": ("DEIS(2)", "DEIS(3)"), "iPNDM": ("IPNDM(2)", "IPNDM(3)", "IPNDM(4)"),
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A model with what a fit asks beside it."""

    name: str
    problem: Problem
    schedule: Any
    event: tuple[int, ...]
    classes: int = 0
    dtype: torch.dtype = torch.float64

    def noise(self, n: int, seed: int) -> Tensor:
        """(n, *event) start states at the schedule's largest level."""
        generator = torch.Generator().manual_seed(seed)
        first = torch.tensor(self.schedule.sigma_max, dtype=torch.float64)
        size = float(first * self.schedule.alpha(first))
        return size * torch.randn((n, *self.event), generator=generator, dtype=self.dtype)

    def labels(self, n: int, seed: int) -> Tensor | None:
        """(n,) in equal shares and random order, where the model has classes."""
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed + 7))
        return order % self.classes if self.classes else None

    def at(self, labels: Tensor | None) -> fs.DiffusionModel:
        """The model that holds these labels."""
        if isinstance(self.problem, fs.DiffusionModel):
            return self.problem
        assert labels is not None
        return self.problem(labels)


def _mixture(name: str, device: str = "cpu") -> Task:
    found = diffusion_problems.by_name(name)
    return Task(name, found.problem, found.schedule, (found.mixture.means.shape[1],))


def _digits(device: str) -> Task:
    problem = teachers.digits(device)
    return Task("digits", problem, problem.schedule, (1, 8, 8), dtype=torch.float32)


def mnist(device: str = "cpu", guidance: float = 1.0) -> Task:
    """The MNIST U-Net with a class a sample; it is weak without."""
    from fewstep_analysis import mnist_teacher

    net = mnist_teacher.network().to(device)
    made = lambda y: mnist_teacher.problem(y, guidance=guidance, net=net)  # noqa: E731
    name = "mnist" if guidance == 1 else "mnist_guided"
    return Task(name, made, mnist_teacher.schedule(), (1, 28, 28), classes=10, dtype=torch.float32)


TASKS: dict[str, Callable[[str], Task]] = {
    **{n: partial(_mixture, n) for n in diffusion_problems.PROBLEMS},
    "digits": _digits,
    "mnist": mnist,
    "mnist_guided": partial(mnist, guidance=3.0),
}


def task(name: str, device: str = "cpu") -> Task:
    """The model of that name."""
    if name not in TASKS:
        raise one_of("problem", name, TASKS)
    return TASKS[name](device)


MORE: dict[str, tuple[fs.DiffusionSolver, int]] = {
    "DPMSolver": (fs.DPMSolver(2), 2), "DPMSolver(1)": (fs.DPMSolver(1), 1),
    "DPMSolver(2M)": (fs.DPMSolver(2, multistep=True), 1),
    "DPMSolver(3M)": (fs.DPMSolver(3, multistep=True), 1),
    "DPMSolverPP": (fs.DPMSolverPP(2), 1), "DPMSolverPP(1)": (fs.DPMSolverPP(1), 1),
    "DEIS": (fs.DEIS(), 1), "IPNDM": (fs.IPNDM(), 1), "UniPC": (fs.UniPC(), 1), "PNDM": (fs.PNDM("plms"), 1),
}  # fmt: skip


def solver(name: str) -> tuple[fs.DiffusionSolver, int]:
    """A base by its name, `DPMSolverPP(2)` or `dpm_solver_pp:2`, and its evaluations an interval."""
    known = {letters(n): s for n, s in (SOLVERS | MORE).items()}
    if letters(name) not in known:
        raise one_of("base", name, [*SOLVERS, *MORE])
    return known[letters(name)]


@dataclass
class Bench:
    """Start states to fit to and others to be judged on, with the exact ODE's ends."""

    task: Task
    fitted: Tensor
    test: Tensor
    labels: Tensor | None
    test_labels: Tensor | None
    exact: Tensor
    rows: list[dict[str, Any]] = field(default_factory=list)
    made: dict[tuple[str, str, int], Any] = field(default_factory=dict)  # what the rows measured

    @classmethod
    def of(cls, task: Task, fit: int, test: int, seed: int, steps: int = 400) -> Bench:
        """`exact` is UniPC(3) on that many steps even in log sigma."""
        noise, others = task.noise(fit, seed), task.noise(test, seed + 99)
        labels, other_labels = task.labels(fit, seed), task.labels(test, seed + 99)
        bench = cls(task, noise, others, labels, other_labels, others)
        bench.exact = bench.sample(fs.UniPC(3), steps=steps)
        return bench

    @torch.no_grad()
    def sample(self, solver: Any, batch: int = 512, **grid: Any) -> Tensor:
        """The ends of the test states."""
        parts = []
        for index in torch.arange(len(self.test)).split(batch):
            labels = None if self.test_labels is None else self.test_labels[index]
            parts.append(fs.sample(self.task.at(labels), solver, noise=self.test[index], **grid))
        return torch.cat(parts)

    def rmse(self, ends: Tensor) -> float:
        """Per element of an image, of the whole vector for points."""
        gap = (ends - self.exact).double().square().flatten(1)
        return float((gap.mean(1) if len(self.task.event) > 1 else gap.sum(1)).mean().sqrt())

    def fit(
        self, base: str, n: int, spacing: str = "logsnr", **options: Any
    ) -> tuple[fs.DODE, DODEReport] | None:
        """A table of n evaluations or of the most below it; None where the base has none."""
        plan = plan_of(*_solver_of(base, n), spacing, self.task.schedule)
        if plan is None:
            return None
        return fs.distill_dode(
            self.task.problem, solver(base)[0], noise=self.fitted, labels=self.labels, sigmas=plan.sigmas,
            **options,
        )  # fmt: skip

    def note(self, base: str, kind: str, n: int, made: Any, seconds: float = 0.0, **more: Any) -> Tensor:
        """Measure a solver and keep the row."""
        ends = self.sample(made)
        self.made[base, kind, n] = made
        row = {"base": base, "kind": kind, "budget": n, "evaluations": getattr(made, "plan", made).nfe}
        self.rows.append(row | {"rmse": self.rmse(ends), "seconds": round(seconds, 2)} | more)
        return ends

    def learned(
        self, base: str, n: int, kinds: dict[str, dict[str, Any]], spacing: str = "logsnr"
    ) -> dict[str, Tensor]:
        """The base and each way of fitting it; returns the ends by kind."""
        plan = plan_of(*_solver_of(base, n), spacing, self.task.schedule)
        if plan is None:
            return {}
        ends = {UNTRAINED: self.note(base, UNTRAINED, n, plan)}
        for kind, options in kinds.items():
            began = time.process_time()  # of this program alone: the machine may have others
            made = self.fit(base, n, spacing, **options)
            assert made is not None
            student, report = made
            seconds = time.process_time() - began
            fallback = {"fallback": report.fallback} if report.fallback else {}
            ends[kind] = self.note(base, kind, n, student, seconds, **fallback)
        return ends

    def peers(
        self, n: int, peers: dict[str, Any] = PEERS, spacings: Sequence[str] = SPACINGS,
        scout: Bench | None = None, kind: str = "best untrained",
    ) -> None:  # fmt: skip
        """Each family's best of its orders and of the spacings.

        Chosen on the scout's start states; without one on the very noise it is judged on.
        """
        on = scout or self
        for family, names in peers.items():
            found = []
            for name in names:
                for spacing in spacings:
                    plan = plan_of(*_solver_of(name, n), spacing, self.task.schedule)
                    if plan is not None and plan.nfe == n:
                        found.append((on.rmse(on.sample(plan)), name, spacing, plan))
            error, name, spacing, plan = min(found, key=lambda f: f[:3])
            self.made[family, kind, n] = plan
            error = self.rmse(self.sample(plan)) if scout else error
            row = {"base": family, "kind": kind, "budget": n, "evaluations": n, "rmse": error}
            self.rows.append(row | {"seconds": 0.0, "which": f"{name}, {spacing}"})


def _solver_of(name: str, n: int) -> tuple[fs.DiffusionSolver, int, int]:
    """In the order of `plan_of`'s arguments."""
    found, per_step = solver(name)
    return found, n, per_step  # type: ignore[return-value]


def table(rows: Iterable[dict[str, Any]], kinds: Sequence[str], counts: Sequence[int]) -> str:
    """Markdown: a row a base and count, a column a kind."""
    known = {(r["base"], r["kind"], r["budget"]): r for r in rows}
    bases = list(dict.fromkeys(b for b, kind, _ in known if kind in kinds))
    lines = ["| base | evaluations | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 2) + "|"]
    for base in bases:
        for n in counts:
            found = [known.get((base, kind, n)) for kind in kinds]
            made = next((r["evaluations"] for r in found if r), None)
            if made is not None:
                lines.append(f"| {base} | {made} | " + " | ".join(map(_cell, found)) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    return "base" if row.get("fallback") else f"{row['rmse']:.2g}"


def distil(
    problem: str, base: str, out: Path, *, steps: int, samples: int, seed: int, device: str = "cpu",
    **options: Any,
) -> tuple[fs.DODE, DODEReport]:  # fmt: skip
    """What `fewstep distill dode` does: fit, and write the table."""
    _validation.check_device(device)
    if not out.parent.is_dir():
        raise fs.InputError(f"out: got {out}, whose folder does not exist; make it first.")
    asked, chosen = task(problem, device), solver(base)[0]
    noise, labels = asked.noise(samples, seed), asked.labels(samples, seed)
    options |= {"seed": seed} if options.get("refine") else {}
    student, report = fs.distill_dode(
        asked.problem, chosen, noise=noise.to(device), steps=steps, progress=True,
        labels=None if labels is None else labels.to(device),
        note={"problem": problem, "seed": seed}, **options,
    )  # fmt: skip
    student.save(out)
    return student, report


def words(report: DODEReport) -> list[str]:
    """A report for people."""
    rows = [f"{r:.3f}" if k else "base's" for r, k in zip(report.r2, report.kept)]
    out = [
        f"R^2 by row: {' '.join(rows)}",
        f"held-out RMSE to the teacher: {report.student_rmse:.4g}, of the base {report.base_rmse:.4g}",
        f"{report.evaluations} evaluations a start state, {report.seconds:.1f} s",
    ]
    return [*out, f"fallback to the base: {report.fallback}"] if report.fallback else out


def document(student: fs.DODE, report: DODEReport) -> dict[str, Any]:
    """A report for programs."""
    kappa = [[None if k != k else k for k in row] for row in student.kappa.tolist()]
    return {**vars(report), "words": student.words, "kappa": kappa}
