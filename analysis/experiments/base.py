"""What all experiments share: budgets, the command line, records, Markdown tables, small helpers for figures.

An experiment is one script that reads from top to bottom: a frozen dataclass `Budget`, `measure` (runs the
experiment and returns Records), `tables` (Records to Markdown), `draw` (Records to figures), and at the end
an `Experiment` that names these parts. Run it from a checkout with

    python analysis/experiments/NAME.py --budget smoke
"""

from __future__ import annotations

import argparse
import ast
import base64
import dataclasses
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep._distributed import is_first
from fewstep._progress import progress
from fewstep.errors import InputError, one_of
from fewstep_analysis.figures import canvas, colour, image_rows, write
from fewstep_analysis.parallel import processes
from fewstep_analysis.records import Record

__all__ = [
    "F64", "Experiment", "Job", "Record", "Row", "canvas", "colour", "curve", "images_figure", "packed",
    "progress", "rms", "table", "ticks", "write",
]  # fmt: skip

F64 = torch.float64
ROOT = Path(__file__).resolve().parents[2]
RECORDS, FIGURES = ROOT / "analysis" / "records", ROOT / "docs" / "figures"
NAMES = (
    "headline-orders", "strong-order", "work-precision", "brownian-figures", "brownian-speed",
    "sampler-overhead", "speed-rows", "benchmarks", "compared", "fitted-grids", "dode-ring", "dode-problems",
    "dode-mnist", "mnist-frechet", "fitted-tables", "learned-comparison", "table-extras", "sfddm-digits",
    "sfddm-mnist", "sigdeg-order", "sigdeg-mixture", "sigdeg-ablation", "sigdeg-volatility", "sigdeg-mnist",
    "two-moons", "neural-sde", "adaptive-steps", "stiff", "expectation", "gpu",
)  # fmt: skip
Records = Mapping[str, Record]
Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """The settings of a run that are not part of its budget.

    Attributes:
        seed: seeds every random number.
        device: where the experiment computes.
        work: folder for checkpoints and finished parts; an interrupted run resumes from it.
    """

    seed: int
    device: str
    work: Path


@dataclass(frozen=True)
class Experiment:
    """One experiment: what it costs, what it writes, and the three functions that it is made of.

    Attributes:
        name: of the script, with dashes.
        summary: the script's docstring.
        minutes: approximate time of the paper budget on one CPU core, or on one GPU.
        budgets: "smoke" and "paper" to an instance of the script's `Budget`.
        measure: `(budget, job) -> records` by file name, or pairs (file name, record), each saved when it is made.
        tables: `(records) -> Markdown tables` by name; the documentation includes them.
        draw: `(records, folder)` writes the figures.
        records, figures: names of the files written.
        seed: default seed.
        needs: what must be at hand, in words.
        device: default device.
    """

    name: str
    summary: str
    minutes: int
    budgets: Mapping[str, Any]
    measure: Callable[[Any, Job], dict[str, Record] | Iterable[tuple[str, Record]]]
    tables: Callable[[Records], dict[str, str]] = lambda records: {}
    draw: Callable[[Records, Path], None] = lambda records, folder: None
    records: tuple[str, ...] = ()
    figures: tuple[str, ...] = ()
    seed: int = 0
    needs: str = ""
    device: str = "cpu"

    def run(
        self, budget: str = "paper", out: Path | None = None, *, seed: int | None = None, device: str | None = None,
        changes: Mapping[str, Any] | None = None,
    ) -> dict[str, Record]:  # fmt: skip
        """Measure, save the records and draw the figures.

        Args:
            budget: a key of `budgets`.
            out: folder that receives `records`, `figures` and `work`; None writes to those of the checkout.
            seed: None takes the experiment's own.
            device: as for `torch.device`; None takes the experiment's own.
            changes: fields of the budget to replace.
        """
        if budget not in self.budgets:
            raise one_of("budget", budget, self.budgets)
        seed, chosen = self.seed if seed is None else seed, vars(self.budgets[budget])
        device = self.device if device is None else device
        for name in changes or {}:
            if name not in chosen:
                raise one_of("changes", name, chosen)
        records, figures, work = folders(out)
        job = Job(seed, device, work / f"{self.name}-{budget}-{seed}")
        facts, made = {"command": self.command(budget, seed, changes or (), device)}, {}
        found = self.measure(dataclasses.replace(self.budgets[budget], **(changes or {})), job)
        for name, record in found.items() if isinstance(found, dict) else found:
            made[name] = dataclasses.replace(record, made=record.made | facts) if is_first() else record
            if is_first():
                made[name].save(records / f"{name}.json")
        if is_first() and importlib.util.find_spec("matplotlib"):
            self.draw(made, figures)
        elif is_first() and self.figures:
            print("figures not drawn: matplotlib is not installed; use --redraw where it is", file=sys.stderr)
        return made

    def command(
        self, budget: str = "paper", seed: int | None = None, changes: Any = (), device: str | None = None
    ) -> str:
        """The shell command of a run."""
        device = self.device if device is None else device
        words = [f"python analysis/experiments/{self.name.replace('-', '_')}.py"]
        words += [f"--device {device}"] if (device, self.device) != ("cpu", "cpu") else []
        words += [f"--budget {budget}"] + ([f"--seed {seed}"] if seed not in (None, self.seed) else [])
        return " ".join(words + [f"--set {k}={v!r}" for k, v in dict(changes).items()])

    def saved(self, folder: Path = RECORDS) -> dict[str, Record]:
        """The records of this experiment that lie in a folder."""
        files = {name: folder / f"{name}.json" for name in self.records or (self.name,)}
        return {name: Record.load(file) for name, file in files.items() if file.exists()}

    def main(self) -> None:
        """The script's command line."""
        where = "CPU core" if self.device == "cpu" else "GPU"
        about = f"{self.summary}\nThe paper budget takes about {self.minutes} min on one {where}."
        about += f" Needs {self.needs}." if self.needs else ""
        parser = argparse.ArgumentParser(
            description=about, formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=f"Example: {self.command('smoke')}",
        )  # fmt: skip
        parser.add_argument("--budget", choices=list(self.budgets), default="smoke", help="default: smoke")
        places = "folder of records, figures and checkpoints; default: the checkout for paper, temporary for smoke"
        parser.add_argument("--out", type=Path, help=places)
        parser.add_argument("--seed", type=int, default=self.seed, help=f"default: {self.seed}")
        parser.add_argument("--device", default=self.device, help=f"default: {self.device}")
        fields = "change a field of the budget: " + ", ".join(vars(self.budgets["paper"]))
        parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help=fields)
        parser.add_argument("--redraw", action="store_true", help="draw the saved records again and stop")
        asked = parser.parse_args()
        if asked.redraw:
            records, figures, _ = folders(asked.out)
            return self.draw(self.saved(records), figures)
        if asked.budget == "smoke" and asked.out is None:
            asked.out = Path(tempfile.mkdtemp(prefix="fewstep-"))
        try:
            changes = {k: ast.literal_eval(v) for k, _, v in (word.partition("=") for word in asked.set)}
            with processes(asked.device) as device:
                made = self.run(asked.budget, asked.out, seed=asked.seed, device=device, changes=changes)
        except (InputError, SyntaxError) as error:
            parser.error(str(error))
        if is_first():
            for title, text in self.tables(made).items():
                print(f"{title}\n\n{text}\n")
            print(f"wrote {', '.join(f'{n}.json' for n in made)} to {folders(asked.out)[0]}")


