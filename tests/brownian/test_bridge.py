"""The conditional law of the parts of an interval, as exact covariances."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fewstep.brownian import Increment
from fewstep.brownian.bridge import bridge_matrix, noise_scales, split

VARIANCES = torch.tensor([1.0, 1 / 12, 1 / 720], dtype=torch.float64)
shares = st.floats(-12, -0.30103).map(lambda e: 10.0**e).map(lambda x: min(x, 0.5))
levels = st.integers(1, 3)


@given(levels, shares, st.booleans())
@example(1, 0.5, False)
@example(2, 0.5, False)
@example(3, 0.5, True)
def test_parts_are_independent_increments_that_join_to_the_interval(n, share, late):
    """These two facts determine the conditional law."""
    x, y = (1 - share, share) if late else (share, 1 - share)
    M = torch.tensor(bridge_matrix(n, x, y), dtype=torch.float64)
    root = torch.cat([VARIANCES[:n].sqrt(), torch.ones(n, dtype=torch.float64)])
    forms = M * root
    # each part in units of its own length, so one tolerance fits a part of 1e-12
    scale = torch.cat([(VARIANCES[:n] * x).sqrt(), (VARIANCES[:n] * y).sqrt()])
    forms = forms / scale[:, None]
    assert torch.allclose(forms @ forms.mT, torch.eye(2 * n, dtype=torch.float64), atol=1e-9)
    left, right = Increment(x, *M[:n]), Increment(y, *M[n:])
    full = left.join(right)
    expected = torch.eye(2 * n, dtype=torch.float64)[:n]
    got = torch.stack([v for v in (full.W, full.H, full.K) if v is not None])
    assert torch.allclose(got, expected, atol=1e-13)


def test_published_conditional_covariances_at_the_middle():
    """arXiv 2405.06464 (B), section 2.4: the conditional covariance of the left half."""
    for n, WW, WH, HH in ((2, 1 / 16, -1 / 32, 7 / 192), (3, 1 / 16, -1 / 32, 13 / 768)):
        noise = torch.tensor(bridge_matrix(n, 0.5, 0.5), dtype=torch.float64)[:n, n:]
        cov = noise @ noise.mT
        assert [float(cov[0, 0]), float(cov[0, 1])] == pytest.approx([WW, WH])
        assert float(cov[1, 1]) == pytest.approx(HH)
    assert float(cov[2, 2]) == pytest.approx(31 / 46080)
    assert float(cov[1, 2]) == pytest.approx(-1 / 1536)
    assert float(cov[0, 2]) == pytest.approx(0, abs=1e-16)


@given(st.floats(0.01, 0.99))
def test_published_bridge_for_w_and_h_at_any_split(x):
    """B, section 2.4, with a, b, c as printed there; the coefficients' Gram matrix must agree."""
    l, m, L = x, 1 - x, 1.0
    d = math.sqrt(l**3 + m**3)
    a = l**3.5 * m**0.5 / (2 * L * d)
    b = l**0.5 * m**3.5 / (2 * L * d)
    c = math.sqrt(3) * l**1.5 * m**1.5 / (6 * d)
    noise = torch.tensor([[2 * (a + b) / L, 0], [-a / l, c / l], [-2 * (a + b) / L, 0], [-b / m, -c / m]])
    M = torch.tensor(bridge_matrix(2, l, m), dtype=torch.float64)
    ours = M[:, 2:] @ M[:, 2:].mT
    assert torch.allclose(ours, (noise @ noise.mT).double(), atol=1e-6)


@given(levels, shares, st.floats(1e-6, 1e6), st.booleans())
@example(2, 0.5, 4.0, True)
@example(1, 0.5, 4.0, False)
def test_split_applies_the_matrix(n, x, length, consume):
    """The special case x = 1/2 and the general case give the coefficients of the matrix."""
    unit = torch.eye(2 * n, dtype=torch.float64).unbind()
    scales = noise_scales(n, x, math.sqrt(length))
    values, z = [u.clone() for u in unit[:n]], [u * scale for u, scale in zip(unit[n:], scales, strict=True)]
    left, right = split(values, z, x, 1 - x, consume=consume)
    M = torch.tensor(bridge_matrix(n, x, 1 - x), dtype=torch.float64)
    M[:, n:] *= math.sqrt(length)
    assert torch.allclose(torch.stack([*left, *right]), M, rtol=1e-12, atol=1e-14)
