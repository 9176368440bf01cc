"""Gradients of a solve in less memory than its graph: by recomputing segments of steps, or by undoing the steps.

Both compute what backpropagation through all steps computes, and call the solver's own step for it.
"""

import contextlib
import math
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten

from .brownian.replay import Noise, Replay
from .captured import Unknown, captured, edge_of
from .problem import SDE
from .solver import Step, StochasticSolver

GRADIENTS = ("direct", "checkpoint", "reversible")
CHUNK = 16  # steps whose noise is asked again at once where steps are undone

Watch = Callable[[Iterable[Step]], Iterator[Step]]
Grads = Sequence[Tensor | None]


@dataclass
class _Walk:
    """What the forward passes, which keep no graph, and the backward passes share.

    Args:
        kept: the indices of times whose states are used; that of the last state is one of them.
        fixed: what drift and diffusion depend on besides t and y, of `captured`.
        autocast: enters the present state of autocast again.
        unknown: what they also depend on in the steps of a backward pass.
    """

    sde: SDE
    solver: Any
    noise: Replay
    kept: frozenset[int]
    fixed: Sequence[Tensor]
    autocast: Callable[[], contextlib.AbstractContextManager[Any]]
    unknown: Unknown = field(default_factory=Unknown)

    def steps(self, chunk: int, ts: Sequence[Tensor], y: Tensor, carry: Any) -> Iterator[Step]:
        """Yield the steps of a chunk, whose times are `ts`."""
        for t0, t1, increment in zip(ts[:-1], ts[1:], self.noise.chunk(chunk), strict=True):
            if t0.requires_grad:
                increment = replace(increment, h=t1 - t0)  # type: ignore[arg-type]
            y, carry, _ = step = self.solver.step(self.sde, t0, t1, y, increment, carry)
            yield step


def stored_steps(
    gradient: str, problems: tuple[SDE, SDE, SDE], solver: StochasticSolver, y: Tensor, times: Tensor, noise: Noise,
    carry: Any, kept: Container[int], watch: Watch,
) -> Iterator[Step]:  # fmt: skip
    """Yield the steps over `times` with the graph of a gradient that stores less than all of them.

    Args:
        gradient: `"checkpoint"` or `"reversible"`.
        problems: the problem as the user gave it, as the steps call it, and with checks and counts of calls.
        times: (n,) float64 on y's device.
        kept: the indices of times whose states are used; those of the others are any states.
        watch: wraps the steps of the forward pass, for a progress bar.
    """
    asked, plain, sde = problems
    last, undone = len(times) - 1, gradient == "reversible"
    replay = Replay(replace(noise, grid=noise.grid.detach()), CHUNK if undone else math.isqrt(last - 1) + 1)
    autocast = _autocast(y.device.type)
    with autocast():
        fixed = captured(asked, plain, times[0].detach(), y)
    indices = frozenset(i for i in range(1, last + 1) if i in kept or i == last)
    walk = _Walk(sde, solver, replay, indices, fixed, autocast)
    return _undone(walk, times, y, carry, watch) if undone else watch(_recomputed(walk, times, y, carry))


def _apply(function: Any, *args: Any) -> Any:
    return function.apply(*args)


# ------------------------------------------------- checkpoint


def _recomputed(walk: _Walk, times: Tensor, y: Tensor, carry: Any) -> Iterator[Step]:
    """The steps as one node of the graph per chunk, which keeps the state before it."""
    carry = walk.solver.init(walk.sde, times[0], y) if carry is None else carry
    for chunk in range(len(walk.noise)):
        first, last = walk.noise.bounds(chunk)
        tensors, rebuild = _split(carry)
        part = _Part(walk, chunk, rebuild)
        found: Any = _apply(_Segment, part, times[first : last + 1], y, *tensors, *walk.fixed)
        states = dict(zip(part.ends, found))
        y, carry = states[last - first], part.rebuild_after(found[len(states) :])
        for i in range(1, last - first + 1):
            yield Step(states.get(i, y), carry)


