"""`distill_sfddm`: a teacher of T levels to a student of any T', in one fold (arXiv 2405.14961)."""

from __future__ import annotations

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
from ...grid import MOST
from ...problem import DiffusionModel
from ...sample import sample
from ...samplers.ddim import DDIM
from ...samplers.dpm_solver_pp import DPMSolverPP
from ...schedule import DiscreteVP
from ..labels import check_labels, told
from ..loss_weighting import left_at_end
from ..training import EVERY, PATIENCE, Minibatch, Report, Stopwatch, check_options, digest, fit, seeded
from ..unet_denoiser import UNetDenoiser
from .process import StudentProcess, subsequence
from .student import SFDDM

TARGETS, LOSSES, STARTS = ("published", "displacement"), ("l1", "mse", "kl", "end"), ("random", "teacher")
SPREAD = 256  # samples that the data's spread is taken from
JUDGED, FINE = 64, 40  # start states, and steps of DPMSolverPP(2), of the report's distances


@named
def distill_sfddm(
    *, teacher: nn.Module, schedule: DiscreteVP, steps: int | None = None, phi: Tensor | None = None,
    spacing: str = "trailing", data: Tensor | Iterable[Any] | None = None, labels: Tensor | None = None,
    samples: int = 1024, event_shape: tuple[int, ...] | None = None, target: str = "published",
    substeps: int | None = None, loss: str = "l1", features: str | None = "auto", hidden: float = 1.0,
    start: str = "teacher", autocast: bool = False, folder: str | Path | None = None,
    device: torch.device | str = "cpu", seed: int = 0, progress: bool = False, iterations: int = 2000,
    batch: int = 64, rate: float = 2e-4, average: float = 0.999, patience: int = PATIENCE, every: int = EVERY,
) -> tuple[SFDDM, Report]:  # fmt: skip
    """Distil a model of T levels into one of T' levels, sampled in T' steps.

    The published loss asks the student for the teacher's own answer at the same input and level, so that the
    best student is the teacher itself sampled on phi, no better: it moves a model to another network.
    `target="displacement"`, ours, asks for the noise that leads where the teacher's finer steps lead.

    Args:
        teacher: a `UNet2DModel` told x_t and labels of the schedule, or a module `(x, sigma) -> x0`, sigma
            0-d or (batch,), with `labels=` where its `labelled` is True. It is left as it is.
        schedule: the table of T levels it was trained on.
        steps, phi, spacing: T', or the labels themselves; see `subsequence`.
        data: (n, *event) samples x0, or a loader of batches (or pairs with labels), read once; None for
            data-free, x0 being the teacher's own samples.
        labels: (n, ...) classes of the data, or of the samples to make.
        samples, event_shape: of data-free distillation: how many, of which shape.
        target: "published" or "displacement".
        substeps: DDIM steps of the teacher in one of the student's (displacement); by default 4.
        loss: of the noise, "l1" (published), "mse", or a mean square weighted by level: "kl", the divergence
            of the posteriors, or "end", by what is left of a step's error at the end (for displacement).
        features: (published) the module whose input is matched too, the hidden variables, by its name among
            `named_modules()`: "auto" is the last layer of the library's networks and of U-Nets, and none of
            others; None for none.
        hidden: the weight of that.
        start: "teacher" weights, or "random" ones (published).
        autocast, folder, device, seed, progress: as in `distill_sigdeg`.
        iterations, batch, rate, average, patience, every: of training, as in `distill_sigdeg`.

    Returns:
        the student and a `Report`, whose distances are those of T'-step sampling to the teacher's fine ODE
        from the same noise: `parent_rmse` of the teacher by DDIM on phi, `student_rmse` of the student.

    Raises:
        InputError: an unknown word, no data and no shape, a features module that is not there.
    """
    _check({"target": (target, TARGETS), "loss": (loss, LOSSES), "start": (start, STARTS)})
    training: dict[str, Any] = {"iterations": iterations, "batch": batch, "rate": rate, "average": average,
                                "patience": patience, "every": every}  # fmt: skip
    check_options(training)
    _check_substeps(substeps, target)
    seed, device = _validation.check_seed(seed), _validation.check_device(device)
    _validation.check_float("hidden", hidden, 0, expected="a weight of at least 0")
    watch = Stopwatch()
    make_folder(folder)
    teacher = _frozen(teacher, schedule).to(device)
    process = _process(schedule, steps, phi, spacing)
    x0, classes = _data(teacher, schedule, data, labels, samples, event_shape, seed, device)
    watch.lap("data")
    _try(teacher, x0, classes, device)
    network = _begun(teacher, start, seed)
    student = SFDDM(network, process)
    inside = None if features is None or target == "displacement" else _module_name(network, features)
    task = _Task(
        teacher, schedule, student, x0, classes, target, substeps or 4, loss, inside, hidden, autocast
    )
    fine, base = task.judge()
    losses, looks = fit(
        network, task.loss, len(x0), seed=seed, progress=progress, look=lambda: task.rmse(fine),
        checkpoint=None if folder is None else Path(folder) / f"sfddm-{len(process.phi)}.training",
        words={"start": start} | task.words(), **training,
    )  # fmt: skip
    network.eval().requires_grad_(False)  # to train on, ask for gradients again
    watch.lap("training")
    spent = task.substeps if target == "displacement" else 1
    return student, Report(spent, len(x0), base, task.rmse(fine), losses, watch.seconds, looks)


