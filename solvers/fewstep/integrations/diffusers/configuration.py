"""Translate a diffusers configuration into a run: the solver in diffusers' form, its plan and its noise."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import DDIM, DDPM, DEIS, IPNDM, LCM, PNDM, TCD, DPMSolverPP, EDMHeun, Plan, UniPC
from ..._validation import check_float, check_instance, check_numbers
from ...catalog import solver_named
from ...compat import (
    DiffusersDDIM,
    DiffusersDPM,
    DiffusersHeun,
    DiffusersLCM,
    DiffusersPNDM,
    DiffusersRenoised,
    Ending,
    OfficialDPM,
)  # fmt: skip
from ...denoiser import threshold
from ...errors import InputError, one_of, warn
from ...fingerprint import same_words
from ...grid import spacing_names
from ...plan import Row
from ...resolve import carried_plan, resolve
from ...sampler_names import diffusion_solver_named
from ...samplers.ddpm import VARIANCES
from ...samplers.dpm import DPMFamily
from ...schedule import DiscreteVP
from ...solver import DiffusionSolver
from .grid import REFUSALS, Grid, Process, constructed_grid, family, grid_of, named_grid, process_of, reference_of

HUB = ("revision", "token", "cache_dir", "local_files_only")
FILE = "fewstep_solver.safetensors"
# what a configuration specifies for its own solver
OVERRULED = ("algorithm_type", "disable_corrector", "predict_x0", "solver_order", "solver_type")
DIFFUSERS_SPACINGS = ("linspace", "leading", "trailing")
COMPAT = (DiffusersDDIM, DiffusersDPM, DiffusersLCM, DiffusersPNDM, OfficialDPM)
DDIM_FORMS = (DDIM, DiffusersDDIM)
TAKES_ETA = (*DDIM_FORMS, TCD)
# options of schedulers with a forward process or labels that are not supported
FOREIGN = {
    "clip_denoised": "CMStochasticIterativeScheduler", "sampling_eps": "ScoreSdeVeScheduler",
    "s_min": "KarrasVeScheduler", "scaler": "DDPMWuerstchenScheduler", "alpha_cum_start": "VQDiffusionScheduler",
    "n_grid": "PiflowScheduler", "stages": "HeliosScheduler", "scale_factors": "FlowMatchLCMScheduler",
    "snr_shift_scale": "CogVideoXDDIMScheduler",
}  # fmt: skip


class Setup(NamedTuple):
    """The result of `set_timesteps`: the levels of a run, the plan on them, and the labels of its rows."""

    asked: tuple[Any, ...]  # the arguments of `prepare`
    process: Process
    grid: Grid
    used: Any  # the solver in the form that diffusers has, where it has one
    plan: Plan
    labels: Tensor  # (R,) one per evaluation
    names: list[float]  # the same as numbers
    factors: Tensor  # (R,) from x to the network's input, one per evaluation
    inputs: list[float]  # the same as numbers
    order: int  # evaluations per step
    postprocess: Callable[[Tensor], Tensor] | None  # clipping or thresholding of x0
    reference: Any  # diffusers' scheduler of the configuration
    free: bool  # each row is a function of the sample, its own evaluation and fresh noise
    keeps: bool  # edits of a stage reach the network only, as in diffusers: the state is that of the step's start
    found: dict[float, list[int]]  # the answers of `entries`

    def entries(self, timestep: float) -> list[int]:
        """The rows of that label, up to the rounding of half precision."""
        known = self.found.get(timestep)
        if known is None:
            known = [i for i, v in enumerate(self.names) if abs(v - timestep) <= 1e-4 * max(1.0, abs(v))]
            if known:
                self.found[timestep] = known
        return known

    def scales(self, plan: Plan) -> list[float]:
        """The factors from x to the pipeline's state, at each row of a plan and at its end."""
        if self.grid.exploding:
            return [1.0] * (plan.nfe + 1)
        return self.process.scale(plan.sigma) + self.process.scale(plan.sigmas[-1:])

    def start(self) -> float | Tensor:
        """The standard deviation of the pipeline's first state, which is at the level that the network is given."""
        moved = self.plan.sigma[0] != self.plan.sigmas[0] and not self.grid.exploding
        return self.scales(self.plan)[0] * float(self.plan.sigmas[0]) if moved else self.grid.start

    def sigmas(self) -> Tensor:
        """The levels of the rows and the last one, as diffusers lists them: sigma / (1 + sigma) for flows."""
        if self.grid.listed is not None and len(self.grid.listed) == self.plan.nfe + 1:
            return self.grid.listed.float().clone()
        levels = torch.cat([self.plan.sigma, self.grid.sigmas[-1:]])
        exploding = self.process.kind == "flow" and not self.process.line
        return (levels / (1 + levels) if exploding else levels).float()

    def plan_from(self, row: int, eta: float) -> Plan:
        """The plan from this row on; `eta` replaces that of DDIM, or the gamma of TCD."""
        plan, used = self.plan, self.used
        if eta:
            plan = self._plan_of(type(used)(eta), self.grid.sigmas)
        if not row:
            return plan
        if row >= plan.nfe:
            raise InputError(f"begin index: got {row}, after the last step. Choose a larger strength.")
        if isinstance(used, DiffusersPNDM):
            return self._plan_of(DiffusersPNDM(used.warm_up, used.combine, row), self.grid.sigmas)
        if carried_plan(used) is not None or isinstance(used, (*DDIM_FORMS, DDPM, LCM, DiffusersLCM, TCD)):
            return plan.tail(row)
        levels = self.grid.sigmas[int((self.grid.sigmas > plan.sigma[row]).sum()) :]
        tails: list[Any] = [used]
        if isinstance(used, PNDM):  # one evaluation per entry after the warm-up
            tails = [PNDM("plms"), IPNDM(4)]
        elif isinstance(used, DiffusersDPM):
            tails = [DiffusersDPM(used.solver, replace(used.ending, total=len(self.grid.sigmas) - 1))]
        for made in (self._plan_of(solver, levels) for solver in tails):
            if made.nfe == plan.nfe - row:
                return made
        raise InputError(
            f"begin index: got {row}, not the start of a step of {plan.name} ({self.order} entries each). Choose "
            "another strength."
        )

    def step_from(self, label: float, eta: float) -> Plan | None:
        """The step of DDIM from a label outside the grid to the one a stride below; None for other solvers."""
        known = self.process.kind == "vp" and 0 <= label < self.process.count and label % 1 == 0
        if not known or not isinstance(self.used, DDIM_FORMS):
            return None
        stride = self.process.count // (len(self.grid.sigmas) - 1)
        levels = self.process.sigma(torch.tensor([label, label - stride], dtype=torch.float64))
        if label < stride:
            levels[1:] = self.grid.sigmas[-1:]
        return self._plan_of(DDIM(eta or self.used.eta), levels)

    def _plan_of(self, solver: Any, sigmas: Tensor) -> Plan:
        return resolve(solver, self.process.schedule, sigmas=sigmas, repeat=True, keep=True)[0]


