"""How far generated images are from real ones: Fréchet and kernel distances of features, class scores.

The features are those of the shipped MNIST classifier unless others are given, so the numbers are not
those of papers that use Inception's: compare only with numbers from the same features. Report beside
them the floor, the distance of as many real images.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewstep import _validation
from fewstep.errors import InputError

Extractor = Callable[[Tensor], Tensor]
BATCH = 500  # images at a time
BLOCK = 2048  # rows of a kernel matrix at a time


def frechet_distance(a: Tensor, b: Tensor, features: Extractor | None = None) -> float:
    """Fréchet distance of Gaussians fitted to the features, in float64 (FID, arXiv 1706.08500, Eq. 6).

    |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)). Biased upwards for few samples: compare at equal n.

    Args:
        a, b: (n, *event) and (m, *event), of at least two samples each.
        features: `x -> (batch, d)`; by default the MNIST classifier's, d = 64. For features at hand pass
            them as a and b, with `features=lambda x: x`.
    """
    (m_a, s_a), (m_b, s_b) = (_moments(x) for x in _pair(a, b, features))
    values, vectors = torch.linalg.eigh(s_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # S_a S_b has the eigenvalues of root S_b root, which is symmetric
    cross = torch.linalg.eigvalsh(root @ s_b @ root).clamp(min=0).sqrt().sum()
    return max(0.0, float((m_a - m_b).square().sum() + s_a.trace() + s_b.trace() - 2 * cross))


def kernel_distance(a: Tensor, b: Tensor, features: Extractor | None = None) -> float:
    """Unbiased squared maximum mean discrepancy of the features (KID, arXiv 1801.01401).

    With the kernel (x.y / d + 1)^3 over all pairs, where papers average random subsets: nothing is random.
    It may be negative, about half the time for two samples of one law.

    Args:
        a, b, features: as in `frechet_distance`.
    """
    x, y = _pair(a, b, features)
    n, m = len(x), len(y)
    within_x, within_y = (_kernel_sum(f, f) - _kernel(f.square().sum(1), f).sum() for f in (x, y))
    return float(within_x / (n * (n - 1)) + within_y / (m * (m - 1)) - 2 * _kernel_sum(x, y) / (n * m))


def class_score(a: Tensor, logits: Extractor | None = None) -> float:
    """exp of the mean KL divergence of p(class | image) from p(class), as the Inception score.

    1 when nothing tells images apart; the number of classes when each is surely one, all equally often.

    Args:
        a: (n, *event).
        logits: `x -> (batch, classes)`; by default the MNIST classifier's.
    """
    _check("a", a)
    if logits is None:
        from fewstep_analysis.teachers import mnist_features

        logits = mnist_features().logits
    log_p = _apply("a", a, logits).log_softmax(1)
    p = log_p.exp()
    # a class that never occurs counts 0 log 0 = 0
    return float((p * (log_p - p.mean(0).clamp(min=1e-300).log())).sum(1).mean().exp())


def _pair(a: Tensor, b: Tensor, features: Extractor | None) -> tuple[Tensor, Tensor]:
    """The features of both, (n, d) and (m, d) float64."""
    for name, x in (("a", a), ("b", b)):
        _check(name, x)
    if a.shape[1:] != b.shape[1:]:
        raise InputError(f"b: got events {tuple(b.shape[1:])}, expected those of a, {tuple(a.shape[1:])}.")
    if features is None:
        from fewstep_analysis.teachers import mnist_features

        features = mnist_features()
    return _apply("a", a, features), _apply("b", b, features)


def _check(name: str, x: Tensor) -> None:
    expected = "a finite floating-point tensor (n, *event) with n > 1"
    _validation.check_state(name, x, expected)
    if x.dim() < 2 or len(x) < 2:
        raise InputError(f"{name}: got {_validation.describe(x)}, expected {expected}.")


def _apply(name: str, x: Tensor, features: Extractor) -> Tensor:
    _validation.check_callable("features", features, "a function x -> (batch, d); of class_score, logits")
    module = getattr(features, "__self__", features)
    if module.__class__.__module__ == "fewstep_analysis.teachers" and x.shape[1:] != (1, 28, 28):
        raise InputError(
            f"{name}: got events {tuple(x.shape[1:])}; the MNIST classifier takes (1, 28, 28) in [-1, 1]. "
            "Pass a network for these images as features= (logits= for class_score)."
        )
    with torch.no_grad():
        out = torch.cat([features(part).double() for part in x.split(BATCH)])
    if out.dim() != 2 or len(out) != len(x):
        raise InputError(f"features: gave {tuple(out.shape)} for {len(x)} images, expected (batch, d).")
    return out


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and unbiased covariance (d, d)."""
    mean = x.mean(0)
    return mean, (x - mean).T @ (x - mean) / (len(x) - 1)


def _kernel(dots: Tensor, x: Tensor) -> Tensor:
    return (dots / x.shape[1] + 1) ** 3


def _kernel_sum(x: Tensor, y: Tensor) -> Tensor:
    """The sum over all pairs, by blocks of rows."""
    blocks = [_kernel(p @ q.T, x).sum() for p in x.split(BLOCK) for q in y.split(BLOCK)]
    return torch.stack(blocks).sum()
