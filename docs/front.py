"""Writes the tables of README.md and of the pages, made of cards, records and docstrings.

`python docs/front.py` writes each between its marks `<!-- name -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import tables

import fewstep as fs
from base import table
from fewstep_analysis import solver_table

PAGES = [tables.ROOT / "README.md", *sorted(tables.DOCS.glob("**/*.md"))]
MARKS = re.compile(r"(<!-- ([\w-]+) -->\n).*?(<!-- end -->)", re.S)

# the kind of noise, the solver to start with, and the noise type whose order is shown
SDES = [
    ("diagonal or scalar noise", "Milstein", "diagonal"),
    ("the same, on a path with H", "SRID2", "diagonal"),
    ("additive noise", "ShARK", "additive"),
    ("commutative noise", "Milstein", "commutative"),
    ("general noise", "EulerMaruyama", "general"),
    ("general noise, on a path with areas", "LogODE", "general"),
]


# evaluations of the network, the solver, and its name in the records
SAMPLERS = [
    (5, "IPNDM(order=3)", "IPNDM(3)"), (10, "DEIS(order=3)", "DEIS(3)"), (20, "UniPC(order=3)", "UniPC(3)"),
    (50, "UniPC(order=3)", "UniPC(3)"),
]  # fmt: skip


def sdes() -> str:
    """Which SDE solver: declared and measured order, what a step needs, what it costs."""
    solvers, known = fs.solvers(), {row[0]: row for row in solver_table.rows()}
    rows = []
    for noise, name, kind in SDES:
        card = solvers[name].card
        measured = known[name][solver_table.COLUMNS.index("measured")].split(", ")
        order = f"{card.strong_order[kind]:g}"
        rows.append([noise, f"`{name}`", order, measured[list(card.strong_order).index(kind)], card.levy,
                     card.evaluations])  # fmt: skip
    head = ["an SDE with", "start with", "strong order", "measured", "a step needs", "drift evaluations"]
    return table(head, rows)


def samplers() -> str:
    """Which sampler: RMSE to the exact ODE by number of evaluations, next to DDIM's."""
    found = {
        (problem, s["name"]): dict(zip(s["nfe"], s["rmse"]))
        for problem in ("ring", "smooth")
        for s in tables.record(f"work-precision-{problem}").data["series"]
        if s["by"] == "fewstep" and s["spacing"] == "logsnr"
    }
    rows = [
        [n, f"`{solver}`", *(f"{found[p, who][n]:.2g}" for p in ("ring", "smooth") for who in (name, "DDIM"))]
        for n, solver, name in SAMPLERS
    ]
    head = ["evaluations", "start with", "error, ring", "DDIM's", "error, smooth mixture", "DDIM's"]
    return table(head, rows)


def made() -> dict[str, str]:
    """Every table by name."""
    own = {"demo": tables.demo(), "sdes": sdes(), "samplers": samplers(), "peers": tables.peers()}
    return own | tables.of_pages()


def filled(text: str, known: dict[str, str]) -> str:
    """A page with its tables made anew."""
    return MARKS.sub(lambda found: found[1] + known[found[2]] + "\n" + found[3], text)


if __name__ == "__main__":
    known = made()
    for page in PAGES:
        page.write_text(filled(page.read_text(), known))
