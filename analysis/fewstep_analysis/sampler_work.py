"""Work-precision of diffusion samplers: RMSE to the exact ODE's solution against network evaluations."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewstep as fs
from fewstep import InputError, _validation
from fewstep._progress import progress
from fewstep.compat import OfficialDPM
from fewstep.distances import median_distance, mmd, rmse, sliced_w2
from fewstep.grid import MOST, spacing_names
from fewstep.sampler_names import diffusion_solver_named
from fewstep.untrained import plan_of

from .diffusion_problems import DiffusionProblem, by_name
from .figures import canvas, colour, write
from .records import Record

EVALUATIONS = (3, 4, 5, 6, 8, 10, 13, 16, 20, 25, 32, 40, 50, 64, 80, 100)
SPACINGS = ("logsnr", "karras", "trailing")
REFERENCE_STEPS = 2000
MEASURES = ("rmse", "w2", "mmd")
Table = tuple[list[str], list[list[str]]]  # columns and rows

# the names of series in records and figures
SOLVERS: dict[str, fs.DiffusionSolver] = {
    "DDIM": fs.DDIM(), "EDMHeun": fs.EDMHeun(), "DPMSolver(2)": fs.DPMSolver(2), "DPMSolver(3)": fs.DPMSolver(3),
    "DPMSolverPP(2)": fs.DPMSolverPP(2), "DPMSolverPP(3)": fs.DPMSolverPP(3),
    "DPMSolverPP(3) official": OfficialDPM(fs.DPMSolverPP(3)),
    "DPMSolverPP(2S)": fs.DPMSolverPP(2, multistep=False), "DPMSolverPP(3S)": fs.DPMSolverPP(3, multistep=False),
    "DEIS(2)": fs.DEIS(2), "DEIS(3)": fs.DEIS(3), "DEIS(2, t)": fs.DEIS(2, "t"), "DEIS(3, t)": fs.DEIS(3, "t"),
    "DEIS(3, rho)": fs.DEIS(3, "rho"), "PNDM(plms)": fs.PNDM("plms"),
    "IPNDM(2)": fs.IPNDM(2), "IPNDM(3)": fs.IPNDM(3), "IPNDM(4)": fs.IPNDM(4),
    "IPNDM(4, variable)": fs.IPNDM(4, variable=True), "UniPC(2)": fs.UniPC(2), "UniPC(3)": fs.UniPC(3),
    "SASolver(3, tau=0)": fs.SASolver(3, 3, tau=0),
}  # fmt: skip


def _named(solver: str | fs.DiffusionSolver) -> tuple[str, fs.DiffusionSolver]:
    """The name of a solver's series, and the solver."""
    if isinstance(solver, str):
        if solver in SOLVERS:
            return solver, SOLVERS[solver]
        solver = diffusion_solver_named(solver, "solvers", lambda known: not known.card.levy)  # type: ignore[assignment]
    if not isinstance(solver, fs.DiffusionSolver):
        given = _validation.describe(solver)
        raise InputError(f"solvers: got {given}, expected diffusion solvers such as UniPC(3) or their names.")
    names = {repr(s): name for name, s in SOLVERS.items()}
    return names.get(repr(solver), repr(solver)), solver


