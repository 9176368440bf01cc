"""The contract: a solver is an immutable object with a card; it returns its state instead of keeping it.

A `StochasticSolver` advances an SDE by one step; a `DiffusionSolver` turns noise levels into a plan; some are both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, wraps
from inspect import Parameter, signature
from types import NoneType
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec

from torch import Tensor

from . import _validation
from .brownian import Increment
from .errors import InputError
from .plan import Plan
from .problem import NOISE_TYPES, SDE, SDE_TYPES
from .schedule import Schedule, check_schedule

P = ParamSpec("P")


@dataclass(frozen=True, kw_only=True)
class Card:
    """The facts of a configured solver: loops rely on them, `check_solver` measures them, tables show them.

    Args:
        summary: what it is, in one line.
        reference: the source with its equation number.
        levy: the least that a step needs of the path: "" (nothing), "W", "H" (W, H), "K" (W, H, K) or "A" (W and the
            space-space area).
        sde_types: the calculi it solves; both for a solver of ODEs, none for one of diffusion models alone.
        strong_order, weak_order: by noise type; the keys are the noise types it solves.
        deterministic_order: the order without noise (of a sampler: of the ODE that is then left), with exact starting
            values; None where it is not known.
        evaluations: drift (or network) evaluations per step, those of the first and the last step not considered.
        lower_bound: whether the orders are lower bounds, as those of learned steps are.
        consistency: whether its evaluations must be those of a network that was distilled to return the end of the
            probability-flow ODE. With the posterior mean of a diffusion model its samples have too little variance.

    Raises:
        InputError: an unknown word, or an invalid number.
    """

    summary: str
    reference: str
    levy: str = ""
    sde_types: tuple[str, ...] = ()
    strong_order: Mapping[str, float] = field(default_factory=dict)
    weak_order: Mapping[str, float] = field(default_factory=dict)
    deterministic_order: float | None = None
    evaluations: int = 1
    lower_bound: bool = False
    consistency: bool = False

    def __post_init__(self) -> None:
        for name in ("summary", "reference"):
            _validation.check_instance(name, getattr(self, name), str, "a line of text")
        _validation.check_choice("levy", self.levy, ("", "W", "H", "K", "A"))
        _validation.check_instance("sde_types", self.sde_types, (tuple, list), "calculi such as ('ito',)")
        for calculus in self.sde_types:
            _validation.check_choice("sde_types", calculus, SDE_TYPES)
        expected = "a finite number of at least 0"
        for name in ("strong_order", "weak_order"):
            orders = getattr(self, name)
            _validation.check_instance(name, orders, Mapping, "orders such as {'diagonal': 0.5}")
            for noise, order in orders.items():
                _validation.check_choice(name, noise, NOISE_TYPES)
                _validation.check_float(f"{name}[{noise!r}]", order, 0, expected=expected)
        if self.deterministic_order is not None:
            _validation.check_float("deterministic_order", self.deterministic_order, 0, expected=expected)
        _validation.check_int("evaluations", self.evaluations, 1)
        for name in ("lower_bound", "consistency"):
            _validation.check_instance(name, getattr(self, name), bool, "True or False")

    @property
    def noise_types(self) -> tuple[str, ...]:
        """The noise types that a solver of `solve` solves; "none" (ODEs) if it has a deterministic order."""
        ode = self.sde_types and self.deterministic_order is not None
        langevin = "additive" in self.strong_order and "underdamped" not in self.strong_order
        return (*self.strong_order, *(["underdamped"] if langevin else []), *(["none"] if ode else []))

    def order_for(self, noise_type: str) -> float:
        """The strong order for one of `noise_types`; for underdamped noise at least that for additive noise."""
        return self.strong_order.get(noise_type) or self.strong_order["additive"]


class Solver(ABC):  # noqa: B024 - a card is required, but may be an attribute
    """Base class of solvers: has a card and stores its constructor's arguments as attributes of the same name.

    `card` is a class attribute where it holds for every configuration; otherwise the constructor sets it.
    """

    if TYPE_CHECKING:

        @property
        def card(self) -> Card: ...

    def options(self) -> dict[str, Any]:
        """The arguments that are not at their defaults: `type(self)(**options)` is this solver again."""
        return {name: value for name, default in _arguments(type(self)) if (value := getattr(self, name)) != default}

    def __repr__(self) -> str:
        try:
            options = ", ".join(f"{k}={v!r}" for k, v in self.options().items())
        except AttributeError:  # a third-party solver that keeps its arguments under other names
            options = "..."
        return f"{type(self).__name__}({options})"


@lru_cache(maxsize=256)
def _arguments(kind: type[Solver]) -> tuple[tuple[str, Any], ...]:
    """The names and defaults of a constructor's arguments."""
    named = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    return tuple((p.name, p.default) for p in signature(kind).parameters.values() if p.kind in named)


