"""The names that options take, for completion by the shell.

Names of solvers and problems are asked of the library, which imports torch; fixed words are not.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module

import typer

REFERENCES = ("torchsde", "exact", "levels")
DEVICES = ("cpu", "cuda")
DTYPES = ("float64", "float32")
LETTERS = ("W", "H", "K")
TESTS = ("mean", "square", "fourth", "cosine")


def sde_solvers() -> list[str]:
    """Solvers of SDEs."""
    import fewstep
    from fewstep.catalog import spelling

    found = fewstep.solvers().items()
    return [spelling(name) for name, s in found if isinstance(s, fewstep.StochasticSolver)]


def samplers() -> list[str]:
    """The diffusion solvers of `work-precision`, in a spelling that no shell needs to quote."""
    from fewstep.catalog import spelling

    from ..sampler_work import SOLVERS

    split = [re.fullmatch(r"(\w+)(?:\((.*)\))?", name) for name in SOLVERS]
    return ["-".join([spelling(m[1]), *re.findall(r"[\w=]+", m[2] or "")]).lower() for m in split if m]


def spacings() -> list[str]:
    """Names of spacings of the noise levels."""
    from fewstep.grid import spacing_names

    return spacing_names()


def keys(module: str, table: str) -> Callable[[], list[str]]:
    """Return a function that lists the keys of a table in a module of this package, imported on the first call."""
    return lambda: list(getattr(import_module(f"fewstep_analysis.{module}"), table))


sde_problems: Callable[[], list[str]] = keys("problems", "PROBLEMS")
diffusion_problems: Callable[[], list[str]] = keys("diffusion_problems", "PROBLEMS")
models: Callable[[], list[str]] = keys("distillation", "TASKS")


def complete(*words: Sequence[str] | Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """A completer for these words, or for those that these functions return."""

    def found(incomplete: str) -> list[str]:
        known = [w for part in words for w in (part() if callable(part) else part)]
        return [w for w in known if w.startswith(incomplete)]

    return found


def complete_solver(ctx: typer.Context, incomplete: str) -> list[str]:
    """Diffusion solvers where the problem given before is a diffusion problem, else solvers of SDEs."""
    words = samplers() if ctx.params.get("problem") in diffusion_problems() else sde_solvers()
    return [w for w in words if w.startswith(incomplete)]
