"""The contract: a solver is a value with a card; state is returned, never kept.

A `StochasticSolver` advances an SDE by one step; a `DiffusionSolver` turns a grid of noise levels into
a plan. A solver may be both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from inspect import Parameter, signature
from typing import Any, NamedTuple, ParamSpec

from torch import Tensor

from . import _validation
from .brownian import Increment
from .errors import InputError
from .plan import Plan
from .problem import NOISE_TYPES, SDE, SDE_TYPES
from .schedule import Schedule

P = ParamSpec("P")
LEVY = ("", "W", "H", "K", "A")
ORDER = "a finite number of at least 0"


@dataclass(frozen=True, kw_only=True)
class Card:
    """The facts of a solver, written once: loops refuse by them, tests check them, tables are made of them.

    Args:
        summary: what it is, in one line.
        reference: the source with its equation number.
        levy: the least its step can live with: "" (nothing), "W", "H" (W and H), "K" (W, H and K) or
            "A" (W and the space-space area).
        sde_types: the calculi it solves.
        strong_order, weak_order: by noise type; the keys are the noise types it can solve.
        deterministic_order: without noise (for a diffusion solver: of the ODE that is left then), with
            exact starting values.
        evaluations: drift (or network) evaluations per step; extra ones of the first steps are not counted,
            nor that a last step to sigma = 0 may need fewer.
        lower_bound: the orders are lower bounds, as those of learned steps.

    Raises:
        InputError: a word or a number that no loop would understand.
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

    def __post_init__(self) -> None:
        for name in ("summary", "reference"):
            _validation.check_instance(name, getattr(self, name), str, "a line of text")
        _validation.check_choice("levy", self.levy, LEVY)
        _validation.check_instance("sde_types", self.sde_types, (tuple, list), "calculi such as ('ito',)")
        for calculus in self.sde_types:
            _validation.check_choice("sde_types", calculus, SDE_TYPES)
        for name in ("strong_order", "weak_order"):
            orders = getattr(self, name)
            _validation.check_instance(
                name, orders, Mapping, "orders by noise type such as {'diagonal': 0.5}"
            )
            for noise, order in orders.items():
                _validation.check_choice(name, noise, NOISE_TYPES)
                _validation.check_float(f"{name}[{noise!r}]", order, 0, expected=ORDER)
        if self.deterministic_order is not None:
            _validation.check_float("deterministic_order", self.deterministic_order, 0, expected=ORDER)
        _validation.check_int("evaluations", self.evaluations, 1)


class Solver(ABC):
    """Anything with a card. It keeps the arguments of its constructor under their names."""

    card: Card

    def options(self) -> dict[str, Any]:
        """The arguments that are not at their defaults: `type(self)(**options)` is this solver again."""
        named = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
        parameters = [p for p in signature(type(self)).parameters.values() if p.kind in named]
        kept = {p.name: getattr(self, p.name) for p in parameters}
        return {p.name: kept[p.name] for p in parameters if kept[p.name] != p.default}

    def __repr__(self) -> str:
        try:
            said = ", ".join(f"{k}={v!r}" for k, v in self.options().items())
        except AttributeError:  # a stranger's, which keeps its arguments under other names
            said = "..."
        return f"{type(self).__name__}({said})"


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
    """One step of dy = f dt + g dW at a time."""

    def init(self, sde: SDE, t0: Tensor, y0: Tensor) -> Any:
        """What the first step needs from before it (carry); nothing by default."""
        return None

    @abstractmethod
    def step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: Any) -> Step:
        """From y at t0 to y at t1 (0-d tensors) along the increment of [t0, t1]."""


class DiffusionSolver(Solver):
    """A function from decreasing noise levels (n,) to a table of coefficients.

    Where the estimate of x0 never changes a plan is exact: x - x0 shrinks with sigma, but for its own noise.

    Attributes:
        repeats_levels: whether its grids may contain the last level twice, as those of diffusers do.
    """

    repeats_levels: bool = False

    @abstractmethod
    def plan(self, sigmas: Tensor, schedule: Schedule | None = None) -> Plan:
        """The solver on this grid.

        Args:
            sigmas: (n,) float64, strictly decreasing, the last may be 0.
            schedule: the forward process; needed only by solvers whose coefficients depend on the model's
                own time.

        Raises:
            InputError: no schedule for a solver that needs one.
        """


def needs_schedule(solver: str, why: str, cure: str) -> InputError:
    """The error of a solver that needs a schedule and was given none."""
    return InputError(
        f"schedule: got None; expected the schedule, because {solver} {why}. Call plan(sigmas, schedule), "
        f"or sample(), which passes it; {cure}."
    )


def moved(**cures: str) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Decorate a constructor so that options of version 0.1 raise an error that names their successor."""

    def decorate(init: Callable[P, None]) -> Callable[P, None]:
        @wraps(init)
        def checked(*args: P.args, **options: P.kwargs) -> None:
            for name, cure in cures.items():
                if name in options:
                    raise InputError(
                        f"{name}: got {options[name]!r}, but this option has moved to fewstep.compat. "
                        f"Use {cure}."
                    )
            init(*args, **options)

        return checked

    return decorate