class Step(NamedTuple):
    """What one step of an SDE solver returns.

    Attributes:
        y: (*batch, *event) the state at the end of the step.
        carry: what the next step needs from this one, None for most solvers.
        error: (*batch, *event) an estimate of the local error, where the solver has one.
    """

    y: Tensor
    carry: Any = None
    error: Tensor | None = None


class StochasticSolver(Solver):
    """A method that advances dy = f dt + g dW by one step."""

    error_order: float = 0.0
    """The order in h of the estimate of `step_with_error`; 0 where the solver has none."""

    def init(self, sde: SDE, t0: Tensor, y0: Tensor) -> Any:
        """The carry of the first step; None by default."""
        return None

    @abstractmethod
    def step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: Any) -> Step:
        """The step from y at t0 to t1 (0-d tensors) along the increment of [t0, t1]."""

    def step_with_error(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: Any) -> Step:
        """The same step with its `error`; only where `error_order` is not 0."""
        raise NotImplementedError(f"{type(self).__name__} has no estimate of its error.")


class ReversibleSolver(StochasticSolver):
    """A method whose steps can be undone exactly, but for rounding. Its carry is a tuple of tensors."""

    @abstractmethod
    def undo(
        self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: Any
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The state and the carry before the step from t0 to t1, from those after it."""


class DiffusionSolver(Solver):
    """A function from decreasing noise levels (n,) to a table of coefficients.

    Every plan is exact for a constant estimate of x0: without its noise, x - x0 is then proportional to sigma.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "plan" in vars(cls):
            cls.plan = _with_schedule(cls.plan)  # type: ignore[method-assign]

    repeats_levels: bool = False
    """Whether its grids may contain the last level twice, as those of diffusers do."""
    warns: bool = False
    """Whether its plans may warn of their grid: each is then made anew."""

    @abstractmethod
    def plan(self, sigmas: Tensor, schedule: Schedule | None = None) -> Plan:
        """The table of coefficients on a grid.

        Args:
            sigmas: (n,) float64, strictly decreasing, the last may be 0.
            schedule: the forward process, for solvers whose coefficients depend on the model's own time.

        Raises:
            InputError: no schedule for a solver that needs one.
        """


def _with_schedule(plan: Callable[P, Plan]) -> Callable[P, Plan]:
    """A method `plan` that checks its schedule first."""

    @wraps(plan)
    def checked(*args: P.args, **options: P.kwargs) -> Plan:
        check_schedule(options.get("schedule", args[2] if len(args) > 2 else None), optional=True)
        return plan(*args, **options)

    return checked


def needs_schedule(solver: str, why: str, cure: str) -> InputError:
    """The error of a solver that needs a schedule and got none."""
    return InputError(
        f"schedule: got None; expected the schedule, because {solver} {why}. Call plan(sigmas, schedule), "
        f"or sample(), which passes it; {cure}."
    )


def plain_options(solver: Solver) -> tuple[tuple[str, Any], ...] | None:
    """The options that make a solver of this library again, where they are numbers and words; else None."""
    if type(solver).__module__.partition(".")[0] != __package__:
        return None
    options = tuple(solver.options().items())
    return options if all(isinstance(v, (int, float, str, NoneType)) for _, v in options) else None
