"""What all distillations share: training options, the optimisation loop with its checkpoints, the report."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .. import _validation
from .._distributed import barrier, from_first, is_first, part, rank_and_world, sum_over_processes
from .._progress import progress as progress_bar
from .._serialization import DAMAGE, atomic_write, read
from ..brownian.random_normals import key_of, node_seed
from ..errors import InputError, NonFiniteError
from ..grid import MOST

HELD_OUT = 8  # one trajectory in eight is not trained on
APART = 1 << 40  # between the seeds of processes
CHECKPOINT = "fewstep-training-2"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state


@dataclass(frozen=True)
class TrainingOptions:
    """How a network is trained. None stands for the default of the method that gets the options.

    Args:
        iterations: number of optimiser steps.
        batch_size: samples per iteration, over all processes together.
        learning_rate: the largest one, reached after a linear warm-up; it then falls to zero as a cosine.
        ema_decay: the largest decay of the moving average of the weights, which is the result; in [0, 1).
        weight_decay: of AdamW.
        early_stopping_patience: number of held-out evaluations in a row without an improvement after which
            training stops; the result is then the average at the best one. 0 never stops.
        checkpoint_every: iterations between checkpoints, and between held-out evaluations.

    Raises:
        InputError: a value out of its range.
    """

    iterations: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    ema_decay: float | None = None
    weight_decay: float = 0.0
    early_stopping_patience: int = 0
    checkpoint_every: int = 250

    def __post_init__(self) -> None:
        for name, least in (("iterations", 1), ("batch_size", 1), ("checkpoint_every", 1),
                            ("early_stopping_patience", 0)):  # fmt: skip
            value = getattr(self, name)
            if value is not None or name not in UNSET:
                _validation.check_int(name, value, least)
        for name, high in (("learning_rate", math.inf), ("weight_decay", math.inf), ("ema_decay", 1.0)):
            value = getattr(self, name)
            if value is not None or name not in UNSET:
                expected = f"a number of at least 0, below {high:g}"
                if _validation.check_float(name, value, 0, expected=expected) >= high:
                    raise InputError(f"{name}: got {value!r}, expected {expected}.")

    def or_else(self, defaults: TrainingOptions) -> TrainingOptions:
        """These options, with those of `defaults` in place of None."""
        missing = {f.name for f in fields(self) if getattr(self, f.name) is None}
        return replace(self, **{name: getattr(defaults, name) for name in missing})


UNSET = ("iterations", "batch_size", "learning_rate", "ema_decay")  # options that may be None
DEFAULTS = TrainingOptions(iterations=2500, batch_size=256, learning_rate=1e-3, ema_decay=0.99)


@dataclass(frozen=True)
class TeacherOptions:
    """What a teacher's data are made of. None stands for the default of the method that gets the options.

    Args:
        solver: the teacher's own solver, with fine steps.
        substeps: its steps per step of the student.
        trajectories: how many trajectories (or, for SFDDM, samples) to make.

    Raises:
        InputError: a number out of its range.
    """

    solver: Any = None
    substeps: int | None = None
    trajectories: int | None = None

    def __post_init__(self) -> None:
        if self.substeps is not None:
            _validation.check_int("substeps", self.substeps, 1, MOST)
        if self.trajectories is not None:
            _validation.check_int("trajectories", self.trajectories)


@dataclass(frozen=True)
class Report:
    """How a distillation went.

    Attributes:
        teacher_evaluations: network (or drift) evaluations per teacher trajectory.
        trajectories: number of teacher trajectories; one in eight is held out.
        parent_rmse, student_rmse: final distance to the teacher along held-out paths.
        losses: the training loss, averaged over tenths of the run.
        seconds: wall time by stage; for a resumed run, of its last part.
        held_out: (iteration, held-out distance) for each held-out evaluation during training.
        knots: the distances of "parent" and "student" at each coarse knot (diffusion models).
    """

    teacher_evaluations: int
    trajectories: int
    parent_rmse: float
    student_rmse: float
    losses: list[float] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    knots: dict[str, list[float]] = field(default_factory=dict)


def held_out(count: int) -> tuple[Tensor, Tensor]:
    """The indices to train on and those to evaluate on, a function of the count alone.

    They are drawn, because whatever repeats with the index, as labels do, would fall on one side.
    """
    order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
    held = max(2, count // HELD_OUT)
    return order[held:].sort().values, order[:held].sort().values


class Stopwatch:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = round(now - self._last, 3)
        self._last = now


@dataclass(frozen=True)
class Minibatch:
    """The samples of one iteration.

    Attributes:
        index: the samples' indices; with several processes, this one's part of them.
        iteration: from 0.
        share: iteration / iterations.
        generator: for further random numbers; a function of (seed, iteration, process).
    """

    index: Tensor
    iteration: int
    share: float
    generator: torch.Generator


def fit(
    network: nn.Module, loss: Callable[[Minibatch], Tensor], count: int, options: TrainingOptions, *,
    seed: int, progress: bool, held_out_loss: Callable[[], float] | None = None,
    checkpoint: Path | None = None, split: bool = True, metadata: dict[str, Any] | None = None,
) -> tuple[list[float], list[tuple[int, float]]]:  # fmt: skip
    """Train a network in place by AdamW with clipped gradients, to a moving average of its weights.

    Everything random, dropout included, is a function of (seed, iteration), so a run resumed from a
    checkpoint ends bitwise equal to one that was never interrupted. All processes start from the weights of
    rank 0, whose held-out evaluations count.

    Args:
        loss: the mean over a minibatch.
        count: number of training samples.
        held_out_loss: the held-out distance of the network as it is when called. It is called at the moving
            average every `checkpoint_every` iterations, if there is patience, or a bar to show it on.
        checkpoint: a file, written atomically every `checkpoint_every` iterations; training resumes from it
            where it exists.
        split: each process takes its part of a minibatch; False if the loss does that itself.
        metadata: what must match when resuming, in addition to options, seed and count.

    Returns:
        the loss averaged over tenths of the run, and (iteration, held-out distance) pairs.
    """
    options = options.or_else(DEFAULTS)
    assert options.iterations is not None
    assert options.batch_size is not None
    iterations, patience, every = (
        options.iterations,
        options.early_stopping_patience,
        options.checkpoint_every,
    )
    run = _Run(network, options, asdict(options) | {"seed": seed, "count": count} | (metadata or {}))
    run.resume(checkpoint)
    rank, world = rank_and_world()
    key, own = key_of(seed), key_of(seed + (1 + rank) * APART)
    bar = progress_bar(range(run.done, iterations), "it", show=progress, total=iterations, initial=run.done)
    # a held-out evaluation is made by all processes or by none, and only the first one has a bar
    judged = held_out_loss if patience > 0 or (world == 1 and not bar.disable) else None
    for i in bar:
        if 0 < patience <= run.stale:
            break
        common, generator = (torch.Generator().manual_seed(node_seed(k, i)) for k in (key, own))
        index = torch.randint(count, (options.batch_size,), generator=common)
        mine = index[part()] if split else index
        with seeded_everywhere(node_seed(own, i), run.device):
            value = run.gradients(loss, Minibatch(mine, i, i / iterations, generator), len(index), split)
        run.step(value)
        if run.done % every == 0 or run.done == iterations:
            run.check_finite()
            if judged is not None:
                run.evaluate(judged)
                bar.set_postfix(loss=f"{float(value):.3g}", held_out=f"{run.held_out[-1][1]:.3g}")
            run.save(checkpoint)
    run.set_weights(run.best if patience > 0 else run.average)
    return [float(t.mean()) for t in torch.stack(run.history).tensor_split(10) if len(t)], run.held_out


class _Run:
    """Network, averaged weights, optimiser and history of a training: all that a checkpoint holds."""

    def __init__(self, network: nn.Module, options: TrainingOptions, metadata: dict[str, Any]) -> None:
        trained = {k: p for k, p in network.named_parameters() if p.requires_grad}
        if not trained:
            raise InputError(
                "network: got one without trainable parameters; a student is frozen after training. Call "
                "network.requires_grad_(True) to train it further."
            )
        self.network = network
        self.options = options
        self.parameters: dict[str, nn.Parameter] = trained
        self.device: torch.device = next(iter(trained.values())).device
        self.buffers: dict[str, Tensor] = dict(network.named_buffers())
        with torch.no_grad():
            for t in (*trained.values(), *self.buffers.values()):
                t.copy_(from_first(t))
        self.metadata: dict[str, Any] = metadata | {"initial weights": digest(network.state_dict())}
        self.average: dict[str, Tensor] = {k: p.detach().clone() for k, p in trained.items()}
        self.best: dict[str, Tensor] = self.average
        self.history: list[Tensor] = []
        self.held_out: list[tuple[int, float]] = []
        self.stale: int = 0
        self._set_optimiser()

    def _set_optimiser(self) -> None:
        """An optimiser and a schedule that stand after the iterations done."""
        rate, iterations, done = self.options.learning_rate, self.options.iterations, self.done
        assert rate is not None
        assert iterations is not None
        group = {"params": list(self.parameters.values()), "initial_lr": rate}
        decay = self.options.weight_decay
        self.optimiser: torch.optim.AdamW = torch.optim.AdamW([group], rate, (0.9, 0.99), weight_decay=decay)
        self.schedule: LambdaLR = LambdaLR(
            self.optimiser, lambda i: warmup_cosine(i, iterations), last_epoch=done - 1
        )

    @property
    def done(self) -> int:
        return len(self.history)

    def gradients(
        self, loss: Callable[[Minibatch], Tensor], batch: Minibatch, whole: int, split: bool
    ) -> Tensor:
        """Fill the gradients, those of all processes together; returns the loss."""
        parameters = list(self.parameters.values())
        found: tuple[Tensor | None, ...]
        if len(batch.index):
            with torch.enable_grad():
                value = loss(batch)
                # of these parameters only: a user's denoiser may have parameters of its own
                found = torch.autograd.grad(value, parameters, allow_unused=True)
        else:  # more processes than samples
            value, found = parameters[0].new_zeros(()), (None,) * len(parameters)
        grads = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
        value = value.detach()
        if split and rank_and_world()[1] > 1:
            flat = torch.cat([value[None], *(g.flatten() for g in grads)])
            flat = sum_over_processes(flat * (len(batch.index) / whole))
            value, *grads = torch.split(flat, [1, *(p.numel() for p in parameters)])
        for p, g in zip(parameters, grads, strict=True):
            p.grad = g.reshape(p.shape)
        return value.reshape(())

    def step(self, value: Tensor) -> None:
        """Update the weights and their average; `value` is the loss."""
        parameters: list[Any] = list(self.parameters.values())
        nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimiser.step()
        self.schedule.step()
        # a small decay at first, so that the initial weights are soon forgotten
        assert self.options.ema_decay is not None
        decay = min(self.options.ema_decay, (self.done + 1) / (self.done + 10))
        get_ema_multi_avg_fn(decay)(list(self.average.values()), parameters, self.done)  # type: ignore[no-untyped-call]
        self.history.append(value)

    def evaluate(self, held_out_loss: Callable[[], float]) -> None:
        """Call the held-out distance at the averaged weights, and keep them if it is the smallest so far."""
        now = {k: p.detach().clone() for k, p in self.parameters.items()}
        training = self.network.training
        self.set_weights(self.average)
        self.network.eval()
        value = float(from_first(torch.tensor(held_out_loss(), dtype=torch.float64)))
        self.network.train(training)
        self.set_weights(now)
        better = value < min((v for _, v in self.held_out if v == v), default=math.inf)
        self.stale = 0 if better else self.stale + 1
        self.held_out.append((self.done, value))
        if better:
            self.best = {k: v.clone() for k, v in self.average.items()}

    def set_weights(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for k, p in self.parameters.items():
                p.copy_(weights[k])

    def check_finite(self) -> None:
        if not bool(self.history[-1].isfinite()):
            raise NonFiniteError(
                f"The training loss is not finite after {self.done} iterations. Lower the learning_rate.",
                step=self.done - 1, paths=0,
            )  # fmt: skip

    def save(self, path: Path | None) -> None:
        """Write a checkpoint atomically, on rank 0."""
        if path is None or not is_first():
            return
        from safetensors.torch import save_file

        tensors = {"history": torch.stack(self.history).cpu()}
        tensors |= {f"buffer.{k}": v for k, v in self.buffers.items()}
        for k, p in self.parameters.items():
            tensors |= {f"weight.{k}": p.detach(), f"average.{k}": self.average[k], f"best.{k}": self.best[k]}
            tensors |= {f"{m}.{k}": v for m, v in self.optimiser.state[p].items()}
        meta = {
            "format": CHECKPOINT,
            "metadata": self.metadata,
            "held_out": self.held_out,
            "stale": self.stale,
        }
        # a copy: safetensors refuses tensors that share memory, as best and average do at first
        tensors = {k: v.contiguous().clone() for k, v in tensors.items()}
        with atomic_write(path) as place:
            save_file(tensors, str(place), {"fewstep": json.dumps(meta)})

    def resume(self, path: Path | None) -> None:
        """Continue from a checkpoint, where there is one."""
        barrier()
        if path is not None and path.exists():
            try:
                meta, tensors = read(path, (CHECKPOINT,))
            except InputError as error:
                raise InputError(f"{error} Delete it to start again.") from error
            self._check_metadata(path, meta.get("metadata"))
            try:
                self._load(meta, tensors)
            except (RuntimeError, *DAMAGE) as error:
                raise InputError(f"checkpoint: {path} does not fit this network ({error}).") from error
        if float(from_first(torch.tensor(float(self.done)))) != self.done:
            raise InputError(
                f"checkpoint: {path} differs between processes; expected one folder that all of them share."
            )

    def _check_metadata(self, path: Path, held: Any) -> None:
        mine, theirs = json.loads(json.dumps(self.metadata)), held if isinstance(held, dict) else {}
        other = [
            f"{k} ({short(theirs.get(k))}, this call's is {short(mine.get(k))})"
            for k in {**theirs, **mine} if theirs.get(k) != mine.get(k)
        ]  # fmt: skip
        if other:
            raise InputError(
                f"checkpoint: {path} is of a training with another {', '.join(other)}. Repeat the call that "
                "made it, or use another folder."
            )

    def _load(self, meta: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        kinds = ("weight", "average", "best", *MOMENTS[1:])
        expected = {f"{kind}.{k}": p for k, p in self.parameters.items() for kind in kinds}
        for name, p in (expected | {f"buffer.{k}": b for k, b in self.buffers.items()}).items():
            # copying would broadcast a smaller tensor
            if (tensors[name].shape, tensors[name].dtype) != (p.shape, p.dtype):
                raise ValueError(f"{name} has another shape or dtype")
            if not bool(tensors[name].isfinite().all()):
                raise ValueError(f"{name} has non-finite values")
        # clones: sums over memory mapped from a file may be rounded differently
        states = [{m: tensors[f"{m}.{k}"].clone() for m in MOMENTS} for k in self.parameters]
        self.set_weights({k: tensors[f"weight.{k}"] for k in self.parameters})
        with torch.no_grad():
            for k, b in self.buffers.items():
                b.copy_(tensors[f"buffer.{k}"])
        self.average, self.best = (
            {k: tensors[f"{kind}.{k}"].clone().to(p.device) for k, p in self.parameters.items()}
            for kind in ("average", "best")
        )
        self.history = list(tensors["history"].to(self.device).unbind())
        self.held_out, self.stale = [(int(i), float(v)) for i, v in meta["held_out"]], int(meta["stale"])
        self._set_optimiser()
        # places the moments on the parameters' devices, the step on the CPU
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": dict(enumerate(states)), "param_groups": groups})


def warmup_cosine(i: int, iterations: int) -> float:
    """The factor of the learning rate: linear over 50 iterations (at most a tenth), then half a cosine."""
    warm = min(50, iterations // 10 + 1)
    return min(1.0, (i + 1) / warm) * 0.5 * (1 + math.cos(math.pi * i / iterations))


@contextmanager
def seeded_everywhere(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators, for dropout, and restore them at the end."""
    every = range(torch.cuda.device_count()) if device.type == "cuda" else []
    with torch.random.fork_rng(devices=list(every)):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed_all(seed)
        yield


def seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    """A network with initial weights of a seed; the global generator is left unchanged."""
    with seeded_everywhere(seed, torch.device("cpu")):
        return build()


def short(value: Any) -> str:
    """The value as text, cut at 60 characters."""
    text = str(value)
    return text if len(text) < 60 else text[:57] + "..."


def digest(tensors: dict[str, Tensor]) -> str:
    """A hash of names, shapes, dtypes and values."""
    found = hashlib.sha256()
    for k, v in tensors.items():
        found.update(f"{k} {tuple(v.shape)} {v.dtype}".encode())
        found.update(v.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
