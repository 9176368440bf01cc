"""Sig-DEG on MNIST: a U-Net teacher of 300 steps, students of 5, 10 and 20."""

from __future__ import annotations

import torch
from fewstep import Denoising
from torch import Tensor

from .. import mnist_teacher

# Ten steps that each take away the same share of the teacher's root mean squared error (0.5 at the largest
# level, 0.34 at 3, 0.17 at 1, 0.08 at 0.3, 0.03 at 0.1), rounded; above 9 there is nearly only noise.
TEN = (9.0, 4.5, 2.8, 1.8, 1.2, 0.8, 0.5, 0.28, 0.1)
SUBSTEPS = 15  # of the teacher in each of 20 intervals
PRECISE = 0.1  # below this level the teacher computes in float32, above in bfloat16: half the time


def levels() -> Tensor:
    """(21,) the levels of 20 steps; one in two is that of ten, one in four of five."""
    schedule = mnist_teacher.schedule()
    ends = torch.tensor([schedule.sigma_max, *TEN, schedule.sigma_min], dtype=torch.float64)
    middles = (ends[:-1] * ends[1:]).sqrt()
    return torch.cat([torch.stack([ends[:-1], middles], 1).flatten(), ends[-1:]])


def teacher(labels: Tensor, net: object) -> Denoising:
    """The teacher with a class a sample."""
    problem = mnist_teacher.problem(labels, net=net)  # type: ignore[arg-type]

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=float(sigma.max()) > PRECISE):
            return problem.denoiser(x, sigma)

    return Denoising(denoiser, problem.schedule)
