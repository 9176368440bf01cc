"""Strong and weak orders of convergence, measured: slopes with intervals, local slopes, and a verdict.

`fewstep_analysis.order_regression` describes how an interval is computed, what it covers and its limits;
`fewstep_analysis.monte_carlo` how paths are distributed over blocks and processes.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep import SDE, InputError, StochasticSolver, _validation
from fewstep.brownian.increment import check_dtype
from fewstep.solve import check_solves

from .monte_carlo import TORCHSDE_METHODS, Experiment, sweep
from .order_regression import Logs, fit, strong_logs, verdict, weak_logs
from .problems import TestProblem
from .records import Record, provenance

REFERENCES = ("torchsde", "exact", "levels")
FINER = 3  # a reference of higher order is 2^3 times finer than the finest refinement
FINER_SAME = 5  # one of the same order needs more
FINEST = 24  # at most 2^24 steps
LEVELS, PATHS = range(4, 10), 4096

TESTS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda y: y.flatten(1).sum(1),
    "square": lambda y: y.flatten(1).square().sum(1),
    "fourth": lambda y: y.flatten(1).pow(4).sum(1),
    "cosine": lambda y: y.flatten(1).sum(1).cos(),
}
"""Test functions of weak orders: (paths, *event) -> (paths,)."""


@dataclass(frozen=True)
class OrderEstimate:
    """A measured order.

    Attributes:
        kind: "strong", or "weak" with `test` naming the test function.
        solver, problem, reference: what was measured, against which reference.
        levels: the refinements; refinement n takes 2^n steps.
        error, error_low, error_high: the error to which the order is fitted, with 95 % intervals, coarse to fine:
            the RMSE over paths at the end (strong), or the difference of expectations (weak).
        rmse, mean, median: statistics over paths of the error at the end.
        order: slope of log2 error against -level over the levels in `used`.
        low, high: 95 % interval of the order; it accounts for sampling error and for a detected bend.
        sampling: the half-width that is due to sampling alone.
        bent: interval of the slope if log2 error also has a term in sqrt(h).
        local: slopes between neighbouring levels, coarse to fine, with local_low and local_high. The last ones are
            the best evidence.
        used: the fitted levels: above the reference's floor and past the pre-asymptotic range.
        usable: for each level, whether it is above the reference's floor (weak: also above sampling noise).
        reference_error: RMSE of the reference, estimated from its difference to half its resolution; 0 for
            references without error.
        paths_that_count: (sum e^2)^2 / sum e^4 at the finest level: the number of paths that carry the RMSE.
        verdict: the conclusion in words.
    """

    kind: str
    solver: str
    problem: str
    noise_type: str
    sde_type: str
    reference: str
    reference_level: int | None
    reference_error: float
    test: str | None
    paths: int
    levels: list[int]
    t1: float
    error: list[float]
    error_low: list[float]
    error_high: list[float]
    rmse: list[float]
    mean: list[float]
    median: list[float]
    order: float
    low: float
    high: float
    sampling: float
    bent: list[float]
    local: list[float]
    local_low: list[float]
    local_high: list[float]
    used: list[int]
    usable: list[bool]
    paths_that_count: float
    verdict: str
    declared: float | None
    seed: int
    device: str
    dtype: str

    def record(self) -> Record:
        """The estimate as a record."""
        return Record(f"{self.kind}-order", asdict(self), self.seed, provenance(self.device))

    def save(self, path: str | Path) -> Path:
        """Write the JSON record."""
        return self.record().save(path)

    def plot(self, path: str | Path) -> Path:
        """Draw error against step size; the suffix chooses SVG, PNG or PDF."""
        from .figures import order_figure

        return order_figure([self.record()], path)


def strong_order(
    solver: StochasticSolver, problem: TestProblem | SDE, *, y0: Tensor | None = None, t0: float = 0.0,
    t1: float | None = None, levels: Iterable[int] = LEVELS, paths: int = PATHS,
    reference: str | StochasticSolver = "torchsde", reference_level: int | None = None, device: str = "cpu",
    dtype: torch.dtype = torch.float64, seed: int = 0, block: int | None = None,
) -> OrderEstimate:  # fmt: skip
    """Measure the strong order of one solver; the arguments are those of `strong_orders`."""
    return strong_orders(
        [solver], problem, y0=y0, t0=t0, t1=t1, levels=levels, paths=paths, reference=reference,
        reference_level=reference_level, device=device, dtype=dtype, seed=seed, block=block,
    )[0]  # fmt: skip


def strong_orders(
    solvers: Sequence[StochasticSolver], problem: TestProblem | SDE, *, y0: Tensor | None = None,
    t0: float = 0.0, t1: float | None = None, levels: Iterable[int] = LEVELS, paths: int = PATHS,
    reference: str | StochasticSolver = "torchsde", reference_level: int | None = None, device: str = "cpu",
    dtype: torch.dtype = torch.float64, seed: int = 0, block: int | None = None,
) -> list[OrderEstimate]:  # fmt: skip
    r"""Measure the strong orders of solvers on an SDE, all along the same Brownian paths.

    The strong order p is the slope of $\log_2 (E|y_h - y|^2)^{1/2}$ at the end of the interval.

    Args:
        problem: one of `fewstep_analysis.problems`, or an SDE together with y0 (*event) and t1.
        y0, t0, t1: initial value and time interval; by default the problem's.
        levels: at least three refinements; refinement n takes 2^n steps.
        paths: number of Brownian paths.
        reference: `"torchsde"` (default): torchsde's `srk` (Stratonovich: `midpoint`) on the same
            `BrownianInterval`; `"exact"`: the problem's closed form; `"levels"`: differences of consecutive
            refinements on one `BrownianPath`, which needs no reference; or a solver for the same path.
        reference_level: refinement of torchsde's reference or of the solver; by default 3 above the finest of
            `levels`, or 5 if its order is no higher than the highest declared order.
        device, dtype: where and in what precision (default "cpu", float64).
        seed: fixes the paths.
        block: number of paths per block; by default what fits in 256 MiB. The result does not depend on it.

    Under `torchrun` (see `fewstep_analysis.parallel`) blocks are distributed over the processes and each process
    returns the result of all.

    Raises:
        InputError: before any work: fewer than three levels, an unknown reference, a reference that is too coarse or
            of too low an order, a problem without what the reference needs, a solver that cannot solve the problem.
    """
    e, name = _experiment(
        solvers, problem, y0=y0, t0=t0, t1=t1, levels=levels, paths=paths, reference=reference,
        reference_level=reference_level, device=device, dtype=dtype, seed=seed, block=block,
    )  # fmt: skip
    with torch.no_grad():
        errors, own = sweep(e, lambda a, b: torch.linalg.vector_norm((a - b).flatten(1), dim=1))
    floor = _floor(e, own.square().mean().sqrt())
    return [_estimate(e, name, s, v, strong_logs(v, floor), floor) for s, v in zip(e.solvers, errors, strict=True)]


def weak_order(
    solver: StochasticSolver, problem: TestProblem | SDE, test: str | Callable[[Tensor], Tensor] = "square", *,
    antithetic: bool = True, y0: Tensor | None = None, t0: float = 0.0,
    t1: float | None = None, levels: Iterable[int] = LEVELS, paths: int = PATHS,
    reference: str | StochasticSolver = "levels", reference_level: int | None = None, device: str = "cpu",
    dtype: torch.dtype = torch.float64, seed: int = 0, block: int | None = None,
) -> OrderEstimate:  # fmt: skip
    """Measure the weak order of one solver; the arguments are those of `weak_orders`."""
    return weak_orders(
        [solver], problem, test, antithetic=antithetic, y0=y0, t0=t0, t1=t1, levels=levels, paths=paths,
        reference=reference, reference_level=reference_level, device=device, dtype=dtype, seed=seed, block=block,
    )[0]  # fmt: skip


def weak_orders(
    solvers: Sequence[StochasticSolver], problem: TestProblem | SDE,
    test: str | Callable[[Tensor], Tensor] = "square", *, antithetic: bool = True, y0: Tensor | None = None,
    t0: float = 0.0, t1: float | None = None, levels: Iterable[int] = LEVELS, paths: int = PATHS,
    reference: str | StochasticSolver = "levels", reference_level: int | None = None, device: str = "cpu",
    dtype: torch.dtype = torch.float64, seed: int = 0, block: int | None = None,
) -> list[OrderEstimate]:  # fmt: skip
    r"""Measure weak orders of solvers: the slope of $\log_2 |E\varphi(y_h) - E\varphi(y)|$.

    The expectation is over differences along common noise: to the next finer refinement (`reference="levels"`), to
    the closed form of the same path (`"exact"`), or to a reference solution on it. The variance of such differences
    falls with the step like the squared strong error, which needs far fewer paths than two separate means. The
    antithetic path -W of each path removes what is odd in W. Refinements whose mean is not four standard errors from
    zero are not used.

    Limits: a solver whose bias for this test function (almost) vanishes shows a higher order than it has, or none;
    try several. Differences of refinements show the rate, not the limit.

    Args:
        test: "mean", "square", "fourth", "cosine", or a function `(paths, *event) -> (paths,)`.
        antithetic: also solve the mirror image of each path (not with torchsde's paths).
        y0, ..., block: as in `strong_orders`, with reference "levels" by default.
    """
    phi = test if callable(test) else TESTS[_validation.check_choice("test", test, TESTS)]
    twin = _validation.check_flag("antithetic", antithetic)
    twin = twin and not (isinstance(reference, str) and reference == "torchsde")
    e, name = _experiment(
        solvers, problem, y0=y0, t0=t0, t1=t1, levels=levels, paths=paths, reference=reference,
        reference_level=reference_level, device=device, dtype=dtype, seed=seed, block=block,
        weak=True, antithetic=twin,
    )  # fmt: skip
    with torch.no_grad():
        errors, own = sweep(e, lambda a, b: phi(a) - phi(b))
    floor, word = (
        _floor(e, own.mean().abs()),
        test if isinstance(test, str) else getattr(test, "__name__", "a function"),
    )
    return [_estimate(e, name, s, v, weak_logs(v, floor), floor, word) for s, v in zip(e.solvers, errors, strict=True)]


def _experiment(
    solvers: Sequence[StochasticSolver], problem: TestProblem | SDE, *, y0: Tensor | None, t0: float,
    t1: float | None, levels: Iterable[int], paths: int, reference: str | StochasticSolver,
    reference_level: int | None, device: str, dtype: torch.dtype, seed: int, block: int | None,
    weak: bool = False, antithetic: bool = False,
) -> tuple[Experiment, str]:  # fmt: skip
    """Check the arguments and return the experiment and the name of the problem."""
    _validation.check_instance("problem", problem, (TestProblem, SDE), "an SDE or one of fewstep_analysis.problems")
    solvers = _validation.check_sequence("solvers", solvers, "solvers such as [EulerMaruyama()]")
    if isinstance(problem, TestProblem):
        sde, name, exact = problem.sde, problem.name, problem.exact
        y0, t1 = problem.y0 if y0 is None else y0, problem.t1 if t1 is None else t1
    else:
        sde, name, exact = problem, "user's SDE", None
    levels = check_levels(levels, least=3)
    paths = _validation.check_int("paths", paths, 2)
    block = _validation.check_int_or_none("block", block)
    if not isinstance(reference, StochasticSolver):
        _validation.check_choice("reference", reference, REFERENCES)
    seed, device = _validation.check_seed(seed), str(_validation.check_device(device))
    if y0 is None or t1 is None:
        raise InputError("y0, t1: got None; an SDE that is not a test problem needs y0=(*event) and t1=.")
    _validation.check_state("y0", y0, "a finite floating-point tensor (*event)")
    if not _validation.check_float("t0", t0) < _validation.check_float("t1", t1):
        raise InputError(f"t0, t1: got {t0!r} and {t1!r}, expected t0 < t1.")
    for solver in solvers:
        _validation.check_instance("solver", solver, StochasticSolver, "an object such as EulerMaruyama()")
        check_solves(sde, solver)
        if reference == "torchsde" and solver.card.levy in ("A", "K"):
            raise InputError(
                f"reference: got 'torchsde' for {type(solver).__name__}, which needs the path's "
                f"{solver.card.levy}; torchsde's paths provide W and H alone. Use reference='levels'."
            )
    if reference == "exact" and exact is None:
        raise InputError("reference: got 'exact', but this problem has no closed form; use 'levels'.")
    if y0.dim() > 1 and len(y0) == paths:
        raise InputError(
            f"y0: got shape {tuple(y0.shape)} for {paths} paths, expected one state (*event), from which all "
            "paths start, such as y0[0]; if this is one state, use another number of paths."
        )
    if reference == "torchsde" and y0.dim() != 1:
        raise InputError(
            f"y0: got shape {tuple(y0.shape)}; torchsde solves (paths, d), so y0 must be (d,). Flatten "
            "the event, or use reference='levels'."
        )
    truth = None if reference == "levels" else reference
    finest = levels[-1] + (truth is None)
    if truth == "torchsde" or isinstance(truth, StochasticSolver):
        finest = _reference_level(sde, solvers, truth, levels[-1], reference_level, weak)
    e = Experiment(
        sde, list(solvers), y0, (float(t0), float(t1)), levels, finest, paths, truth, exact, device,
        check_dtype(dtype), seed, block, antithetic,
    )  # fmt: skip
    return e, name


def check_levels(levels: Any, least: int) -> list[int]:
    """Check a user's refinements and return them sorted, without duplicates; at least `least` are required."""
    expected = "integers such as range(4, 10)"
    if torch.is_tensor(levels) and levels.layout == torch.strided and not levels.is_meta:
        levels = levels.tolist()
    given = _validation.check_sequence("levels", levels, expected)
    found = sorted({_validation.check_int("levels", n, 0, FINEST) for n in given})
    if len(found) < least:
        count = {2: "two", 3: "three"}[least]
        raise InputError(f"levels: got {found}, expected at least {count} different ones. Use range(4, 10).")
    return found


def _order_of(sde: SDE, truth: Any) -> tuple[str, float]:
    """The name of a reference's solver and its strong order."""
    if truth != "torchsde":
        return type(truth).__name__, truth.card.order_for(sde.noise_type)
    if sde.noise_type in ("general", "commutative"):
        return "euler" if sde.sde_type == "ito" else "midpoint", 0.5
    return TORCHSDE_METHODS[sde.sde_type]


def _reference_level(
    sde: SDE, solvers: Sequence[StochasticSolver], truth: Any, finest: int, given: int | None, weak: bool
) -> int:
    """The refinement of the reference; rejects references whose own error would be measured."""
    if isinstance(truth, StochasticSolver):
        check_solves(sde, truth)
    name, order = _order_of(sde, truth)
    highest = max(s.card.order_for(sde.noise_type) for s in solvers)
    if (truth == "torchsde" and order == 0.5) or (order < highest and not weak):
        raise InputError(
            f"reference: got {truth if isinstance(truth, str) else name!r}, whose {name} has strong order "
            f"{order:g} for {sde.noise_type!r} noise; it cannot judge order {highest:g}. Use "
            "reference='levels', or a solver of at least that order."
        )
    if given is None:
        return finest + (FINER if order > highest else FINER_SAME)
    if _validation.check_int("reference_level", given, 0, FINEST) < finest + FINER:
        raise InputError(
            f"reference_level: got {given}, expected at least {finest + FINER}, 2^{FINER} times finer "
            f"than the finest of levels, {finest}; otherwise the error of the reference is measured."
        )
    return given


def _floor(e: Experiment, difference: Tensor) -> float:
    """The error of the reference, extrapolated from its difference to half its resolution."""
    return 0.0 if e.truth in (None, "exact") else float(difference) / (2 ** _order_of(e.sde, e.truth)[1] - 1)


def _estimate(
    e: Experiment, name: str, solver: StochasticSolver, errors: Tensor, logs: Logs, floor: float,
    test: str | None = None,
) -> OrderEstimate:  # fmt: skip
    kind = "strong" if test is None else "weak"
    declared = getattr(solver.card, f"{kind}_order").get(e.sde.noise_type)
    square, t1 = errors.square(), e.ends[1] - e.ends[0]
    carried = float(square[:, -1].sum() ** 2 / square[:, -1].square().sum().clamp(min=1e-300))
    truth = "levels" if e.truth is None else e.truth if isinstance(e.truth, str) else type(e.truth).__name__
    found = fit(logs, e.levels) | {"levels": list(e.levels), "kind": kind}
    counted = carried if kind == "strong" else float("inf")
    return OrderEstimate(
        solver=type(solver).__name__, problem=name, noise_type=e.sde.noise_type, sde_type=e.sde.sde_type,
        reference=truth, reference_level=e.finest if truth not in ("levels", "exact") else None,
        reference_error=floor, test=test, paths=e.paths, t1=t1, declared=declared, seed=e.seed,
        device=e.device, dtype=str(e.dtype).removeprefix("torch."), paths_that_count=carried,
        rmse=square.mean(0).sqrt().tolist(), mean=errors.abs().mean(0).tolist(),
        median=errors.abs().median(0).values.tolist(),
        verdict=verdict(found, declared, t1, e.paths, counted), **found,
    )  # fmt: skip
