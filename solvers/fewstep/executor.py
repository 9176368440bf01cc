"""The executor of plans: what a row does to a state, as pure functions, and the loop over the rows."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .plan import Combination, Plan, Row, Weight
from .problem import added, plus

Normals = tuple[Tensor, ...]
"""The unit normals of one noise interval, one tensor per letter of W, H, K."""
Draw = Callable[[float, float], Normals]
"""`(tau0, tau1) -> unit normals` of an interval."""
Evaluate = Callable[[int, Tensor, tuple[Normals, ...]], Tensor]
"""`(row, input, normals) -> evaluation` of the kind `plan.prediction`: D, or (input - D)/sigma."""


class State(NamedTuple):
    """The state of a run between two rows of a plan."""

    x: Tensor  # (*batch, *event), x0 + sigma n
    evaluations: tuple[Tensor, ...] = ()  # newest first, as many as later rows need
    normals: tuple[Normals, ...] = ()  # of the opened noise intervals, newest first


class Pair(NamedTuple):
    """A guided and the unconditional evaluation of a row, of which CFG++ (arXiv 2406.08070) makes a step.

    `history`, of data predictions: "guided" keeps the guided evaluation for later rows, "unconditional" the other one;
    "both" also uses the unconditional one in a row with history. The last two are ComfyUI's.
    """

    guided: Tensor
    unconditional: Tensor
    history: str = "guided"


Steered = Callable[[int, Tensor, tuple[Normals, ...]], Tensor | Pair]
"""`Evaluate` of CFG++: a pair where there is guidance."""


def begin(row: Row, state: State, draw: Draw) -> State:
    """The state with the normals of the interval that the row opens, if it opens one."""
    if row.interval is None:
        return state
    normals = (draw(*row.interval), *state.normals[: row.normals_kept - 1])
    return State(state.x, state.evaluations, normals)


def stage(row: Row, state: State) -> Tensor:
    """The input of the row's evaluation."""
    return combine(row.stage, state)


def update(row: Row, state: State, evaluation: Tensor) -> State:
    """The state after the row, given the evaluation at its stage."""
    x, past, normals = state
    past = (evaluation, *past[: row.evaluations_kept - 1])
    x = combine(row.update, State(x, past, normals))
    return State(x.clone() if x is evaluation else x, past, normals)


def steered(row: Row, state: State, pair: Pair, prediction: str) -> State:
    """`update` of CFG++: where a step begins, the row of a state that is moved by D_guided - D_unconditional.

    The step of DDIM then goes from x to D_guided + sigma' (x - D_unconditional)/sigma.
    """
    if row.stage.evaluations:  # a later evaluation of the step
        return update(row, state, pair.guided)
    guided, other, history = pair
    scale = row.stage.scale
    if prediction == "noise":  # with the moved state the noise is that of the unconditional estimate
        state, newest, kept = state._replace(x=state.x + (other - guided) * (row.sigma / scale)), other, other
    else:
        state = state._replace(x=state.x + (guided - other) / scale)
        newest = other if history == "both" and len(row.update.evaluations) > 1 else guided
        kept = guided if history == "guided" else other
    state = update(row, state, newest)
    return state._replace(evaluations=(kept, *state.evaluations[1:]))


def follow(row: Row, state: State, before: Tensor, after: Tensor) -> State:
    """Return the state whose stage is `after` instead of `before`, for a network input that a caller has edited."""
    scale, evaluations, normals = row.stage
    if isinstance(scale, float) and scale == 0:
        return state
    if evaluations or normals:
        return state._replace(x=state.x + (after - before) / scale)
    return state._replace(x=entered(row, after).x)


def entered(row: Row, at: Tensor) -> State:
    """The first state of a run, from the input `at` of its network; the stage's normals are left out."""
    scale = row.stage.scale
    return State(at if isinstance(scale, float) and scale == 1 else at / scale)


def redirected(row: Row, state: State, x0: Tensor, clipped: Tensor) -> tuple[State, Tensor]:
    """The state and the evaluation with which `update` steps from the clipped x0 along the noise of the raw one.

    For rows of DDIM: data prediction, and no evaluation but the row's own.
    """
    scale, past = row.stage.scale, row.update.evaluations
    assert isinstance(scale, float)
    if not past:  # a last step to the level where it is: only the clipping moves the state
        return state._replace(x=torch.add(state.x, clipped - x0, alpha=1 / scale)), clipped
    weight = past[0][0]
    # with keep the weight of x - D, the step a x + b D is w (D + keep (x - D)), w = a + b; the first D is clipped
    return state, torch.lerp(x0, clipped, (row.update.scale / scale + weight) / weight)


def data_of(prediction: str, at: Tensor, sigma: float, evaluation: Tensor) -> Tensor:
    """D from an evaluation of the kind `prediction` at this input and level."""
    return evaluation if prediction == "data" else torch.sub(at, evaluation, alpha=sigma)


def evaluation_of(prediction: str, at: Tensor, sigma: Weight, D: Tensor) -> Tensor:
    """The inverse of `data_of`: D, or (at - D)/sigma."""
    return D if prediction == "data" else (at - D).div_(sigma)


def keeps(plan: Plan) -> bool:
    """Whether a run needs an evaluation after the next one is made."""
    return plan.rows[0].evaluations_kept > 1


def run(
    plan: Plan, x: Tensor, evaluate: Evaluate | Steered, draw: Draw,
    callback: Callable[[int, Tensor, Tensor], object] | None = None,
) -> Tensor:  # fmt: skip
    """The final state of a plan from x at its first level; `callback(row, x, D)` is called after each row."""
    state = State(x)
    for i, row in enumerate(plan.rows):
        state = begin(row, state, draw)
        at = stage(row, state)
        evaluation = evaluate(i, at, state.normals)
        if isinstance(evaluation, Pair):
            state, evaluation = steered(row, state, evaluation, plan.prediction), evaluation.guided
        else:
            state = update(row, state, evaluation)
        if callback is not None:
            callback(i, state.x, data_of(plan.prediction, at, row.sigma, evaluation))
    return state.x


def combine(terms: Combination, state: State) -> Tensor:
    """The linear combination, in fresh memory unless it is one of its terms with weight 1."""
    scale, evaluations, normals = terms
    parts = [(w, state.evaluations[j]) for w, j in evaluations]
    if normals:
        parts += [(w, state.normals[j][k]) for w, j, k in normals]
    # the state may be as large as sigma_max: with weight 0 it must not leave rounding
    if not (isinstance(scale, float) and scale == 0 and parts):
        parts.insert(0, (scale, state.x))
    return weighted(parts)


def weighted(parts: list[tuple[Weight, Tensor]]) -> Tensor:
    """The sum of weight * term, in fresh memory unless it is one term with weight 1."""
    (weight, out), *rest = parts
    if isinstance(weight, float) and weight == 1:
        if not rest:
            return out
        (weight, second), *rest = rest
        out = plus(out, weight, second)
    else:
        out = out * weight
    for weight, term in rest:
        # in place where nothing needs the sum so far
        out = added(out, term, weight) if isinstance(weight, float) else plus(out, weight, term)
    return out