def _check(words: dict[str, tuple[str, tuple[str, ...]]]) -> None:
    for name, (word, known) in words.items():
        _validation.check_choice(name, word, known)


def _frozen(teacher: Any, schedule: Any) -> nn.Module:
    """A copy of the teacher, a U-Net as a denoiser."""
    if not isinstance(teacher, nn.Module):
        raise InputError(f"teacher: got {type(teacher).__name__}, expected a torch.nn.Module.")
    if isinstance(schedule, DiscreteVP) and type(teacher).__name__ == "UNet2DModel":
        teacher = UNetDenoiser.of(teacher, schedule)
    frozen: nn.Module = copy.deepcopy(teacher).eval().requires_grad_(False)
    return frozen


def _check_substeps(substeps: Any, target: str) -> None:
    if substeps is None:
        return
    _validation.check_int("substeps", substeps, 1, MOST)
    if target == "published":
        raise InputError(f"substeps: got {substeps} for the published loss, which has none; drop it.")


def _process(schedule: Any, steps: int | None, phi: Tensor | None, spacing: str) -> StudentProcess:
    if not isinstance(schedule, DiscreteVP):
        raise InputError(
            f"schedule: got {type(schedule).__name__}, expected a DiscreteVP, the teacher's levels as a table. "
            "For another process make one of its sigmas: DiscreteVP(1 / (1 + sigmas**2)), sigmas increasing."
        )
    if (steps is None) == (phi is None):
        raise InputError(
            f"steps: got {steps} with phi {'given' if phi is not None else 'None'}, expected one."
        )
    return StudentProcess(schedule, subsequence(schedule, steps, spacing) if phi is None else phi)  # type: ignore[arg-type]


