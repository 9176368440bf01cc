"""A ComfyUI node pack: nodes for solver, levels, fitted table and guidance, and every sampler in the drop-down.

One line in `ComfyUI/custom_nodes/fewstep_nodes.py` installs it: `from fewstep.integrations.comfyui import *`. ComfyUI
also loads this folder itself, copied or linked into `custom_nodes`: nothing in it is imported relatively.
"""

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    import_module("comfy")
except ImportError as _error:
    raise ImportError(f"ComfyUI cannot be imported here ({_error}). This package is for its custom_nodes.") from _error

import fewstep as fs
from fewstep.catalog import spelling
from fewstep.grid import spacing_names
from fewstep.integrations.k_diffusion import SAMPLERS, Sampler, register, sampler, table_schedule
from fewstep.sampler_names import CFG_PP
from fewstep.solver import DiffusionSolver

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]

CATEGORY = "sampling/fewstep"
FOLDER = "fewstep"  # in ComfyUI/models
PREFIX = "fewstep_"  # of the names in the drop-down


def solvers() -> dict[str, DiffusionSolver]:
    """Every sampler of this library: by the names of ComfyUI and webui, the others by their own."""
    known = {*map(repr, SAMPLERS.values()), "PNDM()"}  # which needs a schedule; it is there as "plms"
    own = {spelling(n): s for n, s in fs.solvers().items() if isinstance(s, DiffusionSolver) and repr(s) not in known}
    return {**own, **SAMPLERS}


def schedule_of(model: Any) -> fs.Schedule:
    """The schedule of a ComfyUI model, for `sigma_grid`: a flow, a table of levels, or a range of sigma."""
    sampling = model.get_model_object("model_sampling")
    kinds = {kind.__name__ for kind in type(sampling).__mro__}
    if "CONST" in kinds:
        shift = float(getattr(sampling, "shift", 1.0))
        flow = fs.FlowMatching(float(torch.tensor(shift).exp()) if "ModelSamplingFlux" in kinds else shift)
        low = sampling.sigma_min.double()
        return replace(flow, t_min=float(flow.time(low / (1 - low))))
    table = table_schedule(sampling.sigmas) if "ModelSamplingDiscrete" in kinds else None
    return table or fs.EDM(float(sampling.sigma_min), float(sampling.sigma_max))


def comfy_sampler(function: Sampler) -> Any:
    """A sampler as ComfyUI's SAMPLER."""
    return import_module("comfy.samplers").KSAMPLER(function)


class SolverNode:
    """SAMPLER: a solver with its options."""

    CATEGORY = CATEGORY
    RETURN_TYPES = ("SAMPLER",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "solver": (list(solvers()), {"default": "dpmpp_2m"}),
                "options": ("STRING", {"default": "", "tooltip": "What differs from the defaults: order=3, eta=0.5"}),
                "s_noise": _number(1.0, 0.0, 10.0, "All noise of the solver is multiplied by it."),
                "cfg_pp": ("BOOLEAN", {"default": False, "tooltip": "Steps of CFG++; use a cfg of about 1."}),
            }
        }

    def make(self, solver: str, options: str, s_noise: float, cfg_pp: bool) -> tuple[Any]:
        name = f"{solver}{'_cfg_pp' if cfg_pp else ''}({options})"
        return (comfy_sampler(sampler(name, s_noise=s_noise)),)


class SigmasNode:
    """SIGMAS: a grid of this library for a model; `denoise` keeps the end of a longer one, as ComfyUI does."""

    CATEGORY = CATEGORY
    RETURN_TYPES = ("SIGMAS",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",),
                "spacing": (spacing_names(), {"default": "trailing"}),
                "steps": ("INT", {"default": 10, "min": 1, "max": 10000}),
                "denoise": _number(1.0, 0.0, 1.0, "Below 1 (image to image) the last `steps` of steps / denoise."),
            }
        }

    def make(self, model: Any, spacing: str, steps: int, denoise: float) -> tuple[Tensor]:
        if denoise <= 0:
            return (torch.zeros(0),)
        schedule = schedule_of(model)
        levels = fs.sigma_grid(schedule, int(steps / denoise), spacing)
        top = schedule.sigma_max
        if isinstance(schedule, fs.FlowMatching):
            levels, top = schedule.label(levels), float(schedule.label(torch.tensor(top)))
        # the model's own first level, from which ComfyUI knows a run from pure noise
        first = float(model.get_model_object("model_sampling").sigma_max)
        levels = torch.where(levels >= top * (1 - 1e-6), first, levels)
        return (levels[-(steps + 1) :].float(),)


