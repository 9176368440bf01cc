"""The share of an error left at the end: the formula against samplers with an exact Gaussian denoiser."""

import pytest
import torch

import fewstep as fs
from fewstep.learned.loss_weighting import left_at_end

SCHEDULE = fs.EDM(sigma_min=1e-3, sigma_max=10.0)


@pytest.mark.parametrize(("solver", "power"), [(fs.DDIM(), 0.5), (fs.EulerMaruyama(), 1.0)], ids=str)
@pytest.mark.parametrize("level", [8.0, 0.4])
def test_an_error_decays_by_the_formula(solver, power, level):
    """Two runs from states that differ at the level by 0.1, along the same noise: to 2 %; one spread each."""
    spread = torch.tensor([0.3, 1.0, 3.0], dtype=torch.float64)
    x = torch.randn(64, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64).expand(-1, 3)
    problem = fs.DiffusionModel(lambda x, s: x * spread**2 / (spread**2 + s**2), SCHEDULE)
    sigmas = torch.logspace(torch.tensor(level).log10().item(), -3, 401, dtype=torch.float64)
    a, b = (
        fs.sample(problem, solver, noise=x * level + shift, sigmas=sigmas,
                  path=fs.FreshIncrements((64, 3), levy="H", seed=1, dtype=torch.float64))
        for shift in (0.0, 0.1)
    )  # fmt: skip
    for k, s in enumerate(spread):
        ends = torch.tensor([[1.0], [-1.0]], dtype=torch.float64) * s / 2**0.5  # of variance s^2
        left = left_at_end(ends, torch.tensor([level])) ** power
        torch.testing.assert_close((b - a)[:, k].mean() / 0.1, left[0], rtol=2e-2, atol=0)


def test_variance_is_that_of_the_directions_of_the_data():
    """Variances 4, 1 and 0 along three directions that are not the axes: tr C^2 / tr C = 17 / 5."""
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double()).Q
    signs = torch.tensor([[2.0, 1, 0], [2, -1, 0], [-2, 1, 0], [-2, -1, 0]]).double() * (3 / 4) ** 0.5
    sigmas = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    torch.testing.assert_close(left_at_end(signs @ turn.T, sigmas), 3.4 / (3.4 + sigmas.square()))


@pytest.mark.parametrize("many", [1, 5])
def test_equal_samples_are_rejected(many):
    with pytest.raises(fs.InputError, match="all equal"):
        left_at_end(torch.ones(many, 2), torch.tensor([1.0]))
