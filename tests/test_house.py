"""Rules of the house: the package map, the import graph, the price of an import, cards as the one source."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fewstep as fs
from fewstep_analysis import solver_table as cards

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"solvers": "fewstep", "analysis": "fewstep_analysis"}
ELSEWHERE = {
    "fewstep_analysis.cli": "fewstep_analysis.cli"
}  # importing it must not import fewstep, and so torch
SOURCES = [p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*.py"))]


def test_the_package_list_is_the_tree():
    listed = re.search(r"packages =\n((?:    \S+\n)+)", (ROOT / "setup.cfg").read_text()).group(1).split()
    found = [
        ".".join([name, *p.parent.relative_to(ROOT / folder).parts])
        for folder, name in FOLDERS.items()
        for p in sorted((ROOT / folder).rglob("__init__.py"))
    ]
    assert sorted(listed) == sorted(ELSEWHERE.get(name, name) for name in found)


@pytest.mark.parametrize("path", [p for p in SOURCES if "solvers" in p.parts], ids=lambda p: p.name)
def test_fewstep_never_imports_its_analysis(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not any("analysis" in n.split(".") for n in names)


def imports(folder, top):
    """module -> the modules of this package that it imports, within functions too; not for type checkers."""
    files = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        parts = [top, *path.relative_to(ROOT / folder).with_suffix("").parts]
        package = parts[:-1]
        files[".".join(package if parts[-1] == "__init__" else parts)] = path, package
    for name, (path, package) in files.items():
        tree, found = ast.parse(path.read_text()), set()
        for guarded in [n for n in ast.walk(tree) if isinstance(n, ast.If)]:
            if getattr(guarded.test, "id", "") == "TYPE_CHECKING":
                guarded.body = []
        for node in [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]:
            up = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*up, *([node.module] if node.module else [])])
            found |= {m for a in node.names for m in (f"{base}.{a.name}", base) if m in files}
        yield name, found - {name, top}


@pytest.mark.parametrize(("folder", "top"), [("solvers", "fewstep"), ("analysis", "fewstep_analysis")])
def test_no_module_imports_itself_by_way_of_others(folder, top):
    graph = dict(imports(folder, top))
    assert sum(map(len, graph.values())) > len(graph)  # the reader sees them
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the ring


# what several solvers share: no solver itself
SHARED = {"additive.py", "dpm.py", "exponential.py", "strided.py"}


def docs(node):
    """Lines of its docstring."""
    return len((ast.get_docstring(node, clean=False) or "").splitlines())


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_budgets(path):
    """A file 400 lines, a classical solver 80; without docstrings a diffusion solver 80, a function 40."""
    text, tree = path.read_text(), ast.parse(path.read_text())
    lines = len(text.splitlines())
    solver = path.parent.name if path.name not in SHARED else ""
    assert lines <= (80 if solver == "classical" else 400)
    documented = [n for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    if solver == "diffusion":
        assert lines - sum(map(docs, documented)) <= 80
    for node in documented:
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 - docs(node) <= 40, node.name


def test_import_costs_little_more_than_torch():
    """At most 35 % of the CPU time of `import torch` on top of it, in interleaved fresh processes."""
    code = "import time; import {}; print(time.process_time())"
    times = {"torch": [], "fewstep": []}
    for _ in range(3):
        for name, seen in times.items():
            command = [sys.executable, "-c", code.format(name)]
            seen.append(float(subprocess.run(command, capture_output=True, check=True).stdout))
    # the least of each: load on the machine only ever adds
    assert min(times["fewstep"]) < 1.35 * min(times["torch"])


def test_heavy_packages_are_imported_only_when_used():
    code = "import sys, fewstep; print([m for m in {} if m in sys.modules])"
    heavy = ["torchsde", "matplotlib", "scipy", "sklearn", "diffusers", "safetensors", "typer"]
    out = subprocess.run(
        [sys.executable, "-c", code.format(heavy)], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"


class Backwards(fs.StochasticSolver):
    """A solver of a stranger: Euler-Maruyama under another name, in one place."""

    card = fs.Card(
        summary="a stranger's solver", reference="this test", levy="W", sde_types=("ito",),
        strong_order={"diagonal": 0.5}, deterministic_order=1.0,
    )  # fmt: skip

    def step(self, sde, t0, t1, y, increment, carry):
        return y + sde.drift(t0, y) * increment.h + sde.diffusion(t0, y) * increment.W, carry


def test_a_new_solver_is_one_file_and_one_line(monkeypatch):
    """The one line names it in `fewstep`; the list, the table, the docs' table and the tests pick it up."""
    from test_convergence import finest

    from fewstep_analysis import problems, strong_order

    assert "Backwards" not in fs.solvers()
    monkeypatch.setattr(fs, "Backwards", Backwards, raising=False)  # the one line
    assert fs.solvers()["Backwards"] is Backwards
    assert "Backwards" in fs.solvers("diagonal")
    assert "Backwards" not in fs.solvers("additive")
    assert re.search(r"Backwards +diagonal +ito +W +0.5 +\? ", cards.text(cards.rows()))
    assert "| Backwards | diagonal | ito | W | 0.5 |" in cards.markdown(cards.rows())
    sde = fs.SDE(lambda t, y: -y, lambda t, y: 0.2 * y)
    assert fs.solve(sde, Backwards(), torch.ones(2, 1), torch.linspace(0, 1, 5)).nfe == 4
    estimate = strong_order(Backwards(), problems.sine(), levels=range(4, 9), paths=2000, reference="levels")
    assert abs(finest(estimate) - 0.5) < 0.12


def test_every_card_is_whole():
    for name, solver in fs.solvers().items():
        card = solver.card
        assert card.summary, name
        assert re.search(r"Eq|Algorithm|Table|Section|after", card.reference), name
        assert card.strong_order or hasattr(solver, "plan"), name
        assert card.levy in ("", "W", "H", "K", "A"), name
        assert card.evaluations >= 1, name
