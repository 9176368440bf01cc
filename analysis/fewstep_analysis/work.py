"""Work-precision of SDE solvers: error against drift evaluations and against seconds, with torchsde's."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

import fewstep as fs
from fewstep import StochasticSolver, _validation, solve
from fewstep._progress import progress
from fewstep.brownian.area_path import path_for
from fewstep.errors import one_of
from fewstep.integrations.torchsde import BrownianView
from fewstep.solve import check_solves

from . import diffusion_problems, sampler_work
from .convergence import check_levels
from .figures import canvas, colour, write
from .monte_carlo import Experiment, Stored, TorchsdeSDE, grid_of, own_noise
from .problems import PROBLEMS, TestProblem, by_name
from .records import Record, provenance
from .solver_table import able

FINER = 4  # the reference is 2^4 times finer than the finest measured refinement
# torchsde's methods that accept any Brownian motion, by noise type, with their drift evaluations per step
ITO = {
    "diagonal": {"euler": 1, "milstein": 1, "srk": 4}, "scalar": {"euler": 1, "milstein": 1, "srk": 4},
    "additive": {"euler": 1, "srk": 2}, "commutative": {"euler": 1}, "general": {"euler": 1},
}  # fmt: skip
STRATONOVICH = {"euler_heun": 1, "heun": 2, "midpoint": 2, "reversible_heun": 1}


class Series(NamedTuple):
    """One solver of a work-precision measurement.

    Attributes:
        name, package: the solver, and the package that provides it.
        evaluations: drift evaluations per path, one number per refinement.
        run: solves at a refinement as a user would, noise included; its time is measured.
        end: `(stored noise, refinement)` -> final states along the shared paths; its error is measured.
    """

    name: str
    package: str
    evaluations: list[int]
    run: Callable[[int], Any]
    end: Callable[[Stored, int], Tensor]


Peers = Callable[[Experiment, TestProblem], list[Series]]


@overload
def work_precision(
    problem: TestProblem | str, solvers: Sequence[StochasticSolver] | None = ..., *, levels: Iterable[int] = ...,
    paths: int = ..., torchsde: bool = ..., peers: Peers | None = ..., device: str = ..., seed: int = ...,
    repeats: int = ...,
) -> Record: ...  # fmt: skip
@overload
def work_precision(
    problem: diffusion_problems.DiffusionProblem | str, nfe: Sequence[int] = ..., *,
    solvers: Iterable[str | fs.DiffusionSolver] | None = ..., spacings: Sequence[str] = ..., samples: int = ...,
    seed: int = ..., diffusers: bool = ...,
) -> Record: ...  # fmt: skip
def work_precision(problem: Any, *args: Any, **options: Any) -> Record:
    """Error against work: `sde_work_precision` of SDE solvers or `sampler_work.work_precision` of samplers.

    Args:
        problem: a problem of `problems` or `diffusion_problems`, or its name.
        args, options: the further arguments of that function.
    """
    if isinstance(problem, str) and is_sde(problem):
        problem = by_name(problem)
    if isinstance(problem, TestProblem):
        return sde_work_precision(problem, *args, **options)
    kinds = (str, diffusion_problems.DiffusionProblem)
    _validation.check_instance("problem", problem, kinds, "a problem of fewstep_analysis or its name")
    if isinstance(problem, str) and problem not in diffusion_problems.PROBLEMS:
        raise one_of("problem", problem, [*PROBLEMS, *diffusion_problems.PROBLEMS])
    return sampler_work.work_precision(problem, *args, **options)


def is_sde(name: str) -> bool:
    """Whether `problems.by_name` knows the name."""
    return name in PROBLEMS or name.rpartition("_")[0] in PROBLEMS


def sde_work_precision(
    problem: TestProblem, solvers: Sequence[StochasticSolver] | None = None, *,
    levels: Iterable[int] = range(3, 9), paths: int = 2048, torchsde: bool = True,
    peers: Peers | None = None, device: str = "cpu", seed: int = 0, repeats: int = 3,
) -> Record:  # fmt: skip
    """Error, evaluations and seconds of each solver at each refinement, all along the same paths.

    Errors are the RMSE against the closed form, or against a solver of the highest order for the noise on a grid 2^4
    times finer than the finest refinement. Seconds are the median of `repeats` complete solves as a user calls them,
    noise included: with a `BrownianPath` here, and with a `BrownianInterval` that knows its step for torchsde.

    Args:
        solvers: by default every solver that can solve the problem, except the expensive Taylor15 and ShiftedODE.
        levels: at least two refinements; refinement n takes 2^n steps.
        torchsde: also measure torchsde's methods.
        peers: further series of other packages, `(experiment, problem) -> [Series, ...]`.

    Returns:
        a "sde-work-precision" record of series {name, package, evaluations, error, seconds}.

    Raises:
        InputError: a solver that cannot solve the problem, fewer than two levels.
    """
    noise, calculus = problem.sde.noise_type, problem.sde.sde_type
    if solvers is None:
        solvers = [s for s in able(noise, calculus) if type(s).__name__ not in ("Taylor15", "ShiftedODE")]
    solvers = _validation.check_sequence("solvers", solvers, "solvers such as [EulerMaruyama()]")
    levels, seed = check_levels(levels, least=2), _validation.check_seed(seed)
    device = str(_validation.check_device(device))
    paths = _validation.check_int("paths", paths)
    repeats = _validation.check_int("repeats", repeats, 1, 1000)
    for solver in solvers:
        _validation.check_instance("solvers", solver, StochasticSolver, "objects such as EulerMaruyama()")
        check_solves(problem.sde, solver)
    truth = "exact" if problem.exact is not None else _best(noise, calculus)
    # one stored set of paths serves all: with H for torchsde's srk, with A where the reference needs it
    everyone = [*solvers, fs.SRID2() if noise != "general" else fs.GeneralMilstein()]
    finest = levels[-1] + (FINER if truth != "exact" else 0)
    e = Experiment(
        problem.sde, everyone, problem.y0, (0.0, problem.t1), levels, finest, paths, truth, problem.exact,
        device, torch.float64, seed,
    )  # fmt: skip
    methods = {} if not torchsde else ITO[noise] if calculus == "ito" else STRATONOVICH
    with torch.no_grad():
        series = [_own(e, s) for s in solvers] + [_theirs(e, m, n) for m, n in methods.items()]
        series += peers(e, problem) if peers else []
        errors = _errors(e, series)
        seconds = [[median_seconds(partial(s.run, n), repeats) for n in levels] for s in progress(series, "solver")]
    data = {
        "problem": problem.name, "levels": levels, "paths": paths, "t1": problem.t1,
        "truth": truth if isinstance(truth, str) else type(truth).__name__,
        "series": [
            {"name": s.name, "package": s.package, "evaluations": s.evaluations, "error": error, "seconds": took}
            for s, error, took in zip(series, errors, seconds, strict=True)
        ],
    }  # fmt: skip
    return Record("sde-work-precision", data, seed, provenance(device))


def _best(noise: str, calculus: str) -> StochasticSolver:
    if noise == "general":
        return fs.GeneralMilstein()
    if calculus == "stratonovich":
        return fs.SlowRK()
    return fs.Milstein() if noise == "commutative" else fs.SRID2()


def _errors(e: Experiment, series: Sequence[Series]) -> list[list[float]]:
    """The RMSE of each series at each refinement along one set of paths."""
    noise, start = own_noise(e, 0, e.paths), e.start(e.paths)
    ends: dict[tuple[int, int], Tensor] = {}
    truth = None
    for level in range(e.finest, -1, -1):
        if level == e.finest and isinstance(e.truth, StochasticSolver):
            truth = solve(e.sde, e.truth, start, grid_of(e.ends, level), path=noise).y
        if level in e.levels:
            ends |= {(i, level): one.end(noise, level) for i, one in enumerate(series)}
        if level:
            noise = noise.coarser()
    if truth is None:
        assert e.exact is not None
        truth = e.exact(start, e.ends[1] - e.ends[0], noise.pieces[0].W)
    return [
        [float((ends[i, n] - truth).square().flatten(1).sum(1).mean().sqrt()) for n in e.levels]
        for i in range(len(series))
    ]


def _own(e: Experiment, solver: StochasticSolver) -> Series:
    start, shape = e.start(e.paths), e.noise_shape(e.paths)
    options: dict[str, Any] = {"seed": e.seed, "dtype": e.dtype, "device": e.device}

    def run(level: int) -> Tensor:
        path = path_for([solver.card.levy], shape, e.ends, 2 ** (e.levels[-1] + 1), **options)
        return solve(e.sde, solver, start, grid_of(e.ends, level), path=path).y

    def end(noise: Stored, level: int) -> Tensor:
        return solve(e.sde, solver, start, grid_of(e.ends, level), path=noise).y

    return Series(type(solver).__name__, "fewstep", [solver.card.evaluations * 2**n for n in e.levels], run, end)


def _theirs(e: Experiment, method: str, evaluations: int) -> Series:
    import torchsde

    start, shape = e.start(e.paths), e.noise_shape(e.paths)
    theirs, ts = TorchsdeSDE(e.sde, start.shape[-1]), torch.tensor(e.ends, dtype=torch.float64)
    area, length = "space-time" if method == "srk" else "none", e.ends[1] - e.ends[0]

    def run(level: int) -> Tensor:
        interval = torchsde.BrownianInterval(
            *e.ends, size=shape, dtype=e.dtype, device=e.device, entropy=e.seed,
            levy_area_approximation=area, dt=length / 2**level,
        )  # fmt: skip
        return end(interval, level)

    def end(noise: Any, level: int) -> Tensor:
        bm = BrownianView(noise) if isinstance(noise, Stored) else noise  # type: ignore[arg-type]
        out: Tensor = torchsde.sdeint(theirs, start, ts, bm=bm, method=method, dt=length / 2**level)[-1]
        return out

    return Series(method, "torchsde", [evaluations * 2**n for n in e.levels], run, end)


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    """The median time of a call."""
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def summary(record: Record) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a table: one row per series, at its finest refinement."""
    rows = [
        [one["package"], one["name"], f"{one['error'][-1]:.2e}", str(one["evaluations"][-1]),
         f"{one['seconds'][-1]:.3f}"]
        for one in record.data["series"]
    ]  # fmt: skip
    return ["package", "solver", "error", "evaluations", "seconds"], rows


