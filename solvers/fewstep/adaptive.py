"""Steps whose size follows their error, events, and the solution between the times of a grid.

One loop for all solvers: it knows errors and times, the solvers know their formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import _validation
from .brownian import Increment
from .errors import InputError, StepSizeError
from .events import Event, Stopped
from .problem import SDE
from .solver import Step, StochasticSolver

PART = 16  # the end of a step moves by at most 1/16 of the step, to a time that costs the path few cuts
SHORTER = 0.8  # of a rejected step at most: by more than its end may move
FULL = 0.999  # of the way to a stop: a step this long goes all the way


@dataclass(frozen=True)
class Adaptive:
    r"""Step sizes from an estimate of the local error: `solve(..., steps=Adaptive(rtol, atol))`.

    A step is accepted if the root mean square of `error / (atol + rtol * max(|y0|, |y1|))`, over all numbers of the
    batch, is at most 1. The estimate is the solver's own (its class states the order, `error_order`) or, for all
    others, the difference of one step and two of half its size, of which the two are kept; that costs three steps. The
    next size is

    .. math:: h \cdot s\, e_n^{-(p + i + d)/k}\, e_{n-1}^{(p + 2d)/k}\, e_{n-2}^{-d/k},

    clipped to `[smallest, largest] h`, with the errors e of accepted steps, the safety s and the estimate's order k.

    A Brownian path is asked again after a rejected step, never drawn anew, and no later step passes over the end of a
    rejected one: what a rejection has seen of the path is used. Otherwise the sizes would prefer some paths, and the
    limit of small tolerances would be wrong (arXiv 2311.14201).

    Args:
        rtol, atol: the relative and the absolute tolerance, not both 0.
        first: size of the first step; by default from drift and diffusion at the start.
        min_step, max_step: limits of the size, in units of time; below min_step the solve ends with an error.
        max_steps: of steps, accepted or rejected.
        force: accept steps of min_step whatever their error, as torchsde does with dt_min.
        pcoeff, icoeff, dcoeff: p, i and d. (0, 1, 0) is the elementary rule; the default is Gustafsson's PI rule.
        safety: s.
        smallest, largest: limits of the factor from one step to the next.

    Raises:
        InputError: a value out of range.

    Source: Hairer, Nørsett & Wanner 1993, section II.4; Söderlind 2003 (ACM TOMS 29) for the exponents; Foster &
    Jelinčić (arXiv 2311.14201) for the rejected times.
    """

    rtol: float = 1e-3
    atol: float = 1e-6
    _: KW_ONLY
    first: float | None = None
    min_step: float = 0.0
    max_step: float = math.inf
    max_steps: int = 100_000
    force: bool = False
    pcoeff: float = 0.4
    icoeff: float = 0.3
    dcoeff: float = 0.0
    safety: float = 0.9
    smallest: float = 0.2
    largest: float = 5.0

    def __post_init__(self) -> None:
        number = "a finite number of at least 0"
        for name in ("rtol", "atol", "min_step", "pcoeff", "icoeff", "dcoeff"):
            _validation.check_float(name, getattr(self, name), 0, expected=number)
        for name in ("rtol", "atol", "min_step", "max_step", "pcoeff", "icoeff", "safety", "smallest", "largest"):
            _validation.check_instance(name, getattr(self, name), (int, float), "a number")
        _validation.check_flag("force", self.force)
        if not self.rtol + self.atol > 0:
            raise InputError("rtol, atol: got 0 for both, expected a tolerance. Set atol to the error that you accept.")
        if not self.pcoeff + self.icoeff > 0:
            raise InputError("pcoeff, icoeff: got 0 for both, expected a controller such as the default 0.4 and 0.3.")
        if self.first is not None and not _validation.check_float("first", self.first) > 0:
            raise InputError(f"first: got {self.first!r}, expected a positive step size or None.")
        if not self.max_step > self.min_step:
            raise InputError(f"max_step: got {self.max_step!r}, expected more than min_step = {self.min_step!r}.")
        if self.force and not self.min_step > 0:
            raise InputError("force: got True with min_step=0, expected the step size to accept. Set min_step.")
        _validation.check_int("max_steps", self.max_steps, 1)
        for name, low, high in (("safety", 0.0, 1.0), ("smallest", 0.0, 1.0), ("largest", 1.0, math.inf)):
            value = _validation.check_float(name, getattr(self, name))
            if not low < value <= high:
                raise InputError(f"{name}: got {value!r}, expected a number in ({low:g}, {high:g}].")


class Noise(Protocol):
    """The increments of a solve over any interval inside its grid."""

    def over(self, ta: float, tb: float) -> Increment:
        """The increment over [ta, tb]; the same in every call."""

    def near(self, t: float, width: float) -> float:
        """A time within `width` of t that costs little."""


class OfPath(NamedTuple):
    """The noise of a path that can be asked over any interval."""

    path: Any

    def over(self, ta: float, tb: float) -> Increment:
        increment: Increment = self.path.increment(ta, tb)
        return increment

    def near(self, t: float, width: float) -> float:
        own = getattr(self.path, "near", None)
        return t if own is None else own(t, width)


class InOrder(NamedTuple):
    """The increments over the intervals of a grid, each asked once."""

    increments: Iterator[Increment]

    def over(self, ta: float, tb: float) -> Increment:
        return next(self.increments)

    def near(self, t: float, width: float) -> float:
        return t


class Knot(NamedTuple):
    """A time of the solution, its state, and what the next step from it carries."""

    t: float
    y: Tensor
    carry: Any


class Problem(NamedTuple):
    """All that a step needs but its place."""

    sde: SDE
    solver: StochasticSolver
    noise: Noise
    place: Callable[[float], Tensor]  # a time as a tensor

    def step(self, start: Knot, end: float) -> Step:
        """The step from a knot to a time."""
        solver, (t, y, carry) = self.solver, start
        return solver.step(self.sde, self.place(t), self.place(end), y, self.noise.over(t, end), carry)

    def step_with_error(self, start: Knot, end: float) -> Step:
        """The step with an estimate of its error: the solver's own, or from two steps of half the size."""
        solver, (t, y, carry), place = self.solver, start, self.place
        if solver.error_order:
            return solver.step_with_error(self.sde, place(t), place(end), y, self.noise.over(t, end), carry)
        middle = halfway(t, end)
        first, second = self.noise.over(t, middle), self.noise.over(middle, end)
        half = solver.step(self.sde, place(t), place(middle), y, first, carry)
        last = solver.step(self.sde, place(middle), place(end), half.y, second, half.carry)
        full = solver.step(self.sde, place(t), place(end), y, first.join(second), carry).y
        gain = max(1.0, 2 ** (self.order - 1) - 1) if self.sde.noise_type == "none" else 1.0
        return Step(last.y, last.carry, (last.y - full) / gain)

    @property
    def order(self) -> float:
        """The order in h of the estimate."""
        card = self.solver.card
        if self.solver.error_order:
            return self.solver.error_order
        if self.sde.noise_type == "none":
            return 1 + (card.deterministic_order or 1.0)
        return 0.5 + card.order_for(self.sde.noise_type)