def folders(out: Path | None) -> tuple[Path, Path, Path]:
    """Where records, figures and work go: below `out`, or in the checkout."""
    if out is None:
        return RECORDS, FIGURES, ROOT / "analysis" / "work"
    return out / "records", out / "figures", out / "work"


def load(name: str) -> Experiment:
    """The experiment of a script."""
    found: Experiment = importlib.import_module(name.replace("-", "_")).EXPERIMENT
    return found


def table(head: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table; a cell that is None or empty becomes "-"."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join("-" if c in (None, "") else str(c) for c in line) + " |" for line in lines)


def ticks(axes: Any, values: Iterable[float], which: str = "x") -> None:
    """Label a logarithmic axis at these values alone, and draw its grid."""
    setter = axes.set_xticks if which == "x" else axes.set_yticks
    setter(list(values), [f"{v:g}" for v in values])
    setter([], minor=True)
    axes.grid(True, which="major", alpha=0.3)


def curve(axes: Any, points: Iterable[tuple[float, ...]], style: str, **options: Any) -> None:
    """A line through (x, y) points on logarithmic axes; nothing where there are no points."""
    if points := list(points):
        axes.loglog([p[0] for p in points], [p[1] for p in points], style, **options)


def single_threaded() -> None:
    """Timings and small tensors: one thread."""
    torch.set_num_threads(1)


def rms(x: Tensor) -> float:
    """Root mean square over all elements."""
    return float(x.double().square().mean().sqrt())


def packed(images: Mapping[str, Tensor]) -> dict[str, Any]:
    """Named images (n, 1, h, w) in [-1, 1] as bytes that a record can hold."""

    def one(x: Tensor) -> dict[str, Any]:
        small = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
        return {"shape": list(x.shape), "bytes": base64.b64encode(small.numpy().tobytes()).decode()}

    return {name: one(x) for name, x in images.items()}


def unpacked(body: Mapping[str, Any]) -> dict[str, Tensor]:
    """The images of `packed`, exact to 1/255 of their range."""

    def one(found: Mapping[str, Any]) -> Tensor:
        raw = torch.frombuffer(bytearray(base64.b64decode(found["bytes"])), dtype=torch.uint8)
        return raw.reshape(found["shape"]).float() / 127.5 - 1

    return {name: one(found) for name, found in body.items()}


def images_figure(record: Record, path: Path, key: str = "pictures") -> None:
    """Draw the packed images of a record, one row per name; older records hold none."""
    if key in record.data:
        image_rows(unpacked(record.data[key]), path)
