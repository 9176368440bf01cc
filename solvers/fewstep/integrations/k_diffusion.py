"""k-diffusion's sampler functions, noise samplers and model wrappers, shared by ComfyUI and webui."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .. import EDM, DiffusionModel, InputError, Plan, Schedule, _validation
from .._progress import progress
from ..executor import Draw, Evaluate, data_of, run
from ..grid import short
from ..plan_noise import at_least_float32
from ..resolve import AnySolver, Student, carried_plan, evaluator_of, resolve
from .k_diffusion_noise import BrownianNoiseSampler as BrownianNoiseSampler
from .k_diffusion_noise import check_state, sampler_normals
from .k_diffusion_noise import seeds as per_sample
from .k_diffusion_noise import snr as snr


@dataclass(frozen=True)
class Wrapped:
    """A k-diffusion model as `denoiser(x, sigma)`, called in `dtype`; a batch of one is expanded to `rows`."""

    model: Callable[..., Tensor]
    extra_args: Mapping[str, Any]
    dtype: torch.dtype | None = None
    rows: int = 1

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        rows = self.rows if len(x) == 1 else len(x)
        at = x.expand(rows, *x.shape[1:]).to(self.dtype or x.dtype)
        # sigma in x's dtype: wrappers scale x by functions of it, and float32 would reach a half network
        out = self.model(at, at.new_ones(rows) * sigma.to(at), **self.extra_args)
        hint = "Wrap networks that predict noise or v, for instance in k_diffusion.external.CompVisDenoiser."
        where = lambda: f" at sigma = {float(sigma):.4g}"  # noqa: E731
        return _validation.check_answer("model", out, x.expand(at.shape), where, hint=hint)[: len(x)]


class Sampler:
    """A solver as k-diffusion's `sample_...` function; with a plan or a student it accepts its `sigmas` only."""

    def __init__(self, solver: AnySolver, schedule: Schedule | None = None) -> None:
        _validation.check_instance("schedule", schedule, (Schedule, type(None)), "a fewstep schedule, or None")
        self.solver: AnySolver = solver
        self.schedule: Schedule | None = schedule
        own = carried_plan(solver)
        self.sigmas: Tensor | None = None if own is None else own.sigmas.float()

    @torch.no_grad()
    def __call__(
        self, model: Callable[..., Tensor], x: Tensor, sigmas: Tensor, extra_args: Mapping[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], object] | None = None, disable: bool | None = None, *,
        seed: int | Sequence[int] | None = None, noise_sampler: Any = None, **options: Any,
    ) -> Tensor:  # fmt: skip
        """From x at sigmas[0] to the last level; see `sampler`."""
        if options:
            name, value = next(iter(options.items()))
            raise InputError(
                f"{name}: got {value!r}; expected only seed and noise_sampler. Options of a method belong to "
                "the solver, for instance sampler(fewstep.DDIM(eta=1.0))."
            )
        check_state(x)
        _check_model("model", model, extra_args)
        if callback is not None:
            _validation.check_callable("callback", callback, "a function of a dict")
        plan, source = self._resolve(sigmas)
        _refuse_noise_on_flows(plan, model)
        extra = dict(extra_args or {})
        seeds = per_sample(extra.get("seed") if seed is None else seed, len(x))
        state = at_least_float32(x)
        state = state.clone() if state is x else state  # a model may write its inputs to x
        draw = sampler_normals(plan, state, seeds, noise_sampler)
        evaluate = evaluator_of(self._problem(Wrapped(model, extra, x.dtype, len(x)), plan), source, state)
        return _run(plan, state, evaluate, draw, callback, disable, torch.as_tensor(sigmas)).to(x.dtype)

    def _resolve(self, sigmas: Any) -> tuple[Plan, Plan | Student]:
        grid = _validation.check_numbers("sigmas", sigmas)
        if carried_plan(self.solver) is None:
            return resolve(self.solver, self.schedule, sigmas=grid)
        plan, source = resolve(self.solver, self.schedule)
        if grid.shape != plan.sigmas.shape or not torch.allclose(grid, plan.sigmas, rtol=1e-4, atol=0.0):
            raise InputError(
                f"sigmas: got {short(grid)}; {plan.name} carries its own grid, {short(plan.sigmas)}. Pass that (the "
                "attribute `sigmas` of this sampler) and x at its first level."
            )
        return plan, source

    def _problem(self, wrapped: Wrapped, plan: Plan) -> DiffusionModel:
        """The model on the given schedule, else on EDM between its own levels or those of the grid."""
        schedule = self.schedule or _schedule_of(wrapped.model, plan.sigmas)
        fitted = plan.fit and plan.fit.fingerprint.schedule
        if self.schedule is None and fitted not in (None, repr(schedule)):
            raise InputError(
                f"schedule: got None, and {schedule!r} from the model; {plan.name} was fitted to {fitted}. "
                "Pass it as sampler(student, schedule=problem.schedule)."
            )
        return DiffusionModel(wrapped, schedule)


