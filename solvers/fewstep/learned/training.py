"""What all distillations share: training options, the optimisation loop with its checkpoints, the report."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .. import _validation
from .._distributed import barrier, from_first, is_first, part, rank_and_world, sum_over_processes
from .._progress import progress as progress_bar
from .._serialization import DAMAGE, read, write
from ..brownian.random_normals import key_of, node_seed
from ..errors import InputError, NonFiniteError
from ..solver import Solver

HELD_OUT = 8  # one trajectory in eight is not trained on
LEAST = 16  # trajectories: two are held out
APART = 1 << 40  # between the seeds of processes
CHECKPOINT = "fewstep-training-2"


N = TypeVar("N", bound=nn.Module)


class _Options:
    """Options where None stands for a default."""

    def updated(self, argument: str, options: Any) -> Any:
        """These defaults, replaced by those of a user's argument that are not None."""
        kind = type(self)
        _validation.check_instance(argument, options, kind, f"fewstep.{kind.__name__}(...)")
        return replace(self, **{k: v for k, v in vars(options).items() if v is not None})  # type: ignore[type-var]

    def _check_integers(self, **least: int) -> None:
        for name, low in least.items():
            if getattr(self, name) is not None:
                _validation.check_int(name, getattr(self, name), low)


@dataclass(frozen=True)
class TrainingOptions(_Options):
    """How a network is trained. None stands for the default of the function that gets the options.

    Args:
        iterations: number of optimiser steps.
        batch_size: samples per iteration, over all processes together.
        learning_rate: the largest one, reached after a linear warm-up; it then falls to zero as a cosine.
        ema_decay: the largest decay of the moving average of the weights, which is the result; in [0, 1).
        weight_decay: of AdamW; by default 0.
        early_stopping_patience: held-out evaluations in a row without an improvement after which training stops, with
            the average at the best one as the result. 0, the default, never stops.
        checkpoint_every: iterations between checkpoints, and between held-out evaluations; by default 250.
        autocast: compute the loss in bfloat16 where torch's autocast does; by default False.

    Raises:
        InputError: a value out of its range.
    """

    iterations: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    ema_decay: float | None = None
    weight_decay: float | None = None
    early_stopping_patience: int | None = None
    checkpoint_every: int | None = None
    autocast: bool | None = None

    def __post_init__(self) -> None:
        self._check_integers(iterations=1, batch_size=1, early_stopping_patience=0, checkpoint_every=1)
        for name, high in (("learning_rate", math.inf), ("weight_decay", math.inf), ("ema_decay", 1.0)):
            value, expected = getattr(self, name), f"a number of at least 0, below {high:g}"
            if value is not None and _validation.check_float(name, value, 0, expected=expected) >= high:
                raise InputError(f"{name}: got {value!r}, expected {expected}.")


@dataclass(frozen=True)
class TeacherOptions(_Options):
    """How a teacher's data are made. None stands for the default of the function that gets the options.

    Args:
        solver: the solver that the teacher runs.
        substeps: its steps per step of the student.
        trajectories: number of trajectories; for SFDDM without data, of samples.

    Raises:
        InputError: a number out of its range, or something that is not a solver.
    """

    solver: Solver | None = None
    substeps: int | None = None
    trajectories: int | None = None

    def __post_init__(self) -> None:
        _validation.check_instance("solver", self.solver, (Solver, type(None)), "a solver such as fs.EulerMaruyama()")
        self._check_integers(substeps=1, trajectories=1)


DEFAULTS = TrainingOptions(2500, 256, 1e-3, 0.99, 0.0, 0, 250, False)


