"""Noise in compiled graphs: one custom operator, keyed by what identifies the noise.

A draw cannot be traced. While torch.compile traces, a loop takes its noise from the operator `fewstep::noise`, whose
arguments are constants and integers only: the source, the seeds, the shape and the number of the draw. It runs the same
code as an eager loop, so the numbers are the same to the bit, and a compiled backward pass may repeat it.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ._tracing import decode, encode, while_tracing
from .brownian import BrownianPath, FreshIncrements, Increment
from .brownian.increment import LEVY_ORDER, Path
from .errors import InputError
from .executor import Draw, Normals
from .plan import Plan
from .plan_noise import generators, seeded_normals, unit_normals
from .schedule import Schedule
from .traced_plan import TracedPlan, plan_numbered, same, traced_plan

Draws = Iterator[Sequence[Tensor]]
Start = Callable[[tuple[int, ...], Tensor], Draws]
"""`(seeds, like) -> the draws of a loop, in order`; `like` is an empty tensor of the shape, dtype and device."""

MOST_LIVE = 8  # loops whose next draw is cheap; others start again from their first draw

_starts: list[Start] = []
_numbers: dict[Hashable, int] = {}
_live: OrderedDict[tuple[Any, ...], tuple[int, Draws]] = OrderedDict()
_lock = threading.RLock()  # a draw may draw from another source


def _registered(content: Hashable, start: Start) -> int:
    """The number of a source of noise, by which graphs of this process find it; equal contents have one number."""
    with _lock:
        if content not in _numbers:
            _numbers[content] = len(_starts)
            _starts.append(start)
        return _numbers[content]


# generators are seeded on the host, which a CUDA graph would not repeat
TAGS: dict[str, Any] = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}


@torch.library.custom_op("fewstep::noise", mutates_args=(), **TAGS)
def noise(
    source: int, seeds: Sequence[int], shape: Sequence[int], dtype: torch.dtype, device: torch.device, index: int,
    count: int, letters: int, area: bool,
) -> list[Tensor]:  # fmt: skip
    """Draw number `index` of the `count` of a loop: `letters` tensors of `shape`, and (*shape, m) for an area."""
    if source >= len(_starts):
        raise InputError("noise: this program was traced in another process. Compile or export it again in this one.")
    start = _starts[source]
    key = (source, tuple(seeds), tuple(shape), dtype, device)
    with _lock:
        position, draws = _live.pop(key, (0, None))
        if draws is None or position > index:
            position, draws = 0, start(key[1], torch.empty(key[2], dtype=dtype, device=device))
        drawn = next(itertools.islice(draws, index - position, None))
        if index + 1 < count:
            _live[key] = (index + 1, draws)
            while len(_live) > MOST_LIVE:
                _live.popitem(last=False)
    return [z.to(device, dtype) for z in drawn]


@noise.register_fake
def _(
    source: int, seeds: Sequence[int], shape: Sequence[int], dtype: torch.dtype, device: torch.device, index: int,
    count: int, letters: int, area: bool,
) -> list[Tensor]:  # fmt: skip
    shapes = [tuple(shape)] * letters + [(*shape, shape[-1])] * area
    return [torch.empty(s, dtype=dtype, device=device) for s in shapes]


@dataclass  # frozen ones cannot be made in a trace before torch 2.13
class TracedIncrements:
    """A path, or fresh increments, over one grid (`lengths`), drawn by the operator."""

    source: int
    lengths: tuple[float, ...]
    seeds: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    letters: int
    area: bool = False

    def __call__(self) -> Iterator[Increment]:
        """The increments over the intervals of the grid that the source was made for."""
        fixed = self.seeds, self.shape, self.dtype, self.device
        for i, h in enumerate(self.lengths):
            drawn: list[Tensor] = noise(self.source, *fixed, i, len(self.lengths), self.letters, self.area)
            made = Increment(h, *drawn[: self.letters])
            yield replace(made, A=drawn[-1]) if self.area else made


def _signed(*seeds: int) -> tuple[int, ...]:
    """The seeds as 64-bit integers; those that agree modulo 2^64 give one noise."""
    return tuple(s - 2**64 if s >= 2**63 else s for s in seeds)


def traced_path(path: Path, times: Tensor, like: Tensor, shape: tuple[int, ...]) -> TracedIncrements:
    """A path as the operator draws it; a `BrownianPath` by its arguments, any other by its identity."""
    dtype, device, area = getattr(path, "dtype", like.dtype), getattr(path, "device", like.device), False
    seeds: tuple[int, ...] = ()
    if type(path) is BrownianPath:
        seeds = _signed(path.seed) if path.seeds is None else _signed(*path.seeds)
        clock = path._clock
        text = _tree(times, clock.knots, clock.log, path.levy, path.seeds is None, path.portable, path.generator)
    else:
        area = getattr(path, "area", False)
        text = _object(path, times)
    source, lengths = decode(text)
    return TracedIncrements(source, lengths, seeds, shape, dtype, device, LEVY_ORDER[path.levy], area)


def traced_fresh(
    times: Tensor, like: Tensor, shape: tuple[int, ...], levy: str, seed: int, area: bool
) -> TracedIncrements:
    """`FreshIncrements` as the operator draws them."""
    source, lengths = decode(_fresh(times, levy, area))
    return TracedIncrements(source, lengths, _signed(seed), shape, like.dtype, like.device, LEVY_ORDER[levy], area)


def traced_normals(plan: Plan, x: Tensor, seed: int | list[int], path: Path | None, schedule: Schedule) -> Draw:
    """The normals of `seeded_normals` as the operator draws them, in the order of the plan's rows."""
    own: Any = plan if isinstance(plan, TracedPlan) else traced_plan(same, plan)
    source, index = _plan_normals(own.number, isinstance(seed, int), path, schedule), 0
    seeds, shape = _signed(*([seed] if isinstance(seed, int) else seed)), tuple(x.shape)

    def draw(tau0: float, tau1: float) -> Normals:
        nonlocal index
        index += 1
        return tuple(noise(source, seeds, shape, x.dtype, x.device, index - 1, own.draws, own.letters, False))

    return draw


