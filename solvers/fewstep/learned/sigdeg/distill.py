"""`distill_sigdeg`: a few-step sampler from a fine one on the same Brownian path (arXiv 2508.16939)."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import _validation
from ..._serialization import make_folder
from ...brownian.increment import LEVY_ORDER
from ...errors import InputError, named
from ...executor import State, begin, run, stage, update
from ...grid import MOST, Spacing, sigma_grid
from ...plan import Plan
from ...problem import SDE, DiffusionModel
from ...resolve import evaluator_of, resolve
from ...schedule import Schedule
from ...sde.euler_maruyama import EulerMaruyama
from ...solver import DiffusionSolver
from ..labelled_model import Labelled, Model
from ..loss_weighting import left_at_end
from ..network_student import check_compatible
from ..training import LEAST, Minibatch, Report, Stopwatch, TeacherOptions, TrainingOptions, fit, held_out, seeded
from ..trajectories import Batch, Trajectories, checked_levels, make_trajectories
from .networks import HEADS, DenoisingMLP
from .student import SigSampler

TEACHER = TeacherOptions(EulerMaruyama(), trajectories=8192)
TRAINING = TrainingOptions()
STEPS = 300  # of the teacher
AT_ONCE = 8  # different steps in a forced minibatch: a call of the network has one level
HELD_OUT_BATCH = 256  # held-out trajectories at a time
SPREAD = 256  # trajectories from which the variances of the knots are estimated


@named
def distill_sigdeg(
    problem: DiffusionModel | Labelled, *, steps: int | None = None, teacher_steps: int | None = None,
    event_shape: tuple[int, ...] | None = None, levy: str | None = None, sigmas: Tensor | None = None,
    spacing: Spacing = "logsnr", labels: Tensor | None = None, data: Trajectories | None = None,
    network: nn.Module | None = None, head: str | None = None, parent: DiffusionSolver | None = None,
    forcing: float = 0.0, teacher_options: TeacherOptions = TEACHER, training: TrainingOptions = TRAINING,
    folder: str | Path | None = None, device: torch.device | str = "cpu", seed: int = 0, progress: bool = False,
) -> tuple[SigSampler, Report]:  # fmt: skip
    """Distil a diffusion model's sampler into one of a few signature-driven steps.

    For each coarse interval the student receives the exact partial signature of the path that drove the fine teacher.
    Its loss is the mean squared distance to the teacher at all coarse knots, each divided by the knot's variance and
    weighted by the share of its error that is left at the end. For an SDE see `distill_sigdeg_step`.

    Args:
        problem: the model or, with labels, a function `labels -> DiffusionModel`.
        steps: number of coarse intervals; not needed with sigmas or data.
        teacher_steps: number of fine steps, a multiple of steps; by default 300.
        event_shape: shape of one sample.
        levy: the signature that the network receives: "W", "H" (default) or "K"; with data, by default all of theirs.
        sigmas: (steps + 1,) the coarse levels, decreasing, all above 0.
        spacing: of the coarse levels where sigmas is None; by default even in log SNR.
        labels: (trajectories, ...) one class per trajectory.
        data: trajectories made before; they replace the arguments above that describe the teacher.
        network: `(x, sigma, sigma_next, xi) -> x0`, trained in place and owned by the student. By default the
            denoiser itself with more inputs if it is a `DenoisingMLP`, else a small network added to it. `SigUNet`
            widens a U-Net of diffusers.
        head: of the default network: "direct" (default) or "graded", better for short trainings.
        parent: the solver whose step is corrected; by default `EulerMaruyama()`.
        forcing: the share of iterations, at the beginning, that start each step from the teacher's knot; such an
            iteration costs a `steps`-th of an unrolled one. Take 1 for images, whose final state is decided along the
            way: unrolled, their students average over final states.
        teacher_options: solver (default `EulerMaruyama()` in tau = 1/sigma^2), substeps in place of teacher_steps,
            and trajectories (8192).
        training: by default 2500 iterations of 256 trajectories, learning rate 1e-3, EMA decay 0.99.
        folder: for teacher data and checkpoints. The same call resumes an interrupted one, bitwise.
        device: where teacher and training run.
        seed: of the teacher's noise and of training.
        progress: show progress bars on a terminal, in a pipe a line every 30 seconds.

    Returns:
        the student and a `Report`. Under torch.distributed each process makes its share of the teacher data (with a
        folder that all of them share) and of every minibatch; all return the same student.

    Raises:
        InputError: arguments that are missing, out of range, contradict each other or have no effect.
    """
    device, seed = _validation.check_device(device), _validation.check_seed(seed)
    if isinstance(problem, SDE):
        raise InputError("problem: got an SDE, expected fewstep.DiffusionModel; use distill_sigdeg_step.")
    _validation.check_choice("levy", "H" if levy is None else levy, LEVY_ORDER)
    _validation.check_choice("head", "direct" if head is None else head, HEADS)
    forcing = _validation.check_float("forcing", forcing, 0, 1, "a share from 0 to 1")
    if network is not None and head is not None:
        raise InputError(f"head: got {head!r} in addition to network=, which has its own; drop one.")
    made = TEACHER.updated("teacher_options", teacher_options)
    training = TRAINING.updated("training", training)
    watch, place = Stopwatch(), make_folder(folder)
    if data is None:
        count = _validation.check_int("trajectories", made.trajectories, LEAST)
        grid = _coarse_grid(problem, labels, steps, spacing, sigmas)
        if event_shape is None:
            raise InputError("event_shape: got None, expected the shape of a sample, or data=.")
        data = make_trajectories(
            problem, grid, count=count, event_shape=event_shape, labels=labels, seed=seed, levy=levy or "H",
            substeps=_substeps(len(grid) - 1, teacher_steps, made.substeps), teacher=made.solver,
            folder=place and place / "teacher", device=device, progress=progress,
        )  # fmt: skip
        watch.lap("teacher")
    else:
        _check_data(problem, data, event_shape=event_shape, labels=labels, steps=steps, sigmas=sigmas,
                    spacing=None if spacing == "logsnr" else spacing, teacher_steps=teacher_steps,
                    teacher_options=None if teacher_options == TEACHER else teacher_options)  # fmt: skip
    levy = levy or data.levy
    if LEVY_ORDER[levy] > LEVY_ORDER[data.levy]:
        raise InputError(f"levy: got {levy!r}; the trajectories contain {data.levy!r}. Make them with {levy!r}.")
    network, residual = _network(problem, data, levy, network, head or "direct", seed)
    _validation.check_instance("parent", parent, (DiffusionSolver, type(None)), "a solver such as fs.EulerMaruyama()")
    plan, _ = resolve(parent or EulerMaruyama(), _schedule(problem, data), sigmas=data.sigmas)
    student = SigSampler(plan, network.to(device), levy, residual)
    _check_student(student, data, forcing)
    kept, held = held_out(len(data))
    task = KnotMatching(problem, student, data, kept, held, forcing, device)
    parents = task.knots(parent=True)
    losses, history = fit(
        network.train(), task.loss, len(kept), training, seed=seed, progress=progress, metadata=task.metadata(),
        held_out_loss=lambda: task.knots()[-1], checkpoint=place and place / f"student-{student.plan.nfe}.training",
    )  # fmt: skip
    watch.lap("training")
    own = task.knots()
    knots = {"parent": parents, "student": own}
    return student, Report(data.evaluations, len(data), parents[-1], own[-1], losses, watch.seconds, history, knots)


def _coarse_grid(problem: Any, labels: Any, steps: int | None, spacing: Spacing, sigmas: Tensor | None) -> Tensor:
    if steps is not None:
        steps = _validation.check_int("steps", steps, 1, MOST)
    if sigmas is not None:
        grid = checked_levels(sigmas)
        if steps not in (None, len(grid) - 1):
            raise InputError(f"steps: got {steps} with sigmas of {len(grid) - 1} intervals; drop one of them.")
        return grid
    if steps is None:
        raise InputError("steps: got None; expected steps=... or sigmas=... for the coarse grid.")
    count = len(labels) if torch.is_tensor(labels) and labels.dim() else 1
    model = Model.of(problem, labels, torch.empty(count, 1, device="meta"))
    return sigma_grid(model.schedule, steps, spacing, "sigma_min")


def _schedule(problem: DiffusionModel | Labelled, data: Trajectories) -> Schedule:
    """The schedule of the model, which may be a function of labels."""
    labels = None if isinstance(problem, DiffusionModel) else data.pick(torch.arange(1)).labels
    return Model.of(problem, labels, torch.empty(1, 1, device="meta")).schedule


def _substeps(steps: int, total: int | None, substeps: int | None) -> int:
    """The number of fine steps per coarse step, from `substeps` or from the total number."""
    if None not in (substeps, total):
        raise InputError(f"teacher_steps: got {total} with substeps={substeps}; drop one of them.")
    total = STEPS if total is None else _validation.check_int("teacher_steps", total, 1, MOST)
    if substeps is None and total % steps:
        raise InputError(f"teacher_steps: got {total} for {steps} steps, expected a multiple of steps.")
    return substeps or total // steps


def _check_data(problem: Any, data: Any, **described: Any) -> None:
    """Reject data that do not belong to the problem, and arguments that the data already answer."""
    for name, value in described.items():
        if value is not None:
            raise InputError(f"{name}: got {value!r} in addition to data=, which contain it; drop one.")
    if not isinstance(data, Trajectories):
        raise InputError(f"data: got {type(data).__name__}, expected the result of make_trajectories.")
    if len(data) < LEAST:
        raise InputError(f"data: got {len(data)} trajectories, expected at least {LEAST}: two are held out.")
    if not isinstance(problem, DiffusionModel) and not data.labelled:
        raise InputError("data: got none with labels for a model of labels; make them with labels=.")


def _network(
    problem: DiffusionModel | Labelled, data: Trajectories, levy: str, network: Any, head: str, seed: int
) -> tuple[nn.Module, bool]:
    """The network, and whether its output is added to the denoiser's."""
    letters = LEVY_ORDER[levy]
    if network is not None:
        _validation.check_instance("network", network, nn.Module, "a torch.nn.Module")
        if (own := getattr(network, "letters", letters)) != letters:
            raise InputError(f"network: got one for {own} letters of the signature; levy={levy!r} has {letters}.")
        return network, False
    denoiser = problem.denoiser if isinstance(problem, DiffusionModel) else None
    if isinstance(denoiser, DenoisingMLP):
        return seeded(seed, lambda: denoiser.with_signature(letters, head)), False
    return seeded(seed, lambda: DenoisingMLP(data.event, 128, 2, letters, skip=False, head=head)), True


