"""The loop for SDEs: validates, asks the path for increments, steps, counts, saves. Knows no method."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import _validation
from .brownian import FreshIncrements, Increment, levy_area
from .brownian.increment import LEVY_ORDER, Path
from .brownian.random_normals import key_of, node_seed
from .errors import InputError, NonFiniteError
from .grid import check_times
from .problem import SDE
from .solver import StochasticSolver


@dataclass(frozen=True)
class Solution:
    """What a solve returns.

    Attributes:
        y: (*batch, *event) the final state.
        nfe: drift evaluations made.
        grid: (n,) float64 times.
        ys: (k, *batch, *event) the states that `save` asked for, None with `"last"`.
    """

    y: Tensor
    nfe: int
    grid: Tensor
    ys: Tensor | None = None


def solve(
    sde: SDE,
    solver: StochasticSolver,
    y0: Tensor,
    grid: Tensor,
    *,
    path: Path | None = None,
    seed: int = 0,
    save: str | Sequence[int] = "last",
    progress: bool = False,
) -> Solution:
    """Solve an SDE on a fixed grid. Gradients flow to y0 and to whatever drift and diffusion hold.

    Args:
        sde: the problem; `ODE(drift)` for one without noise.
        solver: any stochastic solver whose card lists the problem's noise type and calculus.
        y0: (*batch, *event) floating point, finite.
        grid: (n,) strictly increasing times, n >= 2.
        path: a `BrownianPath` over at least the grid, for noise that other solves and other step sizes
            shall see too; without it fresh exact increments are drawn from `seed`, the fast way.
        save: `"last"` keeps the final state, `"all"` every one, `[0, 32, 64]` those at these places of
            the grid.
        progress: show a progress bar.

    Raises:
        InputError: before any step, for input that cannot work.
        NonFiniteError: the final state is not finite; says after which step and for how many paths.
    """
    times = check_times(grid)
    kept = _kept(save, len(times))
    noise_shape, keeps_graph = _check(sde, solver, y0, times)
    calls = _Counter(sde)
    y0 = y0.contiguous()  # an expanded state has no memory of its own, which forward-mode AD wants
    if path is None:
        path = _fresh(solver.card.levy, noise_shape, seed, y0, reuse=not keeps_graph)
    else:
        _check_path(path, solver, times, noise_shape, y0)
    states = _walk(calls.sde, solver, y0, times, path)
    bar = _bar(states, len(times) - 1) if progress else states
    with torch.no_grad() if not keeps_graph else contextlib.nullcontext():
        y, ys = y0, [y0] if 0 in kept else []
        for i, y in enumerate(bar, 1):
            if i in kept:
                ys.append(y)
        # one look at the end costs nothing; only a bad end is replayed to find where it went wrong
        if not bool(y.isfinite().all()):
            raise _locate(sde, solver, y0, times, path)
    return Solution(y, calls.made, times, torch.stack(ys) if ys else None)


def _kept(save: Any, count: int) -> range | frozenset[int]:
    """Places of the grid whose states are kept."""
    if isinstance(save, str) and save in ("last", "all"):
        return range(count if save == "all" else 0)
    places = list(save) if isinstance(save, Sequence) and not isinstance(save, str) else []
    whole = all(type(i) is int and 0 <= i < count for i in places)
    if not places or not whole or places != sorted(set(places)):
        raise InputError(
            f"save: got {save!r}, expected 'last', 'all' or increasing places from 0 to {count - 1}."
        )
    return frozenset(places)


def _fresh(levy: str, shape: tuple[int, ...], seed: int, y0: Tensor, reuse: bool) -> Path:
    """Exact increments that no one will ask for again; areas by moments, for no path is to be matched."""
    kind = levy if levy in LEVY_ORDER else "H" if levy else "W"
    fresh = FreshIncrements(shape, kind, seed, y0.dtype, y0.device, reuse=reuse)
    return _FreshAreas(fresh) if levy == "A" else fresh


class _FreshAreas:
    """Fresh increments with Foster's moment-matched area."""

    levy, area = "H", True

    def __init__(self, source: FreshIncrements) -> None:
        self.source = source

    def increments(self, grid: Tensor) -> Iterator[Increment]:
        # hashed: the seed itself is the stream that a user's own y0 may have come from; 0 is not the source's
        generator = torch.Generator(self.source.device).manual_seed(node_seed(key_of(self.source.seed), 0))
        for increment in self.source.increments(grid):
            yield replace(increment, A=levy_area(increment, "foster", generator))


