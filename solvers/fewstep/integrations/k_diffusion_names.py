"""The samplers of k-diffusion, ComfyUI and Forge by their names there."""

from .. import (
    DDIM,
    DDPM,
    DEIS,
    ERSDE,
    IPNDM,
    Ancestral,
    DPMSolver,
    DPMSolverPP,
    DPMSolverSDE,
    EDMEuler,
    EDMHeun,
    Restart,
    SASolver,
    UniPC,
)
from ..compat import HeunPP2, OfficialDPM
from ..solver import DiffusionSolver

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
    "deis": DEIS(3),
    "dpmpp_2s_ancestral": Ancestral(DPMSolverPP(2, multistep=False)),
    "dpmpp_sde": DPMSolverSDE(2, multistep=False),
    "dpmpp_2m": DPMSolverPP(2),
    "dpmpp_2m_sde": DPMSolverSDE(2),
    "dpmpp_2m_sde_heun": DPMSolverSDE(2, solver_type="heun"),
    "dpmpp_3m_sde": OfficialDPM(DPMSolverSDE(3, solver_type="heun")),
    "ddim": DDIM(),
    "ddpm": DDPM(),
    "uni_pc": UniPC(3, "bh1"),
    "uni_pc_bh2": UniPC(3),
    "res_multistep": DPMSolverPP(2, solver_type="heun"),
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

CFG_PP_HISTORY = {"dpmpp_2m": "unconditional", "res_multistep": "both"}
"""What ComfyUI's multistep `_cfg_pp` samplers keep as their history, see `executor.Pair`."""


def solver_of(name: str) -> DiffusionSolver | None:
    """The solver of a name, with or without `sample_` and `_gpu`; None for other words."""
    return SAMPLERS.get(name.strip().lower().removeprefix("sample_").removesuffix("_gpu"))
