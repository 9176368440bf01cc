"""`solve`: the loop for SDEs and ODEs on a fixed grid. It checks, steps, counts and saves for any method."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from . import _progress, _validation
from ._tracing import constants, placed, readable, transformed
from .adaptive import Adaptive, InOrder, OfPath, Problem, Run
from .brownian import FreshIncrements, Increment
from .brownian.area_path import path_for
from .brownian.increment import Path, check_path, letters_for
from .brownian.replay import Noise
from .brownian.time_scale import rounding
from .catalog import written
from .compiled import canonical, compiled_steps, noise_of, program
from .errors import InputError, NonFiniteError, named, warn
from .events import Event
from .gradient import GRADIENTS, stored_steps
from .noise_op import traced_fresh, traced_path
from .outputs import Solution, collected, kept_indices, solution, with_outputs
from .problem import CONSTANT, SDE, Field
from .solver import ReversibleSolver, Step, StochasticSolver

GROWTH = 1e10  # of |y| over max(|y0|, 1): hardly that of a solution
# by noise: a solver of the longest stable steps, and their length times k for a drift -k y, less some for the noise
STABLE = {"additive": ("SOSRA", 5.0), "stratonovich": ("SPaRK", 3.4), "ito": ("SRID2", 2.3), "": ("EulerMaruyama", 1.9)}
CELLS = 256  # of areas, where a solve makes a path that has them
Source = Callable[[], Iterable[Increment]]


@named
def solve(
    sde: SDE, solver: StochasticSolver, y0: Tensor, grid: Tensor | Sequence[float], *, path: Path | None = None,
    seed: int = 0, save: str | Sequence[int] = "last", progress: bool = False, compile: bool = False,
    gradient: str = "direct", carry: Any = None, steps: Adaptive | None = None,
    ts: Tensor | Sequence[float] | None = None, dense: bool = False, event: Event | None = None,
) -> Solution:  # fmt: skip
    """Solve an SDE or an ODE, on a fixed grid or in steps that follow the error.

    Gradients flow to y0, to the parameters of drift and diffusion and, for an ODE, to the grid.

    Args:
        sde: the problem; `ODE(drift)` for one without noise.
        solver: an SDE solver whose card lists the problem's noise type and calculus.
        y0: (*batch, *event) finite, floating point. For half precision the state and the path are in float32; drift,
            diffusion and the result are in y0's dtype.
        grid: (n,) strictly increasing times, n >= 2; for an ODE they may be strictly decreasing. Times and step
            sizes are float64; drift and diffusion receive them in y0's dtype, or the grid's where that is more precise.
        path: a `BrownianPath` over at least the grid, to reuse the same noise in other solves or at other step sizes.
            Without it, independent exact increments are drawn from `seed`, which is faster. An ODE uses neither.
        seed: of the increments where `path` is None, an integer from -2^63 to 2^64 - 1.
        save: `"last"` keeps the final state, `"all"` keeps the state at each time, `[0, 32, 64]` keeps the
            states at these indices of the grid.
        progress: show a progress bar on a terminal, in a pipe a line every 30 seconds.
        compile: compile the steps by torch.compile, eight per program, for drift and diffusion that it can trace. The
            noise is the same, drawn outside, or inside for a path with generator="counter" on a grid of 2^k of its
            steps; results agree to rounding. The first solve of a problem (these very
            functions), solver, shape and dtype compiles, which takes seconds; later ones with any path, seed and grid
            of at least nine steps use the program.
        gradient: how a backward pass gets what it needs; the solution is the same. `"direct"` keeps the values of all
            steps. `"checkpoint"` keeps one state in about sqrt(n) and computes the steps between them again, for any
            solver. `"reversible"` keeps the last state and undoes the steps, for `ReversibleHeun` and `Reversible`; it
            has no second derivatives. Drift and diffusion must then be deterministic, and use the same tensors at all
            times or be methods of a module. The noise is asked again. See docs/gradients.md.
        carry: `Solution.carry` of a solve by this solver that ended where this one starts.
        steps: `Adaptive(rtol, atol)` chooses the steps between the times of the grid, one size for the batch. Its
            sizes are constants for gradients. Without a `path` the noise is that of a `BrownianPath` of `seed`. A
            path with `seeds` is asked as any other, but the sizes depend on all of the batch.
        ts: (k,) times inside the grid whose states are `ys`, in place of `save`; those that are not in the grid
            become steps too.
        dense: keep all steps, so that `sol(t)` gives the state at any time: by one step of the solver from the last
            time before, along the same path (which `path` must be, unless the steps are adaptive).
        event: `(t, y) -> (*batch)`; each sample stops where its number changes sign, at `sol.event_t`, and the solve
            ends when all have. An ODE stops at the root (t is then (*batch) too), an SDE at the end of the step.

    Raises:
        InputError: invalid input, before the first step.
        NonFiniteError: the final state is not finite; its message names the step, counts the paths, and states which of
            drift, diffusion, derivative and path was not finite first.
        StepSizeError: adaptive steps became too short or too many; it has the solution up to there.
    """
    _check(sde, solver, y0, steps)
    compile = _validation.check_flag("compile", compile) and not (torch.compiler.is_compiling() or transformed())
    _check_gradient(gradient, solver, compile)
    dtype, asked = y0.dtype, sde
    sde, y0 = _in_float32(sde, dtype), y0.to(torch.promote_types(dtype, torch.float32))
    grid_ts, given = _validation.as_numbers("grid", grid), _validation.times_dtype(grid)
    times = _check_grid(grid_ts, sde, given)
    run = _run(steps, event, dense, compile, gradient, grid_ts)
    times, kept = (times, kept_indices(save, len(times))) if ts is None else with_outputs(ts, save, grid, times)
    watch = _watch(progress, len(times) - 1)
    calls: list[None] = []
    receives = torch.promote_types(given or y0.dtype, y0.dtype)
    _warn_of_equal_times(times, receives, given)
    problem = stepwise(sde, receives, calls)
    placed = _placed(grid_ts if _validation.has_graph(grid_ts) else times, y0)  # one copy for all evaluations
    f, g = _probe(problem, y0, placed.detach())
    noise_shape = sde.noise_shape(y0, g) if sde.noise_type != "none" else ()
    keeps_graph = torch.is_grad_enabled() and any(v.requires_grad for v in (y0, f, g))
    problem = answering(problem, f, g)
    keeps_graph |= _validation.has_graph(grid_ts)
    grid_ts = grid_ts if _validation.has_graph(grid_ts) else times
    calls.clear()
    y0 = y0.contiguous()  # forward-mode AD needs memory of its own, which an expanded state does not have
    source: Source = Noise(_Zeros(y0.dtype, y0.device), grid_ts)
    if sde.noise_type != "none":
        reuse = not keeps_graph and not compile
        path = _any_path(solver, seed, noise_shape, y0, times) if path is None and steps is not None else path
        source = _noise(solver, path, seed, noise_shape, y0, times, times.to(given or torch.float64), reuse)
    if run is not None:
        taken = watch(_run_steps(run, problem, solver, y0, cast(Noise, source), carry))
    elif compile:
        traced = answering(stepwise(_in_float32(asked, dtype), receives), _Like.of(f), _Like.of(g))  # without counts
        increments = noise_of(path if sde.noise_type != "none" else None, times.to(given or torch.float64), source)
        advance = program(asked, canonical(solver), receives, dtype)
        taken = watch(compiled_steps(advance, traced, problem, solver, y0, placed, increments, calls, carry))
    elif gradient == "direct" or not keeps_graph:
        taken = watch(take_steps(problem, solver, y0, placed, source, carry))
    else:
        problems, noise = (asked, stepwise(sde, receives), problem), cast(Noise, source)
        taken = stored_steps(gradient, problems, solver, y0, placed, noise, carry, kept, watch)
    with torch.no_grad() if not keeps_graph else contextlib.nullcontext():
        done = partial(solution, calls, times, kept, dtype, run)
        last, found = collected(taken, y0, kept, done)
        _check_end(problem, solver, y0, last, grid_ts, source)
    return found


def _in_float32(sde: SDE, dtype: torch.dtype) -> SDE:
    """A problem of this dtype; in half precision with a float32 state, which small increments are not lost in."""
    if dtype not in (torch.float16, torch.bfloat16):
        return sde
    return _wrapped_fields(sde, lambda name, field: lambda t, y: field(t, y.to(dtype)).to(y.dtype))


def _wrapped_fields(sde: SDE, wrap: Callable[[str, Field], Field]) -> SDE:
    """The problem with `wrap(name, field)` as its drift, diffusion and derivative; an ODE has only a drift to wrap."""
    names = ["drift"] + ["diffusion"] * (sde.noise_type != "none") + ["derivative"] * (sde.derivative is not None)
    wrapped: dict[str, Any] = {name: wrap(name, getattr(sde, name)) for name in names}
    return replace(sde, **wrapped)


class _Like(NamedTuple):
    """What a value is compared with: all that a compiled program needs of a first value."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: Tensor) -> "_Like":
        return cls(x.shape, x.dtype, x.device)


