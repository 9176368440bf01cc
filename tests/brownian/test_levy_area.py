"""Space-space areas: their moments, at the family-wise level of conftest, and those of a path."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep import InputError
from fewstep.brownian import AreaPath, BrownianPath, FreshIncrements, Increment, levy_area
from fewstep.brownian.levy_area import METHODS, terms_for

N = 40_000
EXACT = ("davie", "foster", "mrongowius_roessler", "wiktorsson")  # E A^2 without truncation
TAKES = {"wiktorsson": "W", "mrongowius_roessler": "WH"}


def draw(levy: str, h: float = 0.7, m: int = 3, seed: int = 1) -> Increment:
    return FreshIncrements((N, m), levy=levy, seed=seed, dtype=torch.float64).increment(0.0, h)


def area(inc: Increment, method: str, **options) -> torch.Tensor:
    if method not in ("davie", "foster") and not options:
        options = {"terms": 12}
    return levy_area(inc, method, 2, **options)


@pytest.mark.parametrize("method", METHODS)
def test_area_is_antisymmetric_to_the_bit_and_batched(method):
    levy = TAKES.get(method, "WHK")[-1]
    for shape in ((2, 3, 5), (4, 1), (0, 2)):
        for dtype in (torch.float32, torch.float64):
            inc = FreshIncrements(shape, levy=levy, dtype=dtype).increment(0.0, 0.5)
            A = area(inc, method)
            assert A.shape == (*shape, shape[-1])
            assert A.dtype == dtype
            assert torch.equal(A, -A.mT)
    assert torch.equal(area(inc, method), area(inc, method))


@pytest.mark.parametrize("levy", ["W", "H", "K"])
@pytest.mark.parametrize("method", METHODS)
def test_conditional_moments(method, levy, has_mean):
    """E A^2 = h^2/4; E[A^2 (W_i^2+W_j^2)]; E[A_ij A_ik W_j W_k]; E[A | W, H], its residual."""
    if levy not in TAKES.get(method, "WHK"):
        pytest.skip("rejected, see test_bad_input_is_rejected")
    h = 0.7
    inc = draw(levy, h)
    A, W = area(inc, method), inc.W
    a, other = A[:, 0, 1], A[:, 0, 2]
    has_mean(a, 0.0)
    lost = 0.0 if method in EXACT else truncation(method, h)
    has_mean(a * a, h * h / 4 - lost)
    if method in EXACT and not (method == "davie" and levy == "W"):
        squares = W[:, 0] ** 2 + W[:, 1] ** 2
        has_mean(a * a * squares, 2 * h * h * h / 12 + h / 12 * 8 * h * h)
        has_mean(a * other * W[:, 1] * W[:, 2], h / 12 * h * h)
    if inc.H is not None:
        H = inc.H
        mean, rest = split_mean(inc, a, 0, 1)
        _, rest2 = split_mean(inc, other, 0, 2)
        has_mean(rest, 0.0)
        if method == "fourier":  # the tail that it leaves out has a mean given H
            has_mean(rest * mean, -h * h / 6 * tail(2) / (math.pi**2 / 6))
        else:
            has_mean(rest * mean, 0.0)
            has_mean(rest * rest, h * h / 12 - lost)
        if method == "foster" or (method == "davie" and levy == "K"):
            squares = H[:, 0] ** 2 + H[:, 1] ** 2
            # Var[A | W, H] = h^2/20 + (h/5)(H_i^2 + H_j^2), weighted with H^2: E H^4 = 3 (h/12)^2
            has_mean(rest * rest * squares, h * h / 20 * h / 6 + h / 5 * 8 * (h / 12) ** 2)
            has_mean(rest * rest2 * H[:, 1] * H[:, 2], h / 5 * (h / 12) ** 2)
    if inc.K is not None:
        K = inc.K
        known = 12 * (K[:, 0] * inc.H[:, 1] - inc.H[:, 0] * K[:, 1])
        # E[A | W, H, K] - E[A | W, H]; of it 12 Fourier terms carry sum_k k^-4
        part = 1 - tail(4) / (math.pi**4 / 90) if method in ("fourier", "milstein") else 1.0
        has_mean(rest * known, h * h * (1 / 12 - 1 / 20) * part)


def tail(power: int, n: int = 12) -> float:
    """sum over k > n of k^-power."""
    return (math.pi**2 / 6, math.pi**4 / 90)[power // 4] - sum(k**-power for k in range(1, n + 1))


def truncation(method: str, h: float, n: int = 12) -> float:
    """The exact mean square of the truncation error of n terms (arXiv 2405.06464, section 3.2)."""
    if method == "legendre":
        return h * h / (4 * (2 * n + 1))
    return {"fourier": 3, "milstein": 1}[method] * h * h * tail(2, n) / (2 * math.pi**2)


def split_mean(inc: Increment, a: torch.Tensor, i: int, j: int) -> tuple[torch.Tensor, torch.Tensor]:
    mean = inc.H[:, i] * inc.W[:, j] - inc.W[:, i] * inc.H[:, j]
    return mean, a - mean


@pytest.mark.parametrize("method", ["milstein", "mrongowius_roessler", "wiktorsson", "legendre", "foster"])
def test_fourth_moment(method, has_mean):
    """E A^4 = 5 h^4/16, with enough terms to hide the truncation.

    Foster's normal has less: A = (z1^v + g)/2 with Var v = 1/3 + 1/15 and Var g = 1/5, which gives
    (3.84 + 0.96 + 0.12)/16.
    """
    inc = draw("W", 1.0, m=2)
    A = area(inc, method) if method == "foster" else area(inc, method, terms=60)
    has_mean(A[:, 0, 1] ** 4, 4.92 / 16 if method == "foster" else 5 / 16)


@pytest.mark.parametrize("method", ["fourier", "milstein", "wiktorsson", "mrongowius_roessler", "legendre"])
def test_number_of_terms_is_the_least_that_meets_the_tolerance(method):
    coefficient = {
        "fourier": (math.sqrt(3) / (math.sqrt(2) * math.pi), 0.5),
        "milstein": (1 / (math.sqrt(2) * math.pi), 0.5),
        "wiktorsson": (math.sqrt(5 * 3) / (math.sqrt(12) * math.pi), 1.0),
        "mrongowius_roessler": (math.sqrt(3) / (math.sqrt(12) * math.pi), 1.0),
    }
    for h, tol in ((1.0, 0.05), (1 / 64, (1 / 64) ** 1.5), (1e-3, 1e-5)):
        n = terms_for(method, h, 3, tol)

        def error(k: int, h: float = h) -> float:
            if method == "legendre":
                return h / (2 * math.sqrt(2 * k + 1))
            c, gamma = coefficient[method]
            return c * h * k**-gamma

        assert error(n) <= tol * (1 + 1e-12)
        assert n == 1 or error(n - 1) > tol


@pytest.mark.parametrize("levy", ["W", "H", "K"])
@pytest.mark.parametrize("method", ["foster", "legendre"])
def test_joined_areas_have_the_conditional_moments_of_one_area(method, levy, has_mean):
    """Areas of two unequal parts: E[A | W, H] and its residual are those of the full interval."""
    one, two = draw(levy, 0.3, 2, seed=5), draw(levy, 0.9, 2, seed=6)
    options = {} if method == "foster" else {"terms": 40}
    parts = [Increment(i.h, i.W, i.H, i.K, levy_area(i, method, s, **options)) for s, i in enumerate((one, two))]
    joined = parts[0].join(parts[1])
    h, a = 1.2, joined.A[:, 0, 1]
    lost = 0.0 if method == "foster" else (0.3**2 + 0.9**2) / (4 * 81)
    has_mean(a * a, h * h / 4 - lost)
    if joined.H is not None:
        mean, rest = split_mean(joined, a, 0, 1)
        has_mean(rest * mean, 0.0)
        has_mean(rest * rest, h * h / 12 - lost)
    if joined.K is not None:
        known = 12 * (joined.K[:, 0] * joined.H[:, 1] - joined.H[:, 0] * joined.K[:, 1])
        has_mean(rest * known, h * h * (1 / 12 - 1 / 20))


def test_fourier_terms_are_conditioned_on_h_and_k_exactly():
    """Many terms and Milstein's tail: linear regression gives E[A | W, H, K]."""
    inc = draw("K", 1.0, m=2)
    A = levy_area(inc, "milstein", 1, terms=50)[:, 0, 1]
    H, W, K = inc.H, inc.W, inc.K
    features = torch.stack(
        [
            H[:, 0] * W[:, 1],
            W[:, 0] * H[:, 1],
            K[:, 0] * H[:, 1],
            H[:, 0] * K[:, 1],
            W[:, 0] * K[:, 1],
        ],
        -1,
    )
    fit = torch.linalg.lstsq(features, A).solution
    scale = features.square().mean(0).sqrt() * N**0.5
    error = 0.25 / scale
    expected = torch.tensor([1.0, -1.0, 12.0, -12.0, 0.0], dtype=torch.float64)
    assert ((fit - expected).abs() < 6.1 * error).all()


