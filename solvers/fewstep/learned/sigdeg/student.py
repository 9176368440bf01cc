"""The signature-driven learned step: a parent's step corrected by a network that sees the partial signature.

For SDEs (`SigStep`) the correction is a sum of iterated integrals with learned coefficients; for
diffusion models (`SigSampler`) the network stands in for the denoiser and is told the normalised
partial signature xi of its interval. Both are born equal to their parent (arXiv 2508.16939).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import _validation
from ..._serialization import write_student
from ...brownian import Increment
from ...brownian.increment import LEVY_ORDER
from ...errors import InputError, one_of
from ...executor import Evaluate
from ...plan import Plan
from ...problem import SDE, DiffusionModel
from ...sde.euler_maruyama import EulerMaruyama
from ...solver import Card, Step, StochasticSolver
from ..labels import told, with_labels

PARENTS: dict[str, type[StochasticSolver]] = {"EulerMaruyama": EulerMaruyama}
TERMS = 5


class SigStep(StochasticSolver):
    """y' = parent + c_1 I_(1,1) + c_2 I_(1,0) + c_3 I_(0,1) + c_4 I_(0,0) + c_5 I_(1,1,1), c = network(t, y).

    For diagonal noise in Ito's calculus. Each term carries its own power of h, so that the parent's
    strong order survives any coefficients; with c_1 = g'g the order is 1.0, and with all five those of
    the Ito-Taylor expansion 1.5 (Kloeden & Platen 1992, Eq. 10.4.1). The card promises the parent's: an
    error of c_1 leaves one of its size times h^(1/2). As `distill_sigdeg` fits it, the slopes that are
    measured are near 1.5 until h is so small that this one dominates. One drift, one diffusion and
    one network evaluation a step, no derivative of g.

    Args:
        network: `(t, y) -> (*y.shape, 5)`; `Coefficients` starts at nought. A solve moves it to the state's
            device.
        parent: the step that is corrected.
    """

    def __init__(self, network: nn.Module, parent: StochasticSolver | None = None) -> None:
        _validation.check_instance("network", network, nn.Module, "a torch.nn.Module (t, y) -> (*y.shape, 5)")
        self.network = network
        self.parent: StochasticSolver = EulerMaruyama() if parent is None else parent
        if type(self.parent).__name__ not in PARENTS:
            raise one_of("parent", type(self.parent).__name__, PARENTS)
        self.card: Card = replace(
            self.parent.card, summary=f"{type(self.parent).__name__} with learned iterated integrals",
            reference="after arXiv 2508.16939", levy="H",
            strong_order={"diagonal": self.parent.card.strong_order["diagonal"]},
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"SigStep({type(self.network).__name__}, parent={self.parent!r})"

    def init(self, sde: SDE, t0: Tensor, y0: Tensor) -> Any:
        fits(self.network, "y0", y0, y0.shape[-1:])
        self.network.to(y0.device)
        return self.parent.init(sde, t0, y0)

    def step(self, sde: SDE, t0: Tensor, t1: Tensor, y: Tensor, increment: Increment, carry: Any) -> Step:
        parent = self.parent.step(sde, t0, t1, y, increment, carry)
        correction = (self.network(t0, y) * integrals(increment)).sum(-1)
        return Step(parent.y + correction, parent.carry)

    def save(self, path: str | Path) -> None:
        """Write the student; `fewstep.load` reads it."""
        write_student(path, "SigStep", self.network, {"parent": type(self.parent).__name__}, None)

    @classmethod
    def _from_parts(cls, network: nn.Module, meta: dict[str, Any], plan: Plan | None) -> SigStep:
        if meta["parent"] not in PARENTS:
            raise one_of("parent", meta["parent"], PARENTS)
        return cls(network, PARENTS[meta["parent"]]())


def fits(network: nn.Module, argument: str, x: Tensor, event: Sequence[int]) -> None:
    """Refuse a state of another size or dtype than one of this library's networks was made for."""
    config = getattr(network, "config", {})
    expected = tuple(config.get("event", [config["d"]] if "d" in config else event))
    if tuple(event) != expected:
        raise InputError(
            f"{argument}: got events of shape {tuple(event)}; the student was made for {expected}."
        )
    dtype = next((p.dtype for p in network.parameters()), x.dtype)
    if x.dtype != dtype:
        raise InputError(
            f"{argument}: got {x.dtype}; the student's network is in {dtype}. Convert the state, or the "
            "network with student.network.to(dtype)."
        )


def integrals(increment: Increment) -> Tensor:
    """(*W.shape, 5) Ito integrals of one channel.

    I_(1,1) = (W^2 - h)/2, I_(1,0) = int W ds, I_(0,1) = int s dW, I_(0,0) = h^2/2, I_(1,1,1) = (W^3 - 3hW)/6.
    """
    h, W, H = increment.h, increment.W, increment.H
    assert H is not None
    terms = [0.5 * (W.square() - h), h * (W / 2 + H), h * (W / 2 - H)]
    return torch.stack([*terms, torch.full_like(W, h * h / 2), W * (W.square() - 3 * h) / 6], -1)