def work_precision(
    problem: DiffusionProblem | str, nfe: Sequence[int] = EVALUATIONS, *,
    solvers: Iterable[str | fs.DiffusionSolver] | None = None, spacings: Sequence[str] = SPACINGS,
    samples: int = 2048, seed: int = 0, diffusers: bool = True,
) -> Record:  # fmt: skip
    """Errors of solvers on a problem whose score is exact.

    Args:
        problem: a `DiffusionProblem` or its name.
        nfe: network evaluations; a solver whose grids do not take exactly so many has the next fewer.
        solvers: solvers of the probability-flow ODE, or their names (`diffusion_solver_named`); by default those in
            SOLVERS.
        samples: number of initial states, the same for all series; float64 (float32 for diffusers).
        diffusers: also measure diffusers' schedulers, where the package is installed.

    Returns:
        a "work-precision" record of series {name, spacing, nfe, rmse, w2, mmd}: the RMSE of the vector at sigma = 0
        to RK4 in float64 with 2,000 steps; sliced W2 and MMD (Gaussian kernel whose width is the median distance of
        the data) to as many samples of the data. `w2_floor` and `mmd_floor` are those of fresh samples of the data.

    Raises:
        InputError: an unknown problem, solver or spacing, a stochastic solver, invalid numbers.
    """
    problem = by_name(problem) if isinstance(problem, str) else problem
    given = SOLVERS if solvers is None else solvers
    chosen = [_named(s) for s in _validation.check_sequence("solvers", given, "diffusion solvers")]
    for spacing in _validation.check_sequence("spacings", spacings, "names of spacings"):
        _validation.check_choice("spacings", spacing, spacing_names())
    for n in _validation.check_sequence("nfe", nfe, "integers of at least 2"):
        _validation.check_int("nfe", n, 2, MOST)
    samples = _validation.check_int("samples", samples, 2)
    seed = _validation.check_seed(seed)
    plans: dict[tuple[str, str], dict[int, fs.Plan]] = {}
    for name, solver in chosen:
        for spacing in spacings:
            found = [plan_of(solver, n, spacing, problem.schedule) for n in nfe]
            plans[name, spacing] = {plan.nfe: plan for plan in found if plan is not None}
            if any(plan.levy for plan in plans[name, spacing].values()):
                raise InputError(f"solvers: got {name}, which adds noise; expected ODE solvers.")
    noise = problem.noise(samples, seed)
    start = _alpha(problem) * noise
    truth, data = exact(problem, noise), problem.mixture.sample(samples, seed + 1)
    series = []
    with torch.no_grad():
        for (name, spacing), by_nfe in progress(list(plans.items()), "series"):
            points = [(n, *_errors(fs.sample(problem.problem, p, noise=start), truth, data)) for n, p in by_nfe.items()]
            series.append(_series(name, spacing, "fewstep", points))
        if diffusers:
            series += _diffusers_series(problem, nfe, noise, truth, data)
    fresh = problem.mixture.sample(samples, seed + 2)
    body = {
        "problem": problem.name, "samples": samples, "series": series, "w2_floor": sliced_w2(fresh, data),
        "mmd_floor": mmd(fresh, data, bandwidth=median_distance(data)),
    }  # fmt: skip
    return Record("work-precision", body, seed)


def exact(problem: DiffusionProblem, noise: Tensor, steps: int = REFERENCE_STEPS) -> Tensor:
    """The denoiser's estimate of x0 at sigma_min, at the end of the exact probability-flow ODE."""
    ends = torch.tensor([problem.schedule.sigma_max, problem.schedule.sigma_min, 0.0], dtype=torch.float64)
    return problem.mixture.flow(noise, ends, steps)[-1]


def _alpha(problem: DiffusionProblem) -> float:
    return float(problem.schedule.alpha(torch.tensor(problem.schedule.sigma_max, dtype=torch.float64)))


def _errors(x: Tensor, truth: Tensor, data: Tensor) -> tuple[float, ...]:
    """The errors in the order of MEASURES."""
    return rmse(x, truth), sliced_w2(x, data, projections=128), mmd(x, data, bandwidth=median_distance(data))


def _series(name: str, spacing: str, by: str, points: list[tuple[float, ...]]) -> dict[str, Any]:
    columns = [list(column) for column in zip(*points)] or [[] for _ in ("nfe", *MEASURES)]
    return {"name": name, "spacing": spacing, "by": by, **dict(zip(("nfe", *MEASURES), columns))}


def _diffusers_series(
    problem: DiffusionProblem, nfe: Sequence[int], noise: Tensor, truth: Tensor, data: Tensor
) -> list[dict[str, Any]]:
    """diffusers' schedulers in float32, with their own grids and labels."""
    if not isinstance(problem.schedule, fs.DiscreteVP):
        return []  # they need a table of betas
    try:
        import diffusers as df
    except ImportError:
        return []
    table = 1 / (1 + torch.exp(2 * problem.schedule.log_sigmas))
    betas = (1 - table / torch.cat([table.new_ones(1), table[:-1]])).tolist()
    options: dict[str, dict[str, Any]] = {
        "logsnr": {"use_lu_lambdas": True}, "karras": {"use_karras_sigmas": True},
        "trailing": {"timestep_spacing": "trailing"},
    }  # fmt: skip
    ddim = partial(df.DDIMScheduler, trained_betas=betas, clip_sample=False, **options["trailing"])
    made: list[tuple[str, str, Callable[[], Any]]] = [("DDIM", "trailing", ddim)]
    for name, kind, spacings in (
        ("DPM++ {}M", df.DPMSolverMultistepScheduler, [*options]),
        ("DEIS {}", df.DEISMultistepScheduler, ["karras"]),
        ("UniPC {}", df.UniPCMultistepScheduler, ["karras"]),
    ):
        for order, spacing in itertools.product((2, 3), spacings):
            scheduler = partial(kind, trained_betas=betas, solver_order=order, **options[spacing])
            made.append((name.format(order), spacing, scheduler))
    out = []
    for name, spacing, make in made:
        points = []
        for n in nfe:
            try:
                x = _run_diffusers(make(), n, problem, noise)
            except (IndexError, ValueError):  # some of its grids cannot run (duplicate labels)
                continue
            if bool(x.isfinite().all()):
                points.append((n, *_errors(x, truth, data)))
        out.append(_series(name, spacing, "diffusers", points))
    return out


