"""The tutorial's neural SDE of the sunspot numbers against an autoregression, by solver and steps per year.

The data, the network and its training are the programs of docs/tutorials/neural-sde.md.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewstep as fs
from base import ROOT, Experiment, Job, Record, canvas, progress, single_threaded, table, write

sys.path.insert(0, str(ROOT / "docs"))
import run_blocks

SOLVERS = {"ReversibleHeun": fs.ReversibleHeun(), "Heun": fs.Heun()}
STARTS = (1954, 1975, 1992)  # the last observed years of the forecasts in the figure
FIRST = 1700  # the first year of the series
LEVELS = (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class Budget:
    """Steps of a training, number of trainings, paths per forecast."""

    training: int
    trainings: int
    paths: int


BUDGETS = {"smoke": Budget(2, 1, 20), "paper": Budget(300, 3, 500)}


def tutorial(training: int, seed: int) -> dict[str, Any]:
    """What the tutorial's programs define, up to the trained network."""
    names: dict[str, Any] = {}
    for _, code, _ in list(run_blocks.blocks(ROOT / "docs" / "tutorials" / "neural-sde.md"))[:3]:
        code = code.replace("NeuralSDE(), 300", f"NeuralSDE(), {training}")
        exec(code.replace("manual_seed(0)", f"manual_seed({seed})"), names)
    return names


def autoregression(made: dict[str, Any], paths: int, seed: int) -> Tensor:
    """(windows, paths, years): paths of statsmodels' AR(9), fitted to the same years."""
    from statsmodels.tsa.ar_model import AutoReg

    past, held = made["past"], made["held"].double()
    fitted = AutoReg(made["series"][: made["last"]].double().numpy(), past).fit()
    constant, *weights = torch.as_tensor(fitted.params).unbind()
    generator = torch.Generator().manual_seed(seed)
    values = list(held[:, None, :past].expand(-1, paths, -1).unbind(2))
    for _ in range(made["years"]):
        noise = float(fitted.sigma2) ** 0.5 * torch.randn(values[0].shape, generator=generator, dtype=torch.float64)
        values.append(constant + sum(w * x for w, x in zip(weights, values[::-1])) + noise)
    return torch.stack(values[past:], 2).float()


def measure(budget: Budget, job: Job) -> dict[str, Record]:
    """Energy scores on the held-out years of each training, solver and number of steps, and of the baselines."""
    single_threaded()
    rows: list[dict[str, Any]] = []
    bands: list[Tensor] = []
    for k in progress(range(budget.trainings), "trainings"):
        made = tutorial(budget.training, job.seed + k)
        net, past, held, score = made["net"], made["past"], made["held"], made["energy_score"]
        start = held[:, :past]
        forecasts: dict[tuple[str, int | None], Tensor] = {
            (name, steps): net.forecast(start, budget.paths, job.seed + k, solver, steps)
            for name, solver in SOLVERS.items()
            for steps in (1, 2, 4)
        }
        forecasts["AR(9)", None] = autoregression(made, budget.paths, job.seed + k)
        forecasts["the years before", None] = made["train"][:, past:].expand(len(held), -1, -1)
        for (model, steps), paths in forecasts.items():
            found = score(paths, held[:, past:]).mean().item()
            rows.append({"model": model, "steps": steps, "training": k, "score": found})
        if k == 0:
            first = FIRST + made["last"] - 1  # the last observed year of the first window
            paths = net.forecast(held[[y - first for y in STARTS], :past], budget.paths, job.seed)
            levels = paths.quantile(torch.tensor(LEVELS), dim=1)  # (3, starts, years)
            bands = [(levels * made["std"] + made["mean"]).clamp(min=0).square()]
            observed = made["counts"].tolist()
    data = {"scores": rows, "bands": bands[0].tolist(), "observed": observed}
    return {"neural-sde": Record("neural SDE", data, job.seed)}


def tables(records: dict[str, Record]) -> dict[str, str]:
    """The mean score over the trainings by model and steps per year."""
    rows = records["neural-sde"].data["scores"]
    found: dict[tuple[str, int | None], list[float]] = {}
    for r in rows:
        found.setdefault((r["model"], r["steps"]), []).append(r["score"])
    lines = []
    for model in dict.fromkeys(r["model"] for r in rows):
        cells = []
        for steps in (1, 2, 4):
            of = torch.tensor(found.get((model, steps), found.get((model, None), [])))
            spread = f" ± {of.std():.2f}" if len(of) > 1 and model in SOLVERS else ""
            cells.append(f"{of.mean():.2f}{spread}")
        lines.append([f"neural SDE, `{model}`" if model in SOLVERS else model, *cells])
    return {"neural-sde": table(["forecast", "1 step per year", "2 steps", "4 steps"], lines)}


def draw(records: dict[str, Record], folder: Path) -> None:
    """The bands of the forecasts over the observed series."""
    data = records["neural-sde"].data
    low, median, high = data["bands"]
    drawing, panels = canvas(11, 3.2, ncols=len(STARTS), sharey=True)
    for axes, start, a, b, c in zip(panels, STARTS, low, median, high):
        now = data["observed"][start - FIRST]
        ahead, a, b, c = range(start, start + 1 + len(b)), [now, *a], [now, *b], [now, *c]
        shown = range(start - 11, ahead[-1] + 1)
        axes.fill_between(ahead, a, c, color="#0072B2", alpha=0.2, lw=0, label="80 % of the paths")
        axes.plot(ahead, b, color="#0072B2", label="median path")
        axes.plot(shown, [data["observed"][y - FIRST] for y in shown], "k.-", lw=1, label="observed")
        axes.axvline(start, color="0.6", lw=1, ls="--")
        axes.set(title=f"forecast from {start}", xlabel="year")
    panels[0].set(ylabel="sunspot number", ylim=(-5, 235))
    panels[0].legend(fontsize=8, loc="upper left")
    write(drawing, folder / "neural-sde.png")


EXPERIMENT = Experiment(
    "neural-sde", __doc__, 3, BUDGETS, measure, tables, draw, ("neural-sde",), ("neural-sde.png",), needs="statsmodels"
)

if __name__ == "__main__":
    EXPERIMENT.main()
