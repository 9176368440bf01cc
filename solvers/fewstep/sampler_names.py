"""The samplers of k-diffusion, ComfyUI and Forge by their names there, next to the solvers' own."""

import re
from collections.abc import Callable
from typing import Any

from . import (
    DDIM,
    DDPM,
    DEIS,
    ERSDE,
    IPNDM,
    LCM,
    PNDM,
    Ancestral,
    DPMSolver,
    DPMSolverPP,
    DPMSolverSDE,
    EDMEuler,
    EDMHeun,
    GradientEstimation,
    Restart,
    SASolver,
    UniPC,
)
from .catalog import solver_named, solvers, spelling, with_options
from .compat import HeunPP2, OfficialDPM
from .errors import InputError
from .solver import DiffusionSolver, Solver

SAMPLERS: dict[str, DiffusionSolver] = {
    "euler": EDMEuler(),
    "euler_ancestral": DDIM(1.0),
    "heun": EDMHeun(),
    "heunpp2": HeunPP2(),
    "dpm_2": DPMSolver(2),
    "dpm_2_ancestral": Ancestral(DPMSolver(2)),
    "lms": IPNDM(4, variable=True),
    "ipndm": IPNDM(4),
    "ipndm_v": IPNDM(4, variable=True),
    "plms": PNDM("plms"),
    "deis": DEIS(3),
    "dpmpp_2s_ancestral": Ancestral(DPMSolverPP(2, multistep=False)),
    "dpmpp_sde": DPMSolverSDE(2, multistep=False),
    "dpmpp_2m": DPMSolverPP(2),
    "dpmpp_2m_sde": DPMSolverSDE(2),
    "dpmpp_2m_sde_heun": DPMSolverSDE(2, solver_type="heun"),
    "dpmpp_3m_sde": OfficialDPM(DPMSolverSDE(3, solver_type="heun")),
    "ddim": DDIM(),
    "ddpm": DDPM(),
    "lcm": LCM(),
    "uni_pc": UniPC(3, "bh1"),
    "uni_pc_bh2": UniPC(3),
    "res_multistep": DPMSolverPP(2, solver_type="heun"),
    "gradient_estimation": GradientEstimation(),
    "er_sde": ERSDE(3),
    "seeds_2": DPMSolverSDE(2, multistep=False),
    "seeds_3": DPMSolverSDE(3, multistep=False),
    "sa_solver": SASolver(3, 4),
    "sa_solver_pece": SASolver(3, 4, pece=True),
    "exp_heun_2_x0": DPMSolverPP(2, multistep=False, solver_type="heun", r=1.0),
    "exp_heun_2_x0_sde": DPMSolverSDE(2, multistep=False, solver_type="heun", r=1.0),
    "restart": Restart(),
}
"""The solver of each sampler, by its name without `sample_` and `_gpu`."""

CFG_PP = {
    "euler": "guided", "euler_ancestral": "guided", "dpmpp_2s_ancestral": "guided", "dpmpp_2m": "unconditional",
    "res_multistep": "both", "gradient_estimation": "guided",
}  # fmt: skip
"""What ComfyUI's `_cfg_pp` samplers keep as their history (see `executor.Pair`), by their names without `_cfg_pp`."""


def diffusion_solver_named(
    text: str, argument: str, accepts: Callable[[DiffusionSolver], bool] = lambda solver: True
) -> Solver:
    """The solver of a name of this library, of k-diffusion or of ComfyUI; the error lists those that are accepted."""
    own = {spelling(n): s for n, s in solvers().items() if isinstance(s, DiffusionSolver)}
    name = _parts(text)[0] if isinstance(text, str) else ""
    if name in SAMPLERS and name not in own:
        return named(text)[0]
    return solver_named(text, argument, [n for n, s in {**own, **SAMPLERS}.items() if accepts(s)])


def named(text: str) -> tuple[Solver, str]:
    """The solver that a text describes, and for `_cfg_pp` what it keeps as history, else "".

    The text is a name of `SAMPLERS` with or without `sample_`, `_gpu` and `_cfg_pp`, a label of Forge such as
    "DPM++ 2M SDE", or the name of a solver; options follow in brackets.
    """
    name, options = _parts(text)
    plain = name.removesuffix("_cfg_pp")
    history = CFG_PP.get(plain, "guided") if plain != name else ""
    if plain in SAMPLERS:
        solver = SAMPLERS[plain]
        if isinstance(solver, OfficialDPM):  # the options are those of the solver in it
            inner: Any = with_options(solver.solver, options or "", "solver")
            return OfficialDPM(inner), history
        return with_options(solver, options or "", "solver"), history
    listed = None if options is not None else SAMPLERS
    return solver_named(plain if options is None else f"{plain}({options})", listed=listed), history


def _parts(text: str) -> tuple[str, str | None]:
    """The name in the spelling of `SAMPLERS`, and the options in brackets."""
    if not (found := re.fullmatch(r"([^()]*)(?:\(([^()]*)\))?", text.strip())):
        raise InputError(
            f"solver: got {text!r}, expected a name, or a name with options in brackets: dpmpp_2m(order=3)."
        )
    name = re.sub(r"[ _]+", "_", found[1].strip().lower().replace("+", "p")).replace("cfgpp", "cfg_pp")
    name = name.removeprefix("sample_").removeprefix("k_").removesuffix("_gpu")
    return re.sub("^dpm2", "dpm_2", re.sub("_a$", "_ancestral", name)), found[2]
