"""This library's solvers as a scheduler of diffusers' pipelines."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
    from diffusers.utils import BaseOutput
except ImportError as _error:
    raise ImportError(
        f"diffusers cannot be imported ({_error}); pip install 'fewstep[diffusers]'"
    ) from _error

from ..._serialization import load
from ...errors import InputError, one_of
from ...grid import check_sigmas
from ...learned.sigdeg.student import SigSampler
from ...plan import Plan
from ...plan_noise import path_of
from ...problem import DiffusionModel
from ...samplers.ddim import DDIM
from ...samplers.ddpm import DDPM
from ...samplers.ipndm import IPNDM
from ...samplers.pndm import PNDM
from .configuration import (  # fmt: skip
    FILE,
    HUB,
    Learned,
    beside_raw_noise,
    check_event,
    check_flow,
    check_words,
    conform,
    described,
    ending_at,
    file_of,
    fresh_normals,
    listed,
    mending,
    options_of,
    own_grid,
    same_label,
    seeds_of,
    solver_of,
    step_count,
    table_of,
)
from .grid import FORWARD, Noising, Process, check_count, grid_of, process_of, reference_of
from .walk import Walk

NOISES = ("generator", "path")


@dataclass
class FewStepSchedulerOutput(BaseOutput):  # type: ignore[misc]
    """What a step returns: the next sample, and the estimate of x0 it was made with."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class FewStepScheduler(Noising, SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Any solver, plan or student of this library, where a diffusers pipeline has its scheduler.

    `FewStepScheduler.from_config(pipe.scheduler.config, solver=fewstep.UniPC(3))` takes every option of that
    configuration. By default a run has diffusers' levels, labels and forms, and gives the numbers of its
    scheduler for that solver; `exact=True` takes the solver as published and tells the network the
    label of each level without rounding.

    The state is diffusers' own: alpha x, of unit variance at the start, or x itself under EDM's
    configurations. A pipeline may change the sample between steps; the change is carried on. An entry of
    `timesteps` is one network evaluation: `order` of them are a step.

    Args:
        num_train_timesteps .. prediction_type: as in diffusers; further options (timestep_spacing,
            use_karras_sigmas, thresholding, flow_shift, sigma_data, ...) are taken by keyword.
        solver: a diffusion solver or its name, a `Plan`, or a student of this library's distillation;
            `DPMSolverPP(2)` by default. In a configuration it is `{"name": "UniPC", "order": 3}` or names
            a file.
        exact: no rounding of labels, solvers in their published form.
        noise: where stochastic solvers take theirs: `"generator"` draws each step's from the pipeline's
            generator, as diffusers does; `"path"` draws one Brownian path a sample from it, on which all
            step counts and solvers agree.

    Raises:
        InputError: a solver that does not sample, a configuration that diffusers refuses, a start in
            the middle of a step, a damaged file.
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
        beta_schedule: str = "linear", trained_betas: Any = None, prediction_type: str = "epsilon",
        solver: Any = None, exact: bool = False, noise: str = "generator", **options: Any,
    ) -> None:  # fmt: skip
        if noise not in NOISES:
            raise one_of("noise", noise, NOISES)
        self.solver: Any = solver_of(solver)
        self.register_to_config(solver=described(self.solver), **options)
        check_words(options, self.config, self.solver, type(self))
        if trained_betas is not None:
            self.register_to_config(trained_betas=torch.as_tensor(trained_betas).tolist())
        # as diffusers' schedulers are born: each label a step
        self.timesteps: Tensor = torch.arange(check_count(num_train_timesteps)).flip(0)
        self.num_inference_steps: int | None = None
        self.init_noise_sigma: float = 1.0
        self.order = getattr(getattr(self.solver, "card", None), "evaluations", 1)
        self._forward: Any = None
        self._made: Any = None
        self._plan: Any = None
        self._mend: Callable[[Tensor], Tensor] | None = None
        self._begin: int | None = None
        self._walk: Any = None
        self._path: Any = None
        self._evaluator: Any = None

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From the configuration of any scheduler of diffusers; keywords override it."""
        more: dict[str, Any] = {}
        if isinstance(config, Mapping):
            # options that only the class behind the solver knows; unknown ones may be asked back
            skip = [k for k in kwargs if k not in options_of(cls)] if return_unused_kwargs else []
            more = {k: kwargs.pop(k) for k in [*kwargs] if k not in (*cls._get_init_keys(cls), *skip)}
            # diffusers lets each class have its own defaults; those of the process are the network's
            free = [k for k in config.get("_use_default_values", []) if k not in (*FORWARD, *more)]
            config = {**config, **more, "_use_default_values": free}
        made = super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)
        scheduler = made[0] if return_unused_kwargs else made
        check_words(more, scheduler.config, scheduler.solver, cls)
        return made

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """The configuration as JSON; a plan or a student beside it as safetensors."""
        file = Path(save_directory) / FILE
        file.unlink(missing_ok=True)  # of another solver, saved here before
        if isinstance(self.solver, Learned):
            file.parent.mkdir(parents=True, exist_ok=True)
            self.solver.save(file)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any = None, subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        """The inverse of `save_pretrained`. `network=` for a student with an architecture of your own."""
        network, unused = kwargs.pop("network", None), kwargs.pop("return_unused_kwargs", False)
        where = {"pretrained_model_name_or_path": pretrained_model_name_or_path, "subfolder": subfolder}
        hub: dict[str, Any] = {k: kwargs[k] for k in HUB if k in kwargs}
        try:
            found, rest = cls.load_config(**where, return_unused_kwargs=True, **kwargs)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InputError(f"path: {pretrained_model_name_or_path} holds no JSON ({error}).") from error
        words = found.get("solver")
        if rest.get("solver") is None and isinstance(words, Mapping) and "file" in words:
            rest["solver"] = load(file_of(pretrained_model_name_or_path, subfolder, hub), network)
        # words of loading, such as torch_dtype, are for other parts of a pipeline
        asked = {k: v for k, v in rest.items() if unused or k in options_of(cls)}
        return cls.from_config(found, return_unused_kwargs=unused, **asked)

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None,
        timesteps: Sequence[float] | None = None, sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:  # fmt: skip
        """Make the grid and the plan of a run.

        Args:
            num_inference_steps: steps; a plan or a student has its own and takes only those.
            device: of `timesteps`.
            timesteps: (n,) labels of the levels, decreasing, in place of a number of steps.
            sigmas: (n + 1,) levels themselves, decreasing, the last may be 0; (n,) for flows, as
                diffusers has it there.
            mu: the shift of flows that depend on the resolution.
        """
        if timesteps is not None and sigmas is not None:
            raise InputError("timesteps, sigmas: got both; expected one of them.")
        asked = (num_inference_steps, listed("timesteps", timesteps), listed("sigmas", sigmas), mu)
        made = self._made
        if made is None or made[0] is not self.config or made[1] is not self.solver or made[2] != asked:
            self._make(*asked)
            self._made = (self.config, self.solver, asked)
        self._begin, self._walk, self.timesteps = None, None, self._labels.clone().to(device)
        self.sigmas: Tensor = self._grid.sigmas.float()

    def _make(self, num_inference_steps: Any, timesteps: Any, sigmas: Any, mu: float | None) -> None:
        whole = timesteps is None and sigmas is None
        steps = step_count(num_inference_steps if whole else len(timesteps or sigmas))
        reference = reference_of(self.config, self.solver)
        self._forward = (self.config, process_of(self.config, reference))
        if self._process.kind == "flow":
            check_flow(self.solver)
        self._used = self.solver  # in diffusers' form, where it has one
        if isinstance(self.solver, Learned):
            self._grid = own_grid(self.solver, self._process, steps)
        else:
            if steps is None:
                raise InputError("num_inference_steps: got None, expected a whole number of at least 1.")
            grid = grid_of(self._process, reference, steps, timesteps, sigmas, mu)
            self._grid = replace(grid, sigmas=check_sigmas(grid.sigmas, repeat=True))
            if not self.config.exact:
                self._used = conform(self.solver, reference.config, self._process, self._grid, whole)
        plan = self._plan_on(self._used, self._grid.sigmas)
        self._plan = replace(plan, sigma=self._grid.snapped(plan.sigma))
        self._labels = self._grid.label_of(self._process, self._plan.sigma, self.config.exact)
        self._listed, self._mend = self._labels.tolist(), mending(reference.config)
        self.num_inference_steps = len(self._grid.sigmas) - 1
        self.init_noise_sigma, self.order = self._grid.start, self._grid.rows_a_step(self._plan.sigma)

    @property
    def _process(self) -> Process:
        """The forward process; known before a run for `add_noise` in training."""
        if self._forward is None or self._forward[0] is not self.config:
            process = process_of(self.config, reference_of(self.config, self.solver))
            self._forward = (self.config, process)
        return self._forward[1]  # type: ignore[no-any-return]

    def _plan_on(self, solver: Any, sigmas: Tensor) -> Plan:
        if isinstance(solver, Learned):
            return table_of(solver)
        plan: Plan = solver.plan(sigmas, self._process.schedule)
        return plan

    @property
    def begin_index(self) -> int | None:
        """Where a pipeline has told the run to start."""
        return self._begin

    @property
    def step_index(self) -> int | None:
        """The entry of `timesteps` that is next; None before the first step."""
        return None if self._walk is None else int(self._first + self._walk.row)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start there, as image-to-image pipelines ask; spares `step` a look at its timestep."""
        self._begin, self._walk = begin_index, None
        self._walk = self._start(None, 0.0)

    def _row(self, timestep: Any) -> int:
        """The row that is next: where the run is or will begin, unless the timestep says another."""
        running = self._walk is not None and not self._walk.over
        row = int(self._first + self._walk.row) if running else self._begin
        if row is not None and (timestep is None or (running and self._begin is not None)):
            return row
        # no look at a number on a device while a run goes on
        if running and isinstance(timestep, Tensor) and timestep.device.type != "cpu":
            return row  # type: ignore[return-value]
        if row is not None and row < len(self._listed) and same_label(self._listed[row], timestep):
            return row
        return self._index(timestep)

    def _start(self, timestep: Any, eta: float) -> Walk:
        """A walk from the begin index, or from where the timestep stands."""
        if self._plan is None:
            raise InputError(
                "set_timesteps: not called yet; call scheduler.set_timesteps(steps) before a run."
            )
        row, plan = self._row(timestep), self._plan
        if eta and isinstance(self._used, DDIM):
            plan = self._plan_on(DDIM(eta, self._used.form), self._grid.sigmas)
        plan = self._tail(plan, row) if row else plan
        p, q = self._process.affine(plan.sigma)
        self._first, self._path, self._evaluator = row, None, None
        self._numbers = list(zip(p.tolist(), q.tolist(), plan.sigma.tolist()))
        end = [1.0] if self._grid.exploding else self._process.scale(plan.sigmas[-1:])
        return Walk(plan, self._process.scale(plan.sigma) + end)

    def _tail(self, plan: Plan, row: int) -> Plan:
        """The plan of the rest of the grid: made for it where there is a solver, else cut off the table."""
        if isinstance(self.solver, Learned) or isinstance(self._used, (DDIM, DDPM)):
            return plan.tail(row)
        level = plan.sigma[min(row, plan.nfe - 1)]
        levels = self._grid.sigmas[int((self._grid.sigmas > level).sum()) :]
        # entries after PNDM's warm-up are one evaluation a step
        rest = ending_at(self._used, total=len(self._grid.sigmas) - 1)
        solvers = (PNDM("plms"), IPNDM(4)) if isinstance(self.solver, PNDM) else (rest,)
        for made in (self._plan_on(solver, levels) for solver in solvers):
            if row < plan.nfe and made.nfe == plan.nfe - row:
                return made
        if row >= plan.nfe:
            raise InputError(f"begin index: got {row}, behind the last step. Choose a larger strength.")
        raise InputError(
            f"begin index: got {row}, which is not the start of a step of {plan.name} ({self.order} "
            "entries each). Choose another strength."
        )

    def _index(self, timestep: Any) -> int:
        """The row of a timestep: the first that may start a run."""
        if timestep is None:
            return 0
        value = float(timestep)
        rows = [i for i, v in enumerate(self._listed) if same_label(v, value)]
        if not rows:
            raise InputError(f"timestep: got {value:g}, expected one of scheduler.timesteps.")
        return int(next((i for i in rows if i % self.order == 0), rows[0]))

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """What the network sees: the sample itself, scaled for EDM's networks alone."""
        if self._process.kind != "edm":
            return sample
        sigma = float(self._plan.sigma[self._row(timestep)])
        return sample * float((sigma**2 + self._process.data_std**2) ** -0.5)

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, eta: float = 0.0,
        use_clipped_model_output: bool | None = None, generator: Any = None,
        variance_noise: Tensor | None = None, return_dict: bool = True, **unused: Any,
    ) -> FewStepSchedulerOutput | tuple[Tensor, ...]:  # fmt: skip
        """From one input of the network to the next.

        Args:
            model_output: (batch, *event) what the network said of (scaled) sample; channels of a learned
                variance behind them are left out.
            timestep: its entry of `timesteps`; read only where a run starts without a begin index.
            sample: (batch, *event) the state, in any floating dtype; kept in float32 at least inside.
            eta: of DDIM, where the solver itself has none.
            use_clipped_model_output: with clip_sample, DDIM's noise follows from the clipped estimate too.
            generator: one, or a list with one a sample, for stochastic solvers.
            variance_noise: unit normals (batch, *event) in place of drawn ones.

        Returns:
            `prev_sample` and `pred_original_sample`, or both as a tuple.
        """
        walk = self._walk
        fresh = walk is None or walk.over or (walk.row == 0 and (eta or self._begin is None))
        if fresh or self._row(timestep) != self._first + walk.row:
            self._walk = walk = self._start(timestep, eta)
            check_event(self.solver, sample)
        p, q, sigma = self._numbers[walk.row]
        output = model_output[:, : sample.shape[1]]
        if output.shape != sample.shape or (walk.x is not None and walk.x.shape != sample.shape):
            raise InputError(
                f"model_output, sample: got {tuple(model_output.shape)} and {tuple(sample.shape)}; expected "
                "one shape, the same in each step of a run. Call set_timesteps before a run of another."
            )

        def draw(tau0: float, tau1: float) -> tuple[Tensor, ...]:
            return self._draw(sample, (tau0, tau1), generator, variance_noise)

        x = walk.enter(sample, draw)
        output = output.to(x.dtype)
        x0 = torch.add(x, output, alpha=q) if p == 1 else torch.mul(x, p).add_(output, alpha=q)
        if isinstance(self.solver, SigSampler):
            x0 = self._student(walk, x, x0)
        seen = mended = x0 if self._mend is None else self._mend(x0)
        if self._mend is not None and isinstance(self._used, DDIM) and not use_clipped_model_output:
            seen = beside_raw_noise(walk, x0, mended)
        if walk.plan.prediction == "noise":  # a network of the noise has said it already
            said = p == 1 and self._mend is None and not isinstance(self.solver, SigSampler)
            seen = output if said else (x - seen).div_(sigma)
        new = walk.leave(seen, draw, sample.dtype)
        mended = mended.to(sample.dtype)
        return FewStepSchedulerOutput(new, mended) if return_dict else (new, mended)

    def _student(self, walk: Walk, x: Tensor, x0: Tensor) -> Tensor:
        """A student's own network in place of the pipeline's, or added to it."""
        self._teacher_said = x0
        if self._evaluator is None:
            problem = DiffusionModel(lambda *_: self._teacher_said, self._process.schedule)
            self._evaluator = self.solver.evaluator(problem, x)
        with torch.no_grad():
            return self._evaluator(self._first + walk.row, x, walk.normals)  # type: ignore[no-any-return]

    def _draw(
        self, like: Tensor, interval: tuple[float, float], generator: Any, given: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Unit normals of an interval of tau = 1/sigma^2, one for each letter."""
        letters = self._plan.m.shape[-1]
        if self.config.noise != "path" or interval[0] == interval[1]:
            return fresh_normals(like, letters, generator, given)
        if given is not None:
            raise InputError("variance_noise: got it with noise='path', expected noise='generator'.")
        if self._path is None:
            lowest = self._process.schedule.sigma_min
            full = torch.promote_types(like.dtype, torch.float32)
            self._path = path_of(self._plan, like.to(full), lowest, seeds_of(generator, like))
        of_path: tuple[Tensor, ...] = self._path.increment(*interval).coordinates()
        return of_path[:letters]

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)
