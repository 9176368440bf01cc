"""A plan as constants of a program that torch.compile traces: the real plan is made, and read, outside of the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._tracing import decode, encode, while_tracing
from .errors import InputError
from .plan import PREDICTIONS, WEIGHTS, Combination, Plan, Row

TAKES_OBJECTS = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 13)

_plans: list[Plan] = []  # of compiled programs, which have no owner to free them
_numbers: dict[str, int] = {}  # by content: a program that is compiled again adds no plan


class TracedPlan(NamedTuple):
    """What `sample` needs of a plan; `number` finds the plan itself."""

    number: int
    prediction: str
    sigma: Tensor  # (R,) float64
    ends: tuple[float, float]
    rows: tuple[Row, ...]
    draws: int  # rows that open a noise interval
    letters: int
    fit: None = None  # a fingerprint is compared by reading numbers, hence not in a trace


def traced_plan(make: Callable[..., Plan], *args: Any) -> Any:
    """The constants of the plan `make(*args)`, a `TracedPlan`: it takes the place of the plan in `sample`."""
    if not TAKES_OBJECTS:
        _refuse()
    number, (kind, sigma, ends, rows, letters) = decode(_text_of(make, *args))
    made = tuple(
        Row(level, interval, Combination(*stage), Combination(*update), *kept)
        for level, interval, stage, update, *kept in rows
    )
    draws = sum(row.interval is not None for row in made)
    return TracedPlan(number, PREDICTIONS[kind], torch.tensor(sigma, dtype=torch.float64), ends, made, draws, letters)


def same(plan: Plan) -> Plan:
    """For `traced_plan`, of a plan that is there."""
    return plan


def plan_numbered(number: int) -> Plan:
    """The plan with this number."""
    return _plans[number]


@while_tracing  # torch.compile passes on the message of an error that such a function raises
def _refuse() -> str:
    raise InputError(
        f"torch: got {torch.__version__}, expected 2.13 or newer for torch.compile of sample: older ones cannot call a "
        "function on a solver while they trace. Upgrade torch, or compile the network alone; solve compiles with any."
    )


@while_tracing
def _text_of(make: Callable[..., Plan], *args: Any) -> str:
    try:
        plan = make(*args)
    except AttributeError as error:  # torch.compile has not run the constructor
        raise InputError(
            f"solver, schedule: got one made inside the compiled function, expected one made before ({error})."
        ) from error
    learned = [k for k in WEIGHTS if getattr(plan, k).requires_grad]
    if learned:
        raise InputError(
            f"plan.{learned[0]}: got weights that require grad while torch.compile traces, expected plain numbers: a "
            "compiled program keeps the weights as constants. Train the plan without torch.compile."
        )
    content = encode((PREDICTIONS.index(plan.prediction), plan.sigma.tolist(), plan.ends, plan.rows, plan.letters))
    if content not in _numbers:
        _numbers[content] = len(_plans)
        _plans.append(plan)
    return f"( i{_numbers[content]} {content} )"
