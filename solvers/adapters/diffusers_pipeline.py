"""A pipeline of diffusers as a problem of this library, and a solver distilled to it in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..diffusion.dpm_solver_pp import DPMSolverPP
from ..errors import InputError
from ..learned.distill_dode import DODEReport
from ..learned.distill_dode import distill_dode as fit_dode
from ..problem import Denoising
from ..solver import DiffusionSolver
from .diffusers import FewStepScheduler
from .diffusers_grid import Process, process_of, reference_of
from .diffusers_solver import mending

Condition = Mapping[str, Tensor]


@dataclass(frozen=True)
class Network:
    """A pipeline's network as a denoiser `(x, sigma) -> x0`, conditioned and guided.

    Attributes:
        model: the pipeline's UNet or transformer.
        process: the forward process of the scheduler's configuration.
        condition, negative: keyword arguments of the network, one entry a sample or one for all.
        guidance: the scale w of negative + w (condition - negative); 1 without.
        rounding: labels are rounded, as the pipeline rounds them.
        mend: what the scheduler does to each estimate of x0.
    """

    model: Any
    process: Process
    condition: Condition
    negative: Condition | None
    guidance: float
    rounding: bool
    mend: Callable[[Tensor], Tensor] | None

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        level = sigma.detach().double().cpu().reshape(-1)[:1]
        p, q = (float(v) for v in self.process.affine(level))
        label = self.process.label(level)
        X = x * self.process.scale(level)[0]
        if self.process.kind == "edm":
            X = X * float((level.square() + self.process.data_std**2).rsqrt())
        t = (label.round() if self.rounding else label).to(x.device, x.dtype).expand(len(x))
        x0 = p * x + q * self._output(X, t)[:, : x.shape[1]]
        return x0 if self.mend is None else self.mend(x0)

    def _output(self, X: Tensor, t: Tensor) -> Tensor:
        if self.negative is None or self.guidance == 1:
            return self._call(X, t, self.condition)
        return torch.lerp(self._call(X, t, self.negative), self._call(X, t, self.condition), self.guidance)

    def _call(self, X: Tensor, t: Tensor, condition: Condition) -> Tensor:
        dtype = next(self.model.parameters()).dtype
        told = {k: _for_batch(k, v, len(X)) for k, v in condition.items()}
        try:
            out = self.model(X.to(dtype), t, **told, return_dict=False)[0]
        except TypeError as error:
            raise InputError(
                f"condition: got {sorted(told) or 'nothing'}, and the network says: {error}. Give what it is "
                "told by its own names, such as condition={'encoder_hidden_states': embeddings}."
            ) from error
        return out.to(X.dtype)  # type: ignore[no-any-return]


def _for_batch(name: str, value: Tensor, batch: int) -> Tensor:
    if len(value) not in (1, batch):
        raise InputError(f"{name}: got {len(value)} entries for a batch of {batch}, wanted 1 or {batch}.")
    return value if len(value) == batch else value.expand(batch, *value.shape[1:])


def denoising(
    pipe: Any, condition: Condition | None = None, negative: Condition | None = None,
    guidance_scale: float = 1.0,
) -> Denoising:  # fmt: skip
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
            f"pipe: got {type(pipe).__name__}, wanted a pipeline with unet (or transformer) and scheduler."
        )
    for name, told in (("condition", condition), ("negative", negative)):
        if told is not None and not isinstance(told, Mapping):
            raise InputError(
                f"{name}: got {type(told).__name__}, wanted the network's arguments by name, such as "
                "{'encoder_hidden_states': embeddings}."
            )
    if guidance_scale != 1 and negative is None:
        raise InputError(
            f"negative: got None with guidance_scale={guidance_scale}, wanted what the other half is told."
        )
    config = {k: v for k, v in scheduler.config.items() if k not in ("solver", "exact", "noise")}
    reference = reference_of(config, DPMSolverPP(2))
    process = process_of(config, reference)
    mend = mending(reference.config | {"clip_sample": False})
    network = Network(model, process, condition or {}, negative, guidance_scale, process.kind == "vp", mend)
    return Denoising(network, process.schedule)


def distill_dode(
    pipe: Any, base: DiffusionSolver, *, samples: int = 128, seed: int = 0, batch: int = 16,
    shape: tuple[int, ...] | None = None, condition: Condition | None = None,
    negative: Condition | None = None, guidance_scale: float = 1.0, **options: Any,
) -> tuple[FewStepScheduler, DODEReport]:  # fmt: skip
    """Fit a table to a pipeline, ready to be its scheduler.

    `pipe.scheduler, report = distill_dode(pipe, fewstep.DDIM(), steps=8)`

    Args:
        base, options: as of `fewstep.distill_dode` (steps=..., terms=..., refine=...).
        samples: start states, one in eight held out (the report's distances are theirs, who also choose what
            is kept: of few states they flatter); seed: of these.
        shape: of one state, by default what the network's configuration says.
        condition, negative, guidance_scale: see `denoising`; one entry for all samples.

    Returns:
        the scheduler, and the fit's report.
    """
    problem = denoising(pipe, condition, negative, guidance_scale)
    model = getattr(pipe, "unet", None) or pipe.transformer
    at = next(model.parameters())
    event = shape or _event(model)
    own = torch.Generator().manual_seed(seed)
    noise = torch.randn((samples, *event), generator=own).to(at.device)
    config = {k: v for k, v in pipe.scheduler.config.items() if k not in ("solver", "exact", "noise")}
    if problem.denoiser.process.kind == "edm":  # type: ignore[attr-defined]
        noise = noise * problem.schedule.sigma_max
    student, report = fit_dode(problem, base, noise=noise, batch=batch, **options)
    return FewStepScheduler.from_config(config, solver=student), report


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
