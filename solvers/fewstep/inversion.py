"""`invert`: from data to the noise from which a deterministic solver samples it."""

from __future__ import annotations

from torch import Tensor

from . import _validation
from .errors import InputError, named
from .grid import Spacing, sigma_grid
from .problem import DiffusionModel
from .resolve import is_stochastic
from .sample import sample
from .solver import DiffusionSolver


@named
def invert(
    problem: DiffusionModel, solver: DiffusionSolver, x0: Tensor, *, steps: int = 50, spacing: Spacing = "logsnr",
    corrections: int = 0,
) -> Tensor:  # fmt: skip
    r"""Return the state at the schedule's largest level from which the solver samples x0.

    The solver runs on increasing levels, from `sigma_min` to `sigma_max`. This map U from data to noise is not the
    inverse of its map S from noise to data: each has the solver's error of order p, so S(U(x0)) differs from x0 by
    O(h^p). Each correction

    .. math:: x_T \leftarrow x_T + U(x_0) - U(S(x_T))

    costs 2 `steps` steps and divides what is left by about that error again, to rounding where S and U are near each
    other. It works for every deterministic solver, multistep ones included, needs no second state as BDIA and EDICT
    do, and the samplers of all integrations reproduce x0 from the result.

    Args:
        problem: the model.
        solver: a deterministic solver, such as `UniPC(2)`.
        x0: (n, *event) the data, taken as the state at `sigma_min`.
        steps, spacing: of the grid, as in `fewstep.sigma_grid` with `final="sigma_min"`.
        corrections: their number; 0 costs `steps` steps.

    Returns:
        (n, *event) alpha x0 + sigma_t n at the largest level, for
        `sample(problem, solver, noise=..., steps=steps, spacing=spacing, final="sigma_min")`.

    Raises:
        InputError: a solver that draws noise, a plan or a student, whose grids are their own.
        NonFiniteError: corrections that diverge: take more steps.
    """
    expected = "a deterministic solver such as fewstep.UniPC(2)"
    _validation.check_instance("problem", problem, DiffusionModel, "a fewstep.DiffusionModel")
    _validation.check_instance("solver", solver, DiffusionSolver, expected)
    corrections = _validation.check_int("corrections", corrections, 0)
    if is_stochastic(solver):
        raise InputError(f"solver: got {solver!r}, which draws noise; expected {expected}.")
    _validation.check_state("x0", x0)
    down = sigma_grid(problem.schedule, steps, spacing, "sigma_min")

    def up(x: Tensor) -> Tensor:
        return sample(problem, solver, noise=x, sigmas=down.flip(0))

    first = end = up(x0)
    for _ in range(corrections):
        end = end + first - up(sample(problem, solver, noise=end, sigmas=down))
    return end
