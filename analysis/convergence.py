"""Strong order of convergence, measured: slopes with intervals, and the local slopes that tell the truth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from fewstep import SDE, AreaPath, BrownianPath, InputError, StochasticSolver, solve
from fewstep.errors import one_of
from fewstep.solve import check_solves
from torch import Tensor

from .problems import TestProblem
from .records import Record, provenance

REFERENCES = ("torchsde", "exact", "levels")
RESAMPLES = 400
AREA_FINER = (
    1  # cells of an area path per finest step: every level sees the join of the same cells, 2^1 a step
)
FINER = 3  # the reference is 2^3 times finer than the finest level: its own error stays below


@dataclass(frozen=True)
class OrderEstimate:
    """A measured strong order.

    Attributes:
        solver, problem, reference: what was measured, against what.
        levels: step counts are 2^level.
        rmse, mean, median: of the error at the end over paths, coarse to fine.
        order: least-squares slope of log2 rmse against -level over all levels.
        low, high: 95 % bootstrap interval over paths of that slope. It knows sampling error only; a
            bend at coarse levels or a reference floor shows in `local`, not here.
        local: slopes between neighbouring levels, coarse to fine. Judge the order on the last ones.
        local_low, local_high: their 95 % bootstrap intervals.
    """

    solver: str
    problem: str
    reference: str
    paths: int
    levels: list[int]
    t1: float
    rmse: list[float]
    mean: list[float]
    median: list[float]
    order: float
    low: float
    high: float
    local: list[float]
    local_low: list[float]
    local_high: list[float]
    declared: float | None
    seed: int
    device: str

    def record(self) -> Record:
        return Record("strong-order", asdict(self), self.seed, provenance(self.device))

    def save(self, path: str | Path) -> Path:
        """Write the JSON record."""
        return self.record().save(path)

    def plot(self, path: str | Path) -> Path:
        """Draw error against step size (SVG, PNG or PDF by the ending)."""
        from .figures import strong_order_figure

        return strong_order_figure([self.record()], path)


def strong_order(solver: StochasticSolver, problem: TestProblem | SDE, **options: Any) -> OrderEstimate:
    """Measure the strong order of one solver: `strong_orders` of it alone, with the same options."""
    return strong_orders([solver], problem, **options)[0]


def strong_orders(
    solvers: Sequence[StochasticSolver],
    problem: TestProblem | SDE,
    *,
    y0: Tensor | None = None,
    t0: float = 0.0,
    t1: float | None = None,
    levels: Iterable[int] = range(4, 10),
    paths: int = 4096,
    reference: str = "torchsde",
    device: str = "cpu",
    seed: int = 0,
) -> list[OrderEstimate]:
    """Measure the strong order of any solvers on any SDE, in float64, all of it on the same paths.

    Args:
        problem: one of `fewstep.analysis.problems`, or an SDE of yours with y0 (*event) and t1.
        levels: at least three; level l takes 2^l steps.
        reference: `"torchsde"`: torchsde's `srk` (Stratonovich: `midpoint`) on the same
            `BrownianInterval`, 2^3 times finer than the finest level; `"exact"`: the problem's closed
            form; `"levels"`: differences of neighbouring levels on one `BrownianPath`, no reference.

    Raises:
        InputError: fewer than three levels, an unknown reference, a problem without what the reference
            needs, a solver that cannot solve the problem's noise.
    """
    if isinstance(problem, TestProblem):
        sde, name, exact = problem.sde, problem.name, problem.exact
        y0 = problem.y0 if y0 is None else y0
        t1 = problem.t1 if t1 is None else t1
    else:
        sde, name, exact = problem, "user's SDE", None
    levels = sorted(set(levels))
    start, end = _check(sde, solvers, y0, t1, levels, reference, exact)
    start = start.to(device, torch.float64).expand(paths, *start.shape)
    ends = [t0, end]
    with torch.no_grad():
        if reference == "levels":
            errors = _consecutive(sde, solvers, start, ends, levels, seed)
        else:
            errors = _against(
                sde, solvers, start, ends, levels, seed, exact if reference == "exact" else None
            )
    return [
        OrderEstimate(
            solver=type(solver).__name__, problem=name, reference=reference, paths=paths, levels=levels,
            t1=end - t0, declared=solver.card.strong_order.get(sde.noise_type), seed=seed, device=device,
            **slopes(error, levels, seed),
        )
        for solver, error in zip(solvers, errors, strict=True)
    ]  # fmt: skip


def _check(
    sde: SDE, solvers: Sequence[Any], y0: Tensor | None, t1: float | None, levels: Sequence[int],
    reference: str, exact: Any,
) -> tuple[Tensor, float]:  # fmt: skip
    for solver in solvers:
        if not isinstance(solver, StochasticSolver):
            raise InputError(f"solver: got {solver!r}, wanted an object such as EulerMaruyama().")
        check_solves(sde, solver)
        if solver.card.levy == "A" and reference != "levels":
            raise InputError(
                f"reference: got {reference!r} for {type(solver).__name__}, which needs the path's own area; "
                "torchsde's paths do not know theirs. Use reference='levels'."
            )
    if y0 is None or t1 is None:
        raise InputError("y0, t1: got None; an SDE of your own needs y0=(*event) and t1=.")
    if len(levels) < 3:
        raise InputError(
            f"levels: got {list(levels)}, wanted at least three different ones: two points always lie on "
            "a line. Use range(4, 10)."
        )
    if reference not in REFERENCES:
        raise one_of("reference", reference, REFERENCES)
    if reference == "exact" and exact is None:
        raise InputError("reference: this problem has no closed form; use 'torchsde' or 'levels'.")
    if reference == "torchsde" and y0.dim() != 1:
        raise InputError(
            f"y0: got shape {tuple(y0.shape)}; torchsde solves (paths, d), so y0 must be (d,). Flatten "
            "the event, or use reference='levels'."
        )
    return y0, float(t1)


def _noise_shape(sde: SDE, start: Tensor, t0: float) -> tuple[int, ...]:
    return sde.noise_shape(start, sde.diffusion(torch.tensor(t0).to(start), start))


def _grid(ends: list[float], level: int) -> Tensor:
    return torch.linspace(*ends, 2**level + 1, dtype=torch.float64)


def _against(
    sde: SDE, solvers: Sequence[StochasticSolver], start: Tensor, ends: list[float],
    levels: Sequence[int], seed: int, exact: Any,
) -> list[Tensor]:  # fmt: skip
    """For each solver (paths, levels) errors against one reference on one torchsde path."""
    import torchsde
    from fewstep.adapters.torchsde import TorchsdePath

    finest = (ends[1] - ends[0]) / 2 ** (levels[-1] + FINER)
    interval = torchsde.BrownianInterval(
        *ends, size=_noise_shape(sde, start, ends[0]), dtype=torch.float64, device=start.device,
        entropy=seed, levy_area_approximation="space-time", tol=0.0, cache_size=None, dt=finest,
    )  # fmt: skip
    path = TorchsdePath(interval)
    # coarse before fine keeps torchsde's lazy tree balanced
    ys = [[solve(sde, s, start, _grid(ends, level), path=path).y for s in solvers] for level in levels]
    if exact is not None:
        truth = exact(start, ends[1] - ends[0], interval(*ends))
    else:
        ts = torch.tensor(ends, dtype=torch.float64, device=start.device)
        method = "srk" if sde.sde_type == "ito" else "midpoint"
        theirs = _Torchsde(sde, start.shape[-1])
        truth = torchsde.sdeint(theirs, start, ts, bm=interval, method=method, dt=finest)[-1]
    return [torch.stack([_distance(y, truth) for y in of], 1) for of in zip(*ys, strict=True)]


class _Torchsde(torch.nn.Module):
    """An SDE in torchsde's form, where additive noise is always a matrix."""

    def __init__(self, sde: SDE, d: int) -> None:
        super().__init__()
        self.sde, self.f, self.sde_type = sde, sde.drift, sde.sde_type
        self.eye = torch.eye(d, dtype=torch.float64)
        self.noise_type = sde.noise_type

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        g = self.sde.diffusion(t, y)
        if self.noise_type == "additive" and g.dim() <= y.dim():
            return g.expand_as(y).unsqueeze(-1) * self.eye.to(y.device)
        return g


