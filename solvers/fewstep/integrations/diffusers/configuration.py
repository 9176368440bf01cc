"""What diffusers says of the solver: its name and options, its file, its form there, its noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from functools import partial
from itertools import pairwise
from math import isfinite
from operator import index
from pathlib import Path
from typing import Any
from warnings import warn

import torch
from torch import Tensor

from ...denoiser import threshold
from ...errors import InputError, one_of
from ...fingerprint import same_words
from ...learned.sigdeg.student import SigSampler
from ...plan import Plan
from ...samplers.ddim import DDIM
from ...samplers.ddpm import DDPM, VARIANCES
from ...samplers.deis import DEIS
from ...samplers.dpm_solver_pp import DPMSolverPP
from ...samplers.dpm_solver_sde import DPMSolverSDE
from ...samplers.edm import EDMEuler
from ...samplers.pndm import PNDM
from ...samplers.unipc import UniPC
from ...schedule import DiscreteVP
from ...solver import DiffusionSolver
from .grid import REFUSALS, Grid, Process, family
from .walk import Walk

HUB = ("revision", "token", "cache_dir", "local_files_only")
FILE = "fewstep_solver.safetensors"
Learned: tuple[type[Plan | SigSampler], ...] = (Plan, SigSampler)
# what a configuration says of its own solver
OVERRULED = ("algorithm_type", "disable_corrector", "predict_x0", "solver_order", "solver_type")
FLOW_ABLE = (DDIM, DDPM, DEIS, DPMSolverPP, DPMSolverSDE, EDMEuler, UniPC)


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
    if isinstance(solver, str):
        return _built({"name": solver})
    if isinstance(solver, type):
        raise InputError(
            f"solver: got the class {solver.__name__}; expected one of its kind, {solver.__name__}()."
        )
    raise InputError(
        f"solver: got {type(solver).__name__}, expected a diffusion solver, a Plan or a student. SDE solvers "
        "sample where their card lists additive noise."
    )


def _built(words: dict[str, Any]) -> DiffusionSolver:
    """A solver from its name and options."""
    import fewstep

    able = {n: c for n, c in fewstep.solvers().items() if issubclass(c, DiffusionSolver)}
    name = words.pop("name", None)
    if isinstance(name, str):  # as forgiving as the command line
        name = {n.lower(): n for n in able}.get(name.replace("_", "").lower(), name)
    if not isinstance(name, str) or name not in able:
        raise one_of("solver", name, able)
    try:
        solver = able[name](**words)
        schedule = DiscreteVP.named("linear", 10)  # a plan shows what a constructor has let through
        levels = torch.tensor([9.0, 3.0, 1.0, 0.3], dtype=torch.float64)
        solver.plan(levels, schedule)
    except REFUSALS as error:
        raise InputError(f"solver: {name} refuses {words}: {error}") from error
    return solver


def described(solver: Any) -> dict[str, Any]:
    """The solver in the words of a configuration."""
    if isinstance(solver, Learned):
        return {"file": FILE, "plan": table_of(solver).name}
    listed = {k: sorted(v) if isinstance(v, (set, frozenset)) else v for k, v in solver.options().items()}
    return {"name": type(solver).__name__} | listed


def options_of(cls: Any) -> frozenset[str]:
    """The options of a scheduler, and of those whose configurations it takes."""
    import diffusers

    others = [getattr(diffusers, name, None) for name in getattr(cls, "_compatibles", ())]
    return frozenset(k for c in (cls, *others) if c for k in c._get_init_keys(c)) - {"self", "options"}


def check_words(words: Mapping[str, Any], config: Mapping[str, Any], solver: Any, cls: Any) -> None:
    """Refuse misspelt options that a user has named, and say of idle ones that they are."""
    if not words:
        return
    import diffusers

    name, _ = family(config, solver)
    own, known = getattr(diffusers, name)._get_init_keys(getattr(diffusers, name)), options_of(cls)
    for word, value in words.items():
        if word not in known and not word.startswith("_"):
            raise one_of("option", word, known)
        said = f"{word}={value!r} changes nothing:"
        if word in OVERRULED:
            warn(f"{said} the solver is {solver!r}; say it there.", stacklevel=4)
        elif value is not None and value is not False and word not in own:
            warn(f"{said} {name}, which the solver stands for, has no such option.", stacklevel=4)


def table_of(solver: Plan | SigSampler) -> Plan:
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
        quantile, most = float(config["dynamic_thresholding_ratio"]), float(config["sample_max_value"])
        if not 0 <= quantile <= 1:
            raise InputError(f"dynamic_thresholding_ratio: got {quantile}, expected a share from 0 to 1.")
        return partial(threshold, quantile=quantile, most=most)
    if config.get("clip_sample"):
        size = float(config.get("clip_sample_range", 1.0))
        if not size > 0:
            raise InputError(f"clip_sample_range: got {size}, expected a number above 0.")
        return partial(torch.clamp, min=-size, max=size)
    return None


def step_count(steps: Any) -> int | None:
    """A number of steps, of any whole kind."""
    try:
        count = None if steps is None else index(steps)
    except TypeError:
        count = 0
    if count is not None and (count < 1 or isinstance(steps, bool)):
        raise InputError(f"num_inference_steps: got {steps!r}, expected a whole number of at least 1.")
    return count


def listed(name: str, values: Any) -> tuple[float, ...] | None:
    """A user's list of levels as finite decreasing numbers."""
    if values is None:
        return None
    try:
        numbers = tuple(map(float, values))
    except (TypeError, ValueError):
        numbers = ()
    if not numbers or not all(map(isfinite, numbers)) or any(a <= b for a, b in pairwise(numbers)):
        raise InputError(f"{name}: got {values!r}, expected a list of finite, strictly decreasing numbers.")
    return numbers


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
    if plan.fit and not same_words(plan.fit.fingerprint.schedule, schedule):
        raise InputError(
            f"solver: {plan.name} was fitted to {plan.fit.fingerprint.schedule}, and the configuration says "
            f"{schedule}. Fit a table for this pipeline."
        )
    labels = process.label(plan.sigmas[:-1])
    return Grid(plan.sigmas, labels.round().long() if process.kind == "vp" else labels.float(), 1.0)


