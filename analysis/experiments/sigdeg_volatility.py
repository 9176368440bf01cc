"""Sig-DEG on rough volatility: a teacher of 200 steps and a student of 10, judged by their paths' statistics.

Events are paths of rough Bergomi on 32 trading days. The third experiment of arXiv 2508.16939, whose
parameters are not available to us: sets, teacher and coding are our own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import fewstep as fs
from fewstep.brownian import FreshIncrements
from fewstep.grid import refined
from fewstep.learned.sigdeg.networks import DenoisingMLP
from fewstep.learned.training import seeded
from fewstep_analysis.figures import canvas, colour, write
from fewstep_analysis.records import Record
from fewstep_analysis.teachers import fit_denoiser
from fewstep_analysis.volatility import (
    Difference,
    RoughBergomi,
    Statistic,
    compare,
    rough_bergomi,
    statistics,
)

TAKES = "25 min"
if TYPE_CHECKING:
    from matplotlib.axes import Axes

F64 = torch.float64
DAYS = 32
EVENT = (2, DAYS)
SETS = {
    "rough": {"hurst": 0.1, "eta": 1.9, "rho": -0.9},
    "smoother": {"hurst": 0.3, "eta": 1.9, "rho": -0.7},
}
# Between equal steps of log sigma, which are too fine above 2, where a denoiser is nearly linear, and equal
# drops of the denoiser's root mean squared error, which are too coarse below 0.2.
LEVELS = (10.0, 2.4, 1.4, 0.9, 0.62, 0.43, 0.3, 0.2, 0.125, 0.07, 0.03)
SCHEDULE = fs.EDM(sigma_min=LEVELS[-1], sigma_max=LEVELS[0])
LEVY = "K"
LIMIT = 1.2  # of the student's error to the teacher's, in each statistic
MARGINALS = ("price", "variance", "return")
CORRELATIONS = ("returns", "absolute", "squared", "leverage", "cross", "cross_log")
NAMES = (*MARGINALS, *CORRELATIONS, "roughness")
TEACHER, STUDENT, UNTRAINED, EVEN, EXACT = "teacher", "student", "untrained", "untrained, even", "exact"


@dataclass(frozen=True)
class Budget:
    """How much of everything.

    Attributes:
        data, iterations: paths and iterations of the teacher's training.
        substeps: of the teacher in each step of the student.
        trajectories, distillation: of the teacher's, and iterations of the student's training.
        batch: of the latter.
        paths, seeds: of the samples, for each of so many seeds.
        reference: exact paths that all samples are held against.
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


PAPER = Budget(200_000, 10_000, 20, 16_384, 2400, 128, 12_000, 3, 200_000)
SMOKE = Budget(2_000, 100, 2, 128, 10, 128, 500, 2, 2_000)


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
    """`(x, sigma, sigma_next, xi) -> x0`: a denoiser told the signature, and a linear map for each step.

    Log v is Gaussian, and the best student of Gaussian data is linear in x and xi. The denoiser alone, whose
    hidden layer is hardly wider than these, learns the fine part of that map slowly. Nought at birth.

    Args:
        denoiser: the teacher's network; its weights are copied.
        letters: coordinates of the signature.
        levels: (steps,) of the evaluations.
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
    """(10 substeps + 1,) the student's levels, with equal steps of log sigma between them."""
    return refined(torch.tensor(LEVELS, dtype=F64), substeps)


@torch.no_grad()
def draw(problem: fs.DiffusionModel, sampler: Any, paths: int, seed: int, block: int = 1000) -> Tensor:
    """(paths, 2, days) samples of a plan or a student, on noise of the seed."""
    parts = list[Tensor]()
    for first in range(0, paths, block):
        shape, number = (min(block, paths - first), *EVENT), 1_000_003 * seed + first
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(2 * number)) * LEVELS[0]
        path = FreshIncrements(shape, levy=LEVY, seed=2 * number + 1)
        parts.append(fs.sample(problem, sampler, noise=noise, path=path))
    return torch.cat(parts)


def train(data: Tensor, iterations: int, seed: int) -> fs.DiffusionModel:
    """The teacher: a denoiser of events."""
    network = seeded(seed, lambda: DenoisingMLP(EVENT, data_std=1.0))
    return fs.DiffusionModel(
        fit_denoiser(network, data, SCHEDULE, iterations, seed).requires_grad_(False), SCHEDULE
    )


