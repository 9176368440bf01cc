"""fewstep: learned and classical SDE/ODE solvers that need few steps. The public surface, on one screen.

`solvers()` lists every solver named here with its card; a new solver is one file and one line below.
"""

from __future__ import annotations

from .brownian import BrownianPath, FreshIncrements, Increment, levy_area
from .classical.derivative_free_milstein import DerivativeFreeMilstein
from .classical.euler_maruyama import EulerMaruyama
from .classical.milstein import Milstein
from .classical.shark import ShARK
from .denoiser import from_epsilon
from .diffusion.ddim import DDIM
from .diffusion.dpm_solver_pp import DPMSolverPP
from .diffusion.edm import EDMHeun
from .diffusion.unipc import UniPC
from .errors import InputError, NonFiniteError
from .grid import sigma_grid
from .learned.distill_sigdeg import distill_sigdeg
from .learned.sig_step import SigSampler, SigStep
from .learned.store import load
from .plan import Plan
from .problem import ODE, SDE, Denoising
from .sample import sample
from .schedule import EDM, VE, DiscreteVP, Schedule, VPLinear
from .solve import Solution, solve
from .solver import Card, DiffusionSolver, Solver, StochasticSolver
from .tape import Tape

__version__ = "0.1.0"


def solvers(noise_type: str | None = None) -> dict[str, type[Solver]]:
    """Every solver class of the public surface by name; with a noise type, those that can solve it."""
    found = {
        name: value
        for name, value in globals().items()
        if isinstance(value, type) and issubclass(value, Solver) and hasattr(value, "card")
    }
    return {k: v for k, v in sorted(found.items()) if noise_type in (None, *v.card.strong_order)}
