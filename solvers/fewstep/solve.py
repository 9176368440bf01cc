"""`solve`: the loop for SDEs and ODEs on a fixed grid. It checks, steps, counts and saves for any method."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import _progress, _validation
from .brownian import FreshIncrements, Increment
from .brownian.increment import Path, check_path, letters_for
from .errors import InputError, NonFiniteError
from .problem import CONSTANT, SDE, Field
from .solver import StochasticSolver


@dataclass(frozen=True)
class Solution:
    """The result of a solve.

    Attributes:
        y: (*batch, *event) the final state.
        nfe: number of drift evaluations.
        grid: (n,) float64 times.
        ys: (k, *batch, *event) the states selected by `save`; None with `"last"`.
    """

    y: Tensor
    nfe: int
    grid: Tensor
    ys: Tensor | None = None


def solve(
    sde: SDE, solver: StochasticSolver, y0: Tensor, grid: Tensor | Sequence[float], *, path: Path | None = None,
    seed: int = 0, save: str | Sequence[int] = "last", progress: bool = False,
) -> Solution:  # fmt: skip
    """Solve an SDE or an ODE on a fixed grid.

    Gradients flow to y0, to the parameters of drift and diffusion and, for an ODE, to the grid.

    Args:
        sde: the problem; `ODE(drift)` for one without noise.
        solver: an SDE solver whose card lists the problem's noise type and calculus.
        y0: (*batch, *event) finite, floating point.
        grid: (n,) strictly increasing times, n >= 2; for an ODE they may be strictly decreasing. Times and step
            sizes are float64; drift and diffusion receive them in y0's dtype, or the grid's where that is more precise.
        path: a `BrownianPath` over at least the grid, to reuse the same noise in other solves or at other step sizes.
            Without it, independent exact increments are drawn from `seed`, which is faster. An ODE uses neither.
        seed: of the increments where `path` is None, an integer from -2^63 to 2^64 - 1.
        save: `"last"` keeps the final state, `"all"` keeps the state at each time, `[0, 32, 64]` keeps the
            states at these indices of the grid.
        progress: show a progress bar on a terminal, in a pipe a line every 30 seconds.

    Raises:
        InputError: invalid input, before the first step.
        NonFiniteError: the final state is not finite; its message names the step and counts the paths.
    """
    _check(sde, solver, y0)
    ts = _validation.as_numbers("grid", grid)
    times = _check_grid(ts, sde)
    kept = _kept(save, len(times))
    given = _validation.times_dtype(grid)
    calls: list[None] = []
    problem = stepwise(sde, torch.promote_types(given or y0.dtype, y0.dtype), calls)
    noise_shape, keeps_graph = _probe(problem, y0, times)
    if _validation.has_graph(ts):
        keeps_graph = True
    else:
        ts = times
    calls.clear()
    y0 = y0.contiguous()  # forward-mode AD needs memory of its own, which an expanded state does not have
    needs = solver.card.levy
    if sde.noise_type == "none":
        path = None
    elif path is None:
        path = FreshIncrements(
            noise_shape, letters_for(needs), seed, y0.dtype, y0.device, reuse=not keeps_graph, area=needs == "A"
        )
    else:
        check_path(path, type(solver).__name__, needs, noise_shape, (float(times[0]), float(times[-1])), y0.dtype)
    source: Callable[[], Iterable[Increment]] = partial(_zeros, y0, ts)
    if path is not None:
        source = partial(path.increments, times.to(given or torch.float64))
    states = _states(problem, solver, y0, ts, source)
    bar = _progress.progress(states, "step", show=progress, total=len(times) - 1)
    with torch.no_grad() if not keeps_graph else contextlib.nullcontext():
        y, ys = y0, [y0] if 0 in kept else []
        for i, y in enumerate(bar, 1):
            if i in kept:
                ys.append(y)
        # one check at the end is cheap; only a failed solve is repeated, to find the step
        if not bool(y.isfinite().all()):
            raise _locate(_states(problem, solver, y0, ts, source), type(solver).__name__, times)
    return Solution(y, len(calls), times, torch.stack(ys) if ys else None)


def _states(
    sde: SDE, solver: StochasticSolver, y: Tensor, times: Tensor, source: Callable[[], Iterable[Increment]]
) -> Iterator[Tensor]:
    """Yield the state after each step; float64 `times` have a graph only where a gradient flows to them."""
    # MPS has no float64
    ts = times.to("cpu" if y.device.type == "mps" else y.device).unbind()
    carry = solver.init(sde, ts[0], y)
    for t0, t1, increment in zip(ts[:-1], ts[1:], source(), strict=True):
        y, carry, _ = solver.step(sde, t0, t1, y, increment, carry)
        yield y


def _zeros(y: Tensor, times: Tensor) -> Iterator[Increment]:
    """The increments of an ODE: one channel of zeros, for the (1, 1) matrix of `zero_diffusion`."""
    zero, matrix, lengths = y.new_zeros(1), y.new_zeros(1, 1), times.diff()
    steps: Any = lengths.unbind() if _validation.has_graph(times) else lengths.tolist()
    return (Increment(h, zero, zero, zero, matrix) for h in steps)


def stepwise(sde: SDE, dtype: torch.dtype, calls: list[None] | None = None) -> SDE:
    """The problem as steps call it, with float64 times: drift and diffusion receive them in `dtype` on y's device.

    Each call of the drift extends the list `calls`.
    """

    def at(field: Field, calls: list[None] | None = None) -> Field:
        def call(t: Tensor, y: Tensor) -> Tensor:
            if calls is not None:
                calls.append(None)
            return field(t.to(y.device, dtype), y)

        return call

    diffusion = sde.diffusion if sde.noise_type == "none" else at(sde.diffusion)
    return replace(sde, drift=at(sde.drift, calls), diffusion=diffusion)


def _kept(save: Any, count: int) -> range | frozenset[int]:
    """The indices of the grid whose states are kept."""
    if isinstance(save, str) and save in ("last", "all"):
        return range(count if save == "all" else 0)
    indices = list(save) if isinstance(save, Sequence) and not isinstance(save, str) else []
    valid = all(type(i) is int and 0 <= i < count for i in indices)
    if not indices or not valid or indices != sorted(set(indices)):
        raise InputError(f"save: got {save!r}, expected 'last', 'all' or increasing indices from 0 to {count - 1}.")
    return frozenset(indices)


def _check(sde: SDE, solver: Any, y0: Tensor) -> None:
    """Check the problem, the solver and the initial state."""
    cure = "fewstep.SDE or ODE. Wrap a torchsde object with SDE.from_torchsde; a diffusion model goes to fewstep.sample"
    _validation.check_instance("sde", sde, SDE, cure)
    cure = "an object such as EulerMaruyama(). Call a class first; diffusion solvers go to fewstep.sample"
    _validation.check_instance("solver", solver, StochasticSolver, cure)
    check_solves(sde, solver)
    _validation.check_state("y0", y0, "a finite floating-point tensor (*batch, *event)")


def _check_grid(times: Tensor, sde: SDE) -> Tensor:
    """The grid as float64 times on the CPU; an ODE's may be decreasing and have a graph."""
    if sde.noise_type == "none":
        return _validation.check_times("grid", times.detach(), decreasing=True)
    if times.dim() == 1 and len(times) > 1 and bool((times.diff() < 0).all()):
        raise InputError(
            "grid: got decreasing times for an SDE, expected increasing ones: an SDE in reverse time has another "
            "drift, which depends on the law of y. Solve that SDE in the variable -t, or an ODE, which runs both ways."
        )
    return _validation.check_times("grid", times)


