"""Errors of a table and the report of a fit."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...distances import sliced_w2


@dataclass(frozen=True)
class Errors:
    """Distances to the teacher's ends, root mean square per element of a sample, each with its standard error.

    Attributes:
        rmse, median, q90: over samples: the root mean square, the median and the 90 % quantile.
        rmse_se, median_se, q90_se: their standard errors, by bootstrap.
    """

    rmse: float
    median: float
    q90: float
    rmse_se: float = 0.0
    median_se: float = 0.0
    q90_se: float = 0.0

    @classmethod
    def of(cls, squares: Tensor, resamples: int = 200) -> Errors:
        """From mean squared distances (n,)."""
        if not resamples:
            return cls(*_summary(squares[None])[0].tolist())
        draws = torch.randint(len(squares), (resamples, len(squares)), generator=torch.Generator().manual_seed(0))
        spread = _summary(squares[draws]).std(0)
        return cls(*_summary(squares[None])[0].tolist(), *spread.tolist())

    def excess(self, base: Errors) -> float:
        """The RMSE, times how far the median and the 90 % quantile exceed those of a base."""
        return self.rmse * max(1.0, self.median / (base.median + 1e-300)) * max(1.0, self.q90 / (base.q90 + 1e-300))

    def __str__(self) -> str:
        return f"rmse {self.rmse:.3g} ± {self.rmse_se:.1g}, median {self.median:.3g}, 90 % {self.q90:.3g}"


@dataclass(frozen=True)
class Law:
    """The law of samples against the teacher's, whatever their paths.

    Attributes:
        variance_ratio: of the samples to the teacher's, over all elements.
        distance: sliced W2 of the samples of one half of the paths and the teacher's of the other half.
    """

    variance_ratio: float
    distance: float

    @classmethod
    def of(cls, ends: Tensor, teacher: Tensor) -> Law:
        """From paired ends (n, *event)."""
        ratio = ends.double().var(0).sum() / teacher.double().var(0).sum()
        return cls(float(ratio), sliced_w2(ends[::2], teacher[1::2], projections=128))


def _summary(squares: Tensor) -> Tensor:
    """(m, 3) of squares (m, n)."""
    distance = squares.sqrt()
    parts = [squares.mean(1).sqrt(), distance.quantile(0.5, dim=1), distance.quantile(0.9, dim=1)]
    return torch.stack(parts, 1)


@dataclass(frozen=True)
class TableReport:
    """What a fit found.

    Attributes:
        base: the best untrained sampler on the fitted states.
        base_errors, student_errors: of it and of the result, on the held-out states.
        teacher: the teacher's name.
        teacher_rmse: distance of the teacher to itself with half as many steps: about as far as it can be trusted.
        candidates: held-out RMSE of each fit by the name of its start.
        start: the start of the result, "" where the result is the base.
        iterations: Newton iterations of the result.
        fallback: why the result is the base, else "".
        laws: of a stochastic table, of the untrained sampler, of a deterministic table of as many evaluations, and of
            the teacher itself, whose distance is that of two samples of one law; empty for deterministic tables.
        remarks: what else a user should know.
        evaluations: network evaluations per start state, without backward passes.
        seconds: wall time.
    """

    base: str
    base_errors: Errors
    student_errors: Errors
    teacher: str
    teacher_rmse: float
    candidates: dict[str, float] = field(default_factory=dict)
    start: str = ""
    iterations: int = 0
    fallback: str = ""
    laws: dict[str, Law] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    evaluations: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        lines = [f"{self.base} (untrained): {self.base_errors}", f"fitted: {self.student_errors}"]
        lines += [f"from {self.start}, {self.iterations} iterations"] if self.start else []
        lines += [f"fallback: {self.fallback}"] if self.fallback else []
        laws = [f"{name} {law.distance:.3g} ({law.variance_ratio:.3g})" for name, law in self.laws.items()]
        lines += [f"distance of laws (variance ratio): {', '.join(laws)}"] if laws else []
        return "\n".join([*lines, *self.remarks])
