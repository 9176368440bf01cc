"""A pipeline of diffusers as a problem of this library, and a solver distilled to it in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...denoiser import Converted, PostprocessedDenoiser
from ...errors import InputError
from ...learned.dode.distill import DODEReport
from ...learned.dode.distill import distill_dode as fit_dode
from ...learned.training import TrainingOptions
from ...problem import DiffusionModel
from ...samplers.dpm_solver_pp import DPMSolverPP
from ...schedule import EDM
from ...solver import DiffusionSolver
from .configuration import mending
from .grid import KINDS, Process, process_of, reference_of
from .scheduler import FewStepScheduler

Condition = Mapping[str, Tensor]


def _model(
    net: Any, process: Process, condition: Condition, negative: Condition | None, guidance: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """The network as `(alpha x, t) -> output`, conditioned and guided; under EDM's as `(x, sigma) -> x0`."""

    def call(X: Tensor, t: Tensor, told: Condition) -> Tensor:
        given = {k: _for_batch(k, v, len(X)) for k, v in told.items()}
        try:
            out = net(X.to(next(net.parameters()).dtype), t, **given, return_dict=False)[0]
        except TypeError as error:
            raise InputError(
                f"condition: got {sorted(told) or 'nothing'}, and the network says: {error}. Give what it is "
                "told by its own names, such as condition={'encoder_hidden_states': embeddings}."
            ) from error
        return out[:, : X.shape[1]].to(X.dtype)  # type: ignore[no-any-return]

    def guided(X: Tensor, t: Tensor) -> Tensor:
        if negative is None or guidance == 1:
            return call(X, t, condition)
        return torch.lerp(call(X, t, negative), call(X, t, condition), guidance)

    def preconditioned(x: Tensor, sigma: Tensor) -> Tensor:
        shape = (-1, *[1] * (x.dim() - 1))
        p, q = (v.to(x).reshape(shape) for v in process.affine(sigma))
        scale = (sigma.square() + process.data_std**2).rsqrt().to(x).reshape(shape)
        return p * x + q * guided(x * scale, process.label(sigma))

    if process.kind == "edm":
        return preconditioned
    return (lambda X, t: guided(X, t * process.count)) if process.kind == "flow" else guided


def _for_batch(name: str, value: Tensor, batch: int) -> Tensor:
    if len(value) not in (1, batch):
        raise InputError(f"{name}: got {len(value)} entries for a batch of {batch}, expected 1 or {batch}.")
    return value if len(value) == batch else value.expand(batch, *value.shape[1:])


def denoising(
    pipe: Any, condition: Condition | None = None, negative: Condition | None = None,
    guidance_scale: float = 1.0,
) -> DiffusionModel:  # fmt: skip
    """The problem that a pipeline solves, for `fewstep.sample` and `fewstep.distill_dode`.

    Args:
        pipe: with a `unet` or a `transformer` called as `(x, t, **condition)`, and a `scheduler`.
        condition: what the network is told beside x and t, for instance
            `{"encoder_hidden_states": prompt_embeds}` or `{"class_labels": labels}`.
        negative: the same for the unconditional half of classifier-free guidance.
        guidance_scale: as the pipeline has it; 1 is no guidance.

    Raises:
        InputError: no network, guidance without a negative condition.
    """
    model = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    scheduler = getattr(pipe, "scheduler", None)
    if model is None or scheduler is None:
        raise InputError(
            f"pipe: got {type(pipe).__name__}, expected a pipeline with unet (or transformer) and scheduler."
        )
    for name, told in (("condition", condition), ("negative", negative)):
        if told is not None and not isinstance(told, Mapping):
            raise InputError(
                f"{name}: got {type(told).__name__}, expected the network's arguments by name, such as "
                "{'encoder_hidden_states': embeddings}."
            )
    if guidance_scale != 1 and negative is None:
        raise InputError(
            f"negative: got None with guidance_scale={guidance_scale}, expected what the other half is told."
        )
    config = _config(scheduler)
    reference = reference_of(config, DPMSolverPP(2))
    process = process_of(config, reference)
    called = _model(model, process, condition or {}, negative, guidance_scale)
    schedule, kind = process.schedule, KINDS[process.prediction]
    if process.kind == "edm":
        network: Converted | PostprocessedDenoiser = Converted(called, None, "sample")
    else:  # labels as the pipeline rounds them
        network = Converted(called, schedule, kind, "nearest" if process.kind == "vp" else None)
    mend = mending(reference.config | {"clip_sample": False})
    return DiffusionModel(PostprocessedDenoiser(network, mend) if mend else network, schedule)


