"""What every distillation of this library shares: the optimiser loop and its report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import InputError, NonFiniteError


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


def fit(
    network: nn.Module,
    loss: Callable[[Tensor], Tensor],
    count: int,
    *,
    iterations: int,
    batch: int,
    rate: float,
    seed: int,
    progress: bool,
) -> list[float]:
    """Adam with a cosine schedule and clipped gradients.

    Args:
        loss: of the samples with the given indices.
        count: number of training samples.
    """
    if iterations < 1:
        raise InputError(f"iterations: got {iterations}, wanted at least 1.")
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(parameters, rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, iterations)
    generator = torch.Generator().manual_seed(seed)
    history: list[Tensor] = []
    for i in _progress(iterations, progress):
        value = loss(torch.randint(count, (batch,), generator=generator))
        optimiser.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        history.append(value.detach())
        if i % 100 == 99 and not bool(history[-1].isfinite()):
            raise NonFiniteError(
                f"The training loss is not finite after {i + 1} iterations. Lower the learning rate.",
                step=i, paths=batch,
            )  # fmt: skip
    tenths = torch.stack(history).tensor_split(10)
    return [float(t.mean()) for t in tenths if len(t)]


def _progress(iterations: int, show: bool) -> Iterable[int]:
    from tqdm import trange

    # disable=None: a bar on a terminal, none in a pipe
    return trange(iterations, desc="distil", disable=None if show else True, leave=False)  # type: ignore[no-any-return]


def seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    """A network with initial weights of its own seed; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


class Stopwatch:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = round(now - self._last, 3)
        self._last = now
