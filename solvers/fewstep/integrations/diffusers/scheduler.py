"""This library's solvers as a scheduler of diffusers' pipelines."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
    from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
except ImportError as _error:
    raise ImportError(f"diffusers cannot be imported ({_error}); pip install 'fewstep[diffusers]'") from _error

from ... import BrownianPath, DiffusionModel, DiffusionSolver, InputError, Plan, _validation, executor, load
from ...denoiser import coefficients, to_x0
from ...executor import Draw, Evaluate, Normals, State
from ...plan import Row
from ...plan_noise import at_least_float32, fresh_normals, path_of, plan_normals
from ...resolve import carried_plan, evaluator_of
from . import configuration
from .grid import FORWARD, MOST_LABELS, Process, process_of, reference_of


class Run(NamedTuple):
    """A run between two evaluations; immutable, each step makes the next one."""

    plan: Plan  # the rows from entry `first` of the timesteps on
    first: int
    scales: list[float]  # from x to the pipeline's state, alpha where that is alpha x: per row, and at the end
    numbers: list[tuple[float, ...]]  # per row (p, q) that give x0 = p x + q output, and (p, q) that give the noise
    row: int = 0  # the next one
    state: State | None = None  # before that row; None before the first step
    path: BrownianPath | None = None
    evaluate: Evaluate | None = None  # a student's own network

    @property
    def over(self) -> bool:
        return self.row == self.plan.nfe

    def read(self, sample: Tensor) -> Tensor:
        """x from the pipeline's state, in float32 at least."""
        x, scale = at_least_float32(sample), self.scales[self.row]
        return x if scale == 1 else x / scale

    def write(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The pipeline's state from x."""
        scale = self.scales[self.row]
        return (x if scale == 1 else x * scale).to(dtype)


class FewStepScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Any solver, plan or student of this library as the scheduler of a diffusers pipeline.

    `FewStepScheduler.from_config(pipe.scheduler.config, solver=fewstep.UniPC(3))` accepts every option of that
    configuration. By default a run has diffusers' levels, labels and solver forms, and reproduces its scheduler for
    that solver. With `exact=True` the solver is the published one, and the network gets the label of each level
    without rounding.

    The state is that of diffusers: alpha x, of unit variance at the start, or x itself under EDM's configurations. A
    pipeline may change the sample between steps; the change is carried over. Each entry of `timesteps` is one network
    evaluation, and `order` of them are one step.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, prediction_type: as in diffusers;
            further options (timestep_spacing, use_karras_sigmas, thresholding, flow_shift, sigma_data, ...) are
            keywords.
        solver: a diffusion solver or its name, a `Plan`, or a student of this library's distillation;
            `DPMSolverPP(2)` by default. In a configuration it is `{"name": "UniPC", "order": 3}` or names a file.
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
        "LCMScheduler", "TCDScheduler",
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
            self.register_to_config(trained_betas=torch.as_tensor(trained_betas).tolist())
        count = _validation.check_int("num_train_timesteps", num_train_timesteps, 2, MOST_LABELS)
        self.timesteps: Tensor = torch.arange(count).flip(0)  # before set_timesteps one step per label, as in diffusers
        self.num_inference_steps: int | None = None
        self.init_noise_sigma: float = 1.0
        self.order: int = 1 if carried_plan(self.solver) else self.solver.card.evaluations
        self._forward: tuple[Any, Process] | None = None
        self._setup: configuration.Setup | None = None
        self._begin: int | None = None
        self._run: Run | None = None

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A scheduler from the configuration of any scheduler of diffusers; keywords override it."""
        more: dict[str, Any] = {}
        if isinstance(config, Mapping):
            # options that only the class behind the solver has; unknown ones may be returned to the caller
            known = configuration.options_of(cls) if return_unused_kwargs else kwargs
            more = {k: kwargs.pop(k) for k in [*kwargs] if k in known and k not in cls._get_init_keys(cls)}
            # diffusers lets each class have its own defaults; those of the forward process are the network's
            free = [k for k in config.get("_use_default_values", []) if k not in (*FORWARD, *more)]
            config = {**config, **more, "_use_default_values": free}
        made = super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)
        scheduler = made[0] if return_unused_kwargs else made
        configuration.check_options(more, scheduler.config, scheduler.solver, cls)
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

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None, mu: float | None = None,
    ) -> None:  # fmt: skip
        """Make the grid and the plan of a run.

        Args:
            num_inference_steps: steps; a plan or a student accepts only its own number.
            device: of `timesteps`.
            timesteps: (n,) labels of the levels, decreasing, instead of a number of steps.
            sigmas: (n + 1,) the levels themselves, decreasing, the last may be 0; (n,) for flows, as in diffusers.
            mu: the shift of flows that depend on the resolution.
        """
        if timesteps is not None and sigmas is not None:
            raise InputError("timesteps, sigmas: got both; expected one of them.")
        lists = configuration.listed("timesteps", timesteps), configuration.listed("sigmas", sigmas)
        count = len(lists[0] or lists[1] or ()) or num_inference_steps
        if count is not None:
            count = _validation.check_int("num_inference_steps", count)
        asked = (self.config, self.solver, count, *lists, mu)
        if self._setup is None or self._setup.asked != asked:
            self._setup = configuration.prepare(*asked)
        made = self._setup
        self._forward = (self.config, made.process)
        self._begin, self._run = None, None
        self.timesteps = made.labels.clone().to(device)
        self.sigmas: Tensor = made.grid.sigmas.float()
        self.num_inference_steps, self.init_noise_sigma = len(self.sigmas) - 1, made.grid.start
        self.order = made.order

    @property
    def _process(self) -> Process:
        """The forward process; needed before a run for `add_noise` in training."""
        if self._forward is None or self._forward[0] is not self.config:
            self._forward = (self.config, process_of(self.config, reference_of(self.config, self.solver)))
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
        """Start at this entry, as image-to-image pipelines do; `step` then does not read its timestep."""
        self._begin, self._run = begin_index, None
        self._run = self._start(None, 0.0)

    def _row(self, timestep: Any) -> int:
        """The next entry: where the run is or will begin, unless the timestep belongs to another entry."""
        running = self._run is not None and not self._run.over
        row = self.step_index if running else self._begin
        # read no number from a device while a run continues
        known = running and (self._begin is not None or (torch.is_tensor(timestep) and timestep.device.type != "cpu"))
        if timestep is None or known:
            return row or 0
        assert self._setup is not None
        entries = self._setup.entries(float(timestep))
        if not entries:
            raise InputError(f"timestep: got {float(timestep):g}, expected one of scheduler.timesteps.")
        return row if row in entries else next((i for i in entries if i % self.order == 0), entries[0])

    def _start(self, timestep: Any, eta: float) -> Run:
        """A run from the begin index, or from the entry of the timestep."""
        if self._setup is None:
            raise InputError("set_timesteps: not called yet; call scheduler.set_timesteps(steps) before a run.")
        row, process = self._row(timestep), self._process
        plan = self._setup.plan_from(row, eta)
        end = [1.0] if self._setup.grid.exploding else process.scale(plan.sigmas[-1:])
        alpha, by = process.schedule.alpha(plan.sigma), process.conversion
        columns = [c for kind in ("data", "noise") for c in coefficients(by, plan.sigma, alpha, kind)]
        return Run(plan, row, process.scale(plan.sigma) + end, torch.stack(columns, 1).tolist())

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The network's input: the sample itself, scaled for EDM's networks only."""
        if self._process.kind != "edm":
            return sample
        assert self._setup is not None
        return sample * float(self._process.alpha(self._setup.plan.sigma[self._row(timestep)]))

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, eta: float = 0.0,
        use_clipped_model_output: bool | None = None, generator: Any = None, variance_noise: Tensor | None = None,
        return_dict: bool = True, **unused: Any,
    ) -> DDIMSchedulerOutput | tuple[Tensor, ...]:  # fmt: skip
        """Compute the pipeline's next sample from the network's output.

        Args:
            model_output: (batch, *event) the network's output; further channels (a learned variance) are ignored.
            timestep: its entry of `timesteps`; read only where a run starts without a begin index.
            sample: (batch, *event) the state, of any floating dtype; kept in float32 at least inside.
            eta: of DDIM, where the solver itself has none.
            use_clipped_model_output: with clip_sample, also derive DDIM's noise from the clipped estimate.
            generator: one, or a list with one per sample, for stochastic solvers.
            variance_noise: unit normals (batch, *event) instead of drawn ones.

        Returns:
            `prev_sample` and `pred_original_sample`, or both as a tuple.
        """
        run = self._run
        fresh = run is None or run.over or (run.row == 0 and (eta or self._begin is None))
        if fresh or self._row(timestep) != self.step_index:
            run = self._start(timestep, eta)
            configuration.check_event(self.solver, sample)
        assert run is not None
        assert self._setup is not None
        if run.state and run.state.x.shape != sample.shape:
            raise InputError(
                f"sample: got {tuple(sample.shape)}, expected {tuple(run.state.x.shape)} as before in this run. Call "
                "set_timesteps before a run of another shape."
            )
        x, row = run.read(sample), run.plan.rows[run.row]
        where = f" at entry {run.first + run.row} of timesteps"
        output = model_output[:, : x.shape[1]] if torch.is_tensor(model_output) else model_output
        output = _validation.check_answer("model_output", output, x, where, of="sample")
        if run.state is None:
            run = self._with_sources(run, x, generator)
        draw = self._draw(run, x, sample, generator, variance_noise)
        state = self._enter(run, row, x, sample.dtype, draw)
        x0, state, evaluation = self._evaluate(run, row, state, x, output, use_clipped_model_output)
        state = executor.update(row, state, evaluation)
        if state.x is sample:  # pipelines may write each sample to the same memory
            state = state._replace(x=sample.clone())
        run = run._replace(row=run.row + 1)
        at = state.x
        if not run.over:
            row = run.plan.rows[run.row]
            state = executor.begin(row, state, draw) if row.stage.normals else state
            at = executor.stage(row, state)
        self._run, new, x0 = run._replace(state=state), run.write(at, sample.dtype), x0.to(sample.dtype, copy=True)
        return DDIMSchedulerOutput(new, x0) if return_dict else (new, x0)

    def _with_sources(self, run: Run, x: Tensor, generator: Any) -> Run:
        """The run with what depends on the samples: its Brownian path and its student's network."""
        if self.config.noise == "path" and run.plan.on_path.any():
            lowest = self._process.schedule.sigma_min
            run = run._replace(path=path_of(run.plan, x, lowest, configuration.seeds_of(generator, len(x))))
        if not isinstance(self.solver, (DiffusionSolver, Plan)):
            problem = DiffusionModel(lambda *_: self._pipeline_x0, self._process.schedule)
            run = run._replace(evaluate=evaluator_of(problem, self.solver, x))
        return run

    def _draw(self, run: Run, x: Tensor, sample: Tensor, generator: Any, given: Tensor | None) -> Draw:
        """The source of the run's normals: its path, or the generator as in diffusers."""
        if given is not None and run.path is not None:
            raise InputError("variance_noise: got it with noise='path', expected noise='generator'.")
        if given is not None and given.shape != sample.shape:
            raise InputError(f"variance_noise: got {tuple(given.shape)}, expected {tuple(sample.shape)} as the sample.")

        def fresh(letters: int) -> Normals:
            source = configuration.generators_of(generator, len(sample))
            drawn = fresh_normals(sample, source, letters - (given is not None))
            return drawn if given is None else (at_least_float32(given), *drawn)

        return plan_normals(run.plan, x, run.path, fresh)

    def _enter(self, run: Run, row: Row, x: Tensor, dtype: torch.dtype, draw: Draw) -> State:
        """The state at the row's evaluation, given the input x that the network got."""
        if run.state is None:
            # the pipeline calls the network before the scheduler: the first input is the state itself, without the
            # noise that a plan adds to it, and contains the churn of the first level
            state = executor.begin(row, executor.entered(row, x), draw)
            if row.interval is not None and row.interval[0] == row.interval[1]:
                state = state._replace(normals=(tuple(map(torch.zeros_like, state.normals[0])),))
            return state
        state = run.state
        pure = not (row.stage.evaluations or row.stage.normals)
        # what was handed out, with its rounding to the pipeline's dtype
        before = x if pure else run.read(run.write(executor.stage(row, state), dtype))
        state = executor.follow(row, state, before, x)
        return state if row.stage.normals else executor.begin(row, state, draw)

    def _evaluate(
        self, run: Run, row: Row, state: State, x: Tensor, output: Tensor, clipped: bool | None
    ) -> tuple[Tensor, State, Tensor]:
        """The estimate of x0 after clipping or thresholding, the state, and the row's evaluation."""
        p, q, p_noise, q_noise = run.numbers[run.row]
        x0, kind = to_x0(x, output, p, q), run.plan.prediction
        if run.evaluate is not None:
            self._pipeline_x0 = x0
            with torch.no_grad():
                evaluation = run.evaluate(run.first + run.row, x, state.normals)
            x0 = executor.data_of(kind, x, row.sigma, evaluation)
        else:
            evaluation = x0 if kind == "data" else to_x0(x, output, p_noise, q_noise)
        assert self._setup is not None
        if self._setup.postprocess is None:
            return x0, state, evaluation
        fixed = self._setup.postprocess(x0)
        if isinstance(self._setup.used, configuration.DDIM_FORMS) and not clipped:
            return fixed, *executor.redirected(row, state, x0, fixed)
        return fixed, state, executor.evaluation_of(kind, x, row.sigma, fixed)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Any) -> Tensor:
        """alpha x0 + sigma_t noise at timesteps () or (batch,), labels or entries of the run."""
        alpha, sigma_t = self._weights(timesteps, noise)
        return alpha.to(original_samples) * original_samples + sigma_t.to(original_samples) * noise

    def scale_noise(self, sample: Tensor, timestep: Any, noise: Tensor) -> Tensor:
        """`add_noise` under the name that flow pipelines use."""
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Any) -> Tensor:
        """alpha noise - sigma_t x0, the target of a network that predicts v."""
        alpha, sigma_t = self._weights(timesteps, noise)
        return alpha.to(sample) * noise - sigma_t.to(sample) * sample

    def _weights(self, timesteps: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma_t at timesteps, shaped to multiply samples."""
        labels = torch.as_tensor(timesteps).detach().double().cpu().reshape(-1)
        levels, own, made = self._process.sigma(labels).tolist(), dict[float, float](), self._setup
        if made is not None:  # entries of a run have exactly the levels of its rows
            own = dict(zip(made.labels.tolist(), made.plan.sigma.tolist()))
            row = self._row(None)
            if self._begin is not None and len(labels) == 1 and row < made.plan.nfe:
                own = {float(labels[0]): float(made.plan.sigma[row])}
        sigma = torch.tensor([own.get(v, s) for v, s in zip(labels.tolist(), levels)], dtype=torch.float64)
        alpha = self._process.schedule.alpha(sigma)
        shape = (-1, *[1] * (like.dim() - 1))
        return alpha.reshape(shape), (alpha * sigma).reshape(shape)

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)