@settings(max_examples=12, deadline=None)
@given(
    st.floats(-6, 3).map(math.exp),
    st.integers(2, 4),
    st.sampled_from([*METHODS, "path legendre", "path foster"]),
    st.sampled_from("WHK"),
    st.floats(0.05, 0.95),
    st.integers(0, 2**31),
)
def test_areas_joined_over_any_split_have_the_covariance_of_brownian_motion(h, m, method, levy, x, seed):
    """E[A_ij A_kl] and E[A_ij M_kl] with M = E[A | W, H]: h^2/4 and h^2/6 if ij = kl, otherwise 0.

    The truncation error of each part, which is known exactly, is subtracted from E[A_ij A_ij]. Means over
    n samples must be within 6 standard errors: a false alarm has probability 2e-9 per mean (up to 57 per
    example; the skewness of products of areas at most quintuples it), below 1e-5 per run.
    """
    n, grid = 20_000, [0.0, x * h, h]
    if method.startswith("path"):
        path = BrownianPath((n, m), 0.0, h, seed, "H", torch.float64)
        parts = list(AreaPath(path, 4, method.split()[1], seed=seed).increments(grid))
        cut = sorted({0.0, h / 4, h / 2, 3 * h / 4, h, x * h})
        lost = sum((b - a) ** 2 / 12 for a, b in pairwise(cut)) if method == "path legendre" else 0.0
    else:
        levy = min(levy, TAKES.get(method, "K")[-1], key="WHK".index)
        drawn = FreshIncrements((n, m), levy, seed, torch.float64).increments(grid)
        generator = torch.Generator().manual_seed(seed + 1)
        terms = None if method in ("davie", "foster") else 12
        parts = [replace(inc, A=levy_area(inc, method, generator, terms=terms)) for inc in drawn]
        lost = 0.0 if method in EXACT else sum(truncation(method, inc.h) for inc in parts)
    joined = parts[0].join(parts[1])
    i, j = torch.triu_indices(m, m, 1)
    A = joined.A[:, i, j]
    products = [(A[:, :, None] * A[:, None], h * h / 4 - lost)]
    if joined.H is not None and method != "fourier":  # the tail that "fourier" leaves out depends on H
        M = joined.H[:, i] * joined.W[:, j] - joined.W[:, i] * joined.H[:, j]
        products.append((A[:, :, None] * M[:, None], h * h / 6))
    for product, variance in products:
        standard_error = product.std(0) / n**0.5
        expected = variance * torch.eye(len(i), dtype=torch.float64)
        assert ((product.mean(0) - expected).abs() < 6 * standard_error).all()