def _check_student(student: SigSampler, data: Trajectories, forcing: float) -> None:
    plan, letters = student.plan, LEVY_ORDER[data.levy]
    used = (plan.stage_noise.abs() + plan.update_noise.abs()).amax((0, 1)).nonzero().flatten()
    if len(used) and int(used[-1]) >= letters:
        raise InputError(f"parent: got {plan.name}, which needs more than the {data.levy!r} of the data.")
    older = [plan.update_eval[:, 1:], plan.stage_eval, plan.stage_noise[:, 1:], plan.update_noise[:, 1:]]
    if forcing and any(bool(t.any()) for t in older):
        raise InputError(f"forcing: got {forcing} with {plan.name}, whose steps use earlier ones.")
    check_compatible(student.network, "data", data.some_knots(1)[0], data.event)


def along(problem: DiffusionModel, solver: SigSampler | Plan, some: Batch) -> Tensor:
    """(steps, n, *event) the states of a student, or of a plan, driven by the teacher's noise."""
    plan = solver if isinstance(solver, Plan) else solver.plan
    states, supply, x = list[Tensor](), iter(some.xi), some.knots[0]
    evaluate = evaluator_of(problem, solver, x)
    run(plan, x, evaluate, lambda *_: next(supply).unbind(1), lambda i, x, D: states.append(x))
    return torch.stack(states)


