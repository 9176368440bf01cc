"""The words a user may give, read from the sources: completion must not wait for torch."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import typer

REFERENCES = ("torchsde", "exact", "levels")
TEACHERS = ("digits", "mnist", "mnist-features")


@cache
def library() -> Path:
    """The folder of `fewstep`, found without importing it."""
    spec = importlib.util.find_spec("fewstep")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def snake(name: str) -> str:
    """EulerMaruyama -> euler_maruyama; capitals in a row stay one word."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def spoken(name: str) -> str:
    """DPMSolverPP(2) -> dpm_solver_pp-2: the same letters, without what a shell would have to quote."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    return "-".join(re.findall(r"\w+", words)).lower()


def sde_solvers() -> list[str]:
    """Solvers of SDEs that can be made without arguments."""
    text = (library() / "__init__.py").read_text()
    return [snake(n) for n in re.findall(r"^from \.classical\.\w+ import (\w+)", text, re.M)]


def sde_problems() -> list[str]:
    return _words("problems.py", "PROBLEMS")


def diffusion_problems() -> list[str]:
    return _words("diffusion_problems.py", "PROBLEMS")


def samplers() -> list[str]:
    """Diffusion solvers of `work-precision`."""
    return [spoken(n) for n in _words("diffusion_work.py", "SOLVERS")]


def models() -> list[str]:
    """Diffusion models of `distill dode`."""
    return [*diffusion_problems(), *_words("studies/dode_tools.py", "TASKS")]


def bases() -> list[str]:
    """Diffusion solvers of `distill dode`."""
    return [*samplers(), *(spoken(n) for n in _words("studies/dode_tools.py", "MORE"))]


def weak_tests() -> list[str]:
    return _words("convergence.py", "TESTS")


def studies() -> dict[str, str]:
    """The studies, each with a line of what it is."""
    found: dict[str, str] = _alone("analysis/studies/__init__.py").names()
    return found


def errors() -> Any:
    """The module `fewstep.errors`, read by itself."""
    return _alone("errors.py")


@cache
def _alone(file: str) -> Any:
    """A module that needs no other: as part of its package it would bring torch."""
    spec = importlib.util.spec_from_file_location(
        f"fewstep_analysis.cli.{Path(file).parent.name}_alone", library() / file
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _words(file: str, name: str) -> list[str]:
    """The keys of a dict (or the functions it is made of) that a module assigns to `name`."""
    for node in ast.parse((library() / "analysis" / file).read_text()).body:
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        if [t.id for t in targets if isinstance(t, ast.Name)] == [name]:
            value = node.value  # type: ignore[attr-defined]
            if isinstance(value, ast.DictComp):
                return [n.id for n in value.generators[0].iter.elts]  # type: ignore[attr-defined]
            return [k.value for k in value.keys if isinstance(k, ast.Constant)]
    raise LookupError(f"{file} assigns no {name}")


def complete(words: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """A completer of typer's for these words."""

    def found(incomplete: str) -> list[str]:
        return [w for w in words() if w.startswith(incomplete)]

    return found


def complete_study(incomplete: str) -> list[tuple[str, str]]:
    return [(n, said) for n, said in studies().items() if n.startswith(incomplete)]


def complete_worker(ctx: typer.Context, incomplete: str) -> list[str]:
    """Samplers where the problem before is a diffusion problem, otherwise solvers of SDEs."""
    words = samplers() if ctx.params.get("problem") in diffusion_problems() else sde_solvers()
    return [w for w in words if w.startswith(incomplete)]
