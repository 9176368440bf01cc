"""What every distillation of this library shares: the optimiser loop and its report."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..errors import InputError, NonFiniteError

HELD_OUT = 8  # one trajectory in eight is kept from training


@dataclass(frozen=True)
class Report:
    """How a distillation went.

    Attributes:
        teacher_evaluations: network (or drift) evaluations per teacher trajectory.
        trajectories: teacher trajectories made; one in eight is held out.
        seconds: of wall time, by stage.
        losses: the training loss, averaged over tenths of the run.
        parent_rmse, student_rmse: distance to the teacher along its own held-out paths, at the end.
    """

    teacher_evaluations: int
    trajectories: int
    parent_rmse: float
    student_rmse: float
    losses: list[float] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


class Stopwatch:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = round(now - self._last, 3)
        self._last = now


class Data(Protocol):
    """Teacher data that can be indexed by trajectory."""

    def __len__(self) -> int: ...
    def pick(self: D, index: Tensor, /) -> D: ...


D = TypeVar("D", bound=Data)


def distil(
    network: nn.Module, data: D, loss: Callable[[D], Tensor], rmse: Callable[[D], float], *,
    teacher_evaluations: int, watch: Stopwatch, seed: int, progress: bool, iterations: int = 2500,
    batch: int = 256, rate: float = 1e-3,
) -> Report:  # fmt: skip
    """Train the network on seven trajectories in eight; measure on the eighth before and after."""
    every = torch.arange(len(data))
    held, kept = data.pick(every[::HELD_OUT]), every[every % HELD_OUT > 0]
    before = rmse(held)
    losses = fit(
        network.train(), lambda index: loss(data.pick(kept[index])), len(kept),
        iterations=iterations, batch=batch, rate=rate, seed=seed, progress=progress,
    )  # fmt: skip
    network.eval().requires_grad_(False)  # to train on, ask for gradients again
    watch.lap("training")
    return Report(teacher_evaluations, len(data), before, rmse(held), losses, watch.seconds)


def fit(
    network: nn.Module, loss: Callable[[Tensor], Tensor], count: int, *, iterations: int, batch: int,
    rate: float, seed: int, progress: bool,
) -> list[float]:  # fmt: skip
    """Adam with a warm-up, a cosine schedule and clipped gradients; ends at an average of the weights.

    Args:
        loss: of the samples with the given indices.
        count: number of training samples.

    Returns:
        the loss averaged over tenths of the run.
    """
    if iterations < 1:
        raise InputError(f"iterations: got {iterations}, wanted at least 1.")
    parameters: list[Tensor] = [p for p in network.parameters() if p.requires_grad]
    if not parameters:
        raise InputError(
            "network: got one without trainable parameters; a student is frozen when it is done. Call "
            "network.requires_grad_(True) to train it on."
        )
    average = [p.detach().clone() for p in parameters]
    optimiser = torch.optim.Adam(parameters, rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda i: learning_rate(i, iterations))
    generator = torch.Generator().manual_seed(seed)
    history: list[Tensor] = []
    for i in _progress(iterations, progress):
        with torch.enable_grad():
            value = loss(torch.randint(count, (batch,), generator=generator))
            # of these parameters only: a user's denoiser may have parameters of its own
            gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        for p, g in zip(parameters, gradients, strict=True):
            p.grad = g
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        history.append(value.detach())
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - min(0.99, (i + 1) / (i + 10)))
        if i % 100 == 99 or i == iterations - 1:
            _check_finite(history[-1], i)
    with torch.no_grad():
        for p, a in zip(parameters, average, strict=True):
            p.copy_(a)
    return [float(t.mean()) for t in torch.stack(history).tensor_split(10) if len(t)]


def learning_rate(i: int, iterations: int) -> float:
    """Linear over the first 50 iterations (or a tenth of them), then half a cosine to nought."""
    warm = min(50, iterations // 10 + 1)
    return min(1.0, (i + 1) / warm) * 0.5 * (1 + math.cos(math.pi * i / iterations))


def _check_finite(loss: Tensor, i: int) -> None:
    if not bool(loss.isfinite()):
        raise NonFiniteError(
            f"The training loss is not finite after {i + 1} iterations. Lower the learning rate, rate=.",
            step=i, paths=0,
        )  # fmt: skip


def _progress(iterations: int, show: bool) -> Iterable[int]:
    from tqdm import trange

    # disable=None: a bar on a terminal, none in a pipe
    return trange(iterations, desc="distil", disable=None if show else True, leave=False)  # type: ignore[no-any-return]


def seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    """A network with initial weights of its own seed; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()
