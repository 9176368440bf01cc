"""Expectations of solutions by multilevel Monte Carlo: most paths are solved in a few large steps.

A level is a refinement: level l takes 2^l steps. The mean of the finest level is that of the coarsest plus the means of
the differences between adjacent levels, each along common paths. Fine levels differ little, so few paths suffice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist

import torch
from torch import Tensor

from fewstep import SDE, FreshIncrements, InputError, StochasticSolver, _validation, solve
from fewstep.brownian.increment import check_dtype
from fewstep.brownian.random_normals import key_of, wrapped
from fewstep.errors import warn
from fewstep.solve import check_solves

from .convergence import FINEST
from .monte_carlo import Experiment, Stored, grid_of
from .records import Record, provenance

BUDGET = 1 << 26  # bytes of increments held at a time
LARGEST = 1 << 18  # paths of a chunk
PILOT = 1024  # paths of the first three levels before anything is known of them
LEAST = 256  # paths of a later level: fewer give no variance
BIAS = 0.25  # the share of the tolerance that the bias may have
SLOWEST = 0.5  # the least rate at which variances and means are assumed to fall


@dataclass(frozen=True)
class Level:
    """What was measured on a level of `expectation`.

    Attributes:
        level, steps: the refinement, and its number of steps, 2^level.
        paths: number of paths (antithetic pairs count as one).
        mean, variance: of the payoff on the coarsest level, and of its difference to the next coarser level on others.
        payoff_variance: of the payoff itself.
        evaluations: drift evaluations per path, those of the coarser solution included.
    """

    level: int
    steps: int
    paths: int
    mean: float
    variance: float
    payoff_variance: float
    evaluations: int


@dataclass(frozen=True)
class Expectation:
    """An expectation with its interval, and what it cost. `print(report)` shows the table of levels.

    Attributes:
        value: the estimate.
        low, high: the interval, `value` plus or minus z times `sampling` plus `bias`, z of `confidence`.
        sampling: the standard error.
        bias: the bound on the bias of the finest level, estimated from the means of the last three levels.
        tolerance, confidence: as asked for.
        reached: whether the half-width of the interval is at most the tolerance.
        levels: one `Level` per refinement, coarse to fine.
        weak_rate: the rate at which the means are taken to fall per level, log2; at most the solver's weak order.
        variance_rate: that of the variances.
        evaluations: drift evaluations of all paths.
        plain_paths, plain_evaluations: what plain Monte Carlo on the finest level needs for the same interval, from
            the variance that was measured there.
    """

    value: float
    low: float
    high: float
    sampling: float
    bias: float
    tolerance: float
    confidence: float
    reached: bool
    levels: list[Level]
    weak_rate: float
    variance_rate: float
    evaluations: int
    plain_paths: int
    plain_evaluations: int
    solver: str
    antithetic: bool
    seed: int

    def __str__(self) -> str:
        half = (self.high - self.low) / 2
        parts = f"sampling {half - self.bias:.2g}, bias {self.bias:.2g}"
        head = f"{self.value:.6g} +- {half:.2g} ({self.confidence:.0%}): {parts}"
        lines = [("steps", "paths", "mean", "variance", "evaluations")]
        lines += [
            (str(v.steps), f"{v.paths:,}", f"{v.mean:.3g}", f"{v.variance:.3g}", f"{v.paths * v.evaluations:,}")
            for v in self.levels
        ]
        widths = [max(map(len, column)) for column in zip(*lines)]
        rows = ["  ".join(word.rjust(width) for word, width in zip(line, widths)) for line in lines]
        ratio = self.plain_evaluations / self.evaluations
        last = f"{self.evaluations:,} evaluations; plain Monte Carlo: {self.plain_evaluations:,} ({ratio:.2g} times)"
        return "\n".join([head, *rows, last])

    def record(self) -> Record:
        """The report as a record."""
        return Record("expectation", asdict(self), self.seed, provenance())

    def save(self, path: str | Path) -> Path:
        """Write the JSON record."""
        return self.record().save(path)


def expectation(
    sde: SDE, solver: StochasticSolver, y0: Tensor, span: Sequence[float], payoff: Callable[[Tensor], Tensor], *,
    tolerance: float, confidence: float = 0.95, antithetic: bool = False, coarsest: int = 0, finest: int = 12,
    seed: int = 0,
) -> Expectation:  # fmt: skip
    r"""Estimate $E[\varphi(y_T)]$ to a tolerance by multilevel Monte Carlo.

    With $P_l$ the payoff of the solution in 2^l steps, $E P_L = E P_{l_0} + \sum_l E[P_l - P_{l-1}]$. Level l has
    $n_l$ proportional to $\sqrt{V_l / C_l}$ paths, which minimises the cost for a variance, and L grows until the bias
    that the last means show is at most a quarter of the tolerance. A solver of strong order above 1/2 then costs
    O(tolerance^-2) evaluations for a Lipschitz payoff, where plain Monte Carlo costs O(tolerance^-3) at weak order 1.

    - Both solutions of a difference follow one Brownian path: increments of the fine grid, joined in pairs for the
      coarse one. Levels and chunks have independent paths; those of chunk c of level l are a function of (seed, l, c).
    - Memory is bounded: increments of at most 64 MiB are held at a time.
    - The interval relies on the central limit theorem and on means that fall at a steady rate: a level whose paths
      rarely differ (a digital payoff) has an uncertain variance. Variances are therefore at least half of what the
      level before lets expect, and the bias at least that of the last three means.
    - Source: Giles 2008 (Oper. Res. 56), Section 5; Giles 2015 (Acta Numerica 24), Section 3.

    Args:
        sde: the problem, with noise.
        solver: one that solves it. Its strong order decides how fast the variances fall, its weak order the bias.
        y0: (*event) the state from which all paths start. Its dtype and device are those of the computation.
        span: (t0, t1).
        payoff: of the final states, (paths, *event) -> (paths,).
        tolerance: half-width of the interval.
        confidence: its level, in (0, 1).
        antithetic: solve the fine path also with the two halves of each coarse step exchanged, and take the mean of the
            payoffs. For general noise and a solver without areas (`Heun`, `DerivativeFreeMilstein`) it replaces them:
            the variances of smooth payoffs fall as with areas. Source: Giles & Szpruch 2014 (Ann. Appl. Probab. 24).
        coarsest, finest: refinements between which levels are chosen. Levels too coarse to make the estimate cheaper,
            as those in whose steps the solver is unstable, are left out.
        seed: fixes all paths.

    Raises:
        InputError: invalid arguments, a solver that cannot solve the problem, a payoff of another shape or that is not
            finite.
        NonFiniteError: a solution is not finite.
    """
    e = _experiment(sde, solver, y0, span, seed, coarsest, finest)
    _validation.check_callable("payoff", payoff, "a function (paths, *event) -> (paths,)")
    tolerance = _validation.check_float("tolerance", tolerance, 0, expected="a positive number")
    if tolerance == 0:
        raise InputError("tolerance: got 0, expected a positive number.")
    z = NormalDist().inv_cdf(0.5 + _check_confidence(confidence) / 2)
    twin = _validation.check_flag("antithetic", antithetic)
    weak = solver.card.weak_order.get(sde.noise_type, 1.0)
    with torch.no_grad():
        sums = _pilot(e, payoff, twin)
        while True:
            bias, rate = _bias(sums, weak)
            sampling = (tolerance - min(bias, BIAS * tolerance)) / z
            _allocate(sums, _variances(sums), sampling)
            bias, rate = _bias(sums, weak)
            enough = sum(level.share(v) for level, v in zip(sums, _variances(sums))) <= 1.02 * sampling**2
            if not enough:
                continue
            if bias <= BIAS * tolerance or sums[-1].level == e.finest:
                break
            sums.append(_Sums(e, sums[-1].level + 1, payoff, twin))
            sums[-1].sample(LEAST)
    return _report(sums, solver, tolerance, confidence, z, (bias, rate), twin, seed)


def _experiment(
    sde: SDE, solver: StochasticSolver, y0: Tensor, span: Sequence[float], seed: int, coarsest: int, finest: int
) -> Experiment:
    """Check the problem and the levels."""
    _validation.check_instance("sde", sde, SDE, "an SDE")
    _validation.check_instance("solver", solver, StochasticSolver, "an object such as EulerMaruyama()")
    check_solves(sde, solver)
    if sde.noise_type == "none":
        raise InputError("sde: got an ODE, whose solution is one number; expected an SDE. Use fewstep.solve.")
    _validation.check_state("y0", y0, "a finite floating-point tensor (*event)")
    ends = _validation.check_sequence("span", span, "two times t0 < t1")
    if len(ends) != 2 or not _validation.check_float("span", ends[0]) < _validation.check_float("span", ends[1]):
        raise InputError(f"span: got {_validation.describe(span)}, expected two times t0 < t1.")
    coarsest = _validation.check_int("coarsest", coarsest, 0, FINEST - 2)
    levels = range(coarsest, _validation.check_int("finest", finest, coarsest + 2, FINEST) + 1)
    return Experiment(
        sde, [solver], y0, (float(ends[0]), float(ends[1])), levels, levels[-1], PILOT, None, None, str(y0.device),
        check_dtype(y0.dtype), _validation.check_seed(seed),
    )  # fmt: skip


def _check_confidence(confidence: float) -> float:
    expected = "a number between 0 and 1 such as 0.95"
    if not 0 < _validation.check_float("confidence", confidence, 0, 1, expected=expected) < 1:
        raise InputError(f"confidence: got {confidence}, expected {expected}.")
    return float(confidence)


class _Sums:
    """The running moments of a level: of the payoff's difference to the coarser level, and of the payoff."""

    def __init__(self, e: Experiment, level: int, payoff: Callable[[Tensor], Tensor], antithetic: bool) -> None:
        self.e: Experiment = e
        self.level: int = level
        self.payoff: Callable[[Tensor], Tensor] = payoff
        self.antithetic: bool = antithetic
        self.evaluations: int = 0  # per path
        self.alone: int = 0  # those of the fine solution
        self._chunks: int = 0
        self._restart(coarse=True)

    def _restart(self, coarse: bool) -> None:
        self.coarse: bool = coarse
        self.paths: int = 0
        self._mean: tuple[float, float] = (0.0, 0.0)
        self._squares: tuple[float, float] = (0.0, 0.0)  # sums of squared distances from the mean

    def as_coarsest(self) -> _Sums:
        """The level without its coarser solutions, from new paths."""
        self._restart(coarse=False)
        self.sample(PILOT)
        return self

    @property
    def mean(self) -> float:
        return self._mean[0]

    def variance(self, of: int = 0) -> float:
        return self._squares[of] / (self.paths - 1)

    def share(self, variance: float) -> float:
        """Its share of the variance of the estimate."""
        return variance / self.paths

    def sample(self, count: int) -> None:
        """Solve that many more paths, chunk by chunk."""
        per_path = 1.5 * 2**self.level * torch.Size(self.e.noise_shape(1)).numel() * (1 + 2 * (self.e.levy != "W"))
        size = max(min(int(BUDGET / per_path / self.e.dtype.itemsize), LARGEST), 1)
        while count > 0:
            self._add(*self._chunk(min(size, count)))
            count -= size

    def _chunk(self, count: int) -> tuple[Tensor, Tensor]:
        """Differences and payoffs (count,) along new paths."""
        e, seed = self.e, wrapped(key_of(key_of(self.e.seed) + self.level) + self._chunks)
        self._chunks += 1
        fresh = FreshIncrements(e.noise_shape(count), e.levy, seed, e.dtype, e.device, area=e.area)
        noise = Stored(list(fresh.increments(grid_of(e.ends, self.level))), e.ends[0])
        self.evaluations = 0
        fine = self._payoffs(noise, self.level, count)
        self.alone = self.evaluations
        if not self.coarse:
            return fine, fine
        value = 0.5 * (fine + self._payoffs(noise.exchanged(), self.level, count)) if self.antithetic else fine
        return value - self._payoffs(noise.coarser(), self.level - 1, count), fine

    def _payoffs(self, noise: Stored, level: int, count: int) -> Tensor:
        e = self.e
        found = solve(e.sde, e.solvers[0], e.start(count), grid_of(e.ends, level), path=noise)
        self.evaluations += found.nfe
        out = self.payoff(found.y)
        if not isinstance(out, Tensor) or out.shape != (count,):
            got = _validation.describe(out)
            raise InputError(f"payoff: got {got} for {count} paths, expected a tensor ({count},), one number per path.")
        if not _validation.all_finite(out):
            raise InputError("payoff: got numbers that are not finite for finite states.")
        return out.double()

    def _add(self, *values: Tensor) -> None:
        """Chan's update of mean and sum of squares."""
        count, means, squares = len(values[0]), [], []
        total = self.paths + count
        for v, mean, square in zip(values, self._mean, self._squares):
            own = float(v.mean())
            means.append(mean + (own - mean) * count / total)
            squares.append(square + float((v - own).square().sum()) + (own - mean) ** 2 * self.paths * count / total)
        self.paths, self._mean, self._squares = total, (means[0], means[1]), (squares[0], squares[1])