@dataclass(frozen=True)
class KnotMatching:
    """What a student is trained on, and its distance to the teacher; kept, held: trajectory indices."""

    problem: DiffusionModel | Labelled
    student: SigSampler
    data: Trajectories
    kept: Tensor
    held: Tensor
    forcing: float
    device: torch.device

    @cached_property
    def weights(self) -> Tensor:
        """(steps,) the share of a squared error at each knot that is left at the end, over the final variance."""
        ends = self.data.some_knots(SPREAD)[-1].double()
        return (left_at_end(ends, self.data.sigmas[1:]).square() / ends.var(0).mean()).to(self.device)

    def metadata(self) -> dict[str, Any]:
        student, of_data = self.student, {"forcing": self.forcing, "data": self.data.digest()}
        return of_data | {"levy": student.levy, "plan": student.plan.name, "residual": student.residual}

    def loss(self, batch: Minibatch) -> Tensor:
        """The weighted mean squared distance at the knots."""
        some = self.data.pick(self.kept[batch.index]).to(self.device)
        if batch.share < self.forcing:
            return self._forced(some, batch.generator)
        gaps = (self.states(some) - some.knots[1:]).square().flatten(1).mean(1)
        return (gaps * self.weights.to(gaps)).mean()

    @torch.no_grad()
    def knots(self, parent: bool = False) -> list[float]:
        """(steps,) root mean square distances of the student, or of its parent, on held-out trajectories."""
        total = torch.zeros(self.student.plan.nfe, dtype=torch.float64)
        for part in torch.split(self.held, HELD_OUT_BATCH):
            some = self.data.pick(part).to(self.device)
            gaps = (self.states(some, parent) - some.knots[1:]).double().square()
            total += gaps.flatten(1).mean(1).cpu() * len(part)
        return (total / len(self.held)).sqrt().tolist()

    def states(self, some: Batch, parent: bool = False) -> Tensor:
        """(steps, n, *event) the student's states, unrolled from the start."""
        student, problem = self._at(some.labels)
        return along(problem, student.plan if parent else student, some)

    def step(self, some: Batch, k: int) -> Tensor:
        """(n, *event) the student's step from the teacher's state at knot k."""
        student, problem = self._at(some.labels)
        row, x = student.plan.rows[k], some.knots[k]
        state = begin(row, State(x), lambda *_: some.xi[k].unbind(1))
        D = student.evaluator(problem, x)(k, stage(row, state), state.normals)
        return update(row, state, D).x

    def _forced(self, some: Batch, generator: torch.Generator) -> Tensor:
        """The loss of some of the steps, each from the teacher's own states of a part of the samples."""
        n, total = some.knots.shape[1], some.knots.new_zeros(())
        chosen = torch.randperm(self.student.plan.nfe, generator=generator)[:AT_ONCE].tolist()
        parts = torch.arange(n, device=self.device).tensor_split(len(chosen))
        for k, mine in zip(chosen, parts, strict=True):
            if len(mine):
                gap = self.step(some.part(mine), k) - some.knots[k + 1, mine]
                total = total + self.weights[k].to(gap) * gap.square().flatten(1).mean(1).sum()
        return total / n

    def _at(self, labels: Tensor | None) -> tuple[SigSampler, DiffusionModel]:
        """The student and the model for samples of these classes."""
        student, problem = self.student, self.problem
        if labels is not None and getattr(student.network, "labelled", False):
            student = student.at(labels)
        if not isinstance(problem, DiffusionModel):
            assert labels is not None
            problem = problem(labels)
        return student, problem
