"""Sig-DEG on rough volatility: a teacher of 200 steps, a student of 10, judged by statistics of their paths.

Events are paths of rough Bergomi on 32 trading days. After the third experiment of arXiv 2508.16939, whose
parameters are not available to us: parameter sets, teacher and coding are our own.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fewstep as fs
from base import F64, Experiment, Job, Record, Row, canvas, colour, progress, table, write
from fewstep.brownian import FreshIncrements
from fewstep.grid import refined
from fewstep.learned.sigdeg.networks import DenoisingMLP
from fewstep.learned.training import seeded
from train_teachers import fit_denoiser
from volatility import RoughBergomi, Statistic, compare, rough_bergomi, statistics

NAME = "sigdeg-volatility"
DAYS = 32
EVENT = (2, DAYS)
SETS = {
    "rough": {"hurst": 0.1, "eta": 1.9, "rho": -0.9},
    "smoother": {"hurst": 0.3, "eta": 1.9, "rho": -0.7},
}
# Between equal steps of log sigma, which are too fine above 2, where a denoiser is nearly linear, and equal
# drops of the denoiser's root mean squared error, which are too coarse below 0.2.
LEVELS = (10.0, 2.4, 1.4, 0.9, 0.62, 0.43, 0.3, 0.2, 0.125, 0.07, 0.03)
STEPS = len(LEVELS) - 1
SCHEDULE = fs.EDM(sigma_min=LEVELS[-1], sigma_max=LEVELS[0])
LEVY = "K"
LIMIT = 1.2  # of the student's error over the teacher's, in each statistic
MARGINALS = ("price", "variance", "return")
CORRELATIONS = ("returns", "absolute", "squared", "leverage", "cross", "cross_log")
STATISTICS = (*MARGINALS, *CORRELATIONS, "roughness")
TEACHER, STUDENT, UNTRAINED, EVEN, EXACT = "teacher", "student", "untrained", "untrained, even", "exact"


@dataclass(frozen=True)
class Budget:
    """What a run computes.

    Attributes:
        data, iterations: paths and iterations of the teacher's training.
        substeps: of the teacher in each step of the student.
        trajectories, distillation, batch: trajectories, iterations and batch of the student's training.
        paths, seeds: samples for each of so many seeds.
        reference: exact paths that all samples are compared with.
    """

    data: int
    iterations: int
    substeps: int
    trajectories: int
    distillation: int
    batch: int
    paths: int
    seeds: int
    reference: int


BUDGETS = {
    "smoke": Budget(
        data=2_000, iterations=50, substeps=2, trajectories=64, distillation=5, batch=64, paths=300,
        seeds=2, reference=2_000,
    ),
    "paper": Budget(
        data=200_000, iterations=10_000, substeps=20, trajectories=16_384, distillation=2400, batch=128,
        paths=12_000, seeds=3, reference=200_000,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Coding:
    """Paths as events (n, 2, days) of about unit size, and back.

    Channel 0 is asinh(r / width) / spread of the log-returns r, since their tails are those of a lognormal
    mixture; channel 1 is log v at the end of each day, standardised day by day.

    Attributes:
        width: the median of |r|.
        spread: standard deviation of asinh(r / width).
        mean, std: (days,) float64, of log v.
        start: v at time 0, the same for all paths.
    """

    width: float
    spread: float
    mean: Tensor
    std: Tensor
    start: float

    @classmethod
    def of(cls, paths: RoughBergomi) -> Coding:
        """Fitted to a sample."""
        r, log_v = paths.log_price.diff(dim=1), paths.variance[:, 1:].log()
        width = float(r.abs().median())
        spread = float(torch.asinh(r / width).std())
        return cls(width, spread, log_v.mean(0), log_v.std(0), float(paths.variance[0, 0]))

    def encode(self, paths: RoughBergomi) -> Tensor:
        """(n, 2, days) float32."""
        r = torch.asinh(paths.log_price.diff(dim=1) / self.width) / self.spread
        return torch.stack([r, (paths.variance[:, 1:].log() - self.mean) / self.std], 1).float()

    def decode(self, events: Tensor) -> tuple[Tensor, Tensor]:
        """(log_price, variance), each (n, days + 1) float64."""
        r, log_v = events.to(F64).unbind(1)
        log_price = (self.width * torch.sinh(self.spread * r)).cumsum(1)
        variance = torch.exp(self.mean + self.std * log_v)
        pad = nn.functional.pad
        return pad(log_price, (1, 0)), pad(variance, (1, 0), value=self.start)


class Stepwise(nn.Module):
    """`(x, sigma, sigma_next, xi) -> x0`: a denoiser that receives the signature, plus a linear map per step.

    Log v is Gaussian, and the best student of Gaussian data is linear in x and xi. The denoiser alone, whose
    hidden layers are hardly wider than these, learns the fine part of that map slowly. The linear maps are
    initialised to zero.

    Args:
        denoiser: the teacher's network; its weights are copied.
        letters: coordinates of the signature.
        levels: (steps,) noise levels of the evaluations.
    """

    def __init__(self, denoiser: DenoisingMLP, letters: int, levels: Tensor) -> None:
        super().__init__()
        self.base: DenoisingMLP = denoiser.with_signature(letters)
        size = math.prod(denoiser.config["event"])
        self.levels: Tensor
        self.register_buffer("levels", levels.float())
        self.linear: nn.Parameter = nn.Parameter(torch.zeros(len(levels), size, size * (1 + letters)))

    def forward(self, x: Tensor, sigma: Tensor, sigma_next: Tensor, xi: Tensor) -> Tensor:
        step = (self.levels - sigma).abs().argmin()
        norm = (sigma.square() + self.base.data_std**2).rsqrt()
        inputs = torch.cat([(x * norm).flatten(1), xi.flatten(1)], 1)
        added = sigma * norm * (inputs @ self.linear[step].mT).reshape(x.shape)
        return self.base(x, sigma, sigma_next, xi) + added  # type: ignore[no-any-return]


def exact(model: dict[str, float], paths: int, seed: int, first: int = 0) -> RoughBergomi:
    """Paths of 32 trading days of 1/252 year, in float64."""
    return rough_bergomi(paths, DAYS, horizon=DAYS / 252, seed=seed, first=first, dtype=F64, **model)  # type: ignore[arg-type]


def grid(substeps: int = 1) -> Tensor:
    """(10 substeps + 1,) the student's noise levels, with equal steps of log sigma between them."""
    return refined(torch.tensor(LEVELS, dtype=F64), substeps)


