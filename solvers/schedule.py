"""Forward processes x_t = alpha_t x0 + sigma_t eps, and their clock in variance-exploding coordinates.

Inside the library a noise level is sigma = sigma_t / alpha_t; a schedule says which model time t that
is, and what alpha was. All maps take and return tensors and are evaluated in float64.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import InputError


class Schedule(ABC):
    """A forward process, seen as the map between model time t and sigma = sigma_t / alpha_t.

    Attributes:
        sigma_min, sigma_max: the range in which a sampler works.
    """

    @property
    @abstractmethod
    def sigma_min(self) -> float: ...

    @property
    @abstractmethod
    def sigma_max(self) -> float: ...

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """sigma_t / alpha_t at model times t (any shape, float64)."""

    @abstractmethod
    def time(self, sigma: Tensor) -> Tensor:
        """The exact inverse of `sigma`: the time a model is told (any shape, float64)."""

    def alpha(self, sigma: Tensor) -> Tensor:
        """alpha_t where the process is variance preserving (the default): (1 + sigma^2)^(-1/2)."""
        return (1 + sigma.square()).rsqrt()


@dataclass(frozen=True)
class VPLinear(Schedule):
    """Variance preserving with beta(t) = b0 + t (b1 - b0), t in [t_min, 1] (arXiv 2011.13456, Eq. 32)."""

    b0: float = 0.1
    b1: float = 20.0
    t_min: float = 1e-3

    @property
    def sigma_min(self) -> float:
        return float(self.sigma(torch.tensor(self.t_min, dtype=torch.float64)))

    @property
    def sigma_max(self) -> float:
        return float(self.sigma(torch.tensor(1.0, dtype=torch.float64)))

    def sigma(self, t: Tensor) -> Tensor:
        # 1/alpha^2 - 1 with -2 log alpha = int_0^t beta
        return torch.expm1(0.5 * (self.b1 - self.b0) * t**2 + self.b0 * t).sqrt()

    def time(self, sigma: Tensor) -> Tensor:
        # the root of int_0^t beta = log(1 + sigma^2), in the form that does not cancel
        q = 2 * (self.b1 - self.b0) * torch.log1p(sigma.square())
        return q / ((self.b1 - self.b0) * (torch.sqrt(self.b0**2 + q) + self.b0))


@dataclass(frozen=True)
class VE(Schedule):
    """Variance exploding, alpha = 1, sigma_t = sigma_min (sigma_max/sigma_min)^t (arXiv 2011.13456)."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def time(self, sigma: Tensor) -> Tensor:
        return torch.log(sigma / self.sigma_min) / math.log(self.sigma_max / self.sigma_min)

    def alpha(self, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)


@dataclass(frozen=True)
class EDM(Schedule):
    """alpha = 1 and time is sigma itself (arXiv 2206.00364)."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def time(self, sigma: Tensor) -> Tensor:
        return sigma

    def alpha(self, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)


class DiscreteVP(Schedule):
    """A table of alphas_cumprod, as DDPM-style models are trained (labels 0 .. N-1).

    Between labels log(sigma) is interpolated linearly in the label, so that a sampler may stop at any
    sigma; at a label the value is the table's.

    Args:
        alphas_cumprod: (N,) strictly decreasing in (0, 1); kept in float64.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        abar = torch.as_tensor(alphas_cumprod, dtype=torch.float64, device="cpu")
        ok = abar.dim() == 1 and len(abar) > 1 and bool(((abar > 0) & (abar < 1)).all())
        if not ok or not bool((abar.diff() < 0).all()):
            raise InputError(
                f"alphas_cumprod: got a tensor of shape {tuple(abar.shape)}; wanted (N,) strictly "
                "decreasing inside (0, 1). Pass torch.cumprod(1 - betas, 0)."
            )
        self.log_sigmas = 0.5 * torch.log((1 - abar) / abar)

    @property
    def sigma_min(self) -> float:
        return math.exp(self.log_sigmas[0])

    @property
    def sigma_max(self) -> float:
        return math.exp(self.log_sigmas[-1])

    def sigma(self, t: Tensor) -> Tensor:
        table = self.log_sigmas.to(t.device)
        low = t.detach().floor().clamp(0, len(table) - 2).long()
        return torch.exp(torch.lerp(table[low], table[low + 1], (t - low).to(table.dtype)))

    def time(self, sigma: Tensor) -> Tensor:
        table, value = self.log_sigmas.to(sigma.device), torch.log(sigma.double())
        low = (torch.searchsorted(table, value) - 1).clamp(0, len(table) - 2)
        return low + (value - table[low]) / (table[low + 1] - table[low])
