"""Forward processes x_t = alpha_t x0 + sigma_t eps in terms of the noise level sigma_t / alpha_t, in float64."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from . import _validation
from ._tracing import made_outside
from .errors import InputError, one_of, warn

CLOSEST = 1 - 1e-6
"""The nearest to t = 1 of a flow, where sigma is infinite, that integrations start from."""


def _of_reals(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A method of a schedule that checks its argument and takes numbers and sequences too."""
    argument = list(inspect.signature(method).parameters)[1]

    @wraps(method)
    def checked(self: Schedule, *given: Any, **named: Any) -> Tensor:
        if given:
            return method(self, _validation.check_reals(argument, given[0]), *given[1:], **named)
        if argument in named:
            named[argument] = _validation.check_reals(argument, named[argument])
        return method(self, **named)

    return checked


class Schedule(ABC):
    """A forward process: the map between model time t and sigma = sigma_t / alpha_t, and alpha.

    Attributes:
        sigma_min, sigma_max: the range of noise levels in which a sampler works.
        labels: N where the model was trained on the integers 0 .. N-1, else None.
    """

    labels: int | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in ("sigma", "time", "label", "alpha"):
            if inspect.isfunction(vars(cls).get(name)):
                setattr(cls, name, _of_reals(vars(cls)[name]))

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
        """The exact inverse of `sigma` (any shape, float64)."""

    def label(self, sigma: Tensor) -> Tensor:
        """The time that the network receives: `time`, unless the process has another clock for networks."""
        return self.time(sigma)

    @_of_reals
    def alpha(self, sigma: Tensor) -> Tensor:
        """alpha_t where the process is variance preserving (the default): (1 + sigma^2)^(-1/2)."""
        return (1 + sigma.square()).rsqrt()


def check_schedule(value: Any, optional: bool = False) -> None:
    """Raise an `InputError` for anything but a schedule (or, where it is optional, None)."""
    expected = "a fewstep schedule such as VPLinear() or EDM()" + ", or None" * optional
    if isinstance(value, type) and issubclass(value, Schedule):
        expected += f". Call the class: {value.__name__}(...)"
    kinds = (Schedule, type(None)) if optional else Schedule
    _validation.check_instance("schedule", value, kinds, expected + "; docs/diffusion.md lists them")


class TimedSchedule(Schedule):
    """A process whose range of sigma is given by t_min and t_max."""

    t_min: float
    t_max: float

    def __post_init__(self) -> None:
        made_outside("schedule")
        given = {f.name: _validation.check_float(f.name, getattr(self, f.name)) for f in fields(self)}  # type: ignore[arg-type]
        for name in given:
            if not isinstance(getattr(self, name), (int, float)):
                object.__setattr__(self, name, given[name])
        try:
            low, high = self.sigma_min, self.sigma_max
            times = self.time(torch.tensor([low, high], dtype=torch.float64))
            good = 0 < low < high < math.inf and bool(times.isfinite().all())
        except (ArithmeticError, ValueError):
            good = False
        if not good:
            raise InputError(
                f"{', '.join(given)}: got {', '.join(f'{v:g}' for v in given.values())}, for which sigma does not rise "
                "from above 0 to a finite value; expected 0 < t_min < t_max and growing noise."
            )

    @property
    def sigma_min(self) -> float:
        return float(self.sigma(torch.tensor(self.t_min, dtype=torch.float64)))

    @property
    def sigma_max(self) -> float:
        return float(self.sigma(torch.tensor(self.t_max, dtype=torch.float64)))


@dataclass(frozen=True)
class VPLinear(TimedSchedule):
    """Variance preserving with beta(t) = b0 + t (b1 - b0), t in [t_min, 1] (arXiv 2011.13456, Eq. 32)."""

    b0: float = 0.1
    b1: float = 20.0
    t_min: float = 1e-3
    t_max: float = 1.0

    def integral(self, t: Tensor) -> Tensor:
        """int_0^t beta = -2 log alpha."""
        return 0.5 * (self.b1 - self.b0) * t**2 + self.b0 * t

    def inverse(self, B: Tensor) -> Tensor:
        """The t at which the integral is B, in the form of the root that does not cancel."""
        return 2 * B / (torch.sqrt(self.b0**2 + 2 * (self.b1 - self.b0) * B) + self.b0)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.expm1(self.integral(t)).sqrt()

    def time(self, sigma: Tensor) -> Tensor:
        return self.inverse(torch.log1p(sigma.square()))


@dataclass(frozen=True)
class SubVP(VPLinear):
    """sigma_t = 1 - alpha_t^2 with VPLinear's alpha (arXiv 2011.13456, Eq. 29): sigma = 2 sinh(B/2)."""

    def sigma(self, t: Tensor) -> Tensor:
        return 2 * torch.sinh(0.5 * self.integral(t))

    def time(self, sigma: Tensor) -> Tensor:
        return self.inverse(2 * torch.asinh(0.5 * sigma))

    def alpha(self, sigma: Tensor) -> Tensor:
        return torch.exp(-torch.asinh(0.5 * sigma))


