"""Noise for k-diffusion's samplers, and for this library's solvers as k-diffusion samplers."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, pairwise, starmap
from typing import Any

import torch
from torch import Tensor

from .. import BrownianPath, Increment, InputError, Plan, Schedule, _validation
from ..brownian.random_normals import HashedNormals, wrapped
from ..executor import Draw, Normals
from ..plan_noise import CHURN_OFFSET, PlanIncrements, plan_normals

# A cut of the tree costs normals for all samples, and a level takes as many cuts as it has bits. Moving
# levels by 2^-24 of the clock changes no law: noise is scaled by the moved interval.
BITS = 24
# The default path reaches from sigma = 2^-16 to 2^16 whatever the grid, so grids of one seed share it.
REACH = 16
FLOW_REACH = 20  # a flow begins at sigma = 1e6


def snr(sigma: Tensor) -> Tensor:
    """tau = 1/sigma^2, this library's clock, in which the reverse SDE has noise of size one."""
    return sigma**-2


class BrownianNoiseSampler:
    r"""k-diffusion's `BrownianTreeNoiseSampler` on a `BrownianPath`: `(sigma, sigma_next) -> N(0, 1)` noise.

    The value is $(B_{u'} - B_u) / \sqrt{|u' - u|}$ with u = transform(sigma): the same in any order, for
    any number of steps, and on all devices. The path is a function of the seed, sigma_min and sigma_max.

    Args:
        x: (batch, *event) gives shape, dtype and device.
        sigma_min, sigma_max: the range of levels.
        seed: a list has one per sample, whose noise then does not depend on the rest of the batch; an int s
            means s, s + 1, ...; None draws seeds from torch's global generator, as in k-diffusion.
        transform: monotone map from sigma to the clock of the path; None for sigma itself, as in k-diffusion. With
            `snr` the object is a path for every sampler of this library.
        levy: the Lévy data of the path: "W", "H" or "K". Paths of one seed and different levy differ.

    Raises:
        InputError: x that is not a floating-point batch, seeds that do not match it, levels out of range.
    """

    def __init__(
        self, x: Tensor, sigma_min: float | Tensor, sigma_max: float | Tensor, seed: int | Sequence[int] | None = None,
        transform: Callable[[Tensor], Tensor] | None = None, *, levy: str = "H",
    ) -> None:  # fmt: skip
        check_state(x, _validation.at_once(x))
        self.transform: Callable[[Tensor], Tensor] | None = transform
        self.dtype: torch.dtype = x.dtype
        self.shape: tuple[int, ...] = tuple(x.shape)
        self.device: torch.device = x.device
        self.levy: str = levy
        self.sigma_min: float = _validation.check_float("sigma_min", sigma_min)
        self.sigma_max: float = _validation.check_float("sigma_max", sigma_max)
        if not 0 <= self.sigma_min < self.sigma_max < math.inf:
            raise InputError(
                f"sigma_min, sigma_max: got {self.sigma_min:g}, {self.sigma_max:g}; expected "
                "0 <= sigma_min < sigma_max. Take sigmas[sigmas > 0].min() and sigmas.max()."
            )
        low, high = sorted((self._time(self.sigma_min), self._time(self.sigma_max)))
        self.path: BrownianPath = BrownianPath(
            self.shape, low, high, levy=levy, dtype=torch.promote_types(x.dtype, torch.float32),
            device=x.device, seeds=seeds(seed, len(x)), clock="log" if low > 0 else "linear",
        )  # fmt: skip

    @property
    def in_snr(self) -> bool:
        """Whether the clock is 1/sigma^2 up to a factor."""
        ends = self._time(self.sigma_min) * self.sigma_min**2, self._time(self.sigma_max) * self.sigma_max**2
        return ends[0] > 0 and math.isclose(*ends, rel_tol=1e-6)

    def __call__(self, sigma: float | Tensor, sigma_next: float | Tensor) -> Tensor:
        """(batch, *event) unit noise of the interval, its sign that of the direction."""
        scalars = [s for s in (sigma, sigma_next) if isinstance(s, Tensor) and s.shape == () and not s.is_meta]
        if len(scalars) == 2:  # one read from their device
            sigma, sigma_next = torch.stack(scalars).tolist()
        z = self._between(sigma, sigma_next).coordinates()[0]
        forward = self._time(sigma) < self._time(sigma_next)
        return (z if forward else -z).to(self.dtype)

    def increment(self, tau0: float, tau1: float) -> Increment:
        """The increment between the levels tau0^(-1/2) and tau1^(-1/2), in the path's own clock."""
        return self._between(tau0**-0.5, tau1**-0.5)

    def increments(self, grid: Tensor) -> Iterator[Increment]:
        """Return the n - 1 increments over the intervals of a grid (n,)."""
        return starmap(self.increment, pairwise(grid.tolist()))

    def nearby(self, taus: Tensor) -> Iterator[Increment]:
        """The increments between neighbouring levels taus^(-1/2), each moved a little to a node of the path's tree."""
        times = [self._time(tau**-0.5) for tau in taus.tolist()]
        return self.path.nearby(torch.tensor(times, dtype=torch.float64, device="cpu"))

    def _between(self, sigma: float | Tensor, sigma_next: float | Tensor) -> Increment:
        low, high = sorted(map(self._snap, (self._time(sigma), self._time(sigma_next))))
        if not low < high:
            raise InputError(
                f"sigma_next: got {float(sigma_next):g} after {float(sigma):g}; expected another level, there is no "
                "noise between equal ones."
            )
        return self.path.increment(low, high)

    def _time(self, sigma: float | Tensor) -> float:
        level = _validation.check_float("sigma", sigma)
        inside = min(max(level, self.sigma_min), self.sigma_max)
        # k-diffusion passes exp(log(sigma)) in float32, which may miss the ends by some roundings
        if abs(level - inside) > 1e-5 * inside:
            raise InputError(
                f"sigma: got {level:g}; expected a level in [{self.sigma_min:g}, {self.sigma_max:g}]. Make "
                "the noise sampler with a sigma_min and sigma_max that cover the grid."
            )
        if self.transform is None:
            return inside
        _validation.check_callable("transform", self.transform, "a function of sigma")
        at = self.transform(torch.tensor(inside, dtype=torch.float64))
        return _validation.check_float("transform", at, expected="a function of sigma that returns a finite number")

    def _snap(self, u: float) -> float:
        """The nearest of 2^BITS points in the path's clock, uniform in log u where u > 0."""
        low, high, steps = self.path.t0, self.path.t1, 1 << BITS
        if low > 0:
            span = math.log(high / low)
            at = low * math.exp(span * (round(math.log(u / low) / span * steps) / steps))
        else:
            at = low + (high - low) * (round((u - low) / (high - low) * steps) / steps)
        return min(max(at, low), high)