def halfway(t: float, end: float) -> float:
    """The middle of a step of which two halves are taken."""
    return t + (end - t) / 2


class Run:
    """A solve whose steps are chosen, watched or kept.

    Attributes:
        control: chooses the steps between the times of the grid; None takes those times.
        event: as in `solve`.
        times: of all accepted steps, with the start.
        rejected: number of rejected steps.
        knots: the states at the times, if they are kept.
        stopped: the samples whose event has happened.
    """

    def __init__(self, control: Adaptive | None, event: Event | None, dense: bool) -> None:
        self.control: Adaptive | None = control
        self.event: Event | None = event
        self.times: list[float] = []
        self.rejected: int = 0
        self.knots: list[Knot] | None = [] if dense else None
        self.stopped: Stopped | None = None
        self.problem: Problem | None = None

    def steps(self, problem: Problem, stops: Sequence[float], y: Tensor, carry: Any = None) -> Iterator[Step]:
        """Yield the step that ends at each of the stops after the first; it ends early where all samples have."""
        first = problem.place(stops[0])
        knot = Knot(stops[0], y, problem.solver.init(problem.sde, first, y) if carry is None else carry)
        self.problem = problem
        self._add(knot)
        sizes = None if self.control is None else _Sizes(self.control, problem, knot, stops, self)
        if self.event is not None:
            self.stopped = Stopped(self.event, first, y, problem.sde.noise_type == "none")
        for stop in stops[1:]:
            while knot.t != stop:
                if sizes is None:
                    end, step = stop, problem.step(knot, stop)
                else:
                    end = sizes.aim(knot, stop)
                    step = problem.step_with_error(knot, end)
                    if not sizes.accept(step, knot, end, self.stopped):
                        continue
                if self.stopped is not None:
                    step = self.stopped.update(step, knot, end, problem)
                knot = Knot(end, step.y, step.carry)
                self._add(knot)
                if self.stopped is not None and self.stopped.all:
                    yield step
                    return
            yield step

    def _add(self, knot: Knot) -> None:
        self.times.append(knot.t)
        if self.knots is not None:
            self.knots.append(knot)


