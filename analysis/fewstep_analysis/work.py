"""Work-precision of SDE solvers: error against drift evaluations and against seconds, peers beside."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from fewstep import (  # fmt: skip
    SRID2,
    AreaPath,
    BrownianPath,
    GeneralMilstein,
    Increment,
    InputError,
    Milstein,
    SlowRK,
    StochasticSolver,
    _validation,
    solve,
)
from fewstep.errors import one_of
from fewstep.solve import check_solves

from .convergence import whole_levels
from .figures import canvas, colour, write
from .monte_carlo import Experiment, Stored, Torchsde, grid_of, own_noise
from .parallel import progress
from .problems import PROBLEMS, TestProblem, by_name
from .records import Record, provenance
from .solver_table import cases

if TYPE_CHECKING:
    from .diffusion_problems import DiffusionProblem

FINER = 4  # the truth's level above the finest measured one
# torchsde's methods that can be driven by any Brownian motion, with their drift evaluations a step
TORCHSDE = {
    ("ito", "diagonal"): {"euler": 1, "milstein": 1, "srk": 4},
    ("ito", "additive"): {"euler": 1, "srk": 2},
    ("ito", "scalar"): {"euler": 1, "milstein": 1, "srk": 4},
    ("ito", "general"): {"euler": 1},
    ("stratonovich", "any"): {"euler_heun": 1, "heun": 2, "midpoint": 2, "reversible_heun": 1},
}


@overload
def work_precision(
    problem: TestProblem | str, solvers: Sequence[StochasticSolver] | None = ..., *,
    levels: Iterable[int] = ..., paths: int = ..., torchsde: bool = ..., diffrax: bool = ...,
    device: str = ..., seed: int = ..., repeats: int = ...,
) -> Record: ...  # fmt: skip
@overload
def work_precision(
    problem: DiffusionProblem | str, nfe: Sequence[int] = ..., *, solvers: Iterable[str] | None = ...,
    spacings: Sequence[str] = ..., samples: int = ..., seed: int = ..., diffusers: bool = ...,
) -> Record: ...  # fmt: skip
def work_precision(problem: Any, *args: Any, **options: Any) -> Record:
    """Error against work: `sde_work_precision` of an SDE, `diffusion_work.work_precision` of samplers.

    Args:
        problem: a problem, or its name, of `problems` or of `diffusion_problems`.
    """
    if isinstance(problem, TestProblem):
        return sde_work_precision(problem, *args, **options)
    if isinstance(problem, str) and is_sde(problem):
        return sde_work_precision(by_name(problem), *args, **options)
    from . import diffusion_problems
    from . import sampler_work as diffusion_work

    kinds = (str, diffusion_problems.DiffusionProblem)
    _validation.check_instance("problem", problem, kinds, "a problem of fewstep_analysis or its name")
    if isinstance(problem, str) and problem not in diffusion_problems.PROBLEMS:
        raise one_of("problem", problem, [*PROBLEMS, *diffusion_problems.PROBLEMS])
    return diffusion_work.work_precision(problem, *args, **options)


def is_sde(name: str) -> bool:
    """Whether `problems.by_name` knows it."""
    return name in PROBLEMS or name.rpartition("_")[0] in PROBLEMS


def sde_work_precision(
    problem: TestProblem, solvers: Sequence[StochasticSolver] | None = None, *,
    levels: Iterable[int] = range(3, 9), paths: int = 2048, torchsde: bool = True,
    diffrax: bool = True, device: str = "cpu", seed: int = 0, repeats: int = 3,
) -> Record:  # fmt: skip
    """Error, evaluations and seconds of each solver at each level, all along the same paths.

    Errors are RMSE against the closed form where there is one, otherwise against a solver of the highest
    order for the noise at 2^4 times the finest resolution. Seconds are the median of `repeats` whole solves
    as a user calls them, noise included: here with a `BrownianPath`, there with a `BrownianInterval` that
    was told its step. diffrax's solvers join on the CPU where it is installed and `peers_diffrax` has
    the problem: compiled beforehand, with a `VirtualBrownianTree`, on as many threads as XLA takes.

    Raises:
        InputError: a solver that cannot solve the problem, fewer than two levels.
    """
    solvers = default_solvers(problem) if solvers is None else solvers
    solvers = _validation.check_sequence("solvers", solvers, "solvers such as [EulerMaruyama()]")
    levels, seed, device = (
        whole_levels(levels),
        _validation.check_seed(seed),
        str(_validation.check_device(device)),
    )
    _validation.check_int("paths", paths)
    _validation.check_int("repeats", repeats)
    if len(levels) < 2:
        raise InputError(f"levels: got {levels}, expected at least two. Use range(3, 9).")
    for solver in solvers:
        _validation.check_instance("solvers", solver, StochasticSolver, "objects such as EulerMaruyama()")
        check_solves(problem.sde, solver)
    truth = "exact" if problem.exact is not None else _best(problem)
    # one stored path set serves everyone: with H for torchsde's srk, with A where the truth wants it
    everyone = [*solvers, SRID2() if problem.sde.noise_type != "general" else GeneralMilstein()]
    finest = levels[-1] + (FINER if truth != "exact" else 0)
    e = Experiment(
        problem.sde, everyone, problem.y0, (0.0, problem.t1), levels, finest, paths, truth, problem.exact,
        device, torch.float64, seed,
    )  # fmt: skip
    methods = _methods(problem) if torchsde else {}
    with torch.no_grad():
        series = [_ours(e, s) for s in solvers] + [_theirs(e, m, n) for m, n in methods.items()]
        series += _diffrax(e, problem) if diffrax else []
        _fill_errors(e, series, solvers)
        for one in progress(series, "solver"):
            run = one.pop("run")
            one["seconds"] = [_seconds(lambda n=n, run=run: run(n), repeats) for n in levels]
    data = {
        "problem": problem.name, "levels": levels, "paths": paths, "t1": problem.t1,
        "truth": truth if isinstance(truth, str) else type(truth).__name__, "series": series,
    }  # fmt: skip
    return Record("sde-work-precision", data, seed, provenance(device))


def default_solvers(problem: TestProblem) -> list[StochasticSolver]:
    """Every solver of ours that can, but the derivative-heavy one that is no one's choice."""
    found = next(able for p, able in cases() if _same_kind(p, problem))
    return [c() for c in found if c.__name__ not in ("Taylor15", "ShiftedODE")]


