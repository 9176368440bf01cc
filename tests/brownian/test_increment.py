"""Increments: Chen's relation and the conversions of (W, H, K), as algebra."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewstep import InputError
from fewstep.brownian import Increment

lengths = st.lists(st.floats(1e-6, 1e3), min_size=2, max_size=7)
VARIANCES = (1.0, 1 / 12, 1 / 720)


def basis(hs: list[float]) -> list[Increment]:
    """Independent (W, H, K) over consecutive lengths, as coefficients on 3 len(hs) normals."""
    units = torch.eye(3 * len(hs), dtype=torch.float64).unbind()
    out = []
    for i, h in enumerate(hs):
        scaled = [math.sqrt(h * v) * u for v, u in zip(VARIANCES, units[3 * i :], strict=False)]
        out.append(Increment(h, *scaled))
    return out


def join(parts: list[Increment], order: list[int]) -> Increment:
    """Join adjacent increments until one is left, in an order given by numbers."""
    parts = list(parts)
    for pick in order:
        if len(parts) == 1:
            break
        i = pick % (len(parts) - 1)
        parts[i : i + 2] = [parts[i].join(parts[i + 1])]
    return parts[0]


@given(lengths, st.lists(st.integers(0, 100), min_size=7, max_size=7))
def test_join_of_independent_parts_has_the_law_of_one_increment(hs, order):
    total = join(basis(hs), order)
    rows = torch.stack([total.W, total.H, total.K])
    expected = torch.diag(torch.tensor(VARIANCES, dtype=torch.float64)) * sum(hs)
    assert torch.allclose(rows @ rows.mT, expected, rtol=1e-9, atol=1e-12 * sum(hs))
    assert total.h == pytest.approx(sum(hs))


@given(lengths, st.permutations(range(7)), st.permutations(range(7)), st.integers(0, 10**6))
def test_join_is_associative(hs, one, other, seed):
    g = torch.Generator().manual_seed(seed)
    parts = []
    for h in hs:
        x = torch.randn(4, 3, generator=g, dtype=torch.float64) * math.sqrt(h)
        A = torch.randn(3, 3, generator=g, dtype=torch.float64) * h
        parts.append(Increment(h, x[0], x[1], x[2], A - A.mT))
    a, b = join(parts, list(one)), join(parts, list(other))
    size = sum(hs)
    for left, right, scale in ((a.W, b.W, 0.5), (a.H, b.H, 0.5), (a.K, b.K, 0.5), (a.A, b.A, 1)):
        assert torch.allclose(left, right, rtol=1e-9, atol=1e-11 * size**scale)
    assert torch.equal(a.A, -a.A.mT)


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=6), st.integers(0, 10**6))
def test_join_of_straight_pieces_has_the_integrals_of_the_polygon(hs, seed):
    """A straight piece has H = K = A = 0."""
    g = torch.Generator().manual_seed(seed)
    dW = torch.randn(len(hs), 2, generator=g, dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.float64)
    parts = [Increment(h, w, zero, zero, torch.zeros(2, 2).double()) for h, w in zip(hs, dW, strict=True)]
    total = join(parts, [0] * len(hs))
    h, t, W = sum(hs), 0.0, zero
    U, weighted, area = zero, zero, torch.tensor(0.0).double()
    for length, w in zip(hs, dW, strict=True):
        # Gauss-Legendre with two nodes is exact for the cubics below
        for node in (0.5 - math.sqrt(1 / 12), 0.5 + math.sqrt(1 / 12)):
            u, value = t + node * length, W + node * w
            U = U + length / 2 * value
            bridge = value - u / h * dW.sum(0)
            weighted = weighted + length / 2 * bridge * (h / 2 - u)
        area = area + 0.5 * (W[0] * w[1] - W[1] * w[0])
        t, W = t + length, W + w
    assert torch.allclose(total.U, U, atol=1e-12)
    assert torch.allclose(total.K, weighted / h**2, atol=1e-12)
    assert torch.allclose(total.A[0, 1], area, atol=1e-12)


def test_join_has_the_fields_that_both_have():
    a, b = basis([1.0, 2.0])
    assert a.join(Increment(b.h, b.W)).levy == "W"
    assert a.join(Increment(b.h, b.W, b.H)).levy == "H"
    assert a.join(b).levy == "K"
    assert a.join(b).A is None


@given(st.floats(1e-5, 1e3), st.integers(0, 10**6))
def test_conversions_are_inverse(h, seed):
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    inc = Increment.from_coordinates(h, *x)
    assert torch.allclose(torch.stack(inc.coordinates()), x)
    assert torch.allclose(Increment.from_U(h, inc.W, inc.U).H, inc.H, atol=1e-13 * math.sqrt(h))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_preserved(dtype):
    inc = Increment.from_coordinates(0.1, *torch.ones(3, 2, dtype=dtype))
    both = inc.join(inc)
    values = [both.W, both.H, both.K, both.U, *both.coordinates()]
    assert {v.dtype for v in values} == {dtype}
    assert inc.to(torch.float64).K.dtype == torch.float64


def test_bad_input_is_rejected():
    w = torch.zeros(3)
    with pytest.raises(InputError, match="K without H"):
        Increment(1.0, w, K=w)
    with pytest.raises(InputError, match="shape"):
        Increment(1.0, w).join(Increment(1.0, torch.zeros(4)))
    with pytest.raises(InputError, match='levy="H"'):
        _ = Increment(1.0, w).U
    with pytest.raises(InputError, match="xi"):
        Increment.from_coordinates(1.0)