def measure(budget: Budget, job: Job) -> dict[str, Record]:
    """Both sets of parameters."""
    steps = {TEACHER: STEPS * budget.substeps, STUDENT: STEPS, UNTRAINED: STEPS, EVEN: STEPS}
    sets = {name: measure_set(SETS[name], budget, job.seed) for name in progress(list(SETS), "set")}
    data = {
        "sets": sets, "settings": asdict(budget), "levels": list(LEVELS), "levy": LEVY, "limit": LIMIT,
        "days": DAYS, "evaluations": steps, "network": {"width": 256, "depth": 3},
    }  # fmt: skip
    return {NAME: Record(NAME, data, job.seed)}


def measure_set(model: dict[str, float], budget: Budget, seed: int) -> Row:
    """Train, distil, sample and compare, for one set of parameters.

    Returns:
        for each sampler its statistics and their errors, over the paths of all seeds together and for each
        seed alone; ratios, verdicts and seconds.
    """
    seconds, last = dict[str, float](), time.perf_counter()

    def lap(stage: str) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[stage], last = round(now - last, 1), now

    paths = exact(model, budget.data, seed)
    coding = Coding.of(paths)
    network = seeded(seed, lambda: DenoisingMLP(EVENT, data_std=1.0))
    denoiser = fit_denoiser(network, coding.encode(paths), SCHEDULE, budget.iterations, seed)
    problem = fs.DiffusionModel(denoiser.requires_grad_(False), SCHEDULE)
    lap("training of the teacher")
    student, report = distil(problem, budget, seed)
    lap("distillation")
    held = exact(model, budget.reference, seed, budget.data)
    other = exact(model, budget.paths * budget.seeds, seed, budget.data + budget.reference)
    truth = statistics(held.log_price, held.variance)
    errors = {EXACT: compare_parts((other.log_price, other.variance), truth, budget.seeds)}
    lap("exact paths")
    for name, sampler in samplers(student, budget.substeps).items():
        seeds = range(1 + seed * budget.seeds, 1 + (seed + 1) * budget.seeds)
        events = torch.cat([draw_samples(problem, sampler, budget.paths, s) for s in seeds])
        lap(name)
        errors[name] = compare_parts(coding.decode(events), truth, budget.seeds)
    return {
        "model": model, "errors": errors, "reference": values(truth), "seconds": seconds,
        "ratio": {n: errors[STUDENT][n]["error"] / errors[TEACHER][n]["error"] for n in STATISTICS},
        "verdict": {n: verdict(errors, n) for n in STATISTICS},
        "student_rmse": report.student_rmse, "parent_rmse": report.parent_rmse, "losses": report.losses,
    }  # fmt: skip