def _run_diffusers(scheduler: Any, steps: int, problem: DiffusionProblem, noise: Tensor) -> Tensor:
    scheduler.set_timesteps(steps)
    x = (_alpha(problem) * noise).float()
    for t in scheduler.timesteps:
        sigma = problem.schedule.sigma(t.double()).float()
        at = x * torch.sqrt(1 + sigma**2)
        eps = (at - problem.mixture.denoiser(at, sigma)) / sigma
        x = scheduler.step(eps, t, x).prev_sample
    return x


def summary(record: Record, nfe: Sequence[int] = (5, 8, 10, 20, 50), spacing: str | None = None) -> Table:
    """Columns and rows of RMSEs by solver and spacing; evaluation counts other than the column's are in brackets."""
    rows = [
        [s["name"] + " (diffusers)" * (s["by"] == "diffusers"), s["spacing"],
         *(_cell(dict(zip(s["nfe"], s["rmse"])), n) for n in nfe)]
        for s in record.data["series"]
        if spacing in (None, s["spacing"]) and s["nfe"]
    ]  # fmt: skip
    return ["solver", "spacing", *map(str, nfe)], rows


def table(record: Record, nfe: Sequence[int] = (5, 8, 10, 20, 50), spacing: str | None = None) -> str:
    """The summary in Markdown, for the documentation."""
    columns, rows = summary(record, nfe, spacing)
    return "\n".join(f"| {' | '.join(line)} |" for line in [columns, ["---"] * len(columns), *rows])


def _cell(known: dict[int, float], n: int) -> str:
    near = max((k for k in known if n - 3 < k <= n), default=None)
    return "-" if near is None else f"{known[near]:.2g}" + f" ({near})" * (near != n)


# the solvers in figures, with markers and with colours where those of figures.py do not tell orders apart
SHOWN = {
    "DDIM": ("o", None), "DPMSolverPP(2)": ("s", None), "DPMSolverPP(3)": ("D", "#CC79A7"), "DEIS(3)": ("^", "#E69F00"),
    "IPNDM(4)": ("v", "#7A4FA3"), "UniPC(2)": ("P", "#B8860B"), "UniPC(3)": ("X", None), "EDMHeun": ("*", "#999999"),
}  # fmt: skip
# diffusers' schedulers and their counterparts
COUNTERPARTS = {
    "DPM++ 2M": "DPMSolverPP(2)", "DPM++ 3M": "DPMSolverPP(3)", "DEIS 3": "DEIS(3)", "UniPC 2": "UniPC(2)",
    "UniPC 3": "UniPC(3)",
}  # fmt: skip


def figure(record: Record, path: str | Path, spacings: Sequence[str] = ("logsnr", "karras")) -> Path:
    """One panel per spacing: solid lines for fewstep, dotted lines in the same colours for diffusers."""
    drawing, panels = canvas(5.2 * len(spacings), 4.8, ncols=len(spacings), sharey=True, squeeze=False)
    for axes, spacing in zip(panels[0], spacings):
        for s in record.data["series"]:
            name = COUNTERPARTS.get(s["name"], s["name"]) if s["by"] == "diffusers" else s["name"]
            if s["spacing"] != spacing or not s["nfe"] or name not in SHOWN:
                continue
            own, (mark, shade) = s["by"] == "fewstep", SHOWN[name]
            axes.loglog(
                s["nfe"], s["rmse"], color=shade or colour(name.split("(")[0]), marker=mark, ms=4 if own else 6,
                mfc=None if own else "none", lw=1.3 if own else 0.9, ls="-" if own else ":",
                label=name if own else f"diffusers {s['name']}",
            )  # fmt: skip
        axes.set_title(f"{record.data['problem']}, {spacing} grid", fontsize=10)
        axes.set_xlabel("network evaluations")
        axes.set_xticks([3, 5, 10, 20, 50, 100], ["3", "5", "10", "20", "50", "100"])
        axes.set_xticks([], minor=True)
        axes.set_ylim(top=2)  # the first points of Heun lie far above
        axes.grid(True, which="major", alpha=0.3)
        axes.legend(fontsize=7, loc="lower left")
    panels[0][0].set_ylabel("RMSE to the exact ODE's solution")
    return write(drawing, path)