def free_of_history(row: Row) -> bool:
    """Whether a row is a function of the network's input, its own evaluation and fresh noise."""
    past = [*row.stage.evaluations, *(at for at in row.update.evaluations if at[1] > 0)]
    return not past and not row.stage.normals and all(at[1] == 0 for at in row.update.normals)


Levels = tuple[float, ...] | None


def prepare(
    config: Mapping[str, Any], solver: Any, steps: int | None, timesteps: Levels = None, sigmas: Levels = None,
    mu: float | None = None, original: int | None = None, strength: float | None = None,
) -> Setup:  # fmt: skip
    """The levels, the plan and the labels of a run; see `FewStepScheduler.set_timesteps`.

    Without steps and lists they are those of the constructor of diffusers' scheduler, all levels of training.
    """
    asked = (config, solver, steps, timesteps, sigmas, mu, original, strength)
    reference = reference_of(config, solver)
    process = process_of(config, reference, solver)
    used, plan = solver, carried_plan(solver)
    if plan is not None:
        grid = own_grid(plan, process, steps)
    else:
        given = {"timesteps": timesteps, "sigmas": sigmas, "mu": mu}
        given |= {"original_inference_steps": original, "strength": strength}
        grid = _grid(config, process, reference, steps, {k: v for k, v in given.items() if v is not None})
        if not config["exact"]:
            own_levels = timesteps is None and sigmas is None
            used = conform(solver, reference.config, process, grid, own_levels)
        plan, _ = resolve(used, process.schedule, sigmas=grid.sigmas, repeat=True, keep=True)
        check_flow(process, used, plan)
    plan = replace(plan, sigma=grid.snapped(plan.sigma))
    labels = grid.label_of(process, plan.sigma, config["exact"])
    order = used.card.evaluations if isinstance(used, DiffusionSolver) else grid.rows_per_step(plan.sigma)
    postprocess, free = postprocessing(reference.config), all(map(free_of_history, plan.rows))
    factors = process.alpha(plan.sigma)
    numbers = labels.tolist(), factors, factors.tolist()
    kinds = (DiffusersDPM, DiffusersPNDM, EDMHeun)
    keeps = not config["exact"] and isinstance(used, kinds) and process.kind != "edm"
    return Setup(asked, process, grid, used, plan, labels, *numbers, order, postprocess, reference, free, keeps, {})