@dataclass
class _Part:
    """The steps of one chunk as a function of times, state and the tensors of the carry."""

    walk: _Walk
    chunk: int
    rebuild: Callable[[Sequence[Tensor]], Any]
    rebuild_after: Callable[[Sequence[Tensor]], Any] = field(init=False)

    def __post_init__(self) -> None:
        first, last = self.walk.noise.bounds(self.chunk)
        self.ends: list[int] = [i - first for i in range(first + 1, last + 1) if i in self.walk.kept or i == last]

    def run(self, times: Tensor, y: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The states at `ends`, and the tensors of the last carry."""
        states = []
        for i, step in enumerate(self.walk.steps(self.chunk, times.unbind(), y, self.rebuild(tensors)), 1):
            if i in self.ends:
                states.append(step.y)
        after, self.rebuild_after = _split(step.carry)
        return (*states, *after)


class _Segment(torch.autograd.Function):
    """The steps of a chunk, computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, part: _Part, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.part = part
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return part.run(*tensors[: len(tensors) - len(part.walk.fixed)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[1:]
        return None, *_apply(_Pullback, ctx.part, needed, len(grads), *grads, *ctx.saved_tensors)


class _Pullback(torch.autograd.Function):
    """The backward pass of `_Segment`, which has a derivative itself."""

    @staticmethod
    def forward(ctx: Any, part: _Part, needed: Sequence[bool], count: int, *tensors: Tensor) -> tuple[Any, ...]:
        ctx.part, ctx.needed, ctx.count = part, needed, count
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        found, _ = _Pullback.pull(part, needed, tensors[:count], tensors[count:])
        part.walk.unknown.check()
        return tuple(found)

    @staticmethod
    def pull(
        part: _Part, needed: Sequence[bool], grads: Grads, tensors: Sequence[Tensor], twice: bool = False
    ) -> tuple[Grads, list[Tensor]]:
        """The gradients of the tensors that need one, and the leaves that they are functions of."""
        count = len(tensors) - len(part.walk.fixed)
        leaves = [x.detach().requires_grad_(need) for x, need in zip(tensors[:count], needed)]
        with torch.enable_grad(), part.walk.autocast():
            values = part.run(*leaves)
        return _pulled(values, grads, [*leaves, *tensors[count:]], needed, twice, part.walk.unknown), leaves

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *second: Tensor | None) -> tuple[Any, ...]:
        grads, tensors = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        grads = [g if g is None else g.detach().requires_grad_() for g in grads]
        with torch.enable_grad():
            found, leaves = _Pullback.pull(ctx.part, ctx.needed, grads, tensors, twice=True)
        inputs = [*grads, *leaves, *tensors[len(leaves) :]]
        needed = [x is not None and need for x, need in zip(inputs, ctx.needs_input_grad[3:], strict=True)]
        needed = [need and x.requires_grad for need, x in zip(needed, inputs)]
        return None, None, None, *_pulled(found, second, inputs, needed)


def _pulled(
    values: Grads, grads: Grads, inputs: Sequence[Any], needed: Sequence[bool], twice: bool = False,
    unknown: Unknown | None = None,
) -> list[Tensor | None]:  # fmt: skip
    """The gradients of the inputs that need one, from those of the values; with a graph of their own for `twice`.

    Other leaves that the values depend on are `unknown`.
    """
    out: list[Tensor | None] = [None] * len(inputs)
    pairs = [(v, g) for v, g in zip(values, grads, strict=True) if v is not None and g is not None and v.requires_grad]
    wanted = [i for i, need in enumerate(needed) if need]
    if pairs and wanted:
        roots, weights = zip(*pairs, strict=True)
        if unknown is not None:
            unknown.add(roots, {edge_of(x) for x in inputs if x.requires_grad})
        found = torch.autograd.grad(roots, [inputs[i] for i in wanted], weights, create_graph=twice, allow_unused=True)
        for i, grad in zip(wanted, found, strict=True):
            out[i] = grad
    return out


def _split(carry: Any) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
    """The tensors of a carry, and the function that makes a carry of such tensors."""
    leaves, spec = tree_flatten(carry)
    fixed = [None if torch.is_tensor(x) else (x,) for x in leaves]

    def rebuild(tensors: Sequence[Tensor]) -> Any:
        found = iter(tensors)
        return tree_unflatten([next(found) if x is None else x[0] for x in fixed], spec)

    return [x for x in leaves if torch.is_tensor(x)], rebuild


# ------------------------------------------------- reversible


def _undone(walk: _Walk, times: Tensor, y: Tensor, carry: Any, watch: Watch) -> Iterator[Step]:
    """The steps as one node of the graph, which keeps the last state."""
    indices, given = sorted(walk.kept), carry or ()
    out = _apply(_Reversible, walk, watch, len(given), times, y, *given, *walk.fixed)
    states = dict(zip(indices, out))
    return (Step(states.get(i, y), out[len(indices) :]) for i in range(1, len(times)))


class _Reversible(torch.autograd.Function):
    """All steps, undone one by one in the backward pass."""

    @staticmethod
    def forward(ctx: Any, walk: _Walk, watch: Watch, given: int, times: Tensor, y: Tensor, *others: Tensor) -> Any:
        ts = times.unbind()

        def steps(y: Tensor, carry: Any) -> Iterator[Step]:
            for chunk in range(len(walk.noise)):
                first, last = walk.noise.bounds(chunk)
                for step in walk.steps(chunk, ts[first : last + 1], y, carry):
                    y, carry, _ = step
                    yield step

        states = []
        for i, step in enumerate(watch(steps(y, others[:given] or walk.solver.init(walk.sde, ts[0], y))), 1):
            if i in walk.kept:
                states.append(step.y)
        ctx.walk, ctx.given = walk, given
        ctx.save_for_backward(times, y, states[-1], *step.carry)
        ctx.set_materialize_grads(False)
        return (*states, *step.carry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        walk, needed = ctx.walk, ctx.needs_input_grad
        times, start, y, *carry = ctx.saved_tensors
        sums = _Sums(walk, needed[5 + ctx.given :], times if needed[3] else None)
        due = dict(zip(sorted(walk.kept), grads))
        adjoint: list[Tensor | None] = [None, *grads[len(due) :]]
        ts = times.unbind()
        with walk.autocast():
            for chunk in reversed(range(len(walk.noise))):
                first, last = walk.noise.bounds(chunk)
                increments = list(walk.noise.chunk(chunk))
                for i in reversed(range(first, last)):
                    increment = increments.pop()
                    adjoint[0] = _plus(adjoint[0], due.get(i + 1))
                    y, carry = walk.solver.undo(walk.sde, ts[i], ts[i + 1], y, increment, tuple(carry))
                    adjoint = sums.pull(i, ts[i : i + 2], y, carry, increment, adjoint)
            if not ctx.given:
                adjoint = [_plus(adjoint[0], sums.pull_start(ts[0], start, adjoint[1:]))]
        walk.unknown.check()
        return None, None, None, sums.times, *adjoint, *sums.found


class _Sums:
    """The gradients of times and of what is fixed, summed over the steps."""

    def __init__(self, walk: _Walk, needed: Sequence[bool], times: Tensor | None) -> None:
        self.walk, self.needed = walk, needed
        self.found: list[Tensor | None] = [None] * len(walk.fixed)
        self.times = None if times is None else torch.zeros_like(times)

    def pull(
        self, i: int, ts: Sequence[Tensor], y: Tensor, carry: Sequence[Tensor], increment: Any, adjoint: Grads
    ) -> list[Tensor | None]:
        """The gradients of y and carry before step i, from those after it."""
        y, *carry = before = [x.detach().requires_grad_() for x in (y, *carry)]
        ts = t0, t1 = self._leaves(ts)
        with torch.enable_grad():
            if self.times is not None:
                increment = replace(increment, h=t1 - t0)
            after = self.walk.solver.step(self.walk.sde, t0, t1, y, increment, tuple(carry))
        return self._pull((after.y, *after.carry), adjoint, before, i, ts)

    def pull_start(self, t: Tensor, y: Tensor, adjoint: Grads) -> Tensor | None:
        """The gradient of the first state, from those of the first carry."""
        y, (t,) = y.detach().requires_grad_(), self._leaves([t])
        with torch.enable_grad():
            carry = self.walk.solver.init(self.walk.sde, t, y)
        return self._pull(carry, adjoint, [y], 0, [t])[0]

    def _leaves(self, ts: Sequence[Tensor]) -> list[Tensor]:
        return [t.detach().requires_grad_(self.times is not None) for t in ts]

    def _pull(
        self, values: Grads, adjoint: Grads, before: Sequence[Tensor], i: int, ts: Sequence[Tensor]
    ) -> list[Tensor | None]:
        own = len(before)
        needed = [True] * own + [self.times is not None] * len(ts) + list(self.needed)
        found = _pulled(values, adjoint, [*before, *ts, *self.walk.fixed], needed, unknown=self.walk.unknown)
        if self.times is not None:
            for place, grad in enumerate(found[own : own + len(ts)], i):
                self.times[place] += 0 if grad is None else grad
        self.found = list(map(_plus, self.found, found[own + len(ts) :]))
        return found[:own]


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _autocast(kind: str) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """What enters the present state of autocast again; its cache would hold a graph."""
    if not torch.amp.is_autocast_available(kind):
        return contextlib.nullcontext
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return partial(torch.autocast, kind, dtype, enabled, False)