class TableNode:
    """SAMPLER and SIGMAS: a saved plan or fitted table from `models/fewstep`, with the levels that it has."""

    CATEGORY = CATEGORY
    RETURN_TYPES = ("SAMPLER", "SIGMAS")
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        files = import_module("folder_paths").get_filename_list(FOLDER)
        return {"required": {"model": ("MODEL",), "file": (files, {"tooltip": f"From ComfyUI/models/{FOLDER}."})}}

    def make(self, model: Any, file: str) -> tuple[Any, Tensor]:
        table = fs.load(import_module("folder_paths").get_full_path_or_raise(FOLDER, file))
        flow = isinstance(schedule_of(model), fs.FlowMatching)
        if isinstance(table, fs.Plan) and table.fit:
            fitted = table.fit.fingerprint.schedule
            if flow != fitted.startswith("FlowMatching"):
                kind = "a flow" if flow else "not a flow"
                raise fs.InputError(f"model: got one that is {kind}; {file} was fitted to {fitted}.")
            table = replace(table, fit=None)  # its check compares prompts too
        function = sampler(table, flow=flow)
        assert function.sigmas is not None
        return comfy_sampler(function), function.sigmas


class GuidanceNode:
    """MODEL: guidance in an interval, with a rescaled standard deviation, and APG's projection and limit."""

    CATEGORY = CATEGORY
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",),
                "start_percent": _number(0.0, 0.0, 1.0, "Before it there is no guidance, at half the cost."),
                "end_percent": _number(1.0, 0.0, 1.0, "After it there is no guidance, at half the cost."),
                "rescale": _number(0.0, 0.0, 1.0, "Share of the conditional estimate's standard deviation."),
                "parallel": _number(1.0, -10.0, 10.0, "APG's eta: what is kept of the part along x0; 0 in the paper."),
                "norm": _number(0.0, 0.0, 10000.0, "APG's r: largest norm of the direction; 0 has no limit."),
            }
        }

    def make(
        self, model: Any, start_percent: float, end_percent: float, rescale: float, parallel: float, norm: float
    ) -> tuple[Any]:
        samplers, sampling = import_module("comfy.samplers"), model.get_model_object("model_sampling")
        high, low = (float(sampling.percent_to_sigma(p)) for p in (start_percent, end_percent))
        none = torch.zeros(1)
        rule = fs.classifier_free_guidance(
            samplers.cfg_function, none, none, rescale=rescale, parallel=parallel, norm=norm or None
        )

        def combine(args: dict[str, Any]) -> Tensor:
            """x minus the guided x0, from the two estimates of x0."""
            x, u, c = args["input"], args["uncond_denoised"], args["cond_denoised"]
            guided: Tensor = x - rule.combined(u, c, x, float(args["cond_scale"]), 0.0, 1.0)
            return guided

        def estimates(args: dict[str, Any]) -> list[Tensor]:
            """The conditional and the unconditional x0; outside of the interval twice the first."""
            conds, sigma = args["conds"], float(args["sigma"].flatten()[0])
            inside = low <= sigma <= high
            wanted = conds if inside else [conds[0], None]
            batch = (args["model"], wanted, args["input"], args["sigma"], args["model_options"])
            c, u = samplers.calc_cond_batch(*batch)
            return [c, u if inside and conds[1] is not None else c]

        out = model.clone()
        out.set_model_sampler_cfg_function(combine)
        out.set_model_sampler_calc_cond_batch_function(estimates)
        return (out,)


def _number(default: float, low: float, high: float, tooltip: str) -> tuple[str, dict[str, Any]]:
    return "FLOAT", {"default": default, "min": low, "max": high, "step": 0.01, "round": False, "tooltip": tooltip}


def install() -> None:
    """Add the samplers to the drop-down and the folder of tables to ComfyUI's."""
    for name, solver in solvers().items():
        register(PREFIX + name, solver)
    for name in CFG_PP:
        register(f"{PREFIX}{name}_cfg_pp", f"{name}_cfg_pp")
    paths = import_module("folder_paths")
    paths.add_model_folder_path(FOLDER, str(Path(paths.models_dir) / FOLDER))
    folders, _ = paths.folder_names_and_paths[FOLDER]
    paths.folder_names_and_paths[FOLDER] = (folders, {".json", ".safetensors"})


install()
NODE_CLASS_MAPPINGS: dict[str, Callable[[], Any]] = {
    "FewStepSolver": SolverNode, "FewStepSigmas": SigmasNode, "FewStepTable": TableNode,
    "FewStepGuidance": GuidanceNode,
}  # fmt: skip
NODE_DISPLAY_NAME_MAPPINGS = {
    "FewStepSolver": "Solver (fewstep)", "FewStepSigmas": "Sigmas (fewstep)", "FewStepTable": "Fitted table (fewstep)",
    "FewStepGuidance": "Guidance (fewstep)",
}  # fmt: skip
