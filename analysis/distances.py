"""Distances between samples of two laws."""

from __future__ import annotations

import torch
from fewstep.errors import InputError
from torch import Tensor


def sliced_w2(a: Tensor, b: Tensor, *, projections: int = 1024, seed: int = 0) -> float:
    """Sliced 2-Wasserstein distance: the root mean over random directions of the squared 1-D distance.

    Args:
        a, b: (n, *event) and (m, *event); equal n and m are compared order statistic by order statistic,
            others by their quantile functions at max(n, m) points.
        projections: number of directions; the same seed gives the same ones.

    Note that two finite samples of one law are not at distance 0: report the floor beside it.
    """
    if a.shape[1:] != b.shape[1:]:
        raise InputError(f"b: got events of shape {tuple(b.shape[1:])}, wanted {tuple(a.shape[1:])} as in a.")
    a, b = a.flatten(1).double(), b.flatten(1).double()
    projections = projections if a.shape[1] > 1 else 1
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(a.shape[1], projections, generator=generator, dtype=torch.float64)
    directions = (directions / directions.norm(dim=0)).to(a.device)
    p, q = (a @ directions).sort(0).values, (b @ directions).sort(0).values
    if len(p) != len(q):
        n = max(len(p), len(q))
        middle = (torch.arange(n, dtype=torch.float64, device=p.device) + 0.5) / n
        p, q = (v[(middle * len(v)).long()] for v in (p, q))
    return float((p - q).square().mean().sqrt())
