"""The tables of the pages: of the solvers' cards, of the records of experiments, of the commands' help."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fewstep as fs
from fewstep_analysis import Record, solver_table
from fewstep_analysis.cli.app import helps

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT / "analysis" / "experiments"))  # experiments are scripts, not a package

import speed_rows  # noqa: E402
from base import NAMES, load, table  # noqa: E402

RECORDS = ROOT / "analysis" / "records"
EXPERIMENTS = {name: load(name) for name in NAMES}


def record(name: str) -> Record:
    """A record of this checkout."""
    return Record.load(RECORDS / f"{name}.json")


def of_experiments() -> dict[str, str]:
    """The tables of every experiment whose records are in this checkout."""
    made: dict[str, str] = {}
    for experiment in EXPERIMENTS.values():
        saved = experiment.saved()
        if saved or experiment.device != "cpu":  # pages include the tables of devices that were never at hand
            made |= experiment.tables(saved)
    for name in ("gpu-orders", "gpu-throughput", "gpu-mnist"):
        if (DOCS / "figures" / f"{name}.svg").exists():
            made[name] = f"![{name}](figures/{name}.svg)\n\n{made[name]}"
    return made


def experiments() -> str:
    """What each experiment writes: the command, its time, and the commit that made the committed record."""
    rows = []
    for e in EXPERIMENTS.values():
        needs = f"; needs {e.needs}" if e.needs else ""
        files = [f"`{name}.json`" for name in e.records or (e.name,)]
        commits = {one.made["commit"]: None for one in e.saved().values()}
        figures = ", ".join(f"`{name}`" for name in e.figures)
        command = f"`{e.command()}`{needs}"
        where = "" if e.device == "cpu" else " on one GPU"
        minutes, made = f"{e.minutes} min{where}", ", ".join(f"`{c}`" for c in commits)
        rows.append([", ".join(files), figures, command, minutes, made])
    demo = record("demo").made["commit"]
    rows.append(["`demo.json`", "`digits.png`, `demo-convergence.png`", "`fewstep demo`, see below", "1 min",
                 f"`{demo}`"])  # fmt: skip
    return table(["record", "figures", "command", "time", "made at commit"], rows)


def records() -> str:
    """What made each record: seed, commit, machine and versions."""
    rows, versions = [], dict[str, list[str]]()
    for file in sorted(RECORDS.glob("*.json")):
        one = Record.load(file)
        made = one.made
        shown = ", ".join(f"{k} {v}" for k, v in made["versions"].items() if k not in ("fewstep", "numpy", "scipy"))
        versions.setdefault(shown, []).append(file.name)
        machine = f"{made['device']}, threads: {made['threads']}"
        rows.append([f"`{file.name}`", one.seed, f"`{made['commit']}`", machine])
    most = max(versions, key=lambda v: len(versions[v]))
    others = [f"{', '.join(names)}: {v}" for v, names in versions.items() if v != most]
    return table(["record", "seed", "commit", "device"], rows) + f"\n\nVersions: {'; '.join([most, *others])}."


def summaries() -> str:
    """One line per experiment."""
    rows = [[f"`{e.name}`", " ".join(e.summary.split("\n\n")[0].split()), e.minutes] for e in EXPERIMENTS.values()]
    return table(["experiment", "what it does", "minutes"], rows)


def references() -> str:
    """What each solver is, and its source."""
    rows = [[f"`{name}`", s.card.summary, s.card.reference] for name, s in fs.solvers().items()]
    return table(["solver", "what it is", "source"], rows)


def solver_names(stochastic: bool) -> str:
    """The docstrings of the solvers of SDEs, or of those that sample diffusion models alone."""
    found = [n for n, s in fs.solvers().items() if isinstance(s, fs.StochasticSolver) == stochastic]
    return documented("autoclass", found)


def documented(directive: str, names: list[str]) -> str:
    """The docstrings of public names."""
    lines = ["```{eval-rst}", ".. currentmodule:: fewstep", *(f".. {directive}:: {n}" for n in names)]
    return "\n".join([*lines, "```"])


def public(test: Callable[[Any], bool]) -> list[str]:
    """The public names whose value passes the test."""
    return [name for name in dir(fs) if name[0] != "_" and test(getattr(fs, name))]


def is_schedule(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, fs.Schedule) and value is not fs.Schedule


def schedules() -> str:
    """Each schedule with the first sentence of its docstring."""
    rows = []
    for name in public(is_schedule):
        first = " ".join(inspect.getdoc(getattr(fs, name)).split("\n\n")[0].split())
        rows.append([f"`{name}`", re.sub(r"([*|])", r"\\\1", first)])
    return table(["schedule", "process"], rows)


def conversions() -> str:
    """The docstrings of the functions that convert networks to denoisers."""
    found = public(lambda v: callable(v) and getattr(v, "__module__", "") == "fewstep.denoiser")
    return documented("autofunction", found)


def demo() -> str:
    """Distance to held-out real digits, evaluations, seconds."""
    rows = []
    for r in record("demo").data["table"]:
        cost = [r["evaluations"], f"{r['sliced_w2']:.3f} ± {r['sliced_w2_se']:.3f}", f"{r['seconds']:.3f}"]
        rows.append([r["sampler"], *(cost if r["evaluations"] else [None, cost[1], None])])
    head = ["sampler", "network evaluations", "sliced W2 to held-out digits", "seconds for 1,000 digits"]
    return table(head, rows)


def demo_with_pictures() -> str:
    """The demo's table below its two pictures."""
    pictures = (
        "![Digits of the teacher, its sampler in 5 steps and the fitted table, and real ones](figures/digits.png)",
        "![Strong errors of Euler-Maruyama, Milstein and SRID2](figures/demo-convergence.png)",
    )
    return "\n\n".join([*pictures, demo()])


