"""One family-wise level for the statistical tests of this folder: 1e-6, for at most 1000 comparisons.

By Bonferroni each comparison has 1e-9, which is 6.1 standard errors of a normal statistic. Algebraic
identities are not sampled: with unit vectors in place of normals, outputs are their own coefficients
and inner products are exact covariances.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

STANDARD_ERRORS = 6.1


@pytest.fixture
def has_mean() -> Callable[[Tensor, float], None]:
    """has_mean(sample, expected) checks the mean of independent entries, at the level above."""

    def check(sample: Tensor, expected: float) -> None:
        sample = sample.double().flatten()
        error = float(sample.std()) / len(sample) ** 0.5
        z = (float(sample.mean()) - expected) / error
        assert abs(z) < STANDARD_ERRORS, f"{float(sample.mean())} against {expected}: {z:.1f} s.e."

    return check