def _same_kind(a: TestProblem, b: TestProblem) -> bool:
    additive = a.sde.noise_type == b.sde.noise_type == "additive"
    return additive or (a.sde.noise_type, a.sde.sde_type) == (b.sde.noise_type, b.sde.sde_type)


def _best(problem: TestProblem) -> StochasticSolver:
    noise, calculus = problem.sde.noise_type, problem.sde.sde_type
    if noise == "general":
        return GeneralMilstein()
    if calculus == "stratonovich":
        return SlowRK()
    return Milstein() if noise == "commutative" else SRID2()


def _methods(problem: TestProblem) -> dict[str, int]:
    noise, calculus = problem.sde.noise_type, problem.sde.sde_type
    noise = "general" if noise == "commutative" else noise
    return TORCHSDE.get((calculus, noise), {}) if calculus == "ito" else TORCHSDE["stratonovich", "any"]


def _fill_errors(e: Experiment, series: list[dict[str, Any]], solvers: Sequence[StochasticSolver]) -> None:
    """The ends of every series at every level along one set of paths, against the truth."""
    noise, start = own_noise(e, 0, e.paths), e.start(e.paths)
    ends: dict[tuple[int, int], Tensor] = {}
    truth = None
    for level in range(e.finest, -1, -1):
        grid = grid_of(e.ends, level)
        if level == e.finest and isinstance(e.truth, StochasticSolver):
            truth = solve(e.sde, e.truth, start, grid, path=noise).y
        if level in e.levels:
            for i, one in enumerate(series):
                ends[i, level] = one["end"](noise, level)
        if level:
            noise = noise.coarser()
    if truth is None:
        assert e.exact is not None
        truth = e.exact(start, e.ends[1] - e.ends[0], noise.pieces[0].W)
    for i, one in enumerate(series):
        one.pop("end")
        one["error"] = [
            float((ends[i, n] - truth).square().flatten(1).sum(1).mean().sqrt()) for n in e.levels
        ]


def _ours(e: Experiment, solver: StochasticSolver) -> dict[str, Any]:
    start, shape = e.start(e.paths), e.noise_shape(e.paths)
    levy = {"A": "H", "": "W"}.get(solver.card.levy, solver.card.levy)

    def run(level: int) -> Tensor:
        path: Any = BrownianPath(shape, *e.ends, seed=e.seed, levy=levy, dtype=e.dtype, device=e.device)
        if solver.card.levy == "A":
            path = AreaPath(path, 2 ** (e.levels[-1] + 1))
        return solve(e.sde, solver, start, grid_of(e.ends, level), path=path).y

    return {
        "name": type(solver).__name__, "package": "fewstep", "run": run,
        "evaluations": [solver.card.evaluations * 2**n for n in e.levels],
        "end": lambda noise, n: solve(e.sde, solver, start, grid_of(e.ends, n), path=noise).y,
    }  # fmt: skip