def answering(sde: SDE, f: Tensor | _Like, g: Tensor | _Like) -> SDE:
    """The problem whose values are checked against the first ones, f and g, and have memory of their own.

    A field may write its values to one buffer or to several in turn, as CUDA graphs and other runtimes do.
    """
    firsts = {"drift": (f, "y"), "diffusion": (g, "the first value"), "derivative": (g, "the diffusion")}

    def own(name: str, field: Field) -> Field:
        first, of = firsts[name]

        def call(t: Tensor, y: Tensor) -> Tensor:
            before = _validation.changes(y)
            try:
                out = field(t, y)
            except RuntimeError as error:
                if not _wrapped(y):
                    raise
                raise InputError(
                    f"{name}: got a function that torch.func cannot transform ({str(error).splitlines()[0]:.90}), "
                    "expected one whose value is a new tensor, computed by torch's operations from t and y. "
                    f"{_derivative_free(sde)}() needs no derivative."
                ) from error
            _validation.check_unchanged(name, y, before, "y")
            where = lambda: f" at t = {float(t):.6g}"  # noqa: E731
            return _copied(_validation.check_answer(name, out, cast(Tensor, first), where, of))

        return call

    return _wrapped_fields(sde, own)


def _copied(x: Tensor) -> Tensor:
    """A copy of x; an expanded one stays expanded."""
    if 0 not in x.stride():
        return x.clone()
    return x[tuple(slice(None if step else 1) for step in x.stride())].clone().expand(x.shape)