def _probe(sde: SDE, y0: Tensor, times: Tensor) -> tuple[tuple[int, ...], bool]:
    """Check what drift and diffusion return; the shape of the noise and whether a graph is needed."""
    f, g = sde.drift(times[0], y0), sde.diffusion(times[0], y0)
    for name, value in (("drift", f), ("diffusion", g)):
        _validation.check_instance(name, value, Tensor, "a tensor. Return torch.full_like(y, ...) for a constant")
        if (value.dtype, value.device) != (y0.dtype, y0.device):
            raise InputError(
                f"{name}: got {value.dtype} on {value.device}, expected {y0.dtype} on {y0.device} as y0. "
                "Convert its constants and parameters, or y0."
            )
    if f.shape != y0.shape:
        cure = "Return one value for each component of y."
        raise InputError(f"drift: got shape {tuple(f.shape)}, expected y's shape {tuple(y0.shape)}. {cure}")
    keeps_graph = torch.is_grad_enabled() and any(v.requires_grad for v in (y0, f, g))
    return sde.noise_shape(y0, g) if sde.noise_type != "none" else (), keeps_graph


def check_solves(sde: SDE, solver: StochasticSolver) -> None:
    """Raise an `InputError` if the solver's card does not list the problem's noise type or calculus."""
    name, card = type(solver).__name__, solver.card
    if sde.noise_type not in card.noise_types:
        raise InputError(
            f"solver: got {name} for {sde.noise_type!r} noise; it solves {', '.join(card.noise_types)}. "
            f"fewstep.solvers({sde.noise_type!r}) lists the solvers for this problem."
        )
    if sde.sde_type not in card.sde_types and sde.noise_type not in CONSTANT:
        raise InputError(
            f"solver: got {name} for a {sde.sde_type!r} SDE; it solves {', '.join(card.sde_types)}. "
            "Convert the drift (the difference is half of g'g) or choose another solver."
        )


def _locate(states: Iterator[Tensor], name: str, times: Tensor) -> NonFiniteError:
    """Repeat a failed solve on the same noise, checking the state after each step."""
    step, paths, count = len(times) - 2, 0, 0
    for step, y in enumerate(states):  # noqa: B007
        count, paths = len(y), int((~y.isfinite()).reshape(len(y), -1).any(1).sum())
        if paths:
            break
    message = (
        f"{name} produced non-finite values at step {step} (t = {float(times[step]):.6g} to "
        f"{float(times[step + 1]):.6g}) for {paths} of {count} paths. Take smaller steps or a more stable solver, "
        "and check drift and diffusion there."
    )
    return NonFiniteError(message, step=step, paths=paths)
