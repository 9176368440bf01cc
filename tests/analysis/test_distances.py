"""Distances between samples: closed forms, double loops, and scipy as references."""

import math

import pytest
import torch
from scipy import stats

from fewstep import InputError
from fewstep.distances import energy_distance, median_distance, mmd, rmse, sliced_w2, w1


def normal(n: int, d: int = 1, shift: float = 0.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return shift + torch.randn(n, d, generator=generator, dtype=torch.float64)


def mean_of(kernel, a, b, same=False):
    """Mean over all pairs, without those of a sample with itself if both sets are the same."""
    values = [kernel(math.dist(x, y)) for i, x in enumerate(a) for j, y in enumerate(b) if not same or i != j]
    return sum(values) / len(values)


def naive(kernel, a, b):
    a, b = a.tolist(), b.tolist()
    return mean_of(kernel, a, a, True) + mean_of(kernel, b, b, True) - 2 * mean_of(kernel, a, b)


@pytest.mark.parametrize("d", [1, 3])
def test_mmd_and_energy_distance_equal_double_loops(d, monkeypatch):
    monkeypatch.setattr("fewstep.distances.PAIRS", 100)  # in blocks
    a, b = normal(40, d), normal(31, d, 0.7, seed=1)
    assert mmd(a, b, bandwidth=1.3) ** 2 == pytest.approx(
        naive(lambda r: math.exp(-(r**2) / (2 * 1.3**2)), a, b), rel=1e-12
    )
    assert energy_distance(a, b) ** 2 == pytest.approx(naive(lambda r: -r, a, b), rel=1e-12)


def test_distances_separate_distributions_and_are_deterministic():
    a, b = normal(4000, 2), normal(3000, 2, seed=1)
    assert mmd(a, b) < 0.03
    assert energy_distance(a, b) < 0.05
    assert mmd(a, b) == mmd(a, b)
    assert mmd(a, b) == pytest.approx(mmd(b, a))
    far = normal(3000, 2, 0.5, seed=1)
    assert mmd(a, far) > 0.2
    assert energy_distance(a, far) > 0.3


@pytest.mark.parametrize("shift", [0.5, 2.0])
def test_distances_of_shifted_gaussians_equal_closed_forms(shift):
    a, b = normal(20_000), normal(20_000, shift=shift, seed=1)

    def mean_size(m: float) -> float:  # E|N(m, 2)|
        return 2 / math.sqrt(math.pi) * math.exp(-(m**2) / 4) + m * math.erf(m / 2)

    truth = math.sqrt(2 * (mean_size(shift) - mean_size(0)))
    assert energy_distance(a, b) == pytest.approx(truth, rel=0.04)
    assert energy_distance(a, b) == pytest.approx(stats.energy_distance(a.flatten(), b.flatten()), rel=1e-3)
    width = 1.5
    kernel = width / math.sqrt(width**2 + 2)
    truth = math.sqrt(2 * kernel * (1 - math.exp(-(shift**2) / (2 * (width**2 + 2)))))
    assert mmd(a[:5000], b[:5000], bandwidth=width) == pytest.approx(truth, rel=0.08)


def test_sorting_in_one_dimension_equals_sum_over_pairs():
    a, b = normal(50), normal(60, shift=0.3, seed=1)
    padded = [torch.cat([v, torch.zeros_like(v)], 1) for v in (a, b)]
    assert energy_distance(a, b) == pytest.approx(energy_distance(*padded), rel=1e-12)
    assert energy_distance(a.flatten(), b.flatten()) == energy_distance(a, b)  # events without a shape


def test_rmse_is_the_root_mean_square_distance_of_pairs():
    a = normal(5, 3)
    assert rmse(a, a + 2.0) == pytest.approx(2.0 * math.sqrt(3))


@pytest.mark.parametrize("m", [60, 180])
def test_wasserstein_distances_in_one_dimension(m):
    a, b = normal(60), normal(m, shift=0.7, seed=1)
    repeated = a.repeat_interleave(m // 60, 0)  # the same distribution with m samples
    assert w1(a, b) == pytest.approx(stats.wasserstein_distance(a.flatten(), b.flatten()))
    assert w1(a.flatten(), b.flatten()) == w1(a, b)
    assert sliced_w2(a, b) == pytest.approx(rmse(repeated.sort(0).values, b.sort(0).values))


def test_sliced_w2_of_a_shift_is_its_mean_projection():
    a = normal(50, 3)
    assert sliced_w2(a, a + 1.0, projections=4096) == pytest.approx(1.0, rel=0.05)  # |shift| / sqrt(d)


def test_median_distance():
    assert median_distance(torch.tensor([[0.0], [1.0], [3.0]])) == 2.0
    a = normal(2000, 3)
    assert median_distance(a) == pytest.approx(
        math.sqrt(2 * 2.366), rel=0.05
    )  # twice the median of chi^2 with 3 degrees


def test_distances_reject_samples_that_cannot_be_compared():
    with pytest.raises(InputError, match="events of shape"):
        mmd(torch.zeros(4, 2), torch.zeros(4, 3))
    with pytest.raises(InputError, match="at least 2"):
        energy_distance(torch.zeros(1, 2), torch.zeros(4, 2))
    with pytest.raises(InputError, match="expected 4, one for each"):
        rmse(torch.zeros(4, 2), torch.zeros(3, 2))
    with pytest.raises(InputError, match="Use sliced_w2"):
        w1(torch.zeros(4, 2), torch.zeros(4, 2))
    with pytest.raises(InputError, match="bandwidth"):
        mmd(torch.zeros(4, 2), torch.zeros(4, 2))
