"""What diffusers says of the solver: its name and options, its file, its form there, its noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..denoiser import dynamic_thresholding
from ..diffusion.ddim import DDIM
from ..diffusion.dpm_solver_pp import DPMSolverPP
from ..diffusion.pndm import PNDM
from ..errors import InputError, one_of
from ..learned.dode import DODE
from ..learned.sig_step import SigSampler
from ..plan import Plan
from ..solver import DiffusionSolver
from ..walk import Walk
from .diffusers_grid import Grid, Process

FILE = "fewstep_solver.safetensors"
Learned = (Plan, DODE, SigSampler)


def solver_of(solver: Any) -> Any:
    """The solver itself, from whatever a caller or a configuration gave."""
    if solver is None:
        return DPMSolverPP(2)
    if isinstance(solver, (DiffusionSolver, *Learned)):
        return solver
    if isinstance(solver, Mapping) and "file" in solver:
        raise InputError(
            f"solver: the configuration names the file {solver['file']!r}, which is not here. Load with "
            "FewStepScheduler.from_pretrained(folder), or give the plan or student as solver=."
        )
    if isinstance(solver, Mapping):
        return _built(dict(solver))
    raise InputError(
        f"solver: got {type(solver).__name__}, wanted a diffusion solver, a Plan or a student. SDE solvers "
        "sample where their card lists additive noise."
    )


def _built(words: dict[str, Any]) -> DiffusionSolver:
    """A solver from its name and options."""
    import fewstep

    able = {n: c for n, c in fewstep.solvers().items() if issubclass(c, DiffusionSolver)}
    name = words.pop("name", None)
    if name not in able:
        raise one_of("solver", name, able)
    try:
        return able[name](**words)
    except TypeError as error:
        raise InputError(f"solver: {name} refuses {words}: {error}") from error


def described(solver: Any) -> dict[str, Any]:
    """The solver in the words of a configuration."""
    if isinstance(solver, Learned):
        return {"file": FILE, "plan": table_of(solver).name}
    listed = {k: sorted(v) if isinstance(v, (set, frozenset)) else v for k, v in solver.options().items()}
    return {"name": type(solver).__name__} | listed


def table_of(solver: Plan | DODE | SigSampler) -> Plan:
    return solver if isinstance(solver, Plan) else solver.plan


def file_of(folder: Any, subfolder: str | None, hub: dict[str, Any]) -> str:
    """The file of a plan or a student: in a folder, or on the hub."""
    if Path(folder).is_dir():
        return str(Path(folder, subfolder or "", FILE))
    from huggingface_hub import hf_hub_download

    return str(hf_hub_download(str(folder), FILE, subfolder=subfolder, **hub))


def mending(config: Mapping[str, Any]) -> Callable[[Tensor], Tensor] | None:
    """What diffusers' scheduler of that configuration does to each estimate of x0."""
    if config.get("thresholding"):
        quantile, most = config["dynamic_thresholding_ratio"], config["sample_max_value"]
        return dynamic_thresholding(lambda x, s: x, quantile, most).mend
    if config.get("clip_sample"):
        size = float(config.get("clip_sample_range", 1.0))
        return lambda x0: x0.clamp(-size, size)
    return None


def own_grid(solver: Any, process: Process, steps: int | None) -> Grid:
    """The levels that a plan or a student brings along."""
    plan = table_of(solver)
    count = len(plan.sigmas) - 1
    if steps not in (None, count, plan.nfe):
        raise InputError(
            f"num_inference_steps: got {steps}; {plan.name} has {count} steps of its own. Ask for "
            f"{count}, or fit a table for another number."
        )
    schedule = repr(process.schedule)
    if isinstance(solver, DODE) and solver.fitted_to.schedule != schedule:
        raise InputError(
            f"solver: {plan.name} was fitted to {solver.fitted_to.schedule}, and the configuration says "
            f"{schedule}. Fit a table for this pipeline."
        )
    labels = process.label(plan.sigmas[:-1])
    return Grid(plan.sigmas, labels.round().long() if process.kind == "vp" else labels.float(), 1.0)


def conform(solver: Any, config: Mapping[str, Any], process: Process, whole: bool) -> Any:
    """The solver in the form in which diffusers has it; as it is where diffusers has none.

    whole: the grid is diffusers' own from its start, as the forms that count in labels need.
    """
    keeps = getattr(solver, "form", None) == "consistent"
    options = dict(solver.options()) if hasattr(solver, "options") else {}
    if isinstance(solver, (DDIM, PNDM)):
        keeps = keeps and whole and process.kind == "vp"
    if isinstance(solver, PNDM):
        options["warm_up"] = "plms" if config.get("skip_prk_steps", False) else solver.warm_up
        if keeps and process.prediction == "v_prediction":
            options["combine"] = "v_prediction"
    elif not keeps:
        return solver
    if keeps:
        options["form"] = "diffusers"
    if getattr(solver, "nodes", None) == "own" and not solver.multistep:
        options["nodes"] = "grid"
    try:
        return type(solver)(**options)
    except InputError:  # an option that diffusers does not have
        return solver


def beside_raw_noise(walk: Walk, x0: Tensor, clipped: Tensor) -> Tensor:
    """The estimate that makes DDIM's step go from the clipped x0 along the noise of the raw one.

    With keep the share of x, the step a x + b D is w (D + keep (x - D)), w = a + b; the first D is clipped.
    """
    row = walk.plan.rows[walk.row]
    weight = row.go.past[0][0]
    return torch.lerp(x0, clipped, (row.go.scale / row.look.scale + weight) / weight)


def seeds_of(generator: Any, like: Tensor) -> list[int]:
    """A seed a sample from a generator, from a list of them, or from torch's own as diffusers has it."""
    many = generator if isinstance(generator, list) else [generator]
    count = len(like) // len(many)
    drawn = [
        torch.randint(1 << 62, (count,), generator=g, device=g.device if g is not None else "cpu")
        for g in many
    ]
    return [int(v) for d in drawn for v in d.tolist()]
