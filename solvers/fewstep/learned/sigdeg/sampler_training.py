"""Sig-DEG for diffusion models: teacher data, the unrolled loss, a `SigSampler`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import _validation
from ..._serialization import make_folder
from ...brownian.increment import LEVY_ORDER
from ...errors import InputError
from ...executor import State, combine, run
from ...grid import sigma_grid
from ...plan import Plan
from ...problem import DiffusionModel
from ...resolve import evaluator_of
from ...sde.euler_maruyama import EulerMaruyama
from ...solver import DiffusionSolver
from ..labelled_model import Labelled
from ..loss_weighting import left_at_end
from ..training import Minibatch, Report, Stopwatch, fit, held_out, seeded
from ..trajectories import Batch, Trajectories, checked_levels, make_trajectories, substeps_of
from .networks import DenoisingMLP
from .student import SigSampler, fits

AT_ONCE = 8  # different steps in a minibatch of forced ones: a call of the network is told one level
LOOK = 256  # held-out trajectories at a time
SPREAD = 256  # trajectories that the knots' variances are taken from


def distill_denoising(
    problem: DiffusionModel | Labelled, *, event_shape: tuple[int, ...] | None = None, steps: int | None = None,
    teacher_steps: int = 300, teacher: DiffusionSolver | None = None, levy: str | None = None,
    head: str = "direct", feedback: bool, spacing: str = "logsnr", sigmas: Tensor | None = None,
    parent: DiffusionSolver | None = None, network: nn.Module | None = None, labels: Tensor | None = None,
    data: Trajectories | None = None, trajectories: int = 8192, forcing: float, autocast: bool,
    folder: str | Path | None = None, device: torch.device | str, seed: int, progress: bool,
    iterations: int = 2500, batch: int = 256, rate: float = 1e-3, average: float, patience: int, every: int,
) -> tuple[SigSampler, Report]:  # fmt: skip
    """See `distill_sigdeg`, which has the other defaults."""
    watch = Stopwatch()
    make_folder(folder)
    if data is None:
        grid = _coarse_grid(problem, labels, steps, spacing, sigmas)
        if event_shape is None:
            raise InputError("event_shape: got nothing; expected the shape of a sample, or data=.")
        data = make_trajectories(
            problem, grid, count=trajectories, event_shape=event_shape, labels=labels, seed=seed,
            substeps=substeps_of(len(grid) - 1, teacher_steps), teacher=teacher, levy=levy or "H",
            folder=None if folder is None else Path(folder) / "teacher", device=device, progress=progress,
        )  # fmt: skip
        watch.lap("teacher")
    levy = _levy(problem, levy, data)
    network, residual = _network(problem, data, levy, network, head, feedback, seed)
    student = SigSampler(_plan(parent, data.sigmas), network.to(device), levy, residual)
    _check_student(student, data, forcing)
    task = _Task(problem, student, data, forcing, autocast, torch.device(device), _weights(data))
    kept, held = held_out(len(data))
    parents = task.knots(held, parent=True)
    place = None if folder is None else Path(folder) / f"student-{len(data.sigmas) - 1}.training"
    losses, looks = task.fit(
        kept, held, seed=seed, progress=progress, checkpoint=place, iterations=iterations, batch=batch,
        rate=rate, average=average, patience=patience, every=every,
    )  # fmt: skip
    watch.lap("training")
    mine = task.knots(held)
    return student, Report(
        data.evaluations, len(data), parents[-1], mine[-1], losses, watch.seconds, looks,
        {"parent": parents, "student": mine},
    )  # fmt: skip


def _coarse_grid(
    problem: DiffusionModel | Labelled, labels: Tensor | None, steps: int | None, spacing: str,
    sigmas: Tensor | None,
) -> Tensor:  # fmt: skip
    if sigmas is None:
        if steps is None:
            raise InputError("steps: got None; expected steps=... or sigmas=... for the coarse grid.")
        if not isinstance(problem, DiffusionModel):
            if labels is None:
                raise InputError(
                    f"problem: got {_validation.describe(problem)} and no labels, expected fewstep.DiffusionModel(denoiser, "
                    "schedule), or a function labels -> DiffusionModel with labels=(n, ...)."
                )
            if not torch.is_tensor(labels) or labels.dim() == 0:
                raise InputError(f"labels: got {labels!r} beside a function of labels, expected a tensor.")
            problem = problem(labels[:1])
        return sigma_grid(problem.schedule, steps, spacing, "sigma_min")
    grid = checked_levels(sigmas)
    if steps not in (None, len(grid) - 1):
        raise InputError(f"steps: got {steps} beside sigmas of {len(grid) - 1} intervals; drop one of them.")
    return grid


def _plan(parent: Any, sigmas: Tensor) -> Plan:
    _validation.check_instance(
        "parent", parent, (DiffusionSolver, type(None)), "a solver such as fs.EulerMaruyama()"
    )
    return (EulerMaruyama() if parent is None else parent).plan(sigmas)


def _levy(problem: Any, levy: str | None, data: Any) -> str:
    """The letters that the network is told, if data and problem belong together."""
    if not isinstance(data, Trajectories):
        raise InputError(f"data: got {type(data).__name__}, expected what make_trajectories makes.")
    if len(data) < 16:
        raise InputError(f"data: got {len(data)} trajectories, expected at least 16: two are held out.")
    if not isinstance(problem, DiffusionModel) and not data.labelled:
        raise InputError("data: got none with labels, for a model of labels; make them with labels=.")
    if levy is None:
        return data.levy
    if LEVY_ORDER[levy] > LEVY_ORDER[data.levy]:
        raise InputError(f"levy: got {levy!r}; the trajectories hold {data.levy!r}. Make them with more.")
    return levy


def _check_student(student: SigSampler, data: Trajectories, forcing: float) -> None:
    plan, letters = student.plan, LEVY_ORDER[data.levy]
    used = (plan.stage_noise.abs() + plan.update_noise.abs()).amax((0, 1)).nonzero().flatten()
    if len(used) and int(used[-1]) >= letters:
        raise InputError(f"parent: got {plan.name}, which needs more than the {data.levy!r} of the data.")
    older = [plan.update_eval[:, 1:], plan.stage_eval, plan.stage_noise[:, 1:], plan.update_noise[:, 1:]]
    if forcing and any(bool(t.any()) for t in older):
        raise InputError(f"forcing: got {forcing} with {plan.name}, whose steps look further back.")
    fits(student.network, "data", data.some_knots(1)[0], data.event)


def _network(
    problem: DiffusionModel | Labelled, data: Trajectories, levy: str, network: nn.Module | None, head: str,
    feedback: bool, seed: int,
) -> tuple[nn.Module, bool]:  # fmt: skip
    """The network, and whether it is added to the denoiser."""
    letters = LEVY_ORDER[levy]
    if network is not None:
        _check_network(network, letters)
        return network, False
    denoiser = problem.denoiser if isinstance(problem, DiffusionModel) else None
    if isinstance(denoiser, DenoisingMLP):
        return seeded(seed, lambda: denoiser.with_signature(letters, head, feedback)), False
    small: dict[str, Any] = {"skip": False, "head": head, "feedback": feedback}
    return seeded(seed, lambda: DenoisingMLP(data.event, 128, 2, letters, **small)), True


def _check_network(network: Any, letters: int) -> None:
    if not isinstance(network, nn.Module):
        raise InputError(f"network: got {_validation.describe(network)}, expected a torch.nn.Module.")
    if getattr(network, "letters", letters) != letters:
        raise InputError(
            f"network: got one that is told {network.letters} letters of the signature, levy asks for "
            f"{letters}: 1 for 'W', 2 for 'H', 3 for 'K'."
        )


def _weights(data: Trajectories) -> Tensor:
    """(steps,) the part of a squared error at each knot that is left at the end, over the ends' variance."""
    ends = data.some_knots(SPREAD)[-1].double()
    return left_at_end(ends, data.sigmas[1:]).square() / ends.var(0).mean()


