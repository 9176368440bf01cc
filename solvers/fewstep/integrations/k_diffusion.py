"""k-diffusion's sampler functions, noise samplers and model wrappers, shared by ComfyUI and webui."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .. import (
    EDM,
    DiffusionModel,
    DiscreteVP,
    FlowMatching,
    InputError,
    Plan,
    Schedule,
    UniPC,
    _validation,
    from_sample,
)
from .._progress import progress
from .._tracing import placed
from ..denoiser import Prepared, evaluations
from ..executor import Draw, Evaluate, Pair, Steered, data_of, evaluation_of, keeps, run
from ..grid import check_sigmas, short
from ..plan_noise import at_least_float32
from ..problem import Denoiser
from ..resolve import AnySolver, Student, carried_plan, check_steers, evaluator_of, is_stochastic, resolve
from ..sample import locate
from ..sampler_names import SAMPLERS as SAMPLERS
from ..sampler_names import named
from ..samplers.dpm import DPMSolver
from ..schedule import CLOSEST, check_schedule
from .k_diffusion_noise import BrownianNoiseSampler as BrownianNoiseSampler
from .k_diffusion_noise import check_state, sampler_normals
from .k_diffusion_noise import snr as snr


@dataclass(frozen=True)
class ScaledFlow(FlowMatching):
    """x_t = (1 - t) x0 + t shift n: a flow whose noise has another size (ComfyUI's `noise_scale`)."""

    def label(self, sigma: Tensor) -> Tensor:
        return self.time(sigma)

    def alpha(self, sigma: Tensor) -> Tensor:
        return 1 - self.time(sigma)


HINT = "Wrap networks that predict noise or v, for instance in k_diffusion.external.CompVisDenoiser."
FLOW = FlowMatching()
FLOW_END = CLOSEST - 5e-7  # what float32 may make of CLOSEST


@dataclass(frozen=True)
class Wrapped(Prepared):
    """A k-diffusion model as `denoiser(x, sigma)`, called in `dtype`; a batch of one is expanded to `rows`.

    Of a flow it is a network of the data, called with x_t and t.
    """

    model: Callable[..., Tensor]
    extra_args: Mapping[str, Any]
    dtype: torch.dtype | None = None
    rows: int = 1

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        sigma = _validation.check_input(x, sigma)
        rows = self.rows if len(x) == 1 else len(x)
        at = x.expand(rows, *x.shape[1:]).to(self.dtype or x.dtype)
        # sigma in x's dtype: wrappers scale x by functions of it, and float32 would reach a half network
        out = self.model(at, at.new_ones(rows) * sigma.to(at), **self.extra_args)
        where = lambda: f" at sigma = {float(sigma.flatten()[0]):.4g}"  # noqa: E731
        return _validation.check_answer("model", out, x.expand(at.shape), where, hint=HINT)[: len(x)]

    def on(self, levels: Tensor, like: Tensor, prediction: str, own: bool = True) -> Evaluate:
        dtype, known = self.dtype or like.dtype, levels.tolist()
        sigmas = placed(levels, like.device, like.dtype).to(dtype).unsqueeze(1).repeat(1, len(like)).unbind()

        def x0(i: int, x: Tensor) -> Tensor:
            if len(x) != len(like) or (len(x) == 1 and self.rows > 1):
                return self(x, sigmas[i][:1])
            out = self.model(x if x.dtype == dtype else x.to(dtype), sigmas[i], **self.extra_args)
            return _validation.check_answer("model", out, x, lambda: f" at sigma = {known[i]:.4g}", hint=HINT)

        return evaluations(x0, levels, prediction, own)


class Sampler:
    """A solver as k-diffusion's `sample_...` function; with a plan or a student it accepts its `sigmas` only."""

    def __init__(
        self, solver: AnySolver | str, schedule: Schedule | None = None, flow: bool | None = None,
        cfg_pp: bool = False, s_noise: float = 1.0,
    ) -> None:  # fmt: skip
        check_schedule(schedule, optional=True)
        _validation.check_instance("flow", flow, (bool, type(None)), "True, False or None")
        if flow is not None and schedule is not None and flow != isinstance(schedule, FlowMatching):
            raise InputError(
                f"schedule: got {schedule!r} with flow={flow}; expected FlowMatching for flow models only."
            )
        history = ""
        if isinstance(solver, str):
            solver, history = named(solver)
        self.cfg_pp: bool = _validation.check_flag("cfg_pp", cfg_pp) or bool(history)
        self.history: str = history or "guided"
        self.s_noise: float = _validation.check_float("s_noise", s_noise, 0, expected="a number of at least 0")
        self.solver: AnySolver = solver
        self.schedule: Schedule | None = schedule
        own = carried_plan(self.solver)
        fitted = own is not None and own.fit is not None and own.fit.fingerprint.schedule.startswith("FlowMatching")
        self.flow: bool | None = True if fitted or isinstance(schedule, FlowMatching) else flow
        self.sigmas: Tensor | None = None
        if own is not None:
            self.sigmas = (FLOW.label(own.sigmas) if self.flow else own.sigmas).float()

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
        check_state(x, _validation.at_once(x))
        _check_model("model", model, extra_args)
        if callback is not None:
            _validation.check_callable("callback", callback, "a function of a dict")
        grid = _validation.check_numbers("sigmas", sigmas)
        if grid.dim() == 1 and len(grid) < 2:  # no step, as of ComfyUI's SplitSigmas at the last one
            return x
        flow = self._flow(model, grid)
        plan, source = self._resolve(model, grid, flow)
        extra = dict(extra_args or {})
        state = at_least_float32(x)
        if flow and plan.prediction == "noise" and x.device.type != "mps":
            state = state.double()  # x - sigma eps cancels where sigma is 1e6
        if flow:
            state = state / flow.alpha(plan.sigmas[:1]).item()
        state = state.clone() if state is x else state  # a model may write its inputs to x
        draw = sampler_normals(plan, state, extra.get("seed") if seed is None else seed, noise_sampler, flow)
        if self.s_noise != 1:
            unit, draw = draw, lambda *interval: tuple(self.s_noise * z for z in unit(*interval))
        unconditional: list[Tensor] = []
        if self.cfg_pp:
            if not isinstance(source, Plan):
                raise InputError("cfg_pp: got True with a student, which replaces the model; expected a solver.")
            check_steers(plan)
            extra["model_options"] = _watched_options(extra.get("model_options") or {}, unconditional)
        evaluate: Steered
        wrapped = Wrapped(model, extra, x.dtype, len(x))
        own = keeps(plan) or callback is not None or self.cfg_pp
        evaluate = evaluator_of(self._problem(wrapped, plan, flow), source, state, own)
        if self.cfg_pp:
            evaluate = _paired(plan, evaluate, unconditional, self.history)
        levels = sigmas if torch.is_tensor(sigmas) else grid
        # networks' parameters require grad: as in k-diffusion no graph is kept, unless for x
        with torch.set_grad_enabled(torch.is_grad_enabled() and x.requires_grad):
            end = _run(plan, state, evaluate, draw, callback, disable, levels, flow)
        if not _validation.all_finite(state, end):
            check_state(state)
            raise locate(plan, state, evaluate, draw)
        return (end * flow.alpha(plan.sigmas[-1:]).item() if flow else end).to(x.dtype)

    def _flow(self, model: Any, grid: Tensor) -> FlowMatching | None:
        """The process of a run in x / (1 - sigma) and sigma / (1 - sigma), in which a flow is x0 + sigma n, or None.

        Deterministic solvers do not need it: the ODE of a flow is the same in its own x and sigma.
        """
        own = carried_plan(self.solver)
        if own is not None and not _same(grid, own.sigmas):
            process = _process(model)
            return process if self.flow is not False and _same(grid, process.label(own.sigmas)) else None
        if own is not None:
            if own.levy and self.flow is None and _flow_of(model):
                raise InputError(
                    f"model: got a flow model; {own.name} has the levels of x / (1 - sigma). Pass sampler(plan, "
                    "flow=True), its attribute `sigmas`, and x at its first level."
                )
            return None
        if isinstance(self.schedule, FlowMatching):
            return _process(model)
        if not is_stochastic(self.solver) and not self.cfg_pp:
            return None
        flow = _flow_of(model) if self.flow is None else self.flow
        if flow is None and grid.numel() and grid.max() <= 1:
            raise InputError(
                f"flow: got None, a model of unknown kind, and sigmas {short(grid)} of at most 1. Is "
                "it a flow model, x = (1 - sigma) x0 + sigma n? Pass sampler(solver, flow=True); flow=False for "
                "x = x0 + sigma n."
            )
        if flow and self.schedule is not None:
            raise InputError(f"schedule: got {self.schedule!r} for a flow model, expected FlowMatching() or None.")
        return _process(model) if flow else None

    def _resolve(self, model: Any, grid: Tensor, flow: FlowMatching | None) -> tuple[Plan, Plan | Student]:
        own = carried_plan(self.solver)
        if own is None:
            if flow:
                check_sigmas(grid, rising=not is_stochastic(self.solver))
                if grid.max() > 1 or int((grid > CLOSEST).sum()) > 1:
                    expected = "levels of a flow model, at most 1, and one of them at most above 1 - 1e-6"
                    raise InputError(f"sigmas: got {short(grid)}; expected {expected}.")
                grid = flow.sigma(grid.clamp(max=CLOSEST))
            return resolve(self.solver, self._schedule(flow) or _table_of(model), sigmas=grid, keep=True)
        levels = (flow or FLOW).label(own.sigmas) if flow or self.flow else own.sigmas
        if not _same(grid, levels):
            raise InputError(
                f"sigmas: got {short(grid)}; {own.name} carries its own grid, {short(levels)}. Pass that (the "
                "attribute `sigmas` of this sampler) and x at its first level."
            )
        return resolve(self.solver, self.schedule)

    def _schedule(self, flow: FlowMatching | None) -> Schedule | None:
        return flow if self.schedule is None else self.schedule

    def _problem(self, wrapped: Wrapped, plan: Plan, flow: FlowMatching | None) -> DiffusionModel:
        """The model on the given schedule, else on a flow's, or EDM between its own levels or those of the grid."""
        schedule = self._schedule(flow) or _schedule_of(wrapped.model, plan.sigmas)
        fitted = plan.fit and plan.fit.fingerprint.schedule
        if self.schedule is None and fitted not in (None, repr(schedule)):
            raise InputError(
                f"schedule: got None, and {schedule!r} from the model; {plan.name} was fitted to {fitted}. "
                "Pass it as sampler(student, schedule=problem.schedule)."
            )
        return DiffusionModel(_flow_denoiser(wrapped, flow) if flow else wrapped, schedule)


def sampler(
    solver: AnySolver | str, *, schedule: Schedule | None = None, flow: bool | None = None, cfg_pp: bool = False,
    s_noise: float = 1.0,
) -> Sampler:  # fmt: skip
    """A solver as a k-diffusion sampler function `f(model, x, sigmas, extra_args, callback, disable)`.

    `model(x, sigma, **extra_args)`, sigma (batch,), returns x0; x (batch, *event) is given at level sigmas[0], already
    multiplied by it; sigmas (n + 1,) decrease, usually to 0. Returns the state at the last level in x's dtype, and x
    where there is no step. Only the model sees half precision: the state is kept in float32. Deterministic solvers
    also take increasing sigmas above 0, which leads from data to noise. Gradients flow to x, and through the model,
    where x requires grad; otherwise no graph is kept, as in k-diffusion.

    Flow models have x = (1 - sigma) x0 + sigma n and sigmas in [0, 1]. Their ODE has the form of the others', and
    deterministic solvers take steps in their x and sigma, as ComfyUI's samplers do. Stochastic solvers take steps in
    x / (1 - sigma), whose noise level is sigma / (1 - sigma); so do all with `schedule=FlowMatching()`, as
    `fewstep.sample` does.

    `callback` is called with {"x", "i", "sigma", "sigma_hat", "denoised"} once per step, at the first evaluation of
    the step from sigmas[i]: x and sigma_hat are the model's input, denoised its output. `disable=True` shows no
    progress; otherwise there is a bar on a terminal, and in a pipe a line every 30 seconds.

    Noise comes from `seed=`, else from extra_args["seed"], else from seeds that torch's global generator draws, as in
    k-diffusion. A list has one seed per sample; an int s means s, s + 1, ..., so sample j of seed s is sample 0 of seed
    s + j. Or it comes from `noise_sampler=`: a `BrownianNoiseSampler` or a path in the clock 1/sigma^2, or any
    `(sigma, sigma_next) -> unit normals` where the plan needs W only.

    Args:
        solver: a diffusion solver, a plan, or a student; the last two accept their own grid only. Or the name of a
            sampler of k-diffusion or ComfyUI (`SAMPLERS` lists them) or of a solver, with options in brackets:
            "dpmpp_2m_sde(eta=0.5)".
        schedule: for solvers that need one, and for students the one they were fitted to. By default EDM between the
            model's `sigma_min` and `sigma_max`, else between the ends of the grid; FlowMatching for flow models. A
            solver that counts in model time gets the model's table `sigmas`, one level for each label.
        flow: whether the model is a flow model. None reads it from the model: ComfyUI's `model_sampling` (CONST),
            Forge's `predictor` ("const"), or a range of sigma above 1.
        cfg_pp: take the steps of CFG++ (see `fewstep.sample`), as names that end in "_cfg_pp" do. The model must be
            ComfyUI's: it calls the post-cfg functions of extra_args["model_options"] with "uncond_denoised".
        s_noise: all noise of the solver is multiplied by it.

    Raises:
        InputError: a solver without a plan; when called: options of methods, unsuitable grids, a noise sampler that
            lacks what a plan needs, models that return another shape; a stochastic solver on levels of at most 1 with
            a model that does not say whether it is a flow model.
        NonFiniteError: when called, a result that is not finite; its message names the evaluation.
    """
    return Sampler(solver, schedule, flow, cfg_pp, s_noise)


def as_denoiser(
    wrapper: Callable[..., Tensor], *, sigma_min: float | None = None, sigma_max: float | None = None,
    extra_args: Mapping[str, Any] | None = None, dtype: torch.dtype | None = None, flow: bool | None = None,
) -> DiffusionModel:  # fmt: skip
    """A k-diffusion model, `(x, sigma, **kw) -> x0`, as a problem of this library, on EDM; a flow on FlowMatching.

    Args:
        sigma_min, sigma_max: by default the wrapper's attributes of these names, else the ends of its table `sigmas`;
            of a flow, the ends of FlowMatching's t.
        extra_args: bound to every call (conditioning).
        dtype: what the wrapper computes in, where that is not the samples' dtype.
        flow: as for `sampler`.

    Raises:
        InputError: no range of sigma, or one that is not positive and finite.
    """
    _check_model("wrapper", wrapper, extra_args)
    _validation.check_dtype(dtype)
    if flow is not None:
        flow = _validation.check_flag("flow", flow)
    wrapped = Wrapped(wrapper, dict(extra_args or {}), dtype)
    if _flow_of(wrapper) if flow is None else flow:
        given = {"t_min": sigma_min, "t_max": sigma_max}
        process = replace(_process(wrapper), **{n: float(v) for n, v in given.items() if v is not None})
        return DiffusionModel(_flow_denoiser(wrapped, process), process)
    low, high = _ends_of(wrapper)
    low = low if sigma_min is None else _validation.check_float("sigma_min", sigma_min)
    high = high if sigma_max is None else _validation.check_float("sigma_max", sigma_max)
    if low is None or high is None or not 0 < low < high < math.inf:
        raise InputError(
            f"sigma_min, sigma_max: got {low}, {high} (arguments, and attributes of the wrapper); expected "
            "0 < sigma_min < sigma_max < inf. Call as_denoiser(wrapper, sigma_min=..., sigma_max=...)."
        )
    return DiffusionModel(wrapped, EDM(low, high))


class Wrapper:
    """A problem of this library as a k-diffusion model; made by `as_wrapper`."""

    def __init__(self, problem: DiffusionModel) -> None:
        _validation.check_instance("problem", problem, DiffusionModel, "a fewstep.DiffusionModel")
        self.problem = problem
        self.sigma_min: float = problem.schedule.sigma_min
        self.sigma_max: float = problem.schedule.sigma_max

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        levels = _validation.check_input(x, sigma).reshape(-1).to(x)
        if not len(levels) or bool((levels == levels[0]).all()):
            return self.problem.denoiser(x, levels[0] if len(levels) else levels)
        return torch.cat([self.problem.denoiser(x[j : j + 1], s) for j, s in enumerate(levels)])


def as_wrapper(problem: DiffusionModel) -> Wrapper:
    """A problem as `model(x, sigma, **extra_args) -> x0` with `sigma_min` and `sigma_max`.

    sigma is (batch,). extra_args are ignored: conditioning is part of the problem's denoiser.
    """
    return Wrapper(problem)


def register(
    name: str, solver: AnySolver | Sampler | str, comfy: Any = None, *, schedule: Schedule | None = None,
    flow: bool | None = None, cfg_pp: bool = False, discard_penultimate: bool | None = None,
) -> Sampler:  # fmt: skip
    """Add a solver to ComfyUI's list of samplers, replacing an earlier one of the same name.

    Args:
        name: its entry in the list, letters, digits and "_"; the function becomes `sample_<name>`.
        solver: a diffusion solver, a plan, a student, a name, or a `sampler`.
        comfy: the package, by default imported.
        schedule, flow, cfg_pp: as for `sampler`.
        discard_penultimate: whether ComfyUI makes its grids with one step more and drops the level before the last. By
            default for the solvers of its own samplers of that kind: `uni_pc`, `uni_pc_bh2`, `dpm_2` and
            `dpm_2_ancestral`.

    Returns:
        the sampler that was added.

    Raises:
        InputError: ComfyUI cannot be imported, or it has a sampler of that name itself.
    """
    if not isinstance(name, str) or not re.fullmatch(r"\w+", name):
        raise InputError(f"name: got {name!r}; expected letters, digits and '_', for instance 'fewstep_unipc'.")
    kinds = (bool, type(None))
    _validation.check_instance("discard_penultimate", discard_penultimate, kinds, "True, False or None")
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
    function = solver if isinstance(solver, Sampler) else sampler(solver, schedule=schedule, flow=flow, cfg_pp=cfg_pp)
    home, samplers, shown = comfy.k_diffusion.sampling, comfy.samplers, comfy.samplers.KSampler.SAMPLERS
    there = getattr(home, f"sample_{name}", None)
    if not isinstance(there, Sampler) and (there is not None or name in shown):
        raise InputError(f"name: got {name!r}, a sampler of ComfyUI's own; expected another name.")
    setattr(home, f"sample_{name}", function)
    # in ComfyUI the last two are one list
    for names in (getattr(samplers, "KSAMPLER_NAMES", []), getattr(samplers, "SAMPLER_NAMES", []), shown):
        if name not in names:
            names.append(name)
    if discard_penultimate is None:
        of = getattr(function.solver, "solver", function.solver)  # Ancestral's
        discard_penultimate = isinstance(of, UniPC) or (isinstance(of, DPMSolver) and not of.multistep)
    discarding: set[str] = getattr(samplers.KSampler, "DISCARD_PENULTIMATE_SIGMA_SAMPLERS", set())
    (discarding.add if discard_penultimate else discarding.discard)(name)
    return function


def _check_model(argument: str, model: Any, extra_args: Any) -> None:
    _validation.check_callable(argument, model, "a k-diffusion model (x, sigma, **extra_args) -> x0")
    _validation.check_instance("extra_args", extra_args, (Mapping, type(None)), "a dict by name, or None")


def _watched_options(options: Mapping[str, Any], unconditional: list[Tensor]) -> dict[str, Any]:
    """ComfyUI's model_options with a last post-cfg function, which keeps the unconditional x0 of the last call."""

    def keep(args: dict[str, Any]) -> Any:
        unconditional[:] = [args["uncond_denoised"]]
        return args["denoised"]

    functions = [*options.get("sampler_post_cfg_function", ()), keep]
    return {**options, "sampler_post_cfg_function": functions, "disable_cfg1_optimization": True}


def _paired(plan: Plan, evaluate: Steered, unconditional: list[Tensor], history: str) -> Steered:
    """Evaluations with the unconditional one, which the model has put into the list."""
    levels = plan.sigma.tolist()

    def pair(row: int, at: Tensor, normals: Any) -> Pair:
        unconditional.clear()
        guided = evaluate(row, at, normals)
        if not unconditional:
            raise InputError(
                "cfg_pp: got a model that does not call model_options['sampler_post_cfg_function'], expected one of "
                "ComfyUI with guidance. Use the sampler without cfg_pp."
            )
        D = unconditional[0][: len(at)].to(at)
        assert isinstance(guided, Tensor)
        return Pair(guided, evaluation_of(plan.prediction, at, levels[row], D), history)

    return pair


def _run(
    plan: Plan, x: Tensor, evaluate: Steered, draw: Draw, callback: Callable[[dict[str, Any]], object] | None,
    disable: bool | None, sigmas: Tensor, flow: FlowMatching | None,
) -> Tensor:  # fmt: skip
    """The executor with k-diffusion's callback and progress bar around it."""
    if disable is not None and _validation.check_flag("disable", disable) and callback is None:
        return run(plan, x, evaluate, draw)
    starts, levels = _starts(plan), plan.sigma.tolist()
    with progress(range(len(starts)), "step", show=not disable) as bar:

        def watched(row: int, at: Tensor, normals: Any) -> Tensor | Pair:
            out = evaluate(row, at, normals)
            if callback is not None and row in starts:
                i, level = starts[row], levels[row]
                D = data_of(plan.prediction, at, level, out.guided if isinstance(out, Pair) else out)
                own = plan.sigmas.new_tensor(level)
                shown = at * flow.alpha(own).item() if flow else at
                hat = float(flow.label(own)) if flow else level
                sigma_hat = sigmas[i] if level == float(plan.sigmas[i]) else sigmas.new_full((), hat)
                callback({"x": shown, "i": i, "sigma": sigmas[i], "sigma_hat": sigma_hat, "denoised": D})
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
    sign = 1 if plan.sigmas[0] > plan.sigmas[-1] else -1
    passed = [int((sign * (plan.sigmas[:-1] / plan.sigma[row] - 1) >= -1e-6).sum()) for row in rows]
    return {row: max(count - 1, 0) for row, count in zip(rows, passed)}


def _flow_denoiser(wrapped: Wrapped, flow: FlowMatching) -> Denoiser:
    """The denoiser of a flow model in x / (1 - sigma)."""
    return from_sample(lambda x, t: wrapped(x, torch.where(t < FLOW_END, t, 1.0)), flow)


def _process(model: Any) -> FlowMatching:
    """The process of a flow model, its noise of the size that ComfyUI's `model_sampling` states."""
    at, scale = model, 1.0
    for _ in range(4):
        scale = float(getattr(getattr(at, "model_sampling", None), "noise_scale", scale))
        at = getattr(at, "inner_model", None)
    return FLOW if scale == 1 else ScaledFlow(scale)


def _flow_of(model: Any) -> bool | None:
    """Whether a model is marked as a flow model, by ComfyUI's CONST, Forge's "const", or not, by a range above 1."""
    at = model
    for _ in range(4):
        kind = type(getattr(at, "model_sampling", None))
        prediction = getattr(getattr(at, "predictor", None), "prediction_type", None)
        if kind is not type(None):
            return any(c.__name__ == "CONST" for c in kind.__mro__)
        if isinstance(prediction, str):
            return prediction == "const"
        high = _ends_of(at)[1]
        if high is not None and high > 1:
            return False
        at = getattr(at, "inner_model", None)
    return None


def table_schedule(table: Any) -> DiscreteVP | None:
    """The schedule of a model's table of rising levels; None for other values of its attribute `sigmas`."""
    if torch.is_tensor(table) and table.dim() == 1 and len(table) > 1:
        squares = table.detach().double().cpu().square()
        if bool(squares[0] > 0) and bool((squares.diff() > 0).all()):
            return DiscreteVP(1 / (1 + squares))
    return None


def _table_of(model: Any) -> DiscreteVP | None:
    """The levels at a model's labels, for solvers that count in its time; None for flows and other models.

    ComfyUI's ranges of sigma have a table too: even in log sigma, as their time is.
    """
    at = model
    for _ in range(4):
        # ComfyUI's inpainting wrapper has the levels of the run, which fall, by this name
        if found := table_schedule(getattr(getattr(at, "model_sampling", at), "sigmas", None)):
            return None if _flow_of(model) else found
        at = getattr(at, "inner_model", None)
    return None


def _same(grid: Tensor, levels: Tensor) -> bool:
    """Whether the levels are those of a grid that a caller has rounded to float32."""
    return grid.shape == levels.shape and torch.allclose(grid, levels, rtol=1e-4, atol=0.0)


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
        levels = [level for level in sigmas.tolist() if level > 0]
        low, high = min(levels), max(levels)
        low = low if low < high else high / 2
    return EDM(low, high)