class _Sizes:
    """The size of the next step, from the errors of those before."""

    def __init__(self, control: Adaptive, problem: Problem, start: Knot, stops: Sequence[float], run: Run) -> None:
        self.control: Adaptive = control
        self.problem: Problem = problem
        self.run: Run = run
        self.order: float = problem.order
        self.sign: float = math.copysign(1.0, stops[-1] - stops[0])
        self.seen: list[float] = []  # times that rejected steps asked the path for, the nearest last
        self.before: tuple[float, float] = (1.0, 1.0)
        self.shrunk: bool = False
        first = control.first or self._first(start, abs(stops[-1] - stops[0]))
        self.h: float = min(max(first, control.min_step), control.max_step)

    def _first(self, start: Knot, span: float) -> float:
        """A size for which drift and noise change y by a hundredth of the tolerance to the order of the estimate."""
        t, y = self.problem.place(start.t), start.y
        with torch.no_grad():
            weight = self.control.atol + self.control.rtol * y.abs()
            g = self.problem.sde.diffusion(t, y)
            noise = g.square().sum(-1).sqrt() if g.dim() > y.dim() else g.abs()
            change = self.problem.sde.drift(t, y).abs().maximum(noise.expand_as(y))
            size = float((change / weight.clamp(min=1e-30)).square().mean().sqrt())
        return min(span, (0.01 / size) ** (1 / self.order)) if 0 < size < math.inf else span / 100

    def aim(self, knot: Knot, stop: float) -> float:
        """The end of the next step: at most at the nearest time that it must not pass."""
        target = self.seen[-1] if self.seen else stop
        left, h = abs(target - knot.t), min(self.h, self.control.max_step)
        if h >= FULL * left:
            return target
        if h > left / 2:  # two equal steps rather than a long one and a short one
            h = left / 2
        end = self.problem.noise.near(knot.t + self.sign * h, h / PART)
        if end == knot.t:
            raise self._stuck(knot, f"a step of {h:.3g} is below the resolution of time there")
        return end

    def accept(self, step: Step, knot: Knot, end: float, stopped: Stopped | None) -> bool:
        """Whether a step is accepted; sets the size of the next one."""
        control, run, used = self.control, self.run, abs(end - knot.t)
        ratio = self._ratio(step, knot.y, stopped)
        forced = control.force and used <= control.min_step * 1.001
        if ratio <= 1 or (forced and math.isfinite(ratio)):
            error = max(ratio, 1e-10)
            one, two = self.before
            p, i, d = control.pcoeff, control.icoeff, control.dcoeff
            powers = (error, -(p + i + d)), (one, p + 2 * d), (two, -d)
            factor = control.safety * math.prod(e ** (c / self.order) for e, c in powers)
            factor = min(max(factor, control.smallest), 1.0 if self.shrunk else control.largest)
            # a step that was cut short by a stop states little about the size that is possible
            self.h = max(used * factor, self.h if used < FULL * self.h and factor >= 1 else 0.0, control.min_step)
            self.before, self.shrunk = (error, one), False
            self.seen = [t for t in self.seen if (t - end) * self.sign > 0]
        else:
            run.rejected += 1
            factor = control.safety * ratio ** (-1 / self.order) if math.isfinite(ratio) else 0.0
            self.h, self.shrunk = used * min(max(factor, control.smallest), SHORTER), True
            if self.problem.sde.noise_type != "none":
                asked = [end, *([] if self.problem.solver.error_order else [halfway(knot.t, end)])]
                self.seen += asked[1:] if self.seen and self.seen[-1] == end else asked
            if self.h < control.min_step:
                if not control.force:
                    raise self._stuck(knot, f"min_step={control.min_step:g} is too long for the tolerance")
                self.h = control.min_step
        if len(run.times) + run.rejected > control.max_steps:
            raise self._stuck(knot, f"max_steps={control.max_steps} were taken")
        return not self.shrunk

    def _ratio(self, step: Step, y0: Tensor, stopped: Stopped | None) -> float:
        """The error in units of the tolerance, read from its device; nan where it is not finite."""
        assert step.error is not None
        with torch.no_grad():
            weight = self.control.atol + self.control.rtol * torch.maximum(y0.abs(), step.y.abs())
            squares = (step.error / weight.clamp(min=torch.finfo(weight.dtype).tiny)).square()
            if stopped is None:
                return float(squares.mean().sqrt())
            running = (~stopped.mask).reshape(stopped.mask.shape + (1,) * (y0.dim() - stopped.mask.dim()))
            return float(((squares * running).sum() / running.expand_as(squares).sum().clamp(min=1)).sqrt())

    def _stuck(self, knot: Knot, why: str) -> StepSizeError:
        name, control = type(self.problem.solver).__name__, self.control
        message = (
            f"{name}: {why}, at t = {knot.t:.6g}, after {len(self.run.times) - 1} accepted and {self.run.rejected} "
            f"rejected steps. The error of a step of {self.h:.3g} exceeds rtol={control.rtol:g}, "
            f"atol={control.atol:g}: raise them, or check drift and diffusion there, or take implicit steps."
        )
        return StepSizeError(message, t=knot.t, y=knot.y)
