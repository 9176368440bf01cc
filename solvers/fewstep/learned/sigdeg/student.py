"""Signature-driven steps: a parent's step corrected by a network that reads the partial signature.

For SDEs (`SigStep`) the correction is a sum of iterated integrals with learned coefficients; for diffusion models
(`SigSampler`) the network replaces the denoiser and also receives the normalised partial signature xi of its
interval. Both are initialised to reproduce the parent exactly (arXiv 2508.16939).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import _validation
from ..._serialization import write_student
from ..._tracing import placed
from ..._validation import check_answer
from ...brownian import Increment
from ...brownian.increment import LEVY_ORDER
from ...denoiser import evaluation_names
from ...errors import InputError, one_of
from ...executor import Evaluate, Normals
from ...plan import Plan
from ...problem import SDE, DiffusionModel
from ...sde.euler_maruyama import EulerMaruyama
from ...solver import Card, Step, StochasticSolver
from ..network_student import NetworkStudent, check_compatible

PARENTS: dict[str, type[StochasticSolver]] = {"EulerMaruyama": EulerMaruyama}
TERMS = 5


class SigStep(StochasticSolver):
    r"""A step with learned coefficients of iterated Itô integrals, for diagonal noise in Itô's calculus.

    $y' = \text{parent} + c_1 I_{(1,1)} + c_2 I_{(1,0)} + c_3 I_{(0,1)} + c_4 I_{(0,0)} + c_5 I_{(1,1,1)}$
    with $c = \text{network}(t, y)$.

    Each term carries its own power of h, so the parent's strong order holds for any coefficients; this is the order
    on the card, a lower bound. With c_1 = g'g the order is 1.0, and with all five coefficients of the Itô-Taylor
    expansion it is 1.5 (Kloeden & Platen 1992, Eq. 10.4.1); an error of c_1 leaves one of its size times h^(1/2).
    Fitted by `distill_sigdeg_step`, the measured slopes are near 1.5 down to step sizes at which this error
    dominates. Per step: one drift, one diffusion and one network evaluation, and no derivative of g.

    Args:
        network: `(t, y) -> (*y.shape, 5)`; a solve moves it to the state's device.
        parent: the step that is corrected; by default `EulerMaruyama()`.
    """

    def __init__(self, network: nn.Module, parent: StochasticSolver | None = None) -> None:
        _validation.check_instance("network", network, nn.Module, "a torch.nn.Module (t, y) -> (*y.shape, 5)")
        self.network = network
        self.parent: StochasticSolver = EulerMaruyama() if parent is None else parent
        if type(self.parent).__name__ not in PARENTS:
            raise one_of("parent", type(self.parent).__name__, PARENTS)
        self.card: Card = replace(
            self.parent.card, summary=f"{type(self.parent).__name__} with learned iterated integrals",
            reference="after arXiv 2508.16939", levy="H", lower_bound=True,
            strong_order={"diagonal": self.parent.card.strong_order["diagonal"]},
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"SigStep({type(self.network).__name__}, parent={self.parent!r})"

    def init(self, sde: SDE, t0: Tensor, y0: Tensor) -> Any:
        check_compatible(self.network, "y0", y0, y0.shape[-1:])
        self.network.to(y0.device)
        return self.parent.init(sde, t0, y0)

    def step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: Any) -> Step:
        parent = self.parent.step(sde, t0, t1, y, increment, carry)
        terms = integrals(increment)
        coefficients = check_answer("network", self.network(t0.to(y), y), terms, of="y")
        return Step(parent.y + (coefficients * terms).sum(-1), parent.carry)

    def save(self, path: str | Path) -> None:
        """Write the student; `fewstep.load` reads it."""
        write_student(path, "SigStep", self.network, {"parent": type(self.parent).__name__}, None)

    @classmethod
    def _from_parts(cls, network: nn.Module, meta: dict[str, Any], plan: Plan | None) -> SigStep:
        if meta["parent"] not in PARENTS:
            raise one_of("parent", meta["parent"], PARENTS)
        return cls(network, PARENTS[meta["parent"]]())


def integrals(increment: Increment) -> Tensor:
    """(*W.shape, 5) the Itô integrals of one channel.

    I_(1,1) = (W^2 - h)/2, I_(1,0) = int W ds, I_(0,1) = int s dW, I_(0,0) = h^2/2, I_(1,1,1) = (W^3 - 3hW)/6.
    """
    h, W, H = increment.h, increment.W, increment.H
    assert H is not None
    terms = [0.5 * (W.square() - h), h * (W / 2 + H), h * (W / 2 - H)]
    return torch.stack([*terms, torch.full_like(W, h * h / 2), W * (W.square() - 3 * h) / 6], -1)


class SigSampler(NetworkStudent):
    r"""A few-step sampler: the parent's plan with a network in place of the denoiser.

    $x_{k+1} = a_k x_k + (1 - a_k)\,N_\theta(x_k, \sigma_k, \sigma_{k+1}, \xi_k) + \text{noise}$ for the
    parent `EulerMaruyama()`, with $a_k = \sigma_{k+1}^2 / \sigma_k^2$. One network evaluation per step.

    Args:
        plan: the parent's plan on the coarse grid, such as `EulerMaruyama().plan(sigmas)`.
        network: `(x, sigma, sigma_next, xi) -> x0`; xi is (batch, letters, *event), xi_0 = W/sqrt(h), xi_1 =
            sqrt(12/h) H, ... of the row's interval of tau = 1/sigma^2. It also gets `labels=` if `labelled` is True.
        levy: the coordinates it gets: "W", "H" (W and H) or "K".
        residual: add the network's value to the problem's denoiser instead of replacing it.
    """

    def __init__(self, plan: Plan, network: nn.Module, levy: str = "H", residual: bool = False) -> None:
        _validation.check_instance("plan", plan, Plan, "the parent's plan, such as EulerMaruyama().plan(sigmas)")
        _validation.check_instance("network", network, nn.Module, "a torch.nn.Module (x, sigma, sigma_next, xi) -> x0")
        if not plan.on_path.all() or plan.prediction != "data":
            raise InputError(
                f"plan: got {plan.name!r}, expected that of EulerMaruyama() or SEA() on a grid that ends above 0, in "
                "data prediction and with a path interval in each row."
            )
        self.levy: str = _validation.check_choice("levy", levy, LEVY_ORDER)
        # columns for letters that the network receives and the parent does not use
        pad = (0, max(LEVY_ORDER[levy] - plan.stage_noise.shape[-1], 0))
        stage, update = (nn.functional.pad(c, pad) for c in (plan.stage_noise, plan.update_noise))
        self.plan: Plan = replace(plan, name=f"SigSampler({plan.name})", stage_noise=stage, update_noise=update)
        self.network: nn.Module = network
        self.residual: bool = residual

    def __repr__(self) -> str:
        return f"<{self.plan.name}: {self.plan.nfe} evaluations, {type(self.network).__name__} with levy={self.levy!r}>"

    def evaluator(self, problem: DiffusionModel | None, like: Tensor) -> Evaluate:
        """The network as the executor calls it, for samples like these (batch, *event)."""
        arguments, letters = self.prepare(like), LEVY_ORDER[self.levy]
        levels = placed(self.plan.sigma, like.device, like.dtype).unbind()
        ends = placed(self.plan.noise[:, 1].rsqrt(), like.device, like.dtype).unbind()
        names = evaluation_names(self.plan.sigma)

        def evaluate(row: int, x: Tensor, normals: tuple[Normals, ...]) -> Tensor:
            xi = torch.stack(normals[0][:letters], 1)
            out = check_answer("network", self.network(x, levels[row], ends[row], xi, **arguments), x, names[row])
            if self.residual:
                assert problem is not None
                out = out + check_answer("denoiser", problem.denoiser(x, levels[row]), x, names[row])
            return out

        return evaluate

    def save(self, path: str | Path) -> None:
        """Write the student; `fewstep.load` reads it. Labels are not part of it."""
        meta = {"levy": self.levy, "residual": self.residual}
        write_student(path, "SigSampler", self.network, meta, self.plan)

    @classmethod
    def _from_parts(cls, network: nn.Module, meta: dict[str, Any], plan: Plan | None) -> SigSampler:
        letters = LEVY_ORDER[meta["levy"]]
        if plan is None or getattr(network, "letters", letters) != letters:
            raise InputError(
                f"file: got a SigSampler with levy={meta['levy']!r} "
                f"{'without a plan' if plan is None else 'and a network of other letters'}, "
                "expected its plan and a network for the same letters. Save the student again with student.save(path)."
            )
        name = plan.name.removeprefix("SigSampler(").removesuffix(")")
        return cls(plan.renamed(name), network, meta["levy"], meta["residual"])
