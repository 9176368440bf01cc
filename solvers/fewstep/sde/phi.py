"""The phi functions of exponential integrators, phi_k(z) = sum over j of z^j / (j + k)!."""

import math
from typing import TypeVar

import torch
from torch import Tensor

Number = TypeVar("Number", float, Tensor)
TERMS = 18  # of the series for |z| < 1: the first one left out is below 1e-16


def phi_functions(z: Number, last: int) -> list[Number]:
    """phi_0(z) = e^z to phi_last(z), of a number or elementwise, by their recursion or near 0 by their series."""
    if isinstance(z, Tensor):
        near = z.abs() < 1
        far, inside = _recursion(torch.where(near, 1.0, z), last), torch.where(near, z, 0.0)
        return [torch.where(near, _series(inside, k), value) for k, value in enumerate(far)]
    return [_series(z, k) for k in range(last + 1)] if abs(z) < 1 else _recursion(z, last)


def _recursion(z: Number, last: int) -> list[Number]:
    found: list[Number] = [torch.exp(z) if isinstance(z, Tensor) else math.exp(z)]
    for k in range(last):
        found.append((found[-1] - 1 / math.factorial(k)) / z)
    return found


def _series(z: Number, k: int) -> Number:
    total = 0 * z
    for j in reversed(range(TERMS)):
        total = total * z + 1 / math.factorial(j + k)
    return total
