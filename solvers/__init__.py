"""fewstep: learned and classical SDE/ODE solvers that need few steps. The public surface, on one screen.

`solvers()` lists every solver named here with its card; a new solver is one file and one line below.
("as" marks a name as public for type checkers.)
"""

from __future__ import annotations

from .brownian import AreaPath as AreaPath
from .brownian import BrownianPath as BrownianPath
from .brownian import FreshIncrements as FreshIncrements
from .brownian import Increment as Increment
from .brownian import levy_area as levy_area
from .classical.derivative_free_milstein import DerivativeFreeMilstein as DerivativeFreeMilstein
from .classical.euler_maruyama import EulerMaruyama as EulerMaruyama
from .classical.log_ode import LogODE as LogODE
from .classical.milstein import Milstein as Milstein
from .classical.shark import ShARK as ShARK
from .denoiser import from_epsilon as from_epsilon
from .diffusion.ddim import DDIM as DDIM
from .diffusion.dpm_solver_pp import DPMSolverPP as DPMSolverPP
from .diffusion.edm import EDMHeun as EDMHeun
from .diffusion.unipc import UniPC as UniPC
from .errors import InputError as InputError
from .errors import NonFiniteError as NonFiniteError
from .grid import sigma_grid as sigma_grid
from .learned.distill_sigdeg import distill_sigdeg as distill_sigdeg
from .learned.sig_step import SigSampler as SigSampler
from .learned.sig_step import SigStep as SigStep
from .learned.store import load as load
from .plan import Plan as Plan
from .problem import ODE as ODE
from .problem import SDE as SDE
from .problem import Denoising as Denoising
from .sample import sample as sample
from .schedule import EDM as EDM
from .schedule import VE as VE
from .schedule import DiscreteVP as DiscreteVP
from .schedule import Schedule as Schedule
from .schedule import VPLinear as VPLinear
from .solve import Solution as Solution
from .solve import solve as solve
from .solver import Card as Card
from .solver import DiffusionSolver as DiffusionSolver
from .solver import Solver as Solver
from .solver import StochasticSolver as StochasticSolver
from .tape import Tape as Tape

__version__ = "0.1.0"


def solvers(noise_type: str | None = None) -> dict[str, type[Solver]]:
    """Every solver class of the public surface by name; with a noise type, those that can solve it."""
    found = {
        name: value
        for name, value in globals().items()
        if isinstance(value, type) and issubclass(value, Solver) and hasattr(value, "card")
    }
    return {k: v for k, v in sorted(found.items()) if noise_type in (None, *v.card.strong_order)}