def _pilot(e: Experiment, payoff: Callable[[Tensor], Tensor], antithetic: bool) -> list[_Sums]:
    """The first three levels, from the coarsest one that makes the estimate cheaper."""
    first = _Sums(e, e.levels[0], payoff, antithetic).as_coarsest()
    while True:
        second = _Sums(e, first.level + 1, payoff, antithetic)
        second.sample(PILOT)
        both = sum(math.sqrt(level.variance() * level.evaluations) for level in (first, second))
        if both <= math.sqrt(second.variance(1) * second.alone) or second.level + 1 == e.finest:
            break
        first = second.as_coarsest()
    third = _Sums(e, first.level + 2, payoff, antithetic)
    third.sample(PILOT)
    return [first, second, third]


def _rate(values: Sequence[float]) -> float:
    """The slope per level at which positive numbers fall, log2, by least squares; at least the slowest."""
    if len(values) < 2 or min(values) <= 0:
        return SLOWEST
    x = [k - (len(values) - 1) / 2 for k in range(len(values))]
    slope = -sum(a * math.log2(v) for a, v in zip(x, values)) / sum(a * a for a in x)
    return max(slope, SLOWEST)


def _variances(sums: Sequence[_Sums]) -> list[float]:
    """The variances, none below half of what the rate lets expect after the level before."""
    found = [level.variance() for level in sums]
    rate = _rate(found[1:])
    for k in range(2, len(found)):
        found[k] = max(found[k], found[k - 1] / 2 ** (rate + 1))
    return found


