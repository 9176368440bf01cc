"""Noise for k-diffusion's samplers and for this library's in k-diffusion's clothes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor

from .. import _validation
from ..brownian import BrownianPath
from ..brownian.increment import LEVY_ORDER
from ..brownian.random_normals import HashedNormals
from ..errors import InputError
from ..plan import Plan

Draws = Callable[[float, float], tuple[Tensor, ...]]
HALF = (torch.float16, torch.bfloat16)
# A cut of the tree costs normals for the whole batch, and a level takes as many cuts as it has bits. Moving
# levels by 2^-24 of the clock moves no law: noise is scaled by the moved interval.
BITS = 24
# The default path reaches from sigma = 2^-16 to 2^16 whatever the grid, so that grids of one seed share it.
REACH = 16
# Added to seeds for noise that belongs to no path (churn): far from the seeds of other images.
OFF_PATH = 1 << 40


def identity(sigma: Tensor) -> Tensor:
    """k-diffusion's own clock for a noise sampler: sigma itself."""
    return sigma


def snr(sigma: Tensor) -> Tensor:
    """This library's clock tau = 1/sigma^2, in which the reverse SDE has noise of size one."""
    return sigma**-2


class BrownianNoiseSampler:
    """k-diffusion's `BrownianTreeNoiseSampler` on a `BrownianPath`: `(sigma, sigma_next) -> N(0, 1)` noise.

    The value is (B(u') - B(u)) / sqrt(|u' - u|) with u = transform(sigma): the same in any order and for
    any number of steps, on all devices. The path is a function of the seed, sigma_min and sigma_max.

    Args:
        x: (batch, *event) gives shape, dtype and device.
        sigma_min, sigma_max: the levels between which it can be asked.
        seed: one for each sample (list), whose noise then depends on nothing else of the batch; from a
            single s they are s, s + 1, ...; None is 0, not a random one as k-diffusion has it.
        transform: monotone map from sigma to the clock of the path. The default is k-diffusion's; with
            `snr` the object also gives the samplers of this library all they ask (W, and H).
        levy: what the path knows, "W", "H" or "K". Paths of one seed and different levy differ.

    Raises:
        InputError: x that is no floating point batch, seeds that do not fit it, levels out of range.
    """

    def __init__(
        self, x: Tensor, sigma_min: float | Tensor, sigma_max: float | Tensor,
        seed: int | Sequence[int] | None = None, transform: Callable[[Tensor], Tensor] = identity,
        *, levy: str = "H",
    ) -> None:  # fmt: skip
        check_state(x)
        self.transform = transform
        self.dtype: torch.dtype = x.dtype
        self.sigma_min: float = _validation.check_float("sigma_min", sigma_min)
        self.sigma_max: float = _validation.check_float("sigma_max", sigma_max)
        if not 0 <= self.sigma_min < self.sigma_max < math.inf:
            raise InputError(
                f"sigma_min, sigma_max: got {self.sigma_min:g}, {self.sigma_max:g}; expected "
                "0 <= sigma_min < sigma_max. Take sigmas[sigmas > 0].min() and sigmas.max()."
            )
        low, high = sorted((self._time(self.sigma_min), self._time(self.sigma_max)))
        self.path: BrownianPath = BrownianPath(
            tuple(x.shape), low, high, levy=levy, dtype=torch.float32 if x.dtype in HALF else x.dtype,
            device=x.device, seeds=seeds(seed, len(x)), clock="log" if low > 0 else "linear",
        )  # fmt: skip

    @property
    def in_snr(self) -> bool:
        """Whether the clock is 1/sigma^2 up to a factor."""
        ends = self._time(self.sigma_min) * self.sigma_min**2, self._time(self.sigma_max) * self.sigma_max**2
        return ends[0] > 0 and math.isclose(*ends, rel_tol=1e-6)

    def __call__(self, sigma: float | Tensor, sigma_next: float | Tensor) -> Tensor:
        """(batch, *event) unit noise of the interval, its sign that of the direction."""
        z = self.normals(sigma, sigma_next)[0]
        forward = self._time(sigma) < self._time(sigma_next)
        return (z if forward else -z).to(self.dtype)

    def normals(self, sigma: float | Tensor, sigma_next: float | Tensor) -> tuple[Tensor, ...]:
        """W, H, K of the interval in increasing clock as unit normals, as far as the path knows them."""
        low, high = sorted(map(self._snap, (self._time(sigma), self._time(sigma_next))))
        if not low < high:
            raise InputError(
                f"sigma_next: got {float(sigma_next):g} after {float(sigma):g}; expected another level, "
                "there is no noise between equal ones."
            )
        return self.path.increment(low, high).coordinates()

    def _time(self, sigma: float | Tensor) -> float:
        level = float(sigma)
        inside = min(max(level, self.sigma_min), self.sigma_max)
        # k-diffusion asks at exp(log(sigma)) in float32, which may miss the ends by some roundings
        if abs(level - inside) > 1e-5 * inside:
            raise InputError(
                f"sigma: got {level:g}; expected a level in [{self.sigma_min:g}, {self.sigma_max:g}]. Make the "
                "noise sampler with a sigma_min and sigma_max that cover the grid."
            )
        return float(self.transform(torch.tensor(inside, dtype=torch.float64)))

    def _snap(self, u: float) -> float:
        """The nearest of 2^BITS places in the path's clock, even in log u where u > 0."""
        low, high, steps = self.path.t0, self.path.t1, 1 << BITS
        if low > 0:
            span = math.log(high / low)
            at = low * math.exp(span * (round(math.log(u / low) / span * steps) / steps))
        else:
            at = low + (high - low) * (round((u - low) / (high - low) * steps) / steps)
        return min(max(at, low), high)