def work_figure(record: Record, path: str | Path) -> Path:
    """Error against evaluations and against seconds; torchsde's methods dashed, diffrax's dotted."""
    figure, axes = canvas(9.6, 4.4, ncols=2, sharey=True)
    data = record.data
    for one in data["series"]:
        theirs = one["package"] != "fewstep"
        label = f"{one['package']} {one['name']}" if theirs else one["name"]
        shade = colour(COUNTERPARTS.get(one["name"], one["name"]))
        for panel, x in zip(axes, (one["evaluations"], one["seconds"]), strict=True):
            panel.loglog(x, one["error"], STYLES[one["package"]], color=shade, ms=3.5, lw=1, label=label,
                         alpha=0.75 if theirs else 1)  # fmt: skip
    axes[0].set_xlabel("drift evaluations per path")
    axes[1].set_xlabel(f"seconds for {data['paths']:,} paths, noise included")
    axes[0].set_ylabel(f"RMSE at t = {data['t1']:g}")
    axes[1].legend(fontsize=7.5)
    for panel in axes:
        panel.grid(True, which="major", alpha=0.3)
    figure.suptitle(f"{data['problem'].replace('_', ' ')}, against {data['truth']}", fontsize=10)
    return write(figure, path)


STYLES = {"fewstep": "o-", "torchsde": "s--", "diffrax": "^:"}
# methods of other packages have the colour of the same method here
COUNTERPARTS = {
    "euler": "EulerMaruyama", "milstein": "Milstein", "srk": "SRID2", "euler_heun": "EulerHeun",
    "heun": "Heun", "midpoint": "Midpoint", "reversible_heun": "ReversibleHeun",
    "Euler": "EulerMaruyama", "ItoMilstein": "Milstein",
}  # fmt: skip
