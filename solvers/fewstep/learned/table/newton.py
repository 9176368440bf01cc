"""Levenberg-Marquardt on the final states of the unrolled sampler."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .families import Family

RIDGE = 1e-12  # of the largest diagonal entry: directions that no residual sees
SMALL_GAIN = 1e-2  # of the mean loss, over PATIENCE iterations
PATIENCE = 5


@dataclass(frozen=True)
class Newton:
    """A fit in progress, or its result.

    Attributes:
        numbers: the best so far by the held-out score.
        score: that score.
        value: the mean loss on the fitted states.
        damping: of the next iteration.
        current: the numbers that the next iteration starts from.
        done: no step makes the loss smaller, or the last ones hardly did.
    """

    numbers: Tensor
    score: float
    value: float
    damping: float
    current: Tensor
    iterations: int = 0
    done: bool = False


def levenberg_marquardt(
    family: Family, value: Callable[[Tensor], float], equations: Callable[[Tensor, int], tuple[Tensor, Tensor]],
    score: Callable[[Tensor], float], iterations: int, run: Newton,
) -> Newton:  # fmt: skip
    """Continue a run by some iterations; each solves (J'J + damping diag J'J) step = -J'r.

    Args:
        value: the mean loss on the fitted states.
        equations: (J'J, J'r) at these numbers in this iteration.
        score: what decides which iterate is kept; on held-out states.
    """
    best, best_score, now, loss, damping = run.numbers, run.score, run.current, run.value, run.damping
    done, history = run.done, [loss]
    for i in range(0 if done else iterations):
        matrix, gradient = equations(now, run.iterations + i)
        if not bool(matrix.isfinite().all()):
            done = True
            break
        for _ in range(12):
            diagonal = matrix.diagonal()
            damped = matrix + torch.diag(damping * diagonal + RIDGE * diagonal.max() + 1e-300)
            step = torch.linalg.lstsq(damped, -gradient[:, None]).solution[:, 0]
            trial = family.clamped(now + step)
            new = value(trial)
            if math.isfinite(new) and new < loss:
                now, loss, damping = trial, new, max(damping / 5, 1e-10)
                break
            damping = damping * 6
        else:
            done = True
            break
        if (held := score(now)) < best_score:
            best, best_score = now, held
        history.append(loss)
        if len(history) > PATIENCE and history[-1 - PATIENCE] - loss < SMALL_GAIN * loss:
            done = True
            break
    return Newton(best, best_score, loss, damping, now, run.iterations + len(history) - 1, done)
