"""The README's tables, from cards and records: `python docs/front.py` writes them between their marks."""

from __future__ import annotations

import re
from pathlib import Path

import tables

import fewstep as fs
from fewstep_analysis import Record
from fewstep_analysis import solver_table as cards

README = Path(__file__).parent.parent / "README.md"
MARKS = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.S)

# what the noise is, the solver to begin with, and the noise type whose order is shown
SDES = [
    ("diagonal or scalar noise", "Milstein", "diagonal"),
    ("the same, on a path that knows H", "SRID2", "diagonal"),
    ("additive noise", "ShARK", "additive"),
    ("commutative noise", "Milstein", "commutative"),
    ("general noise", "EulerMaruyama", "general"),
    ("general noise, on a path that knows areas", "LogODE", "general"),
]
# evaluations of the network, the solver and its name in the records
SAMPLERS = [
    (5, "IPNDM(order=3)", "IPNDM(3)"), (10, "DEIS(order=3)", "DEIS(3)"), (20, "UniPC(order=3)", "UniPC(3)"),
    (50, "UniPC(order=3)", "UniPC(3)"),
]  # fmt: skip


def head(*columns: str) -> list[str]:
    return ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]


def sdes() -> str:
    """Which SDE solver: the card's order, the measured one, what a step needs and costs."""
    lines = head("an SDE with", "begin with", "strong order", "measured", "a step needs", "drift evaluations")
    known = {row[0]: row for row in cards.rows()}
    for what, name, noise in SDES:
        card, row = fs.solvers()[name].card, known[name]
        at = list(card.strong_order).index(noise)
        measured = row[cards.COLUMNS.index("measured")].split(", ")[at]
        cells = [
            what,
            f"`{name}`",
            f"{card.strong_order[noise]:g}",
            measured,
            card.levy or "-",
            card.evaluations,
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def samplers() -> str:
    """Which sampler: RMSE to the exact ODE at some budgets, DDIM's beside it."""
    lines = head("evaluations", "begin with", "error, ring", "DDIM's", "error, smooth mixture", "DDIM's")
    found = {
        (problem, s["name"]): dict(zip(s["nfe"], s["rmse"]))
        for problem in ("ring", "smooth")
        for s in tables.record(f"work-precision-{problem}").data["series"]
        if s["by"] == "fewstep" and s["spacing"] == "logsnr"
    }
    for n, solver, name in SAMPLERS:
        pairs = [f"{found[p, who][n]:.2g}" for p in ("ring", "smooth") for who in (name, "DDIM")]
        lines.append(f"| {n} | `{solver}` | " + " | ".join(pairs) + " |")
    return "\n".join(lines)


def orders() -> str:
    """The headline's estimates."""
    lines = head("solver", "noise", "declared", "measured", "finest local slope", "against")
    for e in tables.record("headline-orders").data["estimates"]:
        said = "differences of levels: torchsde's paths have no area"
        against = said if e["reference"] == "levels" else "torchsde's `srk` on the same path"
        measured = f"{e['order']:.2f} [{e['low']:.2f}, {e['high']:.2f}]"
        cells = [f"`{e['solver']}`", e["noise_type"], f"{e['declared']:g}", measured]
        cells += [f"{e['local'][-1]:.2f}", against]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def peers() -> str:
    """The benchmark's ratios, by what was measured and against whom."""
    return tables.benchmarks.summary(Record.load(tables.DOCS / "records" / "benchmarks.json"))


PARTS = {"demo": tables.demo, "sdes": sdes, "samplers": samplers, "orders": orders, "peers": peers}


def filled(text: str) -> str:
    """The README with its tables made anew."""
    return MARKS.sub(lambda found: found[1] + PARTS[found[2]]() + "\n" + found[3], text)


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