def draws(plan: Plan, x: Tensor, seeds: list[int], noise_sampler: Any) -> Draws:
    """(tau0, tau1) -> unit normals, one for each letter of the plan; equal ends: off any path."""
    letters = plan.stage_noise.shape[-1]
    own = HashedNormals(tuple(x.shape), [s + OFF_PATH for s in seeds], x.device).begin(letters)
    used = plan.noise[plan.noise[:, 1] > plan.noise[:, 0]]
    if noise_sampler is None and len(used):
        reach = max(REACH, math.ceil(used.log2().abs().max().item() / 2))
        levy = "K" if plan.levy == "K" else "H"  # one path for all solvers of a seed, but those of K
        noise_sampler = BrownianNoiseSampler(x, 2.0**-reach, 2.0**reach, seeds, snr, levy=levy)
    ask = _asked(plan, x, noise_sampler) if len(used) else None
    counter = count()

    def draw(tau0: float, tau1: float) -> tuple[Tensor, ...]:
        if ask is None or tau0 == tau1:
            return tuple(z[0].to(x.dtype) for z in own(next(counter), 1))
        return tuple(z.to(x) for z in ask(tau0, tau1)[:letters])

    return draw


def _asked(plan: Plan, x: Tensor, noise: Any) -> Draws:
    """A user's or the default source of normals, once it is known to have what the plan needs."""
    path = noise.path if isinstance(noise, BrownianNoiseSampler) and noise.in_snr else noise
    if hasattr(path, "increment"):
        if LEVY_ORDER[path.levy] < plan.stage_noise.shape[-1]:
            raise InputError(
                f"noise_sampler: got levy={path.levy!r}; {plan.name} needs {plan.levy!r}. Make it with "
                f"levy={plan.levy!r}."
            )
        if tuple(path.shape) != tuple(x.shape):
            raise InputError(
                f"noise_sampler: got shape {tuple(path.shape)}; expected x's {tuple(x.shape)}. Make it from x."
            )
        if path is not noise:
            return lambda tau0, tau1: noise.normals(tau0**-0.5, tau1**-0.5)
        return lambda tau0, tau1: path.increment(tau0, tau1).coordinates()
    if not callable(noise) or plan.stage_noise.shape[-1] > 1:
        letters = " and ".join("WHK"[: plan.stage_noise.shape[-1]])
        raise InputError(
            f"noise_sampler: got {type(noise).__name__}; {plan.name} needs {letters} in the clock 1/sigma^2. "
            "Leave it out, or give BrownianNoiseSampler(..., transform=snr)."
        )

    def foreign(tau0: float, tau1: float) -> tuple[Tensor, ...]:
        # float32, in which k-diffusion's grids are exact: its trees refuse what lies a rounding outside
        ends = torch.tensor([tau0, tau1], dtype=torch.float64).rsqrt().float().to(x.device)
        z = noise(ends[0], ends[1])
        if not torch.is_tensor(z) or z.shape != x.shape:
            came = tuple(z.shape) if torch.is_tensor(z) else type(z).__name__
            raise InputError(
                f"noise_sampler: got {came}; expected unit normals of x's shape {tuple(x.shape)}."
            )
        return (z,)

    return foreign


def seeds(seed: Any, batch: int) -> list[int]:
    """One seed for each sample."""
    several = seed.tolist() if torch.is_tensor(seed) else seed
    if not isinstance(several, Iterable) or isinstance(several, str):
        first = 0 if several is None else _validation.check_int("seed", several, -math.inf)
        return [first + j for j in range(batch)]
    each = [_validation.check_int("seed", s, -math.inf) for s in several]
    if len(each) != batch:
        raise InputError(f"seed: got {len(each)} of them; expected one for each of {batch} samples.")
    return each


def check_state(x: Any) -> None:
    _validation.check_state("x", x, "finite floating point (batch, *event), sigmas[0] times noise")
    if len(x) == 0:
        raise InputError("x: got an empty batch, expected at least one sample.")
