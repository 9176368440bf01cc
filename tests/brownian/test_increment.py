"""Chen's relation, the other names of (W, H, K), and partial signatures: all as algebra."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep import InputError
from fewstep.brownian import Increment, partial_signature_covariance
from fewstep.brownian.signature import (
    all_words,
    minimal_words,
    partial_signature_map,
    signature_from_coordinates,
)

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
    """Join neighbours, at each turn those that `order` names, until one is left."""
    parts = list(parts)
    for pick in order:
        if len(parts) == 1:
            break
        i = pick % (len(parts) - 1)
        parts[i : i + 2] = [parts[i].join(parts[i + 1])]
    return parts[0]


@given(lengths, st.lists(st.integers(0, 100), min_size=7, max_size=7))
def test_join_of_independent_parts_has_the_law_of_the_whole(hs, order):
    whole = join(basis(hs), order)
    rows = torch.stack([whole.W, whole.H, whole.K])
    expected = torch.diag(torch.tensor(VARIANCES, dtype=torch.float64)) * sum(hs)
    assert torch.allclose(rows @ rows.mT, expected, rtol=1e-9, atol=1e-12 * sum(hs))
    assert whole.h == pytest.approx(sum(hs))


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
def test_join_is_integration_along_a_polygon(hs, seed):
    """Straight pieces have H = K = A = 0; their join must have the polygon's own integrals."""
    g = torch.Generator().manual_seed(seed)
    dW = torch.randn(len(hs), 2, generator=g, dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.float64)
    parts = [Increment(h, w, zero, zero, torch.zeros(2, 2).double()) for h, w in zip(hs, dW, strict=True)]
    whole = join(parts, [0] * len(hs))
    h, t, W = sum(hs), 0.0, zero
    I10, weighted, area = zero, zero, torch.tensor(0.0).double()
    for length, w in zip(hs, dW, strict=True):
        # Gauss-Legendre with two nodes is exact for the cubics below
        for node in (0.5 - math.sqrt(1 / 12), 0.5 + math.sqrt(1 / 12)):
            u, value = t + node * length, W + node * w
            I10 = I10 + length / 2 * value
            bridge = value - u / h * dW.sum(0)
            weighted = weighted + length / 2 * bridge * (h / 2 - u)
        area = area + 0.5 * (W[0] * w[1] - W[1] * w[0])
        t, W = t + length, W + w
    assert torch.allclose(whole.I10, I10, atol=1e-12)
    assert torch.allclose(whole.K, weighted / h**2, atol=1e-12)
    assert torch.allclose(whole.A[0, 1], area, atol=1e-12)


def test_join_keeps_what_both_have():
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
    same = Increment.from_integrals(h, inc.W, inc.I10, inc.I100)
    other = Increment.from_U(h, inc.W, inc.U)
    scale = math.sqrt(h)
    assert torch.allclose(same.H, inc.H, atol=1e-13 * scale)
    assert torch.allclose(same.K, inc.K, atol=1e-13 * scale)
    assert torch.allclose(other.H, inc.H, atol=1e-13 * scale)
    assert torch.allclose(inc.I10 + inc.I01, h * inc.W)
    words = ((0, 0), (0, 1), (1, 0), (0, 2))
    named = torch.stack([inc.W, inc.I10, inc.I01, inc.I100], -1)
    assert torch.allclose(inc.partial_signature(words=words), named, atol=1e-13 * scale * max(h, 1) ** 2)


@given(st.integers(0, 7), st.floats(1e-3, 1e3))
def test_signature_covariance_is_that_of_its_map(depth, h):
    for words in (minimal_words(depth), all_words(depth)):
        T = partial_signature_map(depth, h, words=words)
        cov = partial_signature_covariance(depth, h, words=words)
        size = cov.diagonal().sqrt()
        assert torch.allclose(T @ T.mT / size / size[:, None], cov / size / size[:, None], atol=1e-12)
    assert len(all_words(depth)) == (depth + 1) * (depth + 2) // 2
    correlation = cov / size / size[:, None]
    assert int(torch.linalg.matrix_rank(correlation, tol=1e-12)) == depth + 1


def test_signature_covariance_as_printed():
    h = 0.7
    expected = [
        [h, h**2 / 2, h**3 / 6],
        [h**2 / 2, h**3 / 3, h**4 / 8],
        [h**3 / 6, h**4 / 8, h**5 / 20],
    ]
    cov = partial_signature_covariance(2, h)
    assert torch.allclose(cov, torch.tensor(expected, dtype=torch.float64))
    assert float(torch.linalg.det(cov)) == pytest.approx(h**9 / 8640)


@given(st.integers(0, 5), st.integers(0, 5))
def test_signature_map_is_the_integral_of_the_words_kernel(a, b):
    """xi_n has kernel sqrt(2n+1) P_n(1-2x): quadrature of kernel against kernel."""
    import numpy as np

    nodes, weights = np.polynomial.legendre.leggauss(20)
    x = (nodes + 1) / 2
    kernel = x**a / math.factorial(a) * (1 - x) ** b / math.factorial(b)
    for n in range(a + b + 1):
        P = np.polynomial.legendre.Legendre.basis(n)(1 - 2 * x)
        value = float((weights / 2 * kernel * math.sqrt(2 * n + 1) * P).sum())
        T = partial_signature_map(a + b, 1.0, words=((a, b),))
        assert float(T[0, n]) == pytest.approx(value, abs=1e-14)


def test_partial_signature_of_an_increment_has_that_covariance():
    (inc,) = basis([0.3])
    rows = inc.partial_signature().mT
    assert torch.allclose(rows @ rows.mT, partial_signature_covariance(2, 0.3))
    xi = torch.eye(5, dtype=torch.float64)
    sig = signature_from_coordinates(xi, 0.3, minimal_words(4)).mT
    assert torch.allclose(sig @ sig.mT, partial_signature_covariance(4, 0.3))


@settings(max_examples=20)
@given(st.sampled_from([torch.float32, torch.float64]))
def test_dtype_is_kept(dtype):
    inc = Increment.from_coordinates(0.1, *torch.ones(3, 2, dtype=dtype))
    both = inc.join(inc)
    values = [
        both.W,
        both.H,
        both.K,
        both.I10,
        both.I100,
        both.partial_signature(),
        *both.coordinates(),
    ]
    assert {v.dtype for v in values} == {dtype}
    assert inc.to(torch.float64).K.dtype == torch.float64


def test_refusals():
    w = torch.zeros(3)
    with pytest.raises(InputError, match="K without H"):
        Increment(1.0, w, K=w)
    with pytest.raises(InputError, match="shape"):
        Increment(1.0, w).join(Increment(1.0, torch.zeros(4)))
    with pytest.raises(InputError, match='levy="H"'):
        _ = Increment(1.0, w).U
    with pytest.raises(InputError, match="depth"):
        Increment(1.0, w).partial_signature(1)
    with pytest.raises(InputError, match="depth"):
        partial_signature_covariance(-1, 1.0)
    with pytest.raises(InputError, match="h:"):
        partial_signature_covariance(1, 0.0)
    with pytest.raises(InputError, match="words"):
        partial_signature_map(1, 1.0, words=((1, 1),))
    with pytest.raises(InputError, match="xi"):
        Increment.from_coordinates(1.0)