def _consecutive(
    sde: SDE, solvers: Sequence[StochasticSolver], start: Tensor, ends: list[float],
    levels: Sequence[int], seed: int,
) -> list[Tensor]:  # fmt: skip
    """For each solver (paths, levels) differences of each level to the next finer one on one path."""
    kinds = {s.card.levy or "W" for s in solvers}
    levy = max((k if k != "A" else "H" for k in kinds), key="WHK".index)
    path: Any = BrownianPath(
        _noise_shape(sde, start, ends[0]), t0=ends[0], t1=ends[1], seed=seed, levy=levy,
        dtype=torch.float64, device=start.device,
    )  # fmt: skip
    if "A" in kinds:  # an area joined from cells finer than the finest step, so that its own error hides
        path = AreaPath(path, 2 ** (levels[-1] + 1 + AREA_FINER))
    needed = sorted({*levels, *(level + 1 for level in levels)})
    return [
        torch.stack([_distance(ys[level], ys[level + 1]) for level in levels], 1)
        for solver in solvers
        for ys in [{n: solve(sde, solver, start, _grid(ends, n), path=path).y for n in needed}]
    ]


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).reshape(len(a), -1).norm(dim=1)


def slopes(errors: Tensor, levels: Sequence[int], seed: int) -> dict[str, Any]:
    """Error statistics and slopes of (paths, levels) errors, with a bootstrap over paths.

    A resample takes the same paths on all levels: their errors are strongly correlated, and so cancel
    in the slope.
    """
    n = len(errors)
    square = errors.cpu().square()
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(n, (n,), generator=generator) for _ in range(RESAMPLES)]
    resampled = torch.stack([torch.bincount(r, minlength=n).double() @ square / n for r in rows])
    log = 0.5 * torch.log2(torch.cat([square.mean(0, keepdim=True), resampled]))
    x = torch.tensor(levels, dtype=torch.float64)
    fitted = -((log * (x - x.mean())).sum(1) / (x - x.mean()).square().sum())
    local = -log.diff(dim=1) / x.diff()
    low, high = fitted[1:].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    bounds = local[1:].quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    return {
        "rmse": (2 ** log[0]).tolist(), "mean": errors.mean(0).tolist(),
        "median": errors.median(0).values.tolist(), "order": float(fitted[0]),
        "low": low, "high": high, "local": local[0].tolist(),
        "local_low": bounds[0].tolist(), "local_high": bounds[1].tolist(),
    }  # fmt: skip
