"""The table of solvers of the public surface, and solvers from their names."""

import inspect
import re
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from . import _validation
from .errors import InputError, one_of
from .problem import NOISE_TYPES
from .solver import Solver


def solvers(noise_type: str | None = None) -> dict[str, Solver]:
    """Every solver of this library with its default options, keyed by name.

    Args:
        noise_type: only the solvers that solve SDEs with this noise type.

    Raises:
        InputError: an unknown noise type.
    """
    import fewstep

    if noise_type is not None:
        _validation.check_choice("noise_type", noise_type, NOISE_TYPES)
    exported = {n: getattr(fewstep, n) for n in sorted(dir(fewstep))}
    classes = {n: c for n, c in exported.items() if isinstance(c, type) and issubclass(c, Solver)}
    # learned solvers are made by their fits: they have no default
    found = {n: c() for n, c in classes.items() if c.__module__.startswith(("fewstep.sde.", "fewstep.samplers."))}
    return {k: v for k, v in found.items() if noise_type in (None, *v.card.noise_types)}


def solver_named(text: str, argument: str = "solver", listed: Iterable[str] | None = None) -> Solver:
    """The solver described by a name with options, such as `"UniPC(order=3)"` or `"euler_maruyama"`.

    Capitals, underscores and dashes do not matter, and options may follow a colon or a dash instead of standing in
    brackets: `"uni_pc:3"` and `"unipc-3"` are `UniPC(3)`. An option is a value, `name=value`, or the bare name of a
    flag. `2S` and `2M` are the singlestep and multistep method of order 2, as the DPM-Solver papers write them.

    Args:
        text: the description.
        argument: the name of the caller's argument, for error messages.
        listed: the names that the error of an unknown one lists, where the caller accepts others than this function.

    Raises:
        InputError: an unknown solver, or options that it does not take.
    """
    known = solvers()
    if isinstance(text, str):
        plain = text.strip().replace("+", "p")
        for name in sorted(known, key=len, reverse=True):
            pattern = "[-_ ]*".join(map(re.escape, name)) + r"[-_ ]*(?:|\((.*)\)|[-:_ ](.*))"
            if found := re.fullmatch(pattern, plain, re.IGNORECASE):
                words = re.split("[,:]" if found[1] else "[-,:]", found[1] or found[2] or "")
                return _changed(known[name], words, text, argument)
    raise one_of(argument, text, map(spelling, known) if listed is None else listed)


def written(solver: Any) -> str:
    """What to write for the name of a solver where its object is expected, for messages; else nothing."""
    with suppress(InputError):
        return f" Write fewstep.{solver_named(solver)!r}."
    return ""


def with_options(solver: Solver, text: str, argument: str = "options") -> Solver:
    """A solver with some of its options changed, written as in `solver_named`: `"order=3, eta=0.5"`."""
    return _changed(solver, text.split(","), text, argument)


def spelling(name: str) -> str:
    """The name of a solver in lower case, as used on the command line: `DPMSolverPP` -> `dpm_solver_pp`."""
    return re.sub(r"(?<=[a-z]{2})(?=[A-Z])|(?<=[A-Z]{2})(?=[A-Z][a-z])", "_", name).lower()


def _changed(solver: Solver, words: list[str], text: str, argument: str) -> Solver:
    words = [w.strip() for w in words if w.strip()]
    if not words:
        return solver
    kind = type(solver)
    parameters = inspect.signature(kind).parameters
    values: list[Any] = []
    options: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if equals:
            options[name.strip()] = _value(value.strip())
        elif (order := re.fullmatch("([1-9])([SM])", word, re.IGNORECASE)) and "multistep" in parameters:
            options |= {"order": int(order[1]), "multistep": order[2] in "Mm"}
        elif word in parameters:
            options[word] = True
        else:
            values.append(_value(word))
    own = {k: v for k, v in solver.options().items() if k not in list(parameters)[: len(values)]}
    try:
        return kind(*values, **own | options)
    except TypeError as error:
        listed = (n if p.default is p.empty else f"{n}={p.default!r}" for n, p in parameters.items())
        expected = ", ".join(listed) or "no options"
        raise InputError(f"{argument}: got {text!r}; {kind.__name__} takes {expected}.") from error


def _value(word: str) -> Any:
    """A word of an option: a number, true, false, none, or a string."""
    for read in ({"true": True, "false": False, "none": None}.__getitem__, int, float):
        with suppress(KeyError, ValueError):
            return read(word.lower())
    return word.strip("'\"")