def _wrapped(x: Tensor) -> bool:
    """Whether x belongs to a transform of torch.func and has no memory of its own."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x)


def take_steps(
    sde: SDE, solver: StochasticSolver, y: Tensor, times: Tensor, source: Source,
    carry: Any = None,
) -> Iterator[Step]:  # fmt: skip
    """Yield each step; float64 `times` have a graph only where a gradient flows to them."""
    ts = _placed(times, y).unbind()
    carry = solver.init(sde, ts[0], y) if carry is None else carry
    for t0, t1, increment in zip(ts[:-1], ts[1:], source(), strict=True):
        step = solver.step(sde, t0, t1, y, increment, carry)
        y, carry, _ = step
        yield step


def states(sde: SDE, solver: StochasticSolver, y: Tensor, times: Tensor, source: Source) -> Iterator[Tensor]:
    """Yield the state after each of `take_steps`."""
    return (step.y for step in take_steps(sde, solver, y, times, source))


def _watch(progress: Any, count: int) -> Callable[[Iterable[Step]], Iterator[Step]]:
    """What shows the progress over `count` steps where it is asked for."""
    if _validation.check_flag("progress", progress) and not torch.compiler.is_compiling():
        return lambda steps: iter(_progress.progress(steps, "step", total=count))
    return iter


def _placed(times: Tensor, y: Tensor) -> Tensor:
    """The float64 times on y's device; on the CPU for MPS, which has no float64."""
    return placed(times, torch.device("cpu") if y.device.type == "mps" else y.device, times.dtype)