def own_spacing(spacing: Any) -> bool:
    """Whether a `timestep_spacing` is one of `sigma_grid` that diffusers does not have."""
    return spacing in spacing_names() and spacing not in DIFFUSERS_SPACINGS


def _grid(
    config: Mapping[str, Any], process: Process, reference: Any, steps: int | None, given: Mapping[str, Any]
) -> Grid:
    """The levels that the arguments of `set_timesteps` ask for."""
    spacing = config.get("timestep_spacing")
    if steps is None and not given:
        return constructed_grid(process, reference)
    if own_spacing(spacing) and steps is not None and not given.keys() - {"mu"}:
        return named_grid(process, reference, steps, str(spacing))
    return grid_of(process, reference, steps, **given)


def solver_of(solver: Any) -> Any:
    """The solver, plan or student that a caller or a configuration names."""
    if solver is None:
        return DPMSolverPP(2)
    if isinstance(solver, Mapping):
        if "file" in solver:
            raise InputError(
                f"solver: the configuration names the file {solver['file']!r}, which is not loaded. Load with "
                "FewStepScheduler.from_pretrained(folder), or pass the plan or student as solver=."
            )
        return _built(**solver)
    if isinstance(solver, type):
        raise InputError(f"solver: got the class {solver.__name__}; expected an instance, {solver.__name__}().")
    solver = diffusion_solver_named(solver, "solver") if isinstance(solver, str) else solver
    carried_plan(solver)
    return solver


def _built(name: Any = None, **options: Any) -> DiffusionSolver:
    """The inverse of `described`."""
    compat = {kind.__name__: kind for kind in COMPAT}
    kind: Any = compat[name] if isinstance(name, str) and name in compat else type(solver_named(name))
    try:
        if isinstance(options.get("solver"), Mapping):
            options["solver"] = _built(**options["solver"])
        if isinstance(options.get("ending"), Mapping):
            options["ending"] = Ending(**options["ending"])
        solver: DiffusionSolver = kind(**options)
        # making a plan finds options that a constructor has accepted
        solver.plan(torch.tensor([2.0, 1.5, 1.0, 0.6]).double(), DiscreteVP.named("linear", 10))
    except REFUSALS as error:
        raise InputError(f"solver: {name} refuses {options or 'its options'}: {error}") from error
    return solver


def described(solver: Any) -> dict[str, Any]:
    """The solver as an entry of a configuration."""
    plan = carried_plan(solver)
    if plan is not None:
        return {"file": FILE, "plan": plan.name}
    return {"name": type(solver).__name__} | {k: _json_value(v) for k, v in solver.options().items()}


def _json_value(value: Any) -> Any:
    if isinstance(value, (DiffusionSolver, Ending)):
        return asdict(value) if isinstance(value, Ending) else described(value)
    return sorted(value) if isinstance(value, (set, frozenset)) else value


def options_of(cls: Any) -> frozenset[str]:
    """The options of a scheduler class, and of those whose configurations it accepts."""
    import diffusers

    others = [getattr(diffusers, name, None) for name in getattr(cls, "_compatibles", ())]
    return frozenset(k for c in (cls, *others) if c for k in c._get_init_keys(c)) - {"self", "options"}