def _walk(sde: SDE, solver: StochasticSolver, y: Tensor, times: Tensor, path: Path) -> Iterator[Tensor]:
    """The states after each step."""
    ts = times.to(y.device, y.dtype).unbind()
    carry = solver.init(sde, ts[0], y)
    for t0, t1, increment in zip(ts[:-1], ts[1:], path.increments(times), strict=True):
        y, carry, _ = solver.step(sde, t0, t1, y, increment, carry)
        yield y


class _Counter:
    """An SDE that counts the evaluations of its drift."""

    def __init__(self, sde: SDE) -> None:
        self.made = 0
        self._drift = sde.drift
        self.sde = replace(sde, drift=self.drift)

    def drift(self, t: Tensor, y: Tensor) -> Tensor:
        self.made += 1
        return self._drift(t, y)


def _check(sde: SDE, solver: Any, y0: Tensor, times: Tensor) -> tuple[tuple[int, ...], bool]:
    """Refuse what cannot work; return the shape of the noise and whether a graph must be kept."""
    if not isinstance(sde, SDE):
        raise InputError(
            f"sde: got {type(sde).__name__}, expected fewstep.SDE or ODE. Wrap a torchsde object with "
            "SDE.from_torchsde; a diffusion model goes to fewstep.sample."
        )
    if not isinstance(solver, StochasticSolver):
        raise InputError(
            f"solver: got {getattr(solver, '__name__', type(solver).__name__)}, expected an object such "
            "as EulerMaruyama(). Classes are called first; diffusion solvers go to fewstep.sample."
        )
    check_solves(sde, solver)
    if not torch.is_tensor(y0) or not y0.is_floating_point() or y0.is_meta:
        came = y0.dtype if torch.is_tensor(y0) else type(y0).__name__
        cure = "y0.float()" if torch.is_tensor(y0) else "torch.as_tensor(y0, dtype=torch.float32)"
        raise InputError(f"y0: got {came}, expected a floating point tensor. Use {cure}.")
    if y0.dim() == 0:
        raise InputError("y0: got a 0-d tensor, expected (*batch, *event). Use y0.reshape(1).")
    if not bool(y0.isfinite().all()):
        raise InputError(f"y0: got {int((~y0.isfinite()).sum())} values that are not finite, expected none.")
    f, g = sde.drift(times[0].to(y0), y0), sde.diffusion(times[0].to(y0), y0)
    _check_field("drift", f, y0)
    _check_field("diffusion", g, y0)
    if tuple(f.shape) != tuple(y0.shape):
        raise InputError(
            f"drift: got shape {tuple(f.shape)}, expected y's shape {tuple(y0.shape)}. Return one value "
            "for each component of y."
        )
    keeps_graph = torch.is_grad_enabled() and any(v.requires_grad for v in (y0, f, g))
    return sde.noise_shape(y0, g), keeps_graph


def _check_field(name: str, value: Any, y0: Tensor) -> None:
    came = value.dtype if torch.is_tensor(value) else type(value).__name__
    if not torch.is_tensor(value):
        raise InputError(
            f"{name}: got {came}, expected a tensor. Return torch.full_like(y, ...) for a constant."
        )
    if came != y0.dtype:
        raise InputError(
            f"{name}: got {came}, expected {y0.dtype} as y0 has. Make its constants and parameters of "
            "that dtype, or convert y0."
        )
    if value.device != y0.device:
        raise InputError(f"{name}: got a tensor on {value.device}, expected {y0.device} as y0 is.")


