"""A diffusers pipeline as a problem of this library, and a solver distilled to it in place."""

from collections.abc import Callable, Mapping
from inspect import signature
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ... import EDM, DiffusionModel, DiffusionSolver, DPMSolverPP, InputError
from ..._validation import check_float, check_instance, check_int, check_seed, check_shape
from ...denoiser import Converted, PostprocessedDenoiser
from ...learned.dode.distill import DODEReport
from ...learned.dode.distill import distill_dode as fit_dode
from .configuration import postprocessing
from .grid import process_of, reference_of
from .scheduler import FewStepScheduler

Condition = Mapping[str, Any]
SHARED = ("img_ids", "txt_ids")  # arguments without a batch axis
UNIT_TIME = ("AuraFlow", "Chroma", "Flux", "QwenImage")  # networks whose pipelines pass t / 1000


def _guided(
    net: Any, condition: Condition, negative: Condition | None, guidance: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """The network as `(scaled x, t) -> output`, conditioned and guided."""

    state = "hidden_states" if "hidden_states" in signature(net.forward).parameters else "sample"
    unit = 1000 if type(net).__name__.startswith(UNIT_TIME) else 1

    def call(X: Tensor, t: Tensor, condition: Condition) -> Tensor:
        given = {k: _for_batch(k, v, len(X)) for k, v in condition.items()}
        weight = next(net.parameters(), X)
        given |= {state: X.to(weight.dtype), "timestep": t / unit if unit > 1 else t}
        try:
            out = net(**given, return_dict=False)[0]
        except TypeError as error:
            raise InputError(
                f"condition: got {sorted(condition) or 'nothing'}, which the network rejects: {error}. Pass its "
                "arguments by name, as in condition={'encoder_hidden_states': embeddings}."
            ) from error
        halved = X.dim() > 1 and out.shape[1] == 2 * X.shape[1]  # a network with a learned variance
        return (out[:, : X.shape[1]] if halved else out).to(X.dtype)  # type: ignore[no-any-return]

    def guided(X: Tensor, t: Tensor) -> Tensor:
        if negative is None or guidance == 1:
            return call(X, t, condition)
        return torch.lerp(call(X, t, negative), call(X, t, condition), guidance)

    return guided


def _for_batch(name: str, value: Any, batch: int) -> Any:
    if isinstance(value, Mapping):
        return {k: _for_batch(k, v, batch) for k, v in value.items()}
    if not torch.is_tensor(value) or value.dim() == 0 or name in SHARED:
        return value
    if len(value) not in (1, batch):
        raise InputError(f"{name}: got {len(value)} entries for a batch of {batch}, expected 1 or {batch}.")
    return value.expand(batch, *value.shape[1:])


def denoising(
    pipe: Any, condition: Condition | None = None, negative: Condition | None = None, guidance_scale: float = 1.0
) -> DiffusionModel:
    """A pipeline as a problem, for `fewstep.sample`, `compare`, `fit_table`, `fit_grid` and `distill_dode`.

    Its states are those that the network takes (latents; packed ones of Flux and LTX), alpha x0 + sigma_t n.

    Args:
        pipe: has a `unet` or a `transformer` called with `sample` or `hidden_states`, `timestep` and the conditions,
            and a `scheduler`.
        condition: the network's further arguments by name, for instance `{"encoder_hidden_states": prompt_embeds}`,
            for SD3 also `"pooled_projections"`, for Flux also `"img_ids"`, `"txt_ids"` and `"guidance"`, or
            `{"class_labels": labels}`. Tensors have one entry, or one for each sample.
        negative: the same for the unconditional half of classifier-free guidance.
        guidance_scale: as in the pipeline; 1 is no guidance.

    Raises:
        InputError: no network, guidance without a negative condition.
    """
    model = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    scheduler = getattr(pipe, "scheduler", None)
    if not isinstance(model, torch.nn.Module) or not isinstance(getattr(scheduler, "config", None), Mapping):
        raise InputError(
            f"pipe: got {type(pipe).__name__}, expected a pipeline with unet or transformer and scheduler."
        )
    for name, given in (("condition", condition), ("negative", negative)):
        check_instance(name, given, (Mapping, type(None)), "arguments by name, {'encoder_hidden_states': embeddings}")
    guidance_scale = check_float("guidance_scale", guidance_scale)
    if guidance_scale != 1 and negative is None:
        raise InputError(f"negative: got None with guidance_scale={guidance_scale}, expected the unguided condition.")
    config = _config(scheduler)
    reference = reference_of(config, DPMSolverPP(2))
    process = process_of(config, reference)
    guided = _guided(model, condition or {}, negative, guidance_scale)
    rounding = "nearest" if process.kind == "vp" else None  # labels as the pipeline rounds them
    network: Any = Converted(guided, process, process.conversion, rounding)  # type: ignore[arg-type]
    postprocess = postprocessing(reference.config | {"clip_sample": False})
    if postprocess is not None:
        network = PostprocessedDenoiser(network, postprocess)
    return DiffusionModel(network, process.schedule)


def _config(scheduler: Any) -> dict[str, Any]:
    """A scheduler's configuration without the options of `FewStepScheduler`."""
    return {k: v for k, v in scheduler.config.items() if k not in ("solver", "exact", "noise")}


def distill_dode(
    pipe: Any, base: DiffusionSolver, *, samples: int = 128, seed: int = 0, shape: tuple[int, ...] | None = None,
    condition: Condition | None = None, negative: Condition | None = None, guidance_scale: float = 1.0, **options: Any,
) -> tuple[FewStepScheduler, DODEReport]:  # fmt: skip
    """Fit a table to a pipeline: the scheduler that carries it, and the fit's report.

    `pipe.scheduler, report = distill_dode(pipe, fewstep.DDIM(), steps=8)`

    Args:
        base: the solver that is fitted.
        samples: the number of start states. One in eight is held out to measure the report's distances and to decide
            what is kept: few of them make the report optimistic.
        seed: of the start states.
        shape: of one state, by default that of the network's configuration.
        condition, negative, guidance_scale: see `denoising`; one entry for all samples.
        options: those of `fewstep.distill_dode`, such as steps or terms.
    """
    problem = denoising(pipe, condition, negative, guidance_scale)
    model = getattr(pipe, "unet", None) or pipe.transformer
    event = _event(model) if shape is None else shape
    states = check_shape((check_int("samples", samples), *check_shape(event)))
    noise = torch.randn(states, generator=torch.Generator().manual_seed(check_seed(seed)))
    noise = noise.to(next(model.parameters(), noise).device) * (
        problem.schedule.sigma_max if isinstance(problem.schedule, EDM) else 1.0
    )
    student, report = fit_dode(problem, base, noise=noise, **{"batch": 16, **options})
    return FewStepScheduler.from_config(_config(pipe.scheduler), solver=student), report


def _event(model: Any) -> tuple[int, ...]:
    """(channels, height, width) of the network's configuration."""
    size = model.config.sample_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return int(model.config.in_channels), int(height), int(width)


class Idle(torch.nn.Module):
    """A network that returns zeros, for pipelines whose student has its own: saves the unused evaluation.

    `pipe.unet = Idle(pipe.unet)`; put the inner network back before the pipeline is saved.
    """

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "inner" else getattr(super().__getattr__("inner"), name)

    def forward(self, sample: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        out = torch.zeros_like(sample)
        return SimpleNamespace(sample=out) if return_dict else (out,)