def _noise(
    solver: StochasticSolver, path: Path | None, seed: int, shape: tuple[int, ...], y0: Tensor, times: Tensor,
    given: Tensor, reuse: bool,
) -> Source:  # fmt: skip
    """A function that returns the increments over the grid from its start: `times`, and `given` in the user's dtype."""
    needs = solver.card.levy
    letters, area, tracing = letters_for(needs), needs == "A", torch.compiler.is_compiling()
    if path is None and tracing:
        return traced_fresh(times, y0, shape, letters, seed, area)
    if path is None:
        path = FreshIncrements(shape, letters, seed, y0.dtype, y0.device, reuse, area)
    else:
        first, *_, last = constants(times)
        check_path(path, type(solver).__name__, needs, shape, (first, last), y0.dtype, y0.device)
    return traced_path(path, given, y0, shape) if tracing else Noise(path, given)


class _Zeros:
    """The path of an ODE: one channel of zeros, for the (1, 1) matrix of `zero_diffusion`."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        # made here once: steps that are taken again in a backward pass make no tensors of their own
        zero, matrix = (torch.zeros(shape, dtype=dtype, device=device) for shape in ((1,), (1, 1)))
        self._fields = (zero, zero, zero, matrix)

    def increment(self, ta: float, tb: float) -> Increment:
        return Increment(tb - ta, *self._fields)

    def increments(self, grid: Tensor) -> Iterator[Increment]:
        lengths = grid.diff()
        steps: Any = lengths.unbind() if _validation.has_graph(grid) else constants(lengths)
        return (Increment(h, *self._fields) for h in steps)


def stepwise(sde: SDE, dtype: torch.dtype, calls: list[None] | None = None) -> SDE:
    """The problem as steps call it, with float64 times: drift and diffusion receive them in `dtype` on y's device.

    Each call of the drift extends the list `calls`.
    """

    def at(name: str, field: Field) -> Field:
        def call(t: Tensor, y: Tensor) -> Tensor:
            if name == "drift" and calls is not None:
                calls.append(None)
            return field(t.to(y.device, dtype), y)

        return call

    return _wrapped_fields(sde, at)


def _check(sde: SDE, solver: Any, y0: Tensor, steps: Any) -> None:
    """Check the problem, the solver and the initial state."""
    cure = "fewstep.SDE or ODE. Wrap a module or a torchsde object with SDE.from_module; diffusion models go to sample"
    _validation.check_instance("sde", sde, SDE, cure)
    cure = "an object such as EulerMaruyama(). Call a class first; diffusion solvers go to fewstep.sample"
    if isinstance(solver, str):
        cure += "." + written(solver).rstrip(".")
    _validation.check_instance("solver", solver, StochasticSolver, cure)
    if steps is not None:
        warn_of_bias(sde, solver)
    check_solves(sde, solver)
    expected = "a finite floating-point tensor (*batch, *event)"
    _validation.check_state("y0", y0, expected, _validation.at_once(y0))


def _run(control: Any, event: Any, dense: Any, compile: bool, gradient: str, grid: Tensor) -> Run | None:
    """What chooses, watches or keeps the steps; None for a plain walk over the grid."""
    _validation.check_instance("steps", control, (Adaptive, type(None)), "fewstep.Adaptive(rtol, atol) or None")
    if event is not None:
        _validation.check_callable("event", event, "a function (t, y) -> one number per sample")
    if not _validation.check_flag("dense", dense) and control is None and event is None:
        return None
    name = "steps" if control is not None else "event" if event is not None else "dense"
    tracing = torch.compiler.is_compiling() or transformed()
    for given, what in (
        (compile, "compile=True"), (gradient != "direct", f"gradient={gradient!r}"),
        (tracing, "torch.compile or torch.func"), (_validation.has_graph(grid), "a grid that requires grad"),
    ):  # fmt: skip
        if given:
            raise InputError(
                f"{name}: got it with {what}, expected one of them. Omit one: its steps are read one by one."
            )
    return Run(control, event, dense)


def warn_of_bias(sde: SDE, solver: StochasticSolver) -> None:
    """Warn of steps without the term in W^2, whose sum over steps that were chosen by W has another limit."""
    card = solver.card
    if sde.noise_type not in CONSTANT and "ito" in card.sde_types and card.strong_order.get("diagonal", 1.0) < 1:
        warn(
            f"steps: adaptive steps of {type(solver).__name__} have another limit than fixed ones where the noise "
            "depends on y, since large increments are those that are cut. Take a solver of strong order 1 or more for "
            "diagonal noise, such as Milstein() or SRID2(), or convert the SDE to 'stratonovich' and take Heun()."
        )


def _run_steps(run: Run, sde: SDE, solver: StochasticSolver, y0: Tensor, noise: Noise, carry: Any) -> Iterator[Step]:
    """The steps of a run, along a path that can be asked over any interval if they need that."""
    times, path = noise.grid, noise.path
    free = run.control is not None or run.knots is not None
    if free and sde.noise_type != "none" and (isinstance(path, FreshIncrements) or not hasattr(path, "increment")):
        name = "steps" if run.control is not None else "dense"
        raise InputError(
            f"{name}: got {type(path).__name__}, whose increments are drawn once, expected a path that can be asked "
            "again over any interval. Pass path=BrownianPath(...)."
        )
    if hasattr(path, "snapped"):
        times = path.snapped(times.double(), rounding(times))
    anywhere = free or not isinstance(path, FreshIncrements)
    own = OfPath(path) if anywhere else InOrder(iter(noise()))
    device = _placed(times, y0).device
    place = lambda t: torch.tensor(t, dtype=torch.float64, device=device)  # noqa: E731
    return run.steps(Problem(sde, solver, own, place), times.tolist(), y0, carry)


def _any_path(solver: StochasticSolver, seed: int, shape: tuple[int, ...], y0: Tensor, times: Tensor) -> Path:
    """A path of a seed over the grid, whose times are knots if they are more than a few."""
    ends = float(times[0]), float(times[-1])
    options: dict[str, Any] = {"seed": seed, "dtype": y0.dtype, "device": y0.device}
    if len(times) > 2:
        options["knots"] = times
    return path_for([solver.card.levy], shape, ends, CELLS, **options)


def _check_gradient(gradient: str, solver: StochasticSolver, compile: bool) -> None:
    """Check that the solver and what runs it can compute gradients in this way."""
    _validation.check_choice("gradient", gradient, GRADIENTS)
    if gradient == "direct":
        return
    where = "compile=True" if compile else "torch.compile" if torch.compiler.is_compiling() else "torch.func"
    if compile or torch.compiler.is_compiling() or transformed():
        raise InputError(
            f"gradient: got {gradient!r} within {where}, expected 'direct'. Omit {where}, or compile drift and "
            "diffusion alone."
        )
    if gradient == "reversible" and not isinstance(solver, ReversibleSolver):
        raise InputError(
            f"gradient: got 'reversible' for {type(solver).__name__}, whose steps cannot be undone, expected it for "
            "ReversibleHeun or Reversible(base). gradient='checkpoint' is for any solver."
        )


def _check_grid(times: Tensor, sde: SDE, dtype: torch.dtype | None) -> Tensor:
    """The grid as float64 times on the CPU; an ODE's may be decreasing and have a graph."""
    times = times.cpu()
    if sde.noise_type == "none":
        return _validation.check_times("grid", times.detach(), decreasing=True, dtype=dtype)
    if times.dim() == 1 and len(times) > 1 and constants((times.diff() < 0).all()):
        raise InputError(
            "grid: got decreasing times for an SDE, expected increasing ones: an SDE in reverse time has another "
            "drift, which depends on the law of y. Solve that SDE in the variable -t, or an ODE, which runs both ways."
        )
    return _validation.check_times("grid", times, dtype=dtype)


