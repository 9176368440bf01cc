"""Distances of generated images from real ones: Fréchet and kernel distances of features, and class scores.

With the features of the shipped MNIST classifier the numbers are not those of papers, which use Inception's:
compare only numbers of the same features and the same number of images, and with the distance of as many real
images.
"""

from __future__ import annotations

from torch import Tensor, stack
from torch.linalg import eigh, eigvalsh

BLOCK = 2048  # rows of a kernel matrix at a time


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of Gaussians fitted to features (n, d) and (m, d) (FID, arXiv 1706.08500, Eq. 6).

    |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)). Biased upwards for few samples: compare at equal n.
    """
    (m_a, s_a), (m_b, s_b) = _moments(a.double()), _moments(b.double())
    values, vectors = eigh(s_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # S_a S_b has the eigenvalues of root S_b root, which is symmetric
    cross = eigvalsh(root @ s_b @ root).clamp(min=0).sqrt().sum()
    return max(0.0, float((m_a - m_b).square().sum() + s_a.trace() + s_b.trace() - 2 * cross))


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy of features (n, d) and (m, d) (KID, arXiv 1801.01401).

    With the kernel (x.y / d + 1)^3 over all pairs, where papers average random subsets. It may be negative,
    about half the time for two samples of one law.
    """
    x, y = a.double(), b.double()
    n, m = len(x), len(y)
    within_x, within_y = (_kernel_sum(f, f) - _kernel(f.square().sum(1), f).sum() for f in (x, y))
    return float(within_x / (n * (n - 1)) + within_y / (m * (m - 1)) - 2 * _kernel_sum(x, y) / (n * m))


def class_score(logits: Tensor) -> float:
    """The Inception score, exp of the mean KL divergence of p(class | image) from p(class), of logits.

    It is 1 where images are indistinguishable, and the number of classes where each image is certain to be of
    one class and all classes are equally frequent.
    """
    log_p = logits.double().log_softmax(1)
    p = log_p.exp()
    # a class that never occurs counts 0 log 0 = 0
    return float((p * (log_p - p.mean(0).clamp(min=1e-300).log())).sum(1).mean().exp())


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and unbiased covariance (d, d)."""
    mean = x.mean(0)
    return mean, (x - mean).T @ (x - mean) / (len(x) - 1)


def _kernel(dots: Tensor, x: Tensor) -> Tensor:
    return (dots / x.shape[1] + 1) ** 3


def _kernel_sum(x: Tensor, y: Tensor) -> Tensor:
    """The sum over all pairs, by blocks of rows."""
    return stack([_kernel(p @ q.T, x).sum() for p in x.split(BLOCK) for q in y.split(BLOCK)]).sum()