def check_event(solver: Any, sample: Tensor) -> None:
    """Refuse samples of another shape than a table was fitted to; the network itself is not asked here."""
    fit = getattr(solver, "fit", None)
    if fit and tuple(sample.shape[1:]) != fit.fingerprint.event:
        raise InputError(
            f"sample: got {tuple(sample.shape)}, and {solver.name} was fitted to {fit.fingerprint.event}. "
            "Fit a table for this pipeline."
        )


def conform(solver: Any, config: Mapping[str, Any], process: Process, grid: Grid, whole: bool) -> Any:
    """The solver in the form in which diffusers has it; as it is where diffusers has none.

    whole: the grid is diffusers' own, as the forms that count in labels need.
    """
    options = dict(solver.options())
    if isinstance(solver, DDPM) and config.get("variance_type") in VARIANCES:
        return DDPM(**({"variance": config["variance_type"]} | options))
    if isinstance(solver, (DDIM, PNDM)):
        return _counting(solver, options, config, process, grid) if whole and process.kind == "vp" else solver
    if getattr(solver, "form", None) != "consistent":
        return solver
    if getattr(solver, "nodes", None) == "own" and not solver.multistep:
        options["nodes"] = "grid"
    try:
        made = type(solver)(**(options | {"form": "diffusers"}))
    except InputError:  # an option that diffusers does not have
        return solver
    return ending_at(
        made, lower=config.get("lower_order_final", True), euler=config.get("euler_at_final", False)
    )