def distil(problem: fs.DiffusionModel, budget: Budget, seed: int) -> tuple[Any, Any]:
    """The student, and the report of its training."""
    levels, denoiser = grid(), problem.denoiser
    assert isinstance(denoiser, DenoisingMLP)
    network = seeded(seed, lambda: Stepwise(denoiser, 1 + "WHK".index(LEVY), levels[:-1]))
    return fs.distill_sigdeg(
        problem, event_shape=EVENT, sigmas=levels, levy=LEVY, network=network, seed=seed,
        teacher_options=fs.TeacherOptions(substeps=budget.substeps, trajectories=budget.trajectories),
        training=fs.TrainingOptions(budget.distillation, budget.batch),
    )  # fmt: skip


def samplers(student: Any, substeps: int) -> dict[str, Any]:
    """Teacher and student; and the teacher in ten steps, on the student's noise levels and on even ones."""
    euler = fs.EulerMaruyama()
    even = fs.sigma_grid(SCHEDULE, STEPS, "logsnr", "sigma_min")
    plans = {UNTRAINED: euler.plan(grid()), EVEN: euler.plan(even)}
    return {TEACHER: euler.plan(grid(substeps)), STUDENT: student} | plans


@torch.no_grad()
def draw_samples(problem: fs.DiffusionModel, sampler: Any, paths: int, seed: int, block: int = 1000) -> Tensor:
    """(paths, 2, days) samples of a plan or a student."""
    parts = list[Tensor]()
    for first in range(0, paths, block):
        shape, number = (min(block, paths - first), *EVENT), 1_000_003 * seed + first
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(2 * number)) * LEVELS[0]
        path = FreshIncrements(shape, levy=LEVY, seed=2 * number + 1)
        parts.append(fs.sample(problem, sampler, noise=noise, path=path))
    return torch.cat(parts)


def verdict(errors: Row, name: str) -> str:
    """Of one statistic: "met", "within noise" or "missed".

    "within noise" are a student and a teacher whose errors are at most those of two exact samples.
    """
    student, teacher = (errors[k][name]["error"] for k in (STUDENT, TEACHER))
    if student <= LIMIT * teacher:
        return "met"
    floor = max(errors[EXACT][name]["error"], errors[EXACT][name]["noise"])
    return "within noise" if max(student, teacher) <= floor else "missed"


def compare_parts(paths: tuple[Tensor, Tensor], truth: dict[str, Statistic], parts: int) -> Row:
    """Error and noise of each statistic, over all paths and for each of so many parts."""
    found = statistics(*paths)
    all_paths, small = compare(found, truth), values(found)
    by_part = [compare(statistics(*some), truth) for some in zip(*(p.chunk(parts) for p in paths))]
    return {
        n: all_paths[n]._asdict() | {"by_seed": [p[n].error for p in by_part], "value": small.get(n, {}).get("value")}
        for n in STATISTICS
    }


def values(found: dict[str, Statistic]) -> dict[str, dict[str, list[float]]]:
    """Those statistics that have few numbers, as lists."""
    few = {n: s for n, s in found.items() if n not in MARGINALS}
    return {n: {k: v.tolist() for k, v in s._asdict().items()} for n, s in few.items()}


