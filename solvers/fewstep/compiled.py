"""Steps of `solve` as programs of torch.compile, several steps per program.

Their noise is drawn outside, but inside for a path of counters whose cells are the steps of full programs.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor

from .brownian import BrownianPath, Increment
from .brownian.path import Subtree, Walk
from .problem import SDE
from .solver import Step, StochasticSolver, plain_options

PER_PROGRAM = 8  # steps of one program

Fields = list[dict[str, Tensor]]
Advance = Callable[[SDE, Tensor, Any, Tensor, Tensor, Fields | Subtree], tuple[list[Tensor], Any]]


def compiled_steps(
    advance: Advance, traced: SDE, sde: SDE, solver: StochasticSolver, y: Tensor, times: Tensor,
    source: Iterable[Increment], calls: list[None], carry: Any,
) -> Iterator[Step]:  # fmt: skip
    """Yield each step: by `advance` on `traced`, but by the solver on `sde` where it fills no program.

    The first step fills none, and a walk whose cells fill programs begins with as many. `sde` extends `calls` by each
    call of its drift, and the steps of programs extend it by as many.
    """
    ts, increments, place, count = times.unbind(), iter(source), 0, len(times) - 1
    carry = solver.init(sde, ts[0], y) if carry is None else carry
    before, each, offset = len(calls), 0, 0 if isinstance(source, Walk) else 1
    while place < count:
        size = min(PER_PROGRAM - (place - offset) % PER_PROGRAM, count - place)
        first, place = place, place + size
        if first > 0 and size == PER_PROGRAM:
            cell = source.subtree() if isinstance(source, Walk) else None
            noise, lengths = (cell, cell.lengths) if cell is not None else _drawn(increments, times)
            states, carry = advance(traced, y, carry, times[first : place + 1], lengths, noise)
            y = states[-1]
            calls += [None] * (each * size)
            yield from (Step(state, carry) for state in states)
        else:
            for i, increment in enumerate(itertools.islice(increments, size), first):
                y, carry, _ = step = solver.step(sde, ts[i], ts[i + 1], y, increment, carry)
                each = each or len(calls) - before
                yield step


def _drawn(increments: Iterator[Increment], times: Tensor) -> tuple[Fields, Tensor]:
    """The next increments and their lengths."""
    chunk = list(itertools.islice(increments, PER_PROGRAM))
    fields = [{k: v for k in "WHKA" if (v := getattr(i, k)) is not None} for i in chunk]
    return fields, _stacked([i.h for i in chunk], times)


def noise_of(path: Any, grid: Tensor, increments: Callable[[], Iterable[Increment]]) -> Iterable[Increment]:
    """The increments for `compiled_steps`, of a path (None for fresh ones), which no later one overwrites."""
    if type(path) is BrownianPath and path.generator == "counter" and not path.portable:
        return path.walk(grid, PER_PROGRAM)
    return increments() if path is None else copied(increments())


def copied(increments: Iterable[Increment]) -> Iterator[Increment]:
    """The increments of a path that may write each to the memory of the one before."""
    for i in increments:
        yield replace(i, **{k: v.clone() for k in "WHKA" if (v := getattr(i, k)) is not None})


def _stacked(lengths: list[Any], times: Tensor) -> Tensor:
    if any(torch.is_tensor(h) for h in lengths):
        return torch.stack(lengths)
    return torch.tensor(lengths, dtype=torch.float64, device=times.device)


def canonical(solver: StochasticSolver) -> StochasticSolver:
    """One object for all solvers of a class of this library with equal options; another solver itself."""
    options = plain_options(solver)
    return solver if options is None else _made(type(solver), options)


@lru_cache(maxsize=64)
def _made(kind: type[StochasticSolver], options: tuple[tuple[str, Any], ...]) -> StochasticSolver:
    return kind(**dict(options))


def program(sde: SDE, solver: StochasticSolver, *dtypes: torch.dtype) -> Advance:
    """The compiled steps of a solver, kept for later solves of a problem of these very functions."""
    functions = (sde.drift, sde.diffusion, sde.derivative)
    # the two objects that a bound method, new in each access, is made of
    key = tuple((id(getattr(f, "__self__", f)), id(getattr(f, "__func__", f))) for f in functions)
    return _program((*key, sde.noise_type, sde.sde_type, *dtypes), solver)


@lru_cache(maxsize=32)
def _program(key: tuple[Any, ...], solver: StochasticSolver) -> Advance:
    # The problem is an argument: the program keeps no network alive, and torch's guards compile it again for functions
    # that have the addresses of others, since deleted.
    def advance(
        sde: SDE, y: Tensor, carry: Any, times: Tensor, lengths: Tensor, noise: Fields | Subtree
    ) -> tuple[list[Tensor], Any]:
        states, ts, hs = [], times.unbind(), cast(tuple[Any, ...], lengths.unbind())
        fields = [dict(zip("WHK", leaf)) for leaf in noise.leaves()] if isinstance(noise, Subtree) else noise
        for i, values in enumerate(fields):
            y, carry, _ = solver.step(sde, ts[i], ts[i + 1], y, Increment(hs[i], **values), carry)
            states.append(y)
        return states, carry

    # torch.compile keeps programs by code object, at most 8 for each: a code object of its own for each problem
    code = advance.__code__.replace(co_name=f"advance_{type(solver).__name__}")
    fresh = FunctionType(code, advance.__globals__, code.co_name, None, advance.__closure__)
    return torch.compile(fresh, dynamic=False)