def _data(
    teacher: nn.Module, schedule: DiscreteVP, data: Any, labels: Tensor | None, samples: int,
    event_shape: tuple[int, ...] | None, seed: int, device: torch.device | str,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """x0 (n, *event) and labels (n, ...) or None."""
    if data is None:
        if event_shape is None:
            raise InputError(
                "data: got None without event_shape; expected samples, a loader, or a shape to make."
            )
        count, event = (
            _validation.check_int("samples", samples),
            _validation.check_shape(event_shape, "event_shape"),
        )
        _check_labels(teacher, labels, count)
        return _made(teacher, schedule, labels, count, event, seed, device), labels
    if not torch.is_tensor(data):
        data, labels = _joined(data, labels)
    _validation.check_state("data", data, "finite numbers (n, *event)")
    if data.dim() < 2 or not len(data):
        raise InputError(f"data: got {_validation.describe(data)}, expected finite numbers (n, *event).")
    _check_labels(teacher, labels, len(data))
    return data, labels


def _joined(data: Any, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A loader's batches, or its batches with labels, in one."""
    try:
        parts = [tuple(b) if isinstance(b, (tuple, list)) else (b,) for b in data]
        if labels is None and parts and len(parts[0]) > 1:
            labels = torch.cat([p[1] for p in parts])
        return torch.cat([p[0] for p in parts]), labels
    except (TypeError, RuntimeError, IndexError, ValueError) as error:
        raise InputError(
            f"data: got {_validation.describe(data)}, expected a tensor (n, *event), or batches of tensors of a shape. "
            "numpy's arrays go through torch.from_numpy(data).float()."
        ) from error


def _check_labels(teacher: nn.Module, labels: Any, count: int) -> None:
    """Refuse labels that are not one for each sample, and none where the teacher is told them."""
    if labels is None:
        if getattr(teacher, "labelled", False):
            raise InputError(
                "labels: got none for a class-conditional teacher, expected one for each sample."
            )
        return
    check_labels(teacher, labels)
    if len(labels) != count:
        raise InputError(f"labels: got {len(labels)} for {count} samples, expected one each.")


@torch.no_grad()
def _try(teacher: nn.Module, x0: Tensor, classes: Tensor | None, device: torch.device | str) -> None:
    """Two calls of the teacher, so that one that does not fit is refused with a word."""
    x, some = x0[:2].to(device), None if classes is None else classes[:2]
    sigma = x.new_tensor([1.0, 2.0])[: len(x)]
    try:
        out = teacher(x, sigma, **told(teacher, some, x))
        alone = teacher(x[:1], sigma[0], **told(teacher, None if some is None else some[:1], x[:1]))
        same = torch.allclose(out[:1], alone, rtol=1e-2, atol=1e-3)
    except (RuntimeError, TypeError, IndexError, ValueError) as error:
        raise InputError(
            f"teacher: fails for x {tuple(x.shape)} and sigma ({len(x)},): {error}. Wanted (x, sigma) -> x0, "
            "each sample with a level of its own."
        ) from error
    if out.shape != x.shape:
        raise InputError(f"teacher: gave {tuple(out.shape)} for {tuple(x.shape)}, expected the same shape.")
    if not same:
        raise InputError(
            "teacher: gives a sample another x0 alone, with a 0-d sigma, than beside one of another level, "
            "with sigma (batch,); expected each sample with a level of its own."
        )


@torch.no_grad()
def _made(
    teacher: nn.Module, schedule: DiscreteVP, labels: Tensor | None, count: int, event: tuple[int, ...],
    seed: int, device: torch.device | str,
) -> Tensor:  # fmt: skip
    """The teacher's own samples, in 20 steps of DPMSolverPP(2)."""
    parts = []
    for i in range(0, count, 256):
        n = min(256, count - i)
        problem = _at(teacher, schedule, None if labels is None else labels[i : i + n])
        made = sample(problem, DPMSolverPP(2), shape=(n, *event), steps=20, seed=seed + i, device=device)
        parts.append(made.cpu())
    return torch.cat(parts)


def _at(network: nn.Module, schedule: DiscreteVP, labels: Tensor | None) -> DiffusionModel:
    return DiffusionModel(lambda x, s: network(x, s, **told(network, labels, x)), schedule)


def _begun(teacher: nn.Module, start: str, seed: int) -> nn.Module:
    """The student's network before training."""
    network = copy.deepcopy(teacher).train().requires_grad_(True)
    for module in network.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()  # the teacher answers without: with it, not even its own weights would fit
    return seeded(seed, lambda: _forget(network)) if start == "random" else network


def _forget(network: nn.Module) -> nn.Module:
    """Weights as of a new network, of the global seed."""
    for module in network.modules():
        reset: Callable[[], None] | None = getattr(module, "reset_parameters", None)
        if reset is not None:
            reset()
    return network


def _module_name(network: nn.Module, features: str) -> str | None:
    names: list[str] = [n for n, _ in network.named_modules()]
    expected = ("conv_out", "leave") if features == "auto" else (features,)
    found = [n for n in names if any(n == w or n.endswith(f".{w}") for w in expected)]
    if not found and features == "auto":
        return None
    if len(found) != 1:
        raise InputError(
            f"features: got {features!r}, which is {len(found)} modules of the network, expected one of "
            f"network.named_modules(), the last layer's name ({', '.join(names[-3:])}), or None for none."
        )
    return found[0]


@contextmanager
def _listening(network: nn.Module, name: str | None) -> Iterator[list[Tensor]]:
    """What enters that module while the network runs."""
    heard: list[Tensor] = []
    if name is None:
        yield heard
        return
    handle = network.get_submodule(name).register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))
    try:
        yield heard
    finally:
        handle.remove()