class SigSampler:
    """A few-step sampler: the parent's plan, with a network in the denoiser's place that sees xi.

    Args:
        plan: the parent's plan on the coarse grid, for instance `EulerMaruyama().plan(sigmas)`.
        network: `(x, sigma, sigma_next, xi) -> x0`; xi is (batch, letters, *event), xi_0 = W/sqrt(h),
            xi_1 = sqrt(12/h) H, ... of the row's interval of tau = 1/sigma^2. One whose `labelled` is True
            is told `labels=` as well, one whose `feedback` is True `last=`, its previous value.
        levy: the coordinates it is told: "W", "H" (W and H) or "K".
        residual: the network's value is added to the problem's denoiser instead of replacing it.
    """

    def __init__(self, plan: Plan, network: nn.Module, levy: str = "H", residual: bool = False) -> None:
        _validation.check_instance(
            "plan", plan, Plan, "the parent's plan, such as EulerMaruyama().plan(sigmas)"
        )
        _validation.check_instance(
            "network", network, nn.Module, "a torch.nn.Module (x, sigma, sigma_next, xi) -> x0"
        )
        on_path = bool((plan.noise[:, 1] > plan.noise[:, 0]).all())  # nan compares false
        if not on_path or plan.prediction != "data":
            raise InputError(
                f"plan: got {plan.name!r}, which does not open a path interval in each row or is not in data "
                "prediction; expected that of EulerMaruyama() or SEA() on a grid that ends above 0."
            )
        _validation.check_choice("levy", levy, LEVY_ORDER)
        letters = LEVY_ORDER[levy]
        spare = letters - plan.stage_noise.shape[-1]
        pad = (0, max(spare, 0))  # letters that the parent does not use, but the network sees
        self.plan: Plan = replace(
            plan, name=f"SigSampler({plan.name})",
            stage_noise=nn.functional.pad(plan.stage_noise, pad), update_noise=nn.functional.pad(plan.update_noise, pad),
        )  # fmt: skip
        self.network = network
        self.levy = levy
        self.residual = residual
        self.labels: Tensor | None = None

    def __repr__(self) -> str:
        told = f"{type(self.network).__name__} told {self.levy!r}"
        return f"<{self.plan.name}: {self.plan.nfe} evaluations, {told}>"

    def at(self, labels: Tensor) -> SigSampler:
        """The same student for samples of these classes, (batch, ...).

        Raises:
            InputError: the network takes no labels.
        """
        return with_labels(self, self.network, labels)

    def predict(
        self, problem: DiffusionModel | None, x: Tensor, sigma: Tensor, sigma_next: Tensor, xi: Tensor,
        last: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The effective x0 of one step; `last` is the step's before, None at the first."""
        extra = told(self.network, self.labels, x)
        if getattr(self.network, "feedback", False):
            extra["last"] = torch.zeros_like(x) if last is None else last
        out: Tensor = self.network(x, sigma, sigma_next, xi, **extra)
        if out.shape != x.shape:
            raise InputError(
                f"network: gave {tuple(out.shape)} for {tuple(x.shape)}, expected the same shape."
            )
        if self.residual:
            assert problem is not None
            out = out + problem.denoiser(x, sigma)
        return out

    def evaluator(self, problem: DiffusionModel | None, like: Tensor) -> Evaluate:
        """The network as the executor calls it."""
        fits(self.network, "noise", like, like.shape[1:])
        levels = self.plan.sigma.to(like.device, like.dtype).unbind()
        ends = self.plan.noise[:, 1].rsqrt().to(like.device, like.dtype).unbind()
        self.network.to(like.device)
        student, letters, last = self, LEVY_ORDER[self.levy], None
        if self.labels is not None:
            student = self.at(self.labels.to(like.device))

        def evaluate(row: int, x: Tensor, normals: Any) -> Tensor:
            nonlocal last  # of this run alone: each has an evaluator of its own
            xi = torch.stack(normals[0][:letters], 1)
            out = student.predict(problem, x, levels[row], ends[row], xi, last if row else None)
            last = out
            return out

        return evaluate

    def save(self, path: str | Path) -> None:
        """Write the student; `fewstep.load` reads it. Labels are not part of it."""
        meta = {"levy": self.levy, "residual": self.residual}
        write_student(path, "SigSampler", self.network, meta, self.plan)

    @classmethod
    def _from_parts(cls, network: nn.Module, meta: dict[str, Any], plan: Plan | None) -> SigSampler:
        if plan is None or getattr(network, "letters", LEVY_ORDER[meta["levy"]]) != LEVY_ORDER[meta["levy"]]:
            raise InputError("levy: a SigSampler's file lacks its plan, or its network has other letters.")
        name = plan.name.removeprefix("SigSampler(").removesuffix(")")
        return cls(plan.renamed(name), network, meta["levy"], meta["residual"])