def along(problem: DiffusionModel, solver: SigSampler | Plan, some: Batch) -> Tensor:
    """(steps, n, *event) the states of a student, or of an untrained plan, along the teacher's noise."""
    plan = solver if isinstance(solver, Plan) else solver.plan
    states, supply, x = list[Tensor](), iter(some.xi), some.knots[0]
    evaluate = evaluator_of(problem, solver, x)
    run(plan, x, evaluate, lambda *_: next(supply).unbind(1), lambda i, x, D: states.append(x))
    return torch.stack(states)


@dataclass(frozen=True)
class _Task:
    """What a student is trained on, and how far it is from it."""

    problem: DiffusionModel | Labelled
    student: SigSampler
    data: Trajectories
    forcing: float
    autocast: bool
    device: torch.device
    weights: Tensor

    def fit(self, kept: Tensor, held: Tensor, **training: Any) -> tuple[list[float], list[tuple[int, float]]]:
        """Train on these trajectories, look at those; the student comes back frozen."""
        network = self.student.network
        out = fit(
            network.train(), lambda batch: self.loss(kept[batch.index], batch), len(kept),
            look=lambda: self.knots(held)[-1], words=self.words(), **training,
        )  # fmt: skip
        network.eval().requires_grad_(False)  # to train on, ask for gradients again
        return out

    def words(self) -> dict[str, Any]:
        """What a checkpoint of this training must agree with."""
        student = self.student
        return {
            "forcing": self.forcing, "autocast": self.autocast, "levy": student.levy,
            "plan": student.plan.name, "residual": student.residual, "data": self.data.digest(),
        }  # fmt: skip

    def loss(self, index: Tensor, batch: Minibatch) -> Tensor:
        """Mean squared distance at the knots, with the weights."""
        some = self.data.pick(index).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            if batch.share < self.forcing:
                return self._forced(some, batch.generator)
            gaps = (self._states(some) - some.knots[1:]).square().flatten(1).mean(1)
        return (gaps * self.weights.to(gaps)).mean()

    def knots(self, index: Tensor, parent: bool = False) -> list[float]:
        """(steps,) root mean square distances of the student, or of its parent, along the teacher's noise."""
        total = torch.zeros(self.student.plan.nfe, dtype=torch.float64)
        with torch.no_grad():
            for part in torch.split(index, LOOK):
                some = self.data.pick(part).to(self.device)
                gaps = (self._states(some, parent) - some.knots[1:]).double().square()
                total += gaps.flatten(1).mean(1).cpu() * len(part)
        return (total / len(index)).sqrt().tolist()

    def _at(self, labels: Tensor | None) -> tuple[SigSampler, DiffusionModel]:
        """Student and model for samples of these classes."""
        student, problem = self.student, self.problem
        if labels is not None and getattr(student.network, "labelled", False):
            student = student.at(labels)
        if not isinstance(problem, DiffusionModel):
            assert labels is not None
            problem = problem(labels)
        return student, problem

    def _states(self, some: Batch, parent: bool = False) -> Tensor:
        """(steps, n, *event) the student's states along the teacher's noise."""
        student, problem = self._at(some.labels)
        return along(problem, student.plan if parent else student, some)

    def _forced(self, some: Batch, generator: torch.Generator) -> Tensor:
        """Some of the steps, each for a part of the samples, from the teacher's own knots."""
        n, total = some.knots.shape[1], some.knots.new_zeros(())
        chosen = torch.randperm(self.student.plan.nfe, generator=generator)[:AT_ONCE].tolist()
        parts = torch.arange(n, device=self.device).tensor_split(len(chosen))
        for k, mine in zip(chosen, parts, strict=True):
            if len(mine):
                gap = self._step(some.part(mine), k) - some.knots[k + 1, mine]
                total = total + self.weights[k].to(gap) * gap.square().flatten(1).mean(1).sum()
        return total / n

    def _step(self, some: Batch, k: int) -> Tensor:
        """The student's step from the teacher's state at knot k."""
        student, problem = self._at(some.labels)
        rows, x, z = student.plan.rows, some.knots[k], some.xi[k]
        here, there = self.data.sigmas[k : k + 2].to(x.device, x.dtype).unbind()
        look = combine(rows[k].stage, State(x, (), (z.unbind(1),)))
        last = None
        if k and getattr(student.network, "feedback", False):  # what would have led the teacher here
            go, before = rows[k - 1].update, some.xi[k - 1].unbind(1)
            last = (
                x - combine(go._replace(evaluations=()), State(some.knots[k - 1], (), (before,)))
            ) / go.evaluations[0][0]
        D = student.predict(problem, look, here, there, z[:, : LEVY_ORDER[student.levy]], last)
        return combine(rows[k].update, State(x, (D,), (z.unbind(1),)))