def sampler_normals(plan: Plan, x: Tensor, seed: Any, noise_sampler: Any, flow: Schedule | None = None) -> Draw:
    """A plan's normals, of the given noise sampler or path, by default of the path of the seeds.

    A function of levels is called with those of the caller, which for a `flow` are in [0, 1].
    """
    if not plan.levy:  # nothing is drawn; torch's generator stays as it is
        if seed is not None:
            seeds(seed, len(x))
        return no_normals
    letters, calls, on_path = plan.stage_noise.shape[-1], count(), bool(plan.on_path.any())
    churned = bool((plan.noise == 0).any())
    used = seed is not None or churned or (on_path and noise_sampler is None)
    own = seeds(seed, len(x)) if used else [0] * len(x)
    hashed = HashedNormals(tuple(x.shape), [s + CHURN_OFFSET for s in own], x.device).begin(letters)
    path = noise_sampler

    def fresh(_: int) -> Normals:
        return tuple(z[0].to(x.dtype) for z in hashed([next(calls)]))

    if churned and not on_path and path is not None:
        raise InputError(
            f"noise_sampler: got {type(path).__name__}; the noise of {plan.name} belongs to no interval of levels. "
            "Leave it out and pass seed=."
        )
    if not on_path:
        path = None
    elif path is None:
        least = FLOW_REACH if flow else REACH
        reach = max(least, math.ceil(plan.noise[plan.on_path].log2().abs().max().item() / 2))
        levy = "K" if plan.levy == "K" else "H"  # one path for all solvers of a seed except those that need K
        path = BrownianNoiseSampler(x, 2.0**-reach, 2.0**reach, own, snr, levy=levy)
    elif not (hasattr(path, "increment") and getattr(path, "in_snr", True)):
        if callable(path) and letters == 1:
            # float32, in which k-diffusion's grids are exact: its trees refuse levels a rounding outside
            levels = plan.noise.rsqrt()
            levels = (flow.label(levels) if flow else levels).float().to(x.device)
            ends = dict(zip(map(tuple, plan.noise.tolist()), levels.unbind()))
            return lambda *interval: fresh(1) if interval[0] == interval[1] else (_foreign(path, x, *ends[interval]),)
        raise InputError(
            f"noise_sampler: got {type(path).__name__}; {plan.name} needs {' and '.join('WHK'[:letters])} in the clock "
            "1/sigma^2. Leave it out, or give BrownianNoiseSampler(..., transform=snr)."
        )
    # a given one is asked as k-diffusion's own samplers ask it, for equal noise
    return plan_normals(plan, x, path and PlanIncrements(plan, x, path, "noise_sampler", noise_sampler is None), fresh)


def no_normals(tau0: float, tau1: float) -> Normals:
    """The normals of a deterministic plan."""
    raise AssertionError("a deterministic plan opens no noise interval")


def _foreign(noise: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """The unit normals of an interval from a function `(sigma, sigma_next) -> unit normals`."""
    z = noise(sigma, sigma_next)
    if not torch.is_tensor(z) or z.shape != x.shape or z.is_meta or z.layout != torch.strided:
        got = tuple(z.shape) if torch.is_tensor(z) else type(z).__name__
        raise InputError(f"noise_sampler: got {got}; expected unit normals of x's shape {tuple(x.shape)}.")
    return z.to(x)


def seeds(seed: Any, batch: int) -> list[int]:
    """One seed per sample; of None, drawn from torch's global generator."""
    if seed is None:
        return [int(s) for s in torch.randint(1 << 62, (batch,))]
    several = _validation.check_numbers("seed", seed).tolist() if torch.is_tensor(seed) and seed.is_meta else seed
    several = seed.tolist() if torch.is_tensor(seed) else several
    if isinstance(several, Iterable) and not isinstance(several, str):
        return _validation.check_seeds(several, batch, "seed")
    first = _validation.check_seed(several)
    return [wrapped(first + j) for j in range(batch)]


def check_state(x: Any, finite: bool = True) -> None:
    """Reject an initial state that is not a finite floating-point batch of at least one sample."""
    _validation.check_state("x", x, "finite floating point (batch, *event), sigmas[0] times noise", finite)
    if len(x) == 0:
        raise InputError("x: got an empty batch, expected at least one sample.")