def _counting(
    solver: DDIM | PNDM, options: dict[str, Any], config: Mapping[str, Any], process: Process, grid: Grid
) -> Any:
    """DDIM and PNDM as diffusers has them, by strides of labels."""
    if solver.form != "consistent":
        return solver
    if isinstance(solver, DDIM) or len(grid.sigmas) == 2:  # one step of PNDM is one of DDIM
        return DDIM(getattr(solver, "eta", 0.0), "diffusers")
    more = {"warm_up": "plms"} if config["skip_prk_steps"] else {}
    more |= {"combine": "v_prediction"} if process.prediction == "v_prediction" else {}
    return PNDM(**(options | more | {"form": "diffusers"}))


def ending_at(solver: Any, **how: Any) -> Any:
    """The solver with other facts in its `Ending`, where it has one."""
    if not hasattr(solver, "ending") and not hasattr(solver, "family"):
        return solver
    made = copy(solver)
    if hasattr(made, "family"):
        made.family = replace(made.family, ending=replace(made.family.ending, **how))
    else:
        made.ending = replace(made.ending, **how)
    return made


def check_flow(solver: Any) -> None:
    """Refuse solvers that lose all digits at a flow's first level, where sigma is as good as infinite."""
    if not isinstance(solver, (*Learned, *FLOW_ABLE)) or getattr(solver, "multistep", True) is False:
        raise InputError(
            f"solver: got {type(solver).__name__}, which loses all digits at the first level of a flow; "
            "expected DPMSolverPP, UniPC, DEIS, DDIM, EDMEuler or DPMSolverSDE."
        )


def beside_raw_noise(walk: Walk, x0: Tensor, clipped: Tensor) -> Tensor:
    """The estimate that makes DDIM's step go from the clipped x0 along the noise of the raw one.

    With keep the share of x, the step a x + b D is w (D + keep (x - D)), w = a + b; the first D is clipped.
    """
    row = walk.plan.rows[walk.row]
    if not row.update.evaluations:  # a last step to the level where it is: only the clipping moves the state
        assert walk.x is not None
        walk.x = torch.add(walk.x, clipped - x0, alpha=1 / row.stage.scale)
        return clipped
    weight = row.update.evaluations[0][0]
    return torch.lerp(x0, clipped, (row.update.scale / row.stage.scale + weight) / weight)


def fresh_normals(like: Tensor, letters: int, generator: Any, given: Tensor | None) -> tuple[Tensor, ...]:
    """Unit normals as diffusers draws them, one for each letter; a given one is the first."""
    from diffusers.utils.torch_utils import randn_tensor

    if given is not None and given.shape != like.shape:
        raise InputError(
            f"variance_noise: got {tuple(given.shape)}, expected {tuple(like.shape)} as the sample."
        )
    if isinstance(generator, list) and len(generator) not in (1, len(like)):
        raise InputError(
            f"generator: got {len(generator)}, expected one, or one for each of {len(like)} samples."
        )
    drawn = [] if given is None else [given]
    while len(drawn) < letters:
        drawn.append(randn_tensor(like.shape, generator, like.device, like.dtype))
    return tuple(z.to(torch.promote_types(z.dtype, torch.float32)) for z in drawn)


def seeds_of(generator: Any, like: Tensor) -> list[int]:
    """A seed a sample from a generator, from a list of them, or from torch's own as diffusers has it."""
    many = generator if isinstance(generator, list) else [generator]
    if len(many) not in (1, len(like)):
        raise InputError(f"generator: got {len(many)}, expected one, or one for each of {len(like)} samples.")
    count = len(like) // len(many)
    drawn = [
        torch.randint(1 << 62, (count,), generator=g, device=g.device if g is not None else "cpu")
        for g in many
    ]
    return [int(v) for d in drawn for v in d.tolist()]


def same_label(label: float, timestep: Any) -> bool:
    """Whether a timestep is that label, to the rounding of half precision's neighbours."""
    return abs(label - float(timestep)) <= 1e-4 * max(1.0, abs(label))