@dataclass(frozen=True)
class VPScaledLinear(VPLinear):
    """Variance preserving with sqrt(beta) linear in t: latent diffusion's process in continuous time."""

    b0: float = 0.85
    b1: float = 12.0

    def integral(self, t: Tensor) -> Tensor:
        a, d = math.sqrt(self.b0), math.sqrt(self.b1) - math.sqrt(self.b0)
        return a * a * t + a * d * t**2 + d * d * t**3 / 3

    def inverse(self, B: Tensor) -> Tensor:
        # (a + d t)^3 = a^3 + 3 d B, written as a difference of cubes that does not cancel
        a, d = math.sqrt(self.b0), math.sqrt(self.b1) - math.sqrt(self.b0)
        root = (a**3 + 3 * d * B) ** (1 / 3)
        return 3 * B / (root**2 + root * a + a * a)


@dataclass(frozen=True)
class VPCosine(TimedSchedule):
    """alpha = cos((t+s)/(1+s) pi/2) / cos(s/(1+s) pi/2) (arXiv 2102.09672, Eq. 17); singular at t = 1."""

    s: float = 0.008
    t_min: float = 1e-3
    t_max: float = 0.9946

    def sigma(self, t: Tensor) -> Tensor:
        quarter = 0.5 * math.pi / (1 + self.s)
        alpha = torch.cos((t + self.s) * quarter) / math.cos(self.s * quarter)
        return torch.sqrt((1 - alpha) * (1 + alpha)) / alpha

    def time(self, sigma: Tensor) -> Tensor:
        quarter = 0.5 * math.pi / (1 + self.s)
        cosine = self.alpha(sigma) * math.cos(self.s * quarter)
        # arctan keeps the digits that arccos loses near 1
        sine = torch.sqrt((1 - cosine) * (1 + cosine))
        return torch.atan2(sine, cosine) / quarter - self.s


@dataclass(frozen=True)
class VPSigmoid(TimedSchedule):
    """alpha^2 = (S(end) - S(start + t (end - start))) / (S(end) - S(start)), S the logistic function of x / tau
    (arXiv 2212.11972, Algorithm 1); singular at t = 1."""

    start: float = -3.0
    end: float = 3.0
    tau: float = 1.0
    t_min: float = 1e-3
    t_max: float = 0.999

    @property
    def _ends(self) -> list[float]:
        return [1 / (1 + math.exp(-v / self.tau)) for v in (self.start, self.end)]

    def sigma(self, t: Tensor) -> Tensor:
        low, high = self._ends
        at = torch.sigmoid((self.start + t * (self.end - self.start)) / self.tau)
        return torch.sqrt((at - low) / (high - at))

    def time(self, sigma: Tensor) -> Tensor:
        low, high = self._ends
        at = high - (high - low) / (1 + sigma.square())
        return (self.tau * torch.logit(at) - self.start) / (self.end - self.start)


class _Exploding(Schedule):
    """A process with alpha = 1."""

    def __post_init__(self) -> None:
        low = _validation.check_float("sigma_min", self.sigma_min)
        high = _validation.check_float("sigma_max", self.sigma_max)
        if not 0 < low < high:
            raise InputError(f"sigma_min, sigma_max: got {low}, {high}; expected 0 < sigma_min < sigma_max.")

    def alpha(self, sigma: Tensor) -> Tensor:
        return torch.ones_like(sigma)


@dataclass(frozen=True)
class VE(_Exploding):
    """Variance exploding: alpha = 1, sigma_t = sigma_min (sigma_max/sigma_min)^t (arXiv 2011.13456)."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def time(self, sigma: Tensor) -> Tensor:
        return torch.log(sigma / self.sigma_min) / math.log(self.sigma_max / self.sigma_min)


@dataclass(frozen=True)
class EDM(_Exploding):
    """alpha = 1, and time is sigma itself (arXiv 2206.00364)."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def time(self, sigma: Tensor) -> Tensor:
        return sigma


@dataclass(frozen=True)
class FlowMatching(TimedSchedule):
    """x_t = (1 - t) x0 + t eps; the network receives t = k u / (1 + (k - 1) u), k the shift, u the clock.

    Grids that are even in time are even in u: a larger shift moves their nodes towards noise. At t = 1 sigma is
    infinite; t_max stops short of it, which changes a sample by about 1 - t_max. Solvers that extrapolate the noise
    (DEIS, IPNDM, PNDM, DPMSolver) leave 6e-8 sigma_max of rounding in float32; those that extrapolate the data do not.
    Few steps belong on grids that are even in time, `spacing="trailing"`: those of "logsnr" span factors of 100 at 5.
    """

    shift: float = 1.0
    t_min: float = 1e-3
    t_max: float = 1 - 1e-4

    def sigma(self, t: Tensor) -> Tensor:
        return self.shift * t / (1 - t)

    def time(self, sigma: Tensor) -> Tensor:
        return sigma / (self.shift + sigma)

    def label(self, sigma: Tensor) -> Tensor:
        return sigma / (1 + sigma)

    def alpha(self, sigma: Tensor) -> Tensor:
        return 1 / (1 + sigma)