def sampler(solver: AnySolver, *, schedule: Schedule | None = None) -> Sampler:
    """A solver as a k-diffusion sampler function `f(model, x, sigmas, extra_args, callback, disable)`.

    `model(x, sigma, **extra_args)`, sigma (batch,), returns x0; x (batch, *event) is given at level sigmas[0], already
    multiplied by it; sigmas (n + 1,) decrease, usually to 0. Returns the state at the last level in x's dtype. Only
    the model sees half precision: the state is kept in float32.

    `callback` is called with {"x", "i", "sigma", "sigma_hat", "denoised"} once per step, at the first evaluation of
    the step from sigmas[i]: x and sigma_hat are the model's input, denoised its output. `disable=True` shows no
    progress; otherwise there is a bar on a terminal, and in a pipe a line every 30 seconds.

    Noise comes from `seed=`, else from extra_args["seed"], else from 0, never from torch's global state. A list has
    one seed per sample; an int s means s, s + 1, ..., so sample j of seed s is sample 0 of seed s + j. Or it comes
    from `noise_sampler=`: a `BrownianNoiseSampler` or a path in the clock 1/sigma^2, or any
    `(sigma, sigma_next) -> unit normals` where the plan needs W only.

    Args:
        solver: a diffusion solver, a plan, or a student; the last two accept their own grid only.
        schedule: for solvers that need one, and for students the one they were fitted to. By default EDM between the
            model's `sigma_min` and `sigma_max`, else between the ends of the grid.

    Raises:
        InputError: a solver without a plan; when called: options of methods, unsuitable grids, a noise sampler that
            lacks what a plan needs, models that return another shape.
    """
    return Sampler(solver, schedule)


def as_denoiser(
    wrapper: Callable[..., Tensor], *, sigma_min: float | None = None, sigma_max: float | None = None,
    extra_args: Mapping[str, Any] | None = None, dtype: torch.dtype | None = None,
) -> DiffusionModel:  # fmt: skip
    """A k-diffusion model, `(x, sigma, **kw) -> x0`, as a problem of this library, on the schedule EDM.

    Args:
        sigma_min, sigma_max: by default the wrapper's attributes of these names, else the ends of its table `sigmas`.
        extra_args: bound to every call (conditioning).
        dtype: what the wrapper computes in, where that is not the samples' dtype.

    Raises:
        InputError: no range of sigma, or one that is not positive and finite.
    """
    _check_model("wrapper", wrapper, extra_args)
    _validation.check_dtype(dtype)
    low, high = _ends_of(wrapper)
    low = low if sigma_min is None else _validation.check_float("sigma_min", sigma_min)
    high = high if sigma_max is None else _validation.check_float("sigma_max", sigma_max)
    if low is None or high is None or not 0 < low < high < math.inf:
        raise InputError(
            f"sigma_min, sigma_max: got {low}, {high} (arguments, and attributes of the wrapper); expected "
            "0 < sigma_min < sigma_max < inf. Call as_denoiser(wrapper, sigma_min=..., sigma_max=...)."
        )
    return DiffusionModel(Wrapped(wrapper, dict(extra_args or {}), dtype), EDM(low, high))


class Wrapper:
    """A problem of this library as a k-diffusion model; made by `as_wrapper`."""

    def __init__(self, problem: DiffusionModel) -> None:
        _validation.check_instance("problem", problem, DiffusionModel, "a fewstep.DiffusionModel")
        self.problem = problem
        self.sigma_min: float = problem.schedule.sigma_min
        self.sigma_max: float = problem.schedule.sigma_max

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        levels = sigma.reshape(-1).to(x)
        if bool((levels == levels[0]).all()):
            return self.problem.denoiser(x, levels[0])
        return torch.cat([self.problem.denoiser(x[j : j + 1], s) for j, s in enumerate(levels)])


def as_wrapper(problem: DiffusionModel) -> Wrapper:
    """A problem as `model(x, sigma, **extra_args) -> x0` with `sigma_min` and `sigma_max`.

    sigma is (batch,). extra_args are ignored: conditioning is part of the problem's denoiser.
    """
    return Wrapper(problem)


