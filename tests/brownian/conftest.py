"""One family-wise level for all statistical tests of this folder: 1e-6, over at most 1000 of them.

By Bonferroni each comparison is allowed 1e-9, which for a normal statistic is 6.1 standard errors.
Algebraic identities are not sampled: where unit vectors stand in for the normals, outputs are their
own coefficients and their inner products are exact covariances.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

STANDARD_ERRORS = 6.1


@pytest.fixture
def has_mean() -> Callable[[Tensor, float], None]:
    """has_mean(sample, expected): the mean of independent entries is so, at the level above."""

    def check(sample: Tensor, expected: float) -> None:
        sample = sample.double().flatten()
        error = float(sample.std()) / len(sample) ** 0.5
        z = (float(sample.mean()) - expected) / error
        assert abs(z) < STANDARD_ERRORS, f"{float(sample.mean())} against {expected}: {z:.1f} s.e."

    return check