def distil(problem: fs.DiffusionModel, budget: Budget, seed: int) -> tuple[Any, Any]:
    """The student and the report of its training."""
    levels = grid()
    network = seeded(seed, lambda: Stepwise(problem.denoiser, 1 + "WHK".index(LEVY), levels[:-1]))  # type: ignore[arg-type]
    return fs.distill_sigdeg(
        problem, event_shape=EVENT, sigmas=levels, teacher_steps=budget.substeps * (len(levels) - 1),
        levy=LEVY, network=network, trajectories=budget.trajectories,
        iterations=budget.distillation, batch=budget.batch, seed=seed,
    )  # fmt: skip


def judge(errors: dict[str, dict[str, Any]], name: str) -> str:
    """Of one statistic: "met", "within noise" or "missed".

    Within noise are a student and a teacher neither of which is farther off than two exact samples would be.
    """
    student, teacher = errors[STUDENT][name], errors[TEACHER][name]
    if student["error"] <= LIMIT * teacher["error"]:
        return "met"
    floor = max(errors[EXACT][name]["error"], errors[EXACT][name]["noise"])
    return "within noise" if max(student["error"], teacher["error"]) <= floor else "missed"


def measure(
    model: dict[str, float], budget: Budget, seed: int, say: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """One set of parameters: train, distil, sample, compare.

    Returns:
        plain numbers: for each sampler its statistics, their errors over the paths of all seeds together and
        for each seed alone; ratios, verdicts and seconds.
    """
    seconds, last = dict[str, float](), time.perf_counter()

    def lap(stage: str) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[stage], last = round(now - last, 1), now
        say(f"{stage}: {seconds[stage]} s")

    paths = exact(model, budget.data, seed)
    coding = Coding.of(paths)
    problem = train(coding.encode(paths), budget.iterations, seed)
    lap("training of the teacher")
    student, report = distil(problem, budget, seed)
    lap("distillation")
    held = exact(model, budget.reference, seed, budget.data)
    other = exact(model, budget.paths * budget.seeds, seed, budget.data + budget.reference)
    truth = statistics(held.log_price, held.variance)
    rows = {EXACT: compared((other.log_price, other.variance), truth, budget.seeds)}
    lap("exact paths")
    for name, sampler in samplers(student, budget.substeps).items():
        seeds = range(1 + seed * budget.seeds, 1 + (seed + 1) * budget.seeds)
        events = torch.cat([draw(problem, sampler, budget.paths, s) for s in seeds])
        lap(name)
        rows[name] = compared(coding.decode(events), truth, budget.seeds)
    say(", ".join(f"{n} {judge(rows, n)}" for n in NAMES))
    return {
        "model": model, "errors": rows, "reference": words(truth), "seconds": seconds,
        "ratio": {n: rows[STUDENT][n]["error"] / rows[TEACHER][n]["error"] for n in NAMES},
        "verdict": {n: judge(rows, n) for n in NAMES},
        "student_rmse": report.student_rmse, "parent_rmse": report.parent_rmse, "losses": report.losses,
    }  # fmt: skip


def samplers(student: Any, substeps: int) -> dict[str, Any]:
    """Teacher and student; and the teacher in ten steps, on the student's levels and on even ones."""
    euler = fs.EulerMaruyama()
    even = fs.sigma_grid(SCHEDULE, len(LEVELS) - 1, "logsnr", "sigma_min")
    return {
        TEACHER: euler.plan(grid(substeps)), STUDENT: student,
        UNTRAINED: euler.plan(grid()), EVEN: euler.plan(even),
    }  # fmt: skip


def compared(paths: tuple[Tensor, Tensor], truth: dict[str, Statistic], parts: int) -> dict[str, Any]:
    """Error and noise of each statistic, over all paths and for each of so many parts."""
    found = statistics(*paths)
    rows: dict[str, Any] = {n: compare(found, truth)[n]._asdict() for n in NAMES}
    by_part = list[dict[str, Difference]]()
    for some in zip(*(p.chunk(parts) for p in paths), strict=True):
        by_part.append(compare(statistics(*some), truth))
    values = words(found)
    for n in NAMES:
        rows[n] |= {"by_seed": [p[n].error for p in by_part], "value": values.get(n, {}).get("value")}
    return rows


def words(found: dict[str, Statistic]) -> dict[str, dict[str, list[float]]]:
    """Those with few numbers, as lists."""
    few = {n: s for n, s in found.items() if n not in MARGINALS}
    return {n: {k: v.tolist() for k, v in s._asdict().items()} for n, s in few.items()}


def study(seed: int = 0, budget: Budget = PAPER, say: Callable[[str], None] = lambda _: None) -> Record:
    """Both sets of parameters."""
    sets = {}
    for name, model in SETS.items():
        say(name)
        sets[name] = measure(model, budget, seed, say)
    steps = len(LEVELS) - 1
    evaluations = {TEACHER: steps * budget.substeps, STUDENT: steps, UNTRAINED: steps, EVEN: steps}
    data = {
        "sets": sets, "settings": asdict(budget), "levels": list(LEVELS), "levy": LEVY, "limit": LIMIT,
        "days": DAYS, "evaluations": evaluations, "network": {"width": 256, "depth": 3},
    }  # fmt: skip
    return Record("sigdeg-volatility", data, seed)


def table(record: Record) -> str:
    """Errors of each sampler, the exact sample's, the ratio and the verdict."""
    lines = list[str]()
    order = (EXACT, TEACHER, STUDENT, UNTRAINED, EVEN)
    for name, found in record.data["sets"].items():
        lines += [f"{name}: " + ", ".join(f"{k} = {v:g}" for k, v in found["model"].items()), ""]
        lines += ["| statistic | " + " | ".join(order) + " | ratio | verdict |", "| --- " * 8 + "|"]
        for n in NAMES:
            cells = [f"{found['errors'][k][n]['error']:.2g}" for k in order]
            lines.append(
                f"| {n} | " + " | ".join(cells) + f" | {found['ratio'][n]:.2f} | {found['verdict'][n]} |"
            )
        lines += ["", kept(found["errors"]), ""]
    return "\n".join(lines)


def kept(errors: dict[str, Any]) -> str:
    """Whether the student keeps the correlations better than the teacher's sampler in as many steps."""

    def closer(n: str) -> bool:
        return bool(errors[STUDENT][n]["error"] < errors[UNTRAINED][n]["error"])

    yes, no = [n for n in CORRELATIONS if closer(n)], [n for n in CORRELATIONS if not closer(n)]
    text = f"correlations nearer than untrained at the same steps: {', '.join(yes) or 'none'}"
    return text + (f"; not: {', '.join(no)}" if no else "")


STYLES = {
    TEACHER: ("k", "o", -0.2), STUDENT: (colour("SigSampler"), "D", 0.0),
    UNTRAINED: (colour("EulerMaruyama"), "s", 0.2),
}  # fmt: skip


def draw_figure(record: Record, path: str | Path) -> Path:
    """A panel a set: each statistic's error for each sampler, the noise of the samples in grey."""
    sets = record.data["sets"]
    figure, panels = canvas(9.6, 4.8, ncols=len(sets), sharey=True, squeeze=False)
    for axes, (name, found) in zip(panels[0], sets.items(), strict=True):
        _panel(axes, found, record.data["evaluations"])
        hurst, eta, rho = (found["model"][k] for k in ("hurst", "eta", "rho"))
        axes.set_title(f"{name}: H = {hurst:g}, η = {eta:g}, ρ = {rho:g}", fontsize=10)
    panels[0, 0].invert_yaxis()
    text = "error against exact paths (marginals: W1; others: root mean square over lags or orders)"
    figure.supxlabel(text, fontsize=10)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=9, frameon=False)
    return write(figure, path)