def _warn_of_equal_times(times: Tensor, dtype: torch.dtype, given: torch.dtype | None) -> None:
    """Warn where drift and diffusion receive one time for several of a list."""
    if given is None and not torch.compiler.is_compiling() and bool(constants((times.to(dtype).diff() == 0).any())):
        warn(
            f"Drift and diffusion receive t in {dtype}, y0's dtype, in which some times of the grid are equal. Pass "
            "the times as a float64 tensor: torch.tensor(times, dtype=torch.float64)."
        )


def _probe(sde: SDE, y0: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """The checked first values of drift and diffusion."""
    hint = "Return torch.full_like(y, ...) for a constant."
    f = _validation.check_answer("drift", sde.drift(times[0], y0), y0, of="y", hint=hint)
    g = sde.diffusion(times[0], y0)
    like = y0.new_empty(g.shape) if isinstance(g, Tensor) else y0
    return f, _validation.check_answer("diffusion", g, like, of="y", hint=hint)


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
            f"Solve sde.to_{card.sde_types[0]}(), the same process, or choose another solver."
        )


def _check_end(sde: SDE, solver: StochasticSolver, y0: Tensor, y: Tensor, times: Tensor, source: Source) -> None:
    """Check that the state at the end is finite, where it can be read; warn of one that has grown."""
    grown = (y.abs() > GROWTH * y0.abs().clamp(min=1)).any()
    checks = torch.stack([y0.isfinite().all(), y.isfinite().all(), grown])
    started, finite, grew = checks.tolist() if readable(checks) else (True, True, False)
    if not (started and finite):
        raise _locate(sde, solver, y0, times, source)
    if grew:
        cure = _shorter(sde, y0, y, times)
        warn(f"{type(solver).__name__}: y grew by more than {GROWTH:g}. {cure}")