def _diffrax(e: Experiment, problem: TestProblem) -> list[dict[str, Any]]:
    if importlib.util.find_spec("diffrax") is None:
        return []
    from experiments.peers_diffrax import diffrax_series

    return diffrax_series(e, problem)


def _theirs(e: Experiment, method: str, evaluations: int) -> dict[str, Any]:
    import torchsde

    start, shape = e.start(e.paths), e.noise_shape(e.paths)
    theirs, ts = Torchsde(e.sde, start.shape[-1]), torch.tensor(e.ends, dtype=torch.float64)
    area = "space-time" if method == "srk" else "none"

    def end(bm: Any, level: int) -> Tensor:
        h = (e.ends[1] - e.ends[0]) / 2**level
        out: Tensor = torchsde.sdeint(theirs, start, ts, bm=bm, method=method, dt=h)[-1]
        return out

    def run(level: int) -> Tensor:
        interval = torchsde.BrownianInterval(
            *e.ends, size=shape, dtype=e.dtype, device=e.device, entropy=e.seed,
            levy_area_approximation=area, dt=(e.ends[1] - e.ends[0]) / 2**level,
        )  # fmt: skip
        return end(interval, level)

    return {
        "name": method, "package": "torchsde", "run": run,
        "evaluations": [evaluations * 2**n for n in e.levels],
        "end": lambda noise, n: end(AsBrownian(noise, e.ends, area), n),
    }  # fmt: skip


class AsBrownian:
    """Stored increments behind torchsde's interface, so that its solvers see the very same path."""

    def __init__(self, noise: Stored, ends: tuple[float, float], levy_area_approximation: str) -> None:
        first = noise.pieces[0].W
        self.pieces: list[Increment] = noise.pieces
        self.t0: float = ends[0]
        self.h: float = (ends[1] - ends[0]) / len(noise.pieces)
        self.shape: torch.Size = first.shape
        self.dtype: torch.dtype = first.dtype
        self.device: torch.device = first.device
        self.levy_area_approximation = levy_area_approximation

    def __call__(self, ta: Any, tb: Any = None, return_U: bool = False, return_A: bool = False) -> Any:
        piece = self.pieces[round((float(ta) - self.t0) / self.h)]
        assert abs(float(tb) - float(ta) - self.h) < 1e-9 * self.h + 1e-12
        return (piece.W, piece.U) if return_U else piece.W


def _seconds(run: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def work_figure(record: Record, path: str | Path) -> Path:
    """Error against evaluations and against seconds; torchsde's methods dashed, diffrax's dotted."""
    figure, axes = canvas(9.6, 4.4, ncols=2, sharey=True)
    data = record.data
    for one in data["series"]:
        theirs = one["package"] != "fewstep"
        label = f"{one['package']} {one['name']}" if theirs else one["name"]
        shade = colour(THEIR_TWIN.get(one["name"], one["name"]))
        for panel, x in zip(axes, (one["evaluations"], one["seconds"]), strict=True):
            panel.loglog(x, one["error"], STYLE[one["package"]], color=shade, ms=3.5, lw=1, label=label,
                         alpha=0.75 if theirs else 1)  # fmt: skip
    axes[0].set_xlabel("drift evaluations a path")
    axes[1].set_xlabel(f"seconds for {data['paths']:,} paths, noise included")
    axes[0].set_ylabel(f"RMSE at t = {data['t1']:g}")
    axes[1].legend(fontsize=7.5)
    for panel in axes:
        panel.grid(True, which="major", alpha=0.3)
    figure.suptitle(f"{data['problem'].replace('_', ' ')}, against {data['truth']}", fontsize=10)
    return write(figure, path)


STYLE = {"fewstep": "o-", "torchsde": "s--", "diffrax": "^:"}
# the peers' methods share the colour of the same method here
THEIR_TWIN = {
    "euler": "EulerMaruyama", "milstein": "Milstein", "srk": "SRID2", "euler_heun": "EulerHeun",
    "heun": "Heun", "midpoint": "Midpoint", "reversible_heun": "ReversibleHeun",
    "Euler": "EulerMaruyama", "ItoMilstein": "Milstein",
}  # fmt: skip