def register(name: str, solver: AnySolver | Sampler, comfy: Any = None, *, schedule: Schedule | None = None) -> Sampler:
    """Add a solver to ComfyUI's list of samplers, replacing an earlier one of the same name.

    Args:
        name: its entry in the list, letters, digits and "_"; the function becomes `sample_<name>`.
        solver: a diffusion solver, a plan, a student, or a `sampler`.
        comfy: the package, by default imported.
        schedule: as for `sampler`.

    Returns:
        the sampler that was added.

    Raises:
        InputError: ComfyUI cannot be imported, or it has a sampler of that name itself.
    """
    if not isinstance(name, str) or not re.fullmatch(r"\w+", name):
        raise InputError(f"name: got {name!r}; expected letters, digits and '_', for instance 'fewstep_unipc'.")
    if comfy is None:
        try:
            comfy = import_module("comfy")
            for part in ("comfy.samplers", "comfy.k_diffusion.sampling"):
                import_module(part)
        except ImportError as error:
            raise InputError(
                f"comfy: got None, and ComfyUI cannot be imported here ({error}). Call this from a custom "
                "node, ComfyUI/custom_nodes/<yours>/__init__.py."
            ) from error
    if not hasattr(comfy, "samplers") or not hasattr(comfy, "k_diffusion"):
        raise InputError(f"comfy: got {_validation.describe(comfy)}, expected ComfyUI's package `comfy`, or None.")
    function = solver if isinstance(solver, Sampler) else sampler(solver, schedule=schedule)
    home, samplers, shown = comfy.k_diffusion.sampling, comfy.samplers, comfy.samplers.KSampler.SAMPLERS
    there = getattr(home, f"sample_{name}", None)
    if not isinstance(there, Sampler) and (there is not None or name in shown):
        raise InputError(f"name: got {name!r}, a sampler of ComfyUI's own; expected another name.")
    setattr(home, f"sample_{name}", function)
    # in ComfyUI the last two are one list
    for names in (getattr(samplers, "KSAMPLER_NAMES", []), getattr(samplers, "SAMPLER_NAMES", []), shown):
        if name not in names:
            names.append(name)
    return function


def _check_model(argument: str, model: Any, extra_args: Any) -> None:
    _validation.check_callable(argument, model, "a k-diffusion model (x, sigma, **extra_args) -> x0")
    _validation.check_instance("extra_args", extra_args, (Mapping, type(None)), "a dict by name, or None")


def _run(
    plan: Plan, x: Tensor, evaluate: Evaluate, draw: Draw, callback: Callable[[dict[str, Any]], object] | None,
    disable: bool | None, sigmas: Tensor,
) -> Tensor:  # fmt: skip
    """The executor with k-diffusion's callback and progress bar around it."""
    starts, levels = _starts(plan), plan.sigma.tolist()
    with progress(range(len(starts)), "step", show=not disable) as bar:

        def watched(row: int, at: Tensor, normals: Any) -> Tensor:
            out = evaluate(row, at, normals)
            if callback is not None and row in starts:
                i, level = starts[row], levels[row]
                D = data_of(plan.prediction, at, level, out)
                sigma_hat = sigmas[i] if level == float(plan.sigmas[i]) else sigmas.new_full((), level)
                callback({"x": at, "i": i, "sigma": sigmas[i], "sigma_hat": sigma_hat, "denoised": D})
            bar.update(row + 1 == plan.nfe or row + 1 in starts)
            return out

        return run(plan, x, watched, draw)


def _starts(plan: Plan) -> dict[int, int]:
    """The rows that begin a step, with the index of that step."""
    steps = len(plan.sigmas) - 1
    if plan.nfe == steps:  # includes correctors, whose state moves one row late
        return {i: i for i in range(steps)}
    rows = [0, *(i for i in range(1, plan.nfe) if plan.rows[i - 1].update != (1, (), ()))]
    if len(rows) == steps:
        return {row: i for i, row in enumerate(rows)}
    grid = plan.sigmas[:-1] * (1 + 1e-6)
    return {row: max(int((grid >= plan.sigma[row]).sum()) - 1, 0) for row in rows}


def _refuse_noise_on_flows(plan: Plan, model: Any) -> None:
    """Reject stochastic plans for ComfyUI's flow models, x = (1 - sigma) x0 + sigma n, whose SDE differs."""
    at: Any = model
    for _ in range(4):
        kind = type(getattr(at, "model_sampling", None))
        if plan.levy and any(c.__name__ == "CONST" for c in kind.__mro__):
            raise InputError(
                f"model: got a flow model, whose noise is not that of {plan.name}; expected one with "
                "x = x0 + sigma n. Take a deterministic solver, for instance fewstep.UniPC(order=3)."
            )
        at = getattr(at, "inner_model", None)


def _ends_of(model: Any) -> tuple[float | None, float | None]:
    """The range of sigma in the model's attributes, None where it has none."""
    table = getattr(model, "sigmas", None)
    found = table[table > 0].tolist() if torch.is_tensor(table) else []
    low = getattr(model, "sigma_min", min(found, default=None))
    high = getattr(model, "sigma_max", max(found, default=None))
    return None if low is None else float(low), None if high is None else float(high)


def _schedule_of(model: Any, sigmas: Tensor) -> Schedule:
    """EDM over the model's range, else over the grid's, which is widened if it has only one level above 0."""
    low, high = _ends_of(model)
    if low is None or high is None or not 0 < low < high < math.inf:
        low, high = float(sigmas[sigmas > 0].min()), float(sigmas.max())
        low = low if low < high else high / 2
    return EDM(low, high)
