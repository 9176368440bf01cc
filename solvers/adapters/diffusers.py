"""This library's solvers as a scheduler of diffusers' pipelines."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ..diffusion.ddim import DDIM
from ..diffusion.ddpm import DDPM
from ..diffusion.ipndm import IPNDM
from ..diffusion.pndm import PNDM
from ..errors import InputError, one_of
from ..grid import check_sigmas
from ..learned.sig_step import SigSampler
from ..learned.store import load
from ..plan import Plan
from ..problem import Denoising
from ..sample import path_of
from ..solver import ScheduledSolver
from ..walk import Walk, tail
from .diffusers_grid import FORWARD, Process, check_count, grid_of, process_of, reference_of
from .diffusers_solver import (
    FILE,
    Learned,
    beside_raw_noise,
    conform,
    described,
    file_of,
    mending,
    own_grid,
    seeds_of,
    solver_of,
    table_of,
)  # fmt: skip

NOISES = ("generator", "path")


@dataclass
class FewStepSchedulerOutput(BaseOutput):  # type: ignore[misc]
    """What a step returns: the next sample, and the estimate of x0 it was made with."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class FewStepScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
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
        solver: a diffusion solver, a `Plan`, or a student of this library's distillation; `DPMSolverPP(2)`
            by default. In a configuration it is `{"name": "UniPC", "order": 3}` or the name of a file.
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
    ignore_for_config = ["options"]

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02,
        beta_schedule: str = "linear", trained_betas: Any = None, prediction_type: str = "epsilon",
        solver: Any = None, exact: bool = False, noise: str = "generator", **options: Any,
    ) -> None:  # fmt: skip
        if noise not in NOISES:
            raise one_of("noise", noise, NOISES)
        self.solver = solver_of(solver)
        self.register_to_config(solver=described(self.solver), **options)
        if trained_betas is not None:
            self.register_to_config(trained_betas=torch.as_tensor(trained_betas).tolist())
        # as diffusers' schedulers are born: each label a step
        self.timesteps = torch.arange(check_count(num_train_timesteps)).flip(0)
        self.num_inference_steps: int | None = None
        self.init_noise_sigma, self.order = 1.0, getattr(getattr(self.solver, "card", None), "evaluations", 1)
        self._forward: Process | None = None
        self._made: Any = None
        self._plan: Any = None
        self._mend: Callable[[Tensor], Tensor] | None = None
        self._begin: int | None = None
        self._walk: Any = None
        self._path: Any = None
        self._evaluator: Any = None

    # ------------------------------------------------------------------ configuration and files

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From the configuration of any scheduler of diffusers; keywords override it."""
        if isinstance(config, Mapping):
            # options that only the class behind the solver knows
            more = {k: kwargs.pop(k) for k in [*kwargs] if k not in cls._get_init_keys(cls)}
            # diffusers lets each class have its own defaults; those of the process are the network's
            free = [k for k in config.get("_use_default_values", []) if k not in (*FORWARD, *more)]
            config = {**config, **more, "_use_default_values": free}
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """The configuration as JSON; a plan or a student beside it as safetensors."""
        if isinstance(self.solver, Learned):
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            self.solver.save(Path(save_directory) / FILE)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any = None, subfolder: str | None = None, **kwargs: Any
    ) -> Any:
        """The inverse of `save_pretrained`. `network=` for a student with an architecture of your own."""
        network = kwargs.pop("network", None)
        where = {"pretrained_model_name_or_path": pretrained_model_name_or_path, "subfolder": subfolder}
        known = ("revision", "token", "cache_dir", "local_files_only")
        hub: dict[str, Any] = {k: kwargs[k] for k in known if k in kwargs}
        try:
            found, _ = cls.load_config(**where, return_unused_kwargs=True, **hub)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InputError(f"path: {pretrained_model_name_or_path} holds no JSON ({error}).") from error
        words = found.get("solver")
        if kwargs.get("solver") is None and isinstance(words, Mapping) and "file" in words:
            kwargs["solver"] = load(file_of(pretrained_model_name_or_path, subfolder, hub), network)
        return super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)

    # ------------------------------------------------------------------ the grid

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
            raise InputError("timesteps, sigmas: got both; wanted one of them.")
        lists = [None if v is None else tuple(map(float, v)) for v in (timesteps, sigmas)]
        asked = (num_inference_steps, *lists, mu)
        if self._made is None or self._made[0] is not self.config or self._made[1] != asked:
            self._make(*asked)
            self._made = (self.config, asked)
        self._begin, self._walk = None, None
        self.timesteps = self._labels.to(device)

    def _make(self, num_inference_steps: Any, timesteps: Any, sigmas: Any, mu: float | None) -> None:
        listed = next((v for v in (timesteps, sigmas) if v is not None), None)
        steps = num_inference_steps if listed is None else len(listed)
        reference = reference_of(self.config, self.solver)
        self._forward = process_of(self.config, reference)
        self._used = self.solver  # in diffusers' form, where it has one
        if isinstance(self.solver, Learned):
            self._grid = own_grid(self.solver, self._process, steps)
        elif not isinstance(steps, int) or steps < 1:
            raise InputError(f"num_inference_steps: got {steps!r}, wanted a whole number of at least 1.")
        else:
            grid = grid_of(self._process, reference, steps, timesteps, sigmas, mu)
            self._grid = replace(grid, sigmas=check_sigmas(grid.sigmas, repeat=True))
            if not self.config.exact:
                self._used = conform(self.solver, reference.config, self._process, listed is None)
        plan = self._plan_on(self._used, self._grid.sigmas)
        self._plan = replace(plan, sigma=self._grid.snapped(plan.sigma))
        self._labels = self._grid.label_of(self._process, self._plan.sigma, self.config.exact)
        self._mend = mending(reference.config)
        self.num_inference_steps, self.sigmas = len(self._grid.sigmas) - 1, self._grid.sigmas.float()
        self.init_noise_sigma, self.order = self._grid.start, self._grid.rows_a_step(self._plan.sigma)

    @property
    def _process(self) -> Process:
        """The forward process; known before a run for `add_noise` in training."""
        if self._forward is None:
            self._forward = process_of(self.config, reference_of(self.config, self.solver))
        return self._forward

    def _plan_on(self, solver: Any, sigmas: Tensor) -> Plan:
        if isinstance(solver, Learned):
            return table_of(solver)
        if isinstance(solver, ScheduledSolver):
            return solver.plan(sigmas, self._process.schedule)
        plan: Plan = solver.plan(sigmas)
        return plan

    # ------------------------------------------------------------------ where a run stands

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
        """The row that is next: where the run is, else where it will begin."""
        if self._walk is not None and not self._walk.over:
            return int(self._first + self._walk.row)
        return self._index(timestep) if self._begin is None else self._begin

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
        return Walk(plan, self._process.scale(plan.sigma) + self._process.scale(plan.sigmas[-1:]))

    def _tail(self, plan: Plan, row: int) -> Plan:
        """The plan of the rest of the grid: made for it where there is a solver, else cut off the table."""
        if isinstance(self.solver, Learned) or isinstance(self._used, (DDIM, DDPM)):
            return tail(plan, row)
        level = plan.sigma[min(row, plan.nfe - 1)]
        levels = self._grid.sigmas[int((self._grid.sigmas > level).sum()) :]
        # entries after PNDM's warm-up are one evaluation a step
        solvers = (PNDM("plms"), IPNDM(4)) if isinstance(self.solver, PNDM) else (self._used,)
        for made in (self._plan_on(solver, levels) for solver in solvers):
            if row < plan.nfe and made.nfe == plan.nfe - row:
                return made
        raise InputError(
            f"begin index: got {row}, which is not the start of a step of {plan.name} ({self.order} "
            "entries each). Choose another strength."
        )

    def _index(self, timestep: Any) -> int:
        """The row of a timestep: the first that may start a run."""
        if timestep is None:
            return 0
        labels, value = self._labels.tolist(), float(timestep)
        rows = [i for i, v in enumerate(labels) if abs(v - value) <= 1e-4 * max(1.0, abs(v))]
        if not rows:
            raise InputError(f"timestep: got {value:g}, wanted one of scheduler.timesteps.")
        return int(next((i for i in rows if i % self.order == 0), rows[0]))

    # ------------------------------------------------------------------ the step

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
        fresh = self._walk is None or self._walk.over
        if fresh or (eta and self._walk.row == 0):
            self._walk = self._start(timestep, eta)
        walk, (p, q, sigma) = self._walk, self._numbers[self._walk.row]

        def draw(tau0: float, tau1: float) -> tuple[Tensor, ...]:
            return self._draw(sample, (tau0, tau1), generator, variance_noise)

        x = walk.enter(sample, draw)
        output = model_output[:, : sample.shape[1]].to(x.dtype)
        x0 = torch.add(x, output, alpha=q) if p == 1 else torch.mul(x, p).add_(output, alpha=q)
        if isinstance(self.solver, SigSampler):
            x0 = self._student(walk, x, x0)
        seen = mended = x0 if self._mend is None else self._mend(x0)
        if self._mend is not None and isinstance(self._used, DDIM) and not use_clipped_model_output:
            seen = beside_raw_noise(walk, x0, mended)
        if walk.plan.prediction == "noise":
            seen = (x - seen).div_(sigma)
        new = walk.leave(seen, draw, sample.dtype)
        mended = mended.to(sample.dtype)
        return FewStepSchedulerOutput(new, mended) if return_dict else (new, mended)

    def _student(self, walk: Walk, x: Tensor, x0: Tensor) -> Tensor:
        """A student's own network in place of the pipeline's, or added to it."""
        self._teacher_said = x0
        if self._evaluator is None:
            problem = Denoising(lambda *_: self._teacher_said, self._process.schedule)
            self._evaluator = self.solver.evaluator(problem, x)
        with torch.no_grad():
            return self._evaluator(self._first + walk.row, x, walk.normals)  # type: ignore[no-any-return]

    def _draw(
        self, like: Tensor, interval: tuple[float, float], generator: Any, given: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Unit normals of an interval of tau = 1/sigma^2, one for each letter."""
        letters, dtype = self._plan.m.shape[-1], torch.promote_types(like.dtype, torch.float32)
        if self.config.noise == "path" and interval[0] < interval[1]:
            if self._path is None:
                lowest = self._process.schedule.sigma_min
                self._path = path_of(self._plan, like.to(dtype), lowest, seeds_of(generator, like))
            of_path: tuple[Tensor, ...] = self._path.increment(*interval).coordinates()
            return of_path[:letters]
        some = [] if given is None else [given.to(dtype)]
        while len(some) < letters:
            some.append(randn_tensor(like.shape, generator, like.device, like.dtype).to(dtype))
        return tuple(some)

    # ------------------------------------------------------------------ the forward process

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Any) -> Tensor:
        """alpha x0 + sigma_t noise at timesteps () or (batch,), labels or entries of the run."""
        alpha, sigma_t = self._weights(timesteps, noise)
        return alpha.to(original_samples) * original_samples + sigma_t.to(original_samples) * noise

    def scale_noise(self, sample: Tensor, timestep: Any, noise: Tensor) -> Tensor:
        """`add_noise` by the name that flow pipelines call."""
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Any) -> Tensor:
        """alpha noise - sigma_t x0, what a network of v is trained on."""
        alpha, sigma_t = self._weights(timesteps, noise)
        return alpha.to(sample) * noise - sigma_t.to(sample) * sample

    def _weights(self, timesteps: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma_t at timesteps, to be multiplied with samples."""
        labels = torch.as_tensor(timesteps).detach().double().cpu().reshape(-1)
        levels, own = self._process.sigma(labels).tolist(), dict[float, float]()
        if self._plan is not None:  # entries of a run have the very levels of its rows
            own = dict(zip(self._labels.tolist(), self._plan.sigma.tolist()))
            row = self._row(None)
            if self._begin is not None and len(labels) == 1 and row < self._plan.nfe:
                own = {float(labels[0]): float(self._plan.sigma[row])}
        sigma = torch.tensor([own.get(v, s) for v, s in zip(labels.tolist(), levels)], dtype=torch.float64)
        alpha = torch.tensor(self._process.scale(sigma), dtype=torch.float64)
        shape = (-1, *[1] * (like.dim() - 1))
        return alpha.reshape(shape), (alpha * sigma).reshape(shape)

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)