def _locate(sde: SDE, solver: StochasticSolver, y: Tensor, times: Tensor, source: Source) -> NonFiniteError:
    """Repeat a failed solve on the same noise, to find the step and the part whose value was not finite first."""
    _validation.check_state("y0", y)  # where it could not be read at once
    parts: list[str] = []
    differentiated: list[None] = []

    def watched(name: str, field: Field) -> Field:
        def call(t: Tensor, y: Tensor) -> Tensor:
            out = field(t, y)
            if torch.is_grad_enabled():  # only where a solver differentiates
                differentiated.append(None)
            elif bool(y.isfinite().all()) and not bool(out.isfinite().all()):
                size = float(y.abs().max())
                cure = _shorter(sde, start, y, times) if size > GROWTH else f"Check the {name} there."
                parts.append(f"The {name} is not finite, for finite y of size up to {size:.3g}. {cure}")
            return out

        return call

    def increments() -> Iterator[Increment]:
        for increment in source():
            for name in ("W", "H", "K", "A"):
                value = getattr(increment, name)
                if value is not None and not bool(value.isfinite().all()):
                    parts.append(f"The path's {name} is not finite: check the path.")
            yield increment

    problem = _wrapped_fields(sde, watched)
    step, paths, start, before = 0, 0, y, y
    with torch.no_grad():
        for step, y in enumerate(states(problem, solver, y, times, increments)):  # noqa: B007, B020
            paths = int((~y.isfinite()).reshape(len(y), -1).any(1).sum())
            if paths:
                break
            before = y
            parts.clear()
        if differentiated and not parts:
            parts += _derivatives(sde, times[step].to(y.device), before)
    part = parts[0] if parts else f"The step overflows. {_shorter(sde, start, before, times)}"
    message = (
        f"{type(solver).__name__} produced non-finite values at step {step} (t = {float(times[step]):.6g} to "
        f"{float(times[step + 1]):.6g}) for {paths} of {len(y)} paths. {part}"
    )
    return NonFiniteError(message, step=step, paths=paths)