def test_area_path_is_additive_and_independent_of_step_size():
    path = BrownianPath((64, 3), 0.0, 2.0, seed=3, levy="H", dtype=torch.float64)
    for options in ({}, {"method": "foster"}, {"method": "legendre", "terms": 3}):
        areas = AreaPath(path, cells=32, **options)
        coarse = areas.increment(0.0, 2.0)
        joined = None
        for inc in areas.increments(torch.linspace(0, 2, 9)):
            joined = inc if joined is None else joined.join(inc)
        assert torch.allclose(coarse.A, joined.A, atol=1e-12)
        assert torch.allclose(coarse.W, path.increment(0.0, 2.0).W, atol=1e-12)
        assert torch.allclose(coarse.H, path.increment(0.0, 2.0).H, atol=1e-12)


def test_area_path_draws_independent_areas_for_parts_of_a_cell(has_mean):
    """The residuals of two parts of a cell are independent, with the variance for their lengths."""
    path = BrownianPath((N, 2), seed=3, levy="H", dtype=torch.float64)
    pieces = AreaPath(path, cells=1, method="foster").increments([0.0, 0.5, 1.0])
    (_, one), (_, two) = (split_mean(i, i.A[:, 0, 1], 0, 1) for i in pieces)
    has_mean(one * two, 0.0)
    has_mean(one * one, 0.25 / 12)


