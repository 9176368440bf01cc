"""Fréchet distances with errors: the smoke run, and the error of a distance."""

import pytest
import torch

import mnist_frechet


@pytest.mark.slow
def test_mnist_with_any_network(run, any_network):
    rows = run(mnist_frechet)["mnist-frechet"].data["rows"]
    assert [r["sampler"] for r in rows] == [
        "test digits", "fine ODE", "UniPC(2), trailing", "D-ODE, from IPNDM(2)", "fit_table",
    ]  # fmt: skip
    assert all(r["matched"] <= r["frechet"] + 1e-9 for r in rows if 1.0 in mnist_frechet.SCALES)
    assert rows[1]["rmse"] == rows[1]["paired_features"] == 0
    assert all(r["rmse"] > 0 for r in rows[2:])


def test_jackknife_error_agrees_with_repetitions():
    """Of sets of 400 features of 3 numbers, against the spread over 30 sets."""
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(20000, 3, generator=generator, dtype=torch.float64)
    sets = [1.2 * torch.randn(400, 3, generator=generator, dtype=torch.float64) + 0.2 for _ in range(30)]
    spread = torch.tensor([mnist_frechet.images.frechet_distance(s, real) for s in sets]).std()
    errors = torch.tensor([mnist_frechet.jackknife(s, real, 20) for s in sets])
    assert 0.7 * spread < errors.mean() < 1.4 * spread
