"""The multistep consistency sampler: LCM."""

from itertools import pairwise

from torch import Tensor

from ..plan import Plan
from ..plan_builder import PlanBuilder
from ..schedule import Schedule
from ..solver import Card, DiffusionSolver
from .exponential import path_noise


class LCM(DiffusionSolver):
    r"""The sampler of consistency-distilled networks: the estimate of x0, and fresh noise of the next level.

    .. math:: x_t = D + t\,z

    with z the normal of the path in 1/sigma^2 from level s to t, independent of all earlier noise. For networks that
    were distilled to return the end of the probability-flow ODE from any level (LCM checkpoints): the samples then have
    the law of the data at any number of steps. With other networks they have too little variance, at any number of
    steps: use `DDIM` or `DPMSolverPP` there. It is ComfyUI's `lcm`, and for flows diffusers' FlowMatchLCMScheduler.
    """

    card: Card = Card(
        summary="estimate of x0 plus fresh noise, for consistency-distilled networks",
        reference="Song et al. 2023 (arXiv 2303.01469), Algorithm 1; Luo et al. 2023 (arXiv 2310.04378), Algorithm 3",
        levy="W",
        consistency=True,
    )

    def plan(self, sigmas: Tensor, schedule: Schedule | None = None) -> Plan:
        builder = PlanBuilder("LCM", sigmas)
        for s, t in pairwise(builder.sigmas.tolist()):
            noise = path_noise(builder, s, t, t)
            builder.advance(builder.evaluate(builder.x, s) + noise)
        return builder.finish()