def peers() -> str:
    """The ratios to peers at all sizes, by what was measured."""
    return speed_rows.summary(record("speed-rows"))


def comfyui() -> str:
    """What ComfyUI's own sampling code gives with its samplers and these: the cases that are not equal, by reason."""
    found = json.loads((ROOT / "tests" / "integrations" / "comfyui_suite.json").read_text())
    rows = [
        [why, ", ".join(f"`{name}`" for name in dict.fromkeys(c.split()[0] for c in cases)), len(cases)]
        for why, cases in found["not equal"].items()
    ]
    equal = f"ComfyUI {found['ComfyUI']}: {found['equal']} of {found['cases']} cases are equal. The others:"
    nodes = [[*name.split(), outcome] for name, outcome in found["nodes"].items()]
    spread = [[f"`{name}`", *both] for name, both in found["standard deviation, EPS and FLOW"].items()]
    return "\n\n".join([
        equal, table(["reason", "samplers", "cases"], rows), "Each node with a model of each kind:",
        table(["node", "model", "outcome"], nodes),
        "The standard deviation of samples through KSampler, 20 steps, of data $N(0, 1/4)$ with the exact network "
        "(`lcm` and `tcd` are for consistency-distilled networks):",
        table(["sampler", "of epsilon", "flow"], spread),
    ])  # fmt: skip


def of_pages() -> dict[str, str]:
    """Every table of the pages under docs, by name."""
    return {
        "cards": solver_table.markdown(solver_table.rows()), "references": references(),
        "demo-pictures": demo_with_pictures(), "comfyui": comfyui(), "api-sde": solver_names(True),
        "api-diffusion": solver_names(False), "api-border": conversions(), "schedules": schedules(),
        "api-schedules": documented("autoclass", public(is_schedule)), "records": records(),
        "experiments": experiments(), "summaries": summaries(), **of_experiments(),
        **{f"cli-{path.replace(' ', '-')}": f"```text\n{text}\n```" for path, _, text in helps()},
    }  # fmt: skip