def _bias(sums: Sequence[_Sums], weak: float) -> tuple[float, float]:
    """A bound on the bias of the finest level, and the rate at which means fall.

    The rate is fitted to the levels whose mean is two standard errors from zero, and is at most the weak order.
    """
    clear = [abs(v.mean) for v in sums[1:] if v.mean**2 > 4 * v.share(v.variance())]
    rate = min(_rate(clear), weak) if len(clear) > 1 else weak
    last = [abs(v.mean) / 2 ** (k * rate) for k, v in enumerate(reversed(sums[1:])) if k < 3]
    return max(last) / (2**rate - 1), rate


def _allocate(sums: Sequence[_Sums], variances: Sequence[float], sampling: float) -> None:
    """Sample each level up to its share of the paths for this standard error."""
    total = sum(math.sqrt(v * level.evaluations) for v, level in zip(variances, sums))
    for v, level in zip(variances, sums):
        wanted = math.ceil(math.sqrt(v / level.evaluations) * total / sampling**2)
        level.sample(wanted - level.paths)


def _report(
    sums: Sequence[_Sums], solver: StochasticSolver, tolerance: float, confidence: float, z: float,
    biases: tuple[float, float], antithetic: bool, seed: int,
) -> Expectation:  # fmt: skip
    (bias, rate), last = biases, sums[-1]
    value, sampling = sum(v.mean for v in sums), math.sqrt(sum(v.share(v.variance()) for v in sums))
    half = z * sampling + bias
    reached = half <= tolerance
    if bias > BIAS * tolerance:
        warn(
            f"expectation: the bias is still about {bias:.2g} at {2**last.level} steps, more than a quarter of the "
            f"tolerance {tolerance:g}; the interval has it. Raise finest, or use a solver of higher weak order."
        )
    plain = math.ceil(last.variance(1) / sampling**2)
    levels = [Level(v.level, 2**v.level, v.paths, v.mean, v.variance(), v.variance(1), v.evaluations) for v in sums]
    return Expectation(
        value, value - half, value + half, sampling, bias, tolerance, confidence, reached, levels, rate,
        _rate([v.variance() for v in sums[1:]]), sum(v.paths * v.evaluations for v in sums), plain, plain * last.alone,
        repr(solver), antithetic, seed,
    )  # fmt: skip
