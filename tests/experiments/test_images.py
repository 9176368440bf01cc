"""Distances of images by their features: closed forms, and torchmetrics where it is installed."""

import math

import pytest
import torch

import images
from fewstep_analysis import teachers


def normals(n, d, seed):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whitened(n, d, seed):
    """Mean exactly 0 and covariance exactly 1."""
    x = normals(n, d, seed)
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (n - 1))).T


def test_frechet_distance_equals_closed_form_of_gaussians():
    a, b = whitened(200, 3, 0), whitened(300, 3, 1)
    scale, shift = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([1.0, -2.0, 0.0]).double()
    # for commuting covariances: |shift|^2 + the sum of (s - s')^2
    assert images.frechet_distance(a, b * scale + shift) == pytest.approx(5 + 1 + 0.25, abs=1e-10)
    # and for others: S = diag(4, 1), S' = R diag(4, 1) R', at 45 degrees: tr (S S')^(1/2) from trace and det
    r = torch.tensor([[1.0, -1.0], [1.0, 1.0]]).double() / math.sqrt(2)
    a, b = whitened(100, 2, 2), whitened(100, 2, 3)
    stretch = torch.tensor([2.0, 1.0]).double()
    s, t = torch.diag(stretch**2), r @ torch.diag(stretch**2) @ r.T
    trace_root = math.sqrt(float((s @ t).trace()) + 2 * math.sqrt(float((s @ t).det())))
    assert images.frechet_distance(a * stretch, (b * stretch) @ r.T) == pytest.approx(10 - 2 * trace_root, abs=1e-10)


def test_distances_of_equal_samples_are_zero_and_deterministic():
    a, b = normals(64, 5, 0), normals(48, 5, 1)
    degenerate = a[:3]  # a covariance of rank 2 in five dimensions
    assert images.frechet_distance(a, a) == pytest.approx(0, abs=1e-12)
    assert images.frechet_distance(degenerate, degenerate) == pytest.approx(0, abs=1e-6)
    state = torch.random.get_rng_state()
    for distance in (images.frechet_distance, images.kernel_distance):
        assert distance(a, b) == distance(a, b)
        assert distance(a, b) == pytest.approx(distance(b, a), abs=1e-12)
    assert torch.equal(state, torch.random.get_rng_state())


def test_kernel_distance_equals_u_statistic_of_all_pairs(monkeypatch):
    a, b = normals(7, 2, 0), normals(5, 2, 1) + 1

    def k(x, y):
        return float((x @ y / 2 + 1) ** 3)

    def mean(x, y, pairs):
        pairs = list(pairs)
        return sum(k(x[i], y[j]) for i, j in pairs) / len(pairs)

    expected = mean(a, a, ((i, j) for i in range(7) for j in range(7) if i != j))
    expected += mean(b, b, ((i, j) for i in range(5) for j in range(5) if i != j))
    expected -= 2 * mean(a, b, ((i, j) for i in range(7) for j in range(5)))
    assert images.kernel_distance(a, b) == pytest.approx(expected, abs=1e-12)
    monkeypatch.setattr(images, "BLOCK", 3)
    assert images.kernel_distance(a, b) == pytest.approx(expected, abs=1e-12)


def test_class_score_lies_between_one_and_the_number_of_classes():
    sure = 1000 * torch.eye(10)[torch.arange(40) % 10]
    assert images.class_score(sure) == pytest.approx(10)
    assert images.class_score(torch.zeros(40, 10)) == pytest.approx(1)
    assert images.class_score(sure[:1].expand(40, -1)) == pytest.approx(1)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_distances_equal_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid")
    kid = pytest.importorskip("torchmetrics.image.kid")

    class Same(torch.nn.Module):
        num_features = 4

        def forward(self, x):
            return x

    a, b = normals(300, 4, 0), 1.5 * normals(300, 4, 1) + 0.3
    theirs = fid.FrechetInceptionDistance(Same())
    theirs.update(a, real=True)
    theirs.update(b, real=False)
    assert images.frechet_distance(a, b) == pytest.approx(float(theirs.compute()), rel=1e-6)
    assert images.kernel_distance(a, b) == pytest.approx(float(kid.poly_mmd(a, b)), rel=1e-9)


def test_shipped_classifier_distinguishes_strokes_from_noise():
    assert (teachers.WEIGHTS / "mnist_features.safetensors").stat().st_size < 600_000
    x = torch.full((20, 1, 28, 28), -1.0)
    for i in range(20):  # upright strokes: what a one looks like
        x[i, :, 4:24, 12 + i % 3 : 15 + i % 3] = 1.0
    noise = torch.randn(20, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    net = teachers.mnist_features()
    assert net(x).shape == (20, 64)
    assert (net.logits(x).argmax(1) == 1).float().mean() > 0.9
    distance = images.frechet_distance
    assert distance(net(x), net(noise)) > 10 * distance(net(x[:10]), net(x[10:]))
