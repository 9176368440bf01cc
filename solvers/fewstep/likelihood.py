"""`log_likelihood`: the density of the probability-flow ODE, by the change of variables along it."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import _validation
from .errors import InputError, named
from .grid import MOST, sigma_grid
from .problem import ODE, DiffusionModel
from .sde.rk4 import RK4
from .solve import solve


class LogLikelihood(NamedTuple):
    """Log densities.

    Attributes:
        value: (n,) float64, in nats per sample.
        error: (n,) float64, the standard error of `value` from the random probes; 0 where the trace is exact.
        size: the number of elements of a sample.
    """

    value: Tensor
    error: Tensor
    size: int

    @property
    def bits_per_dim(self) -> Tensor:
        """(n,) -value / (size log 2); add log2(k / 2) for images of k grey values that are scaled to [-1, 1]."""
        return -self.value / (self.size * math.log(2))


@named
def log_likelihood(
    problem: DiffusionModel, x0: Tensor, *, steps: int = 50, probes: int = 4, seed: int = 0, batch: int | None = None
) -> LogLikelihood:
    r"""The log density of data under the model's probability-flow ODE, in nats per sample.

    Along dx/dsigma = (x - D(x, sigma)) / sigma, with d elements in x,

    .. math:: \log p(x_{\min}) = \log N(x_{\max};\,0,\,\sigma_{\max}^2)
        + d\,\log\frac{\sigma_{\max}}{\sigma_{\min}}
        - \int_{\sigma_{\min}}^{\sigma_{\max}} \operatorname{tr}\frac{\partial D}{\partial x}\,\frac{d\sigma}\sigma.

    The trace is the mean of v' (dD/dx) v over random signs v, which stay the same along a trajectory; for d <= probes
    it is exact. State and integral are solved by RK4 in sigma on levels even in log sigma: order 4, at 4 `steps`
    evaluations with `probes` backward passes each.

    Args:
        problem: the model; its denoiser must be differentiable by x.
        x0: (n, *event) data, taken as the state alpha x at `sigma_min`: the density is that of data with this noise,
            of which `sample(..., final="sigma_min")` draws.
        steps: the number of steps.
        probes: random vectors per sample, at least 2.
        seed: of the probes.
        batch: samples per network call; by default all at once. Results do not depend on it.

    Returns:
        the densities with their standard errors, without a graph: no gradient flows to x0 or the model. The prior,
        N(0, sigma_max^2) of x0 + sigma n, from which `sample` starts, is not the law of the process there: densities
        differ by about |mean of x0| / sigma_max nats.

    Raises:
        InputError: data that are not finite, numbers out of range, a denoiser without a derivative by x.
        NonFiniteError: the model's output or derivative is not finite.

    Source: Chen et al. 2018 (arXiv 1806.07366); Grathwohl et al. 2019 (arXiv 1810.01367); Song et al. 2021
    (arXiv 2011.13456), Eqs. 39, 40.
    """
    _validation.check_instance("problem", problem, DiffusionModel, "a fewstep.DiffusionModel")
    _validation.check_state("x0", x0, "a finite floating-point tensor (n, *event)")
    _validation.check_no_graph("x0", x0)
    if not len(x0):
        raise InputError("x0: got an empty batch, expected at least one sample.")
    steps = _validation.check_int("steps", steps, 1, MOST)
    probes = _validation.check_int("probes", probes, 2)
    seed = _validation.check_seed(seed)
    batch = _validation.check_int_or_none("batch", batch, 1)
    levels = sigma_grid(problem.schedule, steps, "logsnr", "sigma_min").flip(0)
    size = x0[0].numel()
    alpha = problem.schedule.alpha(levels[:1]).item()
    x = x0.detach().reshape(len(x0), size).double() / alpha
    if size <= probes:
        exact = torch.eye(size, dtype=torch.float64)[:, None].expand(size, len(x), size)
        signs = exact * math.sqrt(size)  # their mean is the trace
    else:
        drawn = torch.randint(0, 2, (probes, len(x), size), generator=torch.Generator().manual_seed(seed))
        signs = 2.0 * drawn - 1
    signs = signs.to(x0.device, x0.dtype)
    traces, ends = [], []
    many = batch or max(1, len(x))
    for part, own in zip(torch.split(x, many), torch.split(signs, many, 1), strict=True):
        field = partial(_derivative, problem, tuple(x0.shape[1:]), own)
        start = torch.cat([part, part.new_zeros(len(part), len(signs))], 1)
        end = solve(ODE(field), RK4(), start, levels).y
        ends.append(end[:, :size])
        traces.append(end[:, size:])
    trace, end = torch.cat(traces), torch.cat(ends)
    low, high = levels[0].item(), levels[-1].item()
    prior = -0.5 * (end / high).square().sum(1) - size * (math.log(high) + 0.5 * math.log(2 * math.pi))
    value = prior + size * math.log(high / low) - trace.mean(1) - size * math.log(alpha)
    error = value.new_zeros(len(value)) if size <= probes else trace.std(1) / math.sqrt(probes)
    return LogLikelihood(value, error, size)


def _derivative(problem: DiffusionModel, event: tuple[int, ...], signs: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
    """d/dsigma of x and of the integrals of v' dD/dx v / sigma, (n, size + probes) float64; signs (probes, n, size)."""
    x = y[:, : signs.shape[2]].to(signs.dtype)
    with torch.enable_grad():
        at = x.detach().requires_grad_()
        z = at.reshape(len(at), *event)
        D = _validation.check_answer("denoiser", problem.denoiser(z, sigma.to(x)), z).reshape(x.shape)
    if not D.requires_grad:
        raise InputError("problem: got a denoiser without a derivative by x; expected one without no_grad or detach.")
    pulled = [torch.autograd.grad(D, at, v, retain_graph=True, materialize_grads=True)[0] for v in signs]
    traces = [(g * v).double().sum(1, keepdim=True) for g, v in zip(pulled, signs, strict=True)]
    return torch.cat([y[:, : x.shape[1]] - D.detach().double(), *traces], 1) / sigma