def _panel(axes: Axes, found: dict[str, Any], steps: dict[str, int]) -> None:
    """Errors from left to right; at the right the ratio, bold where the limit is missed."""
    errors, y, at = found["errors"], list(range(len(NAMES))), ("axes fraction", "data")
    floor = [max(errors[EXACT][n]["noise"], errors[EXACT][n]["error"]) for n in NAMES]
    least = min(floor) / 3
    axes.set_axisbelow(True)
    axes.grid(True, axis="x", alpha=0.3)
    axes.barh(y, [f - least for f in floor], left=least, color="0.87", height=0.8, label="two exact samples")
    for kind, (shade, mark, shift) in STYLES.items():
        label = f"{kind}, {steps[kind]} steps"
        x = [errors[kind][n]["error"] for n in NAMES]
        axes.plot(x, [k + shift for k in y], mark, color=shade, ms=5, label=label)
    for k, n in enumerate(NAMES):
        weight = "bold" if found["verdict"][n] == "missed" else "normal"
        axes.annotate(f"{found['ratio'][n]:.2f}", (1.02, k), xycoords=at, fontsize=9, va="center",
                      weight=weight, annotation_clip=False)  # fmt: skip
    axes.annotate("student /\nteacher", (1.0, -0.9), xycoords=at, fontsize=8, va="bottom",
                  annotation_clip=False)  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(left=least)
    axes.set_yticks(y, [n.replace("_", " ") for n in NAMES])


def run(out: Path, *, budget: str = "paper", seed: int = 0, device: torch.device | str = "cpu") -> list[str]:
    """Write the record and the figure; returns the table. On one core: 20 minutes, or seconds for smoke."""
    record = study(seed, SMOKE if budget == "smoke" else PAPER, print)
    record.save(out / "records" / "sigdeg-volatility.json")
    draw_figure(record, out / "figures" / "sigdeg-volatility.svg")
    return [table(record)]