@dataclass(frozen=True)
class _Task:
    """What a student is trained on, and how far it is from it."""

    teacher: nn.Module
    schedule: DiscreteVP
    student: SFDDM
    x0: Tensor
    labels: Tensor | None
    target: str
    substeps: int
    kind: str
    inside: str | None
    hidden: float
    autocast: bool

    def words(self) -> dict[str, Any]:
        """What it is, for a checkpoint."""
        data = {"x0": self.x0[:64]} | ({} if self.labels is None else {"labels": self.labels[:64]})
        levels = {"levels": self.student.process.log_sigmas}
        return {
            "target": self.target, "loss": self.kind, "hidden": self.hidden, "features": self.inside,
            "substeps": self.substeps, "phi": self.student.process.phi.tolist(), "autocast": self.autocast,
            "data": digest(data), "teacher": digest(self.teacher.state_dict() | levels),
        }  # fmt: skip

    def loss(self, batch: Minibatch) -> Tensor:
        device, process = next(self.teacher.parameters()).device, self.student.process
        x0 = self.x0[batch.index].to(device)
        labels = None if self.labels is None else self.labels[batch.index].to(device)
        k = torch.randint(len(process.phi), (len(x0),), generator=batch.generator)
        noise = torch.randn(x0.shape, generator=batch.generator).to(x0)
        sigma = process.log_sigmas[k].exp().to(x0)
        x = x0 + _wide(sigma, x0) * noise
        with torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
            with torch.no_grad(), _listening(self.teacher, self.inside) as theirs:
                expected = self._noise(self.teacher, x, sigma, labels)
                if self.target == "displacement":
                    expected = self._displacement(x, sigma, k, labels, expected)
            with _listening(self.student.network, self.inside) as mine:
                gap = self._noise(self.student.network, x, sigma, labels) - expected
            weights = _wide(self.weights[k].to(gap), gap)
            total = (gap.abs() if self.kind == "l1" else weights * gap.square()).mean()
            for a, b in zip(mine, theirs, strict=True):
                total = (
                    total + self.hidden * ((a - b).abs() if self.kind == "l1" else (a - b).square()).mean()
                )
        return total

    def _noise(self, network: nn.Module, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        out: Tensor = network(x, sigma, **told(network, labels, x))
        return (x - out) / _wide(sigma, x)

    def _displacement(
        self, x: Tensor, sigma: Tensor, k: Tensor, labels: Tensor | None, first: Tensor
    ) -> Tensor:
        """The noise that leads in one step where the teacher's DDIM steps lead, even in its labels."""
        phi = torch.cat([-torch.ones(1), self.student.process.phi.double()])
        start, end = phi[k + 1], phi[k]
        y, at, level, noise = x, sigma, sigma, first
        for j in range(1, self.substeps + 1):
            t = torch.lerp(start, end, j / self.substeps)
            # below the first label there is x0 alone
            after = torch.where(t < 0, 0.0, self.schedule.sigma(t.clamp(min=0))).to(x)
            y, at = y + _wide(after - at, x) * noise, after
            if j < self.substeps:
                level = torch.where(after > 0, after, level)  # who has arrived moves no more
                noise = self._noise(self.teacher, y, level, labels)
        return (y - x) / _wide(at - sigma, x)

    @cached_property
    def weights(self) -> Tensor:
        """(T',) of each level, with mean 1: "mse" none; "kl" beta'^2 / (2 btilde' alpha' (1 - abar')), the
        posteriors' divergence; "end" the squared error that a step of wrong noise leaves at the end."""
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

    @torch.no_grad()
    def judge(self) -> tuple[Tensor, float]:
        """The teacher's fine ODE from fixed noise, and how far DDIM on phi with the teacher ends from it."""
        problem = _at(self.teacher, self.schedule, self._some())
        fine = sample(problem, DPMSolverPP(2), noise=self._start(), steps=FINE)
        base = sample(problem, DDIM(), noise=self._start(), sigmas=self.student.process.grid())
        return fine, _rms(base - fine)

    @torch.no_grad()
    def rmse(self, fine: Tensor) -> float:
        some = self._some()
        student = self.student if some is None else self.student.at(some)
        return _rms(sample(student.problem(), student, noise=self._start()) - fine)

    def _some(self) -> Tensor | None:
        return None if self.labels is None else self.labels[:JUDGED]

    def _start(self) -> Tensor:
        shape = (min(JUDGED, len(self.x0)), *self.x0.shape[1:])
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        return noise.to(next(self.teacher.parameters()).device)


def _wide(v: Tensor, like: Tensor) -> Tensor:
    return v.reshape(-1, *[1] * (like.dim() - 1))


def _rms(gap: Tensor) -> float:
    return float(gap.double().square().mean().sqrt())