class DiscreteVP(Schedule):
    """A table of alphas_cumprod, as used to train DDPM-style models (labels 0 .. N-1).

    Between labels log(sigma) is interpolated linearly in the label; at a label the value is the table's.

    Args:
        alphas_cumprod: (N,) strictly decreasing in (0, 1); kept in float64.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        made_outside("schedule")
        abar = _check_table(alphas_cumprod)
        if not abar[-1] > 0:
            raise InputError(
                "alphas_cumprod: got a table that ends in 0 (zero terminal SNR), expected numbers above 0. Pass it "
                "through fewstep.zero_terminal_snr first."
            )
        self.log_sigmas: Tensor = 0.5 * torch.log((1 - abar) / abar)
        self.labels: int = len(abar)

    def __repr__(self) -> str:
        """Equal for equal tables, in every process."""
        some = [f"{v:.4g}" for v in self.log_sigmas[:: max(1, self.labels // 7)].tolist()]
        return f"DiscreteVP({self.labels} labels, log sigma {', '.join(some)}, ...)"

    @classmethod
    def named(
        cls, name: str = "linear", steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02,
        zero_snr: bool = False,
    ) -> DiscreteVP:  # fmt: skip
        """A table of diffusers: "linear", "scaled_linear" or "squaredcos_cap_v2"."""
        steps = _validation.check_int("steps", steps, 2, 10**6)
        for argument, beta in (("beta_start", beta_start), ("beta_end", beta_end)):
            _validation.check_float(argument, beta, 0, 1, "a number in [0, 1]")
        _validation.check_choice("name", name, ("linear", "scaled_linear", "squaredcos_cap_v2"))
        if name == "linear":
            betas = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)
        elif name == "scaled_linear":
            betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64) ** 2
        elif name == "squaredcos_cap_v2":
            t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
            abar = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = (1 - abar[1:] / abar[:-1]).clamp(max=0.999)
        else:
            raise one_of("name", name, ("linear", "scaled_linear", "squaredcos_cap_v2"))
        abar = torch.cumprod(1 - betas, 0)
        return cls(zero_terminal_snr(abar) if _validation.check_flag("zero_snr", zero_snr) else abar)

    @classmethod
    def of_table(cls, log_sigmas: Tensor) -> DiscreteVP:
        """The schedule of a valid table (N,) of log sigma, which stays on its device."""
        schedule = cls.__new__(cls)
        schedule.log_sigmas, schedule.labels = log_sigmas, len(log_sigmas)
        return schedule

    @property
    def sigma_min(self) -> float:
        return math.exp(self.log_sigmas[0])

    @property
    def sigma_max(self) -> float:
        return math.exp(self.log_sigmas[-1])

    def sigma(self, t: Tensor) -> Tensor:
        table = self.log_sigmas.to(t.device)
        low = t.detach().nan_to_num(0).floor().clamp(0, len(table) - 2).long()
        return torch.exp(torch.lerp(table[low], table[low + 1], (t - low).to(table.dtype)))

    def time(self, sigma: Tensor) -> Tensor:
        table, value = self.log_sigmas.to(sigma.device), torch.log(sigma.double())
        low = (torch.searchsorted(table, value) - 1).clamp(0, len(table) - 2)
        return low + (value - table[low]) / (table[low + 1] - table[low])


def zero_terminal_snr(alphas_cumprod: Tensor, last: float = 2.0**-24) -> Tensor:
    """The table with sqrt(alphas_cumprod) shifted and scaled to end in 0 (arXiv 2305.08891, Algorithm 1).

    Args:
        alphas_cumprod: (N,) strictly decreasing in [0, 1), N > 2.
        last: replaces the 0 at the end, whose sigma would be infinite; a quarter of the value before it where that
            is smaller. Networks for such tables predict v or the sample, because noise alone has nothing of x0.
    """
    abar = _check_table(alphas_cumprod)
    if not 0 < _validation.check_float("last", last) < 1:
        raise InputError(f"last: got {last!r}, expected a number between 0 and 1.")
    root = abar.sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    square = root.square()
    return torch.cat([square[:-1], torch.where(square[-2:-1] > last, last, square[-2:-1] / 4)])


def _check_table(alphas_cumprod: Tensor) -> Tensor:
    abar = _validation.check_numbers("alphas_cumprod", alphas_cumprod)
    good = abar.dim() == 1 and len(abar) > 1 and bool(((abar >= 0) & (abar < 1)).all())
    if not good or not bool((abar.diff() < 0).all()):
        raise InputError(
            f"alphas_cumprod: got a tensor of shape {tuple(abar.shape)}; expected (N,) strictly decreasing "
            "in [0, 1), N > 1. Pass torch.cumprod(1 - betas, 0)."
        )
    if len(abar) >= 100 and abar[-1] > 0.9:  # short tables may end early
        warn(
            f"alphas_cumprod: its last entry is {abar[-1]:.3g}, where samples are data with little noise. If it is "
            "1 - betas, pass torch.cumprod(1 - betas, 0)."
        )
    return abar
