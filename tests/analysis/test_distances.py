import math

import pytest
import torch
from scipy.stats import energy_distance as scipys

from fewstep.distances import energy_distance, median_distance, mmd
from fewstep.errors import InputError


def normal(n: int, d: int = 1, shift: float = 0.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return shift + torch.randn(n, d, generator=generator, dtype=torch.float64)


def mean_of(kernel, a, b, same=False):
    """Over all pairs, those of a sample with itself left out where both are the same set."""
    values = [kernel(math.dist(x, y)) for i, x in enumerate(a) for j, y in enumerate(b) if not same or i != j]
    return sum(values) / len(values)


def naive(kernel, a, b):
    a, b = a.tolist(), b.tolist()
    return mean_of(kernel, a, a, True) + mean_of(kernel, b, b, True) - 2 * mean_of(kernel, a, b)


@pytest.mark.parametrize("d", [1, 3])
def test_both_agree_with_a_double_loop(d, monkeypatch):
    monkeypatch.setattr("fewstep_analysis.distances.PAIRS", 100)  # in blocks
    a, b = normal(40, d), normal(31, d, 0.7, seed=1)
    assert mmd(a, b, bandwidth=1.3) ** 2 == pytest.approx(
        naive(lambda r: math.exp(-(r**2) / (2 * 1.3**2)), a, b), rel=1e-12
    )
    assert energy_distance(a, b) ** 2 == pytest.approx(naive(lambda r: -r, a, b), rel=1e-12)


def test_one_law_is_near_and_the_same_numbers_give_the_same_distance():
    a, b = normal(4000, 2), normal(3000, 2, seed=1)
    assert mmd(a, b) < 0.03
    assert energy_distance(a, b) < 0.05
    assert mmd(a, b) == mmd(a, b)
    assert mmd(a, b) == pytest.approx(mmd(b, a))
    far = normal(3000, 2, 0.5, seed=1)
    assert mmd(a, far) > 0.2
    assert energy_distance(a, far) > 0.3


@pytest.mark.parametrize("shift", [0.5, 2.0])
def test_of_shifted_gaussians_both_have_a_closed_form(shift):
    a, b = normal(20_000), normal(20_000, shift=shift, seed=1)

    def mean_size(m: float) -> float:  # E|N(m, 2)|
        return 2 / math.sqrt(math.pi) * math.exp(-(m**2) / 4) + m * math.erf(m / 2)

    truth = math.sqrt(2 * (mean_size(shift) - mean_size(0)))
    assert energy_distance(a, b) == pytest.approx(truth, rel=0.04)
    assert energy_distance(a, b) == pytest.approx(scipys(a.flatten(), b.flatten()), rel=1e-3)
    width = 1.5
    kernel = width / math.sqrt(width**2 + 2)
    truth = math.sqrt(2 * kernel * (1 - math.exp(-(shift**2) / (2 * (width**2 + 2)))))
    assert mmd(a[:5000], b[:5000], bandwidth=width) == pytest.approx(truth, rel=0.08)


def test_one_dimension_by_sorting_is_the_sum_over_pairs():
    a, b = normal(50), normal(60, shift=0.3, seed=1)
    padded = [torch.cat([v, torch.zeros_like(v)], 1) for v in (a, b)]
    assert energy_distance(a, b) == pytest.approx(energy_distance(*padded), rel=1e-12)
    assert energy_distance(a.flatten(), b.flatten()) == energy_distance(a, b)  # events without a shape


def test_the_median_heuristic():
    assert median_distance(torch.tensor([[0.0], [1.0], [3.0]])) == 2.0
    a = normal(2000, 3)
    assert median_distance(a) == pytest.approx(math.sqrt(2 * 2.366), rel=0.05)  # chi^2 with 3 degrees, twice


def test_what_cannot_be_compared():
    with pytest.raises(InputError, match="events of shape"):
        mmd(torch.zeros(4, 2), torch.zeros(4, 3))
    with pytest.raises(InputError, match="at least 2"):
        energy_distance(torch.zeros(1, 2), torch.zeros(4, 2))
    with pytest.raises(InputError, match="bandwidth"):
        mmd(torch.zeros(4, 2), torch.zeros(4, 2))
