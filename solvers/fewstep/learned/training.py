"""What every distillation of this library shares: the optimiser's loop, its checkpoints and its report."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import _validation
from .._distributed import barrier, from_first, part, rank_and_world, sum_over_processes
from .._serialization import DAMAGE, atomic_write, read
from ..brownian.random_normals import key_of, node_seed
from ..errors import InputError, NonFiniteError

HELD_OUT = 8  # one trajectory in eight is kept from training
APART = 1 << 40  # between the seeds of processes
CHECKPOINT = "fewstep-training-1"
AVERAGE, PATIENCE, EVERY = 0.99, 0, 250
KEPT = ("now", "mean", "best", "exp_avg", "exp_avg_sq")  # of each parameter in a checkpoint


@dataclass(frozen=True)
class Report:
    """How a distillation went.

    Attributes:
        teacher_evaluations: network (or drift) evaluations per teacher trajectory.
        trajectories: teacher trajectories made; one in eight is held out.
        parent_rmse, student_rmse: distance to the teacher along its own held-out paths, at the end.
        losses: the training loss, averaged over tenths of the run.
        seconds: of wall time, by stage; of a resumed run, those of its last part.
        looks: (iteration, held-out distance) pairs, where the training looked.
        knots: the parent's and the student's distance at each coarse knot (`DiffusionModel`).
    """

    teacher_evaluations: int
    trajectories: int
    parent_rmse: float
    student_rmse: float
    losses: list[float] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    looks: list[tuple[int, float]] = field(default_factory=list)
    knots: dict[str, list[float]] = field(default_factory=dict)


def held_out(count: int) -> tuple[Tensor, Tensor]:
    """The numbers of the trajectories to train on and of those to judge by, drawn once for each count.

    Drawn, since what repeats with the trajectory's number, as labels do, would fall on one side.
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
    """What an iteration's loss is of.

    Attributes:
        index: the samples' numbers; of several processes, this one's part of them.
        iteration: from 0.
        share: iteration / iterations.
        generator: for what else is random; a function of (seed, iteration, process).
    """

    index: Tensor
    iteration: int
    share: float
    generator: torch.Generator


def fit(
    network: nn.Module, loss: Callable[[Minibatch], Tensor], count: int, *, iterations: int, batch: int,
    rate: float, seed: int, progress: bool, average: float = AVERAGE, weight_decay: float = 0.0,
    patience: int = PATIENCE, every: int = EVERY, look: Callable[[], float] | None = None,
    checkpoint: Path | None = None, split: bool = True, words: dict[str, Any] | None = None,
) -> tuple[list[float], list[tuple[int, float]]]:  # fmt: skip
    """AdamW with a warm-up, a cosine schedule and clipped gradients; ends at an average of the weights.

    All that is random is a function of (seed, iteration), dropout too, so that a run that goes on from a
    checkpoint ends with the bits of one that was never stopped. Of several processes all begin with the
    first one's weights and its looks count.

    Args:
        loss: the mean over a minibatch.
        count: number of training samples.
        average: the largest weight of the old in the moving average of the weights.
        look: a held-out distance of the averaged weights, asked for every so many iterations where there
            is patience, or a bar on a terminal to show it on.
        patience: looks in a row without a better distance after which training stops; 0 for never. With
            patience the weights of the best look are kept.
        checkpoint: a file written every so many iterations, each whole or not at all; where it is
            there already, training goes on from it.
        split: under torch.distributed each process takes its part of a minibatch; False where the loss
            sees to that itself.
        words: what a checkpoint must agree with to be gone on from.

    Returns:
        the loss averaged over tenths of the run, and the looks.
    """
    check_options({"iterations": iterations, "batch": batch, "rate": rate, "average": average,
                   "patience": patience, "every": every})  # fmt: skip
    words = {"iterations": iterations, "batch": batch, "rate": rate, "seed": seed, "count": count,
             "average": average, "patience": patience, "every": every} | (words or {})  # fmt: skip
    run = Training(network, weight_decay, words)
    run.read(checkpoint)
    key, own = key_of(seed), key_of(seed + (1 + rank_and_world()[0]) * APART)
    bar = _progress(run.done, iterations, progress)
    # a look is made by all processes or by none, and only the first one has a bar
    alone = rank_and_world()[1] == 1
    looking = look is not None and (patience > 0 or (alone and not bar.disable))
    for i in bar:
        if 0 < patience <= run.stale:
            break
        common, generator = (torch.Generator().manual_seed(node_seed(k, i)) for k in (key, own))
        index = torch.randint(count, (batch,), generator=common)
        mine = index[part()] if split else index
        with seeded_everywhere(node_seed(own, i), run.device):
            value = run.gradients(loss, Minibatch(mine, i, i / iterations, generator), len(index), split)
        run.step(rate * learning_rate(i, iterations), average, value)
        if run.done % every == 0 or run.done == iterations:
            run.check_finite()
            if looking and look is not None:
                run.looked(look)
                bar.set_postfix(loss=f"{float(value):.3g}", held_out=f"{run.looks[-1][1]:.3g}")
            run.write(checkpoint)
    run.finish(patience > 0)
    return [float(t.mean()) for t in torch.stack(run.history).tensor_split(10) if len(t)], run.looks