def _shorter(sde: SDE, start: Tensor, y: Tensor, times: Tensor) -> str:
    """What to do about a growth from the start to y: if the drift is stiff, which solver is stable in which steps."""
    with torch.no_grad():
        along = (y / y.abs().max().clamp(min=torch.finfo(y.dtype).tiny)).nan_to_num()
        size = 0.01 * start.abs().max().clamp(min=1)
        t = times[0].detach()
        change = sde.drift(t, start + size * along) - sde.drift(t, start)
        faster = _superlinear(sde, t, 100 * size * along)
        slope, h = float((change * along).sum() / (size * along.square().sum())), float(times.diff().abs().max())
    more = ""
    if faster and (name := _bounded(sde, t, 100 * size * along)):
        more = f" It grows faster than linearly: {name}() bounds its steps."
    if not slope * h < -0.1:
        return "If the solution does not grow like this, take smaller steps." + more.replace("It", "The drift", 1)
    kind = "additive" if sde.noise_type in CONSTANT else sde.sde_type
    if kind == "ito" and sde.noise_type not in ("diagonal", "scalar"):
        kind = ""
    if sde.langevin is not None and sde.langevin[0] > -slope / 2:
        return f"Friction times step is {sde.langevin[0] * h:.3g}: QUICSORT(), ShOULD() and ALIGN() solve it exactly."
    name, longest = STABLE[kind]
    return (
        f"The drift is stiff: its slope is {slope:.3g}, and a step is {h:.3g} long. {name}() is stable in steps of up "
        f"to {longest / -slope:.2g}.{_implicit(sde, -slope * h)}{more}"
    )


def _superlinear(sde: SDE, t: Tensor, y: Tensor) -> bool:
    """Whether a drift that points back from y and beyond it grows faster than y there."""
    near, far = (float((sde.drift(t, scale * y) * y).sum()) for scale in (10, 100))
    return far < 30 * near < 0


def _bounded(sde: SDE, t: Tensor, y: Tensor) -> str:
    """The method for a superlinear drift: a truncated one where the noise grows faster than linearly too."""
    if sde.noise_type not in CONSTANT and sde.sde_type == "ito":
        near, far = (float(sde.diffusion(t, scale * y).square().sum()) for scale in (10, 100))
        if far > 900 * near:
            return "TruncatedEuler"
    return _of_calculus(sde, "Tamed")


def _implicit(sde: SDE, stiffness: float) -> str:
    """What to add for a stiff drift: the drift-implicit method for the problem and the stabilised one, if any."""
    name = _of_calculus(sde, "Implicit")
    stages, more = math.ceil(math.sqrt(stiffness / 1.9)), ""
    if name == "ImplicitEuler" and stages <= 200:
        more = f" and, without Jacobians, SKROCK({stages}) in these"
    return f" {name}() is stable in longer ones{more}." if name else ""


def _of_calculus(sde: SDE, kind: str) -> str:
    """The implicit or tamed method for the problem; nothing for general noise in Stratonovich's calculus."""
    if sde.sde_type == "ito" or sde.noise_type == "none":
        return f"{kind}Euler"
    return "" if sde.noise_type == "general" else f"{kind}Milstein"


def _derivatives(sde: SDE, t: Tensor, y: Tensor) -> list[str]:
    """What to say about derivatives at y that are not finite."""
    free = _derivative_free(sde)
    fields = {"diffusion": sde.diffusion, "drift": sde.drift}
    out = []
    for name, field in fields.items():
        value, slope, *_ = torch.func.jvp(partial(field, t), (y,), (torch.ones_like(y),))
        if not bool(value.isfinite().all()):
            out.append(f"The {name} is not finite, for finite y. Check the {name} there.")
        elif not bool(slope.isfinite().all()):
            out.append(
                f"The derivative of the {name} is not finite, as that of a square root at 0: smaller steps do not "
                f"help. {free}() needs no derivative."
            )
    return out


def _derivative_free(sde: SDE) -> str:
    """The name of a solver of this problem that needs no derivative."""
    if sde.noise_type in ("diagonal", "scalar", "commutative"):
        return "DerivativeFreeMilstein"
    return "EulerMaruyama" if sde.sde_type == "ito" else "Heun"
