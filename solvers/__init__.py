"""fewstep: learned and classical SDE/ODE solvers that need few steps. The public surface, on one screen.

`solvers()` lists every solver named here with its card; a new solver is one file and one line below.
("as" marks a name as public for type checkers.)
"""

from __future__ import annotations

from importlib.metadata import version as _version

from .brownian import AreaPath as AreaPath
from .brownian import BrownianPath as BrownianPath
from .brownian import FreshIncrements as FreshIncrements
from .brownian import Increment as Increment
from .brownian import levy_area as levy_area
from .classical.derivative_free_milstein import DerivativeFreeMilstein as DerivativeFreeMilstein
from .classical.euler_heun import EulerHeun as EulerHeun
from .classical.euler_maruyama import EulerMaruyama as EulerMaruyama
from .classical.general_milstein import GeneralMilstein as GeneralMilstein
from .classical.general_shark import GeneralShARK as GeneralShARK
from .classical.heun import Heun as Heun
from .classical.kloeden_platen import KloedenPlaten15 as KloedenPlaten15
from .classical.log_ode import LogODE as LogODE
from .classical.midpoint import Midpoint as Midpoint
from .classical.milstein import Milstein as Milstein
from .classical.reversible_heun import ReversibleHeun as ReversibleHeun
from .classical.rk4 import RK4 as RK4
from .classical.sea import SEA as SEA
from .classical.shark import ShARK as ShARK
from .classical.shifted_ode import ShiftedODE as ShiftedODE
from .classical.slow_rk import SlowRK as SlowRK
from .classical.sosra import SOSRA as SOSRA
from .classical.spark import SPaRK as SPaRK
from .classical.sra1 import SRA1 as SRA1
from .classical.srid2 import SRID2 as SRID2
from .classical.taylor15 import Taylor15 as Taylor15
from .denoiser import check_prediction as check_prediction
from .denoiser import classifier_free_guidance as classifier_free_guidance
from .denoiser import clip as clip
from .denoiser import dynamic_thresholding as dynamic_thresholding
from .denoiser import from_edm as from_edm
from .denoiser import from_epsilon as from_epsilon
from .denoiser import from_flow as from_flow
from .denoiser import from_sample as from_sample
from .denoiser import from_score as from_score
from .denoiser import from_v as from_v
from .diffusion.ddim import DDIM as DDIM
from .diffusion.ddpm import DDPM as DDPM
from .diffusion.deis import DEIS as DEIS
from .diffusion.dpm_solver import DPMSolver as DPMSolver
from .diffusion.dpm_solver_pp import DPMSolverPP as DPMSolverPP
from .diffusion.dpm_solver_sde import DPMSolverSDE as DPMSolverSDE
from .diffusion.edm import EDMEuler as EDMEuler
from .diffusion.edm import EDMHeun as EDMHeun
from .diffusion.ipndm import IPNDM as IPNDM
from .diffusion.pndm import PNDM as PNDM
from .diffusion.sa_solver import SASolver as SASolver
from .diffusion.seeds import SEEDS as SEEDS
from .diffusion.unipc import UniPC as UniPC
from .errors import InputError as InputError
from .errors import NonFiniteError as NonFiniteError
from .grid import sigma_grid as sigma_grid
from .learned.distill_dode import distill_dode as distill_dode
from .learned.distill_sfddm import distill_sfddm as distill_sfddm
from .learned.distill_sigdeg import distill_sigdeg as distill_sigdeg
from .learned.dode import DODE as DODE
from .learned.dode_grid import regrid as regrid
from .learned.sfddm import SFDDM as SFDDM
from .learned.sfddm_process import StudentProcess as StudentProcess
from .learned.sfddm_process import subsequence as subsequence
from .learned.sig_step import SigSampler as SigSampler
from .learned.sig_step import SigStep as SigStep
from .learned.sig_unet import SigUNet as SigUNet
from .learned.loading import load as load
from .learned.trajectories import Trajectories as Trajectories
from .learned.trajectories import make_trajectories as make_trajectories
from .plan import Plan as Plan
from .problem import ODE as ODE
from .problem import SDE as SDE
from .problem import Denoising as Denoising
from .sample import sample as sample
from .schedule import EDM as EDM
from .schedule import VE as VE
from .schedule import zero_terminal_snr as zero_terminal_snr
from .schedule import DiscreteVP as DiscreteVP
from .schedule import FlowMatching as FlowMatching
from .schedule import Schedule as Schedule
from .schedule import SubVP as SubVP
from .schedule import VPCosine as VPCosine
from .schedule import VPLinear as VPLinear
from .schedule import VPScaledLinear as VPScaledLinear
from .schedule import VPSigmoid as VPSigmoid
from .solve import Solution as Solution
from .solve import solve as solve
from .solver import Card as Card
from .solver import DiffusionSolver as DiffusionSolver
from .solver import ScheduledSolver as ScheduledSolver
from .solver import Solver as Solver
from .solver import StochasticSolver as StochasticSolver
from .tape import Tape as Tape

__version__: str = _version("fewstep")


def solvers(noise_type: str | None = None) -> dict[str, type[Solver]]:
    """Every solver class of the public surface by name; with a noise type, those that can solve it."""
    if noise_type is not None:
        from .checks import word
        from .problem import NOISE_TYPES

        word("noise_type", noise_type, NOISE_TYPES)
    found = {
        name: value
        for name, value in globals().items()
        if isinstance(value, type) and issubclass(value, Solver) and hasattr(value, "card")
    }
    return {k: v for k, v in sorted(found.items()) if noise_type in (None, *v.card.strong_order)}
