"""This library's solvers as a scheduler of diffusers' pipelines."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
    from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
except ImportError as _error:
    raise ImportError(f"diffusers cannot be imported ({_error}). Run: pip install diffusers") from _error

from ... import (
    DiffusionModel,
    DiffusionSolver,
    EDMEuler,
    EDMHeun,
    InputError,
    Plan,
    _validation,
    executor,
    load,
)
from ...compat import DiffusersPNDM
from ...denoiser import coefficients, to_x0
from ...errors import one_of
from ...executor import Normals, State
from ...plan import Combination
from ...plan_noise import at_least_float32, fresh_normals, own_path, plan_normals
from ...problem import plus
from ...resolve import carried_plan, evaluator_of
from . import configuration
from .grid import EXPLODING, FORWARD, MOST_LABELS, Process, check_labels, family, process_of, reference_of
from .run import Draw, Entry, Run
from .traced import EARLY, LATE, TracedRow, has, numbered, row_normals, sample_seeds

# what diffusers' schedulers keep of the forward process, for training and for pipelines that compute with it
TABLES = (
    "betas", "alphas", "alphas_cumprod", "final_alpha_cumprod", "alpha_t", "sigma_t", "lambda_t", "sigmas",
    "sigma_min", "sigma_max",
)  # fmt: skip
# diffusers' schedulers that step without set_timesteps, over all levels of training
CONSTRUCTED = (
    "DDPMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler", "EDMEulerScheduler",
    "FlowMatchEulerDiscreteScheduler",
)  # fmt: skip

NO_CHURN = {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": math.inf, "s_noise": 1.0}


def _number(timestep: Any) -> float:
    """A timestep, or the first of a batch of them."""
    return _validation.check_float("timestep", timestep.reshape(-1)[:1] if torch.is_tensor(timestep) else timestep)


class FewStepScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Any solver, plan or student of this library as the scheduler of a diffusers pipeline.

    `FewStepScheduler.from_config(pipe.scheduler.config, solver=fewstep.UniPC(3))` accepts every option of that
    configuration. By default a run has diffusers' levels, labels and solver forms, and reproduces its scheduler for
    that solver. With `exact=True` the solver is the published one, and the network gets the label of each level
    without rounding.

    The state is that of diffusers' scheduler of that configuration: alpha x, or x itself for EDM's configurations and
    for `EDMEuler` and `EDMHeun`. A pipeline may change the sample between steps; the change is carried over. Each
    entry of `timesteps` is one network evaluation, and `order` of them are one step.

    A scheduler serves one run at a time: `step` refuses any timestep but the next one. Solvers without history (DDIM,
    DDPM, EDMEuler) take any timestep in any order.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, prediction_type: as in diffusers;
            further options (timestep_spacing, use_karras_sigmas, thresholding, flow_shift, sigma_data, ...) are
            keywords.
        solver: a diffusion solver or its name, a `Plan`, or a student of this library's distillation;
            `DPMSolverPP(2)` by default, and `LCM()` or `TCD()` for their configurations. In a configuration it is
            `{"name": "UniPC", "order": 3}` or names a file.
        exact: published forms of solvers, and no rounding of labels.
        noise: the source of stochastic solvers' noise: `"generator"` draws each step's from the pipeline's generator,
            as diffusers does; `"path"` draws one Brownian path per sample from it, on which all step counts and
            solvers agree.

    Raises:
        InputError: a solver that does not sample, a configuration that diffusers rejects, a start in the middle of a
            step, a damaged file.
    """

    _compatibles = [
        *(e.name for e in KarrasDiffusionSchedulers), "SASolverScheduler", "IPNDMScheduler",
        "EDMDPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler",
        "LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler",
    ]  # fmt: skip
    ignore_for_config: list[str] = ["options"]

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02,
        beta_schedule: str = "linear", trained_betas: Any = None, prediction_type: str = "epsilon", solver: Any = None,
        exact: bool = False, noise: str = "generator", **options: Any,
    ) -> None:  # fmt: skip
        _validation.check_choice("noise", noise, ("generator", "path"))
        self.solver: Any = configuration.solver_of(solver)
        self.register_to_config(solver=configuration.described(self.solver), **options)
        configuration.check_options(options, self.config, self.solver, type(self))
        if trained_betas is not None:
            betas = _validation.check_numbers("trained_betas", trained_betas)
            self.register_to_config(trained_betas=betas.tolist())
        num_train_timesteps = _validation.check_int("num_train_timesteps", num_train_timesteps, 2, MOST_LABELS)
        self.num_inference_steps: int | None = None
        self.order: int = configuration.order_of(self.solver, exact)
        self._forward: tuple[Any, Process] | None = None
        self._setup: configuration.Setup | None = None
        self._starts: dict[tuple[int, float], Run] = {}
        self._begin: int | None = None
        self._run: Run | None = None
        self._describe()

    def _describe(self) -> None:
        """Set what diffusers' schedulers have when constructed, one step per label."""
        reference = reference_of(self.config, self.solver)
        for name in TABLES:
            if hasattr(reference, name):
                setattr(self, name, getattr(reference, name))
        listed = reference.timesteps
        self.timesteps: Tensor = torch.arange(len(self)).flip(0) if listed is None else listed.clone()
        self.init_noise_sigma: float | Tensor = getattr(reference, "init_noise_sigma", 1.0)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A scheduler from the configuration of any scheduler of diffusers; keywords override it."""
        more: dict[str, Any] = {}
        return_unused_kwargs = _validation.check_flag("return_unused_kwargs", return_unused_kwargs)
        _validation.check_instance("config", config, Mapping, "the config of a scheduler of diffusers")
        for key in config:
            _validation.check_instance("config", key, str, "names as keys")
        if isinstance(config, Mapping):
            configuration.check_process(config)
            if kwargs.get("solver", config.get("solver")) is None:
                kwargs["solver"] = configuration.distilled_solver(config)
            # options that only the class behind the solver has; unknown ones may be returned to the caller
            known = configuration.options_of(cls) if return_unused_kwargs else kwargs
            more = {k: kwargs.pop(k) for k in [*kwargs] if k in known and k not in cls._get_init_keys(cls)}
            # diffusers lets each class have its own defaults; those of the forward process are the network's
            free = [k for k in config.get("_use_default_values", []) if k not in (*FORWARD, *more)]
            config = {**config, **more, "_use_default_values": free}
        made = super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)
        scheduler = made[0] if return_unused_kwargs else made
        configuration.check_options(more, scheduler.config, scheduler.solver, cls)
        scheduler._describe()
        return made

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write the configuration as JSON, and next to it a plan or a student as safetensors."""
        file = Path(save_directory) / configuration.FILE
        file.unlink(missing_ok=True)  # of another solver, saved here before
        if carried_plan(self.solver):
            file.parent.mkdir(parents=True, exist_ok=True)
            self.solver.save(file)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any = None, subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        """The inverse of `save_pretrained`. `network=` for a student with an architecture of your own."""
        network, unused = kwargs.pop("network", None), kwargs.pop("return_unused_kwargs", False)
        hub: dict[str, Any] = {k: kwargs[k] for k in configuration.HUB if k in kwargs}
        try:
            place = {"subfolder": subfolder, "return_unused_kwargs": True}
            found, rest = cls.load_config(pretrained_model_name_or_path, **place, **kwargs)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InputError(f"path: {pretrained_model_name_or_path} holds no JSON ({error}).") from error
        given = found.get("solver")
        if rest.get("solver") is None and isinstance(given, Mapping) and "file" in given:
            file = configuration.file_of(pretrained_model_name_or_path, subfolder, hub)
            rest["solver"] = load(file, network)
        # other keywords of loading, such as torch_dtype, are for other parts of a pipeline
        asked = {k: v for k, v in rest.items() if unused or k in configuration.options_of(cls)}
        return cls.from_config(found, return_unused_kwargs=unused, **asked)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None, mu: float | None = None, original_inference_steps: int | None = None,
        strength: float | None = None, **unknown: Any,
    ) -> None:  # fmt: skip
        """Make the grid and the plan of a run.

        Args:
            num_inference_steps: steps; a plan or a student accepts only its own number.
            device: of `timesteps`.
            timesteps: (n,) labels of the levels, decreasing, instead of a number of steps.
            sigmas: (n + 1,) the levels themselves, decreasing, the last may be 0; (n,) for flows, as in diffusers.
            mu: the shift of flows that depend on the resolution.
            original_inference_steps, strength: of LCM and TCD configurations: the steps of the distillation, in place
                of the configuration's, and the part of them that image to image takes.

        Raises:
            InputError: levels that the schedule does not have, or an option that diffusers' scheduler of this
                configuration does not take.
        """
        refuse_unknown("set_timesteps", unknown, type(self).set_timesteps)
        if timesteps is not None and sigmas is not None and self._process.kind != "flow":
            raise InputError("timesteps, sigmas: got both; expected one of them.")
        mu = None if mu is None else _validation.check_float("mu", mu)
        lists = configuration.listed("timesteps", timesteps), configuration.listed("sigmas", sigmas)
        if num_inference_steps is not None:
            num_inference_steps = _validation.check_int("num_inference_steps", num_inference_steps)
        elif lists == (None, None) and not carried_plan(self.solver):
            raise InputError("num_inference_steps: got None, expected an integer of at least 1.")
        if original_inference_steps is not None:
            _validation.check_int("original_inference_steps", original_inference_steps, 1)
        if strength is not None:
            strength = _validation.check_float("strength", strength, 0, 1, "a number in [0, 1]")
        distilled = original_inference_steps, strength
        asked = (self.config, self.solver, num_inference_steps, *lists, mu, *distilled)
        if self._setup is None or self._setup.asked != asked:
            self._prepare(*asked)
            self._start(0, 0.0)  # a compiled step cannot make it
        made = self._ready()
        self._begin, self._run = None, None
        if device is not None and str(device) != "meta":
            device = _validation.check_device(device)
        self.timesteps = made.labels.clone().to(device)
        self.sigmas: Tensor = made.sigmas()
        self.num_inference_steps, self.init_noise_sigma = len(made.grid.sigmas) - 1, made.start()
        self.order = made.order

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _prepare(self, *asked: Any) -> configuration.Setup:
        self._setup, self._starts = configuration.prepare(*asked), {}
        self._forward = (self.config, self._setup.process)
        return self._setup

    def _ready(self) -> configuration.Setup:
        """The setup of `set_timesteps`, or that of the constructor where diffusers' scheduler can step from it."""
        if self._setup is not None:
            return self._setup
        name = family(self.config, self.solver)[0]
        if name not in CONSTRUCTED or carried_plan(self.solver):
            raise InputError("set_timesteps: not called yet; call scheduler.set_timesteps(steps) before a run.")
        made: configuration.Setup = self._prepare(self.config, self.solver, None)
        return made

    @property
    def _process(self) -> Process:
        """The forward process; needed before a run for `add_noise` in training."""
        if self._forward is None or self._forward[0] is not self.config:
            self._forward = (self.config, process_of(self.config, reference_of(self.config, self.solver), self.solver))
        return self._forward[1]

    @property
    def begin_index(self) -> int | None:
        """The entry of `timesteps` at which the pipeline started the run."""
        return self._begin

    @property
    def step_index(self) -> int | None:
        """The entry of `timesteps` that is next; None before the first step."""
        return None if self._run is None else self._run.first + self._run.row

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at this entry, as image-to-image pipelines do."""
        begin_index = _validation.check_int("begin_index", begin_index, 0)
        self._begin, self._run = begin_index, None
        if self._free(0.0) and begin_index < len(self.timesteps):
            self._run = self._start(0, 0.0)._replace(row=begin_index)
        else:
            self._run = self._start(begin_index, 0.0)

    def _entries(self, timestep: Any) -> list[int] | None:
        """The entries of `timesteps` with this label; None where its value would have to be read from a device."""
        setup = self._ready()
        if timestep is None or torch.compiler.is_compiling():
            return None
        _validation.check_no_graph("timestep", timestep)
        if torch.is_tensor(timestep):
            if timestep.device.type != "cpu":
                # iterating over `timesteps` yields views of it, whose position is their entry
                mine = self.timesteps
                mine_at, at = mine.untyped_storage()._cdata, timestep.untyped_storage()._cdata
                if timestep.device != mine.device or at != mine_at:
                    return None
                return setup.entries(setup.names[timestep.storage_offset() - mine.storage_offset()])
            if timestep.numel() > 1 and bool((timestep != timestep.reshape(-1)[0]).any()):
                raise InputError(
                    f"timestep: got {timestep.tolist()}, expected the same for all samples. Use a copy.deepcopy of the "
                    "scheduler per timestep."
                )
            timestep = timestep.reshape(-1)[0] if timestep.dim() and timestep.numel() else timestep
        return setup.entries(_validation.check_float("timestep", timestep))

    def _row(self, timestep: Any) -> int:
        """The entry of a timestep that begins a run, or continues one of a solver without history."""
        return self._row_of(timestep, self._entries(timestep))

    def _row_of(self, timestep: Any, entries: list[int] | None) -> int:
        """The same, with the `_entries` of the timestep."""
        setup = self._ready()
        row = self.step_index if self._run is not None and not self._run.over else self._begin
        if entries is None and (timestep is None or row is not None or torch.compiler.is_compiling()):
            return row or 0
        if entries is None:
            entries = setup.entries(_number(timestep))
        if not entries:
            raise InputError(f"timestep: got {_number(timestep):g}, expected one of scheduler.timesteps.")
        return row if row in entries else next((i for i in entries if i % self.order == 0), entries[0])

    def _start(self, row: int, eta: float) -> Run:
        """A run from this entry."""
        run = self._starts.get((row, eta))
        return self._started(row, eta) if run is None else run

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _started(self, row: int, eta: float) -> Run:
        run = self._starts[row, eta] = self._run_of(self._ready().plan_from(row, eta), row)
        return run

    def _run_of(self, plan: Plan, first: int) -> Run:
        """The run of a plan whose first row is this entry of the timesteps."""
        process = self._process
        alpha, by = process.schedule.alpha(plan.sigma), process.conversion
        columns = [c for kind in ("data", "noise") for c in coefficients(by, plan.sigma, alpha, kind)]
        labels = self._ready().labels[first : first + plan.nfe].tolist() or [math.nan]
        numbers = torch.zeros(plan.nfe + 1, 6, dtype=torch.float64)
        numbers[:-1, 0] = torch.tensor(labels)
        numbers[:, 1] = torch.tensor(self._ready().scales(plan))
        numbers[:-1, 2:] = torch.stack(columns, 1)
        return Run.of(plan, first, numbers, process.schedule)

    def _free(self, eta: float) -> bool:
        """Whether a row is a function of the sample and its own evaluation: rows may then be taken in any order."""
        setup = self._ready()
        if not setup.free or not isinstance(self.solver, (DiffusionSolver, Plan)):
            return False
        return self.config.noise != "path" or not (eta or setup.plan.levy)

    def _next(self, timestep: Any, sample: Tensor, eta: float) -> Run:
        """The run whose next row is the timestep's: the present one, a new one, or an error where that mixes runs."""
        run = self._run
        if not self._free(eta):
            if run is not None and run.state is not None:
                return self._continued(run, timestep, sample, eta)
            return run if run is not None and not eta else self._start(self._row(timestep), eta)
        entries = self._entries(timestep)
        plan = self._ready().step_from(_number(timestep), eta) if entries == [] else None
        if plan is not None:
            return self._run_of(plan, len(self.timesteps))
        return self._start(0, eta)._replace(row=self._row_of(timestep, entries))

    def _label_outside(self, timestep: Any) -> float | None:
        """The label of a timestep that the schedule does not have."""
        return _number(timestep) if self._entries(timestep) == [] else None

    def _continued(self, run: Run, timestep: Any, sample: Tensor, eta: float) -> Run:
        """The run itself, or a second one from its first timestep after its end."""
        entries, first, names = self._entries(timestep), run.first, self._ready().names
        if run.over:
            if entries is None or first in entries:
                return self._start(first, eta)
            where = f"at its end, after t={names[-1]:g}"
        elif entries is not None and first + run.row not in entries:
            where = f"at t={names[first + run.row]:g}"
        elif run.state is not None and run.state.x.shape != sample.shape:
            raise InputError(
                f"sample: got {tuple(sample.shape)}, expected {tuple(run.state.x.shape)} as before in this run. Use "
                "copy.deepcopy(scheduler) per run, or call set_timesteps before a new one."
            )
        else:
            return run
        got = f"{names[entries[0]]:g}" if entries else "one outside scheduler.timesteps"
        raise InputError(
            f"timestep: got {got}, but this scheduler is in a run {where}. Use copy.deepcopy(scheduler) per run, or "
            "call set_timesteps before a new one."
        )

    def scale_model_input(self, sample: Tensor, timestep: Any = None, *_: Any, **__: Any) -> Tensor:
        """The network's input: the sample itself, or scaled to unit variance where the state is x."""
        process = self._process
        exploding = process.kind == "edm" or family(self.config, self.solver)[0] in EXPLODING
        if not exploding:
            return sample
        ready = self._setup is not None or timestep is None
        label = (None if timestep is None else self._label_outside(timestep)) if ready else _number(timestep)
        if label is None:
            row, setup = self._row(timestep), self._ready()
            if torch.compiler.is_compiling():
                return sample * setup.factors.to(sample.device)[row]
            return sample * setup.inputs[row]
        check_labels(process, torch.tensor(label, dtype=torch.float64), "timestep")
        return sample * float(process.alpha(process.sigma(torch.tensor(label, dtype=torch.float64))))

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, eta: float = 0.0,
        use_clipped_model_output: bool | None = None, generator: Any = None, variance_noise: Tensor | None = None,
        return_dict: bool = True, *, s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf,
        s_noise: float = 1.0, per_token_timesteps: Tensor | None = None, **unknown: Any,
    ) -> DDIMSchedulerOutput | tuple[Tensor, ...]:  # fmt: skip
        """Compute the pipeline's next sample from the network's output.

        Args:
            model_output: (batch, *event) the network's output; further channels (a learned variance) are ignored.
            timestep: the next entry of `timesteps`; with a solver without history any entry. DDIM and DDPM also step
                from labels outside of it, one stride down, as in diffusers.
            sample: (batch, *event) the state, of any floating dtype; kept in float32 at least inside.
            eta: of DDIM, where the solver itself has none; for TCD, instead of its gamma.
            use_clipped_model_output: with clip_sample, also derive DDIM's noise from the clipped estimate.
            generator: one, or a list with one per sample, for stochastic solvers.
            variance_noise: unit normals (batch, *event) instead of drawn ones.
            s_churn, s_tmin, s_tmax, s_noise: of `EDMEuler`, as in diffusers: churn after the network's evaluation.
            per_token_timesteps: (batch, tokens) the labels of a flow's tokens; the output then has the opposite sign,
                as in diffusers. With `EDMEuler` each token steps to the next lower level, as there; with other solvers
                a token below the level of `timestep` stays as it is until the run gets there.

        Returns:
            `prev_sample` and `pred_original_sample`, or both as a tuple.

        Raises:
            InputError: a timestep that is not the next one, or an option that the solver does not have.
        """
        refuse_unknown("step", unknown, type(self).step)
        _validation.check_state("sample", sample, finite=False)
        tracing = torch.compiler.is_compiling()
        eta = eta if tracing else _validation.check_float("eta", eta)
        self._check_options_of_step(
            eta, use_clipped_model_output, (s_churn, s_tmin, s_tmax, s_noise), per_token_timesteps
        )
        run = self._next(timestep, sample, eta)
        if run.state is None:
            configuration.check_event(self.solver, sample)
        plain = not s_churn and variance_noise is None and per_token_timesteps is None
        found = self._direct_step(run, model_output, timestep, sample, eta) if plain else None
        if found is None:
            churn = s_churn, s_tmin, s_tmax, s_noise
            found = self._row_step(
                run, model_output, timestep, sample, use_clipped_model_output, generator, variance_noise, churn,
                per_token_timesteps,
            )  # fmt: skip
        return DDIMSchedulerOutput(*found) if return_dict else found

    def _direct_step(
        self, run: Run, model_output: Any, timestep: Any, sample: Tensor, eta: float
    ) -> tuple[Tensor, Tensor] | None:
        """The next sample and x0 by rows that read nothing else; None for other plans."""
        free = self._free(eta) and self._ready().postprocess is None
        direct = run.direct_row(sample.device) if free else None
        if direct is None:
            return None
        if torch.compiler.is_compiling():
            check_next(run.entry(run.row, sample.device).label, timestep)
        x = at_least_float32(sample)
        found = direct.step(sample, x, _checked(model_output, x, run))
        self._run = run._replace(row=run.row + 1)
        return found

    def _row_step(
        self, run: Run, model_output: Any, timestep: Any, sample: Tensor, clipped: bool | None, generator: Any,
        variance_noise: Tensor | None, churn: tuple[float, ...], tokens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The next sample and x0 by any row of the plan."""
        tracing, (s_churn, s_tmin, s_tmax, s_noise) = torch.compiler.is_compiling(), churn
        entry = run.entry(run.row, sample.device)
        if tracing:
            check_next(entry.label, timestep)
        x = entry.read(sample)
        output = _checked(model_output, x, run)
        held: Tensor | None = None
        if tokens is not None:
            at = self._levels_of_tokens(sample, tokens)
            if isinstance(self._ready().used, EDMEuler):
                found = self._step_tokens(at_least_float32(sample), output, at)
                self._run = run._replace(row=run.row + 1)
                return found
            level = float(self._ready().sigmas()[run.first + run.row])
            # the row's conversion then gives the estimate of x0 from the token's own level
            output, held = output * (at / -level), at < level - 1e-5
        if run.state is None:
            run = self._with_sources(run, x, generator)
        if s_churn and tracing:
            raise InputError("s_churn: got it in a compiled step, expected 0. Use the solver fewstep.EDMEuler(churn).")
        if s_churn and s_tmin <= entry.row.sigma <= s_tmax:
            gamma = min(s_churn / (len(run.plan.sigmas) - 1), math.sqrt(2) - 1)
            x, entry = self._churned(run, entry, sample, generator, gamma, s_noise)
        draw = self._draw(run, x, sample, generator, variance_noise)
        if run.state is None:
            state = entry.start(x, draw)
        else:
            state = entry.follow(run.state, x, sample.dtype, self._ready().keeps)
            state = entry.begin(state, draw, LATE)
        x0, state, evaluation = self._evaluate(run, entry, state, x, output, clipped)
        state = executor.update(entry.row, state, evaluation)
        if state.x is sample:  # pipelines may write each sample to the same memory
            state = state._replace(x=sample.clone())
        after = run.entry(run.row + 1, sample.device)
        state = after.begin(state, draw, EARLY)
        new, x0 = after.write(after.stage(state), sample.dtype), x0.to(sample.dtype, copy=True)
        if held is not None:
            new = torch.where(held, sample, new)
        self._run = run._replace(row=run.row + 1, state=state)
        return new, x0

    def _check_options_of_step(
        self, eta: float, clipped: bool | None, churn: tuple[float, ...], tokens: Tensor | None
    ) -> None:
        """Reject options that the solver does not have."""
        setup = self._ready()
        if not (eta or clipped) and tokens is None and churn == tuple(NO_CHURN.values()):
            return
        used, flow = setup.used, setup.process.kind == "flow"
        ddim, euler = isinstance(used, configuration.DDIM_FORMS), isinstance(used, EDMEuler) and not used.churn
        cures = "fewstep.DDIM() or fewstep.TCD()", "fewstep.EDMEuler() without churn of its own, and no flow"
        for name, value, given, able, cure in (
            ("eta", eta, eta, isinstance(used, configuration.TAKES_ETA), cures[0]),
            ("use_clipped_model_output", clipped, clipped, ddim, "fewstep.DDIM()"),
            *((k, v, v != NO_CHURN[k], euler and not flow, cures[1]) for k, v in zip(NO_CHURN, churn)),
            ("per_token_timesteps", "them", tokens is not None, flow, "a flow"),
        ):
            if given and not able:
                raise InputError(f"{name}: got {value}, which {self.solver!r} does not have here. It needs {cure}.")

    def _churned(
        self, run: Run, entry: Entry, sample: Tensor, generator: Any, gamma: float, size: float
    ) -> tuple[Tensor, Entry]:
        """The state at the level that churn raises after the evaluation, and Euler's row from there."""
        row, process = entry.row, self._process
        sigma, end = row.sigma * (1 + gamma), float(run.plan.sigmas[run.row + 1])
        (z,) = fresh_normals(sample, configuration.generators_of(generator, len(sample)), 1)
        x = entry.read(sample) + z * (size * math.sqrt(sigma**2 - row.sigma**2))
        level = torch.tensor([row.sigma if process.prediction == "v_prediction" else sigma], dtype=torch.float64)
        if process.kind == "edm":
            level = torch.tensor([sigma], dtype=torch.float64)
        numbers = [float(v) for v in coefficients(process.conversion, level, process.schedule.alpha(level), "data")]
        update = Combination(end / sigma, ((1 - end / sigma, 0),), ())
        return x, entry._replace(row=row._replace(sigma=sigma, update=update), numbers=numbers * 2)

    def _levels_of_tokens(self, sample: Tensor, timesteps: Tensor) -> Tensor:
        """(batch, tokens, 1): the levels of a flow's tokens, between 0 and 1."""
        if timesteps.shape != sample.shape[:2] or sample.dim() != 3:
            raise InputError(
                f"per_token_timesteps: got shape {tuple(timesteps.shape)}, expected (batch, tokens) of the sample "
                f"{tuple(sample.shape)}."
            )
        return timesteps.to(sample)[..., None] / self._process.count

    def _step_tokens(self, sample: Tensor, output: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Diffusers' step of a flow whose tokens are at levels of their own, and the estimate of x0."""
        levels = self._ready().sigmas().to(sample)[:, None, None, None]
        lower = torch.where(levels < at - 1e-6, levels, 0).amax(0)
        return sample + (at - lower) * output, sample + at * output

    def _with_sources(self, run: Run, x: Tensor, generator: Any) -> Run:
        """The run with what depends on the samples: its Brownian path and its student's network."""
        if not isinstance(self.solver, (DiffusionSolver, Plan)):
            if torch.compiler.is_compiling():
                raise InputError("solver: got a student in a compiled step; compile fewstep.sample or the network.")
            problem = DiffusionModel(lambda *_: self._pipeline_x0, self._process.schedule)
            run = run._replace(evaluate=evaluator_of(problem, self.solver, x))
        if self.config.noise != "path" or not run.table.on_path:
            return run
        if torch.compiler.is_compiling():
            return run._replace(path=sample_seeds(numbered(generator, len(x)), len(x)))
        seeds = configuration.seeds_of(generator, len(x))
        return run._replace(path=own_path(run.plan, x, self._process.schedule, seeds))

    def _draw(self, run: Run, x: Tensor, sample: Tensor, generator: Any, given: Tensor | None) -> Draw:
        """The source of the run's normals: its path, or the generator as in diffusers."""
        if given is not None and run.path is not None:
            raise InputError("variance_noise: got it with noise='path', expected noise='generator'.")
        if given is not None and _validation.check_state("variance_noise", given, finite=False).shape != sample.shape:
            raise InputError(f"variance_noise: got {tuple(given.shape)}, expected {tuple(sample.shape)} as the sample.")
        # callers may write to its memory
        own: Normals = () if given is None else (at_least_float32(given).clone(),)

        if torch.compiler.is_compiling():

            def traced(entry: Entry, when: int) -> Normals:
                numbers, letters = numbered(generator, len(sample)), run.plan.letters - len(own)
                return *own, *row_normals(numbers, run.path, run.table.number, entry.at, when, sample.detach(), letters)

            return traced
        assert not torch.is_tensor(run.path)

        def fresh(letters: int) -> Normals:
            source = configuration.generators_of(generator, len(sample))
            return *own, *fresh_normals(sample, source, letters - len(own))

        source = plan_normals(run.plan, x, run.path, fresh)
        return lambda entry, _: source(*entry.row.interval)

    def _evaluate(
        self, run: Run, entry: Entry, state: State, x: Tensor, output: Tensor, clipped: bool | None
    ) -> tuple[Tensor, State, Tensor]:
        """The estimate of x0 after clipping or thresholding, the state, and the row's evaluation."""
        row, (p, q, p_noise, q_noise) = entry.row, entry.numbers
        x0, kind = to_x0(x, output, p, q), run.plan.prediction
        if run.evaluate is not None:
            self._pipeline_x0 = x0
            evaluation = run.evaluate(run.first + run.row, x, state.normals)
            x0 = executor.data_of(kind, x, row.sigma, evaluation)
        else:
            evaluation = x0 if kind == "data" else to_x0(x, output, p_noise, q_noise)
        setup = self._ready()
        if setup.postprocess is not None:
            fixed = setup.postprocess(x0)
            if isinstance(setup.used, configuration.DDIM_FORMS) and not clipped:
                return fixed, *entry.redirected(state, x0, fixed)
            x0, evaluation = fixed, executor.evaluation_of(kind, x, row.sigma, fixed)
        if setup.keeps and row.stage.evaluations and isinstance(setup.used, (EDMHeun, DiffusersPNDM)):
            # diffusers combines slopes (x - D)/sigma of the edited input in Heun's step, outputs in PNDM's
            share = 1.0 if isinstance(setup.used, EDMHeun) else p_noise
            if isinstance(row, TracedRow):
                share = torch.where(has(row.stage.evaluations), share, 0.0)
            evaluation = plus(evaluation, share, entry.stage(state) - x)
        return x0, state, evaluation

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Any) -> Tensor:
        """x0 and noise at timesteps () or (batch,), labels or entries of the run, in the coordinates of the state."""
        sigma = self._levels(timesteps, original_samples, noise)
        alpha, sigma_t = self._process.weights(sigma)
        if family(self.config, self.solver)[0] in EXPLODING:
            alpha, sigma_t = torch.ones_like(sigma), sigma
        return alpha.to(original_samples) * original_samples + sigma_t.to(original_samples) * noise

    def scale_noise(self, sample: Tensor, timestep: Any, noise: Tensor) -> Tensor:
        """`add_noise` under the name that flow pipelines use."""
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Any) -> Tensor:
        """alpha noise - sigma_t x0, the target of a network that predicts v."""
        alpha, sigma_t = self._process.weights(self._levels(timesteps, sample, noise))
        return alpha.to(sample) * noise - sigma_t.to(sample) * sample

    def _levels(self, timesteps: Any, samples: Tensor, like: Tensor) -> Tensor:
        """sigma at timesteps, shaped to multiply samples."""
        for name, value in (("sample", samples), ("noise", like)):
            _validation.check_state(name, value, finite=False)
        labels = _validation.check_numbers("timesteps", timesteps).reshape(-1)
        check_labels(self._process, labels, "timesteps")
        if samples.shape != like.shape or len(labels) not in (1, len(like)):
            raise InputError(
                f"timesteps: got {len(labels)} for samples of shape {tuple(samples.shape)} and noise of shape "
                f"{tuple(like.shape)}; expected one label or one per sample, and noise of the samples' shape."
            )
        levels, own, made = self._process.sigma(labels).tolist(), dict[float, float](), self._setup
        if made is not None:  # entries of a run have exactly the levels of its rows
            own = dict(zip(made.names, made.plan.sigma.tolist()))
            row = self._row(None)
            if self._begin is not None and len(labels) == 1 and row < made.plan.nfe:
                own = {float(labels[0]): float(made.plan.sigma[row])}
        sigma = torch.tensor([own.get(v, s) for v, s in zip(labels.tolist(), levels)], dtype=torch.float64)
        return sigma.reshape(-1, *[1] * (like.dim() - 1))

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)