def traced_start(shape: tuple[int, ...], seed: int | list[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The unit normals of a first state, as the operator draws them."""
    seeds = _signed(*([seed] if isinstance(seed, int) else seed))
    drawn: list[Tensor] = noise(_first_normals(isinstance(seed, int)), seeds, shape, dtype, device, 0, 1, 1, False)
    return drawn[0]


def _fields(increments: Iterable[Increment]) -> Draws:
    return ([z for z in (i.W, i.H, i.K, i.A) if z is not None] for i in increments)


# torch.compile calls these while it traces, with real values, and keeps what they return as constants


@while_tracing
def _fresh(times: Tensor, levy: str, area: bool) -> str:
    lengths = times.diff().tolist()

    def start(seeds: tuple[int, ...], like: Tensor) -> Draws:
        fresh = FreshIncrements(tuple(like.shape), levy, seeds[0], like.dtype, like.device, area=area)
        return _fields(fresh.increments(times))

    return encode((_registered(("fresh", *times.tolist(), levy, area), start), lengths))


@while_tracing
def _tree(
    times: Tensor, knots: tuple[float, ...], log: bool, levy: str, one_seed: bool, portable: bool, generator: str
) -> str:
    clock: dict[str, Any] = {"clock": "log" if log else "linear", "knots": knots}
    clock |= {"portable": portable, "generator": generator}

    def start(seeds: tuple[int, ...], like: Tensor) -> Draws:
        many: dict[str, Any] = {"seed": seeds[0]} if one_seed else {"seeds": seeds}
        path = BrownianPath(
            tuple(like.shape), knots[0], knots[-1], levy=levy, dtype=like.dtype, device=like.device, **clock, **many
        )
        return _fields(path.increments(times))

    same = BrownianPath((1,), knots[0], knots[-1], **clock)
    content = ("tree", times.dtype, *times.tolist(), knots, log, levy, one_seed, portable, generator)
    return encode((_registered(content, start), [i.h for i in same.increments(times)]))


@while_tracing
def _object(path: Path, times: Tensor) -> str:
    def start(seeds: tuple[int, ...], like: Tensor) -> Draws:
        return _fields(path.increments(times))

    # the source keeps the path, whose id is then that of no other object
    content = ("object", id(path), times.dtype, *times.tolist())
    return encode((_registered(content, start), [i.h for i in path.increments(times)]))


@while_tracing
def _plan_normals(number: int, one_seed: bool, path: Path | None, schedule: Schedule) -> int:
    plan = plan_numbered(number)

    def start(seeds: tuple[int, ...], like: Tensor) -> Draws:
        draw = seeded_normals(plan, like, seeds[0] if one_seed else list(seeds), path, schedule=schedule)
        return (draw(*row.interval) for row in plan.rows if row.interval is not None)

    return _registered(("plan", number, one_seed, path and id(path), schedule.sigma_min, schedule.sigma_max), start)


@while_tracing
def _first_normals(one_seed: bool) -> int:
    def start(seeds: tuple[int, ...], like: Tensor) -> Draws:
        source = generators(seeds[0] if one_seed else list(seeds), like.device)
        yield [unit_normals(tuple(like.shape), source, like.dtype, like.device)]

    return _registered(("first", one_seed), start)