def _config(scheduler: Any) -> dict[str, Any]:
    """A scheduler's configuration without what is ours."""
    return {k: v for k, v in scheduler.config.items() if k not in ("solver", "exact", "noise")}


def distill_dode(
    pipe: Any, base: DiffusionSolver, *, samples: int = 128, seed: int = 0, batch: int = 16,
    shape: tuple[int, ...] | None = None, condition: Condition | None = None,
    negative: Condition | None = None, guidance_scale: float = 1.0, steps: int | None = None,
    sigmas: Tensor | None = None, spacing: str | None = None, final: str | None = None,
    terms: int | None = None, teacher: DiffusionSolver | None = None, teacher_substeps: int | None = None,
    guard: bool | None = None, refine: str | None = None, learn_grid: bool | None = None,
    training: TrainingOptions | None = None, progress: bool | None = None, notes: dict[str, Any] | None = None,
) -> tuple[FewStepScheduler, DODEReport]:  # fmt: skip
    """Fit a table to a pipeline, ready to be its scheduler.

    `pipe.scheduler, report = distill_dode(pipe, fewstep.DDIM(), steps=8)`

    Args:
        base: as of `fewstep.distill_dode`, and so are steps to notes; None for what they are by default there.
        samples: start states, one in eight held out (the report's distances are theirs, who also choose what
            is kept: of few states they flatter); seed: of these.
        shape: of one state, by default what the network's configuration says.
        condition, negative, guidance_scale: see `denoising`; one entry for all samples.

    Returns:
        the scheduler, and the fit's report.
    """
    options: dict[str, Any] = {
        "steps": steps, "sigmas": sigmas, "spacing": spacing, "final": final, "terms": terms,
        "teacher": teacher, "teacher_substeps": teacher_substeps, "guard": guard, "refine": refine,
        "learn_grid": learn_grid, "training": training, "progress": progress, "notes": notes,
    }  # fmt: skip
    options = {name: value for name, value in options.items() if value is not None}
    problem = denoising(pipe, condition, negative, guidance_scale)
    model = getattr(pipe, "unet", None) or pipe.transformer
    at = next(model.parameters())
    event = shape or _event(model)
    own = torch.Generator().manual_seed(seed)
    noise = torch.randn((samples, *event), generator=own).to(at.device)
    noise = noise * (problem.schedule.sigma_max if isinstance(problem.schedule, EDM) else 1.0)
    student, report = fit_dode(problem, base, noise=noise, batch=batch, **options)
    return FewStepScheduler.from_config(_config(pipe.scheduler), solver=student), report


def _event(model: Any) -> tuple[int, ...]:
    """(channels, height, width) of the network's configuration."""
    size = model.config.sample_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return int(model.config.in_channels), int(height), int(width)


class Idle(torch.nn.Module):
    """A network that says nothing, for pipelines whose student brings its own: spares the unused evaluation.

    `pipe.unet = Idle(pipe.unet)`; put the inner network back before the pipeline is saved.
    """

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "inner" else getattr(super().__getattr__("inner"), name)

    def forward(self, sample: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        from types import SimpleNamespace

        out = torch.zeros_like(sample)
        return SimpleNamespace(sample=out) if return_dict else (out,)
