"""Diffusion problems whose denoiser and data are known in closed form."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep import EDM, ODE, RK4, DiffusionModel, DiscreteVP, Schedule, _validation, solve


@dataclass(frozen=True, eq=False)
class Mixture:
    """A mixture of isotropic Gaussians, whose denoiser and samples are exact.

    Attributes:
        means: (K, d) float64.
        stds: (K,) float64.
        weights: (K,) float64, of sum 1.
    """

    means: Tensor
    stds: Tensor
    weights: Tensor

    def denoiser(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x0 + sigma n = x] for x (batch, d), sigma 0-d or (batch,)."""
        means, stds, weights = (v.to(x) for v in (self.means, self.stds, self.weights))
        level = sigma.to(x).reshape(-1, 1)
        variance = stds.square() + level.square()  # (1 or batch, K)
        distance = (x.unsqueeze(1) - means).square().sum(-1)
        logits = weights.log() - 0.5 * distance / variance - 0.5 * x.shape[1] * variance.log()
        share = torch.softmax(logits, 1)
        pull = stds.square() / variance
        return (share * pull).sum(1, keepdim=True) * x + (share * (1 - pull)) @ means

    def sample(self, n: int, seed: int = 0) -> Tensor:
        """(n, d) float64 samples of the data."""
        generator = torch.Generator().manual_seed(seed)
        which = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[which] + self.stds[which, None] * noise

    def flow(self, x: Tensor, sigmas: Tensor, substeps: int = 100) -> Tensor:
        """(n, *x.shape) solution of the probability-flow ODE at the levels (n,), from x at the first.

        RK4 in float64 in lambda = -log sigma, where dx/dlambda = D - x; a last level of 0 takes D.
        """
        ode = ODE(lambda t, x: self.denoiser(x, torch.exp(-t)) - x)
        states, sigmas = [x.double()], sigmas.double()
        for s, t in zip(sigmas[:-1], sigmas[1:]):
            if t == 0:
                states.append(self.denoiser(states[-1], s))
                continue
            grid = torch.linspace(-math.log(s), -math.log(t), substeps + 1, dtype=torch.float64)
            states.append(solve(ode, RK4(), states[-1], grid).y)
        return torch.stack(states)


@dataclass(frozen=True, eq=False)
class DiffusionProblem:
    """A mixture with a schedule, for `fewstep.sample`."""

    name: str
    mixture: Mixture
    schedule: Schedule

    @property
    def problem(self) -> DiffusionModel:
        """The diffusion model."""
        return DiffusionModel(self.mixture.denoiser, self.schedule)

    def noise(self, n: int, seed: int = 0) -> Tensor:
        """(n, d) float64 initial states sigma_max n, in variance-exploding coordinates."""
        shape, generator = (n, self.mixture.means.shape[1]), torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=torch.float64) * self.schedule.sigma_max


def _mixture(means: list[list[float]], stds: list[float], weights: list[float] | None = None) -> Mixture:
    count = len(means)
    shares = weights or [1 / count] * count
    return Mixture(*(torch.tensor(v, dtype=torch.float64) for v in (means, stds, shares)))


def gaussian() -> DiffusionProblem:
    """One Gaussian of mean (0.5, -0.3) and std 0.5: the flow is linear."""
    return DiffusionProblem("gaussian", _mixture([[0.5, -0.3]], [0.5]), EDM(0.02, 20.0))


def two_bumps() -> DiffusionProblem:
    """0.3 N(-1, 0.4^2) + 0.7 N(0.8, 0.6^2) in one dimension."""
    mixture = _mixture([[-1.0], [0.8]], [0.4, 0.6], [0.3, 0.7])
    return DiffusionProblem("two_bumps", mixture, EDM(0.1, 10.0))


def ring() -> DiffusionProblem:
    """Eight Gaussians of std 0.15 on the unit circle, with DDPM's linear schedule."""
    angles = [2 * math.pi * k / 8 for k in range(8)]
    means = [[math.cos(a), math.sin(a)] for a in angles]
    return DiffusionProblem("ring", _mixture(means, [0.15] * 8), DiscreteVP.named("linear"))


def smooth() -> DiffusionProblem:
    """Three broad Gaussians in the plane, with DDPM's linear schedule: an easy problem."""
    means = [[-0.8, -0.2], [0.6, 0.7], [0.5, -0.8]]
    mixture = _mixture(means, [0.6, 0.5, 0.7], [0.4, 0.3, 0.3])
    return DiffusionProblem("smooth", mixture, DiscreteVP.named("linear"))


PROBLEMS: dict[str, Callable[[], DiffusionProblem]] = {f.__name__: f for f in (gaussian, two_bumps, ring, smooth)}


def by_name(name: str) -> DiffusionProblem:
    """The problem of that name."""
    return PROBLEMS[_validation.check_choice("problem", name, PROBLEMS)]()
