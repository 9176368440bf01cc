"""A student's features (W, H) made from fine increments: exactly, and by a left Riemann sum."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import fewstep as fs
from base import Record, Row, table

LEVEL = 1e-3  # of the two-sample tests


class Increments:
    """A noise source that makes (W, H) of each interval from fine increments, exactly or by a left sum.

    With `left` the integral of W is the Riemann sum over the left ends, h/n sum_i W(t_i), so
    Cov(W, H) = -h/(2n). Otherwise fine intervals have their own H and Chen's relation joins them.

    Args:
        shape: of W.
        parts: n, equal fine intervals in each interval.
    """

    levy = "H"

    def __init__(self, shape: tuple[int, ...], parts: int, left: bool, seed: int = 0) -> None:
        self.shape = shape
        self.parts = parts
        self.left = left
        self.fresh: fs.FreshIncrements = fs.FreshIncrements(shape, levy="W" if left else "H", seed=seed)

    def increment(self, t0: float, t1: float, /) -> fs.Increment:
        h = t1 - t0
        ends = [t0 + h * i / self.parts for i in range(self.parts)] + [t1]
        fine = [self.fresh.increment(a, b) for a, b in zip(ends, ends[1:])]
        joined, total = fine[0], torch.zeros(self.shape)
        for one in fine[1:]:
            total = total + joined.W * (h / self.parts)
            joined = joined.join(one)
        return fs.Increment.from_U(h, joined.W, total) if self.left else joined


def correlation(parts: int) -> float:
    """Of W and the left sum's H: -(h/2n) / (sqrt(h) sqrt(h/12 + h/(6n^2))), 0 at n = infinity."""
    return -1 / (2 * parts) / math.sqrt(1 / 12 + 1 / (6 * parts**2))


def two_samples(a: Tensor, b: Tensor) -> dict[str, float]:
    """Kolmogorov and Smirnov's distance of two samples, and its p-value."""
    from scipy.stats import ks_2samp

    found = ks_2samp(a.numpy(), b.numpy(), method="asymp")
    return {"distance": float(found.statistic), "p": float(found.pvalue)}


def compare_features(problem: fs.DiffusionModel, student: Any, count: int, seed: int) -> list[Row]:
    """A student of levy="H" on fresh features against the same student on features of fine increments."""
    shape = (count, 1)

    def ends(source: Any, at: int) -> Tensor:
        with torch.no_grad():
            return fs.sample(problem, student, shape=shape, seed=seed + at, path=source).flatten()

    fresh, rows = ends(fs.FreshIncrements(shape, levy="H", seed=seed), 0), list[Row]()
    for at, (left, parts) in enumerate(((False, 60), (False, 4), (True, 60), (True, 4)), 1):
        W, H = Increments(shape, parts, left, seed + 50 + at).increment(0.0, 1.0).coordinates()
        rows.append({
            "kind": "left sum" if left else "Chen's relation", "parts": parts, "samples": count,
            "correlation": float((W * H).mean() / (W.square().mean() * H.square().mean()).sqrt()),
            "expected": correlation(parts) if left else 0.0,
            **two_samples(fresh, ends(Increments(shape, parts, left, seed + at), at)),
        })  # fmt: skip
    return rows


def features_table(record: Record) -> str:
    """What features made in other ways do to a student's samples."""
    head = ["features from", "fine steps", "correlation of W and H", "expected", "KS distance", "p"]
    numbers = ("correlation", "expected", "distance")
    rows = [
        [r["kind"], r["parts"], *(f"{r[k]:.4f}" for k in numbers), f"{r['p']:.2g}"]
        for r in record.data["features"]["rows"]
    ]
    return table(head, rows)