def check_options(options: Mapping[str, Any], config: Mapping[str, Any], solver: Any, cls: Any) -> None:
    """Reject misspelt options that a user has given, and warn about options without effect."""
    if not options:
        return
    import diffusers

    name, _ = family(config, solver)
    theirs, known = getattr(diffusers, name), options_of(cls)
    for option, value in options.items():
        if option not in known and not option.startswith("_"):
            raise one_of("option", option, known)
        idle = f"{option}={value!r} has no effect:"
        if option in OVERRULED:
            warn(f"{idle} the solver is {solver!r}; set it there.")
        elif option == "timestep_spacing" and own_spacing(value):
            continue
        elif option == "timestep_spacing" and value not in (None, *DIFFUSERS_SPACINGS):
            raise one_of(option, value, {*DIFFUSERS_SPACINGS, *spacing_names()})
        elif value is not None and value is not False and option not in theirs._get_init_keys(theirs):
            warn(f"{idle} {name}, which corresponds to the solver, has no such option.")


def check_process(config: Mapping[str, Any]) -> None:
    """Reject the configuration of a scheduler whose forward process or labels are not supported."""
    name = config.get("_class_name")
    found = [k for k in FOREIGN if config.get(k) is not None and (k, config[k]) != ("snr_shift_scale", 1)]
    if found or name == "CosineDPMSolverMultistepScheduler":  # its options are those of EDM's
        what = f"{found[0]}: got {config[found[0]]!r}" if found else f"_class_name: got {name!r}"
        raise InputError(
            f"{what}, of a scheduler whose forward process or labels are not supported; expected one with betas, a "
            f"flow or EDM's. Use {name or FOREIGN[found[0]]} itself."
        )


def distilled_solver(config: Mapping[str, Any]) -> DiffusionSolver | None:
    """The sampler of a configuration of a distilled network: LCM, or TCD where it names that class; else None."""
    if "original_inference_steps" in config or "upscale_mode" in config:
        return TCD() if config.get("_class_name") == "TCDScheduler" else LCM()
    return None


def order_of(solver: Any, exact: bool) -> int:
    """Evaluations per step before a run."""
    singlestep = isinstance(solver, DPMFamily) and not solver.multistep
    return 1 if carried_plan(solver) or (singlestep and not exact) else solver.card.evaluations


def file_of(folder: Any, subfolder: str | None, hub: dict[str, Any]) -> str:
    """The file of a plan or a student: in a folder, or on the hub."""
    if Path(folder).is_dir():
        return str(Path(folder, subfolder or "", FILE))
    from huggingface_hub import hf_hub_download

    return str(hf_hub_download(str(folder), FILE, subfolder=subfolder, **hub))


def postprocessing(config: Mapping[str, Any]) -> Callable[[Tensor], Tensor] | None:
    """The clipping or thresholding of x0 that diffusers' scheduler of that configuration applies, or None."""
    if config.get("thresholding"):
        name, most = "dynamic_thresholding_ratio", float(config["sample_max_value"])
        if most < 1:  # diffusers then clips at that value, whatever the quantile
            return lambda x0: x0.clamp(-most, most) / most
        return partial(threshold, quantile=check_float(name, config[name], 0, 1, "a number in [0, 1]"), most=most)
    if config.get("clip_sample"):
        size = check_float("clip_sample_range", config.get("clip_sample_range", 1.0), 0, expected="a positive number")
        return partial(torch.clamp, min=-size, max=size)
    return None


def listed(name: str, values: Any) -> Levels:
    """A user's list of levels as finite decreasing numbers; the last of `sigmas` may appear twice."""
    if values is None:
        return None
    found = check_numbers(name, values)
    good = found.dim() == 1 and len(found) > 0 and bool(found.isfinite().all())
    steps = found.diff() if good else found
    if not good or not bool((steps[: len(steps) - (name == "sigmas")] < 0).all() and (steps <= 0).all()):
        raise InputError(f"{name}: got {values!r}, expected a list of finite, strictly decreasing numbers.")
    return tuple(found.tolist())