def check_next(label: Tensor, timestep: Any) -> None:
    """Make a compiled step fail where its timestep is not that of its row."""
    if torch.is_tensor(timestep):
        timestep = timestep.reshape(-1)[:1].to(label)
    near = (timestep - label).abs() <= 1e-4 * label.abs().clamp(min=1)
    cure = "Call set_timesteps before a new run, and set_begin_index for a start elsewhere."
    torch._assert_async(near.all(), f"timestep: got another than the next entry of scheduler.timesteps. {cure}")


def refuse_unknown(where: str, unknown: Mapping[str, Any], method: Callable[..., Any]) -> None:
    """Reject keywords that a method does not have."""
    if unknown:
        known = [k for k in signature(method).parameters if k not in ("self", "unknown")]
        raise one_of(f"option of {where}", min(unknown), known)


def _checked(model_output: Any, x: Tensor, run: Run) -> Tensor:
    """The network's output, without the second half of one that has a learned variance."""
    many = torch.is_tensor(model_output) and min(x.dim(), model_output.dim()) > 1
    output = model_output[:, : x.shape[1]] if many and model_output.shape[1] == 2 * x.shape[1] else model_output
    where = lambda: f" at entry {run.first + run.row} of timesteps"  # noqa: E731
    return _validation.check_answer("model_output", output, x, where, of="sample")