def test_area_path_converges_at_the_documented_rate(has_mean):
    """E |A_8 cells - A_64 cells|^2 = h^2/12 (1/8 - 1/64): both converge to the area of the path."""
    path = BrownianPath((4000, 2), seed=3, levy="H", dtype=torch.float64)
    coarse, fine = (AreaPath(path, cells=n).increment(0.0, 1.0).A[:, 0, 1] for n in (8, 64))
    has_mean((coarse - fine) ** 2, (1 / 8 - 1 / 64) / 12)


def test_torchsdes_areas_have_the_wrong_variance_and_ours_do_not(has_mean):
    """torchsde 0.2.6: its residual has h^2/6 ('davie') and 0.053 h^2 ('foster'), not h^2/12."""
    torchsde = pytest.importorskip("torchsde")
    if torchsde.__version__ != "0.2.6":
        pytest.skip("holds for torchsde 0.2.6")
    n = 20_000
    for method, theirs in (("davie", 1 / 6), ("foster", 1 / 50 + 2 / 60)):
        bm = torchsde.BrownianInterval(
            0.0, 1.0, size=(n, 2), dtype=torch.float64, entropy=1, levy_area_approximation=method
        )
        W, U, A = bm(0.0, 1.0, return_U=True, return_A=True)
        inc = Increment.from_U(1.0, W, U)
        _, rest = split_mean(inc, A[:, 0, 1], 0, 1)
        has_mean(rest * rest, theirs)
        with pytest.raises(AssertionError):
            has_mean(rest * rest, 1 / 12)
        _, ours = split_mean(inc, levy_area(inc, method, 3)[:, 0, 1], 0, 1)
        has_mean(ours * ours, 1 / 12)


def test_bad_input_is_rejected():
    inc = draw("K", m=2)
    for method in ("wiktorsson", "mrongowius_roessler"):
        with pytest.raises(InputError, match="legendre"):
            levy_area(inc, method)
    with pytest.raises(InputError, match="foster"):
        levy_area(inc, "forster")
    with pytest.raises(InputError, match="both"):
        levy_area(inc, "legendre", tol=0.1, terms=3)
    with pytest.raises(InputError, match="strong methods"):
        levy_area(inc, "davie", tol=0.1)
    with pytest.raises(InputError, match="positive"):
        levy_area(inc, "legendre", tol=0.0)
    with pytest.raises(InputError, match="terms"):
        levy_area(inc, "legendre", terms=0)
    with pytest.raises(InputError, match="0-d"):
        levy_area(Increment(1.0, torch.tensor(1.0)))
    with pytest.raises(InputError, match="cells"):
        AreaPath(BrownianPath((2,)), cells=0)
    with pytest.raises(InputError, match="channels"):
        AreaPath(BrownianPath(()), cells=4)


def test_area_of_many_terms_keeps_its_precision_under_autocast():
    increment = BrownianPath((5, 3), levy="K").increment(0.0, 0.5)
    expected = levy_area(increment, "legendre", 1, terms=20)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(levy_area(increment, "legendre", 1, terms=20), expected)
