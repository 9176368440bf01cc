"""What a diffusers configuration describes: the forward process, the levels of a run, and their labels.

The grids are made by diffusers' own schedulers, so each of their options means the same here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from ... import (
    DDIM,
    DDPM,
    DEIS,
    LCM,
    PNDM,
    TCD,
    DiffusionSolver,
    DPMSolver,
    DPMSolverPP,
    DPMSolverSDE,
    EDMEuler,
    EDMHeun,
    SASolver,
    UniPC,
)  # fmt: skip
from ...compat import DiffusersDDIM, DiffusersDPM, DiffusersLCM, DiffusersPNDM
from ...denoiser import coefficients
from ...errors import InputError, one_of
from ...grid import short, sigma_grid
from ...schedule import CLOSEST, EDM, DiscreteVP, FlowMatching, Schedule

# what the network was trained on, which no class may replace by its own defaults
FORWARD = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
    "rescale_betas_zero_snr", "sigma_min", "sigma_max", "sigma_data", "shift", "flow_shift",
)  # fmt: skip
MOST_LABELS = 100_000
EXPLODING = ("EulerDiscreteScheduler", "HeunDiscreteScheduler")  # their state is x, not alpha x
# what diffusers' constructors and methods raise on bad options
REFUSALS = (ValueError, TypeError, RuntimeError, ImportError, AssertionError, LookupError, AttributeError)
FLOW = FlowMatching(t_max=CLOSEST)
LOG_SNR = (DDIM, DEIS, DPMSolverPP, DPMSolverSDE, DiffusersDPM, EDMEuler, UniPC)
KINDS = {"epsilon": "epsilon", "v_prediction": "v_prediction", "sample": "sample", "flow_prediction": "flow"}


@dataclass(frozen=True)
class Process:
    """The forward process of a configuration, and how its network is called."""

    kind: str  # "vp", "flow" or "edm"
    schedule: Schedule
    prediction: str  # what the network predicts, in diffusers' words
    count: int = 1000  # num_train_timesteps, the unit of a flow's labels
    data_std: float = float("nan")  # EDM's sigma_data
    line: bool = False  # of a flow: the state is x_t at level t, not x_t / (1 - t)

    def conversion(self, sigma: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """(p, q) of x0 = p x + q output; under EDM its c_skip and c_out."""
        if self.kind != "edm":
            return coefficients(KINDS[self.prediction], sigma, alpha)
        total = sigma.square() + self.data_std**2
        sign = 1.0 if self.prediction == "epsilon" else -1.0
        return self.data_std**2 / total, sign * sigma * self.data_std * total.rsqrt()

    def alpha(self, sigma: Tensor) -> Tensor:
        """Return the factor from x to the network's input; for EDM, this is c_in."""
        if self.kind == "edm":
            return (sigma.square() + self.data_std**2).rsqrt()
        return self.schedule.alpha(sigma)

    def label(self, sigma: Tensor) -> Tensor:
        """The label of a level, not rounded."""
        if self.kind == "edm":
            return 0.25 * sigma.log()
        return self.schedule.label(sigma) * (self.count if self.kind == "flow" else 1)

    def scale(self, sigma: Tensor) -> list[float]:
        """Return the factors from x to the pipeline's state at levels (R,): alpha, but 1 for EDM and at sigma = 0."""
        return self.schedule.alpha(sigma).tolist()

    def sigma(self, label: Tensor) -> Tensor:
        """The level at a label."""
        if self.kind == "edm":
            return torch.exp(4 * label)
        if self.kind == "flow":
            t = label / self.count
            return t if self.line else FLOW.sigma(t.clamp(max=CLOSEST))
        return self.schedule.sigma(label)

    def weights(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma_t of x_t = alpha x0 + sigma_t noise at a level."""
        alpha = 1 - sigma if self.line else self.schedule.alpha(sigma)
        return alpha, sigma if self.line else alpha * sigma


@dataclass(frozen=True)
class Grid:
    """Levels (n + 1,) in variance-exploding coordinates and labels (n,)."""

    sigmas: Tensor
    labels: Tensor
    start: float | Tensor = 1.0  # the standard deviation of a pipeline's first state
    exploding: bool = False  # the pipeline's state is x itself, not alpha x
    listed: Tensor | None = None  # the levels as diffusers' scheduler lists them

    def snapped(self, sigma: Tensor) -> Tensor:
        """Levels (R,) of rows, rounding differences from the grid's levels removed."""
        near = (sigma[:, None] / self.sigmas - 1).abs() < 1e-9
        return torch.where(near.any(1), self.sigmas[near.int().argmax(1)], sigma)

    def rows_per_step(self, sigma: Tensor) -> int:
        """Rows per step, from their snapped levels (R,), where all steps have the same number; else 1."""
        levels, rows = self.sigmas.tolist(), sigma.tolist()
        fits = (many for many in range(2, 5) if rows[::many][: len(levels) - 1] == levels[:-1])
        return next(fits, 1) if len(levels) > 2 else 1

    def label_of(self, process: Process, sigma: Tensor, exact: bool) -> Tensor:
        """Labels (R,) of snapped levels (R,); levels of the grid get the grid's own labels."""
        labels = process.label(sigma)
        if process.kind == "vp":  # churn may raise a level above the network's last label
            labels = labels.clamp(0, process.count - 1)
        if exact:
            return labels
        if not self.labels.is_floating_point():
            labels = labels.round()
        at = dict(zip(self.sigmas.tolist(), self.labels.tolist()))
        known = [at.get(s, v) for s, v in zip(sigma.tolist(), labels.tolist())]
        return torch.tensor(known, dtype=self.labels.dtype)


def process_of(config: Mapping[str, Any], reference: Any, solver: Any = None) -> Process:
    """The forward process that a configuration and its scheduler in diffusers describe."""
    prediction = config.get("prediction_type", "epsilon")
    if not isinstance(prediction, str) or prediction not in KINDS:
        raise one_of("prediction_type", prediction, KINDS)
    if "sigma_data" in config:
        schedule = EDM(float(reference.config.sigma_min), float(reference.config.sigma_max))
        return Process("edm", schedule, prediction, data_std=float(config["sigma_data"]))
    count = config.get("num_train_timesteps", 1000)
    if is_flow(config):
        if in_line(solver):  # its velocity is (x_t - x0) / t, the noise of x0 + t noise
            return Process("flow", EDM(1e-3, 1.0), "epsilon", count, line=True)
        return Process("flow", FLOW, "flow_prediction", count)
    abar = reference.alphas_cumprod.double().clone()
    if len(abar) < 2:
        raise InputError(f"trained_betas: got {len(abar)}, expected one for each of the labels.")
    if not 0 < abar[-1] < abar[-2]:  # zero terminal SNR: 0, or diffusers' stand-in of 2^-24
        # clipped estimates from the noise lose digits in proportion to sigma
        small = 2.0**-40 if abar[-1] == 0 and prediction != "epsilon" else 2.0**-24
        abar[-1] = min(small, float(abar[-2]) / 4)
    return Process("vp", DiscreteVP(abar), prediction, count)


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether x_t = (1 - t) x0 + t noise."""
    return bool(config.get("use_flow_sigmas")) or config.get("prediction_type") == "flow_prediction" or by_shift(config)


def by_shift(config: Mapping[str, Any]) -> bool:
    """Whether the configuration is one of the flow schedulers' own, not that of a solver that also knows flows."""
    return "shift" in config and "solver_order" not in config and not config.get("use_flow_sigmas")


def in_line(solver: Any) -> bool:
    """Whether a flow's steps are taken in x_t and t: those of deterministic solvers without a form in log SNR."""
    return isinstance(solver, DiffusionSolver) and not solver.card.levy and not isinstance(solver, LOG_SNR)


# solvers with a scheduler of their own, and whether it knows flows
FAMILIES: tuple[tuple[Any, str, bool], ...] = (
    (UniPC, "UniPCMultistepScheduler", True),
    (DEIS, "DEISMultistepScheduler", True),
    ((DDIM, DiffusersDDIM), "DDIMScheduler", False),
    (DDPM, "DDPMScheduler", False),
    ((PNDM, DiffusersPNDM), "PNDMScheduler", False),
    (EDMEuler, "EulerDiscreteScheduler", False),
    (EDMHeun, "HeunDiscreteScheduler", False),
    (SASolver, "SASolverScheduler", False),
    ((LCM, DiffusersLCM), "LCMScheduler", False),
    (TCD, "TCDScheduler", False),
)


def family(config: Mapping[str, Any], solver: Any) -> tuple[str, dict[str, Any]]:
    """The scheduler of diffusers for this solver under this configuration, and options that it needs."""
    if "sigma_data" in config:
        dpm = isinstance(solver, DPMSolverPP)
        return ("EDMDPMSolverMultistepScheduler" if dpm else "EDMEulerScheduler"), {}
    if by_shift(config):
        return ("FlowMatchLCMScheduler" if isinstance(solver, LCM) else "FlowMatchEulerDiscreteScheduler"), {}
    solver = getattr(solver, "solver", solver)  # the inner one of fewstep.compat
    options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"} if is_flow(config) else {}
    for kinds, name, flows in FAMILIES:
        if isinstance(solver, kinds) and (flows or not options):
            return name, options
    noise = isinstance(solver, DPMSolver)
    options |= {"algorithm_type": "dpmsolver" if noise else "dpmsolver++"}
    if noise:  # diffusers' noise-prediction algorithm has no step to sigma = 0
        options |= {"final_sigmas_type": "sigma_min"}
    singlestep = isinstance(solver, (DPMSolverPP, DPMSolver)) and not solver.multistep
    return f"DPMSolver{'Singlestep' if singlestep else 'Multistep'}Scheduler", options


def reference_of(config: Mapping[str, Any], solver: Any) -> Any:
    """The scheduler of diffusers whose conventions apply."""
    import diffusers

    name, more = family(config, solver)
    cls = getattr(diffusers, name)
    known = cls._get_init_keys(cls)
    options = {k: v for k, v in {**config, **more}.items() if k in known and not k.startswith("_")}
    if name == "PNDMScheduler":
        if options.get("prediction_type") == "sample":
            options["prediction_type"] = "epsilon"  # it rejects "sample", which its grid does not depend on
        options["skip_prk_steps"] = bool(options.get("skip_prk_steps") or solver.warm_up == "plms")
    if config.get("invert_sigmas"):
        raise InputError(f"config: got invert_sigmas=True, which is not supported. Use {name} itself.")
    if config.get("stochastic_sampling") and not isinstance(solver, EDMEuler):
        raise InputError("config: got stochastic_sampling=True, a form of Euler's method; expected solver=EDMEuler().")
    try:
        return cls(**options)
    except REFUSALS as error:
        raise InputError(f"config: {name} refuses it: {error}") from error


def grid_of(
    process: Process, reference: Any, steps: int | None, timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None, **more: float,
) -> Grid:  # fmt: skip
    """The levels of a run, from a number of steps or from the user's list; `reference` makes them where it can."""
    given = {"timesteps": timesteps, "sigmas": sigmas, **more}
    asked = {k: list(v) if isinstance(v, tuple) else v for k, v in given.items() if v is not None}
    takes, name = signature(reference.set_timesteps).parameters.keys(), type(reference).__name__
    if timesteps is not None:
        check_labels(process, torch.tensor(timesteps, dtype=torch.float64), "timesteps")
    # the sigmas of UniPC are those of flows, and EDM's are positions between its ends
    ours = sigmas is not None and process.kind != "flow" and name != "EulerDiscreteScheduler"
    if ours or (timesteps is not None and "timesteps" not in takes):
        return _given_levels(process, reference, steps, timesteps, sigmas)
    if asked.keys() - takes:
        raise InputError(f"{min(asked.keys() - takes)}: {name} takes none. Omit it.")
    try:
        reference.set_timesteps(steps, **asked)
    except REFUSALS as error:
        raise InputError(
            f"set_timesteps: {name} refuses {steps} steps{f' with {asked}' if asked else ''}: {error}"
        ) from error
    made = constructed_grid(process, reference)
    if not bool(made.sigmas.isfinite().all()) or made.sigmas[0] == made.sigmas[-1]:
        what = made.sigmas if made.listed is None else made.listed
        ends = {"shift_terminal": None, "final_sigmas_type": "zero", "set_alpha_to_one": True}
        given = {k: reference.config.get(k, v) for k, v in ends.items()}
        others = [f", or {k}={v!r} instead of {given[k]!r}" for k, v in ends.items() if given[k] != v]
        raise InputError(
            f"num_inference_steps: got {len(made.labels)}; the levels of {name} are then {short(what)}, with no step "
            f"to take. Use more steps{''.join(others)}."
        )
    if bool((made.sigmas[:-2].diff() == 0).any()):  # some of diffusers' own schedulers return nan there
        raise InputError(
            f"num_inference_steps: got {steps}; some of its levels repeat when rounded to integer labels. Use fewer, "
            "or timestep_spacing='trailing'."
        )
    return made


def named_grid(process: Process, reference: Any, steps: int, spacing: str) -> Grid:
    """The levels of a spacing that diffusers does not have, such as "ays-sdxl"."""
    levels = sigma_grid(FLOW if process.kind == "flow" else process.schedule, steps, spacing)
    levels = levels / (1 + levels) if process.line else levels
    labels = process.label(levels[:-1])
    return _vp_grid(reference, levels, labels.round().long() if process.kind == "vp" else labels.float())


def check_labels(process: Process, labels: Tensor, argument: str) -> None:
    """Reject labels that the network was not trained on."""
    if process.kind == "edm":
        low, high = process.label(torch.tensor([process.schedule.sigma_min, process.schedule.sigma_max])).tolist()
    else:
        low, high = 0.0, float(process.count - (process.kind == "vp"))
    slack = 1e-4 * max(1.0, abs(high))
    if not bool(((labels >= low - slack) & (labels <= high + slack)).all()):
        raise InputError(f"{argument}: got {labels.tolist()}, expected labels from {high:g} to {low:g}.")


def _given_levels(
    process: Process, reference: Any, steps: int | None, timesteps: Sequence[float] | None,
    sigmas: Sequence[float] | None,
) -> Grid:  # fmt: skip
    """The user's levels, where diffusers' scheduler does not take such a list."""
    given, count = (timesteps, len(timesteps)) if timesteps is not None else (sigmas, len(sigmas or ()) - 1)
    if steps not in (None, count):
        raise InputError(f"num_inference_steps: got {steps} with a list of {count} steps, {given}. Omit one of them.")
    if sigmas is not None:
        levels = torch.tensor(sigmas, dtype=torch.float64)
        labels = process.label(levels[:-1])
        if process.kind == "vp":
            labels = labels.round().clamp(0, process.count - 1).long()
        return _vp_grid(reference, levels, labels)
    labels = torch.tensor(timesteps, dtype=torch.float64)
    levels = torch.cat([process.sigma(labels), _last(process, reference)])
    return _vp_grid(reference, levels, labels.float() if bool(labels.frac().any()) else labels.long())


def constructed_grid(process: Process, reference: Any) -> Grid:
    """The grid that `reference` has, from its constructor or from `set_timesteps`."""
    if not hasattr(reference, "sigmas"):  # has labels only
        # PNDM's own list repeats labels and has those of its inner stages
        listed = getattr(reference, "_timesteps", reference.timesteps)
        labels = torch.tensor(sorted({int(v) for v in listed}, reverse=True))
        return Grid(torch.cat([process.sigma(labels.double()), _last(process, reference)]), labels)
    levels, labels, listed = reference.sigmas.double().cpu(), reference.timesteps.cpu(), reference.sigmas
    if type(reference).__name__ == "HeunDiscreteScheduler":  # lists each inner level twice
        levels, labels = torch.cat([levels[:1], levels[1::2]]), torch.cat([labels[:1], labels[1::2]])
    levels = levels[: len(labels) + 1]  # Euler's log-linear list is longer than its run
    levels[-1:] = levels[-2:].min()  # EDM's last level, rounded otherwise than the one before
    if process.kind == "flow":
        if len(levels) == len(labels):  # the constructor's list has no last level
            levels = torch.cat([levels, levels.new_zeros(1)])
        return Grid(levels if process.line else FLOW.sigma(levels.clamp(max=CLOSEST)), labels, listed=listed)
    if process.kind == "edm":
        return Grid(levels, labels, reference.init_noise_sigma, listed=listed)
    return _vp_grid(reference, levels, labels, listed)


def _vp_grid(reference: Any, levels: Tensor, labels: Tensor, listed: Tensor | None = None) -> Grid:
    if type(reference).__name__ not in EXPLODING:
        return Grid(levels, labels, listed=listed)
    if listed is not None:
        return Grid(levels, labels, reference.init_noise_sigma, True, listed)
    # the first state of these has size sigma, or (1 + sigma^2)^(1/2) on "leading" grids
    even = reference.config.timestep_spacing in ("linspace", "trailing")
    start = levels[0] if even else (1 + levels[0] ** 2).sqrt()
    return Grid(levels, labels, start.float(), True)


def _last(process: Process, reference: Any) -> Tensor:
    """(1,) the last level of a grid whose scheduler lists only the levels of evaluations."""
    config = reference.config
    ends_at_zero = config.get("set_alpha_to_one", True)
    if hasattr(reference, "sigmas"):
        ends_at_zero = config.get("final_sigmas_type", "zero") != "sigma_min"
    zero, name = torch.zeros(1, dtype=torch.float64), type(reference).__name__
    if name in ("LCMScheduler", "TCDScheduler"):  # an estimate of x0, and the state at label 0
        ends_at_zero = name == "LCMScheduler"
    return zero if ends_at_zero or process.kind != "vp" else process.sigma(zero)