@dataclass(frozen=True)
class Report:
    """Errors, losses and cost of a distillation.

    Attributes:
        teacher_evaluations: network (or drift) evaluations per teacher trajectory; for SFDDM, per target of training.
        trajectories: number of teacher trajectories, one in eight of them held out; for SFDDM, of data samples, all of
            them trained on.
        parent_rmse, student_rmse: root mean square distance per element to the teacher's final states, of the solver
            that the student started from and of the student: along held-out paths; for SFDDM, from noise that is not
            trained on, with the teacher sampled by DDIM as the parent.
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
        self._start = time.perf_counter()

    def lap(self, stage: str) -> None:
        self.seconds[stage] = round(time.perf_counter() - self._start - sum(self.seconds.values()), 3)


@dataclass(frozen=True)
class Minibatch:
    """The samples of one iteration.

    Attributes:
        index: the samples' indices; with several processes, this one's part of them.
        iteration, share: its number from 0, and this over the number of iterations.
        generator: for further random numbers; a function of (seed, iteration, process).
    """

    index: Tensor
    iteration: int
    share: float
    generator: torch.Generator


def fit(
    network: nn.Module, loss: Callable[[Minibatch], Tensor], count: int, options: TrainingOptions, *, seed: int,
    progress: bool, held_out_loss: Callable[[], float] | None = None, checkpoint: Path | None = None,
    metadata: dict[str, Any] | None = None,
) -> tuple[list[float], list[tuple[int, float]]]:  # fmt: skip
    """Train a network in place by AdamW with clipped gradients, to a moving average of its weights, and freeze it.

    Everything random, dropout included, is a function of (seed, iteration), so a run resumed from a checkpoint ends
    bitwise equal to one that was never interrupted. All processes start from the weights of rank 0, whose held-out
    evaluations count.

    Args:
        loss: the mean over a minibatch.
        count: number of training samples.
        held_out_loss: the held-out distance of the network as it is when called. It is called at the moving average
            every `checkpoint_every` iterations, if there is patience or, in a single process, `progress`.
        checkpoint: a file, written every `checkpoint_every` iterations; training resumes from it where it exists.
        metadata: what must match when resuming, in addition to options, seed and count.

    Returns:
        the loss averaged over tenths of the run, and (iteration, held-out distance) pairs.
    """
    o = DEFAULTS.updated("training", options)
    iterations, patience = o.iterations, o.early_stopping_patience
    run = _Run(network, o, asdict(o) | {"seed": seed, "count": count} | (metadata or {}))
    run.resume(checkpoint)
    rank, world = rank_and_world()
    key, own = key_of(seed), key_of(seed + (1 + rank) * APART)
    bar = progress_bar(range(run.done, iterations), "it", show=progress, total=iterations, initial=run.done)
    # a held-out evaluation is made by all processes or by none, and only the first one has a bar
    judged = held_out_loss if patience > 0 or (world == 1 and progress) else None
    for i in bar:
        if 0 < patience <= run.stale:
            break
        common, generator = (torch.Generator().manual_seed(node_seed(k, i)) for k in (key, own))
        index = torch.randint(count, (o.batch_size,), generator=common)
        with seeded_everywhere(node_seed(own, i), run.device):
            value = run.gradients(loss, Minibatch(index[part()], i, i / iterations, generator), len(index))
        run.step(value)
        if run.done % o.checkpoint_every == 0 or run.done == iterations:
            if not bool(value.isfinite()):
                message = f"The training loss is not finite after {run.done} iterations. Lower the learning_rate."
                raise NonFiniteError(message, step=i, paths=0)
            if judged is not None:
                run.evaluate(judged)
                bar.set_postfix(refresh=False, loss=f"{float(value):.3g}", held_out=f"{run.held_out[-1][1]:.3g}")
            run.save(checkpoint)
    run.set_weights(run.best if patience > 0 else run.average)
    network.eval().requires_grad_(False)  # training it further needs requires_grad_(True)
    losses = torch.stack([t.mean() for t in torch.stack(run.history).tensor_split(10) if len(t)])
    return losses.tolist(), run.held_out


class _Run:
    """Network, averaged weights, optimiser and history of a training: all that a checkpoint contains."""

    def __init__(self, network: nn.Module, options: Any, metadata: dict[str, Any]) -> None:
        self.network = network
        self.options = options
        self.parameters: dict[str, Any] = {k: p for k, p in network.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise InputError(
                "network: got one without trainable parameters; a trained one is frozen. Call "
                "network.requires_grad_(True) to train it further."
            )
        with torch.no_grad():
            for t in (*self.parameters.values(), *network.buffers()):
                t.copy_(from_first(t))
        self.device: torch.device = next(iter(self.parameters.values())).device
        self.metadata: dict[str, Any] = metadata | {"initial weights": digest(network.state_dict())}
        self.average, self.best = self.weights(), self.weights()
        self.history: list[Tensor] = []
        self.held_out: list[tuple[int, float]] = []
        self.stale = 0
        group, rate = [*self.parameters.values()], options.learning_rate
        self.optimiser = torch.optim.AdamW(
            [{"params": group, "initial_lr": rate}], rate, (0.9, 0.99), weight_decay=options.weight_decay
        )
        for p in group:  # as AdamW's first step does, for a checkpoint to be copied in
            moments = {m: torch.zeros_like(p) for m in ("exp_avg", "exp_avg_sq")}
            self.optimiser.state[p] = {"step": torch.tensor(0.0)} | moments

    @property
    def done(self) -> int:
        return len(self.history)

    def weights(self) -> dict[str, Tensor]:
        """A copy of the current weights."""
        return {k: p.detach().clone() for k, p in self.parameters.items()}

    def set_weights(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for k, p in self.parameters.items():
                p.copy_(weights[k])

    def gradients(self, loss: Callable[[Minibatch], Tensor], batch: Minibatch, size: int) -> Tensor:
        """Set the gradients, averaged over all processes, and return the loss. size: of the full minibatch."""
        parameters = [*self.parameters.values()]
        found: tuple[Tensor | None, ...]
        if len(batch.index):
            with torch.enable_grad():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.autocast):
                    value = loss(batch)
                # of these parameters only: a user's denoiser may have parameters of its own
                found = torch.autograd.grad(value, parameters, allow_unused=True)
        else:  # more processes than samples
            value, found = parameters[0].new_zeros(()), (None,) * len(parameters)
        grads = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
        value = value.detach()
        if rank_and_world()[1] > 1:
            flat = torch.cat([value[None], *(g.flatten() for g in grads)])
            flat = sum_over_processes(flat * (len(batch.index) / size))
            value, *grads = torch.split(flat, [1, *(p.numel() for p in parameters)])
        for p, g in zip(parameters, grads, strict=True):
            p.grad = g.reshape(p.shape)
        return value.reshape(())

    def step(self, value: Tensor) -> None:
        """Update the weights and their average; `value` is the loss."""
        parameters = [*self.parameters.values()]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimiser.step()
        self.schedule.step()
        # a small decay at first, because the initial weights are far from the result
        decay = min(self.options.ema_decay, (self.done + 1) / (self.done + 10))
        get_ema_multi_avg_fn(decay)([*self.average.values()], parameters, self.done)  # type: ignore[no-untyped-call]
        self.history.append(value)

    def evaluate(self, held_out_loss: Callable[[], float]) -> None:
        """Call the held-out distance at the averaged weights, and keep them if it is the smallest so far."""
        now, modes = self.weights(), [(m, m.training) for m in self.network.modules()]
        self.set_weights(self.average)
        self.network.eval()
        value = float(from_first(torch.tensor(held_out_loss(), dtype=torch.float64)))
        for module, training in modes:  # not all are in the same mode
            module.training = training
        better = value < min((v for _, v in self.held_out if v == v), default=math.inf)
        self.stale = 0 if better else self.stale + 1
        self.held_out.append((self.done, value))
        if better:
            self.best = self.weights()
        self.set_weights(now)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the state by name, except for the history."""
        out = {f"buffer.{k}": v for k, v in self.network.named_buffers()}
        for k, p in self.parameters.items():
            own = {"weight": p.detach(), "average": self.average[k], "best": self.best[k], **self.optimiser.state[p]}
            out |= {f"{name}.{k}": v for name, v in own.items()}
        return out

    def save(self, path: Path | None) -> None:
        """Write a checkpoint atomically, on rank 0."""
        if path is None or not is_first():
            return
        tensors = self.tensors() | {"history": torch.stack(self.history)}
        # a held-out distance that is nan is null in the file
        held_out = [(i, v if math.isfinite(v) else None) for i, v in self.held_out]
        meta = {"format": CHECKPOINT, "metadata": self.metadata, "held_out": held_out, "stale": self.stale}
        write(path, meta, tensors)

    def resume(self, path: Path | None) -> None:
        """Continue from a checkpoint, where there is one."""
        barrier()
        if path is not None and path.exists():
            try:
                meta, tensors = read(path, (CHECKPOINT,))
            except InputError as error:
                raise InputError(f"{error} Delete it to start again.") from error
            check_same(f"checkpoint: {path} is of a training", meta.get("metadata"), self.metadata)
            try:
                for name, mine in self.tensors().items():
                    theirs = tensors[name]
                    same = (theirs.shape, theirs.dtype) == (mine.shape, mine.dtype)
                    if not same or not bool(theirs.isfinite().all()):
                        raise ValueError(f"{name} has another shape or dtype, or non-finite values")
                    mine.copy_(theirs)
                self.history = list(tensors["history"].to(self.device).unbind())
                self.held_out = [(int(i), math.nan if v is None else float(v)) for i, v in meta["held_out"]]
                self.stale = int(meta["stale"])
            except (RuntimeError, *DAMAGE) as error:
                raise InputError(f"checkpoint: {path} does not fit this network ({error}).") from error
        if float(from_first(torch.tensor(float(self.done)))) != self.done:
            raise InputError(f"checkpoint: {path} differs between processes; expected a folder that all of them share.")
        iterations = self.options.iterations
        self.schedule = LambdaLR(self.optimiser, lambda i: warmup_cosine(i, iterations), last_epoch=self.done - 1)