def own_grid(plan: Plan, process: Process, steps: int | None) -> Grid:
    """The levels that a plan or a student carries."""
    count, schedule = len(plan.sigmas) - 1, repr(process.schedule)
    if steps not in (None, count, plan.nfe):
        raise InputError(
            f"num_inference_steps: got {steps}; {plan.name} has {count} steps of its own. Ask for {count}, or fit a "
            "table for another number."
        )
    if plan.fit and not same_words(plan.fit.fingerprint.schedule, schedule):
        raise InputError(
            f"solver: {plan.name} was fitted to {plan.fit.fingerprint.schedule}, and the configuration has {schedule}. "
            "Fit a table for this pipeline."
        )
    labels = process.label(plan.sigmas[:-1])
    return Grid(plan.sigmas, labels.round().long() if process.kind == "vp" else labels.float(), 1.0)


def check_event(solver: Any, sample: Tensor) -> None:
    """Reject samples of another shape than a table was fitted to; the network itself is not checked."""
    fit = getattr(carried_plan(solver), "fit", None)
    if fit and tuple(sample.shape[1:]) != fit.fingerprint.event:
        raise InputError(
            f"sample: got {tuple(sample.shape)}, and {solver.name} was fitted to {fit.fingerprint.event}. Fit a table "
            "for this pipeline."
        )


def conform(solver: Any, config: Mapping[str, Any], process: Process, grid: Grid, own_levels: bool) -> Any:
    """The solver in diffusers' form; unchanged where diffusers has none.

    diffusers' DDIM and PNDM count in labels: they need `own_levels`, a grid of diffusers' own.
    """
    if isinstance(solver, EDMHeun) and (process.kind == "vp" or process.line):
        return DiffusersHeun(**solver.options())
    if process.line or config.get("stochastic_sampling"):
        return solver if process.line else DiffusersRenoised()
    if isinstance(solver, DDPM) and config.get("variance_type") in VARIANCES:
        return DDPM(**({"variance": config["variance_type"]} | solver.options()))
    if isinstance(solver, (DDIM, PNDM)) and own_levels and process.kind == "vp":
        if isinstance(solver, DDIM) or len(grid.sigmas) == 2:  # one step of PNDM is one of DDIM
            return DiffusersDDIM(getattr(solver, "eta", 0.0))
        velocities = process.prediction == "v_prediction"
        warm_up = "plms" if config["skip_prk_steps"] else solver.warm_up
        return DiffusersPNDM(warm_up, "v_prediction" if velocities else "epsilon")
    if isinstance(solver, LCM) and process.kind == "vp":
        solver = DiffusersLCM(float(config["timestep_scaling"]))
    if isinstance(solver, (DPMFamily, DEIS, UniPC)):
        lower, euler = config.get("lower_order_final", True), config.get("euler_at_final", False)
        with suppress(InputError):  # an option that diffusers does not have
            return DiffusersDPM(solver, Ending(lower=lower, euler=euler))
    return solver


def check_flow(process: Process, used: Any, plan: Plan) -> None:
    """Reject stochastic plans that lose all digits at a flow's first level, where sigma is almost infinite."""
    if process.kind == "flow" and plan.levy and plan.prediction == "noise":
        raise InputError(
            f"solver: got {used!r}, whose steps of the noise lose all digits at the first level of a flow; expected "
            "one of the data, such as Ancestral(DPMSolverPP(2, multistep=False))."
        )


def generators_of(generator: Any, batch: int) -> Any:
    """None, one generator, or a list with one per sample."""
    for one in generator if isinstance(generator, list) and generator else [generator]:
        check_instance("generator", one, (torch.Generator, type(None)), "a torch.Generator, or a list of them")
    if isinstance(generator, list) and len(generator) == 1:
        return generator[0]
    if isinstance(generator, list) and len(generator) != batch:
        raise InputError(f"generator: got {len(generator)}, expected one, or one for each of {batch} samples.")
    return generator


def seeds_of(generator: Any, batch: int) -> list[int]:
    """One seed per sample from a generator, from a list of them, or from torch's own as in diffusers."""
    source = generators_of(generator, batch)
    many = source if isinstance(source, list) else [source]
    devices = ["cpu" if g is None else g.device for g in many]
    drawn = [torch.randint(1 << 62, (batch // len(many),), generator=g, device=d) for g, d in zip(many, devices)]
    return torch.cat([d.to(drawn[0].device) for d in drawn]).tolist()  # one read from a device