def check_solves(sde: SDE, solver: StochasticSolver) -> None:
    """Refuse a problem that the solver's card does not list."""
    name, card = type(solver).__name__, solver.card
    if sde.noise_type not in card.strong_order:
        raise InputError(
            f"solver: got {name} for {sde.noise_type!r} noise; it solves "
            f"{', '.join(card.strong_order)}. fewstep.solvers({sde.noise_type!r}) lists those that can."
        )
    if sde.sde_type not in card.sde_types and sde.noise_type != "additive":
        raise InputError(
            f"solver: got {name} for a {sde.sde_type!r} SDE; it solves {', '.join(card.sde_types)}. "
            "Convert the drift (half of g'g is the difference) or choose another solver."
        )


def _check_path(
    path: Any, solver: StochasticSolver, times: Tensor, shape: tuple[int, ...], y0: Tensor
) -> None:
    needs = solver.card.levy
    if not hasattr(path, "increments") or not hasattr(path, "levy"):
        raise InputError(
            f"path: got {_validation.describe(path)}, expected a BrownianPath, an AreaPath or FreshIncrements. A "
            "torchsde path is wrapped: fewstep.integrations.torchsde.TorchsdePath(bm)."
        )
    if needs == "A" and not getattr(path, "area", False):
        raise InputError(
            f"path: got {type(path).__name__}, which has no space-space area; {type(solver).__name__} needs "
            "it. Wrap the path: AreaPath(path, cells=...), with path levy='H'."
        )
    if needs in LEVY_ORDER and LEVY_ORDER[path.levy] < LEVY_ORDER[needs]:
        raise InputError(
            f"path: got levy={path.levy!r}; {type(solver).__name__} needs {needs!r}. Make "
            f"the path with levy={needs!r}."
        )
    came = tuple(getattr(path, "shape", shape))
    if came != shape:
        raise InputError(
            f"path: got shape {came}, expected {shape} for this y0 and diffusion. Make the "
            f"path with shape={shape}."
        )
    slack = 1e-6 * float(times[-1] - times[0])
    t0, t1 = getattr(path, "t0", times[0]), getattr(path, "t1", times[-1])
    if t0 > times[0] + slack or t1 < times[-1] - slack:
        raise InputError(
            f"path: got [{t0:g}, {t1:g}], which does not reach over the grid "
            f"[{float(times[0]):g}, {float(times[-1]):g}]. Make the path at least as long."
        )
    if getattr(path, "dtype", y0.dtype) != y0.dtype:
        raise InputError(
            f"path: got {path.dtype}, expected {y0.dtype} as y0 has. Make the path with dtype={y0.dtype}."
        )


def _locate(sde: SDE, solver: StochasticSolver, y0: Tensor, times: Tensor, path: Path) -> NonFiniteError:
    """Replay the solve on the same noise, looking after every step."""
    step, paths = len(times) - 2, 0
    for step, y in enumerate(_walk(sde, solver, y0, times, path)):  # noqa: B007
        paths = int((~y.isfinite()).reshape(len(y), -1).any(1).sum())
        if paths:
            break
    return NonFiniteError(
        f"{type(solver).__name__} left the finite numbers at step {step} (t = {float(times[step]):.6g} "
        f"to {float(times[step + 1]):.6g}) for {paths} of {len(y0)} paths. Take smaller steps or a "
        "more stable solver, and check drift and diffusion there.",
        step=step, paths=paths,
    )  # fmt: skip


def _bar(states: Iterator[Tensor], total: int) -> Iterator[Tensor]:
    from tqdm import tqdm

    return iter(tqdm(states, total=total, unit="step", leave=False))