def check_same(what: str, held: Any, mine: dict[str, Any], same: Callable[[str, Any, Any], bool] | None = None) -> None:
    """Reject metadata of a file that differ from this call's; `same(key, held, mine)` replaces equality."""
    theirs, mine = held if isinstance(held, dict) else {}, json.loads(json.dumps(mine))
    equal = same or (lambda key, a, b: bool(a == b))
    pairs = [(k, theirs.get(k), mine.get(k)) for k in {**theirs, **mine}]
    if other := [f"{k} ({a!s:.60}, this call's is {b!s:.60})" for k, a, b in pairs if not equal(k, a, b)]:
        raise InputError(f"{what} of another {', '.join(other)}. Repeat the call that made it, or use another folder.")


def warmup_cosine(i: int, iterations: int) -> float:
    """The factor of the learning rate: linear over 50 iterations (at most a tenth), then half a cosine."""
    warm = min(50, iterations // 10 + 1)
    return min(1.0, (i + 1) / warm) * 0.5 * (1 + math.cos(math.pi * i / iterations))


@contextmanager
def seeded_everywhere(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators, for dropout, and restore them at the end."""
    with torch.random.fork_rng(range(torch.cuda.device_count()) if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed_all(seed)
        yield


def seeded(seed: int, build: Callable[[], N]) -> N:
    """A network with initial weights of a seed; the global generator is left unchanged."""
    with seeded_everywhere(seed, torch.device("cpu")):
        return build()


def digest(tensors: dict[str, Tensor]) -> str:
    """A hash of names, shapes, dtypes and values."""
    found = hashlib.sha256()
    for k, v in tensors.items():
        found.update(f"{k} {tuple(v.shape)} {v.dtype}".encode())
        found.update(v.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
