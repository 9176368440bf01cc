"""The unrolled sampler and its derivatives, one evaluation's graph at a time.

A cotangent u of the final state is pulled back through the rows: with lambda_i the cotangent of input i and mu_i that
of evaluation i, mu_i = sum_l B_li lambda_l and lambda_i = (dD_i/dz_i)^T mu_i. The derivative by a weight of row i is
the product of lambda_i with what it multiplies, that by level i the product of mu_i with dD_i/dlevel. One pass gives
the derivatives by all coefficients, for each sample, and only the graph of one evaluation exists at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._validation import check_answer
from ...problem import Denoiser
from .coefficients import Coefficients


class Rollout(NamedTuple):
    """One run of the rows: what they combine (1 + R + normals, n, *event), their inputs, and the final state."""

    terms: Tensor
    inputs: list[Tensor]
    end: Tensor


def evaluated(denoiser: Denoiser, z: Tensor, level: Tensor) -> Tensor:
    """The denoiser at a log level, in memory of its own."""
    return check_answer("denoiser", denoiser(z, level.exp().to(z)), z).clone()


@torch.no_grad()
def rollout(c: Coefficients, denoiser: Denoiser, x: Tensor, normals: Tensor) -> Rollout:
    """Run the rows from x (n, *event) with normals (normals, n, *event)."""
    rows, weights = c.rows, c.weights.to(x)
    terms = x.new_zeros(1 + rows + len(normals), *x.shape)
    terms[0], terms[1 + rows :] = x, normals
    inputs = []
    for i in range(rows):
        inputs.append(torch.tensordot(weights[i], terms, 1))
        terms[1 + i] = evaluated(denoiser, inputs[i], c.levels[i])
    return Rollout(terms, inputs, torch.tensordot(weights[rows], terms, 1))


def pulled_back(c: Coefficients, denoiser: Denoiser, made: Rollout, cotangents: Tensor) -> Tensor:
    """(k, n, coefficients): the derivatives of <cotangents, final state>, for cotangents (k, n, *event)."""
    rows, weights, terms = c.rows, c.weights.to(made.end), made.terms.flatten(2)
    k, n = cotangents.shape[:2]
    by_weight = terms.new_zeros(rows + 1, k, n, len(terms))
    by_level = terms.new_zeros(k, n, rows)
    by_weight[rows] = torch.einsum("kne,bne->knb", cotangents.flatten(2), terms)
    at_evaluation = [weights[rows, 1 + j] * cotangents for j in range(rows)]  # mu
    for i in reversed(range(rows)):
        mu, z = at_evaluation[i], made.inputs[i]
        h = torch.finfo(z.dtype).eps ** (1 / 3)
        with torch.no_grad():
            high, low = (evaluated(denoiser, z, c.levels[i] + s) for s in (h, -h))
        by_level[..., i] = torch.einsum("kne,ne->kn", mu.flatten(2), (high - low).flatten(1)) / (2 * h)
        if i == 0:  # the first input is the start state
            break
        z = z.detach().requires_grad_(True)
        with torch.enable_grad():
            D = evaluated(denoiser, z, c.levels[i])
        pulled = [torch.autograd.grad(D, z, u, retain_graph=j + 1 < k)[0] for j, u in enumerate(mu)]
        at_input = torch.stack(pulled)
        by_weight[i] = torch.einsum("kne,bne->knb", at_input.flatten(2), terms)
        for j in range(i):
            at_evaluation[j] = at_evaluation[j] + weights[i, 1 + j] * at_input
    return torch.cat([by_weight.permute(1, 2, 0, 3).flatten(2), by_level], 2)