def tables(records: dict[str, Record]) -> dict[str, str]:
    """For each set of parameters the error of each sampler in each statistic, and student over teacher."""
    data, parts = records[NAME].data, []
    for found in data["sets"].values():
        model, errors = found["model"], found["errors"]
        head = [
            "statistic",
            "exact",
            *(f"{name}, {n}" for name, n in data["evaluations"].items()),
            "ratio",
            " ",
        ]
        rows = [
            [n, *(f"{errors[k][n]['error']:.2g}" for k in (EXACT, *data["evaluations"])), f"{ratio:.2f}",
             found["verdict"][n]]
            for n, ratio in found["ratio"].items()
        ]  # fmt: skip
        better = {n: errors[STUDENT][n]["error"] < errors[UNTRAINED][n]["error"] for n in CORRELATIONS}
        yes, no = (", ".join(n for n in CORRELATIONS if better[n] == side) or "none" for side in (True, False))
        parts.append(f"H = {model['hurst']:g}, η = {model['eta']:g}, ρ = {model['rho']:g}:\n\n{table(head, rows)}")
        parts.append(f"Correlations closer than untrained at the same steps: {yes}; not: {no}.")
    return {NAME: "\n\n".join(parts)}


def draw(records: dict[str, Record], folder: Path) -> None:
    """One panel per set: each statistic's error for each sampler, the noise of the samples in grey."""
    data = records[NAME].data
    figure, panels = canvas(9.6, 4.8, ncols=len(data["sets"]), sharey=True, squeeze=False)
    for axes, (name, found) in zip(panels[0], data["sets"].items(), strict=True):
        draw_panel(axes, found, data["evaluations"])
        hurst, eta, rho = (found["model"][k] for k in ("hurst", "eta", "rho"))
        axes.set_title(f"{name}: H = {hurst:g}, η = {eta:g}, ρ = {rho:g}", fontsize=10)
    panels[0, 0].invert_yaxis()
    words = "error against exact paths (marginals: W1; others: root mean square over lags or orders)"
    figure.supxlabel(words, fontsize=10)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=9, frameon=False)
    write(figure, folder / f"{NAME}.svg")


def draw_panel(axes: Any, found: Row, steps: dict[str, int]) -> None:
    """Errors from left to right; at the right the ratio, bold where the limit is missed."""
    errors, y, at = found["errors"], list(range(len(STATISTICS))), ("axes fraction", "data")
    floor = [max(errors[EXACT][n]["noise"], errors[EXACT][n]["error"]) for n in STATISTICS]
    least = min(floor) / 3
    axes.set_axisbelow(True)
    axes.grid(True, axis="x", alpha=0.3)
    axes.barh(y, [f - least for f in floor], left=least, color="0.87", height=0.8, label="two exact samples")
    for kind, shade, mark, shift in (
        (TEACHER, "k", "o", -0.2), (STUDENT, colour("SigSampler"), "D", 0.0),
        (UNTRAINED, colour("EulerMaruyama"), "s", 0.2),
    ):  # fmt: skip
        x = [errors[kind][n]["error"] for n in STATISTICS]
        axes.plot(x, [k + shift for k in y], mark, color=shade, ms=5, label=f"{kind}, {steps[kind]} steps")
    for k, n in enumerate(STATISTICS):
        weight = "bold" if found["verdict"][n] == "missed" else "normal"
        axes.annotate(f"{found['ratio'][n]:.2f}", (1.02, k), xycoords=at, fontsize=9, va="center",
                      weight=weight, annotation_clip=False)  # fmt: skip
    axes.annotate("student /\nteacher", (1.0, -0.9), xycoords=at, fontsize=8, va="bottom",
                  annotation_clip=False)  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(left=least)
    axes.set_yticks(y, [n.replace("_", " ") for n in STATISTICS])


EXPERIMENT = Experiment(NAME, __doc__, 25, BUDGETS, measure, tables, draw, figures=(f"{NAME}.svg",))

if __name__ == "__main__":
    EXPERIMENT.main()
