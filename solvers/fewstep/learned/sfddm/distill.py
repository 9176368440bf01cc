"""`distill_sfddm`: a teacher of T levels to a student of any T', in one fold (arXiv 2405.14961)."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import _validation
from ..._serialization import make_folder
from ...errors import InputError, named
from ...problem import DiffusionModel
from ...sample import sample
from ...samplers.ddim import DDIM
from ...samplers.dpm import DPMSolverPP
from ...schedule import DiscreteVP
from ..loss_weighting import left_at_end
from ..network_student import check_labels, label_arguments, model_of
from ..training import Minibatch, Report, Stopwatch, TeacherOptions, TrainingOptions, digest, fit, seeded
from ..unet_denoiser import UNetDenoiser
from .process import StudentProcess, subsequence
from .student import SFDDM

TARGETS, LOSSES, STARTS = ("published", "displacement"), ("l1", "mse", "kl", "end"), ("random", "teacher")
TEACHER = TeacherOptions(DPMSolverPP(2), trajectories=1024)
TRAINING = TrainingOptions(iterations=2000, batch_size=64, learning_rate=2e-4, ema_decay=0.999)
MADE = 20  # steps of the samples made where there are no data
SUBSTEPS = 4
SPREAD = 256  # samples from which the variance of the data is estimated
JUDGED, FINE = 64, 40  # start states, and steps of DPMSolverPP(2), of the report's distances


@named
def distill_sfddm(
    *, teacher: nn.Module, schedule: DiscreteVP, steps: int | None = None, phi: Tensor | None = None,
    spacing: str = "trailing", data: Tensor | Iterable[Any] | None = None, labels: Tensor | None = None,
    event_shape: tuple[int, ...] | None = None, target: str = "published", loss: str = "l1",
    features: str | None = "auto", hidden: float = 1.0, start: str = "teacher",
    teacher_options: TeacherOptions = TEACHER, training: TrainingOptions = TRAINING, folder: str | Path | None = None,
    device: torch.device | str = "cpu", seed: int = 0, progress: bool = False,
) -> tuple[SFDDM, Report]:  # fmt: skip
    """Distil a diffusion model of T levels into one of T' levels, sampled in T' steps.

    `target="published"` trains the student to predict the teacher's own noise at the same input and level. The best
    such student is the teacher sampled by DDIM on the T' levels, and not better: this loss moves a model to another
    network. `target="displacement"`, ours, trains it to predict the noise that leads in one step where several DDIM
    steps of the teacher lead; it is the one that lowers the error of few steps, best with `loss="end"`.

    Args:
        teacher: a `UNet2DModel` called with x_t and labels of the schedule, or a module `(x, sigma) -> x0`, sigma 0-d
            or (batch,), that also takes `labels=` if its attribute `labelled` is True. It is not modified.
        schedule: the table of T levels it was trained on.
        steps, phi, spacing: T', or the labels of the T' levels themselves; see `subsequence`.
        data: (n, *event) samples x0, or a loader of batches (or of pairs with labels), read once; None to train on
            samples of the teacher.
        labels: (n, ...) classes of the data, or of the samples to make.
        event_shape: shape of one sample, where there are no data.
        target: "published" or "displacement".
        loss: of the noise: "l1", "mse", or a mean square weighted by level, "kl" (the divergence of the posteriors)
            or "end" (the share of a step's error that is left at the end).
        features: (published) name in `named_modules()` of the module whose input is matched as well: "auto" is the
            last layer of this library's networks and of U-Nets, nothing for others; None for nothing.
        hidden: the weight of that term.
        start: from the "teacher" weights or from "random" ones.
        teacher_options: substeps of DDIM per step (displacement; default 4); for samples in place of data their
            number (1024) and solver (`DPMSolverPP(2)` in 20 steps).
        training: by default 2000 iterations of 64 samples, learning rate 2e-4, EMA decay 0.999.
        folder: for checkpoints. The same call resumes an interrupted one, bitwise.
        device: where training runs.
        seed: of the samples and of training.
        progress: show a progress bar on a terminal, in a pipe a line every 30 seconds.

    Returns:
        the student and a `Report`. Its distances are those of T'-step sampling to the teacher's fine ODE from the
        same noise: `parent_rmse` of the teacher by DDIM on phi, `student_rmse` of the student.

    Raises:
        InputError: an unknown word, neither data nor event_shape, a module that does not exist.
    """
    for name, word, known in (("target", target, TARGETS), ("start", start, STARTS), ("loss", loss, LOSSES)):
        _validation.check_choice(name, word, known)
    published = target == "published"
    seed, device = _validation.check_seed(seed), _validation.check_device(device)
    hidden = _validation.check_float("hidden", hidden, 0, expected="a weight of at least 0")
    made = TEACHER.updated("teacher_options", teacher_options)
    if published and made.substeps is not None:
        raise InputError(f"substeps: got {made.substeps} for the published target, which has none; drop it.")
    training = TRAINING.updated("training", training)
    watch, place = Stopwatch(), make_folder(folder)
    process = _process(schedule, steps, phi, spacing)
    _validation.check_instance("teacher", teacher, nn.Module, "a torch.nn.Module")
    unet = type(teacher).__name__ == "UNet2DModel"
    teacher = UNetDenoiser.of(teacher, schedule) if unet else copy.deepcopy(teacher)
    teacher = teacher.eval().requires_grad_(False).to(device)
    if data is None:
        x0 = _samples(teacher, schedule, labels, made, event_shape, seed, device)
    else:
        x0, labels = _joined(data, labels)
        _check_labels(teacher, labels, len(x0))
    watch.lap("data")
    _try(teacher, x0, labels, device)
    network = _initialised(teacher, start, seed)
    inside = _module_name(network, features) if published and features is not None else None
    substeps = 1 if published else made.substeps or SUBSTEPS
    student = SFDDM(network, process)
    task = _Task(teacher, schedule, student, x0, labels, substeps, loss, inside, hidden)
    before, judge = _judged(teacher, schedule, student, x0, labels)
    losses, history = fit(
        network, task.loss, len(x0), training, seed=seed, progress=progress, held_out_loss=judge,
        checkpoint=place and place / f"sfddm-{len(process.phi)}.training", metadata={"start": start} | task.metadata(),
    )  # fmt: skip
    watch.lap("training")
    return student, Report(substeps, len(x0), before, judge(), losses, watch.seconds, history)


def _process(schedule: Any, steps: Any, phi: Tensor | None, spacing: str) -> StudentProcess:
    if not isinstance(schedule, DiscreteVP):
        raise InputError(
            f"schedule: got {type(schedule).__name__}, expected a DiscreteVP, the teacher's levels as a table. For "
            "another process use DiscreteVP(1 / (1 + sigmas**2)) with increasing sigmas."
        )
    if (steps is None) == (phi is None):
        raise InputError(f"steps: got {steps} with phi {'given' if phi is not None else 'None'}, expected one.")
    return StudentProcess(schedule, subsequence(schedule, steps, spacing) if phi is None else phi)


def _joined(data: Any, labels: Any) -> tuple[Tensor, Tensor | None]:
    """x0 (n, *event) and labels (n, ...) or None, from a tensor or from a loader's batches."""
    if not torch.is_tensor(data):
        try:
            parts = [tuple(b) if isinstance(b, (tuple, list)) else (b,) for b in data]
            if labels is None and parts and len(parts[0]) > 1:
                labels = torch.cat([p[1] for p in parts])
            data = torch.cat([p[0] for p in parts])
        except (TypeError, RuntimeError, IndexError, ValueError) as error:
            raise InputError(
                f"data: got {_validation.describe(data)}, expected a tensor (n, *event), or batches of tensors of one "
                "shape. Convert numpy arrays with torch.from_numpy(data).float()."
            ) from error
    _validation.check_state("data", data, "finite numbers (n, *event)")
    if data.dim() < 2 or not len(data):
        raise InputError(f"data: got {_validation.describe(data)}, expected finite numbers (n, *event).")
    return data, labels


def _check_labels(teacher: nn.Module, labels: Any, count: int) -> None:
    """Reject labels other than one per sample, and none for a teacher that takes them."""
    if labels is not None:
        check_labels(teacher, labels)
    given = len(labels) if labels is not None else 0 if getattr(teacher, "labelled", False) else count
    if given != count:
        raise InputError(f"labels: got {given} for {count} samples, expected one each.")


def _samples(
    teacher: nn.Module, schedule: DiscreteVP, labels: Tensor | None, options: TeacherOptions, event_shape: Any,
    seed: int, device: torch.device | str,
) -> Tensor:  # fmt: skip
    """The teacher's own samples."""
    if event_shape is None:
        raise InputError("data: got None without event_shape; expected samples, a loader, or a shape of samples.")
    count, event, parts = options.trajectories or 0, _validation.check_shape(event_shape, "event_shape"), []
    _check_labels(teacher, labels, count)
    for i in range(0, count, 256):
        n = min(256, count - i)
        problem = model_of(teacher, schedule, None if labels is None else labels[i : i + n])
        x0 = sample(problem, options.solver, shape=(n, *event), steps=MADE, seed=seed + i, device=device)  # type: ignore[arg-type]
        parts.append(x0.cpu())
    return torch.cat(parts)


@torch.no_grad()
def _try(teacher: nn.Module, x0: Tensor, classes: Tensor | None, device: torch.device | str) -> None:
    """Evaluate the teacher twice, so that one that does not fit gets a clear error."""
    count = 3 if x0.shape[-1] == 2 else 2  # levels that would broadcast over the last axis must not go unnoticed
    index = torch.arange(count) % len(x0)
    x, sigma = x0[index].to(device), torch.linspace(1, 2, count, dtype=x0.dtype, device=device)
    labels = [None if classes is None else classes[index[:n]] for n in (1, count)]
    try:
        alone = teacher(x[:1], sigma[0], **label_arguments(teacher, labels[0], x[:1]))
        out = teacher(x, sigma, **label_arguments(teacher, labels[1], x))
        same = torch.allclose(out[:1], alone, rtol=1e-2, atol=1e-3)
    except (RuntimeError, TypeError, IndexError, ValueError) as error:
        raise InputError(
            f"teacher: fails for x {tuple(x.shape)} and sigma ({len(x)},): {error}. Expected (x, sigma) -> x0, each "
            "sample with a level of its own."
        ) from error
    if out.shape != x.shape:
        raise InputError(f"teacher: gave {tuple(out.shape)} for {tuple(x.shape)}, expected the same shape.")
    if not same:
        raise InputError(
            "teacher: gives a sample another x0 alone, with a 0-d sigma, than in a batch with sigma (batch,); "
            "expected each sample with a level of its own."
        )


def _initialised(teacher: nn.Module, start: str, seed: int) -> nn.Module:
    """The student's network before training."""
    network = copy.deepcopy(teacher).train().requires_grad_(True)
    for module in network.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()  # the teacher has none: with it, not even the teacher's weights would fit

    def reset() -> nn.Module:
        for module in network.modules():
            again: Callable[[], None] | None = getattr(module, "reset_parameters", None)
            if again is not None:
                again()
        return network

    return seeded(seed, reset) if start == "random" else network


def _module_name(network: nn.Module, features: str) -> str | None:
    _validation.check_instance("features", features, str, "the name of a layer, or 'auto'")
    names: list[str] = [n for n, _ in network.named_modules()]
    expected = ("conv_out", "leave") if features == "auto" else (features,)
    found = [n for n in names if any(n == w or n.endswith(f".{w}") for w in expected)]
    if not found and features == "auto":
        return None
    if len(found) != 1:
        raise InputError(
            f"features: got {features!r}, which is {len(found)} modules of the network; expected one name of "
            f"network.named_modules(), such as that of the last layer ({', '.join(names[-3:])}), or None."
        )
    return found[0]


@torch.no_grad()
def _judged(
    teacher: nn.Module, schedule: DiscreteVP, student: SFDDM, x0: Tensor, labels: Tensor | None
) -> tuple[float, Callable[[], float]]:
    """The distance of the teacher by DDIM on phi to its fine ODE, and a function that gives the student's."""
    noise = torch.randn(x0[:JUDGED].shape, generator=torch.Generator().manual_seed(0))
    noise = noise.to(next(teacher.parameters()).device)
    some = None if labels is None else labels[:JUDGED]
    problem, own = model_of(teacher, schedule, some), student if some is None else student.at(some)
    fine = sample(problem, DPMSolverPP(2), noise=noise, steps=FINE)

    @torch.no_grad()
    def distance(problem: DiffusionModel, solver: Any, sigmas: Tensor | None = None) -> float:
        return float((sample(problem, solver, noise=noise, sigmas=sigmas) - fine).double().square().mean().sqrt())

    return distance(problem, DDIM(), student.process.grid()), lambda: distance(own.problem(), own)


@contextmanager
def _inputs_of(network: nn.Module, name: str | None) -> Iterator[list[Tensor]]:
    """A list that collects the inputs of the module `name` while the network runs."""
    inputs: list[Tensor] = []
    if name is None:
        yield inputs
        return
    with network.get_submodule(name).register_forward_pre_hook(lambda _, x: inputs.append(x[0])):
        yield inputs


@dataclass(frozen=True)
class _Task:
    """What a student is trained on."""

    teacher: nn.Module
    schedule: DiscreteVP
    student: SFDDM
    x0: Tensor
    labels: Tensor | None
    substeps: int
    kind: str
    inside: str | None
    hidden: float

    def metadata(self) -> dict[str, Any]:
        data = {"x0": self.x0[:64]} | ({} if self.labels is None else {"labels": self.labels[:64]})
        process = self.student.process
        return {
            "loss": self.kind, "hidden": self.hidden, "features": self.inside, "substeps": self.substeps,
            "phi": process.phi.tolist(), "data": digest(data),
            "teacher": digest(self.teacher.state_dict() | {"levels": process.log_sigmas}),
        }  # fmt: skip

    def loss(self, batch: Minibatch) -> Tensor:
        process = self.student.process
        x0 = self.x0[batch.index].to(next(self.teacher.parameters()).device)
        labels = None if self.labels is None else self.labels[batch.index].to(x0.device)
        k = torch.randint(len(process.phi), (len(x0),), generator=batch.generator)
        noise = torch.randn(x0.shape, generator=batch.generator).to(x0)
        sigma = process.log_sigmas[k].exp().to(x0)
        x = x0 + _wide(sigma, x0) * noise
        with torch.no_grad(), _inputs_of(self.teacher, self.inside) as theirs:
            expected = self._noise(self.teacher, x, sigma, labels)
            if self.substeps > 1:
                expected = self._displacement(x, sigma, k, labels, expected)
        with _inputs_of(self.student.network, self.inside) as mine:
            gap = self._noise(self.student.network, x, sigma, labels) - expected
        total = (_wide(self.weights[k].to(gap), gap) * self._distance(gap)).mean()
        for a, b in zip(mine, theirs, strict=True):
            total = total + self.hidden * self._distance(a - b).mean()
        return total

    def _distance(self, gap: Tensor) -> Tensor:
        return gap.abs() if self.kind == "l1" else gap.square()

    def _noise(self, network: nn.Module, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        out: Tensor = network(x, sigma, **label_arguments(network, labels, x))
        return (x - out) / _wide(sigma, x)

    def _displacement(self, x: Tensor, sigma: Tensor, k: Tensor, labels: Tensor | None, first: Tensor) -> Tensor:
        """The noise that reaches in one step the end of the teacher's DDIM steps, which are even in its labels."""
        phi = torch.cat([-torch.ones(1), self.student.process.phi.double()])
        start, end = phi[k + 1], phi[k]
        y, at, level, noise = x, sigma, sigma, first
        for j in range(1, self.substeps + 1):
            t = torch.lerp(start, end, j / self.substeps)
            # below the first label there is x0 alone
            after = torch.where(t < 0, 0.0, self.schedule.sigma(t.clamp(min=0))).to(x)
            y, at = y + _wide(after - at, x) * noise, after
            if j < self.substeps:
                level = torch.where(after > 0, after, level)  # a sample at 0 does not move any more
                noise = self._noise(self.teacher, y, level, labels)
        return (y - x) / _wide(at - sigma, x)

    @cached_property
    def weights(self) -> Tensor:
        """(T',) weights of the levels, with mean 1: for "kl" beta'^2 / (2 btilde' alpha' (1 - abar')), the divergence
        of the posteriors; for "end" the squared error that a step of wrong noise leaves."""
        p = self.student.process
        if self.kind in ("l1", "mse") or len(p.phi) == 1:
            return torch.ones(len(p.phi))
        if self.kind == "end":
            grid = p.grid().flip(0)
            w = grid.diff().square() * left_at_end(self.x0[:SPREAD], grid[:-1])  # of an ODE's error, squared
        else:
            spread = p.betas[1:] * (1 - p.abar[:-1]) / (1 - p.abar[1:])
            w = p.betas[1:] ** 2 / (2 * spread * p.alphas[1:] * (1 - p.abar[1:]))
            w = torch.cat([w[:1], w])  # at the first level the posterior is a point
        return (w / w.mean()).float()


def _wide(v: Tensor, like: Tensor) -> Tensor:
    return v.reshape(-1, *[1] * (like.dim() - 1))