def check_options(options: dict[str, Any]) -> None:
    """Refuse numbers of the optimiser that are out of range; those that are not there are well."""
    for name, least in (("iterations", 1), ("batch", 1), ("every", 1), ("patience", 0)):
        came = options.get(name, least)
        _validation.check_int(name, came, least)
    for name, top in (("rate", math.inf), ("average", 1.0)):
        came = options.get(name, 0.5)
        if not 0 <= _validation.check_float(name, came) < top:
            raise InputError(f"{name}: got {came!r}, expected a number of at least 0, below {top:g}.")


class Training:
    """Network, averaged weights, optimiser and history of a run: all that a checkpoint holds."""

    def __init__(self, network: nn.Module, weight_decay: float, words: dict[str, Any]) -> None:
        trained = {k: p for k, p in network.named_parameters() if p.requires_grad}
        self.parameters: dict[str, nn.Parameter] = trained
        if not self.parameters:
            raise InputError(
                "network: got one without trainable parameters; a student is frozen when it is done. Call "
                "network.requires_grad_(True) to train it on."
            )
        self.network = network
        self.device: torch.device = next(iter(self.parameters.values())).device
        self.buffers: dict[str, Tensor] = dict(network.named_buffers())
        with torch.no_grad():
            for t in (*self.parameters.values(), *self.buffers.values()):
                t.copy_(from_first(t))
        self.words: dict[str, Any] = words | {"begun from": digest(network.state_dict())}
        self.average: dict[str, Tensor] = {k: p.detach().clone() for k, p in self.parameters.items()}
        self.best: dict[str, Tensor] = self.average
        self.optimiser: torch.optim.AdamW = torch.optim.AdamW(
            self.parameters.values(), 1.0, betas=(0.9, 0.99), weight_decay=weight_decay
        )
        self.history: list[Tensor] = []
        self.looks: list[tuple[int, float]] = []
        self.stale: int = 0

    @property
    def done(self) -> int:
        return len(self.history)

    def gradients(
        self, loss: Callable[[Minibatch], Tensor], batch: Minibatch, whole: int, split: bool
    ) -> Tensor:
        """Fill the gradients, of all processes together; the loss."""
        parameters = list(self.parameters.values())
        found: tuple[Tensor | None, ...]
        if len(batch.index):
            with torch.enable_grad():
                value = loss(batch)
                # of these parameters only: a user's denoiser may have parameters of its own
                found = torch.autograd.grad(value, parameters, allow_unused=True)
        else:  # more processes than samples
            value, found = parameters[0].new_zeros(()), (None,) * len(parameters)
        for p, g in zip(parameters, found, strict=True):
            p.grad = torch.zeros_like(p) if g is None else g
        value = value.detach()
        if split and rank_and_world()[1] > 1:
            flat = torch.cat([value[None], *(p.grad.flatten() for p in parameters)])  # type: ignore[union-attr]
            flat = sum_over_processes(flat * (len(batch.index) / whole))
            value, *summed = torch.split(flat, [1, *(p.numel() for p in parameters)])
            for p, g in zip(parameters, summed, strict=True):
                p.grad = g.reshape(p.shape)
        return value.reshape(())

    def step(self, rate: float, average: float, value: Tensor) -> None:
        parameters: list[Tensor] = list(self.parameters.values())
        nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimiser.param_groups[0]["lr"] = rate
        self.optimiser.step()
        with torch.no_grad():
            far = 1 - min(average, (self.done + 1) / (self.done + 10))
            torch._foreach_lerp_(list(self.average.values()), parameters, far)
        self.history.append(value)

    def looked(self, look: Callable[[], float]) -> None:
        """Ask for the held-out distance of the averaged weights, and remember them if it is the best."""
        now = {k: p.detach().clone() for k, p in self.parameters.items()}
        training = self.network.training
        self._put(self.average)
        self.network.eval()
        value = float(from_first(torch.tensor(look(), dtype=torch.float64)))
        self.network.train(training)
        self._put(now)
        better = value < min((v for _, v in self.looks if v == v), default=math.inf)
        self.stale = 0 if better else self.stale + 1
        self.looks.append((self.done, value))
        if better:
            self.best = {k: v.clone() for k, v in self.average.items()}

    def finish(self, at_best: bool) -> None:
        self._put(self.best if at_best else self.average)

    def _put(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for k, p in self.parameters.items():
                p.copy_(weights[k])

    def check_finite(self) -> None:
        if not bool(self.history[-1].isfinite()):
            raise NonFiniteError(
                f"The training loss is not finite after {self.done} iterations. Lower the learning rate, "
                "rate=.", step=self.done - 1, paths=0,
            )  # fmt: skip

    def write(self, path: Path | None) -> None:
        """The state as a file that appears whole or not at all; by the first process alone."""
        if path is None or rank_and_world()[0]:
            return
        from safetensors.torch import save_file

        tensors = {"history": torch.stack(self.history).cpu()}
        tensors |= {f"buffer.{k}": v for k, v in self.buffers.items()}
        for k, p in self.parameters.items():
            tensors |= {f"now.{k}": p.detach(), f"mean.{k}": self.average[k], f"best.{k}": self.best[k]}
            tensors |= {f"{m}.{k}": v for m, v in self.optimiser.state[p].items()}
        meta = {"format": CHECKPOINT, "words": self.words, "looks": self.looks, "stale": self.stale}
        # a copy: safetensors refuses tensors that share memory, as best and mean do without a look
        tensors = {k: v.contiguous().clone() for k, v in tensors.items()}
        with atomic_write(path) as place:
            save_file(tensors, str(place), {"fewstep": json.dumps(meta)})

    def read(self, path: Path | None) -> None:
        """Go on from a checkpoint, where there is one."""
        barrier()
        if path is not None and path.exists():
            self._read(path)
        if float(from_first(torch.tensor(float(self.done)))) != self.done:
            raise InputError(f"checkpoint: {path} is not the same in all processes; expected one folder that "
                             "all see.")  # fmt: skip

    def _check_fit(self, tensors: dict[str, Tensor]) -> None:
        """Copying would spread a smaller tensor over a larger one."""
        shaped = [(f"{m}.{k}", p) for k, p in self.parameters.items() for m in KEPT]
        for name, p in [*shaped, *((f"buffer.{k}", b) for k, b in self.buffers.items())]:
            if (tensors[name].shape, tensors[name].dtype) != (p.shape, p.dtype):
                raise ValueError(f"{name} has another shape or dtype")
            if not bool(tensors[name].isfinite().all()):
                raise ValueError(f"{name} has numbers that are not finite")

    def _read(self, path: Path) -> None:

        try:
            meta, tensors = read(path, (CHECKPOINT,))
        except InputError as error:
            raise InputError(f"{error} Delete it to begin again.") from error
        mine = json.loads(json.dumps(self.words))
        if meta.get("words") != mine:
            theirs = meta["words"] if isinstance(meta.get("words"), dict) else {}
            other = [
                f"{k} ({short(theirs.get(k))}, this call's is {short(mine.get(k))})"
                for k in {**theirs, **mine} if theirs.get(k) != mine.get(k)
            ]  # fmt: skip
            raise InputError(
                f"checkpoint: {path} is of a training with another {', '.join(other)}. Repeat the call that "
                "made it, or take another folder."
            )
        try:
            self._check_fit(tensors)
            with torch.no_grad():
                for k, p in self.parameters.items():
                    p.copy_(tensors[f"now.{k}"])
                    self.average[k].copy_(tensors[f"mean.{k}"])
                    # copies, since what is mapped from a file lies where sums are rounded otherwise
                    self.optimiser.state[p] = {
                        m: tensors[f"{m}.{k}"].clone().to("cpu" if m == "step" else p.device)
                        for m in ("step", "exp_avg", "exp_avg_sq")
                    }
                self.best = {k: tensors[f"best.{k}"].clone().to(p.device) for k, p in self.parameters.items()}
                for k, b in self.buffers.items():
                    b.copy_(tensors[f"buffer.{k}"])
            self.history = list(tensors["history"].to(next(iter(self.average.values())).device).unbind())
            self.looks, self.stale = [(int(i), float(v)) for i, v in meta["looks"]], int(meta["stale"])
        except (RuntimeError, *DAMAGE) as error:
            raise InputError(f"checkpoint: {path} does not fit this network ({error}).") from error


def learning_rate(i: int, iterations: int) -> float:
    """Linear over the first 50 iterations (or a tenth of them), then half a cosine to nought."""
    warm = min(50, iterations // 10 + 1)
    return min(1.0, (i + 1) / warm) * 0.5 * (1 + math.cos(math.pi * i / iterations))


def _progress(done: int, iterations: int, show: bool) -> Any:
    from tqdm import trange

    # disable=None: a bar on a terminal, none in a pipe
    hidden = None if show and rank_and_world()[0] == 0 else True
    return trange(
        done, iterations, initial=done, total=iterations, desc="distil", disable=hidden, leave=False
    )


@contextmanager
def seeded_everywhere(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global generators of that seed, for dropout; as they were when done."""
    every = range(torch.cuda.device_count()) if device.type == "cuda" else []
    with torch.random.fork_rng(devices=list(every)):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed_all(seed)
        yield


def short(value: Any) -> str:
    """As text, cut at 60 characters."""
    text = str(value)
    return text if len(text) < 60 else text[:57] + "..."


def digest(tensors: dict[str, Tensor]) -> str:
    """A name for these numbers."""
    found = hashlib.sha256()
    for k, v in tensors.items():
        found.update(f"{k} {tuple(v.shape)} {v.dtype}".encode())
        found.update(v.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    """A network with initial weights of its own seed; the global generator is left as it was."""
    with seeded_everywhere(seed, torch.device("cpu")):
        return build()
