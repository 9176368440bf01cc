"""The public surface of fewstep, on one screen."""

import typing_extensions

from .adaptive import Adaptive as Adaptive
from .brownian import AreaPath as AreaPath
from .brownian import BrownianPath as BrownianPath
from .brownian import FreshIncrements as FreshIncrements
from .brownian import Increment as Increment
from .brownian import levy_area as levy_area
from .catalog import solvers as solvers
from .compare import compare as compare
from .denoiser import check_prediction as check_prediction
from .denoiser import clip as clip
from .denoiser import dynamic_thresholding as dynamic_thresholding
from .denoiser import from_edm as from_edm
from .denoiser import from_epsilon as from_epsilon
from .denoiser import from_flow as from_flow
from .denoiser import from_sample as from_sample
from .denoiser import from_score as from_score
from .denoiser import from_v as from_v
from .errors import InputError as InputError
from .errors import NonFiniteError as NonFiniteError
from .errors import StepSizeError as StepSizeError
from .grid import sigma_grid as sigma_grid
from .guidance import classifier_free_guidance as classifier_free_guidance
from .inversion import invert as invert
from .learned.dode.distill import distill_dode as distill_dode
from .learned.dode.regrid import regrid as regrid
from .learned.fit_grid import fit_grid as fit_grid
from .learned.loading import load as load
from .learned.sfddm.distill import distill_sfddm as distill_sfddm
from .learned.sfddm.student import SFDDM as SFDDM
from .learned.sigdeg.distill import distill_sigdeg as distill_sigdeg
from .learned.sigdeg.distill_step import distill_sigdeg_step as distill_sigdeg_step
from .learned.sigdeg.student import SigSampler as SigSampler
from .learned.sigdeg.student import SigStep as SigStep
from .learned.sigdeg.unet import SigUNet as SigUNet
from .learned.table.fit import fit_table as fit_table
from .learned.training import TeacherOptions as TeacherOptions
from .learned.training import TrainingOptions as TrainingOptions
from .learned.trajectories import make_trajectories as make_trajectories
from .likelihood import LogLikelihood as LogLikelihood
from .likelihood import log_likelihood as log_likelihood
from .outputs import Solution as Solution
from .plan import Plan as Plan
from .plan_builder import PlanBuilder as PlanBuilder
from .problem import ODE as ODE
from .problem import SDE as SDE
from .problem import DiffusionModel as DiffusionModel
from .problem import UnderdampedLangevin as UnderdampedLangevin
from .sample import sample as sample
from .samplers.ddim import DDIM as DDIM
from .samplers.ddpm import DDPM as DDPM
from .samplers.deis import DEIS as DEIS
from .samplers.dpm import DPMSolver as DPMSolver
from .samplers.dpm import DPMSolverPP as DPMSolverPP
from .samplers.dpm import DPMSolverSDE as DPMSolverSDE
from .samplers.edm import EDMEuler as EDMEuler
from .samplers.edm import EDMHeun as EDMHeun
from .samplers.er_sde import ERSDE as ERSDE
from .samplers.gradient_estimation import GradientEstimation as GradientEstimation
from .samplers.ipndm import IPNDM as IPNDM
from .samplers.lcm import LCM as LCM
from .samplers.pndm import PNDM as PNDM
from .samplers.restarts import Ancestral as Ancestral
from .samplers.restarts import Restart as Restart
from .samplers.sa_solver import SASolver as SASolver
from .samplers.seeds import SEEDS as SEEDS
from .samplers.tcd import TCD as TCD
from .samplers.unipc import UniPC as UniPC
from .schedule import EDM as EDM
from .schedule import VE as VE
from .schedule import DiscreteVP as DiscreteVP
from .schedule import FlowMatching as FlowMatching
from .schedule import Schedule as Schedule
from .schedule import SubVP as SubVP
from .schedule import VPCosine as VPCosine
from .schedule import VPLinear as VPLinear
from .schedule import VPScaledLinear as VPScaledLinear
from .schedule import VPSigmoid as VPSigmoid
from .schedule import zero_terminal_snr as zero_terminal_snr
from .sde.align import ALIGN as ALIGN
from .sde.bosh3 import Bosh3 as Bosh3
from .sde.derivative_free_milstein import DerivativeFreeMilstein as DerivativeFreeMilstein
from .sde.dopri5 import Dopri5 as Dopri5
from .sde.dri1 import DRI1 as DRI1
from .sde.euler_heun import EulerHeun as EulerHeun
from .sde.euler_maruyama import EulerMaruyama as EulerMaruyama
from .sde.exponential_euler import ExponentialEuler as ExponentialEuler
from .sde.general_milstein import GeneralMilstein as GeneralMilstein
from .sde.general_shark import GeneralShARK as GeneralShARK
from .sde.heun import Heun as Heun
from .sde.implicit_euler import ImplicitEuler as ImplicitEuler
from .sde.implicit_milstein import ImplicitMilstein as ImplicitMilstein
from .sde.kloeden_platen import KloedenPlaten15 as KloedenPlaten15
from .sde.log_ode import LogODE as LogODE
from .sde.midpoint import Midpoint as Midpoint
from .sde.milstein import Milstein as Milstein
from .sde.quicsort import QUICSORT as QUICSORT
from .sde.reversible import Reversible as Reversible
from .sde.reversible_heun import ReversibleHeun as ReversibleHeun
from .sde.rk4 import RK4 as RK4
from .sde.sea import SEA as SEA
from .sde.shark import ShARK as ShARK
from .sde.shifted_ode import ShiftedODE as ShiftedODE
from .sde.should import ShOULD as ShOULD
from .sde.skrock import SKROCK as SKROCK
from .sde.slow_rk import SlowRK as SlowRK
from .sde.sosra import SOSRA as SOSRA
from .sde.spark import SPaRK as SPaRK
from .sde.sra1 import SRA1 as SRA1
from .sde.srid2 import SRID2 as SRID2
from .sde.tamed_euler import TamedEuler as TamedEuler
from .sde.tamed_milstein import TamedMilstein as TamedMilstein
from .sde.taylor15 import Taylor15 as Taylor15
from .sde.truncated_euler import TruncatedEuler as TruncatedEuler
from .sde.tsit5 import Tsit5 as Tsit5
from .solve import solve as solve
from .solver import Card as Card
from .solver import DiffusionSolver as DiffusionSolver
from .solver import Step as Step
from .solver import StochasticSolver as StochasticSolver

__version__: str
__all__: list[str]

# names of 0.1, which warn when they are used

@typing_extensions.deprecated("Use DiffusionModel.")
class Denoising(DiffusionModel): ...

@typing_extensions.deprecated("Use PlanBuilder.")
class Tape(PlanBuilder): ...
